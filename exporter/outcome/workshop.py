"""Makes candidates' folders, each from the one before, and measures them: the answer's time by parts, and the task."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmark.bench import TimedModel, bench, ready, time_interleaved
from ..benchmark.figures import BenchOptions, Figures
from ..benchmark.subject import Setup
from ..benchmark.torch_subject import TorchSubject, clone_that_shares_weights, describe_way, load_torch
from ..checkpoints.record import RECORD, read_record
from ..checkpoints.source import open_source
from ..clean_room import load_processor
from ..data.batches import by_size, make_batch
from ..evaluation.evaluate import evaluate
from ..evaluation.judge import HALF
from ..evaluation.metrics.table import METRICS
from ..evaluation.metrics.task import Measure
from ..families import PER_LAYER_TENSORS
from ..models.variants import Variant, assembled
from ..onnx.pipeline import ExportOptions, export
from ..onnx.runtime.load import load as load_onnx
from ..pipeline import compress, heal, route
from ..plan import make_plan
from ..progress import Progress
from ..recipe import HealRecipe, RouterRecipe
from ..routing.folder import set_default
from ..routing.requests import BudgetGrid, router_settings
from .answer_cost import PARTS
from .candidate import Candidate
from .job import SearchJob
from .step_costs import StepCosts, step_of

ROUNDS = 10  # of timing, in turn with the original
PROBED = (1 / 4, 1 / 2)  # shares of the layers without which the original is timed
COUNTED = ("vision_flops", "flops", "decode_flops")  # names of bench's, in the order of PARTS
TIMED = ("vision_ms", "prefill_ms", "decode_ms")


@dataclass
class Workshop:
    """Where folders of a search are made and measured."""

    job: SearchJob
    work: Path  # folders of candidates
    answers: Path  # JSONL file of what was answered: an evaluation that is broken off goes on from it
    costs: StepCosts
    progress: Progress

    # making

    @property
    def folders(self) -> set[str]:
        """Return the folders that are there."""
        return {path.name for path in self.work.glob("[!.]*")} if self.work.is_dir() else set()

    def folder_of(self, candidate: Candidate) -> Path:
        """Return a candidate's folder, made and verified first where it is not there, and those that it is made from.

        Raises: InputError, CheckFailed, as the steps do.
        """
        if candidate.is_original:
            return Path(self.job.recipe.model)
        folder = self.work / candidate.folder
        if folder.exists():
            return folder
        assert candidate.before is not None
        plain = step_of(candidate) == "compress"
        base = Path(self.job.recipe.model) if plain else self.folder_of(candidate.before)
        self.work.mkdir(exist_ok=True)
        begin = time.monotonic()
        self._make(candidate, str(base), folder)
        self.costs.add(step_of(candidate), time.monotonic() - begin)
        return folder

    def _make(self, candidate: Candidate, base: str, folder: Path) -> None:
        recipe, options = self.job.recipe, self.job.options
        step = step_of(candidate)
        if step == "compress":
            compress(candidate.recipe(recipe), folder, options, self.progress)
        elif step == "heal":
            healing = HealRecipe(recipe.heal_calibration, teacher=recipe.model, seed=recipe.seed)
            heal(base, healing, out=folder, options=options, progress=self.progress)
        elif step == "route":
            router = RouterRecipe(calibration=recipe.calibration.unanswered, seed=recipe.seed)
            route(base, router, out=folder, options=options, progress=self.progress)
        else:
            export(base, folder, ExportOptions(quantize="int8"))

    def held_out(self, candidate: Candidate) -> dict[str, Any] | None:
        """Return what held-out questions said of a folder when it was made: divergence, and the same answers' share."""
        folder = self.folder_of(candidate)
        if not (folder / RECORD).is_file():
            return None
        data = read_record(folder).data
        healed = data.get("heal")
        if healed is not None:
            return dict(healed["after"] if healed["kept"] else healed["before"])
        told = data["fold"].get("held_out")
        return None if told is None else dict(told)

    def parameters(self, candidate: Candidate) -> int:
        """Return how many parameters a candidate's model has, a router's left out."""
        folder = self.folder_of(candidate)
        if (folder / RECORD).is_file():
            return read_record(folder).measured.parameters
        return self.job.sizes().parameters_without(candidate.drop)

    def set_default(self, folder: Path, candidate: Candidate) -> None:
        """Let calls that name no budget run under the candidate's, where the router has a preset of it."""
        if candidate.mix.tokens is None:
            return
        presets = router_settings(open_source(str(folder))).presets
        for name, budget in presets.items():
            if dict(budget) == candidate.budget:
                set_default(folder, name)
                return

    def prune(self, needed: Collection[Candidate]) -> None:
        """Remove folders that nothing needs any more: candidates, and what they are made from."""
        keep = set()
        for candidate in needed:
            link: Candidate | None = candidate
            while link is not None:
                keep.add(link.folder)
                link = link.before
        for name in self.folders - keep:
            shutil.rmtree(self.work / name, ignore_errors=True)

    # measuring

    def measure(self, candidate: Candidate, answer_tokens: int) -> dict[str, Any]:
        """Return a candidate's figures: times in turn with the original's, and which questions are right."""
        folder = self.folder_of(candidate)
        begin = time.monotonic()
        figures = self._timed(candidate, folder, answer_tokens)
        correct = self._onnx_correct(folder) if candidate.mix.int8 else self.correct(folder, candidate)
        self.costs.add("measure", time.monotonic() - begin)
        return {**figures, "correct": correct, "seconds": round(time.monotonic() - begin, 1)}

    def correct(self, folder: Path, candidate: Candidate = Candidate(0)) -> list[bool]:
        """Return which of the task's questions a checkpoint answers rightly."""
        correct, _ = self.answered(folder, candidate)
        return correct

    def answered(self, folder: Path, candidate: Candidate = Candidate(0)) -> tuple[list[bool], tuple[str, ...]]:
        """Return which of the task's questions are right, and the answers."""
        recipe = self.job.recipe
        budgets = BudgetGrid() if candidate.budget is None else BudgetGrid((candidate.mix.tokens,))
        done = evaluate(
            [folder],
            recipe.task.data,
            budgets=budgets,
            options=self.job.options,
            samples=recipe.task_samples,
            seed=recipe.seed,
            **recipe.task.options,
            measure=Measure(self.job.task.metric, recipe.task.suffix),
            predictions=self.answers,
            update_cards=False,
            progress=self.progress,
        )
        return list(done.models[0].correct), done.models[0].answers

    def _onnx_correct(self, folder: Path) -> list[bool]:
        """Return the same of a folder of graphs, which ONNX Runtime answers by."""
        model, processor = load_onnx(folder), load_processor(folder)
        config, size = self.job.compression.source.config, self.job.options.batch_size
        samples = by_size(self.job.task.samples)
        longest = self.job.task.longest(processor)
        value = METRICS[self.job.task.metric].value
        right: dict[int, bool] = {}
        starts = range(0, len(samples), size)
        for start in self.progress(starts, f"evaluate {folder.name}", len(starts)):
            some = samples[start : start + size]
            batch = make_batch(some, processor, config)
            inputs: dict[str, Any] = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
            tokens = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
            texts = processor.tokenizer.batch_decode(
                tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for text, sample in zip(texts, some, strict=True):
                right[id(sample)] = value(sample, text) >= HALF
        return [right[id(sample)] for sample in self.job.task.samples]

    def _timed(self, candidate: Candidate, folder: Path, answer_tokens: int) -> dict[str, Any]:
        """Time a candidate in turn with the original."""
        int8 = candidate.mix.int8
        done = bench(
            [folder],
            reference=self.job.recipe.model,
            budgets=[candidate.budget] if candidate.budget else [],
            workload=self.job.workload,
            options=BenchOptions(
                self.job.compression.device,
                self.job.options.dtype,
                new_tokens=answer_tokens,
                rounds=ROUNDS,
                attention="sdpa" if int8 else None,  # one way that torch runs the original, not every one
            ),
            update_cards=False,
            progress=self.progress,
        )
        return figures_of(done.models[-1].batches[0], done.models[0].batches[0], answer_tokens)

    def probe(self, answer_tokens: int) -> dict[str, Any]:
        """Time and count the original whole and without some of its layers, in turn, all on the same weights.

        What a layer takes does not depend on which one it is, nor on its values: so any number of layers can be
        expected before one of them is removed for good.

        Returns: 'depths', by layers gone, with 'ms' and 'flops' of each of PARTS; 'beyond', bytes of an answer.
        """
        job = self.job.compression
        model = load_torch(job.source, Setup(job.device, self.job.options.dtype))
        gone = sorted({min(self.job.free, round(job.source.num_layers * share)) for share in (0, *PROBED)})
        if any(name.endswith(tuple(PER_LAYER_TENSORS)) for name, _ in model.named_parameters()):
            gone = [0]  # such tensors are cut where they are, and the models share them
        with contextlib.ExitStack() as stack:
            timed = []
            for count in gone:
                shown = clone_that_shares_weights(model) if count else model
                stack.enter_context(assembled(shown, Variant(make_plan(job.source.num_layers, self._spread(count)))))
                subject = TorchSubject(
                    job.source.name, None, model=shown, processor=job.processor, runtime=describe_way(shown)
                )
                timed.append(TimedModel(subject, ready(self.job.prompt, job.device), answer_tokens, job.device))
            costs = [run.subject.cost(run.prompt, answer_tokens) for run in timed]
            peaks = [run.peak_beyond(0) for run in timed]
            times = time_interleaved(timed, ROUNDS, self.progress)
        depths = {}
        for count, cost, measured in zip(gone, costs, times, strict=True):
            ms = [statistics.median(measured[name]) for name in TIMED]
            flops = [float(getattr(cost, name) or 0) for name in COUNTED]
            depths[str(count)] = {
                "ms": dict(zip(PARTS, ms, strict=True)),
                "flops": dict(zip(PARTS, flops, strict=True)),
            }
        return {"depths": depths, "beyond": peaks[0] or 0}

    def _spread(self, count: int) -> list[int]:
        """Return so many of the layers that may go, evenly spaced."""
        free = [i for i in range(self.job.compression.source.num_layers) if i not in self.job.compression.protect]
        return [free[int(number * len(free) / count)] for number in range(count)]


def figures_of(mine: Figures, original: Figures, answer_tokens: int) -> dict[str, Any]:
    """Return what a search keeps of a bench: the ratios are those of rounds that lie side by side."""
    ratio = mine.ratio_to_reference
    assert ratio is not None
    low, high = ratio["intervals"]["total_ms"]
    operations = [_operations(dataclasses.asdict(figures), answer_tokens) for figures in (mine, original)]
    kv = mine.kv_bytes or 0
    return {
        "speedup": 1 / ratio["total_ms"],
        "speedup_interval": [1 / high, 1 / low],
        "total_ms": mine.total_ms,
        "original_ms": original.total_ms,
        "ms": {part: getattr(mine, name) for part, name in zip(PARTS, TIMED, strict=True)},
        "ms_of_original": {part: getattr(original, name) for part, name in zip(PARTS, TIMED, strict=True)},
        "flops_share": operations[0] / operations[1] if operations[0] and operations[1] else None,
        "memory_bytes": mine.peak_bytes if mine.peak_bytes is not None else mine.weight_bytes + kv,
        "memory_measured": mine.peak_bytes is not None,
    }


def _operations(figures: dict[str, Any], answer_tokens: int) -> float:
    """Return operations of a whole answer; 0 where they can't be told."""
    vision, prefill, decode = (figures[name] for name in COUNTED)
    return 0.0 if prefill is None or decode is None else (vision or 0) + prefill + answer_tokens * decode
