"""Answers of a model whose layers lie on disk: all questions at once, so that weights are read once a pass.

A pass checks several guessed tokens of every question (drafting.py), where the model's cache can take wrong ones back;
else it says one token.

`generate` runs for each batch in a thread of its own, which stops before each decoder layer; when that layer is in
memory, the threads go on one after the other, never two at a time. So each family answers by the very code that it
answers by when all of it is in memory, and says the same.

Caches and states that wait are in memory up to a limit, beyond it in a file (boundary.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..clean_room import REFERENCE_TOKENS, greedy, reference_margins
from ..data.batches import Batch
from .answers import AnsweredBatch, end_ids, with_answers
from .boundary import Emptied, StateStore
from .drafting import drafted, may_draft
from .drafts import Draft
from .loading import text_decoder
from .replay import forwards_replaced
from .residency import forget_ahead, held
from .sweep import store_for

THREADS = 4096  # of the system, that may exist: each thread of ours has as many as torch takes for one operation
REFERENCE_WIDTH = 4  # guesses at the reference answer that are checked side by side: it is a single sequence
INPUTS_BYTES = 256 << 20  # that the inputs of batches may take together, whatever the limit: pixels, most of them


class Stopped(BaseException):
    """Ends a thread whose answer nobody waits for any more."""


class Speaker:
    """One batch that is answered, in a thread that runs only when it is told to and then up to the next layer.

    What a model notes in itself while it answers (Qwen2-VL: by how much positions are shifted) is of the batch, and is
    put away with it.
    """

    def __init__(self, answer: Callable[[], Tensor], noted_in: Sequence[Any], store: StateStore) -> None:
        self.answer, self.noted_in, self.store = answer, noted_in, store
        self.notes = [_notes(module) for module in noted_in]
        self.layer_idx: int | None = None  # that it waits for; None: it has not begun, or is done
        self.answers: Tensor | None = None
        self.error: BaseException | None = None
        self.stopped = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="answers")
        self._emptied: dict[int, list[Emptied]] = {}  # by layer, of its cache; -1: the state that goes into the next

    def go_on(self) -> None:
        """Let the thread run up to the next layer, or to its end. Raises what it raises."""
        if self._thread.ident is None:
            self._thread.start()
        before = [_notes(module) for module in self.noted_in]
        self._take_notes(self.notes)
        self._turn.release()
        self._back.acquire()
        self.notes = [_notes(module) for module in self.noted_in]
        self._take_notes(before)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the thread, wherever it waits."""
        self.stopped = True
        if self._thread.ident is not None and self._thread.is_alive():
            self._turn.release()
            self._thread.join()

    def at_layer(self, layer_idx: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wait for a layer, and run it; called in the thread."""
        caches = [getattr(value, "layers", None) for value in kwargs.values()]
        states = [*args[:1], kwargs.get("hidden_states")]
        self._emptied[-1] = self.store.empty(states)
        self.layer_idx = layer_idx
        self._hand_over()
        self.layer_idx = None
        for emptied in (*self._emptied.pop(-1), *self._emptied.pop(layer_idx, ())):
            self.store.fill(emptied)
        output = run(*args, **kwargs)
        held_there = [vars(some[layer_idx]) for some in caches if some is not None and layer_idx < len(some)]
        self._emptied[layer_idx] = self.store.empty(value for there in held_there for value in there.values())
        return output

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self.stopped:
                self.answers = self.answer()
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        for emptied in (tensor for some in self._emptied.values() for tensor in some):
            self.store.forget(emptied)
        self.layer_idx = None
        self._back.release()

    def _hand_over(self) -> None:
        self._back.release()
        self._turn.acquire()
        if self.stopped:
            raise Stopped

    def _take_notes(self, notes: Sequence[dict[str, Any]]) -> None:
        for module, noted in zip(self.noted_in, notes, strict=True):
            for name in _notes(module).keys() - noted.keys():
                delattr(module, name)
            vars(module).update(noted)


def _notes(module: Any) -> dict[str, Any]:
    """Return what a module has beside its parts and weights."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


Drafts = Callable[[Batch], list[Draft]]  # one a sequence, not begun


def answered_together(
    model: Any,
    batches: Iterable[Batch],
    max_new_tokens: int,
    drafts_of: Drafts | None = None,
    aside: tuple[Batch, Draft] | None = None,
) -> Iterator[AnsweredBatch]:
    """Yield what `answered` returns of each batch; weights are read once for a pass of all of them.

    All batches are answered at once as long as their inputs fit; what does not fit comes in the next group.

    Args:
        drafts_of: what is guessed of a batch; None, or a model that takes nothing back: nothing is.
        aside: a question that is asked among the first group as long as that takes: its draft has what was said.
    """
    limit = store_for(model).limit or 0
    guessing = drafts_of is not None and may_draft(model.config)
    for group in groups(batches, max(limit, INPUTS_BYTES)):
        group = [batch.to(model.device) for batch in group]
        with greedy(model, max_new_tokens=max_new_tokens) as settings:
            if guessing and drafts_of is not None:
                drafts = [drafts_of(batch) for batch in group]
                ways = [_by_guesses(model, *pair, settings) for pair in zip(group, drafts, strict=True)]
                asides = [_by_guesses(model, aside[0].to(model.device), [aside[1]], settings)] if aside else []
            else:
                ways, asides = [_token_by_token(model, batch, settings) for batch in group], []
            group_answers = _answer_group(model, ways, asides)
            aside = None
        for batch, answers in zip(group, group_answers, strict=True):
            yield with_answers(model, batch, answers)


def reference_by_guesses(model: Any, inputs: dict[str, Tensor], draft: Draft) -> dict[str, list[Any]]:
    """Return what `reference_answer` returns, with fewer reads of the layers the better the draft is."""
    logits: list[Tensor] = []
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with greedy(model, max_new_tokens=REFERENCE_TOKENS) as settings:
        never = sorted(end_ids(model))

        def answer() -> Tensor:
            drafted(
                model,
                inputs,
                [draft],
                settings,
                width=REFERENCE_WIDTH,
                never=never,
                kept=lambda _, more: logits.append(more),
            )
            return torch.tensor([draft.answer])

        tokens: list[int] = _answer_group(model, [answer])[0][0].tolist()
    return {"tokens": tokens, "margins": reference_margins(torch.cat(logits))}


def _token_by_token(model: Any, batch: Batch, settings: Any) -> Callable[[], Tensor]:
    def answer() -> Tensor:
        sequences: Tensor = model.generate(**batch.inputs, generation_config=settings)
        return sequences[:, batch.inputs["input_ids"].shape[1] :]

    return answer


def _by_guesses(model: Any, batch: Batch, drafts: Sequence[Draft], settings: Any) -> Callable[[], Tensor]:
    def answer() -> Tensor:
        drafted(model, batch.inputs, drafts, settings)
        answers = [torch.tensor(draft.answer) for draft in drafts]
        return pad_sequence(answers, batch_first=True).to(batch.inputs["input_ids"])  # what follows an end is ignored

    return answer


def groups(batches: Iterable[Batch], limit: int) -> Iterator[list[Batch]]:
    """Yield batches in groups of no more than `limit` bytes of inputs, and of no more threads than there may be."""
    group: list[Batch] = []
    size = 0
    most = max(1, THREADS // torch.get_num_threads())
    for batch in batches:
        more = sum(value.numel() * value.element_size() for value in batch.inputs.values() if _is_tensor(value))
        if group and (size + more > limit or len(group) == most):
            yield group
            group, size = [], 0
        group.append(batch)
        size += more
    if group:
        yield group


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _answer_group(
    model: Any, ways: Sequence[Callable[[], Tensor]], asides: Sequence[Callable[[], Tensor]] = ()
) -> list[Tensor]:
    """Return what each of the ways to answer a batch gives; all of them run through a layer while it is there.

    Args:
        asides: ways that run with these, and end with the last of them.
    """
    layers = text_decoder(model).layers
    noted_in = [module for module in model.modules() if any(inner is layers for inner in _below(module))]
    local = threading.local()

    def answer_of(number: int) -> Callable[[], Tensor]:
        def answer() -> Tensor:
            local.speaker = speakers[number]
            return [*ways, *asides][number]()

        return answer

    def waiting(layer_idx: int, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: local.speaker.at_layer(layer_idx, run, args, kwargs)

    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)  # caches that other layers read too
    with StateStore() if shared else store_for(model) as store, forwards_replaced(layers, waiting):
        speakers: list[Speaker] = []
        speakers += [Speaker(answer_of(number), noted_in, store) for number in range(len(ways) + len(asides))]
        waited_for = speakers[: len(ways)]
        try:
            for speaker in speakers:
                speaker.go_on()
            while any(speaker.layer_idx is not None for speaker in waited_for):
                _once_through(layers, speakers)
        finally:
            forget_ahead()
            for speaker in speakers:
                speaker.stop()
        return [speaker.answers for speaker in waited_for if speaker.answers is not None]


def _below(module: Any) -> Iterator[Any]:
    return (inner for child in module.children() for inner in child.modules())


def _once_through(layers: Sequence[Any], speakers: Sequence[Speaker]) -> None:
    """Take every batch that is not done through all layers: one pass."""
    for layer_idx, layer in enumerate(layers):
        if not (there := [speaker for speaker in speakers if speaker.layer_idx == layer_idx]):
            continue
        following = layers[(layer_idx + 1) % len(layers)]
        with held(layer, following=following):
            for speaker in there:
                speaker.go_on()
