"""Turns a name of the hub into a folder on disk, and each way that this fails into one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .files import ADAPTER_FILE
from .json_file import read_json
from .safetensors_ranges import INDEX, SINGLE
from .weight_files import NAMED_WEIGHTS, no_weights, read_index

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

HUB_ID = re.compile(r"^(?:hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?$")
# What a checkpoint needs beside its weights: configuration, processor, tokenizer, templates, licence texts.
COMPANION_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "additional_chat_templates/*",
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "router/model.safetensors", ADAPTER_FILE)
HUB_TIMEOUT_S = 60
TOKEN = re.compile(r"\bhf_[\w.-]{8,}")
HUB_STATUS = {
    400: "it does not accept what was sent",
    401: "your token is missing or invalid (`hf auth login`)",
    402: "the account has to pay for this",
    403: "your token lacks the right to do this",
    404: "it does not exist there",
    409: "it is in conflict with what is there",
    412: "somebody else committed to it meanwhile, repeat the command",
    413: "a file is too large for it",
    429: "too many requests, wait a while",
}


def resolve(name: str, revision: str | None = None, whole: bool = False) -> tuple[Path, str | None]:
    """Return folder and commit of what the user named. Hub ids are downloaded into the hub's own cache.

    Args:
        whole: download everything, code too, for comparing each file with a record; else what models are made of.
    """
    path = Path(name).expanduser()
    if name and path.is_dir() and not name.startswith("hub:"):
        return path, None
    match = HUB_ID.match(name)
    if not match or name.startswith((".", "/", "~")) or path.exists():
        raise InputError(f"'{name}' is neither a folder nor a hub id (USER/NAME or hub:USER/NAME@REVISION).")
    repo, revision = match[1], match[2] or revision
    if whole:
        folder = download(repo, revision, None)
        return folder, folder.name
    folder = download(repo, revision, [*COMPANION_FILES, *WEIGHT_FILES, "README.md"])
    if further := further_weights(folder):
        download(repo, folder.name, further)
    return folder, folder.name


def download(repo: str, revision: str | None, patterns: list[str] | None) -> Path:
    """Download the files of a repository whose names match, into the hub's own cache."""
    from huggingface_hub import snapshot_download

    with hub_errors(repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def further_weights(folder: Path) -> list[str]:
    """Return weight files that a downloaded index or configuration names and that are not there yet."""
    names: set[str] = set()
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    named = config.get(NAMED_WEIGHTS)
    if isinstance(named, str):
        names.add(named)
    elif not (folder / SINGLE).exists() and (folder / INDEX).exists():
        names |= set(read_index(folder / INDEX).values())
    return sorted(name for name in names if not (folder / name).exists())


def refuse_without_weights(name: str, commit: str, folder: Path) -> None:
    """Raise InputError for a repository without weights that can be read, and say what it has instead.

    Args:
        name: as the user wrote it.
    """
    if any((folder / file).exists() for file in (SINGLE, INDEX)):
        return
    from huggingface_hub import HfApi

    match = HUB_ID.match(name)
    assert match is not None
    with hub_errors(match[1], commit):
        raise InputError(no_weights(match[1], HfApi().list_repo_files(match[1], revision=commit)))


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence each, and wait for no answer for ever.

    The token is never part of a message. A server may quote it, hence 'from None': a traceback would show its words.
    """
    try:
        with _limited_waiting():
            yield
    except Exception as error:
        sentence = _hub_sentence(error, repo, revision)
        if sentence is None:
            raise
        raise InputError(sentence) from None


@contextlib.contextmanager
def _limited_waiting() -> Iterator[None]:
    """Give every request of huggingface_hub a time limit; most have none of their own."""
    from huggingface_hub import get_session

    limit = hub_timeout()

    def set_limit(request: Any) -> None:
        timeouts = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: timeouts.get(kind) or limit for kind in kinds}

    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks.get("request", []), set_limit]}
    try:
        yield
    finally:
        client.event_hooks = hooks


def hub_timeout() -> float:
    """Return the seconds that the hub may stay silent, from huggingface_hub's own variable for downloads."""
    return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or HUB_TIMEOUT_S)


def _hub_sentence(error: BaseException, repo: str, revision: str | None) -> str | None:
    """Return what a user is told of an error of huggingface_hub; None if it is not one."""
    from huggingface_hub import errors

    if type(error) in (RuntimeError, ValueError) and error.__cause__ is not None:  # as uploads report a failed step
        return _hub_sentence(error.__cause__, repo, revision)
    home = type(error).__module__.split(".")[0]
    match error:
        case errors.GatedRepoError():
            return f"{repo} is gated: accept its terms on the hub and log in (`hf auth login`)."
        case errors.RevisionNotFoundError():
            return f"{repo} has no revision '{revision}'."
        case errors.RepositoryNotFoundError():
            return (
                f"{repo} is neither a folder here nor a repository that you can see on the hub: check the name, or log "
                "in (`hf auth login`) if it is private."
            )
        case errors.LocalEntryNotFoundError():
            return f"{repo} is not in the local hub cache and the hub can't be reached."
        case errors.HfHubHTTPError():
            return f"the hub answered {error.response.status_code} for {repo}: {_refusal(error)}."
        case errors.HFValidationError():
            return f"'{repo}' is no valid repository name: {error}"
        case errors.OfflineModeIsEnabled():
            return f"{repo} is on the hub, and HF_HUB_OFFLINE is set: unset it."
        case ValueError() if str(error).startswith("LFS batch API"):
            return f"the hub takes no large file for {repo}: its storage may be used up."
        case json.JSONDecodeError():
            return f"what answers for {repo} is no hub, or a broken one: check HF_ENDPOINT, or try again later."
    if isinstance(error, UnicodeEncodeError) or type(error).__name__ == "LocalProtocolError":  # before anything is sent
        return (
            "your token for the hub holds a character that no token has: log in again (`hf auth login`), or set "
            "HF_TOKEN right."
        )
    if "Timeout" in type(error).__name__ and home.startswith("httpx"):
        return f"the hub does not answer for {repo}: try again later, or wait longer with HF_HUB_DOWNLOAD_TIMEOUT=300."
    if home.startswith("httpx"):  # the hub client's transport, whatever its version
        return f"the hub can't be reached for {repo} ({type(error).__name__}): try again later."
    if home == "hf_xet" or type(error) is ConnectionError:  # as hf_xet reports that its storage fails
        return f"the hub's Xet storage fails for {repo}: try again later, or set HF_HUB_DISABLE_XET=1 to do without."
    if home == "huggingface_hub":
        return f"the hub's client fails for {repo} ({type(error).__name__})."
    return None


def _refusal(error: HfHubHTTPError) -> str:
    """Say why the hub refused: what the status means, and the hub's words, without the token."""
    status = error.response.status_code
    meaning = HUB_STATUS.get(status, "it has a problem of its own, try again later" if status >= 500 else "it says no")
    words = " ".join((error.server_message or "").split())
    sent = error.response.request.headers.get("authorization", "").removeprefix("Bearer ")
    words = re.sub(TOKEN, "...", words.replace(sent or "\0", "..."))
    return meaning if not words or words.startswith("<") else f'{meaning} ("{words[:200]}")'
