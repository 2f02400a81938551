"""Requests in flight: how many answer tokens a second a model gives, and how long one waits, when so many ask at once.

A closed loop: so many clients each send a request and, as soon as it is answered, the next. The server forms a batch
of all requests that wait, runs it to its end, and takes those that wait by then. Answers are of different lengths, so
that a short one is done early while its batch goes on, as it is in use. transformers' continuous batching
(`generate_batch`) takes token ids and no images, so prompts with images can't be put to it.

Shapes: B sequences.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .timing import garbage_between_runs, interleaved, paired

BATCHING = "batches formed from the queue of waiting requests"
BATCHES = 3  # of a round, the first of which fills the queue and is not counted
SHORTEST = 0.5  # of `new_tokens`: what the shortest answer takes


class Server(Protocol):
    """What answers a batch: its first tokens, then one more for each sequence at a time."""

    def first(self) -> Any:
        """Encode images and prefill; return the state that decoding goes on from."""

    def more(self, state: Any) -> Any:
        """Decode one token of each sequence."""


@dataclass(frozen=True)
class Answered:
    """One request: when it was sent, and when each of its tokens was there, in seconds."""

    sent: float
    tokens: tuple[float, ...]

    @property
    def first_token_ms(self) -> float:
        return 1e3 * (self.tokens[0] - self.sent)

    @property
    def token_ms(self) -> tuple[float, ...]:
        """Return the time of every token after the first."""
        return tuple(1e3 * (after - before) for before, after in zip(self.tokens, self.tokens[1:], strict=False))


@dataclass(frozen=True)
class Round:
    """What one round of a load gives, its first batch left out."""

    answered: tuple[Answered, ...]
    seconds: float

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / sum(len(request.tokens) for request in self.answered)


@dataclass(frozen=True)
class LoadFigures:
    """One model with so many requests in flight. Percentiles are over all requests of all rounds, or over tokens."""

    in_flight: int
    requests: int  # that are counted
    tokens_per_s: float
    first_token_p50_ms: float  # from the moment that a request is sent: its wait, image, prefill
    first_token_p95_ms: float
    token_p50_ms: float  # between two tokens of an answer
    token_p95_ms: float
    batching: str = BATCHING
    throughput_ratio: float | None = None  # to the reference's; None for the reference itself
    throughput_interval: tuple[float, float] | None = None


@dataclass
class Load:
    """Requests of one model that are always so many, and what came of them, round by round."""

    server: Server
    in_flight: int
    lengths: tuple[int, ...]  # answer tokens of each request of a round, the same for every model
    now: Callable[[], float]
    rounds: list[Round] = field(default_factory=list)

    def run(self) -> None:
        """Answer a round's requests."""
        waiting = deque((number, self.now()) for number in range(self.in_flight))
        answered: list[Answered] = []
        begin = end = 0.0
        while waiting:
            group = [waiting.popleft() for _ in range(self.in_flight)]
            done, following = self._batch(group)
            if group[0][0] == 0:
                begin = max(request.tokens[-1] for request in done)
            else:
                answered += done
                end = max(request.tokens[-1] for request in done)
            waiting.extend(following)
        self.rounds.append(Round(tuple(answered), end - begin))

    def _batch(self, group: Sequence[tuple[int, float]]) -> tuple[list[Answered], list[tuple[int, float]]]:
        """Run a batch to its end; return its answers, and the requests that were sent meanwhile, in that order."""
        state = self.server.first()
        times = [self.now()]
        for _ in range(max(self.lengths[number] for number, _ in group) - 1):
            state = self.server.more(state)
            times.append(self.now())
        done = [Answered(sent, tuple(times[: self.lengths[number]])) for number, sent in group]
        ends = sorted(request.tokens[-1] for request in done)
        following = max(number for number, _ in group) + 1
        more = [(following + place, at) for place, at in enumerate(ends) if following + place < len(self.lengths)]
        return done, more

    def figures(self) -> LoadFigures:
        requests = [request for each in self.rounds for request in each.answered]
        firsts = [request.first_token_ms for request in requests]
        between = [ms for request in requests for ms in request.token_ms]
        return LoadFigures(
            in_flight=self.in_flight,
            requests=len(requests),
            tokens_per_s=1 / statistics.median(each.seconds_per_token for each in self.rounds),
            first_token_p50_ms=percentile(firsts, 0.5),
            first_token_p95_ms=percentile(firsts, 0.95),
            token_p50_ms=percentile(between, 0.5),
            token_p95_ms=percentile(between, 0.95),
        )


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least of the values that so many of them do not exceed (the nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def shortest(new_tokens: int) -> int:
    """Return the tokens of the shortest answer: half of the longest's, and one after the first."""
    return max(2, math.ceil(SHORTEST * (1 + new_tokens)))


def answer_range(new_tokens: int) -> str:
    """Return '17 to 33'."""
    return f"{shortest(new_tokens)} to {1 + new_tokens}"


def answer_lengths(in_flight: int, new_tokens: int, seed: int) -> tuple[int, ...]:
    """Draw answer tokens for each request of a round: the first token and `new_tokens` more, or fewer."""
    draw = random.Random(seed)
    return tuple(draw.randint(shortest(new_tokens), 1 + new_tokens) for _ in range(BATCHES * in_flight))


def measure_load(
    servers: Sequence[Server],
    lengths: Sequence[int],
    in_flight: int,
    rounds: int,
    now: Callable[[], float],
    progress: Callable[..., Iterable[Any]],
) -> list[LoadFigures]:
    """Return the figures of all servers at one load, in turn; the first is the reference."""
    loads = [Load(server, in_flight, tuple(lengths), now) for server in servers]
    with garbage_between_runs() as collect:
        for order in progress(interleaved(len(loads), rounds), f"{in_flight} in flight", rounds):
            for number in order:
                loads[number].run()
                collect()
    per_token = [[each.seconds_per_token for each in load.rounds] for load in loads]
    measured = [load.figures() for load in loads]
    for number in range(1, len(measured)):
        spread = paired(per_token[number], per_token[0])
        measured[number] = replace(
            measured[number],
            throughput_ratio=1 / spread.median,
            throughput_interval=(1 / spread.high, 1 / spread.low),
        )
    return measured
