"""The number of healing steps and their cost. Pure: nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe import HealRecipe

EPOCHS = 10  # times that every question is learnt from, each time about another picture
JUDGED = 5  # times in a training that held-out questions are judged by
JUDGING = 128  # pairs of question and picture that judge, where there are fewer questions: a few tell too little
BACKWARD = 1.1  # of a forward pass: weights are frozen, so that gradients only go back through them
ANSWER_BYTES = (4, 8)  # of an answer token on disk, and of each of its likeliest tokens


@dataclass(frozen=True)
class Schedule:
    """Steps, pairs and costs of healing with so many questions."""

    recipe: HealRecipe
    fit: int  # questions that are learnt from
    held_out: int  # questions that judge

    @property
    def epoch(self) -> int:
        """Return the steps in which every question is learnt from once."""
        return -(-self.fit // self.recipe.batch_size)

    @property
    def steps(self) -> int:
        return self.recipe.steps or EPOCHS * self.epoch

    @property
    def rounds(self) -> int:
        """Return how many different pictures each question is put to, its own among them."""
        return min(self.recipe.exchanges + 1, -(-self.steps // self.epoch), max(1, self.fit - 1))

    @property
    def judging_rounds(self) -> int:
        """Return how many different pictures each held-out question is put to."""
        if not self.recipe.exchanges or not self.held_out:
            return 1
        return max(1, min(-(-JUDGING // self.held_out), self.held_out - 1))

    @property
    def judging(self) -> int:
        """Return how many pairs of question and picture judge."""
        return self.judging_rounds * self.held_out

    @property
    def num_answers(self) -> int:
        """Return how many questions the original answers."""
        return self.judging + self.rounds * self.fit

    def disk_bytes(self, answer_tokens: int) -> int:
        """Return most of what its answers take on disk."""
        token, likely = ANSWER_BYTES
        return self.num_answers * answer_tokens * (token + likely * self.recipe.top)

    def forward_passes(self, kept: float) -> float:
        """Return what it costs, in passes of all questions through the original.

        Args:
            kept: share of the original's layers that the smaller model has.
        """
        learning = (1 + BACKWARD) * self.steps * self.recipe.batch_size
        judging = (JUDGED + 2) * self.judging
        return (self.num_answers + kept * (learning + judging)) / max(1, self.fit + self.held_out)
