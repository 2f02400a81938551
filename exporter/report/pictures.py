"""Pictures of questions as data URIs, bounded in size."""

from __future__ import annotations

import base64
import io
from typing import Any

from ..data.samples import Sample
from ..errors import InputError
from ..routing.pictures import as_seen

SIDE = 224  # pixels at most
LARGEST_BYTES = 24_000  # of one picture


def thumbnail(sample: Sample, processor: Any | None) -> tuple[str, tuple[int, int]]:
    """Return the first image of a question, or frame, as the model sees it, and its size; ('', (0, 0)) for none."""
    if not sample.is_seen:
        return "", (0, 0)
    try:
        image = sample.open_images()[0] if sample.images else sample.open_videos()[0].frames[0]
    except InputError:
        return "", (0, 0)
    if processor is not None:
        image = as_seen(image, processor)
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return data_uri(image), image.size


def data_uri(image: Any) -> str:
    """Return a JPEG of at most LARGEST_BYTES, by lower quality and then by fewer pixels; PNG where that is smaller."""
    png = _bytes(image, "PNG")
    if len(png) <= LARGEST_BYTES // 4:
        return _uri("png", png)
    for quality in (85, 70, 50, 30):
        content = _bytes(image, "JPEG", quality=quality)
        if len(content) <= LARGEST_BYTES:
            return _uri("jpeg", content)
    return data_uri(image.resize((max(1, image.width // 2), max(1, image.height // 2))))


def _bytes(image: Any, form: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def _uri(form: str, content: bytes) -> str:
    return f"data:image/{form};base64,{base64.b64encode(content).decode()}"
