"""Compare, before any training, the forms in which a picture's rows can become fewer between projector and decoder.

    python examples/serving/forms.py examples/digits/model --task examples/digits/data/validation.jsonl --samples 200

Each form runs as it would be served, at half and at a quarter of the visual tokens:

    every n-th row       of each run of neighbouring rows the first one stays (as older routers began)
    means of runs        of each run of neighbouring rows the mean
    first rows of blocks of each block of neighbouring rows, over lines and columns, nearly the first row alone
    means of blocks      of each block the mean

Training begins from the one of the last two that held-out questions like better.

Printed are the mean KL(whole model || shorter prompt) over answers, of each the mean over its tokens, the same over all
tokens, and the share of the whole model's answers of which each token is still the likeliest one. Right answers are
not read. The table goes to --out too, if it is named.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor
from exporter.data.calibration import load_calibration
from exporter.modeling import served_router
from exporter.modeling.served_cells import runs
from exporter.modeling.served_router import ServingSettings
from exporter.models.loading import load_model
from exporter.progress import silent
from exporter.routing.serving.folder import servable
from exporter.routing.serving.learner import ServingLearner
from exporter.routing.serving.loop import BEGINNINGS
from exporter.routing.serving.settings import check_servable, serving_settings
from exporter.routing.training.learner import Teacher

SHARES = (0.5, 0.25)
FORMS = {  # pooled; in blocks; what is added to the score of a cell's first row
    "every n-th row": (False, False, 0.0),
    "means of runs": (True, False, 0.0),
    "first rows of blocks": (True, True, BEGINNINGS[1]),
    "means of blocks": (True, True, BEGINNINGS[0]),
}


def in_runs(coordinates: Tensor, stays: int) -> Tensor:
    """Cut a picture into runs where blocks are asked for."""
    return runs(len(coordinates), stays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", required=True, help="questions about pictures")
    parser.add_argument("--samples", type=int, default=200, help="of the task, drawn with the seed 0 (200)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    source = open_source(options.model)
    check_servable(source.config, source.raw_config, source.name)
    samples = load_calibration(options.task, samples=options.samples).samples
    model = load_model(source, "cpu", torch.float32)[0]
    entry = serving_settings(source.config, question_aware=False)
    model = servable(model, entry)
    teacher = Teacher(model, load_processor(source.folder), tuple(samples))
    teacher.answer_all(silent, options.batch_size)
    rows = []
    for name, (pooled, in_blocks, first) in FORMS.items():
        begin(model, {**entry, "pooled": pooled})
        if pooled:
            torch.nn.init.constant_(model.serving_router.first, first)
        learner = ServingLearner(teacher, model.serving_router, question_aware=False)
        cells = []
        with nullcontext() if in_blocks else mock.patch.object(served_router, "blocks", in_runs):
            for share in SHARES:
                found = learner.judge(range(len(samples)), share=share, told=False, batch_size=options.batch_size)
                cells.append(f"{found.of_answers:.3f} | {found.of_tokens:.3f} | {100 * found.kept:.1f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    head = " | ".join(f"{share:.0%}: KL of answers | of tokens | kept %" for share in SHARES)
    table = [
        f"{Path(options.model).name}, {len(samples)} questions of {Path(options.task).name}, untrained, "
        f"{datetime.date.today():%d %B %Y}, {platform.machine()}",
        "",
        f"| rows of the shorter prompt | {head} |",
        "|---|" + "---:|" * 3 * len(SHARES),
        *rows,
    ]
    text = "\n".join(table) + "\n"
    if options.out is not None:
        options.out.write_text(text)
    print(text)


def begin(model: Any, entry: dict[str, Any]) -> None:
    """Give a model of the served class an untrained router of other settings."""
    model.config.serving_router = entry
    model.serving_settings = ServingSettings.of(model.config)
    model._attach_router()


if __name__ == "__main__":
    main()
