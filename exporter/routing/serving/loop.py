"""Trains a serving router on unlabelled questions about images; the LVLM is frozen.

The loss is KL(original || shorter prompt) at the original's own answers, under a share of the rows that is drawn anew
for every question, so that one router serves all budgets. It is the mean over answers of the mean over their tokens: a
long answer counts as much as a short one. Where the steps draw more questions than there are, questions are put to
other pictures too (`data/exchanges.py`). Of the steps that held-out questions judged, the best one's weights are kept.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.epochs import draws_of_step, rate
from ...data.exchanges import exchanged
from ...data.samples import Sample
from ...modeling.served_router import ServingRouter
from ...models.gradients import check_alike, set_gradients
from ...models.training_state import TrainingState
from ...progress import Progress
from ..training.learner import Teacher
from ..training.loop import PROBED, SAVE_EVERY, Training, parted
from .learner import ServingLearner

LEAST, MOST = 0.2, 0.9  # shares of the rows that stay, drawn uniformly: low ones have the largest loss as it is
BEGINNINGS = (0.0, 4.0)  # of what is added to the score of a cell's first row
EXCHANGES = 3  # times that questions change places before the first pairs come again
STATES = 20.0  # what the error of states counts beside the divergence
JUDGED = 5  # times in a training that held-out questions judge
TOLD = 0.5  # of the steps of a question-aware router are told the questions
JUDGED_AT = (0.5, 0.25)  # shares by which steps are compared
SMALLEST = 1e-6  # divergence that is told from none


@dataclass
class BestStep:
    """The weights that held-out questions found best, and how good they were."""

    divergence: float = math.inf
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def see(self, router: ServingRouter, step: int, divergence: float) -> None:
        if divergence < self.divergence:
            self.divergence, self.step = divergence, step
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in router.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"divergence": self.divergence, "step": self.step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.divergence, self.step, self.weights = state["divergence"], state["step"], copy.copy(state["weights"])


@dataclass(frozen=True)
class TrainedServing:
    """A serving router and how it got there."""

    weights: dict[str, Tensor]
    curve: list[dict[str, float]]  # by step: training loss, and what held-out questions said
    questions: int
    held_out: int
    step: int  # whose weights are kept
    measured: list[dict[str, Any]]  # of each preset, on held-out questions


def train_serving_router(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    training: Training,
    progress: Progress,
    state_file: Path | None = None,
    fingerprint: str = "",
) -> TrainedServing:
    """Train the router of a model of the served class, whose settings say what it is.

    Args:
        state_file: where the state is kept, so that a broken-off run goes on; removed by the caller.
        fingerprint: of everything that the result depends on; a state with another fingerprint is not used.
    """
    trained_on, held_out = parted(samples, training.seed)
    questions = TrainedOn.of(samples, trained_on, training)
    teacher = Teacher(model, processor, questions.samples)
    teacher.answer_all(progress, training.batch_size, training.answer_tokens)
    router, aware = model.serving_router, model.serving_settings.question_aware
    router.requires_grad_(True)
    optimizer = torch.optim.AdamW(router.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, training.steps))
    best = BestStep()
    parts = {"router": router, "optimizer": optimizer, "schedule": schedule, "best": best}
    state = TrainingState(parts, fingerprint)
    first = state.load(state_file)
    learner = ServingLearner(teacher, router, aware)
    if held_out and not first:
        begin(learner, held_out[:PROBED], training.batch_size, best)
    for step in progress(range(first, training.steps), "train serving router", training.steps - first):
        chosen = questions.of_step(step, training)
        loss = one_step(learner, chosen, seed=training.seed * 1_000_003 + step)
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        state.note(step, loss, "the serving router's loss")
        if held_out and (step + 1) % max(1, training.steps // JUDGED) == 0:
            check_alike(router.state_dict())
            figures = judged(learner, held_out[:PROBED], training.batch_size)
            state.curve[-1] |= figures
            best.see(router, step + 1, overall(figures))
        if (step + 1) % SAVE_EVERY == 0:
            state.save(state_file, step + 1)
    if not best.weights:
        best.see(router, training.steps, 0.0)
    router.load_state_dict(best.weights)
    measured = measure_presets(learner, held_out, training.batch_size, progress)
    router.requires_grad_(False)
    return TrainedServing(
        weights=best.weights,
        curve=state.curve,
        questions=len(trained_on),
        held_out=len(held_out),
        step=best.step,
        measured=measured,
    )


@dataclass(frozen=True)
class TrainedOn:
    """The questions of a training, round after round: after the first one each is put to another one's pictures."""

    samples: tuple[Sample, ...]  # all that were given, then those of further rounds
    rounds: tuple[tuple[int, ...], ...]  # numbers of samples

    @classmethod
    def of(cls, samples: Sequence[Sample], fit: Sequence[int], training: Training) -> TrainedOn:
        """Put as many rounds together as the steps draw, EXCHANGES more than one at most.

        Args:
            fit: numbers of the samples that are trained on.
        """
        drawn = -(-training.steps * training.batch_size // len(fit))
        number = max(1, min(drawn, EXCHANGES + 1, len(fit) - 1))
        _, *others = exchanged([samples[index] for index in fit], number, training.seed)
        starts = range(len(samples), len(samples) + len(others) * len(fit), len(fit))
        rounds = [tuple(fit), *(tuple(range(start, start + len(fit))) for start in starts)]
        return cls((*samples, *(sample for other in others for sample in other)), tuple(rounds))

    def of_step(self, step: int, training: Training) -> list[int]:
        """Return the numbers of a step's questions."""
        drawn = draws_of_step(
            len(self.rounds[0]),
            lambda epoch, number: self.samples[self._at(epoch, number)].pixels,
            step=step,
            batch_size=training.batch_size,
            seed=training.seed,
        )
        return [self._at(epoch, number) for epoch, number in drawn]

    def _at(self, epoch: int, number: int) -> int:
        return self.rounds[epoch % len(self.rounds)][number]


def begin(learner: ServingLearner, indices: Sequence[int], batch_size: int, best: BestStep) -> None:
    """Let held-out questions say what training begins from, and has to be better than: means of cells, or single rows.

    A model that was trained with one number of tokens takes means, one that saw many numbers may take rows.
    """
    for value in BEGINNINGS:
        torch.nn.init.constant_(learner.router.first, value)
        best.see(learner.router, 0, overall(judged(learner, indices, batch_size)))
    learner.router.load_state_dict(best.weights)


def one_step(learner: ServingLearner, indices: Sequence[int], seed: int) -> float:
    """Set the gradients of a step, and return its loss: divergence under drawn shares."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.empty(len(indices)).uniform_(LEAST, MOST, generator=generator).tolist()
    told = learner.question_aware and float(torch.rand(1, generator=generator)) < TOLD

    def part_of_loss(places: range) -> Tensor:
        some, theirs = ([values[place] for place in places] for values in (indices, shares))
        batch = learner.training_batch(some, shares=theirs, told=told)
        return (batch.of_answers + STATES * batch.of_states).sum() / len(indices)

    return set_gradients(list(learner.router.parameters()), len(indices), part_of_loss)


def judged(learner: ServingLearner, indices: Sequence[int], batch_size: int) -> dict[str, float]:
    """Return the divergence at each share, of the way in which the router is used without being told questions.

    Of a question-aware router also where it is told them.
    """
    ways = (False, True) if learner.question_aware else (False,)
    return {
        f"KL at {share:.0%} of the tokens{', told the question' if told else ''}": round(
            learner.judge(indices, share=share, told=told, batch_size=batch_size).of_answers, 6
        )
        for share in JUDGED_AT
        for told in ways
    }


def overall(figures: Mapping[str, float]) -> float:
    """Return what steps are compared by: a geometric mean, so that the least budget does not outweigh the others."""
    return statistics.geometric_mean(max(value, SMALLEST) for value in figures.values())


def measure_presets(
    learner: ServingLearner, held_out: Sequence[int], batch_size: int, progress: Progress
) -> list[dict[str, Any]]:
    """Return what each preset does to held-out questions about pictures; [] where none were held out."""
    seen = [index for index in held_out if learner.teacher.samples[index].is_seen]
    if not seen:
        return []
    presets = learner.model.serving_settings.presets
    ways = (False, True) if learner.question_aware else (False,)
    tried = [(name, told) for name in presets for told in ways]
    rows = []
    for name, told in progress(tried, "judge presets", len(tried)):
        share = presets[name]["keep_visual_tokens"]
        judgement = learner.judge(seen, share=share, told=told, batch_size=batch_size)
        figures = {
            "kl": round(judgement.of_tokens, 6),
            "answers_kept": round(judgement.kept, 4),
            "questions": len(seen),
        }
        rows.append({"preset": name, "keep_visual_tokens": share, "told_the_question": told, **figures})
    return rows
