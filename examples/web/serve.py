"""Serve a page that asks a model about pictures, in the browser and on this machine alone.

    python examples/web/serve.py FOLDER    that `lvlm-exporter onnx CHECKPOINT --layout transformers.js` wrote
    python examples/web/serve.py           the reference model, exported into build/web      (make web-demo)

Page, client, WebAssembly and model come from this server, which listens on loopback; its headers forbid the page to ask
any other, and let WebAssembly use several threads.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "web"
sys.path.insert(0, str(ROOT / "examples" / "transformers_js"))  # against_torch

from against_torch import BUILD, install_client  # noqa: E402

from exporter import InputError  # noqa: E402
from exporter.onnx import ExportOptions, export  # noqa: E402
from exporter.onnx.manifest import read_manifest  # noqa: E402
from exporter.onnx.runtime.client import LAYOUT, graph_files  # noqa: E402

REFERENCE = ROOT / "build" / "web" / "digits"
PACKAGES = BUILD / "node_modules"
WASM = "ort-wasm-simd-threaded"  # of its builds the one for processors
NEW_TOKENS = 64
HTTP_PORT = 80  # that browsers leave out of a server's name
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src 'self' blob:; connect-src 'self' blob: "
    "data:; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",  # these two let WebAssembly have threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def settings(folder: Path) -> dict[str, object]:
    """Return what the page has to know of a folder. Raises: InputError for one that the client does not open."""
    manifest = read_manifest(folder)
    if manifest.layout != LAYOUT:
        raise InputError(
            f"{folder} is not in the layout of transformers.js: lvlm-exporter onnx CHECKPOINT --layout transformers.js "
            "--out FOLDER makes one that is."
        )
    size = {}
    for dtype in ["fp32", *(manifest.precisions or {})]:
        graphs = tuple(f"onnx/{path.name}" for path in graph_files(folder, dtype))  # and the weights beside them
        size[dtype] = sum(count for name, count in manifest.files.items() if name.startswith(graphs))
    return {
        "title": f"{folder.name} ({manifest.model_type})",
        "bytes": size,
        "newTokens": NEW_TOKENS,
        "client": "/client/transformers.min.js",
        "wasm": {"mjs": f"/wasm/{WASM}.mjs", "wasm": f"/wasm/{WASM}.wasm"},
        "folders": "/models/",
        "folder": "model",
    }


class Page(SimpleHTTPRequestHandler):
    """Four folders under their names, with the headers that keep the page on this machine."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *connection: object, folder: Path, told: dict[str, object]) -> None:
        self.folders = {
            "": HERE,
            "client": PACKAGES / "@huggingface" / "transformers" / "dist",
            "wasm": PACKAGES / "onnxruntime-web" / "dist",
            "models": folder,
        }
        self.told = json.dumps(told).encode()
        super().__init__(*connection)

    def translate_path(self, path: str) -> str:
        """Return the file of an address; what lies in none of the folders is not there."""
        parts = [part for part in unquote(urlsplit(path).path).replace("\0", "?").split("/") if part]
        name = parts.pop(0) if len(parts) > 1 and parts[0] in self.folders else ""
        if name == "models":
            parts = parts[1:]  # the model's own name
        root = self.folders[name].resolve()
        file = root.joinpath(*parts) if parts else root / "index.html"
        return str(file if file.resolve().is_relative_to(root) else root / "nothing")

    def send_head(self) -> Any:
        """Return what is sent behind the headers, as an open file."""
        if self.headers.get("Host") not in self.names():
            self.send_error(403, "this server answers to 127.0.0.1 and localhost only")
            return None
        if urlsplit(self.path).path != "/settings.json":
            return super().send_head()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.told)))
        self.end_headers()
        return io.BytesIO(self.told)

    def names(self) -> list[str]:
        """Return how this server may be called: other sites can point a name of theirs at loopback."""
        port = self.server.server_address[1]
        hosts = ("127.0.0.1", "localhost")
        return [*(f"{host}:{port}" for host in hosts), *(hosts if port == HTTP_PORT else ())]

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A server that takes it as it is when a browser no longer wants what it asked for."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, but for connections that the browser has ended: the page does at another precision."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def server(folder: Path, port: int = 0) -> Server:
    """Return a server of a folder on loopback, not yet running. Port 0: one that is free."""
    page = partial(Page, folder=folder, told=settings(folder))
    try:
        return Server(("127.0.0.1", port), page)
    except OverflowError as error:
        raise InputError(f"--port {port}: a number from 0 to 65535 is needed, 0 for a port that is free.") from error
    except OSError as error:
        raise InputError(f"port {port} can't be had ({error.strerror}): give another with --port.") from error


def reference_folder() -> Path:
    """Return the reference model as a folder for the client; it is exported where it is not there."""
    if not REFERENCE.is_dir():
        print("Exporting the reference model, about a minute ...", flush=True)
        REFERENCE.parent.mkdir(parents=True, exist_ok=True)
        export(ROOT / "examples" / "digits" / "model", REFERENCE, ExportOptions(layout=LAYOUT, quantize="q8"))
    return REFERENCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="in the layout of transformers.js (the reference model)")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    try:
        place = server(options.folder or reference_folder(), options.port)
        install_client()  # which takes a while: what is wrong with folder or port is said before
    except InputError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2
    print(f"http://127.0.0.1:{place.server_address[1]}/ shows the page; Ctrl + C ends it.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        place.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
