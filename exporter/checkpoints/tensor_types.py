"""Types that the header of a weight file gives its tensors, where another type of the same width would be read as well.

Sizes tell a type of another width apart. float32 norms or routers among halves are another width, and nobody's fault.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ..errors import InputError
from .safetensors_ranges import TensorEntry, Weights

logger = logging.getLogger(__name__)
FRACTIONS = ("F64", "F32", "F16", "BF16")
WHOLE = ("I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL")
LEARNT = (".weight", ".bias")  # names that torch's layers give what is learnt, which has a gradient, and so fractions
ALIKE = (("F16", "BF16"), ("F8_E4M3", "F8_E5M2"))  # of one width: the same bytes are other numbers


def check_types(name: str, entries: Mapping[str, TensorEntry], all_learnt: bool = False) -> None:
    """Refuse weights of whole numbers, and say where two types of one width are mixed.

    Args:
        entries: of a checkpoint that is not quantized, or is decoded.
        all_learnt: every tensor is a weight, whatever its name.
    Raises: InputError.
    """
    whole = [key for key, entry in entries.items() if entry.dtype in WHOLE and (all_learnt or key.endswith(LEARNT))]
    if whole:
        entry = entries[whole[0]]
        raise InputError(
            f"{name}: {entry.path.name} says that {len(whole)} of its weights are whole numbers, {whole[0]} "
            f"({entry.dtype}) among them: its header is damaged. Download it again."
        )
    for pair in ALIKE:
        held = sorted((_with(dtype, entries) for dtype in pair), key=len)
        if held[0]:
            few, many = entries[held[0][0]].dtype, entries[held[1][0]].dtype
            logger.warning(
                "%s: %d tensors are stored in %s and %d in %s, %s among them: each is read as its file says", name,
                len(held[1]), many, len(held[0]), few, held[0][0],
            )  # fmt: skip


def refuse_not_finite(name: str, weights: Weights) -> None:
    """Raise InputError for the first tensor with NaN or infinite values; every weight is read, one at a time."""
    for key, entry in weights.entries.items():
        if entry.dtype in FRACTIONS and not weights.read(key).isfinite().all():
            raise InputError(f"{name}: tensor {key} holds NaN or infinite values. Download it again.")


def _with(dtype: str, entries: Mapping[str, TensorEntry]) -> list[str]:
    return [key for key, entry in entries.items() if entry.dtype == dtype]
