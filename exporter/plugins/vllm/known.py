"""The releases of vLLM and the architectures that the plug-in is written for."""

from __future__ import annotations

KNOWN_VERSIONS = ("0.32", "0.33")  # whose classes these are written for
MODELS = "exporter.plugins.vllm.models"
SERVED = {  # architecture of config.json -> class of ours
    "LlavaForConditionalGeneration": "ServedLlava",
    "LlavaNextForConditionalGeneration": "ServedLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "ServedQwen25VL",
    "Qwen3VLForConditionalGeneration": "ServedQwen3VL",
    "InternVLForConditionalGeneration": "ServedInternVL",
}


def is_known(version: str) -> bool:
    """Tell whether a release of vLLM is one that the classes are written for: '0.32.0', '0.32.1+cpu'."""
    return ".".join(version.split("+")[0].split(".")[:2]) in KNOWN_VERSIONS
