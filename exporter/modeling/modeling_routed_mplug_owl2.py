"""mPLUG-Owl2 with a router: the class of its own modeling file, with the additions of modeling_routed.py.

model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
model.generate(**inputs, preset="fast")
"""

from __future__ import annotations

from .modeling_mplug_owl2 import MPLUGOwl2Config, MPLUGOwl2ForConditionalGeneration
from .modeling_routed import routed

__all__ = ["MPLUGOwl2Config", "RoutedMPLUGOwl2ForConditionalGeneration"]

RoutedMPLUGOwl2ForConditionalGeneration = routed(MPLUGOwl2ForConditionalGeneration, __name__)
