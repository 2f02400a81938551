"""From a picture with questions to a packed training batch, for every family.

Everything that differs between families is asked of the processor (prompt, placeholders, pixels) and of the model
(positions): the packed row holds the tokens that the processor would give each question alone.

Shapes: B pictures (one row each), S tokens, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from joint_training import PackedQuestion, additive, pack_rows, visible, word_places
from pictures import Picture
from torch.nn import functional as F

MARK = "MARK"
CELL = 4  # points a side at which a visual token's area is looked up
TOKEN_SIDE = 12  # pixels of a visual token, where their number follows the picture's size


@dataclass(frozen=True)
class Sample:
    """A picture and its questions, as tokens and pixels."""

    prefix: list[int]  # the prompt up to the question
    prefix_positions: torch.Tensor | None  # [3, S] for M-RoPE
    pixels: dict[str, torch.Tensor]  # the image processor's outputs; pixel values as uint8
    named: torch.Tensor  # [V, 4] colour, name, column and row of each visual token; 0 is the ground
    asked: list[tuple[str, PackedQuestion]]  # type and tokens


class Preparation:
    """Makes samples of pictures, with the processor and the model of one row."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": MARK}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        self.before, self.after = text.split(MARK)
        self.prefixes: dict[tuple[int, int], tuple[list[int], torch.Tensor | None]] = {}

    def sample(self, picture: Picture) -> Sample:
        """Return the picture as the model sees it, with every question."""
        prefix, positions = self.prefix(picture)
        raw = self.processor.image_processor(
            images=[picture.image], do_rescale=False, do_normalize=False, return_tensors="np"
        )
        pixels = {name: torch.as_tensor(np.asarray(value)) for name, value in raw.items() if name in PIXELS}
        pixels["pixel_values"] = pixels["pixel_values"].float().round().clamp(0, 255).to(torch.uint8)
        count = prefix.count(self.model.config.image_token_id)
        rows, columns = token_grid(pixels, count)
        named = torch.from_numpy(token_labels(picture.labels, rows, columns))
        return Sample(prefix, positions, pixels, named, [(q.type, self.question(q)) for q in picture.questions])

    def prefix(self, picture: Picture) -> tuple[list[int], torch.Tensor | None]:
        """Return the prompt up to the question, and its positions where they are not 0, 1, 2 …, by picture size."""
        if picture.image.size not in self.prefixes:
            bos = self.tokenizer.bos_token
            plain = {"add_special_tokens": False} if bos and self.before.startswith(bos) else {}
            inputs = self.processor(text=[self.before], images=[[picture.image]], return_tensors="pt", **plain)
            positions = None
            if "image_grid_thw" in inputs:
                names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
                positions = self.model.model.get_rope_index(**{name: inputs[name] for name in names})[0][:, 0]
            self.prefixes[picture.image.size] = inputs["input_ids"][0].tolist(), positions
        return self.prefixes[picture.image.size]

    def question(self, question: Any) -> PackedQuestion:
        """Return a question, what follows it in the prompt, and its answer with an end token."""
        asked = self.tokenizer.encode(question.text + self.after, add_special_tokens=False)
        answer = [*self.tokenizer.encode(question.answer, add_special_tokens=False), self.tokenizer.eos_token_id]
        meant = [(self.tokenizer.convert_tokens_to_ids(word), x, y) for word, x, y in question.mentions]
        return PackedQuestion(asked + answer, len(asked), word_places(asked + answer, meant))


PIXELS = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")


def token_grid(pixels: dict[str, torch.Tensor], count: int) -> tuple[int, int]:
    """Return how many rows and columns of visual tokens a picture has."""
    if "image_grid_thw" in pixels:
        _, height, width = pixels["image_grid_thw"][0].tolist()
        return height // 2, width // 2
    if "image_sizes" in pixels:
        height, width = pixels["image_sizes"][0].tolist()
        return height // TOKEN_SIDE, width // TOKEN_SIDE
    side = round(count**0.5)
    return side, side


def token_labels(labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return what each visual token shows and where it stands. [2, H, W] -> [V, 4] int64

    A token shows the thing that covers most of its area, if that is three tenths of it; the ground (0) otherwise.
    """
    height, width = labels.shape[1:]
    y = ((np.arange(rows * CELL) + 0.5) / (rows * CELL) * height).astype(int)
    x = ((np.arange(columns * CELL) + 0.5) / (columns * CELL) * width).astype(int)
    codes = labels[0].astype(np.int64) * 256 + labels[1]
    cells = codes[y][:, x].reshape(rows, CELL, columns, CELL).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    named = np.zeros((rows * columns, 4), np.int64)
    for token in np.flatnonzero((cells > 0).mean(1) >= 0.3):
        values, counts = np.unique(cells[token][cells[token] > 0], return_counts=True)
        named[token, :2] = divmod(values[counts.argmax()], 256)
    named[:, 2], named[:, 3] = np.tile(np.arange(columns), rows), np.repeat(np.arange(rows), columns)
    return named


def stack_pixels(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Return the pictures of a batch as the model takes them: normalised, padded to the largest with zeros."""
    stacked = {}
    for name in samples[0].pixels:
        parts = [s.pixels[name] for s in samples]
        if name == "pixel_values":
            parts = [p.float() / 127.5 - 1 for p in parts]  # a mean and a deviation of one half
            if parts[0].ndim > 2:
                height, width = (max(p.shape[k] for p in parts) for k in (-2, -1))
                parts = [F.pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2])) for p in parts]
        stacked[name] = torch.cat(parts)
    return stacked


def pack(model: Any, samples: Sequence[Sample], questions: Sequence[Sequence[PackedQuestion]]) -> dict[str, Any]:
    """Return a batch of one row a picture, with the masks and positions of the model's decoder."""
    packed: dict[str, Any] = pack_rows([s.prefix for s in samples], questions, model.config.text_config.pad_token_id)
    image_token = packed["input_ids"] == model.config.image_token_id
    packed["visual"] = image_token & (packed["segment"] == 0)
    packed["masks"] = decoder_masks(model.config, packed)
    if samples[0].prefix_positions is not None:
        packed["position"] = mrope_positions(packed["position"], samples)
    packed["pixels"] = stack_pixels(samples)
    packed["named"] = torch.cat([s.named for s in samples])
    return packed


def decoder_masks(config: Any, packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | torch.Tensor:
    """Return what the decoder takes as its attention mask: one tensor, or one for each type of its layers."""
    seen = visible(packed["segment"])
    if config.model_type == "gemma3":  # a picture's tokens see each other
        seen = seen | (packed["visual"][:, None, :] & packed["visual"][:, :, None])
    full = additive(seen)
    types = set(getattr(config.text_config, "layer_types", None) or ())
    if not types:
        return full
    masks = {"full_attention": full}
    if "sliding_attention" in types:
        distance = packed["position"][:, :, None] - packed["position"][:, None, :]
        masks["sliding_attention"] = additive(seen & (distance < config.text_config.sliding_window))
    return masks


def mrope_positions(position: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """Return M-RoPE's positions [3, B, S]: the picture's own, then those of the questions from the next free one on."""
    positions = position.expand(3, -1, -1).clone()
    for row, sample in enumerate(samples):
        own = sample.prefix_positions
        assert own is not None  # a row with M-RoPE
        size = own.shape[1]
        positions[:, row, size:] += own.max() + 1 - size
        positions[:, row, :size] = own
    return positions
