"""Joins the graphs of a routed decoder's parts into one, in which a layer that no sequence runs is a branch not taken.

One graph is one call: a graph for every layer that may be skipped took twice as long for a token of a small model. A
branch copies nothing: keys and values go into it and come out of it in the same buffer, taken or not.

Nodes are put side by side under names of their own, but for those that would say the same in every part, such as the
rotary embedding. Weights stay where they are, in the files of the parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIVEN = ("position_ids", "row_lengths", "total_length")  # inputs that all parts have in common
CACHE = ("past_key_values.", "present.")
SMALL = 1024  # elements of constants that are compared with others


@dataclass(frozen=True)
class GraphPiece:
    """One part's graph file."""

    path: Path
    layer: int | None = None  # that may be skipped; None: always runs


@dataclass
class Joined:
    """The graph so far."""

    state: str = "states"  # what the next piece reads
    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    opsets: dict[str, Any] = field(default_factory=dict)
    ir_version: int = 0
    known: dict[Any, list[str]] = field(default_factory=dict)  # constants and nodes that parts share: their outputs


def join(pieces: Sequence[GraphPiece], head: Path, out: Path) -> None:
    """Write `out` from the pieces in their order and the head behind them, and remove their graph files.

    Beside the pieces' own inputs it has `active.N`, whether any sequence runs layer N, and `runs.N`, which ones do.
    """
    import onnx

    joined = Joined()
    for piece in pieces:
        add(joined, piece)
    logits = add(joined, GraphPiece(head))
    graph = onnx.helper.make_graph(
        joined.nodes, "decoder", list(joined.inputs.values()), [*logits, *joined.outputs], joined.weights
    )
    model = onnx.helper.make_model(
        graph, opset_imports=list(joined.opsets.values()), ir_version=joined.ir_version, producer_name="lvlm-exporter"
    )
    onnx.save(model, out)
    for path in (*(piece.path for piece in pieces), head):
        path.unlink()


def add(joined: Joined, piece: GraphPiece) -> list[Any]:
    """Put a piece behind what there is. Returns the outputs that are neither states nor cache."""
    import onnx

    model = onnx.load(piece.path, load_external_data=False)
    prefix, graph = f"{piece.path.stem}/", model.graph
    outer = {name: name for name in GIVEN} | {"states": joined.state, "runs": f"runs.{piece.layer}"}
    outer |= {value.name: value.name for value in (*graph.input, *graph.output) if value.name.startswith(CACHE)}
    outer |= {"logits": "logits", "next_states": f"{prefix}next_states"}
    renamed(graph, prefix, outer)
    hoist(joined, graph, piece.path.parent)
    joined.opsets |= {opset.domain: opset for opset in model.opset_import}
    joined.ir_version = model.ir_version
    joined.weights += graph.initializer
    for value in graph.input:
        if value.name != joined.state or not joined.inputs:  # only the first piece's states come from outside
            joined.inputs.setdefault(value.name, value)
    cache = [value for value in graph.output if value.name.startswith(CACHE)]
    joined.outputs += cache
    if piece.layer is None:
        joined.nodes += graph.node
    else:
        active = f"active.{piece.layer}"
        joined.inputs[active] = onnx.helper.make_tensor_value_info(active, onnx.TensorProto.BOOL, [])
        joined.nodes.append(conditional(graph, active, joined.state))
    joined.state = f"{prefix}next_states"
    return [value for value in graph.output if value.name == "logits"]


def renamed(graph: Any, prefix: str, outer: dict[str, str]) -> None:
    """Give every value of a graph a name of its own, but for those that are `outer`."""

    def new(name: str) -> str:
        return outer.get(name, prefix + name) if name else name

    for node in graph.node:
        node.name = prefix + node.name
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
    for value in (*graph.initializer, *graph.input, *graph.output):
        value.name = new(value.name)


def hoist(joined: Joined, graph: Any, folder: Path) -> None:
    """Take out of a graph what depends on nothing but the inputs that all pieces share, and have it once.

    That is small constants, the rotary embedding, and shapes: all states have one.
    """
    from onnx import numpy_helper

    same = {name: name for name in GIVEN}  # what a piece calls it: what all do
    for tensor in [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= SMALL]:
        value = numpy_helper.to_array(tensor, str(folder))
        known = joined.known.setdefault((value.dtype.str, value.shape, value.tobytes()), [tensor.name])
        if known == [tensor.name]:
            joined.weights.append(tensor)
        same[tensor.name] = known[0]
        graph.initializer.remove(tensor)
    remaining = []
    for node in graph.node:
        of_shape = node.op_type == "Shape" and node.input[0] == joined.state
        shared = of_shape or all(name in same for name in node.input if name)
        node.input[:] = ["states"] if of_shape else [same.get(name, name) for name in node.input]
        if not shared:
            remaining.append(node)
            continue
        attributes = tuple(attribute.SerializeToString() for attribute in node.attribute)
        known = joined.known.setdefault((node.domain, node.op_type, tuple(node.input), attributes), list(node.output))
        if known == list(node.output):
            joined.nodes.append(node)
        same |= dict(zip(node.output, known, strict=True))
    del graph.node[:]
    graph.node.extend(remaining)


def conditional(graph: Any, active: str, state: str) -> Any:
    """Return an If around a graph's nodes: what it makes, or the state and the cache as they came."""
    import onnx

    names = [value.name for value in graph.output]
    inner = {name: f"{name}/made" for name in names}
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    came = [state if not name.startswith(CACHE) else name.replace(*reversed(CACHE)) for name in names]
    kept = [onnx.helper.make_node("Identity", [old], [f"{name}/kept"]) for old, name in zip(came, names, strict=True)]
    return onnx.helper.make_node(
        "If",
        [active],
        names,
        name=f"{active}/if",
        then_branch=onnx.helper.make_graph(list(graph.node), "runs", [], list(typed(graph.output, "made"))),
        else_branch=onnx.helper.make_graph(kept, "skipped", [], list(typed(graph.output, "kept"))),
    )


def typed(outputs: Any, suffix: str) -> Iterator[Any]:
    """Yield a branch's outputs: of the types of the graph's, of any shape."""
    import onnx

    for value in outputs:
        kind = value.type.tensor_type.elem_type
        yield onnx.helper.make_tensor_value_info(f"{value.name}/{suffix}", kind, None)
