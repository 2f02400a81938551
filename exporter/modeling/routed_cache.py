"""The key-value cache of a routed model: short inside, of the original length outside.

Shapes: B sequences, S tokens of a pass, K <= S tokens that stay, P entries of a layer's cache, T tokens of the text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .routed_api import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
    cache_in,
    checkpointing_spares_caches,
    uses_flash_attention,
)
from .routed_route import Route


@dataclass(frozen=True)
class Entries:
    """Which tokens a layer's cache holds: entry p of sequence b is token index[b, p] of the text, if it is valid.

    A sequence with fewer tokens than the longest has entries that are not valid, in front.
    """

    index: Tensor  # [B, P]
    valid: Tensor  # [B, P]
    all_valid: bool
    newest: list[int]  # [P] highest valid index of each column, on the host: what sliding windows have passed

    @classmethod
    def counted(cls, start: int, end: int, num_sequences: int, device: torch.device) -> Entries:
        """Return the entries of all tokens from start to end."""
        index = torch.arange(start, end, device=device).expand(num_sequences, -1)
        return cls(index, torch.ones_like(index, dtype=torch.bool), True, list(range(start, end)))

    def followed_by(self, other: Entries) -> Entries:
        return Entries(
            torch.cat([self.index, other.index.to(self.index.device)], 1),
            torch.cat([self.valid, other.valid.to(self.valid.device)], 1),
            self.all_valid and other.all_valid,
            self.newest + other.newest,
        )

    def part(self, start: int, end: int | None = None) -> Entries:
        part = slice(start, end)
        return Entries(self.index[:, part], self.valid[:, part], self.all_valid, self.newest[part])

    def select(self, chosen: Tensor) -> Entries:
        chosen = chosen.to(self.index.device)
        return replace(self, index=self.index[chosen], valid=self.valid[chosen])


# Layers whose caches hold the same tokens: after drop_at? and sliding window. None in front: layers that earlier turns
# have filled, in a pass that runs all later ones anew.
Group = tuple[bool | None, int | None]


class _RoutedCache(Cache):
    """The code that both caches share. Lengths are those of the text, as if nothing had been dropped or skipped.

    A cache is taken over where it is, because `generate` and its callers hold on to the object: `take_over` gives a
    cache of transformers this class.
    """

    whole_batch = False  # True: a layer stores all sequences as soon as one of them runs it

    route: Any  # Route of the first routed pass, whose layers hold for all later ones; None before it
    seen: int  # tokens of the text so far
    entries: dict[Group, Entries]  # a group that is not here holds all tokens
    sequences: list[tuple[int, ...] | None]  # per layer, the sequences that run it, None for all
    windows: list[int | None]  # per layer
    recording: bool  # assisted decoding may take tokens back: windows are not cut
    aside: Any  # Aside: what a reversible conversation keeps for its next turn; None in others
    unfinished: bool  # a pass has begun and not ended: some layers hold its tokens, others do not

    def _begin(self, seen: int) -> None:
        self.route, self.seen, self.entries, self.recording, self.aside = None, seen, {}, False, None
        self.unfinished = False
        self.sequences, self.windows = [None] * len(self.layers), [None] * len(self.layers)

    def hold(self, route: Route, sequences: list[tuple[int, ...] | None]) -> None:
        """Follow a route from now on. Of earlier turns, layers keep the entries of sequences that go on using them."""
        self.route, self.sequences = route, list(sequences)
        for layer, chosen in zip(self.layers, sequences, strict=True):
            if chosen is not None and not self.whole_batch:
                take_sequences(layer, torch.tensor(chosen, dtype=torch.long))

    def extend(self, entries: dict[Group, Entries], num_tokens: int, drop_at: int) -> None:
        """Note what a pass over `num_tokens` tokens has added."""
        self.entries, self.seen, self.unfinished = entries, self.seen + num_tokens, False
        if not self.recording:
            self._slide(drop_at)

    def _slide(self, drop_at: int) -> None:
        """Forget the entries that no sequence's sliding window will see again."""
        for group, entries in list(self.entries.items()):
            if group[1] is None:
                continue
            passed = sum(newest <= self.seen - group[1] for newest in entries.newest)
            self.entries[group] = entries.part(passed)
            for layer_idx, layer in enumerate(self.layers):
                if layer.is_initialized and self.group(layer_idx, drop_at) == group:
                    layer.keys, layer.values = layer.keys[:, :, passed:], layer.values[:, :, passed:]

    def group(self, layer_idx: int, drop_at: int) -> Group:
        return layer_idx >= drop_at, self.windows[layer_idx]

    @property
    def aside_bytes(self) -> int:
        """The bytes that a reversible conversation keeps aside, beside keys and values."""
        return 0 if self.aside is None else int(self.aside.num_bytes)

    def _let_go(self, reason: str) -> None:
        if self.aside is not None:
            self.aside.let_go(reason)

    def select_sequences(self, chosen: Tensor) -> None:
        """Make this the cache of a batch of the chosen sequences, in the order given."""
        self._let_go("its sequences were chosen anew")
        self.entries = {group: entries.select(chosen) for group, entries in self.entries.items()}
        self.route = self.route and self.route.select(chosen)
        for layer_idx, (layer, sequences) in enumerate(zip(self.layers, self.sequences, strict=True)):
            if sequences is None:
                take_sequences(layer, chosen)
                continue
            stored = {sequence: index for index, sequence in enumerate(sequences)}
            indices = [stored.get(sequence) for sequence in chosen.tolist()]
            self.sequences[layer_idx] = tuple(new for new, index in enumerate(indices) if index is not None)
            there = torch.tensor([index for index in indices if index is not None], dtype=torch.long)
            take_sequences(layer, chosen if self.whole_batch else there)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_sequences(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_sequences(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_sequences(torch.arange(len(self.route.layers)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative number); not those of a routed prompt, some of which are not there."""
        count = -tokens_to_remove
        for entries in self.entries.values():
            last = torch.arange(self.seen - count, self.seen, device=entries.index.device)
            if entries.index.shape[1] < count or bool(
                (entries.index[:, entries.index.shape[1] - count :] != last).any()
            ):
                raise ValueError(
                    f"the last {count} tokens are not all in the cache: a routed prompt cannot be cropped."
                )
        self._let_go("it was cropped")
        for layer in self.layers:
            if layer.is_initialized:
                layer.crop(tokens_to_remove)
        self.seen -= count
        self.entries = {group: entries.part(0, len(entries.newest) - count) for group, entries in self.entries.items()}

    def activate_past_recording(self) -> None:
        self.recording = True

    def reset(self) -> None:
        super().reset()
        windows = self.windows
        self._begin(seen=0)
        self.windows = windows


class RoutedCache(_RoutedCache, DynamicCache):
    """Grows as it is filled. A layer has entries only of the sequences that run it and of the tokens that reach it."""

    @classmethod
    def take_over(cls, cache: DynamicCache, num_layers: int) -> RoutedCache:
        if others := {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
            raise ValueError(f"a cache with layers of type {others.pop().__name__} cannot hold a route.")
        seen = cache.get_seq_length()
        cache.layers += [DynamicLayer() for _ in range(num_layers - len(cache.layers))]
        cache.__class__ = cls
        cache._begin(seen)
        for layer_idx, layer in enumerate(cache.layers):
            if type(layer) is DynamicSlidingWindowLayer:  # it counts entries; here tokens count, and `_slide` cuts
                cache.recording |= layer.record_past
                cache.windows[layer_idx] = layer.sliding_window
                cache.layers[layer_idx] = whole = DynamicLayer()
                if layer.is_initialized:
                    whole.lazy_initialization(layer.keys, layer.values)
                    whole.keys, whole.values = layer.keys, layer.values
        taken: RoutedCache = cache
        return taken

    def rewind(self, layer_idx: int) -> dict[Group, Entries]:
        """Go back to the first token, to run layers from `layer_idx` on anew; return what the layers before it hold."""
        held = {group: entries for group, entries in self.entries.items() if layer_idx and not group[0]}
        self.layers[layer_idx:] = [DynamicLayer() for _ in self.layers[layer_idx:]]
        self.route, self.seen, self.entries, self.unfinished = None, 0, {}, True
        self.sequences = [None] * len(self.layers)
        return held

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0


class RoutedStaticCache(_RoutedCache, StaticCache):
    """A cache of fixed size. Dropped tokens take no room in it, and layers none if all sequences skip them."""

    whole_batch = True

    @classmethod
    def take_over(cls, cache: StaticCache, num_layers: int) -> RoutedStaticCache:
        seen = int(cache.get_seq_length())
        whole = [layer for layer in cache.layers if type(layer) is StaticLayer]
        if not whole or any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise ValueError(f"a static cache of {', '.join(kinds)} cannot hold a route; use a dynamic one.")
        if seen and len(whole) < len(cache.layers):
            raise ValueError("a static cache with sliding windows cannot be routed after its first turn.")
        size = whole[0].max_cache_len
        cache.layers = [layer if type(layer) is StaticLayer else StaticLayer(size) for layer in cache.layers]
        cache.__class__ = cls
        cache._begin(seen)
        taken: RoutedStaticCache = cache
        return taken

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.layers[layer_idx].max_cache_len, 0


def take_sequences(layer: Any, chosen: Tensor) -> None:
    """Keep the chosen sequences of a layer's keys and values."""
    if layer.is_initialized:
        chosen = chosen.to(layer.keys.device)
        layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]


def routed_cache(cache: Any, num_layers: int) -> RoutedCache | RoutedStaticCache:
    """Return the cache itself, able to hold a route."""
    if isinstance(cache, _RoutedCache):
        return cache
    if type(cache) is DynamicCache:
        return RoutedCache.take_over(cache, num_layers)
    if type(cache) is StaticCache:
        return RoutedStaticCache.take_over(cache, num_layers)
    raise ValueError(f"a {type(cache).__name__} cannot hold a route: use a dynamic or static cache, or preset='off'.")


def check_finished(cache: Any) -> None:
    """Refuse a cache that a pass has left half filled: it would answer wrongly, and say nothing."""
    if getattr(cache, "unfinished", False):
        raise ValueError(
            "the pass before this one broke off (out of memory, an interrupt, an error), and some layers of this cache "
            "hold its tokens while others do not: begin with a new cache, and give it the whole conversation."
        )


def prepared_cache(decoder: Any, inputs: dict[str, Any]) -> RoutedCache | RoutedStaticCache | None:
    """Put the pass's cache, able to hold a route, into its inputs: a new one if a cache is wanted and there is none."""
    name, cache = decoder.routed_cache_name, cache_in(inputs)
    use_cache = inputs.get("use_cache")
    use_cache = decoder.config.use_cache if use_cache is None else use_cache
    checkpointed = decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers)
    if checkpointed and (torch.is_grad_enabled() or not checkpointing_spares_caches()):
        use_cache, cache = False, None  # transformers takes it away from the layers
        inputs[name], inputs["use_cache"] = None, False
    if cache is None and use_cache:
        cache = inputs[name] = DynamicCache(config=decoder.config)
    if cache is None:
        return None
    if isinstance(cache, StaticCache) and uses_flash_attention(decoder.config):
        raise ValueError("flash attention reads a static cache to its end: use a dynamic one for a route, or sdpa.")
    return routed_cache(cache, decoder.config.num_hidden_layers)


# --- masks ------------------------------------------------------------------------------------------------------------


def narrowed_mask(mask: Tensor, entries: Entries, kept: Entries | None, num_sequences: int) -> Tensor:
    """Narrow a mask to rows of kept tokens and columns of cache entries: [B, 1, S, T] -> [B, 1, K, P]."""
    mask = mask.expand(num_sequences, *mask.shape[1:])
    if kept is not None:
        index = kept.index.to(mask.device)[:, None, :, None]
        mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))
    index = entries.index.to(mask.device)[:, None, None, :]
    mask = mask.gather(3, index.expand(-1, *mask.shape[1:3], -1))
    return mask.masked_fill(~entries.valid.to(mask.device)[:, None, None, :], masked_value(mask))


def masked_value(mask: Tensor) -> bool | float:
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
