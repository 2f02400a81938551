"""Qwen-VL and Qwen-VL-Chat for today's transformers: the hub's configuration and tensor names, other code.

Written from the paper (arXiv 2308.12966) and the shapes of the published tensors; torch and transformers are all that
it needs. Prompts may have up to `seq_length` tokens, 2,048: what the original does with longer ones (dynamic NTK)
depends on the whole prompt, and is refused. Answers may go on beyond, with log-n attention as in the original.

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

Shapes: B sequences, S tokens, D hidden size, H heads, d head size; N images, P patches, W tower width, Q queries.
"""

from __future__ import annotations

import inspect
import math
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
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb, eager_attention_forward

from .qwen_vl_visual import QWenVisual

# transformers 5.24 renamed it in its outputs, and 5.20 to 5.23 know the old name only.
CACHE = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"
MASK_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class QWenVLConfig(PretrainedConfig):
    """config.json of Qwen-VL as the hub has it: language model at the top, vision tower under `visual`."""

    model_type = "qwen"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        intermediate_size: int = 22016,
        kv_channels: int = 128,
        layer_norm_epsilon: float = 1e-6,
        initializer_range: float = 0.02,
        rotary_emb_base: float = 10000,
        seq_length: int = 2048,
        max_position_embeddings: int = 8192,
        use_dynamic_ntk: bool = True,
        use_logn_attn: bool = True,
        use_cache: bool = True,
        visual: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size  # of both halves of the gated MLP
        self.kv_channels = kv_channels
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.rotary_emb_base = rotary_emb_base
        self.seq_length = seq_length
        self.max_position_embeddings = max_position_embeddings
        self.use_dynamic_ntk = use_dynamic_ntk
        self.use_logn_attn = use_logn_attn
        self.use_cache = use_cache
        self.visual = dict(visual or {})
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.kv_channels

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of a prompt beyond which the original scales its rotary embeddings; None: it never does."""
        return self.seq_length if self.use_dynamic_ntk else None

    @property
    def image_token_id(self) -> int | None:
        """The id that stands for a picture's features, <imgpad>: the second behind <img>."""
        start = self.visual.get("image_start_id")
        return None if start is None else start + 2


# --- the decoder ------------------------------------------------------------------------------------------------------


class QWenAttention(nn.Module):
    """Attention with one matrix for query, key and value, which has a bias; the matrix behind it has none."""

    def __init__(self, config: QWenVLConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.num_key_value_groups = config.kv_channels, 1
        self.scaling = self.head_dim**-0.5
        inner = config.num_attention_heads * config.kv_channels
        self.c_attn = nn.Linear(config.hidden_size, 3 * inner, bias=True)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, ...],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = self.c_attn(hidden_states).chunk(3, -1)
        query, key, value = (part.view(shape).transpose(1, 2) for part in parts)  # [B, H, S, d]
        cos, sin, *log_n = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        for scale in log_n:
            query = query * scale[:, None]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        seen, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )  # [B, S, H, d]
        return self.c_proj(seen.flatten(2)), weights


class QWenMLP(nn.Module):
    """A gated MLP, whose gate is `w2`."""

    def __init__(self, config: QWenVLConfig) -> None:
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.w1(states) * F.silu(self.w2(states)))
        return out


class QWenBlock(nn.Module):
    """A decoder layer."""

    def __init__(self, config: QWenVLConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = Qwen2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = Qwen2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the layer's output, [B, S, D]; position_embeddings are cosine, sine and perhaps factors of queries."""
        seen, _ = self.attn(self.ln_1(hidden_states), position_embeddings, attention_mask, cache=cache, **kwargs)
        hidden_states = hidden_states + seen
        out: Tensor = hidden_states + self.mlp(self.ln_2(hidden_states))
        return out


class QWenPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config_class = QWenVLConfig
    base_model_prefix = "transformer"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = False
    _no_split_modules = ("QWenBlock", "QWenVisualBlock")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class QWenVLModel(QWenPreTrainedModel):
    """Embeddings, vision tower and decoder layers, under the hub's names; `layers` and `norm` are others for them."""

    def __init__(self, config: QWenVLConfig) -> None:
        super().__init__(config)
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = Qwen2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.visual = QWenVisual(config.visual)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("h" if name == "layers" else name, value)

    @property
    def layers(self) -> nn.ModuleList:
        return self.h

    @property
    def norm(self) -> Qwen2RMSNorm:
        return self.ln_f

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def get_decoder(self) -> Any:
        return self

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the pictures' features as `pooler_output`, [N, Q, D]."""
        return BaseModelOutputWithPooling(pooler_output=self.visual(pixel_values))

    def embedded(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        embeds: Tensor | None = None,
        encoded: dict[str, Any] | None = None,
    ) -> Tensor:
        """Return embeddings of token ids, or those given, with the pictures' features in their places: [B, S, D].

        Args:
            encoded: {"image": what `get_image_features` gave} in place of the pixels.
        """
        embeds = self.wte(input_ids) if embeds is None else embeds
        seen = (encoded or {}).get("image")
        if seen is None and pixel_values is not None:
            seen = self.get_image_features(pixel_values)
        return embeds if seen is None else self._with_pictures(input_ids, embeds, seen.pooler_output)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run on token ids, with `pixel_values` where they name pictures, or on embeddings."""
        cache = past_key_values if cache is None else cache
        inputs_embeds = self.embedded(input_ids, kwargs.pop("pixel_values", None), inputs_embeds)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        before = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + before
        self._refuse_long(attention_mask, inputs_embeds.shape[1], before)
        known = {"config": self.config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        mask = create_causal_mask(**known, **{MASK_CACHE: cache}, position_ids=position_ids)
        layer_inputs = {
            "attention_mask": mask,
            "position_embeddings": self._rotary(inputs_embeds, position_ids) + self._log_n(inputs_embeds, position_ids),
            "cache": cache,
            **{name: kwargs[name] for name in ("output_attentions", "routing") if name in kwargs},
        }
        states = inputs_embeds
        for layer in self.h:
            states = layer(states, **layer_inputs)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(states), **{CACHE: cache if use_cache else None})

    def _with_pictures(self, input_ids: Tensor | None, embeds: Tensor, features: Tensor) -> Tensor:
        """Put the pictures' features [N, Q, D] in place of the placeholders' embeddings: [B, S, D]."""
        if input_ids is None:
            raise ValueError("pixel_values need input_ids, which say where the pictures stand.")
        place = input_ids == self.config.image_token_id
        tokens = int(place.sum())
        if tokens != features.shape[0] * features.shape[1]:
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {tokens}, features: "
                f"{features.shape[0] * features.shape[1]}"
            )
        return embeds.masked_scatter(place[..., None], features.to(embeds.device, embeds.dtype))

    def _refuse_long(self, attention_mask: Any, length: int, before: int) -> None:
        """Raise ValueError for a prompt that the original would scale its rotary embeddings for."""
        limit = self.config.longest_prompt
        if before or limit is None or length <= limit:
            return
        real = (
            attention_mask.sum(-1).max() if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else length
        )
        if int(real) > limit:
            raise ValueError(
                f"a prompt of {int(real)} tokens is longer than the {limit} that Qwen-VL was trained with; its scaling "
                "for longer ones is not implemented here. Shorten the prompt, or give fewer pictures."
            )

    def _rotary(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the rotary embedding, [B, S, d] each."""
        size = self.config.kv_channels
        exponents = torch.arange(0, size, 2, device=states.device, dtype=torch.float32) / size
        angles = position_ids[..., None].float() / self.config.rotary_emb_base**exponents
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)

    def _log_n(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Return log-n attention's factors: log_2048 of the position from 1, beyond 2,048: [B, S, 1]; (): all are 1."""
        limit = self.config.seq_length
        if not self.config.use_logn_attn or not bool((position_ids >= limit).any()):
            return ()
        scale = ((position_ids.float() + 1).log() / math.log(limit)).clamp(min=1)
        return (scale[..., None].to(states.dtype),)


class QWenVLForConditionalGeneration(QWenPreTrainedModel, GenerationMixin):
    """Qwen-VL with its head."""

    def __init__(self, config: QWenVLConfig) -> None:
        super().__init__(config)
        self.transformer = QWenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> Any:
        return self.transformer

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
        mm_encoder_outputs: dict[str, Any] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.transformer(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=self.transformer.embedded(input_ids, pixel_values, inputs_embeds, mm_encoder_outputs),
            use_cache=use_cache,
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
