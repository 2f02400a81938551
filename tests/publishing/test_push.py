"""Publishing: through real HTTP to a hub on loopback, and back by name in a process that knows nothing of us."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.checkpoints import recipe, snapshot, without_verification
from fixtures.hub import NAME, pushed, refused
from fixtures.made_folders import rehash, routed_copy
from huggingface_hub import constants
from loopback_hub import OWNER, READ_TOKEN, TOKEN, LoopbackHub, Repo
from safetensors.torch import load_file, save_file

from exporter import clean_room
from exporter.checkpoints import verification
from exporter.checkpoints.files import file_hash
from exporter.checkpoints.source import open_source
from exporter.errors import InputError
from exporter.pipeline import compress
from exporter.publishing.folder_kinds import verify
from exporter.publishing.push import push

ROOT = Path(__file__).parents[2]
PRIVATE_FILES = (".env", ".lock", "compression.partial", "__pycache__/modeling.cpython-311.pyc", "assets/.DS_Store")
# The folder is verified for real in some tests; in the others it is known to be good.
UNVERIFIED = (
    "import dataclasses, sys; from exporter import cli; from exporter.publishing import folder_kinds as kinds; "
    "kinds.CHECKPOINT = dataclasses.replace(kinds.CHECKPOINT, require=lambda *_: None); "
    "sys.exit(cli.main(sys.argv[1:]))"
)
FROM_PRETRAINED = """
import importlib, importlib.util, json, sys
room = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("clean_room", sys.argv[1]))
sys.modules["clean_room"] = room
spec.loader.exec_module(room)
importlib.import_module("clean_room.process").block_exporter()
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[2]).eval()
processor = AutoProcessor.from_pretrained(sys.argv[2])
print(json.dumps(room.reference_answer(model, processor)["tokens"]))
"""


@pytest.fixture(scope="module")
def small(tiny, questions, tmp_path_factory) -> Path:
    """A compressed checkpoint of several shards, with files in it that are nobody else's business."""
    made = recipe(tiny("llava", max_shard_size="100KB"), questions)
    with without_verification():  # the first push verifies it
        folder = compress(made, tmp_path_factory.mktemp("push") / "small")
    for name in PRIVATE_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for others")
    return folder


def started(hub: LoopbackHub, home: Path, *arguments, verified: bool = False, **environment: str) -> subprocess.Popen:
    run = ["-m", "exporter"] if verified else ["-c", UNVERIFIED]
    return subprocess.Popen(
        [sys.executable, *run, "push", *map(str, arguments)],
        env=hub.environment(home, **environment),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    assert TOKEN not in out + err
    return process.returncode, out, err


def weights(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("model*")}


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(small, tmp_path_factory):
    """The first push, from the command line, verified, and all that it left."""
    home = tmp_path_factory.mktemp("home")
    before = snapshot(small)
    with LoopbackHub() as hub:
        ran = ended(started(hub, home, small, NAME, "--json", home / "pushed.json", verified=True))
        assert snapshot(small) == before
        yield hub, ran, json.loads((home / "pushed.json").read_text())


@pytest.mark.clean_process
def test_push_publishes_the_folder_with_its_card(first, small):
    hub, (code, out, err), told = first
    assert (code, err) == (0, "")
    assert f"{hub.url}/{NAME}" in out
    repo = hub.repos[NAME]
    assert not repo.private
    assert repo.history() == [told_message(), "initial commit"]
    published = repo.files()
    for path in PRIVATE_FILES:
        assert path not in published
    for path in weights(small) | {"config.json", "compression.json", "tokenizer.json", "assets/layer_scores.png"}:
        assert published[path] == (small / path).read_bytes()
    assert f'from_pretrained("{NAME}"'.encode() in published["README.md"]
    assert b'from_pretrained("small"' in (small / "README.md").read_bytes()
    assert told["url"] == f"{hub.url}/{NAME}"
    assert told["commit"] == repo.refs["main"]
    assert set(told["files"]) == set(published) - {".gitattributes"}
    assert told["bytes"] == sum(map(len, published.values())) - len(published[".gitattributes"])


def told_message() -> str:
    from exporter import __version__

    return f"Upload with lvlm-exporter {__version__}"


@pytest.mark.clean_process
def test_it_comes_back_by_name_in_a_clean_process(first, small, tmp_path):
    hub, *_ = first
    ran = subprocess.run(
        [sys.executable, "-I", "-c", FROM_PRETRAINED, clean_room.__file__, NAME],
        env=hub.environment(tmp_path, token=None),
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads((small / "compression.json").read_text())["reference"]["tokens"]


@pytest.mark.clean_process
def test_a_second_push_adds_nothing(first, small, tmp_path):
    hub, *_ = first
    commits, sent = hub.repos[NAME].history(), hub.count("PUT ")
    code, out, _ = ended(started(hub, tmp_path, small, NAME))
    assert code == 0
    assert "nothing to push" in out
    assert hub.repos[NAME].history() == commits
    assert hub.count("PUT ") == sent


@pytest.fixture
def longer(small, tmp_path) -> Path:
    """The checkpoint with one file more."""
    folder = Path(shutil.copytree(small, tmp_path / "longer"))
    (folder / "NOTICE").write_text("made of others' work")
    return folder


def test_what_was_pushed_verifies_by_its_name(here, small, capsys, monkeypatch, tmp_path):
    """Each file is downloaded to be compared, a routed checkpoint's modeling file among them."""
    opened: list[Path] = []
    monkeypatch.setattr(verification, "_in_clean_process", lambda folder, device: (opened.append(folder) or (), {}))
    pushed(capsys, routed_copy(small, tmp_path / "routed"), NAME)
    assert verify(NAME).holds and verify(f"hub:{NAME}@main").holds
    assert (opened[0] / "modeling_routed.py").is_file() and (opened[0] / "router/model.safetensors").is_file()
    files = here.repos[NAME].commits[here.repos[NAME].refs["main"]].files
    here.repos[NAME].commit("main", files | {"custom_generate/generate.py": files["README.md"]}, "a stranger's")
    problems = "; ".join(verify(NAME).problems)
    assert "custom_generate/generate.py has no SHA-256 in the record" in problems and len(opened) == 2


@pytest.mark.slow
def test_a_branch_is_made_and_found_by_its_name(here, small, longer, capsys):
    pushed(capsys, small, NAME)
    repo = here.repos[NAME]
    main_commit = repo.refs["main"]
    assert f"{NAME}/tree/v2.0" in pushed(capsys, small, NAME, "--revision", "v2.0")
    assert repo.refs == {"main": main_commit, "v2.0": main_commit}  # nothing differs: no commit
    pushed(capsys, longer, NAME, "--revision", "v2.0", "--message", "credits")
    assert repo.refs["main"] == main_commit
    assert repo.history("v2.0")[0] == "credits"

    source = open_source(f"hub:{NAME}@v2.0")
    assert source.revision == repo.refs["v2.0"] != main_commit
    assert open_source(NAME, "v2.0").weights.num_bytes == open_source(str(small)).weights.num_bytes
    with pytest.raises(InputError, match="has no revision 'v3'"):
        open_source(NAME, "v3")
    with pytest.raises(InputError, match="nor a repository that you can see"):
        open_source(f"{OWNER}/nothing")
    here.fail("GET", status=500, times=99)
    with pytest.raises(InputError, match="not in the local hub cache and the hub can't be reached"):
        open_source(f"{OWNER}/other")


def test_private(here, small, capsys, monkeypatch):
    assert "(private)" in pushed(capsys, small, NAME, "--private")
    assert here.repos[NAME].private
    assert "(private)" in pushed(capsys, small, NAME)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="nor a repository that you can see"):
        open_source(NAME)


def test_a_public_repository_is_not_taken_for_a_private_one(here, small, capsys):
    pushed(capsys, small, NAME)
    here.requests.clear()
    assert "there already and public" in refused(capsys, small, NAME, "--private")
    assert here.count("POST|PUT") == 0


def test_a_pull_request_leaves_main_alone(here, small, capsys):
    assert "no repository user/name to open a pull request in" in refused(capsys, small, NAME, "--create-pr")
    assert here.repos == {}
    theirs = here.repos["other/name"] = Repo("other/name", private=False)
    theirs.commit("main", {}, "initial commit")
    out = pushed(capsys, small, "other/name", "--create-pr")
    assert f"{here.url}/other/name/discussions/1" in out
    assert theirs.files() == {}
    assert "README.md" in theirs.files("refs/pr/1")
    assert "answered 403 for other/name: your token lacks the right" in refused(capsys, small, "other/name")


@pytest.mark.slow
def test_a_pull_request_can_be_pushed_to_again(here, small, longer, capsys):
    pushed(capsys, small, NAME)
    assert "nothing to push" in pushed(capsys, small, NAME, "--create-pr")
    pushed(capsys, longer, NAME, "--create-pr", "--message", "credits")
    (longer / "NOTICE").write_text("made of their work")
    pushed(capsys, longer, NAME, "--revision", "refs/pr/1")
    repo = here.repos[NAME]
    assert repo.history("refs/pr/1") == [told_message(), "credits", *repo.history("main")]
    assert "has no revision 'refs/pr/2'" in refused(capsys, longer, NAME, "--revision", "refs/pr/2")


def test_dry_run_only_reads(here, small, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    out = pushed(capsys, small, NAME, "--dry-run", "--private", "--json", tmp_path / "told.json")
    told = json.loads((tmp_path / "told.json").read_text())
    size = (small / "config.json").stat().st_size
    assert f"would push {len(told['files'])} files, {told['bytes'] / 1e6:,.2f} MB" in out
    assert "(new; private)" in out
    assert f"{size:,}  config.json" in out
    assert (told["commit"], told["existed"], told["files"]["config.json"]) == (None, False, size)
    assert all(request.startswith("GET") for request in here.requests)
    assert here.repos == {}
    here.fail("GET", status=500, times=9)
    assert "could not be asked" in pushed(capsys, small, NAME, "--dry-run")


def test_weights_of_an_earlier_push_do_not_stay(here, small, capsys, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "one"))
    tensors: dict[str, Any] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rehash(folder)
    pushed(capsys, small, NAME)
    assert "removed weights of an earlier push: model-00001-of-" in pushed(capsys, folder, NAME)
    assert {name for name in here.repos[NAME].files() if name.startswith("model")} == {"model.safetensors"}
    assert ".gitattributes" in here.repos[NAME].files()


def test_a_card_edited_by_hand_stays(here, small, capsys, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "renamed"))
    assert "edited" not in pushed(capsys, folder, NAME)  # the folder's new name is no edit
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nThanks to everybody.\n")
    assert "README.md was edited by hand" in pushed(capsys, folder, NAME)
    published = here.repos[NAME].files()["README.md"].decode()
    assert published.endswith("\nThanks to everybody.\n") and f'from_pretrained("{NAME}"' in published
    assert 'from_pretrained("small"' in card.read_text()  # the folder's own stays as it is
    pure = published.removesuffix("\nThanks to everybody.\n")
    assert "edited" not in pushed(capsys, small, NAME)  # a card that nobody wrote into, under the same name
    assert here.repos[NAME].files()["README.md"].decode() == pure


def test_large_files_go_in_parts(here, small, capsys):
    here.part_bytes = 30_000
    pushed(capsys, small, NAME)
    assert here.count(r"PUT /storage/\w+/3$") > 0
    for name in weights(small):
        assert here.repos[NAME].files()[name] == (small / name).read_bytes()


# --- broken off -------------------------------------------------------------------------------------------------------


@pytest.mark.clean_process
def test_a_push_that_was_killed_is_completed_by_the_next(hub, small, tmp_path):
    files = [*sorted(small.glob("model-*.safetensors")), small / "assets" / "layer_scores.png"]
    large = {file_hash(path) for path in files}
    assert len(large) > 3
    last = file_hash(files[-2])
    stuck = hub.fail(f"PUT /storage/{last}", after_bytes=1000, hang=600)
    process = started(hub, tmp_path, small, NAME)
    assert stuck.wait(60)
    assert soon(lambda: hub.storage.keys() == large - {last})
    process.kill()
    process.communicate()
    repo = hub.repos[NAME]
    assert repo.history() == ["initial commit"]  # nobody meets half a model

    sent = hub.count("PUT ")
    code, _, err = ended(started(hub, tmp_path, small, NAME))
    assert (code, err) == (0, "")
    assert hub.count("PUT ") - sent == 1
    assert len(repo.history()) == 2
    for name in weights(small):
        assert repo.files()[name] == (small / name).read_bytes()


def soon(holds: Callable[[], bool]) -> bool:
    for _ in range(1500):
        if holds():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.clean_process
def test_an_interrupted_push_commits_nothing(hub, small, tmp_path):
    stuck = hub.fail("POST .*/commit/", hang=600)
    process = started(hub, tmp_path, small, NAME)
    assert stuck.wait(60)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 130
    assert err == "lvlm-exporter: interrupted; nothing was committed. The same command goes on from there.\n"
    assert hub.repos[NAME].history() == ["initial commit"]


def test_a_dropped_connection_is_tried_again(here, small, capsys):
    here.fail("PUT /storage/", after_bytes=1000, times=2)
    here.fail("PUT /storage/", status=503, times=2)
    pushed(capsys, small, NAME)
    assert here.repos[NAME].files()["config.json"] == (small / "config.json").read_bytes()


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.clean_process
def test_a_folder_that_does_not_verify(hub, small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "damaged"))
    record = json.loads((folder / "compression.json").read_text())
    record["reference"] |= {"tokens": record["reference"]["tokens"][::-1], "margins": [1.0] * 12}
    (folder / "compression.json").write_text(json.dumps(record))
    code, out, err = ended(started(hub, tmp_path, folder, NAME, verified=True))
    assert (code, out) == (1, "")
    assert "damaged does not verify: token" in err
    assert hub.count("POST|PUT") == 0


def test_a_folder_that_is_no_checkpoint(here, small, capsys, tmp_path):
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere", NAME)
    assert "no checkpoint that lvlm-exporter wrote" in refused(capsys, tmp_path, NAME)
    assert here.requests == []


def test_no_token(here, small, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    assert "there is no token for the hub" in refused(capsys, small, NAME)
    assert here.requests == []


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("hf_wrong", "401 for user/name: your token is missing or invalid"),
        (READ_TOKEN, "403 for user/name: your token"),
    ],
)
def test_a_token_that_may_not(token, expected, here, small, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    assert expected in refused(capsys, small, NAME)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("name",), "USER/NAME is needed"),
        (("user/name@v2",), "USER/NAME is needed"),
        (("user/na--me",), "no valid repository name"),
        (("user/name", "--revision", "a b"), "is not a valid branch name"),
        (("user/name", "--revision", "0" * 40), "is a commit"),
    ],
)
def test_names_that_cannot_be(arguments, expected, here, small, capsys):
    assert expected in refused(capsys, small, *arguments)
    assert here.requests == []


LOOK, CREATE, STORAGE = f"GET /api/models/{NAME}$", "POST /api/repos/create", "PUT /storage/"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "status", "expected"),
    [
        (LOOK, 401, "the hub answered 401 for user/name: your token is missing or invalid (`hf auth login`)"),
        (LOOK, 403, "answered 403 for user/name: your token lacks the right"),
        (LOOK, 404, "answered 404 for user/name: it does not exist"),
        (LOOK, 418, "answered 418 for user/name: it says no"),
        (LOOK, 500, "answered 500 for user/name: it has a problem of its own"),
        (CREATE, 402, "402 for user/name: the account has to pay"),
        (CREATE, 404, "404 for user/name: it does not exist"),
        (CREATE, 409, "409 for user/name: it is in conflict"),
        (CREATE, 429, "429 for user/name: too many requests"),
        (CREATE, 503, "503 for user/name: it has a problem of its own"),
        ("POST /api/validate-yaml", 400, "400 for user/name: it does not accept what was sent"),
        ("POST .*/preupload/", 403, "403 for user/name: your token lacks the right"),
        ("POST .*/objects/batch", 504, "504 for user/name: it has a problem of its own"),
        (STORAGE, 413, "413 for user/name: a file is too large"),
        (STORAGE, 500, "500 for user/name: it has a problem of its own"),
        ("POST .*/verify", 404, "404 for user/name: it does not exist"),
        ("POST .*/commit/", 409, "409 for user/name: it is in conflict"),
        ("POST .*/commit/", 412, "412 for user/name: somebody else committed to it meanwhile"),
        ("POST .*/commit/", 502, "502 for user/name: it has a problem of its own"),
    ],
)
def test_every_no_of_the_hub_is_a_sentence(request_, status, expected, here, small, capsys):
    """The hub quotes the token, as some proxies do: nothing of it may be seen, not in a traceback either."""
    quoted = json.dumps({"error": f"you sent Bearer {TOKEN}", "warnings": []}).encode()
    here.fail(request_, status=status, times=99, body=quoted, headers={"X-Error-Message": f"token {TOKEN}"})
    assert expected in refused(capsys, small, NAME)
    assert NAME not in here.repos or here.repos[NAME].history() == ["initial commit"]
    with pytest.raises(InputError) as caught:
        push(small, NAME)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_repositories_that_are_gated_or_vanish(here, small, capsys):
    here.fail(LOOK, status=403, headers={"X-Error-Code": "GatedRepo"})
    assert "user/name is gated: accept its terms" in refused(capsys, small, NAME)
    here.fail("POST .*/preupload/", status=404, headers={"X-Error-Code": "RepoNotFound"})
    assert "nor a repository that you can see" in refused(capsys, small, NAME)


def test_a_log_in_that_fails(here, small, capsys, monkeypatch):
    monkeypatch.setenv("HF_OIDC_RESOURCE", "models/user/name")
    assert "the hub's client fails for the log-in (OIDCError)" in refused(capsys, small, NAME)


def test_the_hubs_own_words_are_told(here, small, capsys):
    here.fail(CREATE, status=403, headers={"X-Error-Message": "you have reached your quota of repositories"})
    assert 'lacks the right to do this ("you have reached your quota of repositories")' in refused(capsys, small, NAME)
    here.fail(STORAGE, status=403, times=99, body=b"<Error>signed with this and that</Error>")
    assert refused(capsys, small, NAME).endswith("your token lacks the right to do this.\n")


def test_no_hub_at_all(here, small, capsys, monkeypatch):
    here.fail(LOOK, status=200, body=b"<html>please log in to this network</html>")
    assert "is no hub, or a broken one" in refused(capsys, small, NAME)
    here.fail(LOOK, status=None)
    assert "can't be reached for user/name (RemoteProtocolError)" in refused(capsys, small, NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "can't be reached for user/name (ConnectError)" in refused(capsys, small, NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, small, NAME)


def test_no_room_for_large_files(here, small, capsys):
    no = {"objects": [{"oid": "0", "size": 0, "error": {"code": 507, "message": "storage is full"}}]}
    here.fail("POST .*/objects/batch", status=200, body=json.dumps(no).encode())
    assert "takes no large file for user/name" in refused(capsys, small, NAME)


@pytest.mark.parametrize("request_", [LOOK, f"GET /api/models/{NAME}/revision", STORAGE, "POST .*/commit/"])
def test_a_hub_that_hangs_is_not_waited_for(request_, here, small, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.3")
    here.fail(request_, hang=600, times=99)
    assert "the hub does not answer for user/name" in refused(capsys, small, NAME)


@pytest.mark.clean_process
def test_a_hub_without_xet(hub, small, tmp_path):
    """With hf_xet installed large files go to Xet, unless HF_HUB_DISABLE_XET says no; this hub has none."""
    pytest.importorskip("hf_xet")
    code, _, err = ended(started(hub, tmp_path, small, NAME, HF_HUB_DISABLE_XET="0"))
    assert code == 2
    assert err.startswith("lvlm-exporter: the hub's Xet storage fails for user/name") and err.count("\n") == 1
