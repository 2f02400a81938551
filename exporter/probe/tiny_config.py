"""A configuration of any model type, shrunk until its model is built and run in a moment; its structure stays.

Widths, heads, experts, vocabularies and towers become small. What makes layers differ from each other (lists of one
entry a layer, periods, counts) stays as it is, or is derived anew by the configuration class for another number of
layers. Sizes are found by the names that transformers gives them: one table for all types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..families import text_path

VOCABULARY = 320  # more than the special tokens of any type
WIDTH, HEADS, HEAD = 128, 4, 32  # hidden size, heads, their size
TOWER = 64  # hidden size of towers

TEXT_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "word_embed_proj_dim", "embed_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "ffn_dim"), 192),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "block_ff_dim"), 192),
    **dict.fromkeys(("num_attention_heads", "num_heads", "swa_num_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_sliding_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "query_pre_attn_scalar", "d_kv"), HEAD),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    "additional_vocab_size": 8, "max_position_embeddings": 8192,
    # experts
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim"), 64),
    **dict.fromkeys(("shared_experts_intermediate_size", "shared_intermediate_size", "expert_intermediate_size",
                     "moe_shared_expert_intermediate_size", "moe_latent_size"), 64),
    "moe_hidden_size": WIDTH,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"), 2),
    "n_group": 1, "topk_group": 1,
    # latent attention and its indexer
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "qk_head_dim": 64,
    "v_head_dim": 32, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 64,
    # linear attention and state spaces
    "linear_key_head_dim": HEAD, "linear_value_head_dim": HEAD, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": HEAD, "linear_num_heads": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
    # embeddings for each layer
    "hidden_size_per_layer_input": 16, "laurel_rank": 8,
    "ple_embed_dim": 32, "hc_lowrank": 16, "ngram_vocab_size_base": 512, "split_ngram_parts": 4,
}  # fmt: skip
TOWER_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "width", "embed_dim", "patch_embed_hidden_size"), TOWER),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "encoder_ffn_dim", "d_ff", "decoder_intermediate_size"), 128),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads",), 2),
    "head_dim": TOWER // 2,
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers"), 2),
    "conf_num_hidden_layers": 2, "decoder_num_layers": 2, "num_global_layers": 1,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "adapter_out_dim", "output_dim"), WIDTH),
    "adapter_in_dim": TOWER, "adapter_input_size": TOWER,
    **dict.fromkeys(("projection_dim",), WIDTH),
    "vocab_size": VOCABULARY, "encoder_hidden_size": TOWER,
    "moe_intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "base_channels": 32,
    "num_filters": 4, "codebook_size": 64, "num_embeddings": 64,
}  # fmt: skip
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers")
WITH_SECTIONS = (
    "glm4v_text",
    "glm4v_moe_text",
    "glm_ocr_text",
    "paddleocr_vl_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen2_5_omni_text",
)  # their default sections, which their code has, are for 128
WITH_STAGES = {"depths", "hidden_sizes", "per_layer_config"}  # towers whose depth is bound to other settings
PLAIN_COUNTS = {"num_kv_shared_layers": 2}  # what has to be smaller than a small number of layers
OF_TYPE: dict[str, dict[str, Any]] = {  # what the tables can't know: path -> value
    "qwen2_vl": {"vision_config.hidden_size": WIDTH},
    "aria": {
        "vision_config.image_size": 490,
        "vision_config.patch_size": 14,
    },  # one of the grids that it has queries for
    "aya_vision": {"vision_config.image_size": 56},  # an even number of patches a side
    "vipllava": {"vision_feature_layers": [-1, -2, -2, -1, -1]},
    "apertus1p5": {"audio_config.codebook_dim": TOWER, "image_token_offset": 128, "audio_token_offset": 192},
    "cohere_compass": {
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 0], [1, 2]]},
    "qwen4_exp": {
        "text_config.indexer_budget": 64,
        "text_config.indexer_compress_ratio": 4,
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": HEAD,
    },
    "dots3_note": {"text_config.head_dim": 2 * HEAD},
    "hunyuan_vl": {"text_config.head_dim": HEAD, "text_config.rope_parameters.mrope_section": [4, 4, 4, 4]},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [6, 6, 4]},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", *["sparse"] * 31], "text_config.num_experts_per_tok": 2},
    "molmo2": {"adapter_config.vision_feature_layers": [-1], "adapter_config.vision_feature_layer": [-1]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 290, "vision_end_token_id": 291},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 290, "vision_end_token_id": 291},
    "step3p7": {"text_config.sliding_window": 16},
    "chameleon": {"vocabulary_map": {f"IMGIMG{i:04d}Z": i for i in range(32)} | {"<image>": 40}},
    "emu3": {"vocabulary_map": {f"<|visual token {i:06d}|>": 64 + i for i in range(32)} | {"<|extra_200|>": 40}},
}


def tiny_config(config: Any, layers: int | None = None) -> Any:
    """Return a configuration of the same class and structure with small sizes.

    Args:
        layers: decoder layers; what differs from layer to layer is then derived anew by the configuration class.
            None: as many as there are, with everything of each layer kept.
    Raises: whatever the class raises where the sizes do not go together.
    """
    raw = config.to_dict()
    tower = type(config).sub_configs.get("vision_config")
    if raw.get("vision_config", tower) is None and tower is not None and hasattr(tower, "model_type"):
        raw["vision_config"] = tower().to_dict()  # Gemma 4's default configuration is one of text alone
    if layers is not None:
        _of_layers(text_part(config, raw), layers)
        config = type(config).from_dict(raw)  # which derives what it derives from the number of layers
        raw = config.to_dict()
    text = text_part(config, raw)
    for part in parts(raw):
        if part is text or (part is raw and text is not raw and part.get("num_hidden_layers") is None):
            continue
        depths = {name: part[name] for name in DEPTHS if type(part.get(name)) is int}
        if isinstance(indexes := part.get("deepstack_visual_indexes"), list) and indexes:
            part["deepstack_visual_indexes"] = list(range(len(indexes)))
            depths = dict.fromkeys(depths, max(2, len(indexes)))
        elif depths and not WITH_STAGES & {name for name, value in part.items() if value}:
            _of_layers(part, min(2, *depths.values()))
            depths = {}
        shrink(part, TOWER_SIZES)
        part.update(depths)
    shrink(text, TEXT_SIZES)
    for entry in (text.get("per_layer_config") or {}).values():
        shrink(entry, TEXT_SIZES)
        if "head_dim" in entry:
            entry["head_dim"] = 2 * HEAD  # not those of the others
    if text is not raw and "hidden_size" in raw:
        raw["hidden_size"] = WIDTH
    shrink_rotary(text)
    renumber_tokens(raw)
    _set_of_type(config.model_type, raw)
    return type(config).from_dict(raw)


def _set_of_type(model_type: str, raw: dict[str, Any]) -> None:
    for path, value in OF_TYPE.get(model_type, {}).items():
        place = raw
        *above, name = path.split(".")
        for key in above:
            place = place[key]
        place[name] = value


def text_part(config: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration's data that the language model reads; all of it where there is one level."""
    for name in text_path(config):
        raw = raw[name]
    return raw


def parts(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a configuration's data and every configuration inside it."""
    yield raw
    for value in raw.values():
        if isinstance(value, dict) and ("model_type" in value or "hidden_size" in value):
            yield from parts(value)


def shrink(part: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Set the sizes that a part states to small ones; a list of them stays one."""
    heads = part.get("num_attention_heads")
    grouped = type(heads) is int and heads != part.get("num_key_value_heads")
    halves = [part.get(name) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    whole = all(halves) and part.get("head_dim") == sum(halves)  # a head is both, not the rotated part alone
    for name, size in sizes.items():
        value = part.get(name)
        if name.endswith("key_value_heads") and not grouped:
            size = sizes["num_attention_heads"]
        if isinstance(value, list):
            part[name] = [size if type(entry) is int and entry else entry for entry in value]
        elif type(value) is int and value:
            part[name] = min(size, value)
    if whole:
        part["head_dim"] = part["qk_nope_head_dim"] + part["qk_rope_head_dim"]


def _of_layers(text: dict[str, Any], layers: int) -> None:
    """Set another number of layers, and nothing that was derived from the old one."""
    depth = next((name for name in DEPTHS if type(text.get(name)) is int), "num_hidden_layers")
    before = text.get(depth)
    for name, value in list(text.items()):
        if name == "per_layer_config":
            del text[name]
        if isinstance(value, list) and before and len(value) == before:
            del text[name]
        elif isinstance(value, list) and name.endswith("layers") and all(type(entry) is int for entry in value):
            text[name] = [entry for entry in value if entry < layers]
    text[depth] = layers
    for name, count in PLAIN_COUNTS.items():
        if text.get(name):
            text[name] = min(count, text[name])
    if text.get("max_window_layers"):
        text["max_window_layers"] = layers


def shrink_rotary(text: dict[str, Any]) -> None:
    """Shrink the sections of multimodal rotary embeddings to half of what is rotated of a head."""
    if text.get("model_type") in WITH_SECTIONS and isinstance(rope := text.get("rope_parameters"), dict):
        rope.setdefault("mrope_section", [16, 24, 24])
    for name in ("rope_parameters", "rope_scaling"):
        for entry in _rotary_settings(text.get(name)):
            for key in ("mrope_section", "xdrope_section"):
                if isinstance(section := entry.get(key), list):
                    share = entry.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 1.0
                    half = int(_head_size(text) * share) // 2
                    entry[key] = scaled(section, half)


def _head_size(text: dict[str, Any]) -> int:
    """Return the size of a head, which some configurations leave to be computed."""
    width, heads = text.get("hidden_size"), text.get("num_attention_heads")
    return text.get("head_dim") or (width // heads if width and heads else HEAD)


def _rotary_settings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _rotary_settings(inner)


def scaled(section: list[int], total: int) -> list[int]:
    """Share a total out in the proportions of a list, at least 1 each."""
    small = [max(1, entry * total // sum(section)) for entry in section]
    while sum(small) != total:
        index = small.index(max(small)) if sum(small) > total else small.index(min(small))
        small[index] += 1 if sum(small) < total else -1
    return small


def renumber_tokens(raw: dict[str, Any]) -> None:
    """Give every token that a configuration names an id within the small vocabulary, equal ones the same."""
    known: dict[int, int] = {}

    def small(value: int) -> int:
        if value < 0:
            return value
        return known.setdefault(value, 3 + len(known))

    for part in parts(raw):
        for name, value in part.items():
            if not name.endswith(("_token_id", "_token_index", "_token_ids", "_start_id", "_end_id", "_patch_id")):
                continue
            if type(value) is int:
                part[name] = small(value)
            elif isinstance(value, list):
                part[name] = [small(entry) if type(entry) is int else entry for entry in value]
