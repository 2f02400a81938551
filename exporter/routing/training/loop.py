"""Trains a router on unlabelled questions about images; the LVLM is frozen.

What a batch of questions is to the router is in `learner.py`, what it learns from in one file a loss; here is the
training itself: its order of questions, its schedule, its curve, and the state that it goes on from.

Shapes: those of `learner.py`.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.temporary import file_beside
from ...data.pictures import split_by_picture
from ...data.samples import Sample
from ...errors import InputError
from ...methods import LOSSES, resolve
from ...modeling.routed_route import RouterSettings
from ...modeling.routed_router import Router
from ...models.answers import ANSWER_TOKENS
from ...progress import Progress
from .learner import Learner, Teacher
from .relaxation import gated_attention

logger = logging.getLogger(__name__)
HELD_OUT, MOST_HELD_OUT = 8, 128  # one in so many questions is not trained on but judged by, so many at most
SAVE_EVERY = 50  # steps
POOL = 4  # batches whose questions are drawn together


@dataclass(frozen=True)
class Training:
    """How a router is trained; what a recipe's `router` says."""

    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 2e-3
    loss: str = "importance"
    options: dict[str, Any] = field(default_factory=dict)  # of the loss
    seed: int = 0
    answer_tokens: int = ANSWER_TOKENS  # that the model's own answer to a question may take


@dataclass(frozen=True)
class Trained:
    """A router and how it got there."""

    weights: dict[str, Tensor]
    curve: list[dict[str, float]]  # by step: training loss, and KL of held-out questions under each probe
    questions: int
    held_out: int


# --- the verb's core --------------------------------------------------------------------------------------------------


def train_router(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    settings: RouterSettings,
    training: Training,
    progress: Progress,
    state_file: Path | None = None,
    fingerprint: str = "",
) -> Trained:
    """Train on the samples.

    Args:
        state_file: where the state is kept, so that a broken-off run goes on; removed by the caller.
        fingerprint: of everything that the result depends on; a state of another one is not gone on from.
    """
    teacher = Teacher(model, processor, tuple(samples))
    trained_on, held_out = parted(samples, training.seed)
    sizes = [sample.pixels for sample in samples]
    teacher.answer_all(progress, training.batch_size, training.answer_tokens)
    torch.manual_seed(training.seed)
    router = Router(model.config.get_text_config().hidden_size, settings).to(model.device)
    optimizer = torch.optim.AdamW(router.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, training.steps))
    state = TrainingState(router, optimizer, schedule, fingerprint)
    first = state.load(state_file)
    loss_of = resolve(LOSSES[training.loss].run)
    with gated_attention(model) as attention:
        learner = Learner(teacher, router, settings, attention)
        for step in progress(range(first, training.steps), "train router", training.steps - first):
            generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
            chosen = drawn(trained_on, sizes, step, training)
            loss = loss_of(learner.training_batch(chosen), generator, **training.options)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            state.note(step, loss.item())
            if held_out and ((step + 1) % max(1, training.steps // 10) == 0 or step == 0):
                state.curve[-1] |= learner.probe(held_out, training.batch_size)
            if state_file is not None and (step + 1) % SAVE_EVERY == 0:
                state.save(state_file, step + 1)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in router.state_dict().items()}
    return Trained(weights, state.curve, len(trained_on), len(held_out))


def parted(samples: Sequence[Sample], seed: int) -> tuple[list[int], list[int]]:
    """Questions to train on and questions to judge by, about other pictures; none of these where there are too few."""
    if len(samples) < 2 * HELD_OUT:
        return list(range(len(samples))), []
    split = split_by_picture(samples, min(MOST_HELD_OUT, len(samples) // HELD_OUT), seed)
    return sorted(split.fit), sorted(split.held_out)


def rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: a warm-up over a twentieth of the steps, then down by a cosine."""
    return min(1.0, 20 * (step + 1) / steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def drawn(indices: Sequence[int], sizes: Sequence[int], step: int, training: Training) -> list[int]:
    """Return the questions of a step: epoch after epoch, each in an order of its own.

    Of POOL batches' worth of questions each batch takes those of like size, in random turn: a sixth of the tokens
    of a random batch would be padding.
    """
    size, pool = training.batch_size, step // POOL
    chosen: list[int] = []
    for place in range(pool * POOL * size, (pool + 1) * POOL * size):
        epoch, within = divmod(place, len(indices))
        chosen.append(indices[_order(len(indices), training.seed * 7919 + epoch)[within]])
    chosen.sort(key=lambda index: sizes[index])
    turn = _order(POOL, training.seed * 104_729 + pool)[step % POOL]
    return chosen[turn * size : (turn + 1) * size]


@functools.lru_cache(maxsize=4)
def _order(number: int, seed: int) -> list[int]:
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class TrainingState:
    """What a training run needs to go on, and its curve."""

    router: Router
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    fingerprint: str
    curve: list[dict[str, float]] = field(default_factory=list)

    def note(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise InputError(f"the router's loss is {loss} at step {step}: try --dtype float32.")
        self.curve.append({"step": step, "loss": round(loss, 6)})

    def load(self, path: Path | None) -> int:
        """Return the step to begin at: 0 where there is no state, where it is another run's, or where it is damaged."""
        if path is None or not path.exists():
            return 0
        before = [copy.deepcopy(part.state_dict()) for part in (self.router, self.optimizer, self.schedule)]
        try:
            saved = torch.load(path, weights_only=True)
            if saved["fingerprint"] != self.fingerprint:
                return 0
            curve, step = list(saved["curve"]), int(saved["step"])
            for name in ("router", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(saved[name])
        except Exception as error:  # torch.load and load_state_dict raise dozens of types for damaged files
            logger.warning("%s is damaged (%s): training begins anew", path, type(error).__name__)
            for name, state in zip(("router", "optimizer", "schedule"), before, strict=True):
                getattr(self, name).load_state_dict(state)
            return 0
        self.curve = curve
        return step

    def save(self, path: Path, step: int) -> None:
        saved = {
            "fingerprint": self.fingerprint,
            "router": self.router.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "curve": self.curve,
            "step": step,
        }
        with file_beside(path) as file:
            torch.save(saved, file)
