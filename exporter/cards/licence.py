"""Reads under which licence a source may be used, so that its card can be passed on: as the hub reads it, and further.

The hub knows a licence by `license`, `license_name` and `license_link` in the front matter of README.md. Where a folder
says nothing there, its licence file is named, and then the card of its base model is looked at.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from .card_file import front_matter

KEYS = ("license", "license_name", "license_link")
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
LONGEST_NAME = 80
CARD_TIMEOUT_S = 10  # to ask the hub for the card of a base model


def inherited_licence(folder: Path, base_model: str | None = None) -> dict[str, Any]:
    """Return what the source says of its licence: `license`, `license_name` and `license_link`, {} if it says nothing.

    Args:
        base_model: hub id of the model that the source was made from, whose card is read where the source is silent.
    """
    data = front_matter(card_text(folder / "README.md"))
    named = data.get("base_model")
    base = base_model or (named[0] if isinstance(named, list) and named else named)
    stated = stated_licence(data)
    if not stated or stated == {"license": "other"}:
        stated = licence_of_file(folder) or stated
    if not stated and base:
        stated = stated_licence(front_matter(_card_on_hub(str(base))))
    link = stated.get("license_link")
    if base and link and "://" not in link and not (folder / link).is_file():  # a file that can't go along
        stated["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return stated


def card_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def stated_licence(data: dict[str, Any]) -> dict[str, Any]:
    """Return the licence of a card's front matter; its keys may be written in any case, its value may be a list."""
    lower = {key.lower(): value for key, value in data.items()}
    entries = {key: _plain(lower[key]) for key in KEYS if lower.get(key)}
    if "license" in entries:
        names = entries["license"] if isinstance(entries["license"], list) else [entries["license"]]
        names = [str(name).lower() for name in names]  # the hub's identifiers are written in lower case
        entries["license"] = names if len(names) > 1 else names[0]
    elif entries:
        entries = {"license": "other", **entries}
    return entries


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list) else str(value)


def licence_of_file(folder: Path) -> dict[str, Any]:
    """Return 'other' with the first line of the licence file as its name, {} where there is no such file.

    The text is not taken for one of the licences that the hub knows: it may add conditions to it.
    """
    files = sorted(path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file())
    if not files:
        return {}
    lines = files[0].read_text(encoding="utf-8-sig", errors="replace").splitlines()
    title = next((line.strip() for line in lines if re.search(r"[A-Za-z0-9]", line)), files[0].stem)
    name = re.sub(r"[^a-z0-9.]+", "-", title[:LONGEST_NAME].lower()).strip("-.") or "license"
    return {"license": "other", "license_name": name, "license_link": files[0].name}


def _card_on_hub(repo: str) -> str:
    """Return the card of a repository, from the local cache or the hub; '' where it can't be had."""
    from huggingface_hub import hf_hub_download

    from ..checkpoints.hub_access import hub_errors

    try:
        with hub_errors(repo):
            return card_text(Path(hf_hub_download(repo, "README.md", etag_timeout=CARD_TIMEOUT_S)))
    except (InputError, OSError, ValueError):
        return ""


def licence_sentence(source: dict[str, Any]) -> str:
    """Return what a card says of the licence, from a record's `source`."""
    licence = source["license"]
    stated = licence.get("license")
    if not stated:
        return "The base model's folder states no licence: ask its authors."
    named = ", ".join(stated) if isinstance(stated, list) else stated
    if named == "other" and licence.get("license_name"):
        named = licence["license_name"]
    if licence.get("license_link"):
        named = f"[{named}]({licence['license_link']})"
    return f"Licence: {named}, inherited."
