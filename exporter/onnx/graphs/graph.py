"""From a module to an ONNX file.

transformers' own exporter (`transformers.exporters.OnnxExporter`) does the work: it knows which operators of a model
need to be said differently, and rewrites the graph into ONNX Runtime's fused operators for the target. Its ways of
taking a whole model apart (`export_for_generation`, `decompose_multimodal`) are not used: what they make has no vision
tower or a fixed batch (measured on 5.23), so the modules of vision.py and decoder.py are given to it one by one.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError

OLDEST_OPSET = 18  # what torch.onnx writes natively; older ones are down-converted, which loses operators


def trace(module: Any, path: Path, target: str, opset: int | None) -> None:
    """Write a module's graph, fused for the target ("cpu" or "cuda"), weights beside it in FILE.data."""
    import onnx_ir

    program = traced(module, path.stem, target, opset)
    onnx_ir.save(program, str(path), external_data=f"{path.name}.data")


def traced(module: Any, name: str, target: str, opset: int | None) -> Any:
    """Return a module's graph, fused for the target, as an onnx_ir.Model.

    Its floating inputs are of the module's precision: transformers' exporter casts the samples to it.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=True, dynamic_shapes=module.dynamic(), opset_version=opset, ort_fusions=target)
    with quiet(), unsupported(name):
        program = OnnxExporter().export(module, module.samples(), config).program
    name_inputs(program, getattr(module, "first_layer", 0))
    drop_reshapes(program)
    split_mixed_norms(program)
    drop_origins(program)
    return program


def name_sizes(program: Any, dynamic: Any) -> None:
    """Give changing sizes the names that a module's `dynamic()` has for them, where the exporter numbered them."""
    flat = [dims for spec in dynamic.values() for dims in (spec if isinstance(spec, list) else [spec])]
    names: dict[str, str] = {}
    for value, dims in zip(program.graph.inputs, flat, strict=True):
        for axis, dim in dims.items():
            symbol, name = str(value.shape[axis]), getattr(dim, "__name__", "")
            if symbol.isidentifier() and name.isidentifier():
                names[symbol] = name
    for value in (*program.graph.inputs, *program.graph.outputs):
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                value.shape[axis] = re.sub(r"\b\w+\b", lambda name: names.get(name[0], name[0]), str(size))


def name_inputs(program: Any, first_layer: int) -> None:
    """Rename past_key_values.0 .. 2L-1 to past_key_values.LAYER.key and .value, as the outputs are called."""
    for value in program.graph.inputs:
        if match := re.fullmatch(r"past_key_values[._](\d+)", value.name):
            layer, part = divmod(int(match[1]), 2)
            value.name = f"past_key_values.{layer + first_layer}.{('key', 'value')[part]}"


def drop_reshapes(program: Any) -> None:
    """Leave out reshapes that end where they began: heads are split and put together again around every operator.

    They copy nothing, but running a node takes time, which in a small model counts.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in program.graph:
        if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        while source.producer() is not None and source.producer().op_type == "Reshape":
            source = source.producer().inputs[0]
            if same_shape(source, node.outputs[0]):
                node.outputs[0].replace_all_uses_with(source)
    RemoveUnusedNodesPass()(program)


def drop_origins(program: Any) -> None:
    """Leave out where in the source code each node comes from: it names folders of the machine that exports."""
    graphs = [program.graph, *(function.graph for function in program.functions.values())]
    for graph in graphs:
        graph.metadata_props.clear()
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph.all_nodes():  # those of branches, too
            node.metadata_props.clear()
            values += node.outputs
            for attribute in node.attributes.values():
                if attribute.type.name == "GRAPH":
                    attribute.as_graph().metadata_props.clear()
                    values += [*attribute.as_graph().inputs, *attribute.as_graph().initializers.values()]
        for value in values:
            value.metadata_props.clear()


def split_mixed_norms(program: Any) -> None:
    """Take apart norms with a residual whose scale has another precision, which ONNX Runtime refuses.

    Gemma scales in float32. transformers 5.23 takes them apart as well, and then fuses some of them again.
    """
    import onnx_ir

    for node in list(program.graph):
        if node.op_type != "SkipSimplifiedLayerNormalization" or len({value.dtype for value in node.inputs[:3]}) == 1:
            continue
        added, skipped, scale = node.inputs[:3]
        total = onnx_ir.Node("", "Add", [added, skipped])
        attributes = [onnx_ir.AttrInt64("axis", -1), onnx_ir.AttrInt64("stash_type", 1), *node.attributes.values()]
        norm = onnx_ir.Node("", "SimplifiedLayerNormalization", [total.outputs[0], scale], attributes)
        for name, new, old in (("sum", total, added), ("norm", norm, node.outputs[0])):
            new.name = f"{node.name}/{name}"
            new.outputs[0].name, new.outputs[0].shape = new.name, node.outputs[0].shape
            new.outputs[0].dtype = old.dtype
        program.graph.insert_before(node, [total, norm])
        node.outputs[0].replace_all_uses_with(norm.outputs[0])
        if len(node.outputs) > 3:
            node.outputs[3].replace_all_uses_with(total.outputs[0])
        program.graph.remove(node, safe=True)


def same_shape(first: Any, other: Any) -> bool:
    """Tell whether two values are known to have the same shape, changing sizes by their names."""
    shapes = first.shape, other.shape
    return (
        None not in shapes and shapes[0] == shapes[1] and not any(map(shapes[0].is_unknown_dim, range(len(shapes[0]))))
    )


@contextlib.contextmanager
def unsupported(component: str) -> Iterator[None]:
    """Turn an operator that can't be written into one sentence: it is the model's, not a bug of ours."""
    import torch

    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        names = re.findall(r"op='([\w.]+)'", str(reason))
        what = f"operator {names[0]} has no ONNX form" if names else str(reason).strip().splitlines()[0]
        raise InputError(f"the {component} of this model can't be written as ONNX: {what}.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' logs and progress: none of it is for users."""
    names = ("torch.onnx", "torch.__trace", "transformers", "onnxscript", "onnx_ir", "onnxruntime")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_exporter() -> None:
    """Raise InputError where transformers' exporter does not fuse operators for ONNX Runtime yet."""
    import transformers
    from transformers.exporters import OnnxConfig

    if "ort_fusions" not in inspect.signature(OnnxConfig).parameters:
        raise InputError(
            f"transformers {transformers.__version__} can't write graphs with ONNX Runtime's operators: exporting to "
            'ONNX needs 5.23 or newer (pip install -U "transformers>=5.23").'
        )


def check_opset(opset: int | None) -> None:
    if opset is None:
        return
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"opset {opset} can't be written: {OLDEST_OPSET} to {newest} can; leave --opset out for 20.")
