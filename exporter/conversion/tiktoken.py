"""A vocabulary of tiktoken (bytes and their ranks) as a tokenizer.json."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

# How Qwen's text is cut before bytes are merged, as its repository states it.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return a tiktoken file's tokens with their ranks. Raises InputError where a line is damaged."""
    ranks: dict[bytes, int] = {}
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}, its tokenizer's vocabulary.")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{path} line {number} is no token with its rank: download it again.") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        what = f"has no token for byte {missing[0]}" if missing else "has gaps in its ranks"
        raise InputError(f"{path} {what}: it is incomplete.")
    return ranks


def make_tokenizer(ranks: dict[bytes, int], special: Sequence[str], **named: str) -> Any:
    """Return a fast tokenizer of byte pairs, whose special tokens follow the ranks in their order.

    Args:
        named: pad_token, eos_token ... of the special tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = _letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    ordered = sorted(ranks, key=ranks.__getitem__)
    pairs = [merge for token in ordered if len(token) > 1 and (merge := last_merge(token, ranks)) is not None]
    backend = Tokenizer(
        models.BPE(
            vocab={names[token]: rank for token, rank in ranks.items()},
            merges=[(names[left], names[right]) for left, right in pairs],
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **named
    )


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two parts that make a token when the bytes of it are merged by lower ranks alone; None: never two."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [
            (rank, index)
            for index, (left, right) in enumerate(itertools.pairwise(parts))
            if (rank := ranks.get(left + right)) is not None and rank < ranks[token]
        ]
        if not pairs:
            return None
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies (GPT-2's): itself if printable."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
