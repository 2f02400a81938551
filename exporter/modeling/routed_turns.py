"""Turns of a conversation in which tokens that left for one question can come back for the next: `reversible=True`.

The states that enter the layer where the router reads depend on no later text and on no route, since the layers before
it run on all tokens of every turn. They are kept aside, beside the cache. When the next turn begins, its tokens alone
pass those layers; the router then scores all visual tokens of the conversation by the new question, and the layers from
there on run anew over what it keeps. So the answer is that of the whole conversation routed afresh; what is saved is
the vision tower and the layers before the router.

Shapes: B sequences, S tokens of a pass, T tokens of the whole text, N visual tokens of all sequences, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .routed_api import StaticCache, cache_in, cache_name, logger, unsupported
from .routed_cache import Entries
from .routed_request import Request
from .routed_route import Budget, Route

BOTH_WAYS = ("paligemma",)  # types whose prompt sees what follows in it: only embeddings do not depend on later text
DRAFTING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # options of `generate`


# --- what is kept aside -----------------------------------------------------------------------------------------------


@dataclass
class PassedTokens:
    """What is kept aside of a pass, or of several one after the other."""

    visual: Tensor  # [B, S]
    coordinates: Tensor  # [B, S, 3]
    types: Tensor  # [B, S] token types, by which some models make masks
    positions: Any = None  # Tensor [S], [B or 1, S] or [C, B or 1, S], as the decoder is given them
    states: Any = None  # Tensor [B, S, D] that enters layer `hold_at`
    features: list[Tensor] = field(default_factory=list)  # [N, D] that layers from `hold_at` on add at visual tokens

    @property
    def num_bytes(self) -> int:
        tensors = (self.visual, self.coordinates, self.types, self.positions, self.states, *self.features)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: Any) -> PassedTokens:
        return PassedTokens(
            self.visual.to(device),
            self.coordinates.to(device),
            self.types.to(device),
            positions=self.positions.to(device),
            states=self.states.to(device),
            features=[feature.to(device) for feature in self.features],
        )


def joined(passes: list[PassedTokens]) -> PassedTokens:
    """Join passes of the same sequences, one after the other."""
    number, states = max(len(passed.features) for passed in passes), torch.cat([passed.states for passed in passes], 1)
    visuals = [passed.visual for passed in passes]
    layers = [[passed.features[i] if passed.features else None for passed in passes] for i in range(number)]
    return PassedTokens(
        torch.cat(visuals, 1),
        torch.cat([passed.coordinates for passed in passes], 1),
        torch.cat([passed.types for passed in passes], 1),
        positions=joined_positions([passed.positions for passed in passes], len(visuals[0])),
        states=states,
        features=[joined_features(visuals, features, like=states) for features in layers],
    )


def joined_positions(positions: list[Tensor], num_sequences: int) -> Tensor:
    """Join position ids along the text: [B, T], or [C, B, T] with as many coordinates as any of them has."""
    most = max(part.shape[0] if part.ndim == 3 else 0 for part in positions)
    alike = []
    for part in positions:
        part = part.expand(*part.shape[:-2], num_sequences, part.shape[-1])
        if most:
            part = part if part.ndim == 3 else part[None]
            part = torch.cat([part[:1].expand(most - len(part), -1, -1), part])  # the text's own comes first
        alike.append(part)
    return torch.cat(alike, -1)


def joined_features(visuals: list[Tensor], features: list[Tensor | None], like: Tensor) -> Tensor:
    """Join what a layer adds at visual tokens, in the order of the sequences: [N, D]. None adds nothing.

    Args:
        visuals: [B, S] of each pass, True at visual tokens.
        like: [B, T, D] of the dtype and on the device that they are to have.
    """
    parts = []
    for visual, feature in zip(visuals, features, strict=True):
        part = like.new_zeros(*visual.shape, like.shape[-1])
        if feature is not None:
            part[visual] = feature.to(part)
        parts.append(part)
    return torch.cat(parts, 1)[torch.cat(visuals, 1)]


@dataclass
class Aside:
    """What a conversation keeps aside, of all its passes."""

    hold_at: int
    device: str | None = None  # where it lies; None: where it was computed
    most_bytes: int | None = None
    passes: list[PassedTokens] = field(default_factory=list)
    num_bytes: int = 0
    lost: str = ""  # why it is kept no longer

    def add(self, passed: PassedTokens) -> None:
        """Keep what a pass left, unless all of it together is more than may be kept."""
        if self.lost:
            return
        self.passes.append(passed if self.device is None else passed.to(self.device))
        self.num_bytes += passed.num_bytes
        if self.most_bytes is not None and self.num_bytes > self.most_bytes:
            logger.warning_once(
                f"what this conversation keeps aside has grown to {self.num_bytes} bytes, above aside_bytes="
                f"{self.most_bytes}, and is let go: it goes on with its route, and tokens that left cannot come back."
            )
            self.let_go(f"they grew beyond aside_bytes={self.most_bytes}")

    def let_go(self, reason: str) -> None:
        self.passes, self.num_bytes, self.lost = [], 0, reason

    def joined(self) -> PassedTokens:
        """Return all passes as one, and keep them as one, where the last of them lies: turns may differ in that."""
        device = self.passes[-1].states.device
        self.passes = [joined([passed.to(device) for passed in self.passes])]
        self.num_bytes = self.passes[0].num_bytes
        return self.passes[0]


# --- a pass -----------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """The part of a pass in its conversation: what it leaves aside, and what it takes from there.

    Where `again` is true, the whole text is routed anew. The decoder is given all of it then, and layers before
    `hold_at` run on the new tokens alone: what precedes them there is zero until `hold` puts the states in its place.
    """

    aside: Aside
    again: bool
    past: int  # tokens of earlier passes
    model: Any
    attention_mask: Any  # Tensor [B, T] or None, as the model was given it
    types: Any  # Tensor [B, S or T] or None, likewise
    passed: Any = None  # PassedTokens: of this pass
    before: Any = None  # PassedTokens: of earlier passes, where the text is routed anew
    entries: dict[int | None, Entries] = field(default_factory=dict)  # by window, in layers before `hold_at`, before it

    @property
    def hold_at(self) -> int:
        return self.aside.hold_at

    def is_early(self, layer_idx: int) -> bool:
        """Tell whether a layer runs on the new tokens alone of a text that is routed anew."""
        return self.again and layer_idx < self.hold_at

    def see(self, request: Request, tokens: Tensor) -> None:
        """Note where this pass has visual tokens; if the text is routed anew, give the request those of all of it.

        Args:
            tokens: [B, S] or [B, S, D], new ones.
        """
        size, device = tokens.shape[:2], tokens.device
        visual, coordinates = request.visual, request.coordinates
        if visual is None:
            visual, coordinates = torch.zeros(size, device=device).bool(), torch.zeros(*size, 3, device=device)
        types = torch.zeros(size, dtype=torch.long, device=device) if self.types is None else self.types[:, -size[1] :]
        self.passed = PassedTokens(visual, coordinates, types)
        if self.past and (self.again or request.visual is not None):
            before = self.aside.joined().to(device)
            earlier = torch.where(before.visual, before.coordinates[..., 0], -1).amax(1) + 1  # [B] images
            self.passed.coordinates = coordinates + F.pad((earlier[:, None] * visual)[..., None], (0, 2))
            self.before = before if self.again else None
        if self.again:
            visual = torch.cat([self.before.visual, visual], 1)
            coordinates = torch.cat([self.before.coordinates, self.passed.coordinates], 1)
        if self.again or not self.past:
            request.visual, request.coordinates = visual, coordinates

    def begin(self, decoder: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the decoder's inputs: of the whole text if it is routed anew, with the cache ready for that."""
        embeddings, positions = inputs["inputs_embeds"], inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(self.past, self.past + embeddings.shape[1], device=embeddings.device)
        features = inputs.get("deepstack_visual_embeds") or []
        self.passed.positions = positions
        self.passed.features = [feature.detach() for feature in features[self.hold_at :]]
        mask = inputs.get("attention_mask")
        if self.again:
            embeddings = F.pad(embeddings, (0, 0, self.past, 0))
            if isinstance(mask, dict) or (mask is not None and mask.ndim == 4):  # made by the model, for the new tokens
                mask = self._masks(embeddings)
        if not self.hold_at:
            embeddings = self.hold(embeddings)
        if not self.again:
            return inputs
        whole = {
            **inputs,
            "inputs_embeds": embeddings,
            "attention_mask": mask,
            "position_ids": joined_positions([self.before.positions.to(positions.device), positions], len(embeddings)),
            **self._deepstack(embeddings, features),
        }
        if "modality" in inputs:  # mPLUG-Owl2's: a decoder's weights go by which tokens are visual
            whole["modality"] = torch.cat([self.before.visual, self.passed.visual], 1)[..., None]
        cache = inputs[decoder.routed_cache_name]
        self.entries = {window: entries for (_, window), entries in cache.rewind(self.hold_at).items()}
        return whole

    def _deepstack(self, embeddings: Tensor, features: list[Tensor]) -> dict[str, Any]:
        """Return visual features of the whole text; layers before `hold_at` add nothing to earlier tokens."""
        before = self.before
        number = max(len(features), self.hold_at + len(before.features)) if features or before.features else 0
        if not number:
            return {}
        earlier = ([None] * self.hold_at + before.features + [None] * number)[:number]
        new = (features + [None] * number)[:number]
        visuals = [before.visual, self.passed.visual]
        pairs = zip(earlier, new, strict=True)
        return {
            "visual_pos_masks": torch.cat(visuals, 1),
            "deepstack_visual_embeds": [joined_features(visuals, list(pair), like=embeddings) for pair in pairs],
        }

    def _masks(self, embeddings: Tensor) -> Any:
        """Make the masks of the whole text, in models that make them themselves, as image tokens see each other."""
        make = getattr(self.model, "create_masks_for_generate", None)
        if make is None:
            raise RuntimeError(unsupported(f"{type(self.model).__name__} has no create_masks_for_generate"))
        return make(
            config=self.model.config,
            inputs_embeds=embeddings,
            attention_mask=self.attention_mask,
            position_ids=None,
            token_type_ids=self._whole_types(),
            is_first_iteration=True,
            **{cache_name(make): None},
        )

    def _whole_types(self) -> Any:
        if self.types is not None and self.types.shape[1] == self.past + self.passed.types.shape[1]:
            return self.types
        return torch.cat([self.before.types, self.passed.types], 1)

    def hold(self, states: Tensor) -> Tensor:
        """Leave the states of this pass aside; put those of earlier ones in their place if the text is routed anew."""
        new = states[:, self.past :] if self.again else states
        self.passed.states = new.detach()
        self.aside.add(self.passed)
        return torch.cat([self.before.states.to(new.device), new], 1) if self.again else states


# --- checks -----------------------------------------------------------------------------------------------------------


def turn_of(
    model: Any, named: dict[str, Any], budget: Budget, reversible: Any, aside_bytes: Any, imposed: Route | None
) -> Turn | None:
    """Return the part of a pass in a reversible conversation; None: it is in none.

    Args:
        named: the model's inputs.
    """
    cache, tokens = cache_in(named), named.get("input_ids")
    tokens = named["inputs_embeds"] if tokens is None else tokens
    aside: Any = getattr(cache, "aside", None)
    decoding = cache is not None and tokens.shape[1] == 1
    if not decoding:
        check_kept(reversible, aside_bytes)
    if reversible and not decoding:
        check_cache(cache, aside)
        check_call(model, named, budget, imposed)
        aside = aside or Aside(0 if model.config.model_type in BOTH_WAYS else model.router_settings.read_at)
        aside.device, aside.most_bytes = None if reversible is True else reversible, aside_bytes
    if aside is None or aside.lost:
        return None
    past = 0 if cache is None else int(cache.get_seq_length())
    mask, types = named.get("attention_mask"), named.get("token_type_ids")
    again = bool(reversible) and past > 0 and not decoding
    return Turn(aside, again, past=past, model=model, attention_mask=mask, types=types)


def check_kept(reversible: Any, aside_bytes: Any) -> None:
    if not isinstance(reversible, bool) and reversible != "cpu":
        raise ValueError(
            f"reversible={reversible!r} is neither True, which keeps what left on the model's device, nor 'cpu'."
        )
    if aside_bytes is None:
        return
    if isinstance(aside_bytes, bool) or not isinstance(aside_bytes, int) or aside_bytes < 1:
        raise ValueError(f"aside_bytes={aside_bytes!r} is no number of bytes: give 2**30 for one GiB.")
    if not reversible:
        raise ValueError(
            f"aside_bytes={aside_bytes} bounds what reversible=True keeps aside: give both of them, or neither."
        )


def check_call(model: Any, named: dict[str, Any], budget: Budget, imposed: Route | None) -> None:
    """Refuse what a conversation cannot be routed anew under."""
    if imposed is not None:
        raise ValueError(
            "reversible=True asks the router in each turn, and route= is given in its place: leave one out."
        )
    if budget.is_off:
        raise ValueError(
            "reversible=True brings back what left under a budget, and this call runs under none: name one, such as "
            "keep_visual_tokens=1.0 to bring back all visual tokens, or leave reversible out."
        )
    if named.get("labels") is not None or (model.training and model.is_gradient_checkpointing):
        raise ValueError(
            "reversible=True is for answering: leave labels out, and call model.eval() if gradient checkpointing is on."
        )
    use_cache = named.get("use_cache")
    if not (model.config.get_text_config().use_cache if use_cache is None else use_cache):
        raise ValueError("reversible=True continues a cache, and use_cache is False: set it to True.")
    if (mask := named.get("attention_mask")) is not None and getattr(mask, "ndim", 0) != 2:
        raise ValueError(
            "reversible=True makes the masks of earlier turns again: give attention_mask as [B, T] for the whole text, "
            "with 1 at tokens and 0 at padding."
        )


def check_cache(cache: Any, aside: Any) -> None:
    """Refuse a cache that a reversible conversation cannot begin with or go on from."""
    if isinstance(cache, StaticCache):
        raise ValueError("reversible=True fills the later layers of a cache anew in each turn: use a dynamic cache.")
    reason = "an earlier turn did not say reversible=True" if aside is None else aside.lost
    if reason and cache is not None and cache.get_seq_length():
        raise ValueError(
            f"reversible=True needs the states of all earlier turns, which this cache does not have: {reason}. Begin "
            "with a new cache and say reversible=True from the first turn on."
        )


def check_generation(settings: Any, options: dict[str, Any]) -> None:
    """Refuse to generate several texts from one cache, or to take tokens back.

    Args:
        settings: the GenerationConfig, in which options count for more.
    """
    names = [name for name in DRAFTING if options.get(name, getattr(settings, name, None)) is not None]
    if (options.get("num_beams", settings.num_beams) or 1) > 1:
        names.append("num_beams")
    if names:
        raise ValueError(
            f"reversible=True keeps aside the states of one text, and {names[0]} tries others: leave one of them out."
        )
