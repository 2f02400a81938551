"""POPE and MME: questions whose answer is yes or no. Pure.

POPE (arXiv 2305.10355) asks for objects that are, or are not, in a picture, in three splits. MME (arXiv 2306.13394)
asks two questions of every picture, one to be answered by yes and one by no, and also counts pictures of which both
are right. Which answers count is as in lmms-eval 0.7.3: POPE takes nothing but the word; MME the first four letters.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ...data.samples import Sample
from .metric import Figures, by_category, mean

POPE_SPLITS = ("adversarial", "popular", "random")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PAIR = 2  # questions that MME asks of a picture


def truth(sample: Sample) -> str:
    """Return 'yes' or 'no', or what else the line has for an answer."""
    return sample.answers[0].lower().strip().replace(".", "") if sample.answers else ""


def neither_yes_nor_no(sample: Sample) -> str | None:
    """Say what is wrong with a line whose answer is neither."""
    return None if truth(sample) in ("yes", "no") else f"the answer {truth(sample)!r:.60} is neither yes nor no"


# --- POPE -------------------------------------------------------------------------------------------------------------


def pope_value(sample: Sample, answer: str) -> float:
    """Return 1 for the right word, alone."""
    return float(answer.lower().strip() == truth(sample))


def pope_figures(samples: Sequence[Sample], answers: Sequence[str]) -> Figures:
    """Return accuracy, precision, recall, F1 and the share of yes, of all questions and of each split."""
    figures = _confusion(samples, answers)
    splits = by_category(samples)
    if len(splits) > 1:
        for split, numbers in splits.items():
            of_split = _confusion([samples[n] for n in numbers], [answers[n] for n in numbers])
            figures |= {f"{name} ({split})": value for name, value in of_split.items()}
    return figures


def _confusion(samples: Sequence[Sample], answers: Sequence[str]) -> Figures:
    words = [answer.lower().strip() for answer in answers]
    pairs = list(zip((truth(sample) for sample in samples), words, strict=True))
    right, wrong = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    precision = right / (right + wrong) if right + wrong else 0.0
    positives = right + pairs.count(("yes", "no"))  # an answer that is neither is in no row of the confusion matrix
    recall = right / positives if positives else 0.0
    return {
        "accuracy": mean(float(right_word == word) for right_word, word in pairs),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes ratio": mean(float(word == "yes") for word in words),
        "yes ratio of the right answers": mean(float(right_word == "yes") for right_word, _ in pairs),
        "neither yes nor no": mean(float(word not in ("yes", "no")) for word in words),
    }


# --- MME --------------------------------------------------------------------------------------------------------------


def mme_check(sample: Sample) -> str | None:
    """Say what is wrong with a line that is none of MME's."""
    category = str(sample.fields.get("category"))
    if category not in PERCEPTION + COGNITION:
        return f"the category {category!r:.60} is none of MME's ({', '.join(PERCEPTION + COGNITION)})"
    return neither_yes_nor_no(sample)


def mme_read(answer: str) -> str:
    """Return 'yes' or 'no' by the first four letters of what was said, else 'other'."""
    reply = answer.lower().strip().replace(".", "")
    if len(reply) == 1:
        return {"y": "yes", "n": "no"}.get(reply, "other")
    begin = reply[:4]
    return "yes" if "yes" in begin else "no" if "no" in begin else "other"


def mme_value(sample: Sample, answer: str) -> float:
    """Return 1 for an answer that begins with the right word."""
    return float(mme_read(answer) == truth(sample))


def mme_picture(sample: Sample) -> Hashable:
    """Return what tells pictures apart: the two questions of one have a question_id together."""
    return sample.fields["category"], str(sample.fields["question_id"])


def mme_pair(_sample: Sample) -> int:
    """Return how many questions a picture has."""
    return PAIR


def mme_figures(samples: Sequence[Sample], answers: Sequence[str]) -> Figures:
    """Return accuracy and accuracy+; in points each task's score (100 x accuracy + 100 x accuracy+), and their sums."""
    values = [mme_value(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    pictures: dict[str, dict[Hashable, list[float]]] = {}
    for sample, value in zip(samples, values, strict=True):
        pictures.setdefault(str(sample.fields["category"]), {}).setdefault(mme_picture(sample), []).append(value)
    both = {task: [float(all(pair)) for pair in of_task.values()] for task, of_task in pictures.items()}
    scores = {
        task: 100 * mean(mean(pair) for pair in of_task.values()) + 100 * mean(both[task])
        for task, of_task in pictures.items()
    }
    figures = {"accuracy": mean(values), "accuracy+": mean(value for of_task in both.values() for value in of_task)}
    for sum_name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if there := [task for task in tasks if task in scores]:
            figures[f"{sum_name} (points)"] = sum(scores[task] for task in there)
            figures |= {f"{task} (points)": scores[task] for task in there}
    return figures
