"""Trains a serving router on unlabelled questions about images; the LVLM is frozen.

The loss is KL(original || shorter prompt) at the original's own answers, under a share of the rows that is drawn anew
for every question, so that one router serves all budgets. Its gradient goes through gates to the scores, and through
the rows that stay to what they carry. Beside it the scores learn to rank rows by what each would add to the answer
where it stays (`training/importance_loss.py`), which says more of rows that left. Of the steps that held-out questions
judged, the best one's weights are kept.
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

from ...data.epochs import questions_of_step, rate
from ...data.samples import Sample
from ...modeling.served_router import ServingRouter
from ...models.gradients import check_alike, set_gradients
from ...models.training_state import TrainingState
from ...progress import Progress
from ..training.importance_loss import ranking_loss
from ..training.learner import Teacher
from ..training.loop import PROBED, SAVE_EVERY, Training, generator_of, parted
from ..training.relaxation import gated_attention
from .learner import ServingBatch, ServingLearner

LEAST, MOST = 0.2, 0.9  # shares of the rows that stay, drawn uniformly: low ones have the largest loss as it is
NOISE = 0.5  # of Gumbel noise on the scores that choose
POWER = 0.5  # of importances, as in `importance_loss`
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
    teacher = Teacher(model, processor, tuple(samples))
    trained_on, held_out = parted(samples, training.seed)
    sizes = [sample.pixels for sample in samples]
    teacher.answer_all(progress, training.batch_size, training.answer_tokens)
    router, aware = model.serving_router, model.serving_settings.question_aware
    router.requires_grad_(True)
    optimizer = torch.optim.AdamW(router.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, training.steps))
    best = BestStep()
    parts = {"router": router, "optimizer": optimizer, "schedule": schedule, "best": best}
    state = TrainingState(parts, fingerprint)
    first = state.load(state_file)
    with gated_attention(model) as attention:
        learner = ServingLearner(teacher, router, attention, aware)
        if held_out and not first:  # what training has to be better than
            figures = judged(learner, held_out[:PROBED], training.batch_size)
            best.see(router, 0, overall(figures))
        for step in progress(range(first, training.steps), "train serving router", training.steps - first):
            chosen = questions_of_step(trained_on, sizes, step=step, batch_size=training.batch_size, seed=training.seed)
            loss = one_step(learner, chosen, training.seed, step)
            torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            state.note(step, loss, "the serving router's loss")
            if held_out and (step + 1) % max(1, training.steps // 10) == 0:
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


def one_step(learner: ServingLearner, chosen: Sequence[int], seed: int, step: int) -> float:
    """Set the gradients of a step, and return its loss: divergence under drawn shares, and the ranking of rows."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    shares = torch.empty(len(chosen)).uniform_(LEAST, MOST, generator=generator).tolist()
    told = learner.question_aware and float(torch.rand(1, generator=generator)) < TOLD
    tokens = learner.teacher.tokens(chosen)

    def part_of_loss(places: range) -> Tensor:
        drawing = generator_of(seed, step, places)
        some, theirs = ([values[place] for place in places] for values in (chosen, shares))
        batch = learner.training_batch(some, shares=theirs, noise=NOISE, told=told, generator=drawing)
        return batch.kl.sum() / tokens + len(some) / len(chosen) * ranking(batch, drawing)

    return set_gradients(list(learner.router.parameters()), len(chosen), part_of_loss)


def ranking(batch: ServingBatch, generator: torch.Generator) -> Tensor:
    """Compute the cross entropy of the scores and the rows' importance to an answer drawn from the original's."""
    answer = torch.multinomial(batch.log_p.exp().cpu(), 1, generator=generator).to(batch.log_q.device)
    (gradient,) = torch.autograd.grad(batch.log_q.gather(1, answer).sum(), batch.tokens, retain_graph=True)
    importance = gradient.clamp(min=0).square()
    logits = torch.zeros_like(batch.tokens).masked_scatter(batch.pictured, torch.cat(batch.choice.logits))
    return ranking_loss(logits, importance, batch.pictured, POWER)


def judged(learner: ServingLearner, indices: Sequence[int], batch_size: int) -> dict[str, float]:
    """Return the divergence at each share, of the way in which the router is used without being told questions.

    Of a question-aware router also where it is told them.
    """
    ways = (False, True) if learner.question_aware else (False,)
    return {
        f"KL at {share:.0%} of the tokens{', told the question' if told else ''}": round(
            learner.judge(indices, share=share, told=told, batch_size=batch_size)[0], 6
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
        divergence, kept = learner.judge(seen, share=share, told=told, batch_size=batch_size)
        figures = {"kl": round(divergence, 6), "answers_kept": round(kept, 4), "questions": len(seen)}
        rows.append({"preset": name, "keep_visual_tokens": share, "told_the_question": told, **figures})
    return rows
