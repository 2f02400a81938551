"""What held-out answers lose under each budget, so that a share of cost or of answers can be asked for.

After training, the original's answers to questions about pictures that were not trained on are put through the
decoder under a ladder of token counts, and at the cost of each rung under fewer layers with more tokens. At each cost
the mix of the least divergence is written down; fewer layers have to show that they help by more than the noise. An
answer is kept where the routed model would say the very same, token by token.

For `quality`, a limit on a score is found: of all tokens in the order of the router's logits, those up to the limit
stay. The limit for a share q of answers is the lowest from which on at least q (n + 1) / n of the n held-out ones are
kept, as in conformal risk control (Angelopoulos et al., arXiv 2208.02814). Of the `LEVELS`, the one that keeps fewest
tokens is taken.

Shapes: B questions of a batch, n held-out questions, J rungs, G limits that are tried, S tokens, N candidate layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ... import ranks
from ...data.pictures import pictures_of
from ...families import is_listed
from ...modeling.routed_cost import LEVELS, DecoderCost, in_order
from ...modeling.routed_places import coordinates_of
from ...modeling.routed_router import best_layers, best_tokens
from ...models.divergence import Divergence, simplest
from ...progress import Progress
from ..cost import cost_facts, is_counted_right
from .learner import Learner, TrainingBatch, batches_of

logger = logging.getLogger(__name__)
LADDER = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # shares of visual tokens
MIXED = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # rungs at whose cost fewer layers are tried
MOST_MIXED = 128  # questions that they are tried on
FEWEST = 16  # held-out questions, or nothing is said
QUALITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995)
COMPARED = (0.9, 0.95, 0.98, 0.99)  # by which a score is chosen
ROUNDED = 6  # decimals that are written down
PRESETS = {"quality": {"flops": 0.75}, "balanced": {"flops": 0.6}, "fast": {"flops": 0.4}}  # once costs are known


@dataclass
class MixOutcome:
    """What held-out answers suffer under one mix of tokens and layers, question by question."""

    kl: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    follows: list[bool] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)  # shares of the operations
    kept: list[float] = field(default_factory=list)  # shares of the visual tokens

    def first(self, number: int) -> MixOutcome:
        return MixOutcome(*(values[:number] for values in vars(self).values()))

    def divergence(self, pictures: Sequence[int]) -> Divergence:
        return Divergence(tuple(self.kl), tuple(self.tokens), tuple(pictures), tuple(self.follows))


@dataclass
class Judged:
    """All that was tried."""

    mixes: dict[tuple[float, int], MixOutcome]  # by rung and number of skipped layers
    levels: dict[str, list[Tensor]]  # by score and question: [J] of the last token of each rung
    whole: dict[str, list[Tensor]]  # by score and question: [V] of all its visual tokens

    @classmethod
    def of_nothing(cls, keys: Iterable[tuple[float, int]]) -> Judged:
        return cls({key: MixOutcome() for key in keys}, {name: [] for name in LEVELS}, {name: [] for name in LEVELS})

    def add(self, more: Judged) -> None:
        """Add what was tried on further questions."""
        for key, outcome in more.mixes.items():
            for name, values in vars(outcome).items():
                getattr(self.mixes[key], name).extend(values)
        for name in LEVELS:
            self.levels[name] += more.levels[name]
            self.whole[name] += more.whole[name]


@torch.no_grad()
def fitted_budgets(learner: Learner, held_out: Sequence[int], batch_size: int, progress: Progress) -> dict[str, Any]:
    """Return what `RouterSettings.budgets` says, and under "measured" what the record tells of it. Empty: too few."""
    samples = learner.teacher.samples
    held_out = [index for index in held_out if samples[index].is_seen]
    if len(held_out) < FEWEST:
        return {}
    facts = cost_facts(learner.teacher.model, learner.router)
    if not is_known_cost(learner, facts, held_out[0]):
        logger.warning(
            "the operations of this type's layers are not those of its matrices and attention (experts, narrower heads)"
            ": the router has presets by counts of tokens and layers, and none by flops or quality"
        )
        return {}
    settings = replace(learner.settings, budgets={"cost": facts})
    judged = judge(learner, DecoderCost.of(settings), held_out=held_out, batch_size=batch_size, progress=progress)
    pictures = pictures_of([samples[index] for index in held_out])
    front, rows = front_of(judged, pictures, learner.num_layers)
    follows = torch.tensor([judged.mixes[share, 0].follows for share in LADDER]).T  # [n, J]
    quality = quality_of(judged, follows)
    return {"cost": facts, "front": front, "quality": quality, "measured": rows}


def is_known_cost(learner: Learner, facts: dict[str, Any], index: int) -> bool:
    """Tell whether the formula of costs holds: for types of the tables by the tests, for others by one question."""
    model = learner.teacher.model
    return is_listed(model.config) or is_counted_right(model, facts, learner.teacher.question([index])[0])


def judge(learner: Learner, cost: DecoderCost, held_out: Sequence[int], batch_size: int, progress: Progress) -> Judged:
    """Put the held-out answers through the decoder under every rung, and the first of them under the mixes."""
    skips = skips_of(len(cost.candidates))
    keys = [(share, 0) for share in LADDER] + [(share, skipped) for share in MIXED for skipped in skips]
    judged = Judged.of_nothing(keys)

    def of_batch(places: Sequence[int]) -> Judged:
        batch = learner.training_batch([held_out[place] for place in places])
        some = Judged.of_nothing(keys)
        for key in keys if places[0] < MOST_MIXED else keys[: len(LADDER)]:
            try_mix(batch, cost, *key, some.mixes[key])
        note_levels(batch, some)
        return some

    mine = ranks.share(batches_of(range(len(held_out)), batch_size))
    for some in ranks.in_order(map(of_batch, progress(mine, "judge budgets", len(mine)))):
        judged.add(some)
    return judged


def skips_of(candidates: int) -> list[int]:
    """Return how many layers are skipped in a mix: few, and up to the half that the router is trained for."""
    tried = {1, 2, candidates // 4, candidates // 2}
    return sorted(number for number in tried if 0 < number <= candidates // 2)


def rung(share: float, available: Tensor) -> Tensor:
    """Return how many visual tokens a rung keeps of each question, [B]."""
    return torch.minimum((available * share).round().long().clamp(min=1), available)


def try_mix(batch: TrainingBatch, cost: DecoderCost, share: float, skipped: int, mix: MixOutcome) -> None:
    """Note what answers suffer where so many layers are skipped and the cost is that of a rung with all layers."""
    learner, visual, available = batch.learner, batch.visual, batch.visual.sum(1)
    lengths, counts = batch.prompt.inputs["attention_mask"].sum(1).tolist(), rung(share, available).tolist()
    prompts, layers = list(zip(lengths, available.tolist(), strict=True)), learner.num_layers - skipped
    if skipped:
        costs = [cost.share(*prompt, count, learner.num_layers) for prompt, count in zip(prompts, counts, strict=True)]
        counts = [cost.most_tokens(x, *prompt, layers) for x, prompt in zip(costs, prompts, strict=True)]
    coordinates = coordinates_of(learner.teacher.model.config, visual, batch.answered.batch.inputs)
    kept = torch.tensor(counts, device=visual.device)
    tokens = best_tokens(
        batch.token_logits, visual, budget=kept, patches=coordinates, image_floor=learner.settings.image_floor
    )
    executed = best_layers(batch.layer_logits, learner.settings, layers, learner.num_layers)
    log_q = batch.log_q(batch.gates(tokens.float(), executed[:, list(learner.settings.candidates)]))
    wrong = (log_q.argmax(-1) != batch.answered.targets).float()
    mix.kl += batch.per_sample(batch.divergence(log_q)).tolist()
    mix.follows += (batch.per_sample(wrong) == 0).tolist()
    mix.tokens += batch.answered.predicts.sum(1).tolist()
    mix.flops += [cost.share(*prompt, count, layers) for prompt, count in zip(prompts, counts, strict=True)]
    mix.kept += [count / visual_tokens for (_, visual_tokens), count in zip(prompts, counts, strict=True)]


def note_levels(batch: TrainingBatch, judged: Judged) -> None:
    """Note how the scores rank each question's tokens, and where its rungs end."""
    available = batch.visual.sum(1)
    last = torch.stack([rung(share, available) for share in LADDER], 1) - 1  # [B, J]
    there = in_order(batch.visual)
    for name, level in LEVELS.items():
        levels = level(batch.token_logits.double(), batch.visual)  # [B, S]
        judged.levels[name] += levels.gather(1, last).cpu().unbind()
        judged.whole[name] += [of_sequence[real].cpu() for of_sequence, real in zip(levels, there, strict=True)]


# --- a share of the cost ----------------------------------------------------------------------------------------------


def front_of(
    judged: Judged, pictures: Sequence[int], num_layers: int
) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """Return the best number of layers at each cost, and what was measured there.

    Costs at which only all layers were tried say nothing of layers, and are measured all the same.
    """
    front: list[list[float]] = []
    rows = []
    least = 0
    for share in LADDER:
        tried = [skipped for rung, skipped in judged.mixes if rung == share]
        number = min(len(judged.mixes[share, skipped].kl) for skipped in tried)
        mixes = [judged.mixes[share, skipped].first(number) for skipped in tried]
        divergences = [mix.divergence(pictures[:number]) for mix in mixes]
        best = tried[simplest(divergences)]
        for skipped, mix, divergence in zip(tried, mixes, divergences, strict=True):
            rows.append(
                {
                    "flops": _mean(mix.flops),
                    "visual_tokens": _mean(mix.kept),
                    "layers": num_layers - skipped,
                    **divergence.to_data(),
                    "chosen": skipped == best,
                }
            )
        if len(tried) > 1 or not skips_tried(judged):
            least = max(least, num_layers - best)  # never fewer layers where more is spent
            front.append([_mean(judged.mixes[share, 0].flops), least])
    return front, rows


def skips_tried(judged: Judged) -> bool:
    return any(skipped for _, skipped in judged.mixes)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), ROUNDED)


# --- a share of the answers -------------------------------------------------------------------------------------------


def quality_of(judged: Judged, follows: Tensor) -> dict[str, Any]:
    """Return the score, its limits by share of answers, and the share of tokens that each limit keeps.

    Args:
        follows: [n, J] which answers were kept at which rung.
    """
    number = len(follows)
    qualities = [q for q in QUALITIES if q <= number / (number + 1)]
    compared = [q for q in qualities if q in COMPARED] or qualities[-1:]
    fits = {}
    for name in LEVELS:
        whole = judged.whole[name]
        limits = limits_for(
            qualities,
            torch.stack(judged.levels[name]),
            torch.stack([of_sequence[-1] for of_sequence in whole]),
            follows,
        )
        tokens = [
            sum(float((of_sequence <= limit).double().mean()) for of_sequence in whole) / number for limit in limits
        ]
        fits[name] = list(zip(qualities, limits, tokens, strict=True))
    score = min(fits, key=lambda name: sum(tokens for q, _, tokens in fits[name] if q in compared))
    at = [[q, round(limit + 10**-ROUNDED, ROUNDED), round(tokens, 4)] for q, limit, tokens in fits[score]]
    return {"score": score, "answers": number, "at": at}


def limits_for(qualities: Sequence[float], levels: Tensor, last: Tensor, follows: Tensor) -> list[float]:
    """Return for each share of answers the lowest limit from which on so many are kept.

    Args:
        levels: [n, J] of the last token of each rung, rising.
        last: [n] of each question's last token: where that stays, all do.
        follows: [n, J].
    """
    number = len(levels)
    rising = torch.cat([levels, torch.maximum(last[:, None], levels[:, -1:])], 1)  # [n, J + 1]
    limits = rising.flatten().sort().values  # [G]
    reached = torch.searchsorted(rising.contiguous(), limits.expand(number, -1).contiguous(), right=True)  # [n, G]
    none, whole = follows.new_zeros(number, 1), follows.new_ones(number, 1)
    kept = torch.cat([none, follows, whole], 1).gather(1, reached).double().mean(0)  # [G]
    safe = kept.flip(0).cummin(0).values.flip(0)  # from here on
    lowest = []
    for quality in qualities:
        enough = (safe * number >= quality * (number + 1) - 1e-9).nonzero()[:, 0]
        lowest.append(float(limits[enough[0]]))
    return lowest
