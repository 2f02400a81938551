"""The CLIP vision tower of an original LLaVA: its weights and settings, from the folder or from the tower's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.json_file import parse_json, read_json
from ..checkpoints.pickled import StoredTensors
from ..checkpoints.safetensors_ranges import TensorRange
from ..errors import InputError

INSIDE = "model.vision_tower.vision_tower."  # of a checkpoint that holds its tower
IMAGES = "preprocessor_config.json"
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
KEPT = (*NEEDED, "hidden_act", "layer_norm_eps", "projection_dim", "num_channels", "attention_dropout")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Settings of OpenAI's ViT-L/14 towers (openai/clip-vit-large-patch14 and -336), written down from memory: compare them
# with the config.json there. `--vision-tower FOLDER` reads a tower's own settings instead.
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 768}  # fmt: skip
KNOWN = {
    "clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    "clip-vit-large-patch14-336": {**_LARGE, "image_size": 336},
}


@dataclass(frozen=True)
class Tower:
    """A CLIP vision tower."""

    config: dict[str, Any]  # vision_config of the checkpoint to be
    pieces: tuple[TensorRange, ...]  # named vision_model.…
    mean: tuple[float, ...]
    std: tuple[float, ...]


def tower_of(
    name: str, raw: dict[str, Any], stored: StoredTensors, named: tuple[str, Path, StoredTensors] | None
) -> Tower:
    """Return the tower of an original LLaVA: a fine-tuned one lies among its weights, others in a folder of their own.

    Args:
        name: the checkpoint, as the user wrote it; raw: its config.json.
        named: the tower that the user named, as (name, folder, tensors).
    Raises: InputError where there is none, or it is no CLIP tower.
    """
    stated = str(raw.get("mm_vision_tower", ""))
    inside = _below(stored, INSIDE)
    if named is None:
        settings = KNOWN.get(Path(stated).name)
        if not inside:
            raise InputError(
                f"{name} holds no vision tower, config.json names '{stated}': give it with --vision-tower (a folder or "
                "hub id)."
            )
        if settings is None:
            raise InputError(
                f"{name} holds a vision tower and not its settings ('{stated}' is none of {', '.join(KNOWN)}): give "
                "the tower that it began as with --vision-tower (a folder or hub id)."
            )
        return Tower({"model_type": "clip_vision_model", **settings}, inside, CLIP_MEAN, CLIP_STD)
    tower, folder, tensors = named
    config = _clip_settings(tower, read_json(folder / "config.json"))
    pieces = inside or tuple(piece for piece in _below(tensors, "") if piece.name.startswith("vision_model."))
    if not pieces:
        raise InputError(f"{tower} holds no tensor of a CLIP vision tower (vision_model.…).")
    images = parse_json(folder / IMAGES) if (folder / IMAGES).exists() else {}
    return Tower(config, pieces, tuple(images.get("image_mean", CLIP_MEAN)), tuple(images.get("image_std", CLIP_STD)))


def _below(stored: StoredTensors, prefix: str) -> tuple[TensorRange, ...]:
    """Return the tensors below a prefix, named without it, each with the bytes or the tensor that it had."""
    return tuple(
        TensorRange(name.removeprefix(prefix), piece.entry, piece.replacement)
        for name, piece in stored.pieces.items()
        if name.startswith(prefix) and not name.endswith("embeddings.position_ids")
    )


def _clip_settings(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Return vision_config of the tower's own config.json."""
    model_type = raw.get("model_type")
    settings = raw.get("vision_config") if model_type == "clip" else raw if model_type == "clip_vision_model" else None
    if not isinstance(settings, dict):
        raise InputError(f"{name} is a '{model_type}', and the vision tower of an original LLaVA is a CLIP model.")
    if missing := [key for key in NEEDED if key not in settings]:
        raise InputError(f"{name}: config.json does not say {missing[0]} of the vision tower.")
    return {"model_type": "clip_vision_model", **{key: settings[key] for key in KEPT if key in settings}}


def square_images(size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Return settings of an image processor that scales each picture to a square of so many pixels, and crops none."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
