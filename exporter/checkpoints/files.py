"""Small files of a folder: JSON and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import InputError
from .temporary import file_beside

CARD = "README.md"
RECORDS = ("compression.json", "onnx.json")  # what they say is checked, and measurements are added to them
CONFIG_JSON = "config.json"
ADAPTER_FILE = "healing/adapter.safetensors"  # what healing learnt: merged into the weights, kept to make them again


# What transformers, its processors and its tokenizers read beside config.json and the weights.
READ_BY_TRANSFORMERS = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "qwen.tiktoken",
    "tokenizer.tiktoken",
)
LICENCE_TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
TEXT_ENDINGS = ("", ".md", ".txt", ".rst", ".html", ".pdf")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
OTHER_DOCUMENTS = (".csv", ".jsonl", ".log", ".cff", ".bib")  # that no loader reads
VOCABULARY_ENDINGS = (".json", ".txt", ".model", ".tiktoken", ".bpe", ".codes", ".vocab", ".spm")
LEFTOVERS = ("__pycache__", "*.pyc", "*.partial", "*.lock")  # parts of names, as globs
NAMED_AT_MOST = 8
TICK_NS = 50_000_000  # more than the longest step of the clock by which a file system says when a file was written
MOST_HASHES = 4096  # that a process remembers
_known_hashes: dict[tuple[str, int, int, int, int, int], str] = {}  # by the state of a file


def leads_out(path: Path, folder: Path) -> bool:
    """Tell whether a path below a folder leads out of it by a link.

    A snapshot of the hub's cache consists of links into its repository's `blobs`: those count as inside.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    inside = [home, home.parent.parent / "blobs"] if is_snapshot(home) else [home]
    return not any(real.is_relative_to(root) for root in inside)


def is_snapshot(folder: Path) -> bool:
    """Tell whether a folder is a snapshot in the hub's cache: models--USER--NAME/snapshots/COMMIT."""
    home = Path(os.path.realpath(folder))
    return home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")


def refuse_links_out(folder: Path, names: Iterable[str]) -> None:
    """Raise InputError for a file that is a link out of its folder. A path that leads there is refused as well."""
    for name in names:
        if leads_out(folder / name, folder):
            raise InputError(
                f"{folder / name} is a link that leads out of the folder: put the file itself there, or take it away."
            )


def check_written(folder: Path) -> None:
    """Raise InputError where card, pictures or record of a folder would be written through a link out of it."""
    pictures = [f"assets/{path.name}" for path in (folder / "assets").glob("*")]
    refuse_links_out(folder, [CARD, *RECORDS, "assets", *pictures])


def real_target(target: Path) -> Path:
    """Return the place that a folder to be made has on disk: a link is followed before the work, not after it.

    Raises: InputError for a link that leads in a circle.
    """
    target = target.expanduser().absolute()
    if not target.is_symlink():
        return target
    try:
        return target.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{target} is a link that leads nowhere: name another folder.") from error


def listed(folder: Path) -> dict[str, Path]:
    """Return every file below a folder, links to folders among them, by name; hidden ones and leftovers stay out."""
    files: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in [*links, *names]:
            if not is_ignored(name):
                path = Path(place, name)
                files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


def is_ignored(part: str) -> bool:
    """Tell whether a part of a name is hidden or a leftover: nothing reads it, and it is nobody else's business."""
    return part.startswith(".") or any(fnmatchcase(part, pattern) for pattern in LEFTOVERS)


def is_document(name: str) -> bool:
    """Tell whether a file is for people: card, licence text, picture, notes. Nothing that loads a model reads it."""
    if is_read(name):
        return False
    ending = Path(name).suffix.lower()
    return is_published_document(name) or ending in (*TEXT_ENDINGS[1:], *OTHER_DOCUMENTS)


def is_published_document(name: str) -> bool:
    """Tell whether a document goes along to the hub: Markdown, licence texts, pictures."""
    ending = Path(name).suffix.lower()
    return ending == ".md" or ending in PICTURE_ENDINGS or is_licence(name)


def is_licence(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in TEXT_ENDINGS and any(fnmatchcase(path.name, pattern) for pattern in LICENCE_TEXTS)


def is_read(name: str) -> bool:
    """Tell whether transformers reads a file of this name when it loads processor, tokenizer or settings."""
    return any(fnmatchcase(name, pattern) for pattern in READ_BY_TRANSFORMERS)


def made_files(folder: Path) -> dict[str, Path]:
    """Return the files that make up a checkpoint or an ONNX folder: all but its record, its card and other documents.

    Licence texts count: they were the source's.
    """
    return {
        name: path
        for name, path in listed(folder).items()
        if name not in RECORDS and (is_licence(name) or not is_document(name))
    }


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that makes up a folder."""
    return {name: hash_once(path) for name, path in made_files(folder).items()}


def sha256(path: Path) -> str:
    """Return the SHA-256 of what a file holds, whatever its name says."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Companions:
    """Files beside a source's weights and config.json, by name."""

    kept: tuple[str, ...]  # go along: read by transformers, or licence texts
    left: tuple[str, ...]  # stay behind


def companions(folder: Path) -> Companions:
    """Sort what lies beside a source's weights into what goes along and what stays behind.

    Raises: InputError where a file that would go along is a link out of the folder.
    """
    names = [name for name in listed(folder) if name != CONFIG_JSON and name not in RECORDS]
    kept = {name for name in names if is_read(name) or (is_licence(name) and "/" not in name)}
    rest = [name for name in names if name not in kept]
    if any("/" not in name and name.endswith(VOCABULARY_ENDINGS) for name in rest):
        kept |= set(rest) & vocabulary_files(folder)
    refuse_links_out(folder, sorted(kept))
    kept = {name for name in kept if (folder / name).is_file()}
    return Companions(tuple(sorted(kept)), tuple(name for name in names if name not in kept))


def vocabulary_files(folder: Path) -> set[str]:
    """Return the files that the folder's tokenizer class says it reads, by transformers' own classes only."""
    try:
        data = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
        name = data["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    import transformers

    names: set[str] = set()
    for class_name in (str(name), str(name).removesuffix("Fast"), f"{str(name).removesuffix('Fast')}Fast"):
        files = getattr(getattr(transformers, class_name, None), "vocab_files_names", None)
        if isinstance(files, dict):
            names |= {file for file in files.values() if isinstance(file, str) and file.endswith(VOCABULARY_ENDINGS)}
    return names


def left_behind(left: Iterable[str]) -> str:
    """Return one line that names what stayed behind, '' where that is nothing that anybody would miss."""
    missed = [name for name in left if name != CARD and not _is_weights(name)]
    tops = [f"{name.split('/')[0]}/" if "/" in name else name for name in missed]
    names = [name for name in dict.fromkeys(tops) if name != "assets/"]
    if not names:
        return ""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return f"left behind, since transformers reads none of them: {', '.join(names[:NAMED_AT_MOST])}{more}"


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def without_auto_map(data: Any) -> Any:
    """Return a configuration without any mention of code that would be loaded with trust_remote_code."""
    if isinstance(data, dict):
        return {key: without_auto_map(value) for key, value in data.items() if key != "auto_map"}
    return [without_auto_map(item) for item in data] if isinstance(data, list) else data


def copy_companions(source: Path, names: Iterable[str], target: Path) -> None:
    """Copy files byte for byte; a JSON file that names code in an auto_map is written without it.

    The code stays behind, and the plain classes are those that the checkpoint is verified with.
    """
    import shutil

    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json") and name not in ("tokenizer.json", "vocab.json") and _names_code(source / name):
            data = without_auto_map(json.loads((source / name).read_text(encoding="utf-8-sig")))
            (target / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(source / name, target / name)


def carry_adapter(source: Path, target: Path) -> None:
    """Copy what healing learnt, if the checkpoint was healed, so that it can be made again from its record."""
    import shutil

    if (source / ADAPTER_FILE).is_file():
        (target / ADAPTER_FILE).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / ADAPTER_FILE, target / ADAPTER_FILE)


def _names_code(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return '"auto_map"' in text and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step, so that a reader never meets half of it. A link in its place is not followed."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file as `replace_text` does. Args: mode: its rights; None: those of a new file."""
    with file_beside(path) as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o666 & ~umask() if mode is None else mode)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def regular(paths: dict[str, Path]) -> Iterator[str]:
    """Yield names of what is no regular file: folders behind links, pipes, devices, links that lead nowhere."""
    yield from (name for name, path in paths.items() if not path.is_file())


def file_hash(path: Path) -> str:
    """Return SHA-256. A file of the hub's cache is named by it, which saves reading large ones."""
    blob = Path(os.path.realpath(path))
    cached = path.is_symlink() and is_snapshot(path.parent) and blob.parent.name == "blobs"
    return blob.name if cached and re.fullmatch(r"[0-9a-f]{64}", blob.name) else hash_once(blob)


def hash_once(path: Path) -> str:
    """Return SHA-256 of a file's bytes, read once by a process as long as the file's state does not change.

    A file that was written a moment ago is read again: another change within one tick of the clock would not show.
    """
    state = _state_of(path)
    if state not in _known_hashes:
        digest = sha256(path)
        if time.time_ns() - max(state[-2:]) < TICK_NS or _state_of(path) != state:
            return digest
        if len(_known_hashes) >= MOST_HASHES:
            _known_hashes.clear()
        _known_hashes[state] = digest
    return _known_hashes[state]


def _state_of(path: Path) -> tuple[str, int, int, int, int, int]:
    """Return what changes with a file: where and how large it is, and when it and its entry were written."""
    state = path.stat()
    return str(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
