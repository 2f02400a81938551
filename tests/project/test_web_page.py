"""The server of the page in examples/web: what it gives away, to whom, and under which headers.

The page itself is used in a browser by `make js-test`.
"""

from __future__ import annotations

import http.client
import json
import re
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter import InputError
from exporter.onnx.layouts.client_files import PICTURE_FIRST

PAGE = Path(__file__).parents[2] / "examples" / "web"


@pytest.fixture(scope="module")
def serve():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAGE))
        import serve

        yield serve
        for name in ("serve", "against_torch"):
            sys.modules.pop(name, None)


@pytest.fixture
def ask(serve, tmp_path):
    """ask('/index.html') is (status, headers, body) of a running server."""
    model = tmp_path / "model"
    (model / "onnx").mkdir(parents=True)
    (model / "onnx" / "embed_tokens.onnx").write_bytes(b"graph")
    (tmp_path / "secret.txt").write_text("secret")
    (model / "link.txt").symlink_to(tmp_path / "secret.txt")
    place = serve.Server(("127.0.0.1", 0), partial(serve.Page, folder=model, told={"title": "a model"}))
    threading.Thread(target=place.serve_forever, daemon=True).start()

    def answer(path, host=None):
        port = place.server_address[1]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, dict(response.getheaders()), body

    yield answer
    place.shutdown()
    place.server_close()


def test_the_page_its_module_and_a_graph(ask):
    status, headers, body = ask("/?dtype=q8")
    assert status == 200 and headers["Content-type"] == "text/html" and body == (PAGE / "index.html").read_bytes()
    status, headers, body = ask("/page.mjs")
    assert status == 200 and headers["Content-type"] == "text/javascript" and body == (PAGE / "page.mjs").read_bytes()
    assert ask("/models/model/onnx/embed_tokens.onnx")[2] == b"graph"
    status, headers, body = ask("/settings.json")
    assert status == 200 and json.loads(body) == {"title": "a model"}
    assert headers["Content-Type"] == "application/json" and int(headers["Content-Length"]) == len(body)


def test_headers_allow_threads_and_no_other_machine(ask):
    _, headers, _ = ask("/")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy and "*" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "/models/model/../../secret.txt",
        "/models/model/%2e%2e/secret.txt",
        "/models/model/link.txt",
        "/models/model/%00",
    ],
)
def test_nothing_outside_its_folders_is_given_away(path, ask):
    status, _, body = ask(path)
    assert status == 404 and b"secret" not in body.replace(b"secret.txt", b"")


def test_folders_are_not_listed(ask):
    assert ask("/models/model/onnx")[0] in (301, 404) and ask("/models/model/onnx/")[0] == 404


@pytest.mark.parametrize("host", ["example.org", "example.org:80", "127.0.0.1.example.org", "127.0.0.1:1"])
def test_other_names_that_point_here_are_refused(host, ask):
    status, _, body = ask("/settings.json", host)
    assert status == 403 and b"this server answers to 127.0.0.1 and localhost only" in body


def test_browsers_leave_the_usual_port_out_of_the_name(serve):
    names = serve.Page.names(SimpleNamespace(server=SimpleNamespace(server_address=("127.0.0.1", 80))))
    assert set(names) == {"127.0.0.1", "localhost", "127.0.0.1:80", "localhost:80"}


def test_a_connection_that_the_browser_ends_is_no_error(serve, capsys):
    """The page does so whenever another precision is chosen while one loads."""
    place = serve.Server.__new__(serve.Server)
    for error in (BrokenPipeError(), ConnectionResetError(), ValueError("of ours")):
        try:
            raise error
        except (OSError, ValueError):
            place.handle_error(None, ("127.0.0.1", 1))
    printed = capsys.readouterr().err
    assert printed.count("Traceback") == 1 and "of ours" in printed


def test_a_folder_of_another_layout(serve, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"onnx\.json"):
        serve.settings(tmp_path)
    monkeypatch.setattr(serve, "read_manifest", lambda folder: SimpleNamespace(layout=None))
    monkeypatch.setattr(serve, "install_client", lambda: pytest.fail("minutes, and for nothing"))
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path)])
    assert serve.main() == 2
    assert "is not in the layout of transformers.js: lvlm-exporter onnx CHECKPOINT --layout" in capsys.readouterr().err


def test_a_port_that_is_taken(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "settings", lambda folder: {})
    with serve.server(tmp_path) as place:
        taken = place.server_address[1]
        with pytest.raises(InputError, match=rf"port {taken} can't be had \(.*\): give another with --port"):
            serve.server(tmp_path, taken)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_number_that_is_no_port(port, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "settings", lambda folder: {})
    with pytest.raises(InputError, match=rf"--port {port}: a number from 0 to 65535 is needed, 0 for a port that is f"):
        serve.server(tmp_path, port)


def test_npm_that_fails(serve, tmp_path, monkeypatch):
    client = sys.modules["against_torch"]

    def failing(*_, **__):
        raise client.subprocess.CalledProcessError(1, "npm")

    monkeypatch.setattr(client, "BUILD", tmp_path)
    monkeypatch.setattr(client.shutil, "which", lambda name: name)
    monkeypatch.setattr(client, "call", failing)
    with pytest.raises(SystemExit, match=r"npm could not install the client into .*: its own words stand above\."):
        client.install_client()


def test_npm_that_is_not_there(serve, tmp_path, monkeypatch):
    client = sys.modules["against_torch"]
    monkeypatch.setattr(client, "BUILD", tmp_path)
    monkeypatch.setattr(client.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"npm is not on the path: it comes with Node"):
        client.install_client()


def test_the_page_knows_the_bytes_of_each_precision(serve, tmp_path, monkeypatch):
    names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    files = {f"onnx/{name}{suffix}.onnx": size for name in names for suffix, size in (("", 100), ("_q4", 10))}
    files["onnx/decoder_model_merged.onnx_data_1"] = 5
    manifest = SimpleNamespace(layout="transformers.js", precisions={"q4": None}, files=files, model_type="llava")
    monkeypatch.setattr(serve, "read_manifest", lambda folder: manifest)
    told = serve.settings(tmp_path)
    assert told["bytes"] == {"fp32": 305, "q4": 30}
    assert told["title"] == f"{tmp_path.name} (llava)"


def test_every_element_that_the_module_looks_for_is_in_the_page():
    looked_for = set(re.findall(r'\$\("([a-z]+)"\)', (PAGE / "page.mjs").read_text()))
    there = set(re.findall(r' id="([a-z]+)"', (PAGE / "index.html").read_text()))
    assert len(looked_for) > 10 and looked_for <= there


def test_answers_and_errors_are_shown_as_text():
    """What a model or a file's name says is never read as HTML, nor run."""
    module = (PAGE / "page.mjs").read_text()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", module)
    assert "textContent" in module


def test_the_page_gives_processors_what_they_take_in_the_order_of_the_card():
    (listed,) = re.findall(r"const pictureFirst = \[(.*?)\]", (PAGE / "page.mjs").read_text())
    assert sorted(re.findall(r'"(\w+)"', listed)) == sorted(PICTURE_FIRST)
