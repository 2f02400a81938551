"""The subcommand `route`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import ranks
from ..methods import LOSSES
from ..recipe import ROUTER_SAMPLES, ROUTER_STEPS, SERVING_STEPS, RouterRecipe
from .arguments import DATA, MODEL, calibration_arguments, number_in_range, positive_count, run_arguments, whole_number
from .from_flags import progress_bar, router_from_flags, run_options_from_flags, write_json

SUMMARY = "train a router that drops visual tokens and skips layers, question by question"
EXAMPLE = f"route {MODEL} --out routed --calibration {DATA}/calibration.jsonl --steps 300"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("model", metavar="MODEL", help="folder or hub id, with all its layers or fewer")
    subcommand.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    calibration_arguments(subcommand, required=True, samples=ROUTER_SAMPLES)
    subcommand.add_argument(
        "--serve",
        action="store_true",
        help="train a serving router in its place: tokens leave between projector and decoder, as engines run it",
    )
    subcommand.add_argument(
        "--question-aware", action="store_true", help="let a serving router read the question where it is told it"
    )
    subcommand.add_argument(
        "--steps",
        type=positive_count,
        metavar="N",
        help=f"training steps ({ROUTER_STEPS}; with --serve {SERVING_STEPS})",
    )
    subcommand.add_argument(
        "--candidates",
        type=whole_number,
        metavar="N",
        help="how many of the last layers may be skipped (half of all layers)",
    )
    subcommand.add_argument(
        "--drop-at", type=whole_number, metavar="D", help="layer before which visual tokens leave (2)"
    )
    subcommand.add_argument(
        "--read-at",
        type=whole_number,
        metavar="D",
        help="layer whose input the router reads, 0 for the embeddings as in the paper (that of --drop-at)",
    )
    subcommand.add_argument(
        "--learning-rate", type=number_in_range, metavar="R", help=f"learning rate ({RouterRecipe.learning_rate})"
    )
    subcommand.add_argument(
        "--loss", choices=tuple(LOSSES), help="what the router learns from (importance); preference is the paper's"
    )
    subcommand.add_argument("--loss-option", action="append", default=[], metavar="NAME=VALUE")
    run_arguments(subcommand, batch_size=RouterRecipe.batch_size)


def run(options: argparse.Namespace) -> None:
    router, run = router_from_flags(options), run_options_from_flags(options)
    from ..checkpoints.record import read_record
    from ..pipeline import route

    try:
        folder = route(options.model, router, out=options.out, options=run, progress=progress_bar(options))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from the last saved step.") from None
    if not ranks.is_first():
        return
    record = read_record(folder)
    router_part = record.serving if router.serve else record.router
    assert router_part is not None
    data = record.to_data()["serving" if router.serve else "router"]
    write_json(options, {"path": str(folder), **{k: data[k] for k in data if k != "reference"}})
    replaced = f"; {options.model} had one, which stays behind" if router_part.replaces_another else ""
    print(
        f"trained a {'serving router' if router.serve else 'router'} of {router_part.parameters:,} parameters on "
        f"{router_part.questions} questions in {router_part.seconds:.0f} s, {router_part.held_out} held out{replaced}"
    )
    probes = {k: v for step in router_part.curve for k, v in step.items() if k.startswith("KL")}
    print("\n".join(f"  {name}: {value:.4f}" for name, value in probes.items()))
    if router.serve:
        print(f"  weights of step {data['step']}, by held-out questions; of those, the presets keep:")
        print("\n".join(f"  {preset_line(row)}" for row in data["measured"]))
    print(f"verified in a clean process. Checkpoint: {folder}, card: {folder / 'README.md'}")


def preset_line(row: dict[str, Any]) -> str:
    """Return what a preset of a serving router keeps of held-out questions, as a line of the summary."""
    told = ", told the question" if row["told_the_question"] else ""
    return f"{row['preset']}{told}: {100 * row['answers_kept']:.1f} % of the answers, KL {row['kl']:.4f}"
