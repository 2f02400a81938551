"""The page that people look at: whole in one file, every text escaped, read by a real browser where there is one."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from exporter.cli.entry import main
from exporter.evaluation.evaluate import evaluate
from exporter.report.of_evaluation import report_of_evaluation
from exporter.report.page import render
from exporter.report.parts import (
    Answers,
    Bar,
    Bars,
    Kept,
    ModelAnswer,
    Point,
    Report,
    Scatter,
    ShownQuestion,
    Table,
    shortened,
    ticks,
)
from exporter.report.pictures import LARGEST_BYTES, SIDE, data_uri, thumbnail
from exporter.routing.requests import BudgetGrid

EVIL = "<script>document.title='bad'</script> & \"it's\""
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def picture_uri():
    return data_uri(Image.new("RGB", (8, 6), "red"))


def page(text="what is it?"):
    """Return a report of every part, with `text` wherever a user's may stand."""
    kept = Kept(("110", "001"))
    questions = (
        ShownQuestion(
            0, text, text, text, (ModelAnswer(text, True), ModelAnswer("b", False, kept)), picture_uri(), (8, 6)
        ),
        ShownQuestion(1, "second?", "c", "", (ModelAnswer("a", False), ModelAnswer("c", True)), "", (0, 0)),
        ShownQuestion(2, "third?", "c", "", (ModelAnswer("c", True), ModelAnswer("c", True)), "", (0, 0)),
    )
    parts = (
        Bars(text, (Bar(text, 50, (40, 60), text), Bar("b", -3, None, "-3"))),
        Table(text, (text, "n"), ((text, "1"),), text),
        Scatter(text, text, text, (Point(text, 1, 2, (1, 3)), Point("b", 2, 1)), text),
        Answers(text, (text, "b"), questions, text),
    )
    return render(Report(text, (text,), parts, ((text, text),)))


def test_texts_are_escaped():
    made = page(EVIL)
    assert EVIL not in made and "<script>document" not in made
    assert made.count("<script") == 1 and "&lt;script&gt;" in made


def test_nothing_comes_from_elsewhere():
    made = page()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", made)
    assert "http" not in made.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "default-src 'none'" in made and "prefers-color-scheme: dark" in made


def test_the_front_is_what_nothing_beats():
    points = [(1, 50), (2, 60), (3, 55), (4, 70), (4, 65), (1, 50)]
    scatter = Scatter("t", "c", "s", tuple(Point(str(n), *both) for n, both in enumerate(points)))
    assert [point.name for point in scatter.front] == ["0", "5", "1", "3"]
    assert scatter.x(1) < scatter.x(4) and scatter.y(70) < scatter.y(50)


def test_names_in_a_picture_do_not_cover_each_other():
    there = (Point("tis + scp", 2, 60), Point("tis + none", 2, 60), Point("angular", 2, 60.2), Point("far", 4, 20))
    names = [name for _, name in Scatter("t", "c", "s", there).labels]
    assert names == ["angular, +2", "far"]
    assert Scatter("t", "c", "s", there * 4).labels == []


def test_charts_by_hand():
    assert ticks(0, 100) == [(0, "0"), (20, "20"), (40, "40"), (60, "60"), (80, "80"), (100, "100")]
    assert [text for _, text in ticks(0.1, 0.32)] == ["0.10", "0.15", "0.20", "0.25", "0.30"]
    assert Kept(("110", "001")).left_out() == [(0, 2, 1), (1, 0, 2)]
    bars = Bars("t", (Bar("a", 5), Bar("b", -5)))
    assert bars.x(0) == (bars.x(5) + bars.x(-5)) / 2
    assert shortened("a" * 50, 11) == "aaaaa…aaaaa"


def test_pictures_are_bounded():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1400, 3), dtype=np.uint8))
    uri = data_uri(noise)
    content = base64.b64decode(uri.partition(",")[2])
    assert len(content) <= LARGEST_BYTES and uri.startswith("data:image/")
    assert max(Image.open(io.BytesIO(content)).size) <= 1400


@pytest.mark.slow
def test_an_evaluation_shows_answers_and_kept_tokens(routed_folder, tiny, task, tmp_path):
    budgets = BudgetGrid(keep_visual_tokens=(6,), presets=("off",))
    kept = tmp_path / "p.jsonl"
    options = {"budgets": budgets, "max_new_tokens": 3, "update_cards": False, "predictions": kept}
    plain = evaluate([routed_folder], task, reference=tiny("llava"), **options)
    done = evaluate([routed_folder], task, reference=tiny("llava"), show=5, **options)
    assert [model.answers for model in done.models] == [model.answers for model in plain.models]
    assert "shown" not in done.to_data() and "kept" not in done.to_data()["models"][0]
    assert done.shown.numbers == (0, 2, 4, 7, 9)
    routed = next(model for model in done.models if model.kept)
    assert set(routed.kept) == set(done.shown.numbers)
    assert all("".join(rows).count("1") == 6 and len("".join(rows)) == 25 for rows in routed.kept.values())
    report = report_of_evaluation(done, ("lvlm-exporter evaluate",))
    answers = report.parts[-1]
    assert isinstance(answers, Answers) and len(answers.questions) == 5
    assert [answer.kept and answer.kept.count for answer in answers.questions[0].answers].count(6) == 1
    uri, size = thumbnail(done.shown.samples[0], done.shown.processor)
    assert uri.startswith("data:image/") and max(size) <= SIDE
    assert "6 of 25 tokens" in render(report)


@pytest.mark.slow
def test_evaluate_and_bench_write_a_page(tiny, task, tmp_path, capsys):
    folder, arguments = tmp_path / "pages", ["--quiet", "--no-card", "--report"]
    asked = ["evaluate", str(tiny("llava")), "--task", str(task), "--max-new-tokens", "3", "--samples", "4"]
    assert main([*asked, *arguments, str(folder)]) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    made = (folder / "report.html").read_text()
    assert "exact match on task.jsonl" in made and "Answers beside each other" in made
    bench = ["bench", str(tiny("llava")), "--reference", str(tiny("llava")), "--rounds", "2", "--new-tokens", "2"]
    assert main([*bench, *arguments, str(tmp_path / "speed")]) == 0
    assert "Throughput and time to the first token, batch 1" in (tmp_path / "speed" / "report.html").read_text()


def test_places_where_no_report_can_be(tiny, task, capsys):
    assert main(["evaluate", str(tiny("llava")), "--task", str(task), "--report", str(task)]) == 2
    assert f"--report {task} is a file: name a folder." in capsys.readouterr().err


# --- in a browser -----------------------------------------------------------------------------------------------------


def browser():
    """Return a headless browser: LVLM_EXPORTER_BROWSER, or one on the path; None for none."""
    named = os.environ.get("LVLM_EXPORTER_BROWSER")
    return named or next((found for name in BROWSERS if (found := shutil.which(name))), None)


@pytest.mark.clean_process
@pytest.mark.skipif(browser() is None, reason="no headless browser is installed")
def test_a_browser_filters_by_right_and_wrong(tmp_path):
    """The page is opened, the first model's filter set to wrong, and what is shown is read back."""
    file = tmp_path / "report.html"
    act = """<script>
    const select = document.querySelector("select"); select.value = "0"; select.dispatchEvent(new Event("change"));
    const shown = [...document.querySelectorAll("article")].filter((a) => a.offsetHeight > 0).map((a) => a.innerText);
    const picture = document.querySelector("image").getBoundingClientRect();
    document.body.innerHTML = ""; document.title = JSON.stringify({shown, count: "", evil: document.title});
    </script>"""
    file.write_text(page(EVIL).replace("</body>", f"{act}</body>"))
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    title = re.search(r"<title>(.*?)</title>", made)[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    read = json.loads(title)
    assert len(read["shown"]) == 1 and read["shown"][0].startswith("second?")
    assert read["evil"] == EVIL  # the title is the text, and no script of it ran
