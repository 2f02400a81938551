"""Guesses at what a model will say next, from what is at hand: no other model is asked. Pure.

A guess costs nothing but its check: a pass over the layers checks several tokens of every sequence at once
(drafting.py). So a guess may come from anywhere: a right answer that the user's file has, what other sequences said
behind the same words, the sequence's own prompt (prompt lookup decoding; A. Saxena, 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

LENGTHS = (8, 4, 2, 1)  # of a text's ending that are looked for elsewhere, in tokens
REMEMBERED = 32  # places that are kept of an ending, the last ones
PROMPT_END = 64  # tokens of a prompt that are remembered
FIRST_ROOM, LEAST_ROOM, MOST_ROOM = 8, 4, 32  # tokens that are guessed at once where no answer is labelled
Place = tuple[list[int], int]  # a text, which may still grow, and where in it


@dataclass
class DraftPool:
    """All that was said and asked, by the words before it."""

    following: dict[tuple[int, ...], deque[Place]] = field(default_factory=dict)
    notes: list[tuple[list[int], int, int]] = field(default_factory=list)  # of a text: where it began, where it ended

    def note(self, text: list[int], begin: int, end: int | None = None) -> None:
        """Remember what follows which words, from the token at `begin` on, as far as the text goes, or to `end`."""
        end = len(text) if end is None else end
        self.notes.append((text, begin, end))
        for place in range(max(begin, 1), end):
            for length in LENGTHS:
                if length <= place:
                    places = self.following.setdefault(tuple(text[place - length : place]), deque(maxlen=REMEMBERED))
                    places.append((text, place))

    def so_far(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return all texts, and what was noted of them in its order: the text's number, beginning, end."""
        texts = {id(text): text for text, *_ in self.notes}
        numbers = {key: number for number, key in enumerate(texts)}
        return list(texts.values()), [[numbers[id(text)], begin, end] for text, begin, end in self.notes]

    def go_on_from(self, texts: Sequence[list[int]], notes: Sequence[Sequence[int]]) -> None:
        """Remember what another pool did."""
        for number, begin, end in notes:
            self.note(texts[number], begin, end)

    def guess(self, text: Sequence[int], room: int) -> list[int]:
        """Return at most `room` tokens that may follow a text: those that followed its longest known ending."""
        guessed: list[int] = []
        while len(guessed) < room:
            known = [*text[-LENGTHS[0] :], *guessed][-LENGTHS[0] :]
            more = next(self._behind(known, room - len(guessed)), [])
            if not more:
                break
            guessed += more
        return guessed

    def guesses(self, text: Sequence[int], room: int, number: int) -> list[list[int]]:
        """Return at most so many guesses, no two of which begin with the same token."""
        begun: dict[int, list[int]] = {}
        for more in self._behind(text[-LENGTHS[0] :], room):
            if len(begun) == number:
                break
            if more[0] not in begun:
                begun[more[0]] = more + self.guess([*text[-LENGTHS[0] :], *more], room - len(more))
        return list(begun.values())

    def _behind(self, known: Sequence[int], room: int) -> Iterator[list[int]]:
        """Yield what followed the endings of a text, the longest first, and of each the last that was said."""
        if room > 0:
            for length in LENGTHS:
                if length <= len(known):
                    for text, place in reversed(self.following.get(tuple(known[-length:]), ())):
                        yield text[place : place + room]


@dataclass
class Draft:
    """One sequence that is being answered, with what is guessed of it."""

    pool: DraftPool
    prompt: Sequence[int]  # its text
    most: int  # tokens that the answer may take
    ends: frozenset[int] = frozenset()  # tokens that end an answer; none: it takes all that it may
    label: Sequence[int] = ()  # an answer that the user's file has, with an end token; a guess like all others

    def __post_init__(self) -> None:
        self.answer: list[int] = []
        self._text = list(self.prompt[-PROMPT_END:])  # and what is said
        self._room = FIRST_ROOM
        self._guessed = 0
        self._label_at = 0  # the token of the label that may come next
        self._wrong = 0  # times running that the label's next token was another
        self.pool.note(self._text, 0)
        if self.label:
            self.pool.note([*self._text, *self.label], len(self._text))

    @property
    def done(self) -> bool:
        return len(self.answer) >= self.most or bool(self.answer and self.answer[-1] in self.ends)

    @property
    def _follows_label(self) -> bool:
        return self._wrong < 2 and self._label_at < len(self.label)

    def guess(self) -> list[int]:
        """Return tokens that may come next: fewer than the answer may still take, since a pass says one by itself."""
        left = self._left
        guessed = list(self.label[self._label_at :][:left]) if self._follows_label else []
        guessed = guessed or self.pool.guess(self._text, min(self._room, left))
        self._guessed = len(guessed)
        return guessed

    def guesses(self, number: int) -> list[list[int]]:
        """Return at least one guess and at most so many, no two of which begin with the same token."""
        first = self.guess()
        pooled = self.pool.guesses(self._text, min(self._room, self._left), number)
        return [first, *[guess for guess in pooled if guess[:1] != first[:1]][: number - 1]]

    @property
    def _left(self) -> int:
        return 0 if self.done else self.most - len(self.answer) - 1

    def take(self, tokens: Sequence[int]) -> int:
        """Add what the model says, those that were guessed right and one more; return how many belong to the answer."""
        if self.done:
            return 0
        tokens = tokens[: self.most - len(self.answer)]
        end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))
        tokens = tokens[: end + 1]
        right = len(tokens) - 1
        if self._follows_label:
            self._label_at += len(tokens)  # the last one stands in for the label's, where that was another
            self._wrong = 0 if right else self._wrong + 1
        elif self._guessed:
            room = 2 * self._room if right >= self._guessed else max(LEAST_ROOM, 2 * right)
            self._room = min(room, MOST_ROOM)
        begin = len(self._text)
        self.answer += tokens
        self._text += tokens
        self.pool.note(self._text, begin)
        return len(tokens)
