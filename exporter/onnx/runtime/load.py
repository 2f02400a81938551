"""Opens a folder of graphs as the model that it holds."""

from __future__ import annotations

from pathlib import Path

from .client import LAYOUT, ClientModel
from .folder import check_provider, located, read_manifest
from .genai import LAYOUT as GENAI
from .genai import GenaiModel
from .model import OnnxModel
from .prepare import InputError


def load(
    folder: Path | str, device: str | None = None, threads: int | None = None, precision: str | None = None
) -> OnnxModel:
    """Open a folder that `lvlm-exporter onnx` wrote, or such a repository of the hub.

    Args:
        folder: its path, or USER/NAME.
        device: 'cpu' or 'cuda'; it must be the one that the folder was exported for, and is if left out.
        threads: of one operator; ONNX Runtime's choice if left out.
        precision: which of the graphs, in the layout of transformers.js: 'fp32', or one of those beside it. A folder
            in another layout has one, and takes no other name.
    """
    folder = located(folder)
    manifest = read_manifest(folder)
    device = device or manifest["device"]
    if device != manifest["device"]:
        raise InputError(
            f"{folder} was exported for {manifest['device']}: its operators are fused for that. Export again with "
            f"--device {device}."
        )
    check_provider(device)
    if (layout := manifest.get("layout")) in (LAYOUT, GENAI):
        names = list(manifest.get("precisions", {}))
        there = ["fp32", *names] if layout == LAYOUT else names or ["fp32"]
        precision = precision or there[0]
        if precision not in there:
            raise InputError(f"{folder} has no precision '{precision}': {', '.join(there)}.")
        opened = ClientModel if layout == LAYOUT else GenaiModel
        return opened(folder, manifest, device, threads=threads, precision=precision)
    if "router" in manifest:
        from .routed import RoutedOnnxModel

        return RoutedOnnxModel(folder, manifest, device, threads)
    return OnnxModel(folder, manifest, device, threads)
