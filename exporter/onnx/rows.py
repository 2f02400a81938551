"""How families run on ONNX Runtime and see images: a table of those whose graphs are written out, a row each.

What differs between families at run time is integers only: which tiles are real, in which order features come, what
position a token has. The runner computes those on the host (`runtime/prepare.py`), so that a graph holds arithmetic and
no decision. `kind` says which of its functions is meant. What a row says is also seen in a model (`found.py`), by which
other types are exported; a row stays where its graphs are better than what is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHARED, GROWING = "shared", "growing"
SQUARE = "square"  # kind of images that are cut into tiles elsewhere: made square, and seen as one tile


class NotExported(ValueError):  # noqa: N818 - what was found
    """A type can't be exported; the message is a clause that says why."""


@dataclass(frozen=True)
class Pictures:
    """The form in which the encoder of a type that has no row takes pictures."""

    tile: tuple[int, ...]  # channels, height, width; of a grid the dimensions behind the one that counts patches
    dims: int = 4  # of pixel_values
    mask_dims: int = 0  # of pixel_attention_mask; 0: there is none
    grid: str = ""  # the argument that says rows and columns of patches
    merges: str = ""  # the one that says how many patches a side become one feature
    merge: int = 1  # that many
    functions: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()  # of runtime/grids.py, with settings

    def host_inputs(self) -> dict[str, dict[str, Any]]:
        return {name: dict(settings) for name, settings in self.functions}


@dataclass(frozen=True)
class Support:
    """The export of a family."""

    kind: str  # of its images: a row of VISION in vision.py, and of PREPARE in runtime/prepare.py
    blocks: str | None = None  # tokens that see each other both ways: "prompt", "images"; None: none do
    first_position: int = 0
    mrope: bool = False  # a position is three numbers: time, row, column
    pictures: Pictures | None = None  # of a type that has no row: its own encoder is traced
    adds_after: tuple[int, ...] = ()  # layers after which further features of the picture are added


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


def cache_of(support: Support, dtype: str, device: str) -> str:
    """Return the kind of cache of a support's graphs."""
    return GROWING if support.blocks or (device == "cuda" and dtype == "float32") else SHARED
