"""Requests in flight, by a clock that the test moves: waits, percentiles, throughput, what is said of a slower one."""

from __future__ import annotations

import json

import pytest
from fixtures.checkpoints import recipe

from exporter import bench
from exporter.benchmark.figures import BenchOptions
from exporter.benchmark.in_flight import (
    BATCHES,
    BATCHING,
    Load,
    answer_lengths,
    answer_range,
    measure_load,
    percentile,
)
from exporter.benchmark.workload import Workload
from exporter.checkpoints.record import read_record
from exporter.cli.entry import main
from exporter.errors import InputError
from exporter.pipeline import compress

QUICK = BenchOptions(device="cpu", new_tokens=3, rounds=2, in_flight=(1, 2))
SMALL = Workload(visual_tokens=25, text_tokens=24)


class Clock:
    """Seconds that pass only when a server works."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Fake:
    """A server that takes so many seconds for a first token and for each further one."""

    def __init__(self, clock: Clock, first: float, more: float) -> None:
        self.clock, self.seconds, self.steps = clock, (first, more), 0

    def first(self) -> str:
        self.clock.seconds += self.seconds[0]
        return "state"

    def more(self, state: str) -> str:
        self.clock.seconds += self.seconds[1]
        self.steps += 1
        return state


def test_a_request_waits_for_the_batch_that_runs():
    """Two in flight; answers of 4 and 2 tokens, then 3 and 3, then 2 and 4; 10 s for a first token, 1 s for another."""
    clock = Clock()
    server = Fake(clock, 10.0, 1.0)
    load = Load(server, 2, (4, 2, 3, 3, 2, 4), clock)
    load.run()
    assert server.steps == 3 + 2 + 3  # each batch runs to its longest answer
    (done,) = load.rounds
    # batch 1 ends at 13, its shorter answer at 11: two requests are sent at 11 and 13, and first tokens come at 23
    assert [(one.sent, one.tokens) for one in done.answered[:2]] == [
        (11.0, (23.0, 24.0, 25.0)),
        (13.0, (23.0, 24.0, 25.0)),
    ]
    # batch 2 ends at 25 for both; batch 3's first tokens come at 35, its answers end at 36 and 38
    assert [(one.sent, one.tokens) for one in done.answered[2:]] == [
        (25.0, (35.0, 36.0)),
        (25.0, (35.0, 36.0, 37.0, 38.0)),
    ]
    assert done.seconds == 38.0 - 13.0  # without the first batch, for which nobody waited
    figures = load.figures()
    assert figures.requests == 4 and figures.tokens_per_s == pytest.approx(12 / 25)
    assert (figures.first_token_p50_ms, figures.first_token_p95_ms) == (10_000.0, 12_000.0)
    assert (figures.token_p50_ms, figures.token_p95_ms) == (1000.0, 1000.0)


def test_one_request_at_a_time_never_waits():
    clock = Clock()
    load = Load(Fake(clock, 10.0, 1.0), 1, (3, 2, 4), clock)
    load.run()
    assert {one.first_token_ms for one in load.rounds[0].answered} == {10_000.0}
    assert load.rounds[0].seconds == 11 + 13


def test_percentiles_are_values_that_were_measured():
    assert percentile([3, 1, 2], 0.5) == 2 and percentile(range(1, 101), 0.95) == 95
    assert percentile([7], 0.95) == 7 and percentile([1, 2], 0.5) == 1


def test_lengths_are_the_same_for_every_model_and_within_what_is_said():
    lengths = answer_lengths(16, 32, 0)
    assert lengths == answer_lengths(16, 32, 0) != answer_lengths(16, 32, 1)
    assert len(lengths) == 16 * BATCHES and set(lengths) <= set(range(17, 34)) and answer_range(32) == "17 to 33"
    assert answer_range(1) == "2 to 2" and set(answer_lengths(3, 1, 0)) == {2}  # a token after the first, always


def test_models_take_turns_and_a_ratio_is_that_of_the_throughput():
    clock = Clock()
    servers = [Fake(clock, 2.0, 1.0), Fake(clock, 4.0, 2.0), Fake(clock, 1.0, 0.5)]
    reference, slower, faster = measure_load(servers, (3, 3, 3, 3, 3, 3), 2, 4, clock, lambda items, *_: items)
    assert reference.throughput_ratio is None and reference.requests == 4 * 4
    assert slower.throughput_ratio == pytest.approx(0.5) and faster.throughput_ratio == pytest.approx(2.0)
    assert slower.throughput_interval == pytest.approx((0.5, 0.5))
    assert reference.tokens_per_s == pytest.approx(6 / 4)  # two of 3 tokens in 2 + 1 + 1 s


@pytest.mark.slow
def test_bench_with_requests_in_flight(tiny, routed_folder, capsys, tmp_path):
    arguments = ["bench", routed_folder, "--reference", tiny("llava"), "--preset", "fast", "--in-flight", "1,3",
                 "--visual-tokens", "25", "--text-tokens", "24", "--new-tokens", "3", "--rounds", "2", "--device",
                 "cpu",
                 "--json", tmp_path / "out.json", "--report", tmp_path / "page", "--no-card"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert "in flight" in printed and BATCHING in printed and "answers of 2 to 4 tokens" in printed
    data = json.loads((tmp_path / "out.json").read_text())
    for model in data["models"]:
        assert [one["in_flight"] for one in model["loads"]] == [1, 3]
        assert [one["requests"] for one in model["loads"]] == [2 * 2, 2 * 6]  # the first batch of a round is left out
        for one in model["loads"]:
            assert 0 < one["first_token_p50_ms"] <= one["first_token_p95_ms"]
            assert 0 < one["token_p50_ms"] <= one["token_p95_ms"]
    base, fast = data["models"]
    assert base["loads"][0]["throughput_ratio"] is None and fast["loads"][0]["throughput_ratio"] > 0
    assert "Requests in flight" in (tmp_path / "page" / "report.html").read_text()


@pytest.mark.slow
def test_a_budget_that_lowers_throughput_is_said(tiny, routed_folder, monkeypatch, capsys):
    """By a clock that stands still but for the models' steps: of the routed one each takes twice as long."""
    clock = Clock()
    from exporter.benchmark.torch_subject import TorchSubject

    for name in ("prefill", "decode"):
        real = getattr(TorchSubject, name)

        def slowed(self, *arguments, real=real):
            clock.seconds += 2.0 if self.budget else 1.0
            return real(self, *arguments)

        monkeypatch.setattr(TorchSubject, name, slowed)
    monkeypatch.setattr("exporter.benchmark.bench.now", lambda device: clock.seconds)
    options = BenchOptions(device="cpu", new_tokens=2, rounds=2, in_flight=(2,))
    budgets = [{"preset": "fast"}]
    done = bench([routed_folder], reference=tiny("llava"), budgets=budgets, workload=SMALL, options=options)
    assert done.models[1].loads[0].throughput_ratio == pytest.approx(0.5)
    at_batch, in_flight = done.slower()
    assert at_batch.endswith(
        "gives fewer tokens a second than the reference at batch 1: 0.50 times as many (0.50-0.50)."
    )
    assert "under preset=fast gives fewer" in in_flight and "with 2 in flight: 0.50 times as many" in in_flight
    assert done.to_data()["slower"] == [at_batch, in_flight]
    faster = bench([tiny("llava")], reference=tiny("llava"), workload=SMALL, options=options)
    assert faster.slower() == []  # alike is not slower


@pytest.mark.slow
def test_figures_go_into_record_and_card(tiny, questions, tmp_path, unverified):
    folder = compress(recipe(tiny("llava"), questions), tmp_path / "small")
    for _ in range(2):  # the second replaces the first
        done = bench([folder], reference=tiny("llava"), workload=SMALL, options=QUICK)
    (entry,) = read_record(folder).to_data()["benchmarks"]
    assert (
        [one["in_flight"] for one in entry["loads"]] == [1, 2] == [one["in_flight"] for one in entry["reference_loads"]]
    )
    figures = done.models[1].loads[1]
    text = (folder / "README.md").read_text()
    assert f"With so many requests in flight ({BATCHING})" in text
    assert f"| all of it | 2 | {figures.tokens_per_s:.1f} | {figures.throughput_ratio:.3f} |" in text
    without = BenchOptions(device="cpu", new_tokens=3, rounds=2)
    bench([folder], reference=tiny("llava"), workload=SMALL, options=without)
    assert "in_flight" not in read_record(folder).to_data()["benchmarks"][1]["options"]


def test_wrong_numbers(tiny, capsys):
    with pytest.raises(InputError, match=r"requests in flight \[0, 2\]: each number must be 1 or more"):
        BenchOptions(in_flight=(0, 2))
