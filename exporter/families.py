"""The differences between model families, in two tables. Imports nothing heavy: the command line reads it for messages.

A new family of LVLMs that transformers supports natively is one row of FAMILIES, and a row of DECODERS if its language
model is a new one too. The tests run every invariant on a tiny model of each row (`tests/tiny_models.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One LVLM architecture, by its `model_type`."""

    title: str
    example: str  # a hub id, for messages and documents
    deepstack: bool = False  # visual features are added again after decoder positions 0, 1, 2 ...
    unroutable: str | None = None  # why the model can't run with fewer tokens and layers; None: it can, or a probe says


@dataclass(frozen=True)
class Decoder:
    """One language model architecture, by the `model_type` of the text configuration."""

    attention_norm: str | None = None  # a norm behind the attention inside the block: x + norm(attention(x))
    mlp_norm: str | None = None  # one behind the MLP: x + norm(mlp(x))
    residual_multiplier: str | None = None  # config attribute that scales what a block adds to the residual stream
    down_proj: str = "mlp.down_proj"
    o_proj: str = "self_attn.o_proj"
    maps: tuple[tuple[str | None, str | None], ...] = ()  # o_proj and down_proj of each layer, where a probe found them
    factor: float | None = None  # of what a block adds, as a probe measured it
    unfoldable: str | None = None  # why no fold is exact: the rest of 'in this family'

    def o_proj_of(self, layer: int) -> str | None:
        """Return the map by which a layer's attention, or its substitute, writes; None where none does directly."""
        return self.maps[layer][0] if self.maps else self.o_proj

    def down_proj_of(self, layer: int) -> str | None:
        """Return the map by which a layer's feed-forward part writes; None where none does directly."""
        return self.maps[layer][1] if self.maps else self.down_proj

    def maps_of(self, layer: int, kinds: Sequence[str]) -> list[str]:
        """Return the names inside a layer of its maps of some kinds, 'o_proj' and 'down_proj', in running order.

        A layer that has none of a kind is left without.
        """
        paths = {"o_proj": self.o_proj_of(layer), "down_proj": self.down_proj_of(layer)}
        return [name for kind, name in paths.items() if kind in kinds and name is not None]

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

OWN_FAMILIES: dict[str, Family] = {  # types that transformers lacks, which run by a modeling file of this package
    "qwen": Family("Qwen-VL", "Qwen/Qwen-VL-Chat"),
    "mplug_owl2": Family("mPLUG-Owl2", "MAGAer13/mplug-owl2-llama2-7b"),
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
    "qwen": Decoder(down_proj="mlp.c_proj", o_proj="attn.c_proj"),
    "mplug_owl2": Decoder(),
    "granite": Decoder(residual_multiplier="residual_multiplier"),
}

# --- the text configuration's per-layer entries: how dropping layers changes each ------------------------------------

PER_LAYER_LISTS = (  # one entry a layer: keep the entries of the kept layers
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "attention_types",
    "activation_sparsity_pattern",
    "layers_block_type",
    "indexer_types",
    "layer_rope_theta",
    "rope_scaling_layers",
)
PERIODIC_LISTS = ("layer_types", "no_rope_layers", "attention_types")  # those that other programs may take for periodic
LAYER_INDEX_LISTS = (
    "moe_layers",
    "mlp_only_layers",
    "cross_attention_layers",
    "full_attn_idxs",
    "ple_layer_ids",
)  # indices of layers: renumber
LAYER_COUNTS = ("max_window_layers", "first_k_dense_replace")  # "the first n layers": count the kept among them
LAST_COUNTS = ("num_kv_shared_layers",)  # "the last n layers"
LAYER_MAPS = ("per_layer_config",)  # by the layer's index: renumber
LAYER_SOURCES = ("kv_source_layers",)  # one entry a layer, which is the index of another: slice and renumber
PER_LAYER_TENSORS = {  # that hold a part for each layer, along which axis
    "embed_tokens_per_layer.weight": 1,
    "per_layer_model_projection.weight": 0,
}
MEANINGLESS_IF = {  # periodic or shared structure that a gap would shift: refused unless trivial
    "decoder_sparse_step": (None, 0, 1),
}


def is_listed(config: Any) -> bool:
    """Tell whether the tables have a row for both parts of a loaded transformers configuration; others are probed."""
    return config.model_type in FAMILIES and config.get_text_config().model_type in DECODERS


def family_of(config: Any) -> Family:
    """Return the family of a loaded configuration: its row, or one that says what a probe can't know."""
    if config.model_type in OWN_FAMILIES:
        return OWN_FAMILIES[config.model_type]
    if not is_listed(config):
        row = FAMILIES.get(config.model_type)
        example = row.example if row else ""
        return Family(row.title if row else config.model_type, example, bool(row and row.deepstack))
    return FAMILIES[config.model_type]


def protected_layers(config: Any) -> tuple[int, ...]:
    """Return the layers that may not go by default: those after which Qwen3-VL adds deepstack features, by position."""
    text = config.get_text_config()
    protected = set(range(len(_deepstack_indexes(config)))) | leaned_on(text) | _forced(text)
    protected |= {layer for _, layer in getattr(config, "deepstack_layer_map", None) or ()}  # Granite Vision 4
    return tuple(sorted(layer for layer in protected if layer < text.num_hidden_layers))


def _deepstack_indexes(config: Any) -> list[int]:
    """Return the layers of the vision tower whose features enter the decoder after its first layers, in that order."""
    indexes = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
    return list(indexes or [])


def _forced(text: Any) -> set[int]:
    """Return the last layer where the configuration class dictates its kind: Gemma 4's sees everything."""
    types = list(getattr(text, "layer_types", None) or ())
    other = next((kind for kind in types if kind != types[-1]), None)
    if other is None:
        return set()
    raw = text.to_dict()
    raw.pop("per_layer_config", None)
    try:
        last = type(text).from_dict({**raw, "layer_types": [*types[:-1], other]}).layer_types[-1]
    except Exception:  # it refuses another one
        return {len(types) - 1}
    return set() if last == other else {len(types) - 1}


def leaned_on(text: Any) -> set[int]:
    """Return the layers whose keys and values, or chosen tokens, later layers use in place of their own."""
    num_layers, leaned = text.num_hidden_layers, set()
    types = getattr(text, "layer_types", None) or [""] * num_layers
    if shared := getattr(text, "num_kv_shared_layers", 0):  # Gemma 3n: the last of its own kind before they begin
        first = num_layers - shared
        for kind in set(types[first:]):
            leaned |= set([layer for layer in range(first) if types[layer] == kind][-1:])
    indexers = getattr(text, "indexer_types", None) or []
    for layer, kind in enumerate(indexers):  # GLM 5: 'shared' takes what the last 'full' one chose
        if kind == "shared":
            leaned |= set([before for before in range(layer) if indexers[before] == "full"][-1:])
    for layer, source in enumerate(getattr(text, "kv_source_layers", None) or []):
        if isinstance(source, int) and source != layer:
            leaned.add(source)
    return leaned


IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_placeholder_token_id", "image_patch_id")


def text_path(config: Any) -> tuple[str, ...]:
    """Return the names that lead from a configuration to its language model's; () where it is the same."""
    text = config.get_text_config()

    def below(part: Any) -> tuple[str, ...] | None:
        if part is text:
            return ()
        for name, value in vars(part).items():
            if value is text:
                return (name,)
            if hasattr(value, "get_text_config") and (rest := below(value)) is not None:
                return (name, *rest)
        return None

    return below(config) or ()


def visual_token_ids(config: Any) -> tuple[int, ...]:
    """Return placeholder ids that image and video features replace in the prompt."""
    ids = (getattr(config, name, None) for name in (*IMAGE_TOKENS, "video_token_id"))
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))
