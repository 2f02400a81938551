"""Embeddings and the language model with its cache, as modules that trace into graphs.

One decoder graph serves the prompt and every token after it; prompts come first and in one pass. What a graph attends
with depends on its cache (`support.cache_kind`):

- shared: ONNX Runtime's GroupQueryAttention, written into the graph directly, with cache buffers that it fills in
  place. There is no mask: sequences are padded on the right, and each says how many tokens it has.
- growing: transformers' own attention, with a mask made here from the padding (left or right) and from the numbers of
  blocks of tokens that see each other both ways. Keys and values come back longer.

Shapes: B sequences, S tokens of this pass, P entries of the cache before it, T = P + S, Q/K heads of queries and keys,
E head size, D hidden size, V vocabulary, F visual features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from ...families import visual_token_ids
from ...modeling.routed_api import cache_name
from ...probe.stack import find_decoder, logits_of
from ...probe.writes import adding
from ..rows import Support

ATTENTION = "lvlm_exporter_group_query"
Samples = dict[str, Any]
Present = dict[int, tuple[Tensor, Tensor]]  # keys and values by layer


class Embeddings(nn.Module):
    """Token ids to what enters the decoder; features stand where the image tokens are, in order.

    Where features are added after layers, too, each set of them is a hidden size more behind the embedding, 0 at text;
    so are the marks that say which tokens are features, where they are wanted.
    """

    def __init__(self, model: Any, extra_features: int = 0, marks: int = 0) -> None:
        super().__init__()
        self.embed = model.get_input_embeddings()
        self.image_token_id = visual_token_ids(model.config)[0]
        self.hidden_size = model.config.get_text_config().hidden_size * (1 + extra_features) + marks
        self.extra_features = extra_features + marks

    def forward(self, input_ids: Tensor, image_features: Tensor) -> dict[str, Tensor]:
        """Embed token ids [B, S] with image features [F, D] at their places: [B, S, D]."""
        visual = input_ids == self.image_token_id
        states = self.embed(input_ids.masked_fill(visual, 0))  # its id may lie beyond the vocabulary
        if self.extra_features:
            states = F.pad(states, (0, self.hidden_size - states.shape[-1]))
        spare = torch.zeros_like(image_features[:0].sum(0))[None]  # so that a prompt without images has a row to read
        table = torch.cat([image_features, spare])
        order = (visual.flatten().long().cumsum(0) - 1).clamp(min=0).view_as(input_ids)  # [B, S]
        return {"inputs_embeds": torch.where(visual[..., None], F.embedding(order, table), states)}

    def samples(self) -> Samples:
        ids = torch.full((2, 5), 1)
        ids[:, 1:4] = self.image_token_id
        return {"input_ids": ids, "image_features": torch.rand(7, self.hidden_size)}

    def dynamic(self) -> Samples:
        dim = torch.export.Dim
        return {"input_ids": {0: dim("batch"), 1: dim("sequence")}, "image_features": {0: dim("features")}}


class DecoderGraph(nn.Module):
    """The code that both kinds share: a language model on embeddings, the last token's logits, keys and values."""

    def __init__(self, model: Any, support: Support) -> None:
        super().__init__()
        self.language_model, self.head = language_model(model), model.get_output_embeddings()
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.own_logits: Any = None if support.pictures is None else functools.partial(logits_of, model)
        self.support, self.dtype = support, model.dtype
        self.shape = cache_shape(model)
        self.cache_name = cache_name(self.language_model.forward)
        self.step: Any = None  # what attention reads and writes while a pass is traced

    def run(self, embeds: Tensor, position_ids: Tensor, step: Any, mask: Any) -> Tensor:
        size = self.language_model.config.hidden_size
        added = torch.split(embeds[..., size:], size, -1) if self.support.adds_after else ()
        with adding(self.language_model.layers, dict(zip(self.support.adds_after, added, strict=True))):
            output = self.language_model(
                inputs_embeds=embeds[..., :size] if added else embeds,
                position_ids=position_ids,
                attention_mask=mask,
                use_cache=True,
                **{self.cache_name: step},
            )
        states: Tensor = output.last_hidden_state
        return states

    def outputs(self, last: Tensor, present: Present) -> dict[str, Tensor]:
        return {"logits": self.logits(last), **named_cache(present)}

    def logits(self, last: Tensor) -> Tensor:
        """Return the logits of last [B, 1, D]: three dimensions make the head a MatMul, which can be quantised."""
        if self.own_logits is not None:
            of_model: Tensor = self.own_logits(last).float()[:, 0]
            return of_model
        logits = self.head(last).float()[:, 0]
        capped: Tensor = self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
        return capped

    def common_samples(self, past: int) -> Samples:
        layers, heads, size = self.shape
        cache = [torch.rand(2, heads, past, size, dtype=self.dtype) for _ in range(2 * layers)]
        positions = torch.arange(5).expand(*((3,) if self.support.mrope else ()), 2, 5).contiguous()
        hidden = self.language_model.config.hidden_size * (1 + len(self.support.adds_after))
        return {"inputs_embeds": torch.rand(2, 5, hidden), "position_ids": positions, "past_key_values": cache}

    def common_dynamic(self, past: Any) -> Samples:
        batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
        axis = 1 if self.support.mrope else 0
        return {
            "inputs_embeds": {0: batch, 1: sequence},
            "position_ids": {axis: batch, axis + 1: sequence},
            "past_key_values": [{0: batch, 2: past}] * (2 * self.shape[0]),
        }


class SharedDecoder(DecoderGraph):
    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        row_lengths: Tensor,
        total_length: Tensor,
        past_key_values: list[Tensor],
    ) -> dict[str, Tensor]:
        """Run a prompt or a step on a cache that is shared with its caller.

        Args:
            inputs_embeds: [B, S, D], sequences padded on the right.
            position_ids: [B, S], or [3, B, S].
            row_lengths: [B] tokens of each sequence, those of this pass included, padding not.
            total_length: [] int32, the longest of them; in the first pass S.
            past_key_values: key and value of each layer, [B, K, P, E] of the full length.
        """
        step = SharedStep(past_key_values, (row_lengths - 1).to(torch.int32), total_length)
        with step:
            states = self.run(inputs_embeds, position_ids, step, None)  # [B, S, D]
        return self.outputs(last_tokens(states, row_lengths), step.present)

    def samples(self) -> Samples:
        extra = {"row_lengths": torch.tensor([5, 4]), "total_length": torch.tensor(5, dtype=torch.int32)}
        common = self.common_samples(past=11)
        cache = common.pop("past_key_values")
        return {**common, **extra, "past_key_values": cache}

    def dynamic(self) -> Samples:
        common = self.common_dynamic(torch.export.Dim("capacity"))
        cache = common.pop("past_key_values")
        batch = common["inputs_embeds"][0]
        return {**common, "row_lengths": {0: batch}, "total_length": {}, "past_key_values": cache}


class GrowingDecoder(DecoderGraph):
    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        block_ids: Tensor,
        past_key_values: list[Tensor],
    ) -> dict[str, Tensor]:
        """Run a prompt or a step on a cache that grows.

        Args:
            inputs_embeds: [B, S, D], sequences padded on the left.
            position_ids: [B, S], or [3, B, S].
            attention_mask: [B, T] 1 where there is a token, 0 at padding.
            block_ids: [B, S] tokens of one number see each other both ways; -1: only what comes before.
            past_key_values: key and value of each layer, [B, K, P, E].
        """
        step = GrowingStep(past_key_values)
        masks = self.masks(attention_mask.bool(), block_ids.shape[1], block_ids)
        states = self.run(inputs_embeds, position_ids, step, masks)
        return self.outputs(states[:, -1:], step.present)

    def masks(self, real: Tensor, length: int, block_ids: Tensor | None) -> Any:
        """Make additive masks [B, 1, S, T], by layer type where there are several; S is `length`."""
        config = self.language_model.config
        total = real.shape[1]
        keys, queries = torch.arange(total), torch.arange(length) + (total - length)
        distance = queries[:, None] - keys[None]  # [S, T]
        ahead = (distance >= 0)[None]
        if block_ids is not None:
            block = (block_ids[:, :, None] == block_ids[:, None]) & (block_ids >= 0)[:, None]  # [B, S, S]
            ahead = ahead | F.pad(block, (total - length, 0))  # [B, S, T]
        # Padding sees itself, because a row of which nothing is visible is no distribution.
        sees = (ahead & real[:, None]) | (distance == 0)[None]
        if not getattr(config, "sliding_window", None) or not hasattr(config, "layer_types"):
            return self.additive(sees)
        near = (distance < config.sliding_window)[None]
        return {"full_attention": self.additive(sees), "sliding_attention": self.additive(sees & near)}

    def additive(self, sees: Tensor) -> Tensor:
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(sees, dtype=self.dtype).masked_fill(~sees, lowest)[:, None]

    def samples(self) -> Samples:
        common = self.common_samples(past=3)
        cache = common.pop("past_key_values")
        extra = {"attention_mask": torch.ones(2, 8, dtype=torch.long), "block_ids": torch.full((2, 5), -1)}
        return {**common, **extra, "past_key_values": cache}

    def dynamic(self) -> Samples:
        past = torch.export.Dim("past")
        common = self.common_dynamic(past)
        cache = common.pop("past_key_values")
        batch, sequence = common["inputs_embeds"][0], common["inputs_embeds"][1]
        # T is P + S, which sizes say and a named dimension can't.
        extra = {"attention_mask": {0: batch, 1: torch.export.Dim.AUTO}, "block_ids": {0: batch, 1: sequence}}
        return {**common, **extra, "past_key_values": cache}


# --- what the layers meet as their cache ------------------------------------------------------------------------------


class GrowingStep:
    """A cache for one traced pass: appends."""

    def __init__(self, past: list[Tensor], first_layer: int = 0) -> None:
        pairs = zip(past[::2], past[1::2], strict=True)
        self.past: Present = dict(enumerate(pairs, first_layer))
        self.present: Present = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        old_keys, old_values = self.past[layer_idx]
        self.present[layer_idx] = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        return self.present[layer_idx]

    def get_seq_length(self, *_: Any) -> Any:
        return next(iter(self.past.values()))[0].shape[2]


class SharedStep(GrowingStep):
    """A cache for one traced pass: hands new keys on to `group_query`, which has the operator store them."""

    current: SharedStep | None = None

    def __init__(self, past: list[Tensor], last_index: Tensor, total_length: Tensor, first_layer: int = 0) -> None:
        super().__init__(past, first_layer)
        self.last_index, self.total_length = last_index, total_length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def __enter__(self) -> None:
        SharedStep.current = self

    def __exit__(self, *_: object) -> None:
        SharedStep.current = None


def group_query(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Attend as transformers calls it, query [B, Q, S, E], by one GroupQueryAttention node, which stores too."""
    step = SharedStep.current
    assert step is not None and mask is None
    batch, heads, length, size = query.shape
    keys, values = step.past[module.layer_idx]
    flat = [part.transpose(1, 2).flatten(2) for part in (query, key, value)]  # [B, S, heads * E]
    settings: Any = {"num_heads": heads, "kv_num_heads": key.shape[1], "scale": float(options["scaling"])}
    if window := options.get("sliding_window"):
        settings["local_window_size"] = int(window)
    if cap := options.get("softcap"):
        settings["softcap"] = float(cap)
    mixed, new_keys, new_values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*flat, keys, values, step.last_index, step.total_length),
        settings,
        dtypes=(query.dtype,) * 3,
        shapes=([batch, length, heads * size], list(keys.shape), list(values.shape)),
        version=1,
    )
    step.present[module.layer_idx] = new_keys, new_values
    return torch.unflatten(mixed, -1, (heads, size)), None


@contextmanager
def group_query_attention(module: DecoderGraph) -> Iterator[None]:
    """Let the language model attend with `group_query` inside the block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, group_query)
    config = module.language_model.config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def last_tokens(states: Tensor, row_lengths: Tensor) -> Tensor:
    """Return the states of each sequence's last token, of a prompt padded on the right or of one token: [B, 1, D]."""
    last = (row_lengths - 1).clamp(max=states.shape[1] - 1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))


def named_cache(present: Present) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for layer_idx, (keys, values) in sorted(present.items()):
        named |= {f"present.{layer_idx}.key": keys, f"present.{layer_idx}.value": values}
    return named


def language_model(model: Any) -> Any:
    """Return the module that takes embeddings and holds the decoder's layers."""
    return find_decoder(model)


def cache_shape(model: Any) -> tuple[int, int, int]:
    """Return layers, heads of keys, head size; InputError if they differ between layers."""
    layers = language_model(model).layers
    attentions: list[Any] = [getattr(layer, "self_attn", None) for layer in layers]
    if not all(hasattr(module, "k_proj") and hasattr(module, "head_dim") for module in attentions):
        return len(layers), *stated_heads(model.config.get_text_config())
    shapes = {(module.k_proj.out_features // module.head_dim, module.head_dim) for module in attentions}
    if len(shapes) != 1:
        raise InputError(f"the layers of this model keep keys of different shapes ({sorted(shapes)}): not exported.")
    return len(attentions), *shapes.pop()


def stated_heads(text: Any) -> tuple[int, int]:
    """Return heads of keys and their size, as a language model's configuration says."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
