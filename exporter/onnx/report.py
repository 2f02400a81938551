"""The differences between an exported folder and torch, as a table."""

from __future__ import annotations

from collections import defaultdict

from ..checkpoints.record_types import ComparisonPart, OnnxServingPart, OutputDifference
from .manifest import OnnxRecord


def differences_table(manifest: OnnxRecord) -> str:
    """Return one line for each output of a graph; keys and values of all layers together."""
    lines = [f"{'output':38} {'max':>9} {'mean':>9}   against torch, {manifest.dtype}"]
    lines += _rows(manifest.validation)
    if manifest.quantized is not None:
        lines += [f"with {manifest.quantize} weights in the decoder:", *_rows(manifest.quantized)]
    for name, report in (manifest.precisions or {}).items():
        lines += [f"{name}:", *_rows(report)]
    sizes: dict[str, int] = defaultdict(int)
    for name, size in manifest.files.items():
        sizes[name.rpartition("/")[2].partition(".")[0]] += size
    lines.append("bytes: " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items()))
    return "\n".join(lines)


def serving_sentence(serving: OnnxServingPart) -> str:
    """Return what a folder does with the serving router of its checkpoint, as a sentence."""
    if serving.stays is None:
        return "The graphs are the plain model, with all visual tokens: the checkpoint's serving router stays behind."
    budget = serving.preset or f"keep_visual_tokens={serving.keep_visual_tokens}"
    return (
        f"The vision graph holds the serving router under {budget}: {serving.stays} of {serving.rows} tokens of each "
        "picture enter the decoder. The router is not told the question."
    )


def _rows(report: ComparisonPart) -> list[str]:
    grouped: dict[str, list[OutputDifference]] = defaultdict(list)
    for name, difference in report.outputs.items():
        grouped["decoder: keys and values" if "present." in name else name].append(difference)
    rows = [
        f"{name:38} {max(d.max for d in all_):9.1e} {sum(d.mean for d in all_) / len(all_):9.1e}"
        for name, all_ in grouped.items()
    ]
    rows.append(f"best token equal in {report.equal_tokens} of {report.tokens} cases")
    if report.left_out:
        rows.append(f"{report.left_out} answers not compared: two routes were level there, and each side took its own")
    return rows
