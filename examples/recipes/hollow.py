"""Write a checkpoint without weights: every file of the real one, its tensors as holes that take no place on a disk.

`write_random` puts random weights in place of holes, tensor by tensor: a model of that size is never in memory.

`models/NAME.json` has what is public of a checkpoint: its `config` and the settings of its processor as they stand on
the hub, its special tokens with their ids, and how its chat template puts an image. The names and shapes of its tensors
are those that transformers builds from the configuration. A file system reads a hole as zeros.

Two things are not the real checkpoint's: values of weights, and the words of the tokenizer, where each word is one
token.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from exporter.clean_room import REFERENCE_QUESTION

MODELS = Path(__file__).parent / "models"
SHARD_BYTES = 5_000_000_000  # as transformers cut shards when these were published
FILES = ("config", "preprocessor_config", "processor_config", "video_preprocessor_config")
DTYPES = {"float16": "F16", "bfloat16": "BF16"}
QUESTION = (
    "What is written on the sign behind the two people who wait at the left side of the street, and in which colour?"
)
WORD = r"\w+|[^\w\s]|\n"
FIRST_WORD = 1000  # ids of words begin here, where no checkpoint has a special token
TEMPLATE = (
    "{% set turns = TURNS %}START{% for message in messages %}{% set turn = turns[message['role']] %}{{ turn[0] }}"
    "{% for part in message['content'] if part['type'] == 'image' %}IMAGE{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ turn[1] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ turns['assistant'][0] }}{% endif %}"
)
Published = dict[str, Any]  # of models/NAME.json
Fill = Callable[[str, tuple[int, ...]], Tensor]  # the values of a tensor, by its name and shape
DEVIATION = 0.02  # of random weights, as transformers begins training with


def published(name: str) -> Published:
    """Return what is public of a checkpoint, by the name of its recipe."""
    row: Published = json.loads((MODELS / f"{name}.json").read_text())
    return row


def write_random(row: Published, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint with random weights, as much of them in memory as one tensor has. Returns: its folder."""
    dtype, random = getattr(torch, row["config"]["dtype"]), torch.Generator().manual_seed(seed)

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1 and name.endswith((".weight", ".bias")):  # of norms, and biases
            return torch.full(shape, float(name.endswith(".weight")), dtype=dtype)
        return torch.empty(shape, dtype=dtype).normal_(0, DEVIATION, generator=random)

    return write_hollow(row, folder, fill)


def with_layers(row: Published, count: int) -> Published:
    """Return the row of a checkpoint that has so many decoder layers, in place of as many as were published."""
    changed: Published = json.loads(json.dumps(row))
    changed["config"]["text_config"]["num_hidden_layers"] = count
    return changed


def write_hollow(row: Published, folder: Path, fill: Fill | None = None) -> Path:
    """Write a checkpoint whose weights are holes. Returns: its folder, which is made.

    Args:
        fill: what to write in place of holes.
    """
    folder.mkdir(parents=True)
    for name in FILES:
        if name in row:
            (folder / f"{name}.json").write_text(json.dumps(row[name], indent=2))
    _write_tokenizer(row, folder)
    dtype = row["config"]["dtype"]
    shapes = tensor_shapes(row, folder)
    shards = list(_shards(shapes, getattr(torch, dtype).itemsize))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, {name: shapes[name] for name in names}, dtype, fill)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def meta_model(folder: Path) -> Any:
    """Return the model of a folder's config.json on the meta device: shapes, and no memory for weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))


def tensor_shapes(row: Published, folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its name on the hub."""
    shapes = {}
    model = meta_model(folder)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        renamed = (new + name.removeprefix(old) for old, new in row["names"] if name.startswith(old))
        shapes[next(renamed, name)] = tuple(tensor.shape)
    return shapes


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = itemsize * torch.Size(shape).numel()
        if names and size + num_bytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, fill: Fill | None) -> None:
    """Write a safetensors header, and let the data follow, or a hole that is as long."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + getattr(torch, dtype).itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
        for name, shape in shapes.items():
            if fill is None:
                break
            file.write(fill(name, shape).reshape(-1).view(torch.uint8).numpy().data)


def _write_tokenizer(row: Published, folder: Path) -> None:
    """Write a tokenizer with the real special tokens and their ids, and a token for each word that is used here."""
    tokens: dict[str, int] = row["tokens"]
    template = TEMPLATE.replace("START", row["start"]).replace("TURNS", json.dumps(row["turns"]))
    (folder / "chat_template.jinja").write_text(template.replace("IMAGE", "{{ " + json.dumps(row["image"]) + " }}"))
    words = dict.fromkeys(re.findall(WORD, f"{template} {QUESTION} {REFERENCE_QUESTION}".replace("\\n", "\n")))
    vocabulary = {word: FIRST_WORD + number for number, word in enumerate(["<unk>", *words])} | tokens
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    if bos := row["named"].get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", padding_side="left", additional_special_tokens=list(tokens),
        **row["named"],
    ).save_pretrained(folder)  # fmt: skip
