"""The table of families: tried out now, or as it was when this version was made."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from ..families import FAMILIES
from ..progress import Progress, silent
from ..version import versions
from .trial import TypeFindings, try_type, why_no_onnx

STORED = Path(__file__).with_name("families.json")  # what the last run over all types found
CAPABILITIES = ("compress", "localize", "fold", "route", "onnx")
HEAD = """# Model types

Found {date} with transformers {transformers} and torch {torch}: every image-text-to-text type that transformers knows,
built small and random from its own configuration class, written as on the hub, cut by nothing (the same bytes, the same
logits) and by some layers (the same logits as the model that the layers were cut from), loaded by transformers alone.
`make families` writes this file again, `lvlm-exporter families TYPE` tries one out.

**{works} of {all} types compress.** *layers scored*: localizers that look at layers run them one at a time; *fold*:
what dropped layers did is put into those that stay: exactly, or by reconstruction where the decoder's row names a norm
behind the matrices; *route*: the small model, routed, is the stock model bit for bit without a budget, and with visual
tokens dropped and layers skipped gives the logits of stock layers run one by one on what is left, within 1e-4, for the
prompt and for what is said from the cache. **{routes} of {all} types route**: those with a name in the column *model*
by the tests, the others by this trial, which `route` repeats on a small model of the configuration that it is given.
**{exports} of {all} types are exported to ONNX**: those of `exporter/onnx/rows.py` by the tests, the others by a trial,
too: a small model's graphs, run by ONNX Runtime, give torch's features, logits (within 1e-4, of prompt and steps) and
tokens for a picture, several pictures, text alone, and questions of different lengths in a batch. `onnx` repeats it on
a small model of the configuration that it is given, and then compares the checkpoint itself.

Three formats of the authors' own code are no types of transformers; `lvlm-exporter convert` writes them as checkpoints
that other subcommands read: the original LLaVA as `llava`, Qwen-VL with Qwen-VL-Chat as `qwen`, and mPLUG-Owl2 as
`mplug_owl2`. The layers of these two are scored, dropped, folded and routed; ONNX is refused. The tests compare both
with independent implementations of their passes, plain and routed.

"""


def try_types(types: Sequence[str], progress: Progress = silent) -> list[TypeFindings]:
    """Try model types out; all image-text-to-text types of transformers where none is named.

    Raises: InputError for a type that transformers does not have.
    """
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    known = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if unknown := [name for name in types if name not in known]:
        raise InputError(
            f"transformers {__version__} has no image-text-to-text type '{unknown[0]}' among its {len(known)}: "
            + nearest(unknown[0], known)
        )
    chosen = sorted(types or known)
    return [try_type(name) for name in progress(chosen, "model types", len(chosen))]


def listed_findings() -> list[TypeFindings]:
    """Return what was found when the stored table was written."""
    data = json.loads(STORED.read_text(encoding="utf-8"))
    return [TypeFindings(**{**row, "layers": tuple(row["layers"]), "protected": tuple(row["protected"])})
            for row in data["types"]]  # fmt: skip


def as_data(findings: Iterable[TypeFindings]) -> dict[str, Any]:
    """Return the table as JSON holds it: for each capability null where it works, else the reason."""
    return {"versions": versions(), "types": [dataclasses.asdict(finding) for finding in findings]}


def markdown(findings: Sequence[TypeFindings]) -> str:
    """Return the table: a row for each type, then why not what does not."""
    lines = ["| type | model | compress | layers scored | fold | route | ONNX |", "|---|---|---|---|---|---|---|"]
    for finding in findings:
        title = FAMILIES[finding.model_type].title if finding.model_type in FAMILIES else ""
        marks = ["no" if getattr(finding, name) else "yes" for name in CAPABILITIES]
        lines.append(f"| {finding.model_type} | {title} | {' | '.join(marks)} |")
    lines += ["", "Why not:"]
    for finding in findings:
        lines += [f"- `{finding.model_type}`: {reason}" for reason in reasons(finding)]
        if finding.route is None and finding.details.get("routed_with_picture") is False:
            lines.append(
                f"- `{finding.model_type}`: routed with placeholders alone; no picture could be made that its small "
                "model takes"
            )
        if finding.protected and not finding.compress:
            lines.append(
                f"- `{finding.model_type}`: layers {', '.join(map(str, finding.protected))} stay unless told otherwise"
            )
    return "\n".join(lines) + "\n"


def reasons(finding: TypeFindings) -> list[str]:
    """Return why what does not work does not: each reason once, with what it concerns."""
    told: dict[str, list[str]] = {}
    for name in CAPABILITIES:
        if reason := getattr(finding, name):
            told.setdefault(reason, []).append(name)
    return [f"{', '.join(names) if len(names) < len(CAPABILITIES) else 'nothing works'}: {reason}"
            for reason, names in told.items()]  # fmt: skip


def write(findings: Sequence[TypeFindings], document: Path) -> None:
    """Write the stored table, and the document that shows it."""
    STORED.write_text(json.dumps(as_data(findings), indent=1) + "\n", encoding="utf-8")
    version = versions()
    head = HEAD.format(
        date=datetime.date.today().isoformat(), transformers=version["transformers"], torch=version["torch"],
        works=sum(finding.compress is None for finding in findings), all=len(findings),
        routes=sum(finding.route is None for finding in findings),
        exports=sum(finding.onnx is None for finding in findings),
    )  # fmt: skip
    document.write_text(head + markdown(findings), encoding="utf-8")


def tried_again(types: Sequence[str], onnx_alone: bool, progress: Progress = silent) -> Iterator[list[TypeFindings]]:
    """Yield the stored table after each type that is tried again; no type: all of them.

    Args:
        onnx_alone: look at their ONNX export and nothing else.
    """
    stored = {finding.model_type: finding for finding in listed_findings()}
    if not onnx_alone:
        stored |= {finding.model_type: finding for finding in try_types(types, progress)}
        yield [stored[name] for name in sorted(stored)]
        return
    if unknown := [name for name in types if name not in stored]:
        raise InputError(f"the stored table has no type '{unknown[0]}': " + nearest(unknown[0], sorted(stored)))
    chosen = sorted(types or stored)
    for name in progress(chosen, "model types", len(chosen)):
        stored[name].onnx = stored[name].compress or why_no_onnx(stored[name])
        yield list(stored.values())


def main(arguments: Sequence[str]) -> None:
    """Try types out and write the tables: `python -m exporter.survey.table docs/families.md [--onnx] [TYPE ...]`.

    Without a type all are tried; with some, the others stay as they were. `--onnx` tries their ONNX export alone.
    """
    document, *rest = arguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def announced(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
        for number, item in enumerate(items, 1):
            print(f"{number}/{total} {item}", flush=True)
            yield item

    bar: Callable[..., Iterable[Any]] = announced
    types = [name for name in rest if name != "--onnx"]
    for findings in tried_again(types, "--onnx" in rest, bar) if rest else [try_types((), bar)]:
        write(findings, Path(document))


if __name__ == "__main__":
    main(sys.argv[1:])
