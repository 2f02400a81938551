"""Trains low-rank updates until held-out questions say that it is enough.

Shapes: those of `student.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..data.epochs import draws_of_step, rate
from ..data.pictures import pictures_of
from ..data.samples import Sample
from ..models.divergence import Divergence
from ..models.gradients import check_alike, set_gradients
from ..models.training_state import TrainingState
from ..progress import Progress
from .losses import LOSSES, divergence
from .schedule import JUDGED
from .student import Student
from .teacher import AnswerStore

SAVE_EVERY = 50  # steps
PATIENCE = 2  # judgings without a better result, until training stops
HELD_OUT_KL = "KL of held-out questions"  # what the curve calls it


@dataclass(frozen=True)
class HealingQuestions:
    """The questions to learn from and to judge by, with the number of each in the store of answers."""

    store: AnswerStore
    held_out: Sequence[Sample]  # numbers from 0
    rounds: Sequence[Sequence[Sample]]  # of as many questions each; the numbers go on, round after round

    @property
    def all(self) -> list[Sample]:
        return [*self.held_out, *(sample for round_samples in self.rounds for sample in round_samples)]

    def number(self, epoch: int, place: int) -> int:
        """Return the number of what is learnt from in an epoch: rounds take turns."""
        return len(self.held_out) + epoch % len(self.rounds) * len(self.rounds[0]) + place

    def size(self, epoch: int, place: int) -> int:
        return self.rounds[epoch % len(self.rounds)][place].pixels


@dataclass(frozen=True)
class HealTraining:
    """Settings of the training, from a recipe's `heal`."""

    steps: int
    batch_size: int
    learning_rate: float
    loss: str
    seed: int


@dataclass
class BestUpdates:
    """The latest updates that held-out questions find no worse than the best ones.

    A few dozen questions tell updates apart to within some noise, and what was learnt longer, at a learning rate that
    falls, is the better guess: so the latest are taken that are not worse than the best by over one standard error.
    """

    before: Divergence  # of the held-out questions without any updates
    lowest: Divergence | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0  # after how many steps; 0: nothing that was learnt helped
    waited: int = 0  # judgings since

    def offer(self, student: Student, judged: Divergence, step: int) -> None:
        """Take over what the student has learnt, if it helps."""
        if self.lowest is None or judged.mean < self.lowest.mean:
            self.lowest = judged
        more, error = judged.more_than(self.lowest)
        if more <= error and judged.mean < self.before.mean:
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in student.parameters.items()}
            self.step, self.waited = step, 0
        else:
            self.waited += 1

    def restore(self, student: Student) -> None:
        """Give the student what was taken over; it keeps what it has where nothing was."""
        if self.step:
            ParametersState(student.parameters).load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        lowest = None if self.lowest is None else self.lowest.to_state()
        return {"weights": self.weights, "step": self.step, "waited": self.waited, "lowest": lowest}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.weights, self.step, self.waited = saved["weights"], saved["step"], saved["waited"]
        self.lowest = saved["lowest"] and Divergence.from_state(saved["lowest"])


def train(
    student: Student,
    questions: HealingQuestions,
    training: HealTraining,
    before: Divergence,
    progress: Progress,
    state_file: Path | None = None,
    fingerprint: str = "",
) -> tuple[BestUpdates, list[dict[str, float]]]:
    """Train the student, which is left with the best updates.

    Args:
        before: of the held-out questions, while the updates are nothing yet.
        state_file, fingerprint: where a broken-off run goes on from, and all that the result depends on.
    Returns: the updates, and the curve: the loss of every step, the held-out divergence where it was judged.
    """
    learnt, best = student.parameters, BestUpdates(before)
    optimizer = torch.optim.AdamW(learnt.values(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, training.steps))
    parts = {"updates": ParametersState(learnt), "optimizer": optimizer, "schedule": schedule, "best": best}
    state = TrainingState(parts, fingerprint)
    first, every = state.load(state_file), max(1, round(training.steps / JUDGED))
    for step in progress(range(first, training.steps), "heal", training.steps - first):
        if best.waited >= PATIENCE:
            break
        loss = one_step(student, questions, training, step)
        torch.nn.utils.clip_grad_norm_(learnt.values(), 1.0)
        optimizer.step()
        schedule.step()
        state.note(step, loss, "the loss of healing")
        if is_judged := (step + 1) % every == 0 or step + 1 == training.steps:
            check_alike(learnt)
            now = judged(student, questions, training.batch_size)
            state.curve[-1][HELD_OUT_KL] = now.mean
            best.offer(student, now, step + 1)
        if is_judged or (step + 1) % SAVE_EVERY == 0:
            state.save(state_file, step + 1)
    best.restore(student)
    return best, state.curve


def one_step(student: Student, questions: HealingQuestions, training: HealTraining, step: int) -> float:
    """Set the gradients of a step, and return its loss: the mean over the tokens of its questions' answers."""
    number = len(questions.rounds[0])
    chosen = draws_of_step(number, questions.size, step=step, batch_size=training.batch_size, seed=training.seed)
    samples = [questions.rounds[epoch % len(questions.rounds)][place] for epoch, place in chosen]
    targets = questions.store.targets([questions.number(*pair) for pair in chosen])

    def loss_of(places: range) -> Tensor:
        part = targets.part(places)
        log_q = student.log_q(student.batch([samples[place] for place in places], part.tokens))
        part = part.to(log_q.device)
        return LOSSES[training.loss](part.log_p, part.ids, log_q).sum() / len(targets.ids)

    return set_gradients(list(student.parameters.values()), len(samples), loss_of)


@torch.no_grad()
def judged(student: Student, questions: HealingQuestions, batch_size: int) -> Divergence:
    """Return how far the student is from the original on the held-out questions."""
    order = sorted(range(len(questions.held_out)), key=lambda index: questions.held_out[index].pixels)
    targets = questions.store.targets(order)

    def of_batch(places: range) -> tuple[list[float], list[int], list[bool]]:
        part = targets.part(places)
        answered = student.batch([questions.held_out[order[place]] for place in places], part.tokens)
        log_q, lengths = student.log_q(answered), [len(answer) for answer in part.tokens]
        part = part.to(log_q.device)
        kl = torch.split(divergence(part.log_p, part.ids, log_q).double(), lengths)
        matches = torch.split(log_q.argmax(-1) == answered.targets, lengths)
        return [float(each.sum()) for each in kl], lengths, [bool(each.all()) for each in matches]

    places = range(len(order))
    batches = [places[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    by_batch = ranks.gathered(map(of_batch, ranks.share(batches)))
    kl, tokens, follows = (tuple(itertools.chain.from_iterable(some)) for some in zip(*by_batch, strict=True))
    pictures = pictures_of(questions.held_out)
    return Divergence(kl, tokens, tuple(pictures[index] for index in order), follows)


@dataclass(frozen=True)
class ParametersState:
    """Named parameters as something that has a state."""

    parameters: dict[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])
