"""A judge over HTTP, on the loopback: what it says is kept, what it does not say costs nothing."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from exporter.cli.entry import main
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.evaluation.metrics.judged import TASK, JudgeClient, JudgeSilentError, ratings_in
from exporter.evaluation.metrics.task import Measure


class Server(HTTPServer):
    """An OpenAI-compatible server: `says` makes an answer of a prompt, None an HTTP error."""

    def __init__(self, says):
        super().__init__(("127.0.0.1", 0), Handler)
        self.says, self.asked = says, []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        said = self.server.says(body["messages"][0]["content"])
        self.send_response(200 if said is not None else 503)
        self.end_headers()
        if said is not None:
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    """Return a function that starts a server and returns it with a client of it that does not wait."""
    servers = []

    def start(says):
        server = Server(says)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = JudgeClient(f"http://127.0.0.1:{server.server_port}/v1", "judge", attempts=2, sleep=lambda _: None)
        return server, client

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def bench(questions, tmp_path_factory):
    """Questions with a reference answer, a description and a category."""
    lines = [json.loads(line) for line in questions.read_text().splitlines()][:6]
    file = tmp_path_factory.mktemp("bench") / "bench.jsonl"
    for number, line in enumerate(lines):
        line.pop("answer", None)
        line["image"] = str(questions.parent / line["image"])
        line |= {
            "gpt_answer": f"reference {number}",
            "caption": "a picture",
            "category": ("conv", "detail")[number % 2],
        }
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def says_by_number(prompt):
    """Rate the reference 8, the answer 2 to question 3 and 6 to all others."""
    if "[Assistant 1]" not in prompt:
        return "yes"
    return ("8 2" if "reference 3" in prompt else "8 6") + "\nThe first one says more."


def test_ratings_are_means_of_what_the_judge_says(judge, tiny, bench, tmp_path, monkeypatch):
    server, client = judge(says_by_number)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    arguments = {"rated_by": client, "predictions": tmp_path / "p.jsonl", "max_new_tokens": 4, "update_cards": False}
    done = evaluate([tiny("llava")], bench, **arguments)
    (model,) = done.models
    assert model.metric == "llava-bench"
    wanted = {"relative score": 32 / 48, "relative score (conv)": 6 / 8, "relative score (detail)": 14 / 24}
    assert model.figures == pytest.approx(wanted | {"without a rating": 0})
    assert model.accuracy == pytest.approx(32 / 60) and model.no_figures_because is None
    path, body, authorization = server.asked[1]
    assert path == "/v1/chat/completions" and authorization == "Bearer key"
    assert body["model"] == "judge" and body["temperature"] == 0
    prompt = body["messages"][0]["content"]
    assert prompt.startswith("[Context]\na picture\n\n[Question]\n") and TASK in prompt
    number = len(server.asked)
    assert evaluate([tiny("llava")], bench, **arguments).models[0].figures == model.figures
    assert len(server.asked) == number + 1  # it was asked whether it is there, and nothing again


def test_a_judge_that_stops_costs_nothing_that_it_has_said(judge, tiny, bench, tmp_path, capsys):
    said = []

    def says(prompt):
        said.append(prompt)
        return says_by_number(prompt) if len(said) <= 4 else None

    server, client = judge(says)
    arguments = {"rated_by": client, "predictions": tmp_path / "p.jsonl", "max_new_tokens": 4, "update_cards": False}
    (model,) = evaluate([tiny("llava")], bench, **arguments).models
    assert "does not answer: HTTP 503" in model.no_figures_because and "3 of 6 answers" in model.no_figures_because
    assert model.figures["without a rating"] == 0.5 and len(model.answers) == 6
    flags = ["--predictions", str(tmp_path / "p.jsonl"), "--max-new-tokens", "4", "--no-card", "--quiet"]
    server.says = says_by_number
    judged = ["--judge", client.url, "--judge-model", "judge"]
    number = len(server.asked)
    assert main(["evaluate", str(tiny("llava")), "--task", str(bench), *judged, *flags]) == 0
    shown = capsys.readouterr().out
    assert "judge's score" in shown and "relative score (conv)" in shown
    assert len(server.asked) == number + 1 + 3


def test_reviews_without_two_numbers_are_asked_for_again(judge):
    answers = iter(["I can't say", "9, 7\nwell"])
    _, client = judge(lambda _: next(answers))
    assert client.rate("which?") == ("9, 7\nwell", [9.0, 7.0])
    assert ratings_in("no numbers") == [] and ratings_in("8.5; 3") == [8.5, 3.0] and ratings_in("7\n8") == []


def test_what_is_wrong_with_a_judge(judge, tiny, bench, task, tmp_path):
    _, silent = judge(lambda _: None)
    with pytest.raises(JudgeSilentError, match=r"the judge http://127.* \(judge\) does not answer: HTTP 503"):
        silent.reply_to("well?")
    _, empty = judge(lambda _: " ")
    with pytest.raises(JudgeSilentError, match="it answers with no text"):
        empty.reply_to("well?")
    nobody = JudgeClient("http://127.0.0.1:9", "judge", attempts=1)
    with pytest.raises(InputError, match="does not answer: "):
        evaluate([tiny("llava")], bench, rated_by=nobody, predictions=tmp_path / "p.jsonl")
    with pytest.raises(InputError, match=r"give --predictions FILE.jsonl"):
        evaluate([tiny("llava")], bench, rated_by=nobody)
    with pytest.raises(InputError, match="'llava-bench' needs a judge: give --judge URL and --judge-model NAME"):
        evaluate([tiny("llava")], bench)
    with pytest.raises(InputError, match="the metric 'exact' needs no judge"):
        evaluate([tiny("llava")], task, rated_by=nobody)
    with pytest.raises(InputError, match="begins with http:// or https://"):
        JudgeClient("localhost:80", "judge")
    with pytest.raises(InputError, match="needs --judge-model NAME"):
        JudgeClient("http://localhost:80", "")


def test_flags_of_a_judge_go_together(capsys):
    assert main(["evaluate", "x", "--task", "y", "--judge-model", "z"]) == 2
    assert "are for a judge: give --judge URL, too." in capsys.readouterr().err


def test_answers_to_another_task_are_refused(tiny, task, bench, tmp_path):
    kept = tmp_path / "p.jsonl"
    evaluate([tiny("llava")], task, predictions=kept, max_new_tokens=2, samples=3, update_cards=False)
    with pytest.raises(InputError, match=r"p.jsonl holds 3 answers to another task .* name another file"):
        evaluate([tiny("llava")], task, predictions=kept, max_new_tokens=2, samples=4, update_cards=False)


def test_a_task_is_measured_by_a_benchmarks_metric(tiny, questions, tmp_path, capsys):
    """Lines without an image are questions of ScienceQA; options stand in the prompt; cards say which metric."""
    lines = [json.loads(line) for line in questions.read_text().splitlines()][:4]
    for number, line in enumerate(lines):
        line["image"] = None if number == 0 else str(questions.parent / line["image"])
        line |= {"choices": ["red", "blue"], "answer": 0, "hint": "", "type": None}
    file = tmp_path / "science.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = evaluate([tiny("llava")], file, reference=tiny("llava"), max_new_tokens=3, update_cards=False)
    assert done.metric == "scienceqa" and done.metric_in_brackets == " (ScienceQA accuracy)"
    assert set(done.models[0].figures) == {"accuracy (with an image)", "accuracy (without an image)"}
    with pytest.raises(InputError, match="a question without an image"):
        evaluate([tiny("llava")], file, measure=Measure("choice"), max_new_tokens=3)
    assert main(["evaluate", str(tiny("llava")), "--task", str(file), "--metric", "popes"]) == 2
    assert "metric 'popes' is not known" in capsys.readouterr().err
