"""Predictions that were made already, so that an interrupted evaluation goes on."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]  # what is known of one answer: answer, correct, and where there is a reference: kl, same, tokens
