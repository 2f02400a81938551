"""One pass through the decoder: the route is decided, layers run for the tokens and sequences that they are for.

Decoder and layers are those of transformers, made subclasses of themselves by `make_routable`.

Shapes: B sequences, S tokens of a pass, K <= S tokens that stay, P entries of a layer's cache, L layers, D hidden size.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .routed_api import (
    PACKED,
    PER_TOKEN,
    cache_name,
    check_transformers,
    unsupported,
    uses_flash_attention,
    with_cache_as,
)
from .routed_cache import Entries, Group, RoutedStaticCache, masked_value, narrowed_mask, prepared_cache
from .routed_cost import amounts
from .routed_request import IGNORED_LABEL, Request, RouterInputs, warn_of_no_question
from .routed_route import Route
from .routed_router import best_layers, best_tokens


class RoutedForward:
    """One pass through the decoder's layers: what each of them runs on."""

    def __init__(self, decoder: Any, request: Request, inputs: dict[str, Any]) -> None:
        embeddings = inputs["inputs_embeds"]
        self.request = request
        self.config, self.num_layers = decoder.config, decoder.config.num_hidden_layers
        self.num_sequences, self.num_tokens = embeddings.shape[:2]
        self.cache: Any = prepared_cache(decoder, inputs)  # None without one
        self.static = isinstance(self.cache, RoutedStaticCache)
        self.past = self.cache.seen if self.cache is not None else 0
        self.real = real_tokens(inputs.get("attention_mask"), self.past, embeddings)  # [B, S]
        held: Any = self.cache.route if self.cache is not None else None
        self.drop_at = drop_layer(request, held, self.num_layers)
        deepstack = len(inputs.get("deepstack_visual_embeds") or ())  # layers after which the decoder adds features
        self.compact_from = max(self.drop_at, deepstack)  # from here on, states are short between layers
        self.sequences: list[tuple[int, ...] | None] = [None] * self.num_layers
        if self.cache is not None and held is not None:
            self.sequences = list(self.cache.sequences)
        self.kept: Any = None  # Entries: the tokens that stay; None: all of them
        self.decided = False
        self.reached = 0  # layers that were called
        self._memo: dict[Any, Any] = {}
        if request.visual is None and request.imposed is None:  # text goes on with the route there is
            everything = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            request.route = Route(everything, held.layers, visual=~everything, drop_at=self.drop_at)
            self.decided = True
        elif request.settings.read_at == 0 or request.imposed is not None:
            self._decide(embeddings)

    # --- the decision ---

    @torch.no_grad()
    def _decide(self, states: Tensor) -> None:
        """Ask the router, or follow what is imposed: states [B, S, D]."""
        request = self.request
        if request.imposed is not None:
            route = self._imposed(request.imposed.for_sequences(self.num_sequences))
        else:
            visual = request.visual.to(states.device)
            visible = self.real if request.hidden is None else self.real & ~request.hidden.to(self.real.device)
            inputs = RouterInputs(states, visual, visible, request.coordinates)
            if not request.run:
                request.router_inputs = inputs
            tokens, layers = (logits.to(states.device) for logits in request.router(*inputs))
            shown = visual & self.real
            held = self.cache.route.layers if self.cache is not None and self.cache.route is not None else None
            counts, kept_layers = amounts(
                request.budget,
                request.settings,
                self.num_layers,
                shown,
                visible=visible,
                logits=tokens,
                past=self.past,
                held=held,
            )
            keep = best_tokens(
                tokens, shown, budget=counts, patches=request.coordinates, image_floor=request.settings.image_floor
            )
            if request.run and not request.budget.is_off:
                warn_of_no_question(visible, shown)
            run = best_layers(layers, request.settings, kept_layers, self.num_layers)
            run |= ~visual.any(1)[:, None]  # a sequence of text alone runs whole
            route = Route(
                keep, run, visual=visual, coordinates=request.coordinates, token_logits=tokens, layer_logits=layers
            )
        self._prepare(replace(route, drop_at=self.drop_at))

    def _imposed(self, route: Route) -> Route:
        """Check a hand-made route and fill in what it leaves open."""
        device = self.real.device
        keep = torch.ones_like(self.real) if route.keep is None else route.keep.to(device, torch.bool)
        if keep.shape[1] > self.num_tokens:
            raise ValueError(f"the route given is for {keep.shape[1]} tokens, the prompt has {self.num_tokens}.")
        keep = F.pad(keep, (0, self.num_tokens - keep.shape[1]), value=True)  # what was generated since
        layers = torch.ones(self.num_sequences, self.num_layers, dtype=torch.bool, device=device)
        if route.layers is not None:
            if route.layers.shape[1] != self.num_layers:
                raise ValueError(f"the route given is for {route.layers.shape[1]} layers, there are {self.num_layers}.")
            layers = route.layers.to(device, torch.bool)
        visual = self.request.visual
        if visual is not None and bool((~keep & ~visual.to(device) & self.real).any()):
            raise ValueError("the route given drops text: only visual tokens can leave.")
        return replace(route, keep=keep, layers=layers, visual=visual, coordinates=self.request.coordinates)

    def _prepare(self, route: Route) -> None:
        """Prepare what the layers need to know. Looks at the values, which synchronises on a GPU."""
        held = self.cache.route if self.cache is not None else None
        if held is not None:  # layers are chosen once for a conversation
            route = replace(route, layers=held.layers)
        keep = route.keep & self.real
        self.sequences = sequences_of(route.layers)
        kept, real = torch.stack([keep.sum(1), self.real.sum(1)]).tolist()
        if kept != real and self.drop_at < self.num_layers:
            check_windows(self.config)
            self.kept = self._kept_entries(keep, max(kept), min(kept) == max(kept))
        if self.request.labels is not None:  # a label is predicted by the token before it, which must be there
            self.request.labels[:, 1:].masked_fill_(~route.keep[:, :-1], IGNORED_LABEL)
        if self.cache is not None and held is None:
            self.cache.hold(route, self.sequences)
        self.request.route = route
        self.decided = True

    def _kept_entries(self, keep: Tensor, width: int, all_valid: bool) -> Entries:
        """Return the kept tokens in their order at the end of each sequence; in front, others as padding, not valid."""
        index = keep.byte().argsort(dim=1, stable=True)[:, -width:]  # [B, K]
        valid = keep.gather(1, index)
        newest = [self.past + self.num_tokens] * width
        if self.cache is not None and any(self.cache.windows):
            newest = (self.past + torch.where(valid, index, -1)).amax(0).tolist()
        return Entries(index, valid, all_valid, newest)

    # --- the layers ---

    def layer(self, layer_idx: int, forward: Any, states: Tensor, keywords: dict[str, Any]) -> Tensor:
        """Run a decoder layer on the tokens and sequences that it is for: [B, S or K, D] -> [B, S or K, D]."""
        self.reached += 1
        if packed := [name for name in PACKED if keywords.get(name) is not None]:
            raise ValueError(f"packed sequences ({packed[0]}) cannot be routed: pad them, or use preset='off'.")
        turn = self.request.turn
        if turn is not None and turn.is_early(layer_idx):
            new = forward(states[:, turn.past :], **self._keywords(layer_idx, keywords, None))
            return F.pad(new, (0, 0, turn.past, 0))
        if turn is not None and layer_idx == turn.hold_at > 0:
            states = turn.hold(states)
        if not self.decided and layer_idx == self.request.settings.read_at:
            self._decide(states)
        if self.decided and not self.request.run:
            return states
        if self.cache is not None and self.request.run:
            self.cache.unfinished = True  # until `finish`
        whole = None
        if self.kept is not None and self.drop_at <= layer_idx <= self.compact_from:
            whole, states = states, states.gather(1, self._spread(states))
        sequences = self.sequences[layer_idx]
        if sequences is None:
            states = forward(states, **self._keywords(layer_idx, keywords, None))
        elif sequences and self.static:  # run all, take some
            ran = forward(states, **self._keywords(layer_idx, keywords, None))
            index = index_of(sequences, states.device)
            states = states.index_copy(0, index, ran[index])
        elif sequences:
            index = index_of(sequences, states.device)
            ran = forward(states[index], **self._keywords(layer_idx, keywords, sequences))
            states = states.index_copy(0, index, ran)
        if whole is not None and layer_idx < self.compact_from:
            states = whole.scatter(1, self._spread(states), states)
        return states

    def finish(self, output: Any) -> Any:
        """Spread the last hidden state out to the original length, zero where a token has left; note what is cached."""
        if self.reached != self.num_layers:
            raise RuntimeError(
                unsupported(f"{self.reached} of {self.num_layers} decoder layers were told of the route")
            )
        if self.cache is not None:
            groups = {self.cache.group(layer_idx, self.drop_at) for layer_idx in range(self.num_layers)}
            entries = {group: held for group in groups if (held := self._entries(group)) is not None}
            if self.request.turn is not None:
                self._align(entries)
                self.cache.aside = self.request.turn.aside
            self.cache.extend(entries, self.num_tokens, self.drop_at)
        if self.kept is None or self.compact_from >= self.num_layers or not self.request.run:
            return output
        last = output.last_hidden_state  # [B, K, D]
        last = last.masked_fill(~self.kept.valid.to(last.device)[..., None], 0)
        full = last.new_zeros(self.num_sequences, self.num_tokens, last.shape[-1])
        output.last_hidden_state = full.scatter(1, self._spread(last), last)
        return output

    def _align(self, entries: dict[Group, Entries]) -> None:
        """Cut sliding windows that were filled anew to those that an earlier turn has filled, and cut then.

        Args:
            entries: what the cache holds now, in which they are replaced.
        """
        turn = self.request.turn
        for window in turn.entries:
            entries[False, window] = held = self._extended((None, window))
            for layer_idx in range(turn.hold_at, self.drop_at):
                layer, length = self.cache.layers[layer_idx], len(held.newest)
                if layer.is_initialized and self.cache.windows[layer_idx] == window:
                    layer.keys, layer.values = layer.keys[:, :, -length:], layer.values[:, :, -length:]

    def _spread(self, states: Tensor) -> Tensor:
        """Return the index of the kept tokens as gather and scatter want it: [B, K, D]."""
        index: Tensor = self.kept.index.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
        return index

    def _once(self, key: Any, make: Any, source: Any = None) -> Any:
        """Make a mask or positions once a pass, since all layers are given the same objects, told apart by identity."""
        key = (key, id(source))
        if key not in self._memo:
            self._memo[key] = (make(), source)  # held, so that no other object gets its identity
        return self._memo[key][0]

    # --- what the layers are given ---

    def _keywords(self, layer_idx: int, keywords: dict[str, Any], sequences: tuple[int, ...] | None) -> dict[str, Any]:
        """Return a layer's keywords, for the kept tokens and the sequences that run it."""
        window = self.cache.windows[layer_idx] if self.cache is not None else None
        early = self.request.turn is not None and self.request.turn.is_early(layer_idx)
        group: Group = (None if early else layer_idx >= self.drop_at, window)
        running = self._running(group)
        narrowed = dict(keywords)
        mask = keywords.get("attention_mask")
        narrowed["attention_mask"] = self._once(
            ("mask", group, sequences), lambda: self._of_sequences(self._mask(mask, group), sequences, -4), mask
        )
        for name in PER_TOKEN:
            if (values := keywords.get(name)) is not None:
                narrow = functools.partial(self._of_tokens, values, running, sequences)
                narrowed[name] = self._once((name, group[0], sequences), narrow, values)
        if sequences is not None or running is not None:
            narrowed["position_ids"] = None  # only read to find packed sequences, for which gaps would be taken
        return narrowed

    def _of_tokens(self, values: Any, running: Entries | None, sequences: tuple[int, ...] | None) -> Any:
        """Narrow cosines and sines, or what else each token has, to the tokens and sequences that run."""
        if isinstance(values, tuple):
            return tuple(self._of_tokens(part, running, sequences) for part in values)
        return self._of_sequences(self._tokens(values, running), sequences, -3)

    def _of_sequences(self, tensor: Tensor | None, sequences: tuple[int, ...] | None, dim: int) -> Tensor | None:
        """Select sequences of a mask (dimension -4 of four, or the first of two) or of cos and sin (dimension -3)."""
        if sequences is None or tensor is None:
            return tensor
        dim = 0 if tensor.ndim == 2 else dim
        if tensor.shape[dim] != self.num_sequences:  # one for all
            return tensor
        return tensor.index_select(dim, index_of(sequences, tensor.device))

    def _running(self, group: Group) -> Entries | None:
        """Return the tokens of this pass that a group of layers runs on; None: all of them."""
        if group[0] is None:
            turn = self.request.turn
            return Entries.counted(turn.past, self.num_tokens, self.num_sequences, self.real.device)
        running: Entries | None = self.kept if group[0] else None
        return running

    def _tokens(self, values: Tensor, running: Entries | None) -> Tensor:
        """Gather what the tokens that run have: [..., B or 1, S, C] -> [..., B, K, C]."""
        if running is None:
            return values
        values = values.expand(*values.shape[:-3], self.num_sequences, *values.shape[-2:])
        index = running.index.to(values.device)[..., None].expand(*values.shape[:-2], -1, values.shape[-1])
        return values.gather(-2, index)

    def _entries(self, group: Group) -> Entries | None:
        """Return the tokens in the caches of a group of layers after this pass; None: all tokens of the text."""
        entries: Entries | None = self._once(("entries", group), lambda: self._extended(group))
        return entries

    def _extended(self, group: Group) -> Any:
        adds = self._running(group)
        if group[0] is None:
            turn = self.request.turn
            counted = Entries.counted(0, turn.past, self.num_sequences, self.real.device)
            return turn.entries.get(group[1], counted).followed_by(adds)
        before = self.cache.entries.get(group) if self.cache is not None else None
        if before is None and adds is None and group[1] is None:
            return None
        device = self.real.device
        if adds is None:
            added = Entries.counted(self.past, self.past + self.num_tokens, self.num_sequences, device)
        else:
            added = replace(adds, index=adds.index + self.past)
        if before is None and self.past:
            before = Entries.counted(self._stored_from(group), self.past, self.num_sequences, device)
        return added if before is None else before.followed_by(added)

    def _stored_from(self, group: Group) -> int:
        """Return the first token that an unrouted cache still had of an earlier turn: sliding windows forget."""
        return 0 if group[1] is None else max(0, self.past - group[1] + 1)

    def _mask(self, mask: Any, group: Group) -> Any:
        """Narrow a mask for the whole text [B, 1, S, T] to the kept tokens and the entries that a layer has."""
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"a route cannot narrow a mask of type {type(mask).__name__}: use sdpa, eager or flash.")
        narrowed = mask
        if (entries := self._entries(group)) is not None:
            running = self._running(group)
            if mask is None:
                narrowed = self._explicit_mask(entries, running)
            elif mask.ndim == 2:  # flash attention's: True at entries that are no padding
                narrowed = mask.gather(1, entries.index.to(mask.device)) & entries.valid.to(mask.device)
            else:
                narrowed = narrowed_mask(mask, entries, running, self.num_sequences)
        if self.static and narrowed is not None:  # layers are as long as the cache, sliding ones too
            spare = self.cache.layers[0].max_cache_len - narrowed.shape[-1]
            narrowed = F.pad(narrowed, (0, spare), value=masked_value(narrowed))
        return narrowed

    def _explicit_mask(self, entries: Entries, running: Entries | None) -> Tensor | None:
        """Make the mask that transformers left out: without padding, a token sees all that come before it."""
        number = self.num_tokens if running is None else running.index.shape[1]
        in_step = number in (1, entries.index.shape[1]) or uses_flash_attention(self.config)  # no mask says just that
        if entries.all_valid and in_step and not self.static:
            return None
        if uses_flash_attention(self.config):
            return entries.valid
        tokens = running or Entries.counted(0, self.num_tokens, self.num_sequences, entries.index.device)
        before = entries.index[:, None, None, :] <= self.past + tokens.index[:, None, :, None]
        return before & entries.valid[:, None, None, :]


def drop_layer(request: Request, held: Route | None, num_layers: int) -> int:
    """Return the layer before which this pass's visual tokens leave: the first turn's, if a cache holds it."""
    imposed = request.imposed.drop_at if request.imposed is not None else None
    if held is not None and held.drop_at is not None:
        if imposed not in (None, held.drop_at):
            raise ValueError(f"the route given drops at layer {imposed}, the one of the cache at {held.drop_at}.")
        if request.visual is not None and request.imposed is None and held.drop_at < request.settings.read_at:
            raise ValueError(
                f"the tokens of this cache left before layer {held.drop_at}, the router reads at layer "
                f"{request.settings.read_at}: give a route for the new image, or begin with a new cache."
            )
        return held.drop_at
    if imposed is None:
        return request.settings.drop_at
    if isinstance(imposed, bool) or not isinstance(imposed, int) or not 0 <= imposed <= num_layers:
        raise ValueError(f"the route given drops at layer {imposed!r}: give a number from 0 to {num_layers}.")
    return imposed


@functools.lru_cache(maxsize=1024)
def index_of(sequences: tuple[int, ...], device: torch.device) -> Tensor:
    """Return sequences as an index that is kept: copying numbers to a GPU at each step would wait for it."""
    with torch.inference_mode(False):  # or it could not be used in training later
        return torch.tensor(sequences, device=device)


def sequences_of(layers: Tensor) -> list[tuple[int, ...] | None]:
    """Return for each layer the sequences that run it, None for all: [B, L]."""
    columns = layers.T.tolist()
    return [None if all(runs) else tuple(sequence for sequence, run in enumerate(runs) if run) for runs in columns]


def check_windows(config: Any) -> None:
    kinds = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None) and "sliding_attention"]
    if uses_flash_attention(config) and "sliding_attention" in kinds:
        raise ValueError(
            "flash attention counts the entries in a sliding window, of which some are dropped here: load the model "
            "with attn_implementation='sdpa', or keep all visual tokens."
        )


def real_tokens(mask: Any, past: int, embeddings: Tensor) -> Tensor:
    """Return where the tokens of a pass are no padding, [B, S], from any mask that transformers makes.

    None is no padding; `generate` makes it of a mask of ones. In four dimensions, padding is what no token sees.
    """
    num_sequences, num_tokens = embeddings.shape[:2]
    if isinstance(mask, dict):  # by kind of layer
        mask = next((part for part in mask.values() if part is not None), None)
    if mask is None:
        return torch.ones(num_sequences, num_tokens, dtype=torch.bool, device=embeddings.device)
    if mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = seen.flatten(1, 2).any(1).expand(num_sequences, -1)
    visual: Tensor = mask[:, past : past + num_tokens].to(embeddings.device, torch.bool)
    return visual


# --- the decoder's classes --------------------------------------------------------------------------------------------


class _RoutedDecoder:
    """A text model of transformers that takes a request, `routing`, and hands its pass on to its layers."""

    routed_cache_name: str

    def forward(self, *args: Any, routing: Request | None = None, **kwargs: Any) -> Any:
        if routing is None:
            return super().forward(*args, **kwargs)
        if args:
            raise TypeError("a routed text model takes its inputs by name.")
        kwargs, turn = with_cache_as(self.routed_cache_name, kwargs), routing.turn
        if turn is not None:
            kwargs = turn.begin(self, kwargs)
        run = RoutedForward(self, routing, kwargs)
        output = run.finish(super().forward(routing=run, **kwargs))
        if turn is not None and turn.again:  # the caller asked for the new tokens
            output.last_hidden_state = output.last_hidden_state[:, turn.past :]
        return output


class _RoutedLayer:
    """A decoder layer of transformers that runs on what the pass leaves it."""

    routed_idx: int

    def forward(self, hidden_states: Tensor, *args: Any, routing: RoutedForward | None = None, **kwargs: Any) -> Any:
        if routing is None:
            return super().forward(hidden_states, *args, **kwargs)
        if args:
            raise TypeError("a routed layer takes everything but the hidden states by name.")
        return routing.layer(self.routed_idx, super().forward, hidden_states, kwargs)


@functools.cache
def _mixed(addition: Any, stock: Any) -> Any:
    """Make a subclass under the same name, by which device maps, plans and adapters find modules."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (addition, stock), names)


def make_routable(decoder: Any) -> None:
    """Give a text model and its layers the classes above, in place: parameters and their names stay."""
    check_transformers(decoder)
    decoder.routed_cache_name = cache_name(type(decoder).forward)
    decoder.__class__ = _mixed(_RoutedDecoder, decoder.__class__)
    for layer_idx, layer in enumerate(decoder.layers):
        layer.__class__ = _mixed(_RoutedLayer, layer.__class__)
        layer.routed_idx = layer_idx
