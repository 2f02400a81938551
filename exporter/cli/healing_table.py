"""The text that `heal` and `compress --heal` print."""

from __future__ import annotations

from typing import Any


def cost_lines(cost: dict[str, Any]) -> list[str]:
    """Say what healing would take."""
    return [
        f"would heal in {cost['steps']:,} steps at most, on {cost['questions']:,} questions put to "
        f"{cost['pairs']:,} pairs of question and picture; {cost['held_out']:,} more judge",
        f"as much as {cost['forward_passes']:.1f} forward passes over the questions, about "
        f"{cost['memory_bytes'] / 1e9:.2f} GB of memory and {cost['disk_bytes'] / 1e6:,.1f} MB of disk at most",
    ]


def result_lines(healed: dict[str, Any]) -> list[str]:
    """Say what healing gave."""
    before = healed["before"]
    line = (
        f"healed on {healed['pairs']:,} pairs of {healed['questions']:,} questions with pictures in "
        f"{healed['seconds']:.0f} s, {before['questions']} held out"
    )
    if not healed["kept"]:
        return [line, f"  it did not help (KL held out {before['kl']:.4f} before): the weights are as they were"]
    after = healed["after"]
    return [
        line,
        f"  KL held out {before['kl']:.4f} -> {after['kl']:.4f}, same answers {100 * before['same_answers']:.1f} -> "
        f"{100 * after['same_answers']:.1f} %, the best after {healed['steps_kept']} of {healed['steps']} steps",
    ]
