"""The tokenizer of a Llama: loaded, given a token for pictures, and asked what a prompt has to say around it.

The original codes put a number in the place of a picture and tokenize what stands before and behind it as texts of
their own. Here a picture is a token inside of one text, whose other tokens have to come out the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoints.config_file import first_lines
from ..errors import InputError
from .parts import Original

TURNS = (  # of Vicuna's conversations, in a chat template: IMAGE stands for what a picture is written as
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ IMAGE }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def load_tokenizer(original: Original) -> Any:
    """Return the folder's tokenizer. Raises InputError where it does not load."""
    from transformers import AutoTokenizer

    folder = original.folder
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
        raise InputError(f"{original.name} has no tokenizer (tokenizer.json or tokenizer.model).")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever its classes make of the files; a package that is not there among it
        raise InputError(
            f"{original.name}: its tokenizer does not load ({first_lines(error)}); a tokenizer.model needs "
            "`pip install lvlm-exporter[convert]`."
        ) from error


def add_image_token(tokenizer: Any, image: str) -> int:
    """Give the tokenizer a token for pictures if it has none; return its id."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(image, special=True, normalized=False)], special_tokens=True)
    image_id: int = tokenizer.convert_tokens_to_ids(image)
    return image_id


def behind_image(tokenizer: Any, image: str, begin: str, question: str, ways: Sequence[str]) -> tuple[str, bool]:
    """Return what has to stand behind a picture's token, and whether the tokens are then those of the original code.

    A text of its own may begin with another token than the same text inside a prompt.

    Args:
        begin: what the original tokenizes before a picture; question: what it tokenizes behind.
        ways: in which `question` may begin here; its own beginning is the first, which is returned where none is right.
    """
    parts = [tokenizer(part)["input_ids"] for part in (begin, question)]
    start = [tokenizer.bos_token_id] if parts[1][:1] == [tokenizer.bos_token_id] else []
    right = [*parts[0], tokenizer.convert_tokens_to_ids(image), *parts[1][len(start) :]]
    rest = question.removeprefix(ways[0])
    for behind in ways:
        if tokenizer(begin + image + behind + rest)["input_ids"] == right:
            return behind, True
    return ways[0], False


def start_of_prompt(tokenizer: Any) -> str:
    """Return what a prompt begins with: the token for that, where the tokenizer does not put it itself."""
    bos = tokenizer.bos_token
    return "" if bos is None or tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else str(bos)
