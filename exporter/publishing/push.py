"""Publishes a checkpoint or its ONNX graphs: verified first, then in one commit, so that a repository never holds half
a model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cards.model_card import loading_name
from ..checkpoints.files import CARD, is_published_document, listed, refuse_links_out
from ..checkpoints.hub_access import hub_errors
from ..checkpoints.shapes import require_file
from ..checkpoints.temporary import temporary_folder
from ..errors import InputError
from .folder_kinds import CHECKPOINT, GRAPHS, FolderKind, kind_of, recorded

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

BRANCH = re.compile(r"\w[\w.-]*(?:/[\w.-]+)*")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pushed:
    """The result of a publication, or of its dry run."""

    repo_id: str
    revision: str  # branch that it went to, or that the pull request is for
    url: str
    commit: str | None  # None: a dry run
    pr_url: str | None
    changed: bool | None  # False: everything was there already, and no commit was made
    existed: bool | None  # the repository, before; None: the hub could not be asked
    private: bool | None  # None: as the account's default says
    files: dict[str, int]  # bytes of each
    removed: tuple[str, ...]  # weight files of an earlier push that this folder does not have
    own_card: bool  # README.md was edited by hand, and what was written there went along
    left: tuple[str, ...] = ()  # files of the folder that do not go: no part of what was made, no document

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def to_data(self) -> dict[str, Any]:
        return asdict(self) | {"bytes": self.bytes}


def push(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Pushed:
    """Verify a folder and publish it in one commit, with the card under the repository's name.

    The folder itself stays as it is. A push that was broken off can be repeated: files that arrived are not sent again.

    Args:
        private: make a new repository private; one that exists must be private already.
        revision: branch, made from main where there is none; None: main.
        create_pr: open a pull request, and leave the branch alone.
        dry_run: only say what would be published; needs no token.
        message: of the commit.
        device: on which the folder is verified.
        trust_remote_code: run the folder's Python code for that even if this package did not ship it.
    Raises: InputError for wrong input and for everything that goes wrong with the hub; CheckFailed if the folder does
        not verify. Nothing was published in either case.
    """
    folder = Path(folder)
    repo_id, branch = repository_name(repo_id), branch_name(revision)
    kind = kind_of(folder)
    names = published(folder, kind)
    refuse_links_out(folder, names)
    for name in names:
        require_file(folder / name, "a file to publish")
    api = client(token_needed=not dry_run)
    existed, seen = repository_state(api, repo_id, may_fail=dry_run)
    check_request(repo_id, seen, existed=existed, private=private, create_pr=create_pr)
    check_kind(repo_id, seen, kind)
    kind.require(folder, device, trust_remote_code)
    with contents(folder, repo_id, kind, names) as (paths, own_card):
        planned = Pushed(
            repo_id=repo_id,
            revision=branch,
            url=page(api, repo_id, branch),
            commit=None,
            pr_url=None,
            changed=None,
            existed=existed,
            private=seen.private if seen else (private or None),
            files={name: path.stat().st_size for name, path in sorted(paths.items())},
            removed=(),
            own_card=own_card,
            left=tuple(name for name in listed(folder) if name not in names),
        )
        if dry_run:
            return planned
        return upload(api, planned, paths=paths, kind=kind, private=private, create_pr=create_pr, message=message)


# --- what was asked for -----------------------------------------------------------------------------------------------


def repository_name(repo_id: str) -> str:
    """Return USER/NAME, checked as far as that goes without the hub."""
    from huggingface_hub import hf_hub_url

    name = repo_id.removeprefix("hub:")
    if name.count("/") != 1 or "@" in name:
        raise InputError(f"'{repo_id}' is no repository: USER/NAME is needed (and a branch goes to --revision).")
    with hub_errors(name):
        hf_hub_url(name, CARD)  # asks nobody, but checks the name
    return name


def branch_name(revision: str | None) -> str:
    if revision is None:
        return "main"
    if COMMIT.fullmatch(revision):
        raise InputError(f"revision {revision} is a commit: name a branch, nothing can be added to a commit.")
    if not BRANCH.fullmatch(revision) or ".." in revision or revision.endswith((".", ".lock")):
        raise InputError(f"revision '{revision}' is not a valid branch name: use letters, digits and . _ - /.")
    return revision


def client(token_needed: bool) -> HfApi:
    from huggingface_hub import HfApi, get_token

    with hub_errors("the log-in"):
        token = get_token()
    if token is None and token_needed:
        raise InputError("there is no token for the hub: log in (`hf auth login`), or set HF_TOKEN.")
    return HfApi(token=token or False, library_name="lvlm-exporter")


def repository_state(api: HfApi, repo_id: str, may_fail: bool) -> tuple[bool | None, ModelInfo | None]:
    """Return whether there is such a repository (None: the hub can't be asked), and what it is like."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        with hub_errors(repo_id):
            try:
                return True, api.model_info(repo_id)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return False, None
    except InputError:
        if may_fail:
            return None, None
        raise


def check_request(repo_id: str, seen: ModelInfo | None, existed: bool | None, private: bool, create_pr: bool) -> None:
    if private and seen is not None and not seen.private:
        raise InputError(
            f"{repo_id} is there already and public: --private can't change that. Make it private in its settings on "
            "the hub, or name another repository."
        )
    if create_pr and existed is False:
        raise InputError(f"there is no repository {repo_id} to open a pull request in: push without --create-pr.")


def check_kind(repo_id: str, seen: ModelInfo | None, kind: FolderKind) -> None:
    """Refuse graphs beside a checkpoint: they would take its card and its configuration."""
    other, what = (CHECKPOINT, "a checkpoint") if kind is GRAPHS else (GRAPHS, "ONNX graphs")
    if seen is not None and other.record in names_in(seen):
        raise InputError(
            f"{repo_id} holds {what} ({other.record}): name another repository, so that one card does not "
            "replace the other."
        )


# --- what is published ------------------------------------------------------------------------------------------------


@contextmanager
def contents(
    folder: Path, repo_id: str, kind: FolderKind, names: Iterable[str]
) -> Iterator[tuple[dict[str, Path], bool]]:
    """Give the files to publish by their name in the repository, and whether the card is somebody's own."""
    with temporary_folder("push", folder) as card_folder:
        own_card = write_card(folder, repo_id, kind, card_folder)
        yield {name: folder / name for name in names} | listed(card_folder), own_card


def published(folder: Path, kind: FolderKind) -> list[str]:
    """Return what goes to the hub: the record, the files that it holds the hashes of, and documents; nothing hidden."""
    hashes = recorded(folder, kind)
    return [name for name in listed(folder) if name == kind.record or name in hashes or is_published_document(name)]


def write_card(folder: Path, repo_id: str, kind: FolderKind, into: Path) -> bool:
    """Write the card under the repository's name, with its pictures. Return True where a person's README.md stays."""
    shutil.copyfile(folder / kind.record, into / kind.record)
    pure = kind.card(into, repo_id).read_bytes()
    if not (folder / CARD).exists():
        return False
    name = loading_name(folder) or folder.name
    (into / CARD).write_bytes((folder / CARD).read_bytes())
    kind.card(into, repo_id)
    merged = (into / CARD).read_bytes()
    (into / CARD).write_bytes(merged.replace(f'("{name}"'.encode(), f'("{repo_id}"'.encode()))  # in edited examples
    return merged != pure


# --- the hub ----------------------------------------------------------------------------------------------------------


def upload(
    api: HfApi,
    planned: Pushed,
    paths: dict[str, Path],
    kind: FolderKind,
    private: bool,
    create_pr: bool,
    message: str | None,
) -> Pushed:
    """Make what is missing, and commit everything at once.

    create_commit instead of upload_folder: the latter may spread a slow upload over several commits, and opens a pull
    request before there is anything in it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id, branch = planned.repo_id, planned.revision
    with hub_errors(repo_id, branch):
        if not planned.existed:
            api.create_repo(repo_id, private=private or None)
        if branch != "main" and not branch.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        before = api.model_info(repo_id, revision=branch)
        check_request(repo_id, before, existed=True, private=private, create_pr=create_pr)
        check_kind(repo_id, before, kind)
        stale = sorted(set(weight_files(before, kind)) - set(paths))
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, path) for name, path in sorted(paths.items())]
            + [CommitOperationDelete(name) for name in stale],
            commit_message=message or default_message(),
            revision=branch,
            create_pr=create_pr,
            parent_commit=before.sha,  # nobody else's commit is overwritten
        )
    return replace(
        planned,
        url=done.pr_url or planned.url,
        commit=done.oid,
        pr_url=done.pr_url,
        changed=done.oid != before.sha,
        private=before.private,
        removed=tuple(stale),
    )


def names_in(repository: ModelInfo) -> list[str]:
    return [sibling.rfilename for sibling in repository.siblings or ()]


def weight_files(repository: ModelInfo, kind: FolderKind) -> list[str]:
    top = [name for name in names_in(repository) if "/" not in name]
    return [name for name in top if any(fnmatch(name, pattern) for pattern in kind.weights)]


def default_message() -> str:
    from ..version import __version__

    return f"Upload with lvlm-exporter {__version__}"


def page(api: HfApi, repo_id: str, branch: str) -> str:
    address = f"{api.endpoint}/{repo_id}"
    return address if branch == "main" else f"{address}/tree/{branch}"


# --- telling ----------------------------------------------------------------------------------------------------------


def describe(pushed: Pushed) -> str:
    """Return what a person is told, some lines."""
    amount = f"{len(pushed.files)} files, {pushed.bytes / 1e6:,.2f} MB"
    kind = {True: "private", False: "public", None: "as visible as the account's default says"}[pushed.private]
    if pushed.commit is None:
        state = {True: "exists", False: "new", None: "the hub could not be asked whether it exists"}[pushed.existed]
        lines = [f"would push {amount} to {pushed.url} ({state}; {kind}):"]
        lines += [f"  {size:>15,}  {name}" for name, size in pushed.files.items()]
    elif not pushed.changed:
        lines = [f"nothing to push: {pushed.url} ({kind}) has all {amount} already, in commit {pushed.commit[:10]}"]
    elif pushed.pr_url:
        lines = [f"opened a pull request with {amount}, for you to publish there: {pushed.pr_url}"]
    else:
        lines = [f"pushed {amount} in commit {pushed.commit[:10]}: {pushed.url} ({kind})"]
    if pushed.removed:
        lines.append(f"removed weights of an earlier push: {', '.join(pushed.removed)}")
    if pushed.left:
        lines.append(f"not published, since they are no part of the checkpoint: {', '.join(pushed.left)}")
    if pushed.own_card:
        lines.append("README.md was edited by hand: what you wrote goes along, the rest is under the repository's name")
    return "\n".join(lines)
