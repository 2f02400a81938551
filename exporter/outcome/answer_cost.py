"""What an answer takes, by parts that grow with the layers and parts that do not. Pure.

One question is an image, a prompt and an answer of a few tokens. Each decoder layer takes its part of the prompt's pass
and of every further token's; the tower, the embeddings and the head take the rest. The unit is whatever was measured:
milliseconds, or operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DROP_AT = 2  # layer before which a router's tokens leave
PARTS = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class Question:
    """Tokens of a question and of the original's answer to it."""

    visual: int
    text: int  # the template's too
    answer: int  # tokens after the first one, which the prompt's pass gives

    def share(self, tokens: float | None) -> float:
        """Return the prompt's tokens that are left where a share of the visual ones stays."""
        kept = self.visual if tokens is None else self.visual * tokens
        return (self.text + kept) / max(1, self.text + self.visual)


@dataclass(frozen=True)
class AnswerCost:
    """Costs of one answer, as straight lines in the number of layers."""

    layers: int
    vision: float
    prefill: tuple[float, float]  # without layers, and for each
    decode: tuple[float, float]  # likewise, of one token

    @classmethod
    def fitted(cls, layers: int, at: Mapping[int, Mapping[str, float]]) -> AnswerCost:
        """Fit lines to what was measured.

        Args:
            at: by the number of layers gone, the three PARTS.
        """
        kept = [layers - gone for gone in at]
        vision = [values["vision"] for values in at.values()]
        prefill, decode = (line(kept, [values[part] for values in at.values()]) for part in PARTS[1:])
        return cls(layers, sum(vision) / len(vision), prefill, decode)

    def scaled(self, question: Question, measured: Mapping[str, float]) -> AnswerCost:
        """Return the same proportions, so that the whole answer's parts are as measured: decode is one token's."""
        expected = self.parts(Question(question.visual, question.text, 1))
        by = {part: measured[part] / expected[part] if expected[part] else 0.0 for part in PARTS}
        prefill, decode = ((rest * by[part], layer * by[part]) for part, (rest, layer) in
                           (("prefill", self.prefill), ("decode", self.decode)))  # fmt: skip
        return AnswerCost(self.layers, measured["vision"], prefill, decode)

    def parts(self, question: Question, gone: int = 0, tokens: float | None = None) -> dict[str, float]:
        """Return what image, prompt and the further tokens take without some layers, under a share of the tokens."""
        kept = self.layers - gone
        whole = min(DROP_AT, kept) if tokens is not None else kept
        rest, layer = self.prefill
        prefill = rest + layer * (whole + (kept - whole) * question.share(tokens))
        return {
            "vision": self.vision,
            "prefill": prefill,
            "decode": question.answer * (self.decode[0] + self.decode[1] * kept),
        }

    def total(self, question: Question, gone: int = 0, tokens: float | None = None) -> float:
        return sum(self.parts(question, gone, tokens).values())


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return intercept and slope of the least squares, neither below 0: layers do not give time back."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0
    slope = max(0.0, slope)
    intercept = mean_y - slope * mean_x
    if intercept < 0:  # through the origin then
        return 0.0, sum(a * b for a, b in zip(x, y, strict=True)) / max(1e-12, sum(a * a for a in x))
    return intercept, slope


def by_size(
    layers: int, layer_parameters: float, head_parameters: float, other_parameters: float, question: Question
) -> AnswerCost:
    """Return operations from numbers of parameters alone: two for each parameter and token.

    Args:
        other_parameters: the tower's and the projector's, which see at least as many patches as there are visual
            tokens.
    """
    tokens = question.visual + question.text
    return AnswerCost(
        layers,
        vision=2 * other_parameters * question.visual,
        prefill=(2 * head_parameters, 2 * layer_parameters * tokens),
        decode=(2 * head_parameters, 2 * layer_parameters),
    )
