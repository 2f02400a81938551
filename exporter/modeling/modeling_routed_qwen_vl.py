"""Qwen-VL with a router: the class of its own modeling file, with the additions of modeling_routed.py.

model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
model.generate(**inputs, preset="fast")
"""

from __future__ import annotations

from .modeling_qwen_vl import QWenVLConfig, QWenVLForConditionalGeneration
from .modeling_routed import routed

__all__ = ["QWenVLConfig", "RoutedQWenVLForConditionalGeneration"]

RoutedQWenVLForConditionalGeneration = routed(QWenVLForConditionalGeneration, __name__)
