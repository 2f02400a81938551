"""Build the API pages from the docstrings with pdoc, and refuse references that lead nowhere.

    make docs        # or: python docs/build_api.py --out build/api

Checked are the links between the pages, and what the docstrings name in backticks: `exporter.…` has to be there, and
so has a file that is named by its path in the repository.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pdoc
import pdoc.doc
import pdoc.extract
import pdoc.render

import exporter
import exporter.onnx

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("exporter", "!exporter.plugins")  # optimum-cli's commands are no API
DOTTED = re.compile(r"`(exporter(?:\.\w+)+)(?:\(\))?`")
FILE = re.compile(r"`((?:exporter|tests|docs|examples)/[\w./-]+\.\w+)`")


class _Page(HTMLParser):
    """Collect the anchors of a page, and its links to other pages of ours."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if anchor := found.get("id"):
            self.anchors.add(anchor)
        link = found.get("href") or ""
        if tag == "a" and link and "://" not in link:
            self.links.add(link)


def broken_links(folder: Path) -> list[str]:
    """Return the links of the pages in a folder whose page or anchor does not exist, as "page: link"."""
    pages = {path.resolve(): _Page(path.read_text()) for path in folder.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if target not in pages or (anchor and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(folder.resolve())}: {link}")
    return broken


def docstrings(module: pdoc.doc.Namespace[Any]) -> Iterator[tuple[str, str]]:
    """Yield the full name and the docstring of everything in a module that has one, and of the module."""
    yield module.fullname, module.docstring
    for member in module.members.values():
        if isinstance(member, pdoc.doc.Module):
            continue
        if isinstance(member, pdoc.doc.Class):
            yield from docstrings(member)
        else:
            yield member.fullname, member.docstring


def unknown_names(modules: dict[str, pdoc.doc.Module]) -> list[str]:
    """Return what docstrings name and is not there, as "where: name"."""
    unknown = []
    for module in modules.values():
        for where, text in docstrings(module):
            unknown += [f"{where}: {name}" for name in DOTTED.findall(text) if not _is_there(name)]
            unknown += [f"{where}: {name}" for name in FILE.findall(text) if not (ROOT / name).exists()]
    return sorted(set(unknown))


def _is_there(name: str) -> bool:
    import pkgutil

    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


def build(out: Path) -> list[str]:
    """Write the pages and return what is broken in them."""
    for package in (exporter, exporter.onnx):  # their names are imported when they are asked for; pdoc looks, only
        vars(package).update({name: getattr(package, name) for name in package.__all__})
    pdoc.render.configure(docformat="google", show_source=False, footer_text="lvlm-exporter")
    pdoc.pdoc(*MODULES, output_directory=out)
    names = pdoc.extract.walk_specs(MODULES)
    modules = {name: pdoc.doc.Module(sys.modules[name]) for name in names if inspect.ismodule(sys.modules.get(name))}
    return broken_links(out) + unknown_names(modules)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "api")
    out = parser.parse_args().out
    broken = build(out)
    print("\n".join([*broken, f"{out}: {len(broken)} broken references"]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
