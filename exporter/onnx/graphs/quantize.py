"""Weight-only quantisation of the decoder: ONNX Runtime's MatMulNBits, integer weights in blocks with a scale each.

Vision tower and embeddings stay as they are: they run once, and the embeddings are looked up, not multiplied.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from .graph import quiet

BITS = {"int8": 8, "int4": 4}
BLOCK = 32  # weights that share a scale
# How a product is computed: 4 rounds activations to int8 too, which is what is fast on CPUs; 0 leaves it to the device.
ACCURACY_LEVEL = {"cpu": 4, "cuda": 0}


def check_quantize(name: str | None) -> None:
    if name is not None and name not in BITS:
        raise InputError(f"quantize '{name}' is not known: {', '.join(BITS)}.")


def quantize(folder: Path, name: str, device: str) -> None:
    """Replace the folder's decoder, in one graph or in two, by one with integer weights."""
    for path in sorted(folder.glob("decoder*.onnx")):
        quantize_graph(path, name, device)


def quantize_graph(path: Path, name: str, device: str) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    settings = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL[device], bits=BITS[name]
    )
    with quiet():
        quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=settings)
        quantizer.process()
    stale = weight_files(path)
    path.unlink()
    for file in stale:
        file.unlink()
    data = f"{path.name}.data"
    onnx.save_model(quantizer.model.model, path, save_as_external_data=True, location=data, size_threshold=1024)


def weight_files(path: Path) -> set[Path]:
    """Return the files beside a graph that hold its weights: a joined graph has those of its parts."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    named = (entry for tensor in graph.initializer for entry in tensor.external_data)
    return {path.parent / entry.value for entry in named if entry.key == "location"}
