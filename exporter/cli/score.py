"""The subcommand `score`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from .. import ranks
from ..errors import InputError
from .arguments import DATA, MODEL, calibration_arguments, layer_budget_arguments, localizer_arguments, run_arguments
from .from_flags import progress_bar, recipe_from_flags, run_options_from_flags, write_json
from .outputs import save

SUMMARY = "rank decoder layers by redundancy"
EXAMPLE = f"score {MODEL} --calibration {DATA}/calibration.jsonl --plot scores.png"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("model", metavar="MODEL", help="folder or hub id (hub:USER/NAME@REVISION)")
    calibration_arguments(subcommand, required=True, answers=True)
    localizer_arguments(subcommand)
    layer_budget_arguments(subcommand)
    subcommand.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the scores into a picture")
    subcommand.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="keep the scores for `compress --scores FILE`, which then needs no questions",
    )
    run_arguments(subcommand)


def run(options: argparse.Namespace) -> None:
    recipe, run = recipe_from_flags(options, budget_needed=False), run_options_from_flags(options)
    if options.plot and options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {options.plot}: a .png, .svg or .pdf file is needed.")
    from ..cards.plots import plot_scores
    from ..cards.tables import scores_table
    from ..pipeline import score

    job, scores = score(recipe, run, progress_bar(options), options.save)
    if not ranks.is_first():
        return
    write_json(options, asdict(scores) | {"protect": job.protect, "num_layers": job.source.num_layers})
    print(scores_table(scores, job.source.parameters_per_layer, job.protect))
    if options.save:
        print(f"kept: {options.save}")
    if options.plot:
        if save(options.plot, lambda path: plot_scores(scores, path, job.protect)):
            print(f"drawn: {options.plot}")
        else:
            options.unsaved = True
