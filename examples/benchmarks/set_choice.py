"""How well sets of layers are chosen, and folds, judged on questions that nothing was chosen by.

    python examples/benchmarks/set_choice.py --models zoo/qwen-shapes zoo/llava-shapes --drop-ratio 0.25 0.33
    python examples/benchmarks/set_choice.py --folds --models zoo/qwen-shapes zoo/llava-shapes
    python examples/benchmarks/set_choice.py --read FILE.jsonl     the second table over runs that --out has kept

For each model and share of the layers, `compress` runs up to its localizer, which chooses in several WAYS. Beside what
these name, many sets are drawn. Those that some measure without a fold puts first are folded from all questions that
folds read, and judged on others (NAME-data/validation.jsonl). The tables tell how far each choice lies above the best
of these sets, in nats per answer token, by way and by measure: without a fold on the few questions that localizers
read, and on the first held-out questions with the quick fold that localizers judge by. With --folds, the same of the
folds that `auto` chooses from. `--fold 0` looks only at what the ways choose. Measures:

    states all        relative squared error of the states that the head reads, over all tokens
    states KIND       the same over the picture's tokens, the question's, or where an answer token is said
    states            the geometric mean of the three: what `compress` goes by without a fold
    states read       the same of the question's tokens and of those where an answer is said: with a fold, unless the
                      answers speak against it
    kl text           KL(original || variant) at every token of text and answers
    kl answers        KL where an answer token is said
    other answers     the share of answers that become others, with one added
    A and B           the geometric mean of both
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from exporter.data.calibration import load_calibration
from exporter.data.pictures import Split
from exporter.fold import auto
from exporter.fold.held_out import HeldOut
from exporter.fold.sets import FoldedSets
from exporter.localize import best_of
from exporter.localize.job import LocalizeJob
from exporter.localize.judged import JudgedSets
from exporter.models import questions as asked
from exporter.models.answers import AnsweredBatch
from exporter.models.divergence import EXACT, KINDS, READ, Divergence, StateErrors
from exporter.models.replay import logits
from exporter.models.state_error import errors_of, head_states, kinds_of
from exporter.models.sweep import ORIGINAL, Change, sweep
from exporter.models.variants import Variant
from exporter.pipeline import compress
from exporter.plan import LayerBudget
from exporter.progress import silent
from exporter.recipe import CalibrationData, Recipe, RunOptions

Layers = frozenset[int]
Choice = Layers | str  # of layers, or of a fold
Values = dict[str, float]
STATES = ("states", "states read", "states all", *(f"states {kind}" for kind in KINDS))
MEANS = {
    "states and kl text": ("states", "kl text"),
    "read and kl": ("states read", "kl answers"),
    "read and others": ("states read", "other answers"),
}
MEASURES = (*STATES, "kl text", "kl answers", "other answers", *MEANS)
WIDE = ((6, "judge_sets"), (2, "judge_few_sets"))
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of best_of, and constants in place of its own
    "default": ({}, {}),
    "states alone": ({}, {"told apart by": "states"}),
    "no search": ({"search": False}, {}),
    "six sets folded": ({}, {"ROUNDS": WIDE}),
}


class Enough(BaseException):
    """Ends `compress` where all is measured."""


@dataclass(frozen=True)
class Study:
    """What the measures say of sets of layers, or of folds, and what is true of them."""

    model: str
    drop: int
    chosen: Mapping[str, Choice]  # by each way
    raw: Mapping[Choice, Values]  # of sets without a fold, on the questions that localizers read
    folded: Mapping[int, Mapping[Choice, Values]]  # by the number of held-out questions
    others: Mapping[Choice, float]  # KL per answer token on questions of another file, folded

    @property
    def best(self) -> Choice:
        return min(self.others, key=lambda choice: self.others[choice])

    def regrets(self) -> dict[str, float]:
        """Return how far each choice lies above the best one: of each way, then of each measure."""
        choices = dict(self.chosen)
        tables = ({"no fold": self.raw} if self.raw else {}) | {f"{n} held out": v for n, v in self.folded.items()}
        for (name, values), measure in itertools.product(tables.items(), MEASURES):
            in_order = sorted(self.others, key=lambda choice: by(measure, values[choice]))
            choices[f"{name}: {measure}"] = in_order[0]
            if name == "no fold":  # as many are folded
                first = in_order[: best_of.ROUNDS[0][0]]
                choices[f"the best of those that {measure} puts first"] = min(first, key=self.others.__getitem__)
        return {name: self.others[choice] - self.others[self.best] for name, choice in choices.items()}


def by(measure: str, values: Values) -> float:
    """Return what a measure says, which may be the geometric mean of others."""
    return statistics.geometric_mean([max(values[part], EXACT) for part in MEANS.get(measure, (measure,))])


def measured(model: Any, changes: Sequence[Change], batches: Iterable[AnsweredBatch]) -> list[Values]:
    """Return all measures of each change."""
    states, kls = [StateErrors()] * len(changes), [dict.fromkeys(("text", "answers"), 0.0) for _ in changes]
    tokens, others, questions = dict.fromkeys(("text", "answers"), 0), [0] * len(changes), 0
    with torch.inference_mode():
        for passed in sweep(model, batches, [ORIGINAL, *changes]):
            batch, kinds = passed.batch.batch, kinds_of(passed.batch.batch)
            masks, outputs = {"text": batch.is_text, "answers": passed.batch.predicts}, passed.outputs()
            original, lengths = next(outputs)[1], passed.batch.predicts.sum(1).tolist()
            before = head_states(model, original, kinds)
            log_p = {name: logits(model, original[mask]).float().log_softmax(-1) for name, mask in masks.items()}
            tokens = {name: tokens[name] + int(mask.sum()) for name, mask in masks.items()}
            questions += len(lengths)
            for number, (_, output) in enumerate(outputs):
                states[number] += errors_of(before, head_states(model, output, kinds))
                for name, log in log_p.items():
                    log_q = logits(model, output[masks[name]]).float().log_softmax(-1)
                    kls[number][name] += float((log.exp() * (log - log_q)).sum())
                same = log_q.argmax(-1) == passed.batch.targets  # of the answers, which come last
                others[number] += sum(not part.all() for part in torch.split(same, lengths))
    return [
        values_of(errors)
        | {f"kl {name}": kl[name] / max(1, tokens[name]) for name in kl}
        | {"other answers": (other + 1) / (questions + 2)}
        for errors, kl, other in zip(states, kls, others, strict=True)
    ]


def values_of(errors: StateErrors) -> Values:
    means = [total / max(1, tokens) for total, tokens in zip(errors.sums, errors.tokens, strict=True)]
    by_kind = {f"states {kind}": mean for kind, mean in zip(KINDS, means, strict=True)}
    return {
        "states": errors.over(KINDS),
        "states read": errors.over(READ),
        "states all": sum(errors.sums) / max(1, sum(errors.tokens)),
    } | by_kind


@contextlib.contextmanager
def constants(changed: Mapping[str, Any]) -> Iterator[None]:
    """Put constants in place of the localizer's own."""
    with contextlib.ExitStack() as stack:
        for name, value in changed.items():
            if name == "told apart by":  # the error of the states alone, as before 30 November 2026
                no_more = mock.patch.object(Divergence, "more_others_than", return_value=(0.0, 0.0))
                stack.enter_context(no_more)
            else:
                stack.enter_context(mock.patch.object(best_of, name, value))
        yield


def study(options: argparse.Namespace, model: str, ratio: float) -> Study:
    """Run the localizer of `compress` in several ways, and look at many sets."""
    found: list[Study] = []
    choose = best_of.by_best_of

    def looked_at(job: Any, count: int, protect: tuple[int, ...], **_: Any) -> Any:
        chosen = {}
        for name, (given, changed) in WAYS.items():
            with constants(changed):
                chosen[name] = frozenset(choose(afresh(job), count, protect, **given).drop)
        judge: FoldedSets = job.folded
        held_out = judge.held_out
        sets: list[Layers] = list(dict.fromkeys([*chosen.values(), *drawn_sets(job.num_layers, count, options)]))
        few = list(held_out.questions.answered("few", "fit", options.few))
        raw = dict(zip(sets, measured(held_out.model, [Change(drop) for drop in sets], few), strict=True))
        worth = {*chosen.values()}
        for measure in MEASURES:
            worth |= set(sorted(sets, key=lambda drop: by(measure, raw[drop]))[: options.fold])
        pool = sorted(worth, key=sorted)
        folded = on_held_out(held_out, refolded(judge, pool), options)
        with mock.patch.dict(asked.PORTIONS, fold_sets=asked.PORTIONS["fit"]):
            true = on_others(held_out, refolded(judge, pool), model, options)
        found.append(Study(Path(model).name, count, chosen, raw, folded, true))
        raise Enough

    run(options, model, ratio, mock.patch.object(best_of, "by_best_of", looked_at))
    return found[-1]


def afresh(job: Any) -> LocalizeJob:
    """Return the job without what was judged before, which a run that goes on would not judge again."""
    folded = dataclasses.replace(job.folded, judged={}, kept=JudgedSets())  # what was folded stays as it is
    return dataclasses.replace(job, folded=folded, kept_loss=lambda make, num_layers: make())


def refolded(judge: FoldedSets, sets: Sequence[Layers]) -> dict[Layers, Change]:
    """Return sets with the quick fold, made anew."""
    judge.known.clear()
    judge.fold(sets)
    return {drop: Change(drop, judge.known[drop].folded) for drop in sets}


def drawn_sets(layers: int, count: int, options: argparse.Namespace) -> list[Layers]:
    """Draw sets at random, all of them where they are few."""
    every = list(map(frozenset, itertools.combinations(range(layers), count)))
    return every if len(every) <= options.drawn else random.Random(options.seed).sample(every, options.drawn)


def study_folds(options: argparse.Namespace, model: str, ratio: float) -> Study:
    """Let `compress` choose its layers, and look at all folds of them."""
    found: list[Study] = []
    judge = auto.judge_candidates

    def looked_at(held_out: HeldOut, variants: dict[str, Variant]) -> Any:
        changes = {name: Change(frozenset(variant.plan.drop), variant.folded) for name, variant in variants.items()}
        folded = on_held_out(held_out, changes, options)
        true = on_others(held_out, changes, model, options)
        own = judge(held_out, variants)[0]
        chosen: dict[str, Choice] = {"default": auto.winner(own)}
        with constants({"told apart by": "states"}):
            chosen["states alone"] = auto.winner(own)
        found.append(Study(Path(model).name, len(variants["none"].plan.drop), chosen, {}, folded, true))
        raise Enough

    run(options, model, ratio, mock.patch.object(auto, "judge_candidates", looked_at))
    return found[-1]


def on_held_out(
    held_out: HeldOut, changes: Mapping[Any, Change], options: argparse.Namespace
) -> dict[int, dict[Choice, Values]]:
    """Return the measures on each number of held-out questions."""
    folded = {}
    for number in options.held_out:
        batches = held_out.questions.answered("held out", "held_out", number)
        folded[number] = dict(zip(changes, measured(held_out.model, list(changes.values()), batches), strict=True))
    return folded


def on_others(
    held_out: HeldOut, changes: Mapping[Any, Change], model: str, options: argparse.Namespace
) -> dict[Choice, float]:
    """Return the divergence at the answers to questions of the other file."""
    others = other_questions(held_out.questions, model, options).answered("others")
    values = measured(held_out.model, list(changes.values()), others)
    return {choice: value["kl answers"] for choice, value in zip(changes, values, strict=True)}


def run(options: argparse.Namespace, model: str, ratio: float, looking: Any) -> None:
    """Compress until all is measured."""
    data = CalibrationData(options.calibration.format(model), samples=options.samples)
    recipe = Recipe(model, data, LayerBudget(drop_ratio=ratio), seed=options.seed)
    with looking, tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        compress(recipe, Path(folder) / "small", RunOptions(batch_size=16))


def other_questions(questions: Any, model: str, options: argparse.Namespace) -> asked.Questions:
    samples = load_calibration(options.others.format(model), samples=options.number, seed=1).samples
    others = asked.Questions(questions.model, questions.processor, tuple(samples), questions.batch_size, 0, silent)
    everything = tuple(range(len(samples)))
    others.split = Split(everything, everything, everything, others.split.pictures)
    return others


def print_line(done: Study) -> None:
    """Print what each way has chosen, with its divergence on the other questions."""
    chosen = [f"{text(choice)}: {done.others[choice]:.4f}" for choice in (done.best, *done.chosen.values())]
    print(f"| {done.model} | {done.drop} | {' | '.join(chosen)} |", flush=True)


def text(choice: Choice) -> str:
    return choice if isinstance(choice, str) else " ".join(map(str, sorted(choice)))


def print_regrets(studies: Sequence[Study]) -> None:
    """Print how far each way, and the first by each measure, lies above the best: mean and worst of the models."""
    regrets = [done.regrets() for done in studies]
    print("\n| chosen by | above the best, mean | worst | by how many times, mean |\n|---|---:|---:|---:|")
    for name in regrets[0]:
        above = [regret[name] for regret in regrets]
        best = [done.others[done.best] for done in studies]
        times = statistics.geometric_mean([(more + kl) / kl for more, kl in zip(above, best, strict=True)])
        print(f"| {name} | {statistics.mean(above):.4f} | {max(above):.4f} | {times:.2f} |")


def studies_kept(path: Path) -> list[Study]:
    """Return the studies that `keep` has written, a model and a number of layers each."""
    lines = sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: (line["model"], line["count"]))
    studies = []
    for (model, count), group in itertools.groupby(lines, key=lambda line: (line["model"], line["count"])):
        by_choice: dict[Choice, Any] = {line.get("fold") or frozenset(line["drop"]): line for line in group}
        numbers = next(iter(by_choice.values()))["folded"]
        studies.append(
            Study(
                model=model,
                drop=count,
                chosen={way: choice for choice, line in by_choice.items() for way in line["ways"]},
                raw={choice: line["raw"] for choice, line in by_choice.items() if "raw" in line},
                folded={int(n): {choice: line["folded"][n] for choice, line in by_choice.items()} for n in numbers},
                others={choice: line["others"] for choice, line in by_choice.items()},
            )
        )
    return studies


def keep(done: Study, path: Path) -> None:
    """Append what was measured of every set that was folded, or of every fold."""
    with path.open("a") as file:
        for choice, kl in done.others.items():
            ways = [name for name, chosen in done.chosen.items() if chosen == choice]
            folded = {str(number): values[choice] for number, values in done.folded.items()}
            line: dict[str, Any] = {"model": done.model, "count": done.drop, "others": kl, "ways": ways}
            line |= {"folded": folded}
            line |= {"fold": choice} if isinstance(choice, str) else {"drop": sorted(choice), "raw": done.raw[choice]}
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--calibration", default="{}-data/calibration-unseen.jsonl", help="{} stands for the model")
    parser.add_argument("--others", default="{}-data/validation.jsonl")
    parser.add_argument("--drop-ratio", type=float, nargs="+", default=[0.25, 0.33])
    parser.add_argument("--samples", type=int, default=512, help="calibration questions")
    parser.add_argument("--number", type=int, default=300, help="of the other questions")
    parser.add_argument("--drawn", type=int, default=120, help="sets drawn at random")
    parser.add_argument("--few", type=int, default=12, help="questions that measure sets without a fold")
    parser.add_argument("--fold", type=int, default=5, help="sets that each measure puts forward to be folded")
    parser.add_argument("--held-out", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--folds", action="store_true", help="study the folds of the default's layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines of what was measured")
    parser.add_argument("--read", type=Path, help="print the second table of what --out has kept, and measure nothing")
    options = parser.parse_args()
    if options.read:
        print_regrets(studies_kept(options.read))
        return
    if not options.models:
        parser.error("give --models or --read.")
    ways = ["default", "states alone"] if options.folds else list(WAYS)
    print(f"| model | drop | best | {' | '.join(ways)} |\n|---|---:|---|{'---|' * len(ways)}")
    studies = []
    for model, ratio in itertools.product(options.models, options.drop_ratio):
        studies.append((study_folds if options.folds else study)(options, model, ratio))
        print_line(studies[-1])
        if options.out:
            keep(studies[-1], options.out)
    print_regrets(studies)


if __name__ == "__main__":
    main()
