"""Writes README.md so that whatever a person wrote into it stays when it is written again.

A card is merged from three versions, paragraph by paragraph and key by key: what was written last time (known by
checksums, which a comment in the card holds), what the file says now, and what would be written today. Text and keys
that a person added, changed or deleted stay so; everything else is brought up to date. Where a person changed a
paragraph that would change today too, the person's version stays and a warning names the section.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.files import replace_bytes
from ..errors import InputError, shown

logger = logging.getLogger(__name__)
CARD = "README.md"
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
LEADING_COMMENTS = re.compile(r"\A\s*(?:<!--.*?-->\s*)+(?=---[ \t]*\n)", re.DOTALL)
SAID = (
    "<!-- Written by lvlm-exporter. What you add, change or delete in this card stays when it is written again, as long"
)
MARK = re.compile(r"<!-- Written by lvlm-exporter\..*?checksums: (.*?)-->\s*", re.DOTALL)
KEY_LINE = re.compile(r"""(["']?)([\w.-]+)\1[ \t]*:(?:\s|$)""")
OUR_METRIC = re.compile(r"[\w '-]+, n=\d+, 95% CI ")  # how the names of our figures in a model-index begin


@dataclass(frozen=True)
class Base:
    """Checksums of what was written last time."""

    keys: dict[str, str] = field(default_factory=dict)
    paragraphs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Merged:
    """A card after a merge."""

    text: str
    unmerged: tuple[str, ...]  # sections and keys where a person's text stands in place of ours


def checksum(value: Any) -> str:
    """Return eight hexadecimal digits of a paragraph or of a key's value; spaces at the ends of lines don't count."""
    text = value if isinstance(value, str) else repr(value)
    lines = "\n".join(line.rstrip() for line in text.strip().split("\n"))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:8]


# --- the file ---------------------------------------------------------------------------------------------------------


def write_card(folder: Path, metadata: str, body: str) -> Path:
    """Merge a rendered card into the folder's README.md, and write it in one step.

    Args:
        metadata: YAML of the front matter, without its lines of dashes.
    Raises: InputError where README.md is a folder, a link, or no text.
    """
    path = folder / CARD
    theirs = read_text(path)
    merged = merge(theirs, metadata, body)
    if merged.unmerged:
        logger.warning(
            "%s was edited by hand where new text belongs (%s): your text stays. For a fresh card move the file away "
            "and run `lvlm-exporter card %s`.",
            shown(path),
            ", ".join(merged.unmerged),
            shown(folder),
        )
    text = merged.text
    if theirs is not None and theirs.count("\r\n") * 2 > theirs.count("\n"):
        text = text.replace("\n", "\r\n")
    _replace(path, text.encode("utf-8", "surrogateescape"))
    return path


def read_text(path: Path) -> str | None:
    """Return what stands in a card, None where there is none. Bytes that are not UTF-8 survive being written again."""
    if path.is_symlink():
        raise InputError(f"{path} is a link, which is not followed: put a file in its place, or remove it.")
    if not path.exists():
        return None
    if not path.is_file():
        raise InputError(f"{path} is not a file, and the card has to be written there: move it away.")
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is UTF-16 text: save it as UTF-8, or move it away.")
    return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step, with the rights that it had; half of it is never seen."""
    replace_bytes(path, content, path.stat().st_mode & 0o777 if path.exists() else None)


@contextlib.contextmanager
def results_first(folder: Path) -> Iterator[None]:
    """Say that a folder's record and card could not be brought up to date, in place of losing what was measured."""
    try:
        yield
    except OSError as error:
        logger.warning("%s: its record and its card were not updated (%s).", folder, error.strerror or error)
    except InputError as error:
        logger.warning("%s: its record and its card were not updated: %s", folder, error)


def carry_card(source: Path, target: Path) -> None:
    """Take a checkpoint's card along to a checkpoint that is made from it, to be merged there with the new figures.

    Only a card that holds our checksums goes along: nothing of another one could be brought up to date.
    """
    path = source / CARD
    if path.is_file() and not path.is_symlink() and MARK.search(text := read_text(path) or ""):
        _replace(target / CARD, text.encode("utf-8", "surrogateescape"))


# --- the merge --------------------------------------------------------------------------------------------------------


def merge(theirs: str | None, metadata: str, body: str) -> Merged:
    """Return the card that keeps a person's text and says what was rendered.

    Args:
        theirs: the card as it is; None: there is none.
    """
    data = _mapping(metadata) or {}
    mark = _mark(data, body)
    if not (theirs or "").strip():
        return Merged(f"---\n{metadata}---\n\n{mark}{body}", ())
    assert theirs is not None
    own_metadata, own_body = split_card(theirs.replace("\r\n", "\n"))
    match = MARK.search(own_body)
    base = _read_mark(match[1]) if match else Base()
    own_body = MARK.sub("", own_body)
    front, kept_keys = _merge_metadata(own_metadata, metadata, base)
    if match:
        text, sections = _merge_body(own_body, body, base)
    elif _paragraph_sums(own_body) == _paragraph_sums(body):
        text, sections = body, []
    else:  # written by hand as a whole, or by a version that left no mark: nobody can tell whose paragraph is whose
        return Merged(f"---\n{front}---\n\n{own_body.lstrip()}", (*kept_keys, "the text, which has no mark of ours"))
    return Merged(f"---\n{front}---\n\n{mark}{text}", (*kept_keys, *dict.fromkeys(sections)))


def split_card(text: str) -> tuple[str | None, str]:
    """Return the YAML of the front matter (None: there is none) and the text behind it.

    Comments before the front matter, behind which no hub looks for it, go to the text.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    comments = LEADING_COMMENTS.match(text)
    rest = text[comments.end() :] if comments else text
    match = FRONT_MATTER.match(rest)
    if match is None:
        return None, text
    return match[1], (comments[0] if comments else "") + rest[match.end() :]


def _mark(data: dict[str, Any], body: str) -> str:
    keys = " ".join(f"{key}={checksum(value)}" for key, value in _owned(data).items())
    return f"{SAID}\nas this comment does. Its checksums: {keys}\n{' '.join(_paragraph_sums(body))} -->\n\n"


def _read_mark(text: str) -> Base:
    words = text.split()
    pairs = [word.rpartition("=") for word in words if "=" in word]
    return Base({key: value for key, _, value in pairs}, tuple(word for word in words if "=" not in word))


def _owned(data: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that a person may change; figures of a model-index are ours, and known by their names."""
    return {key: value for key, value in data.items() if key != "model-index"}


# --- the text ---------------------------------------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    """Split a text at blank lines, those of code blocks excepted; each paragraph with the blank lines behind it."""
    parts: list[str] = []
    fence, blank = "", True
    for line in text.splitlines(keepends=True):
        if not line.strip() and not fence:
            blank = True
        elif blank and not fence:
            parts.append("")
            blank = False
        if not parts:
            parts.append("")
        parts[-1] += line
        word = line.strip()
        if fence:
            fence = "" if word.startswith(fence) and not word.strip(fence[0]) else fence
        elif word.startswith(("```", "~~~")):
            fence = word[:3]
    return [part for part in parts if part.strip()]


def _paragraph_sums(text: str) -> tuple[str, ...]:
    return tuple(checksum(part) for part in paragraphs(text))


@dataclass(frozen=True)
class Hunk:
    """A change against the base: base[begin:end] becomes `new`."""

    begin: int
    end: int
    new: tuple[str, ...]

    def overlaps(self, other: Hunk) -> bool:
        if self.begin == self.end and other.begin == other.end:
            return False  # two insertions: both stay
        return self.begin < other.end and other.begin < self.end


def _hunks(base: Sequence[str], parts: Sequence[str]) -> list[Hunk]:
    """Return what changed from checksums to paragraphs, in pieces as small as can be told apart."""
    hunks = []
    matcher = difflib.SequenceMatcher(None, base, [checksum(part) for part in parts], autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            continue
        new = tuple(parts[j1:j2])
        if i2 - i1 == len(new):
            hunks += [Hunk(i, i + 1, (part,)) for i, part in zip(range(i1, i2), new, strict=True)]
            continue
        section = next((k for k, part in enumerate(new) if k and part.startswith("## ")), len(new))
        hunks.append(Hunk(i1, i2, new[:section]))
        hunks += [Hunk(i2, i2, new[section:])] if new[section:] else []  # a new section belongs to no edit before it
    return hunks


def _merge_body(existing: str, rendered: str, base: Base) -> tuple[str, list[str]]:
    """Return the merged text, and the sections where a person's paragraphs stand in place of ours."""
    own_parts, new_parts = paragraphs(existing), paragraphs(rendered)
    mine, ours = _hunks(base.paragraphs, own_parts), _hunks(base.paragraphs, new_parts)
    sections = []
    for hunk in list(ours):
        if clashes := [other for other in mine if other.overlaps(hunk)]:
            ours.remove(hunk)
            if hunk.new and any(tuple(map(checksum, other.new)) != tuple(map(checksum, hunk.new)) for other in clashes):
                sections.append(_section_of(hunk.new[0], new_parts))
    known = {checksum(part): part for part in (*new_parts, *own_parts)}  # the person's own blank lines win
    merged: list[str] = []
    position = 0
    for hunk in sorted([*ours, *mine], key=lambda h: (h.begin, h.end > h.begin)):  # stable: ours first, both inserted
        merged += [known[digest] for digest in base.paragraphs[position : hunk.begin]]
        merged += hunk.new
        position = max(position, hunk.end)
    merged += [known[digest] for digest in base.paragraphs[position:]]
    return _joined(merged), sections


def _section_of(part: str, parts: Sequence[str]) -> str:
    """Return the heading that a paragraph stands under."""
    heading = "the text before the first section"
    for other in parts:
        if other.startswith("## "):
            heading = f"'{other.splitlines()[0].removeprefix('## ').strip()}'"
        if other == part:
            break
    return heading


def _joined(parts: Sequence[str]) -> str:
    text = "".join(part.rstrip("\n") + "\n" * max(2, len(part) - len(part.rstrip("\n"))) for part in parts)
    return text.rstrip("\n") + "\n"


# --- the front matter -------------------------------------------------------------------------------------------------


def _mapping(metadata: str) -> dict[str, Any] | None:
    """Return the front matter as data, None where it is no YAML mapping."""
    import yaml

    try:
        data = yaml.safe_load(metadata) or {}
        json.dumps(data, default=str, skipkeys=True)  # ValueError: a list that holds itself
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: dates that there are not
        return None
    return {str(key): value for key, value in data.items()} if isinstance(data, dict) else None


def front_matter(text: str) -> dict[str, Any]:
    """Return a card's front matter as data, {} where there is none that can be read."""
    return _mapping(split_card(text)[0] or "") or {}


def _merge_metadata(own_text: str | None, rendered: str, base: Base) -> tuple[str, list[str]]:
    """Return the merged front matter, and what could not be merged."""
    if own_text is None:
        return rendered, []
    existing, new = _mapping(own_text), _mapping(rendered) or {}
    if existing is None:
        return own_text, ["the metadata, which is no YAML mapping"]
    merged: dict[str, Any] = {}
    unmerged = []
    for key, value in existing.items():
        edited = checksum(value) != base.keys.get(key)
        if key == "model-index":
            merged[key], fits = _merge_results(value, new.get(key))
            unmerged += [] if fits else ["'model-index', which is no list of models with results"]
        elif not edited and key in new:
            merged[key] = new[key]
        elif edited and key in new and base.keys.get(key) != checksum(new[key]):
            both = isinstance(value, list) and isinstance(new[key], list)
            merged[key] = [*value, *(item for item in new[key] if item not in value)] if both else value
            unmerged += [f"'{key}'"] if key in base.keys and not both else []
        elif edited:
            merged[key] = value
    merged |= {key: value for key, value in new.items() if key not in existing and key not in base.keys}
    merged = {key: value for key, value in merged.items() if value is not None or existing.get(key, 0) is None}
    return _dumped(merged, own_text, rendered), unmerged


def _merge_results(existing: Any, new: Any) -> tuple[Any, bool]:
    """Return a model-index with a person's results and today's figures of ours; whether the person's could be read."""
    entries: list[dict[str, Any]] = new or []
    if not isinstance(existing, list) or not all(
        isinstance(e, dict) and isinstance(e.get("results"), list) for e in existing
    ):
        return existing, not entries
    kept: list[dict[str, Any]] = [e | {"results": [r for r in e["results"] if not _is_ours(r)]} for e in existing]
    if entries and kept:
        name = entries[0]["name"] if _all_ours(existing[0]) else existing[0].get("name", entries[0]["name"])
        kept[0] = {**kept[0], "name": name, "results": [*entries[0]["results"], *kept[0]["results"]]}
    elif entries:
        kept = entries
    return [entry for entry in kept if entry["results"]] or None, True


def _is_ours(result: Any) -> bool:
    metrics = result.get("metrics") if isinstance(result, dict) else None
    if not isinstance(metrics, list) or not metrics:
        return False
    return all(isinstance(m, dict) and OUR_METRIC.match(str(m.get("name"))) for m in metrics)


def _all_ours(entry: dict[str, Any]) -> bool:
    return all(_is_ours(result) for result in entry["results"])


def _dumped(merged: dict[str, Any], own_text: str, rendered: str) -> str:
    """Write YAML so that a person's lines, comments and order stay wherever the value did."""
    import yaml

    own_blocks, new_blocks = _blocks(own_text), _blocks(rendered)
    if own_blocks is None or new_blocks is None:
        return yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    existing, new = _mapping(own_text) or {}, _mapping(rendered) or {}
    lines = []
    known = ((dict(own_blocks), existing), (dict(new_blocks), new))

    def block(key: str) -> str:
        for blocks, data in known:
            if key in data and data[key] == merged[key]:
                return blocks[key]
        return yaml.safe_dump({key: merged[key]}, sort_keys=False, allow_unicode=True)

    for name, text in own_blocks:
        if name is None:
            lines.append(text)
        elif name in merged:
            lines.append(block(name))
    lines += [block(key) for key in merged if key not in existing]
    return "".join(lines)


def _blocks(text: str) -> list[tuple[str | None, str]] | None:
    """Return the lines of each top-level key, comments under None; None for YAML that can't be told apart so."""
    blocks: list[tuple[str | None, str]] = []
    waiting = ""  # comments and blank lines, until it is known whose they are
    for line in text.splitlines(keepends=True):
        match = KEY_LINE.match(line)
        if match:
            blocks += [(None, waiting)] if waiting else []
            blocks.append((match[2], line))
            waiting = ""
        elif not line.strip() or line.startswith("#"):
            waiting += line
        elif blocks and blocks[-1][0] is not None:
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + waiting + line)
            waiting = ""
        else:
            return None
    blocks += [(None, waiting)] if waiting else []
    parsed: dict[str, Any] = {}
    for name, lines in blocks:
        if name is not None:
            parsed |= _mapping(lines) or {"": None}
    return blocks if parsed == _mapping(text) and len(parsed) == sum(b[0] is not None for b in blocks) else None
