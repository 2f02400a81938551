"""The original LLaVA 1.5 (haotian-liu/LLaVA: LlavaLlamaForCausalLM) as transformers' LLaVA.

Nothing is computed: tensors get other names, the flat config.json is split into those of language model and tower, and
the tokenizer gets `<image>`, which the original code puts in as the number -200. Its embedding and its row of the head
are the unknown token's, so that it is never likelier than a token that is never said.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoints.safetensors_ranges import TensorRange
from ..errors import InputError
from .parts import Converted, Original
from .towers import Tower, tower_of
from .words import TURNS, add_image_token, behind_image, load_tokenizer, start_of_prompt

if TYPE_CHECKING:
    import torch

NAMES = (  # how a tensor's name begins there and here: the first that fits
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each token
NOT_WEIGHTS = re.compile(r"(?:rotary_emb\.inv_freq|embeddings\.position_ids)$")
TOWER = "model.vision_tower."
ROWS = 64  # the number of embeddings is a multiple of it, as in llava-hf's checkpoints
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
TEXT = (*NEEDED, "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "rope_theta", "rope_scaling", "attention_bias", "attention_dropout", "mlp_bias", "head_dim",
        "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # fmt: skip
SELECTIONS = {"patch": "default", "cls_patch": "full"}
NEXT = "llava-hf/llava-v1.6-vicuna-7b-hf, llava-hf/llava-v1.6-vicuna-13b-hf or llava-hf/llava-v1.6-mistral-7b-hf"
OTHERS = {  # architectures of the original code that are not converted: what to take in their place
    "LlavaMistralForCausalLM": "llava-hf/llava-v1.6-mistral-7b-hf",
    "LlavaMptForCausalLM": "llava-hf/llava-1.5-7b-hf",
    "LlavaMPTForCausalLM": "llava-hf/llava-1.5-7b-hf",
    "LlavaQwenForCausalLM": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}
IMAGE = "<image>"
DIFFERS = "The tokens around an image are not quite those that the original code makes."
SYSTEM = (  # of the conversation 'vicuna_v1', with which LLaVA 1.5 was trained
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
TEMPLATE = (
    "START{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% else %}"
    "{% set system = SYSTEM %}{% endif %}"
    "{% if system is not string %}{% set system = system[0]['text'] %}{% endif %}{{ system + ' ' }}" + TURNS
)


def convert_llava(original: Original) -> Converted:
    """Return an original LLaVA 1.5 as a checkpoint of transformers' class. Raises InputError for any other."""
    check_llava(original)
    raw, stored = original.raw, original.stored
    tower = tower_of(original.name, raw, stored, original.tower)
    tokenizer = load_tokenizer(original)
    image_id, rows = with_image_token(tokenizer, stored.pieces[VOCABULARY[0]].entry.shape[0])
    select = SELECTIONS[raw.get("mm_vision_select_feature", "patch")]
    text = {key: raw[key] for key in TEXT if raw.get(key) is not None}
    patches = (tower.config["image_size"] // tower.config["patch_size"]) ** 2
    dtype = {"dtype": raw["torch_dtype"]} if "torch_dtype" in raw else {}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": patches + (select == "full"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": select,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "text_config": {"model_type": "llama", **text, "vocab_size": rows, **dtype},
        "vision_config": tower.config,
        **dtype,
    }
    question = "\nWhat is in this image? ASSISTANT:"
    space, same = behind_image(tokenizer, IMAGE, begin=f"{SYSTEM} USER: ", question=question, ways=("\n", " \n"))
    held = stored.pieces[VOCABULARY[0]].entry.shape[0]
    grown = f"Embeddings and head have {rows} rows in place of {held}: for `<image>`, and filled up."
    return Converted(
        title="the original LLaVA format",
        config=config,
        shards=renamed(original, tower, rows, tokenizer.unk_token_id or 0),
        json_files={**_processor_files(raw, tower, select), "generation_config.json": _generation(raw)},
        texts={"chat_template.jinja": chat_template(space, start_of_prompt(tokenizer))},
        tokenizer=tokenizer,
        notes=((grown,) if rows > held else ()) + (() if same else (DIFFERS,)),
    )


def check_llava(original: Original) -> None:
    """Raise InputError for what transformers' LLaVA can't compute, by what config.json and the tensors say."""
    name, raw, stored = original.name, original.raw, original.stored
    written = raw.get("architectures")
    architecture = str(written[0]) if isinstance(written, list) and written else "none"
    if architecture in OTHERS:
        raise InputError(f"{name} is a {architecture}, which is not converted: take {OTHERS[architecture]}.")
    if architecture != "LlavaLlamaForCausalLM":
        raise InputError(f"{name} names the architecture {architecture}: LlavaLlamaForCausalLM is converted.")
    aspect, merge = raw.get("image_aspect_ratio"), raw.get("mm_patch_merge_type", "flat")
    if "model.image_newline" in stored.pieces or str(aspect).startswith("anyres") or merge != "flat":
        raise InputError(f"{name} is LLaVA 1.6 (tiles of images), which is not converted: take {NEXT}.")
    projector = raw.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise InputError(
            f"{name} has the projector '{projector}': transformers' LLaVA has two linear maps with a GELU between "
            "them, 'mlp2x_gelu', which LLaVA 1.5 has."
        )
    if raw.get("mm_use_im_start_end"):
        raise InputError(f"{name} puts <im_start> and <im_end> around images, which LLaVA 1.5 does not: not converted.")
    if raw.get("mm_vision_select_feature", "patch") not in SELECTIONS:
        raise InputError(f"{name}: config.json says mm_vision_select_feature={raw['mm_vision_select_feature']!r:.60}; "
                         f"{' or '.join(SELECTIONS)} is needed.")  # fmt: skip
    if aspect not in (None, "pad", "square"):
        raise InputError(f"{name}: config.json says image_aspect_ratio={aspect!r:.60}; 'pad' or 'square' is needed.")
    if missing := [key for key in NEEDED if type(raw.get(key)) is not int]:
        raise InputError(f"{name}: config.json has no number under {missing[0]}: it is incomplete.")
    needed = (VOCABULARY[0], "model.mm_projector.0.weight", "model.mm_projector.2.weight")
    if missing := [tensor for tensor in needed if tensor not in stored.pieces]:
        raise InputError(f"{name} holds no tensor {missing[0]}: it is incomplete, or no whole LLaVA.")


# --- tensors ----------------------------------------------------------------------------------------------------------


def renamed(original: Original, tower: Tower, rows: int, unknown: int) -> tuple[tuple[TensorRange, ...], ...]:
    """Return the tensors under transformers' names, in the files in which they were; the tower's in one of its own.

    Args:
        rows: of the embeddings and the head, filled up with that of the token `unknown`.
    """
    shards = []
    for pieces in original.stored.files:
        kept = [piece for piece in pieces if not piece.name.startswith(TOWER) and not NOT_WEIGHTS.search(piece.name)]
        shards.append(tuple(_named(_with_rows(original, piece, rows, unknown)) for piece in kept))
    shards.append(tuple(replace(piece, name=f"vision_tower.{piece.name}") for piece in tower.pieces))
    return tuple(shard for shard in shards if shard)


def _named(piece: TensorRange) -> TensorRange:
    there, here = next(((old, new) for old, new in NAMES if piece.name.startswith(old)), ("", ""))
    return replace(piece, name=here + piece.name.removeprefix(there))


def _with_rows(original: Original, piece: TensorRange, rows: int, unknown: int) -> TensorRange:
    """Return the piece; where it has a row for each token, one with more rows that is made when it is written."""
    held = piece.entry.shape[0] if piece.entry.shape else 0
    if piece.name not in VOCABULARY or held == rows:
        return piece
    size = piece.entry.num_bytes // held * rows
    entry = replace(piece.entry, shape=(rows, *piece.entry.shape[1:]), end=piece.entry.begin + size)
    return TensorRange(piece.name, entry, functools.partial(_grown, original, piece.name, rows, unknown))


def _grown(original: Original, name: str, rows: int, unknown: int) -> torch.Tensor:
    import torch

    tensor = original.stored.read(name)
    return torch.cat([tensor, tensor[unknown].expand(rows - len(tensor), -1)])


# --- words ------------------------------------------------------------------------------------------------------------


def with_image_token(tokenizer: Any, rows: int) -> tuple[int, int]:
    """Give the tokenizer `<image>` if it has none; return its id, and how many embeddings there have to be."""
    image_id = add_image_token(tokenizer, IMAGE)
    needed = max(len(tokenizer), image_id + 1)
    return image_id, rows if needed <= rows else -(-needed // ROWS) * ROWS


def chat_template(behind: str, start: str) -> str:
    """Return the template of LLaVA 1.5's conversations; `behind` follows an image, `start` begins a prompt."""
    import json

    texts = {"START": start, "SYSTEM": json.dumps(SYSTEM), "IMAGE": json.dumps(IMAGE + behind)}
    return functools.reduce(lambda text, name: text.replace(name, texts[name], 1), texts, TEMPLATE) + "\n"


# --- files beside the weights -----------------------------------------------------------------------------------------


def _processor_files(raw: dict[str, Any], tower: Tower, select: str) -> dict[str, dict[str, Any]]:
    """Return settings of transformers' processor for LLaVA that crop and scale pictures as the original does."""
    size = tower.config["image_size"]
    images = {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_pad": raw.get("image_aspect_ratio") == "pad",  # to a square, with the mean color
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": tower.config["patch_size"],
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": select,
    }
    return {"preprocessor_config.json": images, "processor_config.json": processor}


def _generation(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the ids that end and fill an answer; the original's settings of sampling are none of a checkpoint's."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"do_sample": False, **{key: raw[key] for key in ids if raw.get(key) is not None}}
