"""mPLUG-Owl2 for today's transformers: the hub's configuration and tensor names, other code.

Written from the paper (arXiv 2311.04257) and the shapes of the published tensors; torch and transformers are all that
it needs. The decoder is Llama's, but for norms and for matrices of keys and values that exist twice in each layer: one
for text, one for pictures. Which one is meant is told to every layer for each token, as `modality`. What is generated
is text, and a prompt without pictures is nothing but text.

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

Shapes: B sequences, S tokens, D hidden size, H heads, d head size; N images, Q features of an image.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from .mplug_owl2_visual import MPLUGOwl2Abstractor, MPLUGOwl2VisionModel

# transformers 5.24 renamed it in its outputs, and 5.20 to 5.23 know the old name only.
CACHE = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"
MASK_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class MPLUGOwl2Config(PretrainedConfig):
    """config.json of mPLUG-Owl2 as the hub has it: language model at the top, tower and abstractor in visual_config."""

    model_type = "mplug_owl2"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        use_cache: bool = True,
        image_token_index: int | None = None,
        visual_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.use_cache = use_cache
        # The id that stands for a picture's features. It has no embedding, as none is asked for: transformers warns of
        # a "token_id" like that, and not of an index.
        self.image_token_index = vocab_size if image_token_index is None else image_token_index
        self.visual_config = dict(visual_config or {})
        if kwargs.pop("rope_scaling", None):  # null on the hub; transformers warns of the name
            raise ValueError("mPLUG-Owl2's rotary embeddings are not scaled: take rope_scaling out of config.json.")
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def image_token_id(self) -> int:
        return self.image_token_index

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# --- the decoder ------------------------------------------------------------------------------------------------------


class Multiway(nn.Module):
    """Two modules of one kind, the first for text and the second for pictures."""

    def __init__(self, text: nn.Module, picture: nn.Module) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([text, picture])

    def forward(self, states: Tensor, modality: Tensor | None) -> Tensor:
        """Return each token [B, S, D] through its own: modality [B, S, 1] is True at pictures, None where all is text.

        Both run on all tokens: what is chosen among then needs no look at the values, which would stall a GPU.
        """
        text: Tensor = self.multiway[0](states)
        return text if modality is None else torch.where(modality, self.multiway[1](states), text)


class MPLUGOwl2Attention(nn.Module):
    """Attention whose keys and values are made by matrices of their own for pictures."""

    def __init__(self, config: MPLUGOwl2Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width, inner = config.hidden_size, config.num_attention_heads * self.head_dim
        kept = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = Multiway(nn.Linear(width, kept, bias=False), nn.Linear(width, kept, bias=False))
        self.v_proj = Multiway(nn.Linear(width, kept, bias=False), nn.Linear(width, kept, bias=False))
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        modality: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = (self.q_proj(hidden_states), self.k_proj(hidden_states, modality), self.v_proj(hidden_states, modality))
        query, key, value = (part.view(shape).transpose(1, 2) for part in parts)  # [B, H, S, d]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        seen, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )  # [B, S, H, d]
        return self.o_proj(seen.flatten(2)), weights


class MPLUGOwl2MLP(nn.Module):
    """Llama's gated MLP, the same for text and pictures."""

    def __init__(self, config: MPLUGOwl2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))
        return out


class MPLUGOwl2DecoderLayer(nn.Module):
    """A decoder layer."""

    def __init__(self, config: MPLUGOwl2Config, layer_idx: int) -> None:
        super().__init__()

        def norm() -> Multiway:
            size, eps = config.hidden_size, config.rms_norm_eps
            return Multiway(LlamaRMSNorm(size, eps=eps), LlamaRMSNorm(size, eps=eps))

        self.input_layernorm = norm()
        self.self_attn = MPLUGOwl2Attention(config, layer_idx)
        self.post_attention_layernorm = norm()
        self.mlp = MPLUGOwl2MLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        cache: Any = None,
        modality: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the layer's output, [B, S, D]; modality [B, S, 1] is True at pictures' tokens, None without any."""
        normed = self.input_layernorm(hidden_states, modality)
        seen, _ = self.self_attn(normed, position_embeddings, attention_mask, cache=cache, modality=modality, **kwargs)
        hidden_states = hidden_states + seen
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, modality))
        return out


class MPLUGOwl2PreTrainedModel(PreTrainedModel):
    """What both models share."""

    config_class = MPLUGOwl2Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = False
    _no_split_modules = ("MPLUGOwl2DecoderLayer", "MPLUGOwl2VisionLayer", "MPLUGOwl2AbstractorLayer")
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq$",)  # computed here
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class MPLUGOwl2Model(MPLUGOwl2PreTrainedModel):
    """Embeddings, vision tower, abstractor and decoder layers, under the hub's names."""

    def __init__(self, config: MPLUGOwl2Config) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MPLUGOwl2DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.vision_model = MPLUGOwl2VisionModel(config.visual_config["visual_model"])
        self.visual_abstractor = MPLUGOwl2Abstractor(config.visual_config["visual_abstractor"], config.hidden_size)
        self.post_init()

    def get_decoder(self) -> Any:
        return self

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the pictures' features as `pooler_output`, [N, Q, D]."""
        patches = self.vision_model(pixel_values.to(self.vision_model.post_layernorm.weight.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=self.visual_abstractor(patches))

    def embedded(
        self, input_ids: Tensor | None, pixel_values: Tensor | None, encoded: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return embeddings with the pictures' features in their places, [B, S, D], and the modality, [B, S, 1].

        Args:
            encoded: {"image": what `get_image_features` gave} in place of the pixels.
        """
        if input_ids is None:
            raise ValueError("give input_ids or inputs_embeds.")
        place = input_ids == self.config.image_token_id
        seen = (encoded or {}).get("image")
        if seen is None and pixel_values is not None:
            seen = self.get_image_features(pixel_values)
        if seen is None:
            if input_ids.shape[1] > 1 and bool(place.any()):  # a generated token is none, and a look at it would stall
                raise ValueError(f"{int(place.sum())} tokens stand for pictures, and there are no pixel_values.")
            return self.embed_tokens(input_ids), None
        embeds = self.embed_tokens(input_ids.masked_fill(place, 0))
        features = seen.pooler_output  # [N, Q, D]
        tokens = int(place.sum())
        if tokens != features.shape[0] * features.shape[1]:
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {tokens}, features: "
                f"{features.shape[0] * features.shape[1]}"
            )
        modality = place[..., None]
        return embeds.masked_scatter(modality, features.to(embeds.device, embeds.dtype)), modality

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        modality: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run on token ids, with `pixel_values` where they name pictures, or on embeddings with their modality.

        Args:
            inputs_embeds: [B, S, D] in place of ids and pictures; modality: [B, S, 1] of these, None: all is text.
        """
        cache = past_key_values if cache is None else cache
        pixel_values = kwargs.pop("pixel_values", None)
        if inputs_embeds is None:
            inputs_embeds, modality = self.embedded(input_ids, pixel_values)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        before = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + before
        known = {"config": self.config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        mask = create_causal_mask(**known, **{MASK_CACHE: cache}, position_ids=position_ids)
        layer_inputs = {
            "attention_mask": mask,
            "position_embeddings": self._rotary(inputs_embeds, position_ids),
            "cache": cache,
            "modality": modality,
            **{name: kwargs[name] for name in ("output_attentions", "routing") if name in kwargs},
        }
        states = inputs_embeds
        for layer in self.layers:
            states = layer(states, **layer_inputs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states), **{CACHE: cache if use_cache else None})

    def _rotary(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the rotary embedding, [B, S, d] each."""
        size = self.config.head_dim
        exponents = torch.arange(0, size, 2, device=states.device, dtype=torch.float32) / size
        angles = position_ids[..., None].float() / self.config.rope_theta**exponents
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)


class MPLUGOwl2ForConditionalGeneration(MPLUGOwl2PreTrainedModel, GenerationMixin):
    """mPLUG-Owl2 with its head."""

    def __init__(self, config: MPLUGOwl2Config) -> None:
        super().__init__(config)
        self.model = MPLUGOwl2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> Any:
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        modality: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds, modality = self.model.embedded(input_ids, pixel_values, mm_encoder_outputs)
        elif pixel_values is not None:
            raise ValueError("pixel_values need input_ids, which say where the pictures stand.")
        out = self.model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            modality=modality,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: out.get(CACHE)})

    def prepare_inputs_for_generation(self, input_ids: Tensor, pixel_values: Any = None, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        inputs["pixel_values"] = pixel_values if first else None  # later steps have them in the cache
        return inputs
