"""Which families run on ONNX Runtime, how each sees images, and why the others can't. One table.

What differs between families at run time is integers only: which tiles are real, in which order features come, what
position a token has. The runner computes those on the host (`runtime/prepare.py`), so that a graph holds arithmetic and
no decision. `kind` says which of its functions is meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..families import FAMILIES, family_of, is_listed

SHARED, GROWING = "shared", "growing"
SQUARE = "square"  # kind of images that are cut into tiles elsewhere: made square, and seen as one tile


@dataclass(frozen=True)
class Support:
    """The export of a family."""

    kind: str  # of its images: a row of VISION in vision.py, and of PREPARE in runtime/prepare.py
    blocks: str | None = None  # tokens that see each other both ways: "prompt", "images"; None: none do
    first_position: int = 0
    mrope: bool = False  # a position is three numbers: time, row, column


SUPPORTED: dict[str, Support] = {
    "llava": Support("tiles"),
    "llava_next": Support("anyres"),
    "llava_onevision": Support("anyres"),
    "internvl": Support("tiles"),
    "idefics3": Support("real_tiles"),
    "smolvlm": Support("real_tiles"),
    "paligemma": Support("tiles", blocks="prompt", first_position=1),
    "gemma3": Support("tiles", blocks="images"),
    "mistral3": Support("sized"),
    "qwen2_vl": Support("patches", mrope=True),
    "qwen2_5_vl": Support("patches", mrope=True),
}

REFUSED = {
    "qwen3_vl": "visual features enter its decoder several times, which these graphs have no inputs for",
    "glm4v": "its vision tower resamples position embeddings for every image size, which is not exported yet",
}


def support_of(config: Any, layout: str | None = None) -> Support:
    """Return how a loaded transformers configuration is exported, or an InputError with the reason why it is not.

    Args:
        layout: of the folder; None: that of our own runner. Clients cut no tiles: they show a picture as one square.
    """
    family = family_of(config)
    if reason := REFUSED.get(config.model_type):
        raise InputError(
            f"{family.title} can't be exported to ONNX: {reason}. Families that can: {', '.join(titles())}."
        )
    if not is_listed(config) or config.model_type not in SUPPORTED:
        raise InputError(
            f"{family.title} can't be exported to ONNX: its graphs are not written yet. Families that can: "
            f"{', '.join(titles())}."
        )
    support = SUPPORTED[config.model_type]
    if config.model_type == "llava" and config.vision_config.model_type == "pixtral":
        return Support("sized")
    return replace(support, kind=SQUARE) if layout is not None and support.kind == "anyres" else support


def titles() -> list[str]:
    return [FAMILIES[name].title for name in SUPPORTED]


def cache_kind(config: Any, dtype: str, device: str) -> str:
    """Return how keys and values are kept from token to token.

    'shared': buffers of the answer's full length, which ONNX Runtime's GroupQueryAttention fills in place; it is causal
    and, on CUDA, for half precision only. 'growing': each pass returns longer ones and takes a mask, which can say
    that tokens see each other both ways.
    """
    if support_of(config).blocks or (device == "cuda" and dtype == "float32"):
        return GROWING
    return SHARED
