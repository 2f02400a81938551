"""The precisions that transformers.js asks for by name, made of the float32 graphs by ONNX Runtime's own tools.

Weight-only quantisation is that of our own folders: integers in blocks with a scale each (MatMulNBits). Names promise
bits of the decoder, where the weights are. The vision tower has 8 bits in all of them: 4 are seen in its features, and
it is small. Embeddings are looked up, not multiplied: half precision beside 8 bits, 4 bits in blocks beside 4.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..graphs.graph import quiet
from ..graphs.quantize import ACCURACY_LEVEL, BLOCK
from ..runtime.client import FILES, SUFFIXES

VISION, EMBEDDINGS, DECODER = FILES["vision"], FILES["embeddings"], FILES["decoder"]
GRAPHS = (VISION, EMBEDDINGS, DECODER)
FOLDER = "onnx"
# The client scatters features into embeddings in float32, and picks tokens from float32.
FLOAT32_VALUES = ["pixel_values", "image_features", "inputs_embeds", "logits"]
EXTERNAL_FROM = 1 << 30  # bytes of weights from which a graph has them in files beside it
SMALLEST = 1024  # bytes of a weight that may stand outside: shapes must not
CHUNK = 2_000_000_000  # bytes of one such file: browsers hold less than 2 GiB in one buffer


@dataclass(frozen=True)
class Precision:
    """How the three graphs are stored under one of the client's names."""

    half: bool = False  # arithmetic and cache in float16
    bits: dict[str, int] = field(default_factory=dict)  # of weights, by graph
    like: str | None = None  # of our own folders' weights, whose tolerance it has


PRECISIONS = {
    "fp32": Precision(),
    "fp16": Precision(half=True),
    "q8": Precision(bits={VISION: 8, DECODER: 8}, like="int8"),
    "q4": Precision(bits={VISION: 8, EMBEDDINGS: 4, DECODER: 4}, like="int4"),
    "q4f16": Precision(half=True, bits={VISION: 8, EMBEDDINGS: 4, DECODER: 4}, like="int4"),
}
SYNONYMS = {"int8": "q8", "int4": "q4"}  # what --quantize calls them in our own layout


def chosen_precisions(quantize: str | None) -> list[str]:
    """Return the precisions to write beside fp32. `quantize`: names with commas between them, or 'all'."""
    if quantize is None:
        return []
    if quantize == "all":
        return [name for name in PRECISIONS if name != "fp32"]
    names = [SYNONYMS.get(name.strip(), name.strip()) for name in quantize.split(",")]
    for name in names:
        if name not in PRECISIONS:
            raise InputError(
                f"quantize '{name}' is not known in the layout transformers.js: {', '.join(PRECISIONS)}, or all; "
                "several with commas between them."
            )
    return [name for name in PRECISIONS if name in names and name != "fp32"]


def graph_path(folder: Path, graph: str, precision: str) -> Path:
    return folder / FOLDER / f"{graph}{SUFFIXES[precision]}.onnx"


def convert(folder: Path, name: str) -> None:
    """Write the three graphs in a precision, from those in float32."""
    for graph in GRAPHS:
        save(converted(graph_path(folder, graph, "fp32"), graph, PRECISIONS[name]), graph_path(folder, graph, name))


def converted(path: Path, graph: str, precision: Precision) -> Any:
    """Return a float32 graph in another precision, as an onnx_ir.Model."""
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = onnx.load(path)
    bits = precision.bits.get(graph)
    with quiet():
        if precision.half or bits is None:
            model = halved(model)
        if bits is not None:
            model = quantized(model, bits, "Gather" if graph == EMBEDDINGS else "MatMul")
    program = onnx_ir.from_proto(model)
    program.graph.sort()  # casts of inputs were added at the end
    with quiet():
        RemoveUnusedNodesPass()(program)
    return program


def halved(model: Any) -> Any:
    """Return a graph that computes in float16, what the client reads and writes left in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # Types stand in the graph; inferring them again would need it in one message of less than 2 GiB.
    model = convert_float_to_float16(
        model, keep_io_types=FLOAT32_VALUES, disable_shape_infer=True, node_block_list=angle_nodes(model)
    )
    join_float32(model.graph)
    return model


def angle_nodes(model: Any) -> list[str]:
    """Return the names of the nodes that the angles of positions come from, cosines and sines among them.

    An angle is as large as the position: in float16 those beyond 2048 are not even whole numbers.
    """
    maker = {output: node for node in model.graph.node for output in node.output}
    names: set[str] = set()
    waiting = [node for node in model.graph.node if node.op_type in ("Cos", "Sin")]
    while waiting:
        node = waiting.pop()
        if node.name not in names:
            names.add(node.name)
            waiting += [maker[value] for value in node.input if value in maker]
    return sorted(names)


def join_float32(graph: Any) -> None:
    """Let nodes that stay in float32 hand on values as they are: the converter rounds each to float16 and back."""
    rounded = {node.output[0]: node.input[0] for node in graph.node if node.name.endswith("_cast_to_fp16_node")}
    joined = {
        node.output[0]: rounded[node.input[0]]
        for node in graph.node
        if node.name.endswith("_cast_to_fp32_node") and node.input[0] in rounded
    }
    for node in graph.node:
        node.input[:] = [joined.get(value, value) for value in node.input]


def quantized(model: Any, bits: int, operator: str) -> Any:
    """Return a graph with the weights of an operator as integers of so many bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    settings = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=ACCURACY_LEVEL["cpu"],
        bits=bits,
        op_types_to_quantize=(operator,),
    )
    logging.getLogger("onnxruntime.quantization").setLevel(logging.CRITICAL)
    quantizer = MatMulNBitsQuantizer(model, algo_config=settings)
    opsets = [(entry.domain, entry.version) for entry in model.opset_import]
    quantizer.process()
    quantized = quantizer.model.model
    for entry in quantized.opset_import:  # it asks for a newer one, which its own operator has no need of
        entry.version = dict(opsets).get(entry.domain, entry.version)
    return quantized


# --- files ------------------------------------------------------------------------------------------------------------


def save(program: Any, path: Path) -> None:
    """Write a graph; large ones with their weights in NAME.onnx_data, NAME.onnx_data_1 and so on."""
    import onnx_ir

    weights = [value for value in program.graph.initializers.values() if value.const_value.nbytes >= SMALLEST]
    if sum(value.const_value.nbytes for value in weights) >= EXTERNAL_FROM:
        for number, chunk in enumerate(chunks(weights)):
            name = f"{path.name}_data" + (f"_{number}" if number else "")
            moved = onnx_ir.external_data.convert_tensors_to_external(
                [value.const_value for value in chunk], path.parent, name
            )
            for value, tensor in zip(chunk, moved, strict=True):
                value.const_value = tensor
    onnx_ir.save(program, str(path))


def chunks(weights: list[Any]) -> Iterator[list[Any]]:
    """Yield weights in groups of at most CHUNK bytes; one that is larger is alone."""
    group: list[Any] = []
    size = 0
    for value in weights:
        if group and size + value.const_value.nbytes > CHUNK:
            yield group
            group, size = [], 0
        group.append(value)
        size += value.const_value.nbytes
    if group:
        yield group


def external_files(folder: Path) -> dict[str, int]:
    """Return how many files of weights each graph has beside it, where it has any: what the client must be told."""
    graphs = sorted((folder / FOLDER).glob("*.onnx"))
    counts = {path.name: len(list(path.parent.glob(f"{path.name}_data*"))) for path in graphs}
    return {name: count for name, count in counts.items() if count}
