"""The cost of a model, by its configuration."""

from __future__ import annotations

from typing import Any


def kv_bytes_per_token(config: Any, dtype: Any) -> int:
    """Return keys and values of all decoder layers for one token, in bytes."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * dtype.itemsize)
