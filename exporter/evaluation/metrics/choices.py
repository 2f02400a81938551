"""Multiple choice: MMBench, SEED-Bench, ScienceQA, A-OKVQA. The options stand in the prompt, a letter is read. Pure.

MMBench (arXiv 2307.06281) asks every question as often as it has options, each time with the options moved on by one
place, and counts it where all of them are right. A line of a file that holds those turns (its index has 1,000,000
added for each) is taken as it is, others are turned here. How a letter is read out of an answer follows lmms-eval
0.7.3, whose static reading of MMBench asks no judge; A-OKVQA's soft score is that of its authors
(github.com/allenai/aokvqa).
"""

from __future__ import annotations

import re
import string
from collections.abc import Hashable, Sequence
from dataclasses import replace

from ...data.answers import AS_LETTER, normalise
from ...data.samples import Sample
from .metric import Figures, by_category, mean, with_text

TURN = 1_000_000  # that MMBench adds to an index for each turn of its options
SUFFIX = "Answer with the option's letter from the given choices directly."
SUFFIX_CN = "请直接使用所提供的选项字母作为答案回答。"
HEAD, HEAD_CN = "There are several options:", "有如下几个选项："
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def check(sample: Sample) -> str | None:
    """Say what is wrong with a line that has no options."""
    if len(sample.choices) < 2:
        return f"there are {len(sample.choices)} choices where two or more are needed"
    return None


def letters(sample: Sample) -> str:
    """Return the letters of the options."""
    return string.ascii_uppercase[: len(sample.choices)]


def right_letters(sample: Sample) -> str:
    """Return the letter of the right option; more than one where options say the same."""
    answer_field, texts = sample.fields.get("answer"), [normalise(choice) for choice in sample.choices]
    if (
        isinstance(answer_field, str)
        and normalise(answer_field) not in texts
        and (spelt := AS_LETTER.match(answer_field.strip()))
    ):
        letter = spelt[1].upper()
        if letter in letters(sample):
            return letter
    right = {normalise(answer) for answer in sample.answers}
    return "".join(letter for letter, text in zip(letters(sample), texts, strict=True) if text in right)


# --- prompts ----------------------------------------------------------------------------------------------------------


def options_of(sample: Sample) -> str:
    """Return the options, one a line."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters(sample), sample.choices, strict=True))


def _holds_options(text: str, sample: Sample) -> bool:
    return all(f"{letter}. {choice}" in text for letter, choice in zip(letters(sample), sample.choices, strict=True))


def _put(sample: Sample, before: str, after: str) -> Sample:
    """Put the options behind the question, where they do not stand in it already."""

    def change(text: str) -> str:
        return text if _holds_options(text, sample) else f"{before}{text}{after}"

    return with_text(sample, change)


def put(sample: Sample) -> list[Sample]:
    """Put the options below the question, and ask for a letter."""
    return [_put(sample, "", f"\n{options_of(sample)}\n{SUFFIX}")]


def put_scienceqa(sample: Sample) -> list[Sample]:
    """Put the hint before the question, where there is one."""
    hint = str(sample.fields.get("hint") or "").strip()
    return [_put(sample, f"Context: {hint}\n" if hint else "", f"\n{options_of(sample)}\n{SUFFIX}")]


def put_mmbench(sample: Sample) -> list[Sample]:
    """Put every turn of the options, in English or Chinese, behind the hint and the question."""
    return [_put_mmbench(turned) for turned in turns(sample)]


def _put_mmbench(sample: Sample) -> Sample:
    hint = sample.fields.get("hint")
    before = f"{hint} " if isinstance(hint, str) and hint not in ("", "nan") else ""
    text = "".join(str(turn["content"]) for turn in sample.messages)
    head, suffix = (HEAD_CN, SUFFIX_CN) if CHINESE.search(text) else (HEAD, SUFFIX)
    return _put(sample, before, f" {head}\n{options_of(sample)}\n{suffix}")


def turns(sample: Sample) -> list[Sample]:
    """Return a question with its options moved on by 0, 1 … places; alone, where its line is one of several turns."""
    if _is_turned(sample):
        return [sample]
    right, count = right_letters(sample), len(sample.choices)
    turned = []
    for step in range(count):
        order = [(place + step) % count for place in range(count)]
        moved = [letter for letter, old in zip(letters(sample), order, strict=True) if letters(sample)[old] in right]
        fields = {**sample.fields, "answer": moved[0] if moved else sample.fields.get("answer")}
        fields["index"] = f"{_index(sample)}+{step}"
        turned.append(replace(sample, choices=tuple(sample.choices[old] for old in order), fields=fields))
    return turned


def _index(sample: Sample) -> str:
    return str(sample.fields.get("index", sample.origin))


def _number(sample: Sample) -> int | None:
    index = _index(sample).removesuffix(".0")
    return int(index) if index.isdigit() else None


def _is_turned(sample: Sample) -> bool:
    """Tell whether the task holds the turns itself."""
    return bool(sample.fields.get("turned"))


def mark_turned(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Mark the lines of a task that holds MMBench's turns itself."""
    if not any((_number(sample) or 0) >= TURN for sample in samples):
        return samples
    return [replace(sample, fields={**sample.fields, "turned": True}) for sample in samples]


def mmbench_group(sample: Sample) -> Hashable:
    """Return which question a turn belongs to."""
    number = _number(sample)
    return number % TURN if number is not None and _is_turned(sample) else _index(sample).rpartition("+")[0]


def mmbench_turns(sample: Sample) -> int:
    """Return how many turns a question has."""
    return len(sample.choices)


# --- reading ----------------------------------------------------------------------------------------------------------


def is_letter(sample: Sample, letter: str) -> float:
    """Return 1 for the right letter."""
    return float(letter != "" and letter in right_letters(sample))


def seed_value(sample: Sample, answer: str) -> float:
    """Return 1 where the first letter of the answer is right."""
    return is_letter(sample, answer.strip()[:1].upper())


def scienceqa_value(sample: Sample, answer: str) -> float:
    """Return 1 for the right letter alone, or as 'B. …'."""
    reply = answer.strip()
    if len(reply) >= 2 and reply[0].isupper() and reply[1] == ".":
        reply = reply[0]
    return is_letter(sample, reply.upper() if len(reply) == 1 else "")


def mmbench_value(sample: Sample, answer: str) -> float:
    """Return 1 where the letter that is read out of the answer is right."""
    return is_letter(sample, read_letter(answer, sample.choices))


BRACKETS = tuple("{} {}. {}, {}: {}) {}). ({}) ({}). :{} :{}, :{}. :{}) :{}).".split())  # round a word
OF_MMBENCH = "ABCDE"  # letters that may be an answer, whatever the number of options


def read_letter(answer: str, choices: Sequence[str]) -> str:
    """Return the letter that an answer means, '' for none: a word of its own, an option's text, other spellings.

    A letter counts where it is the only one that is written so; an A among more than three words is an article.
    """
    words = answer.split()
    for bracket in BRACKETS:
        written = [letter for letter in OF_MMBENCH if bracket.format(letter) in words]
        if len(written) == 1 and not (bracket == "{}" and "A" in words and len(words) > 3):
            return written[0]
    lowered = answer.lower()
    valid = string.ascii_uppercase[: len(choices)]
    named = [letter for letter, choice in zip(valid, choices, strict=True) if choice.lower() in lowered]
    if len(named) == 1:
        return named[0]
    return read_freely(answer, valid)


PHRASES = (
    *(
        f"{the}{which}{thing} is"
        for the in ("", "the ")
        for which in ("", "correct ", "best ")
        for thing in ("answer", "choice", "option")
        if (which, thing) not in (("", "option"), ("best ", "choice"))
    ),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
RANKS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))  # the higher, the surer


def read_freely(answer: str, valid: str) -> str:
    """Return the likeliest of the valid letters in a longer answer, '' for none.

    A letter at the very begin is surest, then at the very end, behind 'the answer is', and in brackets; of two as sure
    the later one.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    readings: list[tuple[int, int, str]] = []
    for letter in valid:
        readings += [(rank, text.rfind(s), letter) for form, rank in RANKS if (s := form.format(letter)) in text]
        if bare.startswith(letter) and not bare[1:2].isalpha():
            readings.append((10, 0, letter))
        if bare.endswith(letter) and not bare[:-1][-1:].isalpha():
            readings.append((9, len(text) - 1, letter))
    lowered = text.lower()
    for phrase in PHRASES:
        if (at := lowered.find(phrase)) >= 0:
            hits = [(text.find(letter, at + len(phrase)), letter) for letter in valid]
            readings += [(7, at, letter) for at, letter in hits if at >= 0]
    readings = readings or [(0, text.rfind(letter), letter) for letter in valid if letter in text]
    return max(readings, key=lambda reading: reading[:2])[2] if readings else ""


# --- figures ----------------------------------------------------------------------------------------------------------


def mmbench_figures(samples: Sequence[Sample], answers: Sequence[str]) -> Figures:
    """Return the share of questions of which every turn is right, of all and by category, and of turns alone."""
    right: dict[Hashable, list[float]] = {}
    categories: dict[Hashable, str] = {}
    for sample, answer in zip(samples, answers, strict=True):
        group = mmbench_group(sample)
        right.setdefault(group, []).append(mmbench_value(sample, answer))
        categories.setdefault(group, str(sample.fields.get("category")))
    whole = {group: float(all(values)) for group, values in right.items()}
    figures = {"circular": mean(whole.values()), "each turn": mean(v for values in right.values() for v in values)}
    for category in sorted(set(categories.values()) - {"None"}):
        figures[f"circular ({category})"] = mean(whole[group] for group in whole if categories[group] == category)
    return figures


def seed_figures(samples: Sequence[Sample], answers: Sequence[str]) -> Figures:
    """Return the accuracy of each dimension."""
    values = [seed_value(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    dimensions = by_category(samples)
    return {f"accuracy ({name})": mean(values[n] for n in numbers) for name, numbers in dimensions.items()}


def scienceqa_figures(samples: Sequence[Sample], answers: Sequence[str]) -> Figures:
    """Return the accuracy of questions with an image, and without."""
    values = [(s.is_seen, scienceqa_value(s, a)) for s, a in zip(samples, answers, strict=True)]
    kinds = {True: "with an image", False: "without an image"}
    there = {kind for kind, _ in values}
    return {
        f"accuracy ({kinds[kind]})": mean(value for has_image, value in values if has_image == kind)
        for kind in (True, False)
        if kind in there
    }


# --- A-OKVQA ----------------------------------------------------------------------------------------------------------


def direct_answers(sample: Sample) -> list[str]:
    """Return the ten people's answers, those that say the same among them."""
    answers: list[str] = list(sample.fields.get("direct_answers") or ())
    return answers


def direct_value(sample: Sample, answer: str) -> float:
    """Return a third for each person who answered so, 1 at most."""
    reply = answer.strip().lower()
    return min(1.0, sum(direct.strip().lower() == reply for direct in direct_answers(sample)) / 3)
