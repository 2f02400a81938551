"""What differs between model families, in two tables. Imports nothing heavy: the command line reads it for messages.

A new family of LVLMs that transformers supports natively is one row of FAMILIES, and a row of DECODERS if its language
model is a new one too. The tests run every invariant on a tiny model of each row (`tests/tiny_models.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Family:
    """One LVLM architecture, by its `model_type`."""

    title: str
    example: str  # a hub id, for messages and documents
    deepstack: bool = False  # visual features are added again after decoder positions 0, 1, 2 ...
    unroutable: str | None = None  # why the model can't run with fewer tokens and layers; None: it can


@dataclass(frozen=True)
class Decoder:
    """One language model architecture, by the `model_type` of the text configuration."""

    attention_norm: str | None = None  # a norm behind the attention inside the block: x + norm(attention(x))
    mlp_norm: str | None = None  # one behind the MLP: x + norm(mlp(x))
    residual_multiplier: str | None = None  # config attribute that scales what a block adds to the residual stream
    down_proj: str = "mlp.down_proj"
    o_proj: str = "self_attn.o_proj"

    @property
    def post_norm(self) -> bool:
        """Return whether norms stand between the output matrices and the residual stream."""
        return self.mlp_norm is not None

    def norm_behind(self, module: str) -> str | None:
        """Return the name of the norm behind an output matrix, if there is one."""
        return {self.down_proj: self.mlp_norm, self.o_proj: self.attention_norm}.get(module)


FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA 1.5, Pixtral", "llava-hf/llava-1.5-7b-hf"),
    "llava_next": Family("LLaVA-NeXT", "llava-hf/llava-v1.6-mistral-7b-hf"),
    "llava_onevision": Family("LLaVA-OneVision", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    "qwen2_vl": Family("Qwen2-VL", "Qwen/Qwen2-VL-7B-Instruct"),
    "qwen2_5_vl": Family("Qwen2.5-VL", "Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen3_vl": Family("Qwen3-VL", "Qwen/Qwen3-VL-8B-Instruct", deepstack=True),
    "internvl": Family("InternVL 2.5 / 3", "OpenGVLab/InternVL3-8B-hf"),
    "idefics3": Family("Idefics3", "HuggingFaceM4/Idefics3-8B-Llama3"),
    "smolvlm": Family("SmolVLM 2", "HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
    "paligemma": Family("PaliGemma", "google/paligemma-3b-mix-224"),
    "gemma3": Family("Gemma 3", "google/gemma-3-4b-it"),
    "mistral3": Family("Mistral Small 3.1", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
    "glm4v": Family("GLM-4.1V", "zai-org/GLM-4.1V-9B-Thinking"),
}

DECODERS: dict[str, Decoder] = {
    "llama": Decoder(),
    "mistral": Decoder(),
    "qwen2": Decoder(),
    "qwen3": Decoder(),
    "qwen2_vl_text": Decoder(),
    "qwen2_5_vl_text": Decoder(),
    "qwen3_vl_text": Decoder(),
    "gemma": Decoder(),
    "gemma2": Decoder("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": Decoder("post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4v_text": Decoder("post_self_attn_layernorm", "post_mlp_layernorm"),
    "granite": Decoder(residual_multiplier="residual_multiplier"),
}

# --- the text configuration's per-layer entries: how dropping layers changes each ------------------------------------

PER_LAYER_LISTS = (  # one entry a layer: keep the entries of the kept layers
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "attention_types",
    "activation_sparsity_pattern",
)
PERIODIC_LISTS = ("layer_types", "no_rope_layers", "attention_types")  # those that other programs may take for periodic
LAYER_INDEX_LISTS = ("moe_layers", "mlp_only_layers", "cross_attention_layers")  # indices of layers: renumber
LAYER_COUNTS = ("max_window_layers", "first_k_dense_replace")  # "the first n layers": count the kept among them
MEANINGLESS_IF = {  # periodic or shared structure that a gap would shift: refused unless trivial
    "decoder_sparse_step": (None, 0, 1),
    "num_kv_shared_layers": (None, 0),
}


def family_of(config: Any) -> Family:
    """Return the family of a loaded transformers configuration, or an InputError that says what is missing."""
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise InputError(
            f"model_type '{model_type}' is not a family that this version can compress; it can: "
            f"{', '.join(FAMILIES)}. A new one is a row of FAMILIES in exporter/families.py."
        )
    decoder_of(config)
    return FAMILIES[model_type]


def decoder_of(config: Any) -> Decoder:
    """Return the language model's row, or an InputError that says what is missing."""
    text_type = config.get_text_config().model_type
    if text_type not in DECODERS:
        raise InputError(
            f"the language model of this {config.model_type} is a '{text_type}', which this version does not know; "
            f"it knows: {', '.join(DECODERS)}. A new one is a row of DECODERS in exporter/families.py."
        )
    return DECODERS[text_type]


def protected_layers(config: Any) -> tuple[int, ...]:
    """Return layers that may not go by default: those after which Qwen3-VL adds deepstack features, by position."""
    if FAMILIES[config.model_type].deepstack:
        return tuple(range(len(config.vision_config.deepstack_visual_indexes)))
    return ()


def visual_token_ids(config: Any) -> tuple[int, ...]:
    """Placeholder ids that image and video features replace in the prompt."""
    ids = (getattr(config, "image_token_id", None), getattr(config, "video_token_id", None))
    return tuple(i for i in ids if i is not None)
