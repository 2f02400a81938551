"""The cost of a graph, read off its nodes: weights that a token is multiplied with, and bytes that a pass reads.

FLOPs are counted as torch's counter does: two for each weight and token, attention by its two matrix products over all
pairs of tokens, nothing for anything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
BLOCKWISE = "MatMulNBits"  # of integer weights, whose shape is an attribute


@dataclass(frozen=True)
class GraphSize:
    """The size of one graph file, or of one branch in it."""

    weights: int  # elements of the matrices that all tokens meet
    head: int  # of the one that makes the logits, of each sequence's last token
    bytes: int  # of its initializers
    looked_up: int  # bytes of those that a token reads one row of: embeddings
    branches: tuple[GraphSize, ...] = ()  # what runs under a condition, in their order; not part of the figures above


def graph_size(path: Path) -> GraphSize:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    sizes = {t.name: math.prod(t.dims) * bits_of(t) // 8 for t in graph.initializer}
    branches = [branch_of(node) for node in graph.node if node.op_type == "If"]
    of_branches = [{name for node in nodes for name in node.input} & set(sizes) for nodes in branches]
    always = set(sizes).difference(*of_branches)
    makers = {name: node for node in graph.node for name in node.output}
    last = head_of(makers, shapes)
    return GraphSize(
        weights=sum(elements(node, shapes) for node in graph.node if node is not last),
        head=elements(last, shapes) if last is not None else 0,
        bytes=sum(sizes[name] for name in always),
        looked_up=sum(
            sizes[name] for name in always & {node.input[0] for node in graph.node if node.op_type == "Gather"}
        ),
        branches=tuple(
            GraphSize(sum(elements(node, shapes) for node in nodes), 0, sum(sizes[name] for name in names), 0)
            for nodes, names in zip(branches, of_branches, strict=True)
        ),
    )


def branch_of(node: Any) -> list[Any]:
    """Return the nodes that run if the condition holds."""
    return next(list(attribute.g.node) for attribute in node.attribute if attribute.name == "then_branch")


def elements(node: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the size of the weight matrix that a node multiplies with; 0 where it has none."""
    if node.op_type == BLOCKWISE:
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        return int(sizes["K"] * sizes["N"])
    if node.op_type not in PRODUCTS:
        return 0
    return sum(math.prod(shapes[name]) for name in node.input[:2] if len(shapes.get(name, ())) == 2)


def head_of(makers: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Any:
    """Return the last product before the logits; None in graphs that make none."""
    node = makers.get("logits")
    while node is not None and not elements(node, shapes):
        node = makers.get(node.input[0])
    return node


def bits_of(tensor: Any) -> int:
    import onnx

    packed = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
    return packed.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
