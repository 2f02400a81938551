"""Write a report as one file that needs nothing else: no network, no other file; every text of a user is escaped."""

from __future__ import annotations

from pathlib import Path

from . import parts
from .parts import Report

NAME = "report.html"


def render(report: Report) -> str:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        keep_trailing_newline=True,
    )
    environment.filters["shortened"] = parts.shortened
    margins = {name.lower(): getattr(parts, name) for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")}
    page: str = environment.get_template("report.html.jinja").render(
        report=report, bar_right=parts.BAR_RIGHT, **margins
    )
    return page


def facts() -> tuple[tuple[str, str], ...]:
    """Return date and versions."""
    import datetime
    from importlib.metadata import version

    from ..version import __version__

    now = datetime.datetime.now().astimezone().strftime("%d %b %Y %H:%M %Z")
    packages = tuple((name, version(name)) for name in ("torch", "transformers"))
    return (("written", now), ("lvlm-exporter", __version__), *packages)
