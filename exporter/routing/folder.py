"""Put a router into a checkpoint: its weights, its settings, and the modeling file that runs the model with it.

The folder stays what it was for everybody who does not trust remote code: config.json keeps its model_type, and the
router's weights lie in a folder of their own, which neither transformers nor serving engines look into.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.config_file import first_lines
from ..checkpoints.files import replace_bytes, replace_text
from ..checkpoints.json_file import read_json
from ..checkpoints.own_types import own_type, routed_class
from ..checkpoints.record import RECORD, read_record
from ..checkpoints.router_entry import read_settings
from ..checkpoints.safetensors_ranges import read_shard
from ..checkpoints.source import Source
from ..checkpoints.temporary import temporary_folder
from ..checkpoints.tensor_types import check_types
from ..checkpoints.trust import warn_of_foreign_code
from ..errors import InputError
from ..modeling.released import is_released, sha256_of
from ..models.loading import load_model
from .settings import check_routable, default_settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


MODELING_FILES = (  # what travels with a routed checkpoint; the first imports the others
    "modeling_routed.py",
    "routed_api.py",
    "routed_cache.py",
    "routed_cost.py",
    "routed_pass.py",
    "routed_places.py",
    "routed_request.py",
    "routed_route.py",
    "routed_router.py",
    "routed_turns.py",
    "routed_types.py",
)
MODELING_FOLDER = Path(__file__).parent.parent / "modeling"
AUTO_CLASS = "AutoModelForImageTextToText"


def modeling_files(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of all files that a routed checkpoint of a config.json takes along, those of a type of ours too.

    config.json names the first, or for a type of ours the file that has its routed class.
    """
    our_type = own_type(config)
    modules = () if our_type is None else (our_type.routed_module, our_type.module, *our_type.siblings)
    return (*MODELING_FILES, *(f"{module}.py" for module in modules))


def has_router(model: Any) -> bool:
    return getattr(model, "router", None) is not None


def load_routed(source: Source, device: str, dtype: torch.dtype, memory: str | None = None) -> Any:
    """Return the model of a folder, able to follow routes: with its router if it has one, else for routes by rule only.

    It runs whole until it is given a budget. The class is this package's own: nothing in the folder is trusted to run.
    """
    has_router = "router" in source.raw_config
    check_routable(source.config, has_router=has_router)
    if not has_router:
        return routable(load_model(source, device, dtype, memory)[0])
    warn_of_foreign_code(source.folder, source.name)
    read_settings(source.config, source.name)
    try:
        from safetensors import SafetensorError

        from ..modeling.modeling_routed import ROUTER_FILE

        if (path := source.folder / ROUTER_FILE).is_file():  # else loading says so
            check_types(f"{source.name}'s router", read_shard(path).entries, all_learnt=True)
        cls = routed_class(source.config.model_type)
        model = load_model(source, device, dtype=dtype, memory=memory, cls=cls)[0]
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source.name}: {first_lines(error)}") from error
    model.set_budget("off")
    return model


def routable(model: Any, settings: Mapping[str, Any] | None = None) -> Any:
    """Make a loaded stock model able to follow routes, in place; it has no router, so that budgets alone won't do."""
    from ..modeling.modeling_routed import routed
    from ..modeling.routed_pass import make_routable
    from ..modeling.routed_route import OFF

    check_routable(model.config)
    model.config.router = dict(settings or default_settings(model.config)) | {"default": "off"}
    stock: Any = type(model)
    model.__class__ = routed(stock)
    model.router_settings, model.budget = read_settings(model.config, "the model"), OFF
    try:
        make_routable(model._text_model())
    except ValueError as error:
        raise InputError(str(error)) from error
    return model


def add_router(folder: Path, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a router into a checkpoint folder: weights, modeling file, and the two entries of config.json, last."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from ..modeling.modeling_routed import ROUTER_FILE, class_name

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_routable(config)
    path = folder / ROUTER_FILE
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    raw = read_json(folder / "config.json")
    for name in modeling_files(raw):
        shutil.copyfile(MODELING_FOLDER / name, folder / name)
    if (our_type := own_type(raw)) is not None:
        raw["auto_map"] = our_type.routed_auto_map
    else:
        module = MODELING_FILES[0].removesuffix(".py")
        raw["auto_map"] = {**raw.get("auto_map", {}), AUTO_CLASS: f"{module}.{class_name(config.model_type)}"}
    raw["router"] = dict(settings)
    replace_text(folder / "config.json", _as_json(raw))


def set_default(folder: Path | str, preset: str) -> None:
    """Set the preset under which a routed folder runs where a program passes no budget.

    config.json is replaced in one step; its SHA-256 in compression.json is updated.

    Args:
        folder: on disk.
        preset: one of the router's presets, or "off".

    Raises:
        InputError: the folder has no router, the preset is not one of its, or config.json is not the recorded file.
    """
    folder = Path(folder)
    raw = _config_of(folder)
    entry, part = ("serving_router", "serving") if "serving_router" in raw else ("router", "router")
    router = raw.get(entry)
    if not isinstance(router, dict) or not isinstance(router.get("presets"), dict):
        raise InputError(f"{folder} has no router, and therefore no presets.")
    if preset not in {"off", *router["presets"]}:
        names = ", ".join(["off", *router["presets"]])
        raise InputError(f"preset {preset!r} is not known: {folder} has {names}.")
    before = router.get("default", "off")
    text = _as_json({**raw, entry: {**router, "default": preset}})
    record = _record_of(folder)
    routed_record = record.get(part)
    if isinstance(routed_record, dict):
        if isinstance(reference := routed_record.get("reference"), dict):
            reference.setdefault("preset", before)  # under which the recorded answer was given
        if isinstance(settings := routed_record.get("settings"), dict):
            settings["default"] = preset
    _replace(folder, {"config.json": text.encode()}, record)
    if record:
        from ..cards.model_card import card

        card(folder)  # it names the default


def update_modeling_files(folder: Path | str) -> list[str]:
    """Put the modeling files of this release into a routed folder in place of those of an earlier one.

    Folders that an earlier release published answer wrongly under a transformers that is newer than their files. Only
    files that a release shipped are replaced; router and settings stay as they are.

    Returns:
        The names of the files that were written; none if the folder is up to date.

    Raises:
        InputError: the folder has no router, or a modeling file that no release shipped.
    """
    folder = Path(folder)
    config = _config_of(folder)
    if "router" not in config:
        raise InputError(f"{folder} has no router, and therefore no modeling files.")
    names = modeling_files(config)
    foreign = [name for name in names if (folder / name).exists() and not is_released(folder / name)]
    if foreign:
        raise InputError(f"{folder / foreign[0]} is no file that a release shipped: it was edited, and is left alone.")
    files = {name: (MODELING_FOLDER / name).read_bytes() for name in names}
    files = {n: data for n, data in files.items() if not (folder / n).exists() or (folder / n).read_bytes() != data}
    if files:
        _replace(folder, files, _record_of(folder))
    return list(files)


def has_earlier_code(folder: Path) -> bool:
    """Tell whether a routed folder's main modeling file is one that an earlier release shipped, byte for byte.

    Of a type of ours there are several: one for the router, one with the class, one for the model.
    """
    mains = [name for name in modeling_files(_config_of(folder)) if name.startswith("modeling_")]
    return all(is_released(folder / name) for name in mains) and any(
        (folder / name).read_bytes() != (MODELING_FOLDER / name).read_bytes() for name in mains
    )


@contextlib.contextmanager
def with_current_code(folder: Path) -> Iterator[Path]:
    """Give a view of a folder as it would be with this release's modeling files: links to its other files.

    The folder itself is given where its modeling files are none of an earlier release.
    """
    if not has_earlier_code(folder):
        yield folder
        return
    names = modeling_files(_config_of(folder))
    with temporary_folder("view", folder.parent) as place:
        view = place / folder.name
        view.mkdir()
        for path in folder.iterdir():
            if path.name not in names and path.name != "__pycache__":
                (view / path.name).symlink_to(path.absolute())
        for name in names:
            shutil.copyfile(MODELING_FOLDER / name, view / name)
        yield view


def _replace(folder: Path, files: Mapping[str, bytes], record: dict[str, Any]) -> None:
    """Replace files of a folder, and their hashes in its record wherever those are named."""
    for name, data in files.items():
        old = sha256_of(folder / name) if (folder / name).exists() else None
        new = hashlib.sha256(data).hexdigest()
        for hashes in _hashes(record):
            is_beside_modeling_file = old is None and MODELING_FILES[0] in hashes
            if is_beside_modeling_file or (old is not None and str(hashes.get(name)).lower() == old):
                hashes[name] = new
            elif hashes is record.get("measured", {}).get("files") and name in hashes:
                raise InputError(
                    f"{folder / name} is not the file that {RECORD} records: it was edited since, and is left alone."
                )
    for name, data in files.items():
        replace_bytes(folder / name, data)
    if record:
        replace_text(folder / RECORD, _as_json(record))


def _hashes(data: Any) -> Iterator[dict[str, Any]]:
    """Yield every dict of file names to hashes in a record."""
    if isinstance(data, dict):
        if "config.json" in data or MODELING_FILES[0] in data:
            yield data
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from _hashes(item)


def _config_of(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}.")
    return read_json(folder / "config.json")


def _record_of(folder: Path) -> dict[str, Any]:
    """Return the record's JSON, to be changed and written; {} for a folder without one."""
    return read_record(folder).to_data() if (folder / RECORD).exists() else {}


def _as_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"
