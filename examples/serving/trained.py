"""A trained folder and a task through vLLM: answers as transformers', and what they are worth beside `evaluate`.

A folder with a serving router answers all questions under budgets of all kinds in turn, and again from vLLM's caches;
then all of them under each of its presets. The router is told the question where a budget in turn says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rows import Row, shown
from tiny_folders import Asked

Budgets = tuple[dict[str, Any], ...]
LONGEST = 4096  # tokens of a prompt and its answer, where the model itself takes more


@dataclass
class Preset:
    """One budget under which all questions are put."""

    name: str
    budget: dict[str, Any] = field(default_factory=dict)  # of a request
    right: float = 0.0  # exact match, or what else the task is rated by, by vLLM's answers
    evaluated: float = 0.0  # by `evaluate`


@dataclass
class PresetsRow(Row):
    """All questions of a task, once under each preset, one preset after the other."""

    task: Any = None  # exporter.data.task.Task
    file: Path = Path()
    presets: list[Preset] = field(default_factory=list)

    def rate(self) -> None:
        """Rate vLLM's answers as `evaluate` rates them, and have it rate the folder itself."""
        from exporter.clean_room import load_processor
        from exporter.evaluation.metrics.table import METRICS

        metric, tokenizer, number = (
            METRICS[self.task.metric],
            load_processor(self.folder).tokenizer,
            len(self.task.samples),
        )
        answers = [answer.get("tokens", []) for answer in self.vllm["rounds"][0]]
        for i, preset in enumerate(self.presets):
            mine = answers[i * number : (i + 1) * number]
            texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in mine]
            values = [metric.value(sample, text) for sample, text in zip(self.task.samples, texts, strict=True)]
            preset.right = sum(values) / number
        for preset, value in zip(self.presets, evaluated(self.folder, self.file, self.presets, number), strict=True):
            preset.evaluated = value

    def lines(self) -> list[str]:
        if "start" in self.vllm:
            return [f"| {self.name} | does not start: {shown(self.vllm['start'])} | – | – | – |"]
        number = len(self.task.samples)
        self.rate()
        lines = []
        for i, preset in enumerate(self.presets):
            both = zip(self.vllm["rounds"][0], self.torch, strict=True)
            same = [a.get("tokens") == b["tokens"] for a, b in both][i * number : (i + 1) * number]
            rated = f"{preset.right:.1%} | {preset.evaluated:.1%}"
            lines.append(f"| {self.name}, {preset.name} | {sum(same)} of {number} | – | {rated} |")
        return lines


@dataclass
class MixedRow(Row):
    """All questions of a task in one batch, under budgets of all kinds in turn; then again."""

    def lines(self) -> list[str]:
        if "start" in self.vllm:
            return [f"| {self.name} | does not start: {shown(self.vllm['start'])} | – | – | – |"]
        counts = " | ".join(f"{self.equal(time, 'tokens')} of {len(self.questions)}" for time in (0, 1))
        return [f"| {self.name}, budgets in turn | {counts} | – | – |"]


def evaluated(folder: Path, task: Path, presets: list[Preset], samples: int) -> list[float]:
    """Return what `lvlm-exporter evaluate` says of a folder under presets, in their order."""
    from exporter import BudgetGrid, evaluate

    names = tuple(preset.name for preset in presets if preset.budget)
    models = evaluate(folder, task, budgets=BudgetGrid(presets=names), samples=samples, update_cards=False).models
    return [model.accuracy for model in models]


def trained_rows(name: str, folder: Path, file: Path, samples: int, work: Path, budgets: Budgets) -> Iterator[Row]:
    """Yield what is asked of a trained folder, with a serving router or without, on questions of a task.

    Args:
        samples: how many of the task's questions, drawn as `evaluate --samples` draws them.
        work: where the pictures are written for vLLM.
        budgets: of requests, in turn; the ids of a question in one of them stand for those of each question itself.
    """
    from exporter.checkpoints.source import open_source
    from exporter.clean_room import load_processor
    from exporter.evaluation.metrics.task import measured_task
    from exporter.modeling.served_router import ServingSettings
    from exporter.recipe import TaskData
    from exporter.routing.serving.folder import has_serving_router

    source, task = open_source(str(folder)), measured_task(TaskData(str(file)), samples, seed=0)
    settings = ServingSettings.of(source.config) if has_serving_router(source) else None
    put = Questions(task, load_processor(folder), work / "images" / name)
    places = source.config.get_text_config().max_position_embeddings
    shared: dict[str, Any] = {
        "kind": "trained",
        "name": name,
        "folder": folder,
        "served": settings is not None,
        "new_tokens": task.longest(put.processor),
        "options": {"max_model_len": min(places, LONGEST)},
    }
    presets = [Preset("off", budget={"preset": "off"}) if settings else Preset("plain model")]
    if settings is not None:
        aware = settings.question_aware
        in_turn = [put.under(i, budgets[i % len(budgets)], aware) for i in range(len(task.samples))]
        yield MixedRow(**shared, questions=in_turn, times=2)
        presets += [Preset(preset, {"preset": preset}) for preset in settings.presets]
    asked = [put.under(i, preset.budget, tell=False) for preset in presets for i in range(len(task.samples))]
    yield PresetsRow(**shared, questions=asked, task=task, file=file, presets=presets)


@dataclass
class Questions:
    """The questions of a task, their pictures written once for vLLM."""

    task: Any
    processor: Any
    images: Path

    def under(self, number: int, budget: dict[str, Any], tell: bool) -> Asked:
        """Return a question under a budget; where that has a question's ids, with its own, or without any."""
        from exporter.routing.serving.questions import question_ids

        sample = self.task.samples[number]
        pictures, files = sample.open_images(), []
        self.images.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            files.append(str(self.images / f"{number}-{i}.png"))
            picture.save(files[-1])
        asks = {key: value for key, value in budget.items() if key != "question_ids"}
        if tell and "question_ids" in budget:
            asks["question_ids"] = question_ids([sample], self.processor)[0]
        return Asked(sample.chat(), pictures, files, asks)
