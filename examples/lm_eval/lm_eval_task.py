"""The task of exporter_digits.yaml: pictures, questions and exact match, with nothing of lvlm-exporter in it."""

from __future__ import annotations

from typing import Any

from PIL import Image


def doc_to_image(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc: dict[str, Any]) -> str:
    return f"<image>{doc['question']}"  # lm-eval puts the picture where this mark stands


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    said, wanted = (" ".join(text.lower().split()).rstrip(".") for text in (results[0], doc["answer"]))
    return {"exact_match": float(said == wanted)}
