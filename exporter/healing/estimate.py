"""The cost of healing a checkpoint on this machine, before it is run. Nothing is loaded or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoints.source import Source
from ..clean_room import load_processor
from ..data.batches import by_size, make_batch
from ..data.samples import Sample
from ..models.gradients import PART
from ..models.last_state import KEPT_BYTES, activation_bytes
from .schedule import Schedule

UPDATE_BYTES = 20  # of a learnt parameter: itself, a step's and a part's gradients, the optimizer's moments, in float32
LOOKED_AT = 4  # of the largest questions, to learn how long they are


def healing_cost(
    schedule: Schedule,
    original: Source,
    samples: Sequence[Sample],
    answer_tokens: int,
    kept_layers: float,
    itemsize: int,
) -> dict[str, Any]:
    """Return steps, questions, pairs, forward passes over the questions, and bytes of memory and disk.

    The two models are never in memory together: the original with what it keeps for an answer, or the smaller one with
    its updates and what a step keeps for the gradients.

    Args:
        kept_layers: share of the original's layers that the smaller model has.
        itemsize: bytes of a number while it runs.
    """
    heal, weights = schedule.recipe, original.weights
    layered = [e for name, e in weights.entries.items() if original.layer_of(name) is not None]
    in_layers = sum(entry.num_parameters for entry in layered)
    learnt = kept_layers * heal.rank * sum(sum(e.shape) for e in layered if len(e.shape) == 2)
    length = _longest(original, samples) + answer_tokens
    kept = activation_bytes(original.config.get_text_config(), min(PART, heal.batch_size) * length)
    smaller = (weights.num_parameters - (1 - kept_layers) * in_layers) * itemsize
    training = smaller + UPDATE_BYTES * learnt + min(KEPT_BYTES, kept_layers * kept)
    return {
        "steps": schedule.steps,
        "questions": schedule.fit,
        "held_out": schedule.judging,
        "pairs": schedule.rounds * schedule.fit,
        "forward_passes": round(schedule.forward_passes(kept_layers), 1),
        "memory_bytes": round(max(weights.num_parameters * itemsize, training)),
        "disk_bytes": schedule.disk_bytes(answer_tokens),
    }


def _longest(source: Source, samples: Sequence[Sample]) -> int:
    """Return the tokens of the longest of the questions with the largest images."""
    largest = by_size(samples)[-LOOKED_AT:]
    processor = load_processor(source.folder)
    return max(make_batch([sample], processor, source.config).is_visual.shape[1] for sample in largest)
