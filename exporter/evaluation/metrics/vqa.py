"""VQA's soft accuracy, for VQAv2, TextVQA and what follows them. Pure.

An answer is worth min(1, people who said so / 3), averaged over leaving each of the ten people out (S. Antol et al.,
2015, visualqa.org/evaluation.html). Texts are compared after contractions got their apostrophes, number words became
digits, and articles and punctuation went. TextVQA's answers go through one more step first (Pythia's), as in lmms-
eval 0.7.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ...data.samples import Sample
from .metric import mean

SPELT = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()
# Misspelt with one apostrophe too few; the last entry is the evaluation's own, the wrong way round.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in SPELT for place, mark in enumerate(word) if mark == "'"
} | {"somebody'd": "somebodyd"}
NUMBERS = dict(
    zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
        strict=True,
    )
)
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")


def plain(text: str) -> str:
    """Return what VQAv2 compares."""
    text = " ".join(re.split(r"[\n\t]", text)).strip()
    return without_articles(without_punctuation(text))


def plain_textvqa(text: str) -> str:
    """Return what TextVQA compares: commas, question marks and the 's of a genitive go first."""
    return plain(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def without_punctuation(text: str) -> str:
    """Take punctuation away beside spaces and in numbers, and put a space for it elsewhere; full stops go."""
    kept = text
    in_number = COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_space or in_number else " ")
    return PERIOD.sub("", kept)


def without_articles(text: str) -> str:
    """Return lower case without articles, numbers from none to ten as digits, contractions with their apostrophe."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def people(sample: Sample) -> list[str]:
    """Return what each person answered, those that say the same among them."""
    field = sample.fields.get("answer")
    answers = field if isinstance(field, Sequence) and not isinstance(field, str) else [field]
    return [str(person["answer"] if isinstance(person, dict) else person) for person in answers]


def too_few(sample: Sample) -> str | None:
    """Say what is wrong with a line that holds fewer answers than soft accuracy leaves out."""
    answers: Any = sample.fields.get("answer")
    if not isinstance(answers, list) or len(answers) < 2:
        return "'answer' is no list of several people's answers"
    if any(isinstance(person, dict) and "answer" not in person for person in answers):
        return "one of the people's answers is an object without 'answer'"
    return None


def soft(answers: Sequence[str], answer: str) -> float:
    """Return the mean over leaving each person out of min(1, others who said so / 3)."""
    same = sum(other == answer for other in answers)
    return mean(min(1.0, (same - (other == answer)) / 3) for other in answers)


def value(sample: Sample, answer: str, compared: Callable[[str], str] = plain) -> float:
    """Return VQAv2's soft accuracy."""
    return soft([compared(person) for person in people(sample)], compared(answer))


def value_textvqa(sample: Sample, answer: str) -> float:
    """Return TextVQA's soft accuracy."""
    return value(sample, answer, plain_textvqa)
