"""The metrics by their names, and which of them a task's columns ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...data.samples import Sample
from ...errors import InputError, nearest
from ..scoring import is_right
from . import choices, judged, vqa, yes_no
from .metric import Metric, questions_for, with_suffix


def exact(sample: Sample, answer: str) -> float:
    """Return 1 for a right answer, word for word, or the letter of the right choice."""
    return float(is_right(answer, sample.answers, sample.choices))


DEFAULT_METRIC = "exact"
METRICS = {
    "exact": Metric("exact match", exact),
    "pope": Metric("POPE accuracy", yes_no.pope_value, check=yes_no.neither_yes_nor_no, figures=yes_no.pope_figures),
    "mme": Metric(
        "MME accuracy",
        yes_no.mme_value,
        needs=("category", "question_id"),
        check=yes_no.mme_check,
        figures=yes_no.mme_figures,
        group=yes_no.mme_picture,
        group_size=yes_no.mme_pair,
    ),
    "choice": Metric("accuracy", choices.mmbench_value, check=choices.check, put=choices.put),
    "mmbench": Metric(
        "MMBench circular",
        choices.mmbench_value,
        check=choices.check,
        put=choices.put_mmbench,
        figures=choices.mmbench_figures,
        prepare=choices.mark_turned,
        group=choices.mmbench_group,
        group_size=choices.mmbench_turns,
        as_one=True,
    ),
    "seed": Metric(
        "SEED accuracy", choices.seed_value, check=choices.check, put=choices.put, figures=choices.seed_figures
    ),
    "scienceqa": Metric(
        "ScienceQA accuracy",
        choices.scienceqa_value,
        check=choices.check,
        put=choices.put_scienceqa,
        figures=choices.scienceqa_figures,
        text_only=True,
    ),
    "aokvqa": Metric("A-OKVQA multiple choice", choices.mmbench_value, check=choices.check, put=choices.put),
    "aokvqa-direct": Metric("A-OKVQA direct answer", choices.direct_value, needs=("direct_answers",)),
    "vqa": Metric("VQA accuracy", vqa.value, needs=("answer",), check=vqa.too_few),
    "textvqa": Metric("TextVQA accuracy", vqa.value_textvqa, needs=("answer",), check=vqa.too_few),
    "llava-bench": Metric(
        "judge's score",
        judged.no_value,
        needs=("reference", "caption"),
        judged=True,
    ),
}


def chosen(name: str | None, samples: Sequence[Sample]) -> str:
    """Return the name of a metric: the one that is asked for, else the one that a task's columns clearly ask for.

    Raises: InputError for a name that there is not.
    """
    if name is not None:
        if name not in METRICS:
            raise InputError(f"metric '{name}' is not known: {nearest(name, tuple(METRICS))}")
        return name
    for candidate, clear in CLEAR.items():
        if all(clear(sample) for sample in samples):
            return candidate
    return DEFAULT_METRIC


def _has(sample: Sample, *columns: str) -> bool:
    return all(sample.fields.get(column) not in (None, "") for column in columns)


CLEAR: dict[str, Callable[[Sample], bool]] = {  # what every line has to be
    "pope": lambda sample: (
        sample.fields.get("category") in yes_no.POPE_SPLITS and yes_no.neither_yes_nor_no(sample) is None
    ),
    "mme": lambda sample: _has(sample, "question_id", "category") and yes_no.mme_check(sample) is None,
    "llava-bench": lambda sample: _has(sample, "reference", "caption"),
    "aokvqa": lambda sample: _has(sample, "direct_answers") and len(sample.choices) > 1,
    "mmbench": lambda sample: _has(sample, "index", "A", "B"),
    "seed": lambda sample: _has(sample, "choice_a", "choice_b"),
    "scienceqa": lambda sample: "hint" in sample.fields and len(sample.choices) > 1,
    "vqa": lambda sample: isinstance(people := sample.fields.get("answer"), list) and len(people) == PEOPLE,
}
PEOPLE = 10  # who answer a question of VQAv2 and TextVQA

__all__ = ["DEFAULT_METRIC", "METRICS", "Metric", "chosen", "questions_for", "with_suffix"]
