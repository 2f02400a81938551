"""The subcommand `heal`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import ranks
from ..recipe import HEAL_LOSS_NAMES, HEAL_SAMPLES, HealRecipe
from .arguments import DATA, MODEL, calibration_arguments, number_in_range, positive_count, run_arguments, whole_number
from .from_flags import heal_from_flags, progress_bar, run_options_from_flags, write_json
from .healing_table import cost_lines, result_lines

SUMMARY = "train a checkpoint with fewer layers to answer as its original does"
EXAMPLE = f"heal small --teacher {MODEL} --calibration {DATA}/calibration.jsonl --out healed"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("model", metavar="FOLDER", help="folder or hub id of a model with fewer layers")
    subcommand.add_argument("--teacher", required=True, metavar="MODEL", help="folder or hub id of the original")
    subcommand.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    calibration_arguments(subcommand, required=True, samples=HEAL_SAMPLES)
    subcommand.add_argument(
        "--steps", type=positive_count, metavar="N", help="most training steps (ten rounds of the questions)"
    )
    subcommand.add_argument("--rank", type=positive_count, metavar="R", help=f"rank of the updates ({HealRecipe.rank})")
    subcommand.add_argument(
        "--learning-rate", type=number_in_range, metavar="R", help=f"highest learning rate ({HealRecipe.learning_rate})"
    )
    subcommand.add_argument(
        "--loss", choices=HEAL_LOSS_NAMES, help=f"divergence that is made small ({HealRecipe.loss})"
    )
    subcommand.add_argument(
        "--exchanges",
        type=whole_number,
        metavar="N",
        help=f"other pictures that each question is asked about, too ({HealRecipe.exchanges})",
    )
    subcommand.add_argument("--norms", action="store_true", help="train the decoder layers' norms, too")
    subcommand.add_argument("--dry-run", action="store_true", help="only say what it would cost")
    run_arguments(subcommand, batch_size=HealRecipe.batch_size)


def run(options: argparse.Namespace) -> None:
    healing, run = heal_from_flags(options), run_options_from_flags(options)
    from ..checkpoints.record import read_record
    from ..pipeline import check_heal, heal

    if options.dry_run:

        def dry_run() -> None:
            cost = check_heal(options.model, healing, options.out, run)
            write_json(options, cost)
            print("\n".join(cost_lines(cost)))

        ranks.from_first(dry_run)
        return
    try:
        folder = heal(options.model, healing, out=options.out, options=run, progress=progress_bar(options))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from what is saved.") from None
    if not ranks.is_first():
        return
    healed = read_record(folder).data["heal"]
    write_json(options, {"path": str(folder), "heal": healed})
    print("\n".join(result_lines(healed)))
    print(f"verified in a clean process. Checkpoint: {folder}, card: {folder / 'README.md'}")
