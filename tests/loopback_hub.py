"""A small Hugging Face hub on 127.0.0.1, for tests: real HTTP, real hashes, everything in memory.

    with LoopbackHub() as hub:
        hub.fail("PUT /storage/", status=503, times=2)
        subprocess.run([...], env=hub.environment(home))
        hub.repos["user/name"].files("main")["config.json"]

It knows what huggingface_hub 2.4 asks for when it makes repositories and branches, commits, opens pull requests and
downloads. Large files go by classic LFS (HF_HUB_DISABLE_XET=1): Xet, which the client prefers where hf_xet is
installed, is a storage service of its own behind the hub, with a binary protocol that is no part of the hub's.

Storage lies under another host name than the hub (localhost), as on the real one: the client must not send its token
there, and is answered 400 if it does.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

TOKEN, READ_TOKEN, OWNER = "hf_" + "LoopbackWrite" * 3, "hf_" + "LoopbackReadOnly" * 2, "user"
REGULAR_BYTES = 1 << 20  # text below this is kept in git, everything else in LFS
PATCH = 1 << 16  # bytes read at a time


# --- state ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """A file's content as git has it: itself, or a pointer to LFS."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def oid(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As the tree listing shows it."""
        shown: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            shown["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return shown


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/N -> commit

    def commit(self, ref: str, files: dict[str, Blob], message: str) -> Commit:
        parent = self.refs.get(ref)
        told = repr((parent, message, sorted((path, blob.oid) for path, blob in files.items()), len(self.commits)))
        made = Commit(hashlib.sha1(told.encode()).hexdigest(), parent, message, files)
        self.commits[made.oid] = made
        self.refs[ref] = made.oid
        return made

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.commits[self.refs[revision]].files.items()}

    def history(self, revision: str = "main") -> list[str]:
        """Messages, the newest first."""
        messages, oid = [], self.refs.get(revision)
        while oid is not None:
            messages.append(self.commits[oid].message)
            oid = self.commits[oid].parent
        return messages


@dataclass
class Fault:
    """What the hub does instead of answering, to the next `times` requests that fit."""

    pattern: re.Pattern[str]  # of "METHOD /path"
    status: int | None
    times: int
    hang: float
    after_bytes: int | None
    headers: dict[str, str]
    body: bytes
    met: threading.Event = field(default_factory=threading.Event)


class LoopbackHub:
    """The server and what it holds. `requests` lists every request as "METHOD /path"."""

    def __init__(self) -> None:
        self.part_bytes: int | None = None  # files above this are asked for in parts, as the hub does above 5 GB
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}  # LFS, by SHA-256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        """Of a client process: this hub, an empty cache of its own, classic LFS."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSF"))}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        return kept | ({"HF_TOKEN": token} if token else {}) | more

    def fail(
        self,
        pattern: str,
        *,
        status: int | None = None,
        times: int = 1,
        hang: float = 0,
        after_bytes: int | None = None,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
    ) -> threading.Event:
        """Let the next requests that fit go wrong. Returns: an event that is set when one has met its fate.

        Args:
            pattern: regular expression, searched for in "METHOD /path".
            status: answer this; None: close the connection without an answer.
            hang: seconds to say nothing first.
            after_bytes: act after so many bytes of the request's body.
        """
        fault = Fault(re.compile(pattern), status, times, hang, after_bytes, headers or {}, body)
        self.faults.append(fault)
        return fault.met

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.search(request):
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


# --- HTTP -------------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    hub: LoopbackHub
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests."""


class Refusal(Exception):  # noqa: N818 - the hub's no, not an error of the hub
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Broken(Exception):  # noqa: N818
    """The connection is to be closed without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        hub = self.server.hub
        self.path, _, query = self.path.partition("?")
        self.query = {name: values[0] for name, values in parse_qs(query).items()}
        request = f"{self.command} {unquote(self.path)}"
        with hub.lock:
            hub.requests.append(request)
        try:
            if fault := hub.fault_for(request):
                self.act_out(fault)
                return
            self.body = b"".join(self.body_patches())
            for method, pattern, respond in ROUTES:
                if self.command in method and (found := re.fullmatch(pattern, self.path)):
                    with hub.lock:
                        respond(self, *map(unquote, found.groups()))
                    return
            raise Refusal(404, f"no such route: {request}")
        except Refusal as refusal:
            self.refuse(refusal)
        except _Broken:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def body_patches(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (patch := self.rfile.read(min(left, PATCH))):
            left -= len(patch)
            yield patch
        if left:
            raise _Broken

    def act_out(self, fault: Fault) -> None:
        seen = 0
        for patch in self.body_patches():
            seen += len(patch)
            if fault.after_bytes is not None and seen >= fault.after_bytes:
                break
        fault.met.set()
        self.server.hub.closing.wait(fault.hang)
        self.close_connection = True
        if fault.status is None:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send(
            fault.status, fault.body, {"Content-Type": "application/json", "Connection": "close", **fault.headers}
        )

    def refuse(self, refusal: Refusal) -> None:
        headers = {"X-Error-Message": str(refusal), "Content-Type": "application/json"}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self.send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, content: Any, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def json(self) -> Any:
        return json.loads(self.body)

    # --- who may do what ---

    def token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def require_write(self, namespace: str) -> None:
        token = self.token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        if token != TOKEN or namespace != OWNER:
            raise Refusal(403, f"You don't have the rights to write under the namespace {namespace}")

    def repo(self, name: str, write: bool = False) -> Repo:
        repo = self.server.hub.repos.get(name)
        if repo is None or (repo.private and self.token() is None):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        self.token()
        if write:
            self.require_write(name.split("/")[0])
        return repo

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def without_token(self) -> None:
        if self.headers.get("Authorization"):
            raise Refusal(400, "Only one auth mechanism allowed: this address is signed already")


# --- the hub's API ----------------------------------------------------------------------------------------------------


def whoami(handler: _Handler) -> None:
    token = handler.token()
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    role = "write" if token == TOKEN else "read"
    handler.send_json({"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": role}}})


def create_repo(handler: _Handler) -> None:
    hub, asked = handler.server.hub, handler.json()
    namespace = asked.get("organization") or OWNER
    handler.require_write(namespace)
    name = f"{namespace}/{asked['name']}"
    if name in hub.repos:
        handler.send_json({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
        return
    repo = hub.repos[name] = Repo(name, asked.get("visibility") == "private")
    attributes = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", lfs=False)
    repo.commit("main", {".gitattributes": attributes}, "initial commit")
    handler.send_json({"name": name, "url": f"{hub.url}/{name}"})


def validate_yaml(handler: _Handler) -> None:
    parts = handler.json()["content"].split("---\n", 2)
    if len(parts) == 3 and parts[0] == "" and "\t" not in parts[1]:
        handler.send_json({"errors": [], "warnings": []})
    else:
        handler.send_json({"errors": [{"message": "the metadata is no YAML"}], "warnings": []}, 400)


def repo_info(handler: _Handler, name: str, revision: str = "main") -> None:
    repo = handler.repo(name)
    commit = handler.commit_at(repo, revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    handler.send_json({"id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []})


def tree(handler: _Handler, name: str, revision: str, folder: str | None = None) -> None:
    commit = handler.commit_at(handler.repo(name), revision)
    prefix = f"{folder}/" if folder else ""
    inside = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(prefix)}
    if folder and not inside:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    if handler.query.get("recursive", "false").lower() not in ("true", "1"):
        inside = {path: blob for path, blob in inside.items() if "/" not in path.removeprefix(prefix)}
    folders = {str(parent) for path in inside for parent in Path(path).parents if str(parent) not in (".", folder)}
    entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    handler.send_json(entries + [blob.entry(path) for path, blob in inside.items()])


def create_branch(handler: _Handler, name: str, branch: str) -> None:
    repo = handler.repo(name, write=True)
    if branch in repo.refs:
        raise Refusal(409, f"Reference {branch} exists already")
    if branch.startswith("refs/"):
        raise Refusal(400, "Invalid reference for a branch")
    repo.refs[branch] = handler.commit_at(repo, handler.json().get("startingPoint") or "main").oid
    handler.send_json({})


def preupload(handler: _Handler, name: str, revision: str) -> None:
    proposal = handler.query.get("create_pr") == "1"
    repo = handler.repo(name, write=not proposal)
    if proposal and handler.token() is None:
        raise Refusal(401, "Invalid username or password.")
    present = handler.commit_at(repo, revision).files
    answer = []
    for file in handler.json()["files"]:
        path, known = file["path"], present.get(file["path"])
        text = is_text(base64.b64decode(file["sample"])) and file["size"] < REGULAR_BYTES
        mode = "regular" if text and not path.endswith(".safetensors") else "lfs"
        oid = None if known is None else known.sha256 if known.lfs else known.oid
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    handler.send_json({"files": answer})


def is_text(sample: bytes) -> bool:
    """Of the first 512 bytes, which may end inside a character."""
    return b"\0" not in sample and "\ufffd" not in sample.decode(errors="replace").rstrip("\ufffd")


def commit(handler: _Handler, name: str, revision: str) -> None:
    hub, proposal = handler.server.hub, handler.query.get("create_pr") == "1"
    repo = handler.repo(name, write=not proposal)
    head = handler.commit_at(repo, revision)
    lines = [json.loads(line) for line in handler.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if header.get("parentCommit", head.oid) != head.oid:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        apply(hub, files, line["key"], line["value"])
    number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
    target = f"refs/pr/{number}" if proposal else revision
    repo.refs.setdefault(target, head.oid)
    made = repo.commit(target, files, header["summary"])
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{hub.url}/{name}/commit/{made.oid}"}
    if proposal:
        answer["pullRequestUrl"] = f"{hub.url}/{name}/discussions/{number}"
    handler.send_json(answer)


def apply(hub: LoopbackHub, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """One line of a commit."""
    if key == "file":
        files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        content = hub.storage.get(value["oid"])
        if content is None or len(content) != value["size"]:
            raise Refusal(400, f"LFS pointer of {value['path']} points to a file that was not uploaded")
        files[value["path"]] = Blob(content, lfs=True)
    elif key == "deletedFile":
        if files.pop(value["path"], None) is None:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
            del files[path]


def resolve(handler: _Handler, name: str, revision: str, path: str) -> None:
    hub, repo = handler.server.hub, handler.repo(name)
    found = handler.commit_at(repo, revision)
    blob = found.files.get(path)
    if blob is None:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    headers = {"X-Repo-Commit": found.oid, "ETag": f'"{blob.oid}"'}
    if not blob.lfs:
        send_ranged(handler, blob.content, headers)
        return
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
    handler.send(302, headers={**headers, "Location": f"{hub.storage_url}/storage/{blob.sha256}"})


def send_ranged(handler: _Handler, content: bytes, headers: dict[str, str]) -> None:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
    if not asked:
        handler.send(200, content, headers)
        return
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if first > last:
        raise Refusal(416, "the range is outside the file")
    headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
    handler.send(206, content[first : last + 1], headers)


# --- storage of large files -------------------------------------------------------------------------------------------


def lfs_batch(handler: _Handler, name: str) -> None:
    hub = handler.server.hub
    handler.repo(name)
    if handler.token() is None:
        raise Refusal(401, "Invalid username or password.")
    objects = []
    for asked in handler.json()["objects"]:
        oid, size = asked["oid"], asked["size"]
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in hub.storage:
            href = f"{hub.storage_url}/storage/{oid}"
            upload: dict[str, Any] = {"href": href}
            if hub.part_bytes and size > hub.part_bytes:
                count = -(-size // hub.part_bytes)
                parts = {f"{i:05d}": f"{href}/{i}" for i in range(1, count + 1)}
                upload = {"href": f"{href}/complete", "header": {"chunk_size": str(hub.part_bytes), **parts}}
            entry["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/{name}.git/info/lfs/objects/verify"}}
        objects.append(entry)
    handler.send_json({"transfer": "basic", "objects": objects})


def lfs_verify(handler: _Handler, name: str) -> None:
    asked = handler.json()
    content = handler.server.hub.storage.get(asked["oid"])
    if content is None or len(content) != asked["size"]:
        raise Refusal(404, "the object was not uploaded")
    handler.send_json({})


def storage_put(handler: _Handler, oid: str) -> None:
    handler.without_token()
    keep(handler, oid, handler.body)
    handler.send(200)


def storage_put_part(handler: _Handler, oid: str, number: str) -> None:
    handler.without_token()
    handler.server.hub.parts[oid, int(number)] = handler.body
    handler.send(200, headers={"ETag": hashlib.md5(handler.body).hexdigest()})


def storage_complete(handler: _Handler, oid: str) -> None:
    parts = sorted(handler.json()["parts"], key=lambda part: part["partNumber"])
    hub = handler.server.hub
    contents = [hub.parts.pop((oid, part["partNumber"])) for part in parts]
    if [part["etag"] for part in parts] != [hashlib.md5(content).hexdigest() for content in contents]:
        raise Refusal(400, "a part is not what was uploaded")
    keep(handler, oid, b"".join(contents))
    handler.send_json({})


def keep(handler: _Handler, oid: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refusal(400, "the content does not have the SHA-256 that was announced")
    handler.server.hub.storage[oid] = content


def storage_get(handler: _Handler, oid: str) -> None:
    handler.without_token()
    content = handler.server.hub.storage.get(oid)
    if content is None:
        raise Refusal(404, "no such object")
    send_ranged(handler, content, {"ETag": f'"{oid}"'})


NAME, REVISION = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", rf"/api/models/{NAME}", repo_info),
    ("GET", rf"/api/models/{NAME}/revision/{REVISION}", repo_info),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}", tree),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}/(.+)", tree),
    ("POST", rf"/api/models/{NAME}/branch/{REVISION}", create_branch),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", preupload),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/verify", lfs_verify),
    ("PUT", r"/storage/(\w+)", storage_put),
    ("PUT", r"/storage/(\w+)/(\d+)", storage_put_part),
    ("POST", r"/storage/(\w+)/complete", storage_complete),
    ("GET HEAD", r"/storage/(\w+)", storage_get),
    ("GET HEAD", rf"/{NAME}/resolve/{REVISION}/(.+)", resolve),
]
