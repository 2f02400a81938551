"""Answers, choices and types as data sets of this field write them, as the texts that answers are compared with. Pure.

VQA-v2 and TextVQA have ten objects a question, TriviaQA one with aliases, ScienceQA an index among choices, MMMU a
letter and its choices as a Python list in a string, AI2D an index in quotes.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError

ANSWER_KEYS = ("answer", "value", "text")  # of an object: VQA-v2 and TextVQA, TriviaQA, SQuAD and DocVQA
ALIAS_KEYS = ("aliases", "normalized_value", "normalized_aliases")
LETTERS = string.ascii_lowercase
LABELLED = re.compile(r"^\(?([A-Za-z])[).:]\s+(\S.*)$", re.DOTALL)
AS_LETTER = re.compile(r"^\(?([A-Za-z])[).:]?$")


def read_answers(value: Any, origin: str) -> tuple[str, ...]:
    """Return every text that counts as right, each once; none for null, for empty texts, and for an empty list.

    Numbers are written out (3.0 as '3' too, since tables turn whole numbers into that), true is 'yes' or 'true'.
    Raises: InputError for what can be no answer.
    """
    return tuple(dict.fromkeys(_texts(value, origin)))


def _texts(value: Any, origin: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return ["yes", "true"] if value else ["no", "false"]
    if isinstance(value, int):
        return [str(value)]
    if isinstance(value, float):
        return [str(int(value))] * value.is_integer() + [str(value)]
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Sequence):
        return [text for item in value for text in _texts(item, origin)]
    if isinstance(value, Mapping):
        keys = [key for key in (*ANSWER_KEYS, *ALIAS_KEYS) if key in value]
        if any(key in ANSWER_KEYS for key in keys):
            return [text for key in keys for text in _texts(value[key], origin)]
        raise InputError(
            f"{origin}: an answer is an object with {', '.join(map(str, value)) or 'nothing'}: one of "
            f"{', '.join(ANSWER_KEYS)} is needed in it."
        )
    raise InputError(f"{origin}: an answer is text, not {type(value).__name__}.")


def read_choices(value: Any, origin: str) -> dict[str, str]:
    """Return choices by their letters, in order, or by the keys that they are given with; {} for none.

    Raises: InputError for what is no list of texts and numbers.
    """
    value = read_listed(value, "choices", origin)  # MMMU
    if value is None:
        return {}
    if isinstance(value, Mapping) and isinstance(value.get("text"), Sequence) and "label" in value:  # ARC
        labels, value = value["label"], value["text"]
        if isinstance(value, str) or not isinstance(labels, Sequence) or len(labels) != len(value):
            raise InputError(f"{origin}: 'choices' needs as many labels as texts.")
        return dict(zip(map(str, labels), (_choice(item, origin) for item in value), strict=True))
    if isinstance(value, Mapping):
        named = {str(key): _choice(item, origin) for key, item in value.items() if item is not None}
        return {key: named[key] for key in sorted(named)} if all(len(key) == 1 for key in named) else named
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{origin}: 'choices' must be a list or a mapping of letters to texts, not {value!r}.")
    texts = [_choice(item, origin) for item in value]
    if len(texts) > len(LETTERS):
        raise InputError(f"{origin}: {len(texts)} choices are more than there are letters ({len(LETTERS)}).")
    return dict(zip(LETTERS, _without_letters(texts), strict=False))


def read_listed(value: Any, name: str, origin: str) -> Any:
    """Return a list that stands as one in a text; anything else as it is. Raises InputError for a text that is none."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise InputError(f"{origin}: '{name}' is a text that is no list.") from error


def lettered_choices(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the choices of a record that has a column for each: A, B … of MMBench, choice_a … of SEED-Bench."""
    for name in ("{}", "choice_{}"):
        columns = {letter: name.format(letter.upper() if name == "{}" else letter) for letter in LETTERS}
        texts = {letter: record.get(column) for letter, column in columns.items()}
        there = {letter: text for letter, text in texts.items() if _is_option(text)}
        if len(there) > 1 and "".join(there) == LETTERS[: len(there)]:
            return there
    return None


def _is_option(text: Any) -> bool:
    """Tell an option from what tables write for none: MMBench has 'nan'."""
    return isinstance(text, str | int | float) and not isinstance(text, bool) and str(text).strip() not in ("", "nan")


def _choice(item: Any, origin: str) -> str:
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, str | int | float) and str(item).strip():
        return str(int(item) if isinstance(item, float) and item.is_integer() else item)
    raise InputError(f"{origin}: a choice is a text or a number, not {item!r}.")


def _without_letters(texts: list[str]) -> list[str]:
    """Return 'A. red', 'B. blue' without the letters, which are counted anyway."""
    matches = [LABELLED.match(text) for text in texts]
    if all(match and match[1].lower() == letter for match, letter in zip(matches, LETTERS, strict=False)):
        return [match[2] for match in matches if match]
    return texts


def answers_among(answers: tuple[str, ...], value: Any, choices: Mapping[str, str], origin: str) -> tuple[str, ...]:
    """Return the texts of the choices that answers mean: a choice itself, its letter or key, or its index from 0.

    Args:
        answers: `value` as texts.
    Raises: InputError where none of the answers is among the choices.
    """
    if not choices or not answers:
        return answers
    texts = {normalise(text): text for text in choices.values()}
    if any(normalise(answer) in texts for answer in answers):
        return answers
    meant: list[str] = []
    for answer in answers:
        key = _key_of(answer, choices)
        if key is not None:  # a key that is no letter in order is what a model will say
            meant.append(choices[key])
            if list(choices).index(key) != LETTERS.find(key.lower()):
                meant.append(key)
    if not meant:
        shown = value if isinstance(value, str | int | float) else answers[0]
        hint = f" Indices are counted from 0, to {len(choices) - 1}." if isinstance(value, int) else ""
        raise InputError(
            f"{origin}: the answer {shown!r} is none of the choices ({', '.join(choices.values())}).{hint}"
        )
    return tuple(dict.fromkeys(meant))


def _key_of(answer: str, choices: Mapping[str, str]) -> str | None:
    """Return the key that an answer spells: itself, its letter in any case, '(B)' or 'B.', or an index."""
    answer = answer.strip()
    lowered = {key.lower(): key for key in choices}
    letter = AS_LETTER.match(answer)
    for word in (answer, letter[1] if letter else answer):
        if word.lower() in lowered:
            return lowered[word.lower()]
    if answer.isascii() and answer.isdigit() and len(answer) < 4 and int(answer) < len(choices):
        return list(choices)[int(answer)]
    if letter and (index := LETTERS.index(letter[1].lower())) < len(choices):
        return list(choices)[index]
    return None


def read_type(value: Any) -> str | None:
    """Return a type of question as one text, None for none: results are given by it, and sorted."""
    if value is None or value == "" or value == [] or value == {}:
        return None
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {read_type(item)}" for key, item in value.items() if item is not None) or None
    if isinstance(value, list | tuple):
        return ", ".join(text for item in value if (text := read_type(item))) or None
    return str(value)


def normalise(text: str) -> str:
    """Return what exact match compares: lower case, single spaces, no full stop at the end."""
    return " ".join(text.split()).casefold().rstrip(".").strip()
