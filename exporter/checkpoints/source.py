"""Opening what the user names: a local folder or a hub id, checked before anything expensive starts."""

from __future__ import annotations

import copy
import functools
import logging
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..families import Decoder, Family, family_of, is_listed
from ..probe.opened import decoder_of
from .config_file import (
    ATTENTION_KEYS,
    check_feature_layers,
    check_generation_config,
    check_names,
    check_raw_config,
    first_lines,
    load_config,
    places,
)
from .files import Companions, companions, file_hash, is_read
from .hub_access import refuse_without_weights, resolve
from .json_file import read_json
from .layer_names import LISTED, layer_key
from .processor_files import Repairs, check_tokens, class_repairs, setting_repairs
from .processor_files import load_for as load_processor_for
from .quantization import find_quantization
from .safetensors_ranges import Weights
from .source_view import make_decoded_view, make_view
from .tensor_types import check_types
from .weight_files import NAMED_WEIGHTS, open_weights, refuse_adapter

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


ATTENTION_HERE = ("eager", "sdpa")
RECORD = "compression.json"


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk that has passed every check that needs no forward pass."""

    name: str  # as the user wrote it: a path or a hub id
    folder: Path
    revision: str | None  # the hub's commit
    config: Any  # transformers' configuration
    raw_config: dict[str, Any]  # config.json as it stands
    weights: Weights
    family: Family
    decoder: Decoder
    original: Path  # the folder itself, where `folder` is a view of it
    stored: Weights  # as they lie there, where `weights` are decoded
    layer_key: re.Pattern[str] = LISTED  # of tensors of decoder layers: prefix, index, name inside the layer

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @cached_property
    def layer_prefix(self) -> str:
        """Return the part of the decoder's tensor names before the layer index, 'language_model.model.layers.' say."""
        return next(m[1] for m in map(self.layer_key.match, self.weights.entries) if m)

    def layer_of(self, tensor_name: str) -> int | None:
        """Return the decoder layer that a tensor belongs to, None for the vision tower, embeddings, head."""
        match = self.layer_key.match(tensor_name)
        return int(match[2]) if match else None

    @property
    def parameters_per_layer(self) -> list[int]:
        counts = [0] * self.num_layers
        for name, entry in self.weights.entries.items():
            if (layer := self.layer_of(name)) is not None:
                counts[layer] += entry.num_parameters
        return counts

    @cached_property
    def beside_weights(self) -> Companions:
        """Sort what lies beside the weights into what goes along, repaired or not, and what stays behind."""
        beside = companions(self.original)
        if self.folder == self.original:
            return beside
        repaired = {path.name for path in self.folder.iterdir() if not path.is_symlink() and is_read(path.name)}
        kept = (name for name in {*beside.kept, *repaired} if (self.folder / name).is_file())
        return Companions(tuple(sorted(kept)), beside.left)

    def companions(self) -> list[Path]:
        """Return the files that go along, relative to the folder."""
        return [Path(name) for name in self.beside_weights.kept]


def open_source(name: str, revision: str | None = None) -> Source:
    """Resolve, download where needed, and check. Raises InputError for everything that is wrong with the input.

    What can be mended without a choice is mended in a view of the folder, which `Source.folder` is then: weights of
    fewer bits are decoded, the processor is given what config.json says, attention that is not here is left out.
    """
    folder, revision = resolve(name, revision)
    state = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*")) if p.exists())
    source = _checked(name, folder.absolute(), revision, state)
    return replace(source, config=copy.deepcopy(source.config), raw_config=copy.deepcopy(source.raw_config))


@functools.lru_cache(maxsize=16)
def _checked(name: str, folder: Path, revision: str | None, state: tuple[Any, ...]) -> Source:
    """Return the checks of one folder, which need seconds for a large one, once as long as no file of it changes."""
    raw_config = read_json(folder / "config.json")
    check_raw_config(name, raw_config)
    config = load_config(folder, raw_config)
    check_names(name, raw_config, config)
    check_feature_layers(name, config)
    family, decoder = family_of(config), decoder_of(config)
    refuse_adapter(folder, name)
    if revision is not None:
        refuse_without_weights(name, revision, folder)
    weights = open_weights(folder, raw_config.get(NAMED_WEIGHTS))
    quantized = find_quantization(raw_config, folder, weights)
    view, decoded = folder, weights
    if quantized is not None:
        _refuse_own(name, folder, f"it is quantized by {quantized.method}")
        view = make_decoded_view(name, folder, raw=raw_config, quantized=quantized, weights=weights)
        logger.warning(
            "%s is quantized by %s: its weights are decoded to bfloat16, and so written", name, quantized.method
        )
        raw_config = read_json(view / "config.json")
        config, decoded = load_config(view, raw_config), open_weights(view)
    check_types(name, decoded.entries)
    source = Source(
        name=name,
        folder=view,
        revision=revision,
        config=config,
        raw_config=raw_config,
        weights=decoded,
        family=family,
        decoder=decoder,
        original=folder,
        stored=weights,
    )
    source = _mended(_with_layers(source))
    check_fit(source)
    return source


def open_weights_only(folder: Path) -> Source:
    """Open a checkpoint without its processor: what its weights and config.json say, checked against each other."""
    raw_config = read_json(folder / "config.json")
    check_raw_config(str(folder), raw_config)
    config, weights = load_config(folder, raw_config), open_weights(folder)
    check_names(str(folder), raw_config, config)
    check_types(str(folder), weights.entries)
    source = _with_layers(Source(str(folder), folder, None, config, raw_config=raw_config, weights=weights,
                                 family=family_of(config), decoder=decoder_of(config), original=folder,
                                 stored=weights))  # fmt: skip
    check_fit(source)
    return source


def _with_layers(source: Source) -> Source:
    """Return the source with the names of its decoder layers' tensors, whose number is checked."""
    if not is_listed(source.config):
        source = replace(source, layer_key=layer_key(laid_out(source.config), source.weights.entries))
    check_layers(source)
    return replace(source, decoder=_stored(source))


def _stored(source: Source) -> Decoder:
    """Return how the layers are made, without folds where the maps to fold into are stored under other names."""
    decoder = source.decoder
    for layer, names in enumerate(decoder.maps):
        for name in names:
            full = f"{source.layer_prefix}{layer}.{name}.weight"
            if name is not None and decoder.unfoldable is None and full not in source.weights.entries:
                return replace(decoder, unfoldable=f"{name} is stored under another name or together with others")
    return decoder


def laid_out(config: Any) -> Any:
    """Build the model of a configuration without memory."""
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # whatever a model's class makes of its settings
        raise InputError(
            f"transformers can't lay out a {config.model_type} model from config.json: {first_lines(error)}"
        ) from error


def check_layers(source: Source) -> None:
    """Raise InputError where config.json and the weights differ in the number of decoder layers."""
    layers = {layer for layer in map(source.layer_of, source.weights.entries) if layer is not None}
    expected = set(range(source.num_layers))
    if layers != expected:
        raise InputError(
            f"{source.name}: config.json says {len(expected)} decoder layers, the weights hold {len(layers)}"
            f"{_difference(expected, layers)}. The checkpoint is incomplete, or its config is of another one."
        )


def _mended(source: Source) -> Source:
    """Return the source with a processor and a configuration that can be used here; itself where it has them."""
    changes: Repairs = class_repairs(source.folder) | _attention_repairs(source)
    if changes:
        source = _viewed(source, changes)
    check_generation_config(source.name, source.folder)
    processor = load_processor_for(source.name, source.folder, source.config)
    if repairs := setting_repairs(source.name, source.folder, processor, source.config):
        stated = ", ".join(f"{key}={value}" for entries in repairs.values() for key, value in entries.items())
        logger.warning(
            "%s: its processor lacks settings that config.json has, they are filled in: %s", source.name, stated
        )
        source = _viewed(source, repairs)
        processor = load_processor_for(source.name, source.folder, source.config)
    check_tokens(source.name, processor, config=source.config, raw=source.raw_config, embeddings=_embeddings(source))
    return source


def _viewed(source: Source, changes: Repairs) -> Source:
    _refuse_own(source.name, source.original, f"{', '.join(changes)} would have to be mended")
    view = make_view(source.folder, changes)
    raw_config = read_json(view / "config.json")
    return replace(source, folder=view, raw_config=raw_config, config=load_config(view, raw_config))


def _refuse_own(name: str, folder: Path, reason: str) -> None:
    """Refuse to mend a checkpoint of ours: its record describes it as it was written."""
    if (folder / RECORD).exists():
        raise InputError(f"{name} is not as lvlm-exporter wrote it: {reason}. Make it again, or take {RECORD} out.")


def _attention_repairs(source: Source) -> Repairs:
    """Return config.json without an attention that needs a package or a GPU: it would not load elsewhere either."""
    attentions: set[str] = set()
    entries: dict[str, Any] = {}
    for settings in places(source.raw_config).values():
        attentions |= {str(settings[key]) for key in ATTENTION_KEYS if settings.get(key) not in (None, *ATTENTION_HERE)}
    if not attentions:
        return {}
    logger.warning(
        "%s: config.json asks for the attention %s, which depends on the machine: sdpa is used, and the entry is left "
        "out of what is written", source.name, ", ".join(sorted(attentions)),
    )  # fmt: skip
    for key, value in source.raw_config.items():
        if key in ATTENTION_KEYS:
            entries[key] = None
        elif isinstance(value, dict):
            entries[key] = {k: v for k, v in value.items() if k not in ATTENTION_KEYS}
    return {"config.json": entries}


def _embeddings(source: Source) -> int:
    """Return rows of the input embeddings, as the weights have them."""
    rows = [
        entry.shape[0]
        for name, entry in source.weights.entries.items()
        if name.endswith("embed_tokens.weight") and "vision" not in name and entry.shape
    ]
    return rows[0] if rows else int(source.config.get_text_config().vocab_size)


def check_fit(source: Source) -> None:
    """Raise InputError where the weights are not those of config.json: a shape, a tensor too few.

    transformers lays the model out without memory and compares names and shapes; no weight is read.
    """
    refuse_report(source.name, _layout(source))


def _layout(source: Source) -> dict[str, Any]:
    """Return what transformers says of a checkpoint's keys when it lays the model out without memory."""
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        _, report = AutoModelForImageTextToText.from_pretrained(
            source.folder,
            device_map="meta",
            dtype=torch.bfloat16,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever a model's class makes of sizes that do not go together
        raise InputError(
            f"{source.name}: transformers can't build a model from config.json and the weights: {first_lines(error)}"
        ) from error
    layout: dict[str, Any] = report
    return layout


def ignored_keys(source: Source) -> list[str]:
    """Return names of tensors that transformers has no use for; no weight is read."""
    return sorted(map(str, _layout(source)["unexpected_keys"]))


def refuse_report(name: str, report: dict[str, Any]) -> None:
    """Raise InputError for what transformers reports of keys that are missing or of another shape."""
    if shapes := sorted(report["mismatched_keys"], key=str):
        key, held, expected = shapes[0] if isinstance(shapes[0], tuple) else (shapes[0], "?", "?")
        raise InputError(
            f"{name}: {len(shapes)} tensors have another shape than config.json asks for, {key} {list(held)} instead "
            f"of {list(expected)} among them: weights and config.json do not belong together."
        )
    if names := sorted(map(str, report["missing_keys"])):
        raise InputError(
            f"{name}: {len(names)} missing keys when transformers loads it, {names[0]} among them: weights and "
            "config.json do not belong together."
        )


def _difference(expected: set[int], actual: set[int]) -> str:
    missing, extra = sorted(expected - actual), sorted(actual - expected)
    parts = [f"{what} {names}" for what, names in (("missing", missing), ("too many", extra)) if names]
    return f" ({', '.join(parts)})" if parts else ""


def file_hashes(source: Source) -> dict[str, str]:
    """Return SHA-256 of every file that the result depends on, as the source has it."""
    folder = source.original
    paths = [folder / "config.json", *(shard.path for shard in source.stored.shards)]
    paths += [folder / path for path in source.companions() if (folder / path).exists()]
    return {str(path.relative_to(folder)): file_hash(path) for path in paths}
