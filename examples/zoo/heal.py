"""Heals models of the zoo under several settings, and says how much each keeps and what it cost.

    python examples/zoo/heal.py examples/zoo/heal-figures.yaml --out work/heal       # the figures of the documents
    python examples/zoo/heal.py examples/zoo/heal.yaml --out work/sweep              # the sweep that chose the defaults
    python examples/zoo/heal.py examples/zoo/heal.yaml --out work/sweep --table      # what is there already

A model's answers to the questions are asked once and serve all settings; finished rows are skipped when it is started
again, and models that are not there are named. Each row: exact match kept of the original's, the share of the very same
answers, the divergence at its answers; forward passes over the questions, and the peak memory of training, weights
counted, as a multiple of that of a forward pass of the original over as many questions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from exporter import Recipe, RunOptions, compress
from exporter.benchmark.timing import peak_bytes
from exporter.checkpoints.source import open_source
from exporter.clean_room import greedy_answers, load_processor
from exporter.data.batches import make_batch
from exporter.data.calibration import load_calibration
from exporter.evaluation.scoring import is_right
from exporter.healing.healed import HealingJob, ask_teacher, prepare_healing
from exporter.healing.student import Student, prepared
from exporter.healing.teacher import AnswerStore, store_answers
from exporter.healing.training import HealingQuestions, HealTraining, judged, train
from exporter.models.loading import load_model
from exporter.plan import LayerBudget
from exporter.progress import silent
from exporter.recipe import CalibrationData, heal_from_data

BATCH = 16
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--zoo", type=Path, default=Path("zoo"), help="where paths that begin with zoo/ lie (zoo)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these runs only")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "rows.jsonl")
    runs = [placed(run, options.zoo) for run in yaml.safe_load(options.recipe.read_text())["runs"]]
    for run in runs if not options.table else []:
        if is_there(run) and run["name"] in (options.models or [run["name"]]):
            sweep(run, options.out, rows)
    print(rows.table())
    if missing := sorted({run["name"] for run in runs if not is_there(run)}):
        print(f"\nNot there, so without rows: {', '.join(missing)}.")


def placed(run: dict[str, Any], zoo: Path) -> dict[str, Any]:
    """Return a run whose paths below zoo/ are below the zoo's folder."""
    places = ("model", "calibration", "task")
    return run | {key: str(zoo / run[key][4:]) if run[key].startswith("zoo/") else run[key] for key in places}


def is_there(run: dict[str, Any]) -> bool:
    """Tell whether a model has been trained, and has its questions."""
    return all(
        path.is_file() for path in (Path(run["model"]) / "config.json", *map(Path, (run["task"], run["calibration"])))
    )


class Rows:
    """Finished rows on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, key: Row) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def table(self) -> str:
        head = "| model | task | layers gone | questions | setting | exact % | kept % | same answers % | KL | "
        lines = [head + "steps kept | passes | memory |", "|---|---|---:|---:|---|" + "---:|" * 7]
        for row in sorted(
            self.rows, key=lambda r: (r["model"], r["task"], r["gone"], r["questions"], str(r["setting"]))
        ):
            setting = (
                "not healed" if row["setting"] is None else ", ".join(f"{k} {v}" for k, v in row["setting"].items())
            )
            lines.append(
                f"| {row['model']} | {row['task']} | {row['gone']} of {row['layers']} | {row['questions']} | "
                f"{setting or 'the defaults'} | {row['exact']:.1f} | {row['kept']:.1f} | {row['same']:.1f} | "
                f"{row['kl']:.4f} | {row['steps']} | {row.get('passes', '')} | {row.get('memory', '')} |"
            )
        return "\n".join(lines)


def sweep(run: dict[str, Any], out: Path, rows: Rows) -> None:
    """One model: every number of layers, of questions, every setting."""
    model, name = str(run["model"]), str(run["name"])
    test = Test(run, out)
    total = open_source(model).num_layers
    lines = len(Path(run["calibration"]).read_text().splitlines())
    for questions in dict.fromkeys(min(count, lines) for count in run["questions"]):
        data = CalibrationData(run["calibration"], samples=questions)
        for gone in dict.fromkeys(round(total * share) if share < 1 else share for share in run["layers"]):
            small = out / f"{name}-{gone}-{min(questions, 512)}"
            key: Row = {"model": name, "task": Path(run["task"]).stem, "gone": gone, "questions": questions}
            wanted = [None, *run["settings"]]
            if all(rows.has({**key, "setting": setting}) for setting in wanted):
                continue
            if not small.exists():
                fewer = replace(data, samples=min(questions, 512))  # as many as compress draws by itself
                compress(Recipe(model, fewer, LayerBudget(drop_layers=gone)), small, RunOptions("cpu"))
            for setting in wanted:
                if not rows.has({**key, "setting": setting}):
                    rows.add(
                        {
                            **key,
                            "setting": setting,
                            **healed(small, model, data, setting, test, out / f"{name}-{questions}"),
                        }
                    )


def healed(small: Path, model: str, data: CalibrationData, setting: Row | None, test: Test, work: Path) -> Row:
    """Heal a checkpoint under a setting, None: not at all, and put the test's questions to it."""
    begin = time.monotonic()
    job = prepare_healing(str(small), heal_from_data(setting or True), data, model, RunOptions("cpu", batch_size=BATCH))
    loaded = load_model(job.source, "cpu", job.dtype)[0]
    heal = job.recipe
    student = prepared(loaded, load_processor(job.source.folder), job.source, heal.rank, heal.norms, job.seed)
    told: Row = {"steps": 0}
    if setting is not None:
        questions = answered_once(job, work)
        training = HealTraining(job.schedule.steps, heal.batch_size, heal.learning_rate, heal.loss, job.seed)
        before = judged(student, questions, heal.batch_size)
        forward = peak(student, lambda: judged(student, replace(questions, held_out=questions.held_out[:BATCH]), BATCH))
        untouched = {name: learnt.detach().clone() for name, learnt in student.parameters.items()}
        result: list[Any] = []
        peak_of_training = peak(student, lambda: result.extend(train(student, questions, training, before, silent)))
        best, curve = result
        if not best.step:  # nothing that was learnt is kept: `heal` writes the weights as they were
            for name, learnt in student.parameters.items():
                learnt.data.copy_(untouched[name])
        held_out = [round(value, 4) for point in curve for name, value in point.items() if name.startswith("KL")]
        told = {
            "steps": best.step,
            "held_out": [round(before.mean, 4), *held_out],
            "passes": round(job.schedule.forward_passes(job.source.num_layers / job.teacher.num_layers), 1),
        }
        if forward and peak_of_training:  # the original's layers weigh more, and take no more while they run
            gone = job.teacher.weights.num_parameters - job.source.weights.num_parameters
            told["memory"] = round(peak_of_training / (forward + gone * job.dtype.itemsize), 2)
    return {"layers": job.teacher.num_layers, **test.of(student), **told, "seconds": round(time.monotonic() - begin)}


def peak(student: Student, run: Callable[[], object]) -> int | None:
    """Return bytes that a run takes at most, the model's weights and updates counted."""
    grown = peak_bytes(run, "cpu")
    held = sum(parameter.nbytes for parameter in student.model.parameters())
    return None if grown is None else grown + held


def answered_once(job: HealingJob, work: Path) -> HealingQuestions:
    """The questions with the original's answers, which do not depend on the setting: the files are kept."""
    work.mkdir(exist_ok=True)
    return ask_teacher(job, work, silent)


class Test:
    """The test's questions with the original's answers to them."""

    def __init__(self, run: dict[str, Any], out: Path) -> None:
        self.samples = load_calibration(run["task"], samples=run["task_samples"], seed=0).samples
        source = open_source(str(run["model"]))
        folder = out / f"{run['name']}-{Path(run['task']).stem}"
        folder.mkdir(exist_ok=True)
        self.store = AnswerStore(folder, f"{run['task_samples']}", min(64, source.config.get_text_config().vocab_size))
        self.processor = load_processor(source.folder)
        if self.store.missing(len(self.samples)):
            model = load_model(source, "cpu", torch.float32)[0]
            store_answers(model, self.processor, self.samples, self.store, BATCH, 64, silent)
        self.said = [self._text(self.store.targets([index]).tokens[0]) for index in range(len(self.samples))]
        self.right = [is_right(said, s.answers) for said, s in zip(self.said, self.samples, strict=True)]

    def of(self, student: Student) -> Row:
        """Put the questions to a model; where it ranks each token of the original's answer first, it says the same."""
        divergence = judged(student, HealingQuestions(self.store, self.samples, []), BATCH)
        order = sorted(range(len(self.samples)), key=lambda index: self.samples[index].pixels)
        same = dict(zip(order, divergence.follows, strict=True))
        said = dict(enumerate(self.said))
        others = [index for index in order if not same[index]]
        for start in range(0, len(others), BATCH):
            some = others[start : start + BATCH]
            batch = make_batch([self.samples[index] for index in some], self.processor, student.model.config)
            for index, tokens in zip(some, greedy_answers(student.model, batch.inputs, 64), strict=True):
                said[index] = self._text(tokens)
        right = [is_right(said[index], sample.answers) for index, sample in enumerate(self.samples)]
        return {
            "n": len(right),
            "exact": round(100 * sum(right) / len(right), 2),
            "kept": round(100 * sum(right) / sum(self.right), 2),
            "same": round(100 * sum(same.values()) / len(right), 2),
            "kl": round(divergence.mean, 5),
        }

    def _text(self, tokens: torch.Tensor) -> str:
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
