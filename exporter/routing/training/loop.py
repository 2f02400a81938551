"""Trains a router on unlabelled questions about images; the LVLM is frozen.

What a batch of questions is to the router is in `learner.py`, what it learns from in one file a loss; here is the
training itself: its order of questions, its schedule, its curve, and the state that it goes on from.

Shapes: those of `learner.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.epochs import questions_of_step, rate
from ...data.pictures import split_by_picture
from ...data.samples import Sample
from ...methods import LOSSES, resolve
from ...modeling.routed_route import RouterSettings
from ...modeling.routed_router import Router
from ...models.answers import ANSWER_TOKENS
from ...models.gradients import check_alike, set_gradients
from ...models.training_state import TrainingState
from ...progress import Progress
from .learner import Learner, Teacher
from .outcomes import fitted_budgets
from .relaxation import gated_attention

HELD_OUT, MOST_HELD_OUT = 8, 512  # one in so many questions is not trained on but judged by, so many at most
PROBED = 128  # of them, during training
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Training:
    """Settings of a router's training, from a recipe's `router`."""

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
    budgets: dict[str, Any] = field(default_factory=dict)  # `outcomes.fitted_budgets`


# --- the training itself ----------------------------------------------------------------------------------------------


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
        fingerprint: of everything that the result depends on; a state with another fingerprint is not used.
    """
    teacher = Teacher(model, processor, tuple(samples))
    trained_on, held_out = parted(samples, training.seed)
    sizes = [sample.pixels for sample in samples]
    teacher.answer_all(progress, training.batch_size, training.answer_tokens)
    torch.manual_seed(training.seed)
    router = Router(model.config.get_text_config().hidden_size, settings).to(model.device)
    optimizer = torch.optim.AdamW(router.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, training.steps))
    state = TrainingState({"router": router, "optimizer": optimizer, "schedule": schedule}, fingerprint)
    first = state.load(state_file)
    with gated_attention(model) as attention:
        learner = Learner(teacher, router, settings, attention)
        for step in progress(range(first, training.steps), "train router", training.steps - first):
            chosen = questions_of_step(trained_on, sizes, step=step, batch_size=training.batch_size, seed=training.seed)
            loss = one_step(learner, chosen, training, step)
            torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            state.note(step, loss, "the router's loss")
            if held_out and ((step + 1) % max(1, training.steps // 10) == 0 or step == 0):
                check_alike(router.state_dict())
                state.curve[-1] |= learner.probe(held_out[:PROBED], training.batch_size)
            if (step + 1) % SAVE_EVERY == 0:
                state.save(state_file, step + 1)
        budgets = fitted_budgets(learner, held_out, training.batch_size, progress)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in router.state_dict().items()}
    return Trained(weights, state.curve, questions=len(trained_on), held_out=len(held_out), budgets=budgets)


def one_step(learner: Learner, chosen: Sequence[int], training: Training, step: int) -> float:
    """Set the gradients of a step, and return its loss: the mean over its questions, or over their answers' tokens."""
    row, tokens = LOSSES[training.loss], learner.teacher.tokens(chosen)
    loss_of = resolve(row.run)

    def part_of_loss(places: range) -> Tensor:
        some = [chosen[place] for place in places]
        weight = learner.teacher.tokens(some) / tokens if row.over_tokens else len(some) / len(chosen)
        loss: Tensor = loss_of(
            learner.training_batch(some), generator_of(training.seed, step, places), **training.options
        )
        return weight * loss

    return set_gradients(list(learner.router.parameters()), len(chosen), part_of_loss)


def generator_of(seed: int, step: int, places: range) -> torch.Generator:
    """Return what a part of a step draws by, whoever computes it."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + places.start) % (1 << 63))


def parted(samples: Sequence[Sample], seed: int) -> tuple[list[int], list[int]]:
    """Split into questions to train on and to judge by, about other pictures; none of these where there are too few."""
    if len(samples) < 2 * HELD_OUT:
        return list(range(len(samples))), []
    split = split_by_picture(samples, min(MOST_HELD_OUT, len(samples) // HELD_OUT), seed)
    return sorted(split.fit), list(split.held_out)  # any first part of these is a sample of them
