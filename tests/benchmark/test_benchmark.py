"""Benchmarks: what is timed is what runs, what is counted is right, comparisons are fair, and cards tell them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures.checkpoints import picture, recipe
from fixtures.routed import make_case

from exporter import bench
from exporter.benchmark.bench import ready
from exporter.benchmark.figures import BenchOptions
from exporter.benchmark.roofline import Roofline, measure_roofline
from exporter.benchmark.subject import Setup
from exporter.benchmark.timing import Spread, interleaved, paired, peak_bytes, skipped_ranks
from exporter.benchmark.torch_counting import kv_bytes
from exporter.benchmark.torch_subject import TorchRuntime
from exporter.benchmark.workload import Workload
from exporter.checkpoints.record import read_record
from exporter.cli.entry import main
from exporter.errors import CheckFailed, InputError
from exporter.pipeline import compress

QUICK = BenchOptions(device="cpu", new_tokens=2, rounds=2)
SMALL = Workload(visual_tokens=25, text_tokens=24)


@pytest.fixture(scope="module")
def routed_folder(tiny, tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_case(family, tiny(family), tmp_path_factory.mktemp("routed") / "model", 0).folder
        return made[family]

    return folder


# --- what is timed is what generate does ------------------------------------------------------------------------------

FEW = {"keep_visual_tokens": 5, "keep_layers": 5}


@pytest.mark.parametrize(
    ("family", "budget"),
    [("llava", FEW), ("qwen2_5_vl", None), ("qwen3_vl", FEW), ("idefics3", None), ("gemma3", None), ("gemma3", FEW)],
)
def test_a_subject_says_what_generate_says(family, budget, tiny, routed_folder, questions):
    """With padding too; its cache is as large as the formula says."""
    folder = tiny(family) if budget is None else routed_folder(family)
    subject = TorchRuntime(Setup("cpu")).open(str(folder), budget)
    prompt = Workload(task=str(questions)).batch(subject.processor, subject.config, 3)
    expected = subject.model.generate(
        **prompt.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **(budget or {})
    )[:, prompt.inputs["input_ids"].shape[1] :]
    prompt = ready(prompt, "cpu")
    assert "attention_mask" in prompt.inputs
    state = subject.prefill(prompt, subject.encode_images(prompt))
    said = [state.token]
    for _ in range(3):
        state = subject.decode(state)
        said.append(state.token)
    assert torch.equal(torch.cat(said, 1), expected)
    cost = subject.cost(prompt, 2)
    assert cost.kv_bytes == cost.kv_bytes_formula


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_videos_are_encoded_apart_from_the_prompt(family, tiny, clips):
    subject = TorchRuntime(Setup("cpu")).open(str(tiny(family)), None)
    prompt = Workload(task=str(clips)).batch(subject.processor, subject.config, 2)
    with torch.inference_mode():
        expected = subject.model(**prompt.inputs).logits[:, -1].argmax(-1)
    prompt = ready(prompt, "cpu")
    seen = subject.encode_images(prompt)
    assert set(seen) == {"video"}
    assert torch.equal(subject.prefill(prompt, seen).token[:, 0], expected)
    assert subject.cost(prompt, 1).vision_flops > 0


def test_cache_formula():
    """Layers that rows skip, tokens that leave, padding that goes with them, windows."""
    text = SimpleNamespace(
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=16, hidden_size=128,
        sliding_window=6, layer_types=["full_attention"] * 3 + ["sliding_attention"],
    )  # fmt: skip
    config = SimpleNamespace(get_text_config=lambda: text)
    per_token = 2 * 2 * 16 * 2  # keys and values, heads, size, bytes
    real = torch.ones(2, 10, dtype=torch.bool)
    real[0, :3] = False
    assert kv_bytes(config, torch.bfloat16, real) == per_token * 2 * (3 * 10 + 5)
    keep = torch.ones_like(real)
    keep[:, 3:7] = False  # 3 tokens of the first row are left, 6 of the second
    layers = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)
    route = SimpleNamespace(keep=keep, layers=layers)
    expected = 2 * 10 + 1 * 6 + 0 + 2 * 3  # the window of the last layer begins at token 5
    assert kv_bytes(config, torch.bfloat16, real, route, drop_at=1) == per_token * expected


def test_flops_are_those_of_what_runs(routed_folder):
    """By hand: matrix products of tokens and layers that stay, and attention among them."""
    runtime = TorchRuntime(Setup("cpu"))
    flops = {}
    for budget in ({"preset": "off"}, FEW):
        subject = runtime.open(str(routed_folder("llava")), budget)
        prompt = ready(SMALL.batch(subject.processor, subject.config, 2), "cpu")
        flops[str(budget)] = subject.cost(prompt, 1)
        counts = (49, 6) if budget != FEW else (24 + 5, 5)
        text = subject.config.text_config
        dense = sum(p.numel() for name, p in subject.model.model.language_model.layers[0].named_parameters()
                    if p.ndim == 2)  # fmt: skip
        expected = 2 * 2 * counts[0] * counts[1] * (dense + 2 * counts[0] * text.num_attention_heads * 16)
        head = 2 * 2 * text.hidden_size * text.vocab_size
        router = subject.cost(prompt, 1).flops - expected - head
        assert router == 0 if budget != FEW else 0 < router < expected
    plain, few = flops.values()
    assert few.kv_bytes / plain.kv_bytes == 29 * 5 / (49 * 6)
    assert few.vision_flops == plain.vision_flops > 0
    assert plain.step_bytes - few.step_bytes > (plain.weight_bytes - few.weight_bytes)


def test_every_row_has_a_prompt_of_its_own(tiny):
    subject = TorchRuntime(Setup("cpu")).open(str(tiny("qwen2_5_vl")), None)
    prompt = Workload(visual_tokens=36, text_tokens=30).batch(subject.processor, subject.config, 3)
    assert prompt.is_visual.sum(1).tolist() == [36] * 3
    assert prompt.inputs["attention_mask"].all() and prompt.is_visual.shape == (3, 66)
    assert len({tuple(row) for row in prompt.inputs["input_ids"].tolist()}) == 3
    again = Workload(visual_tokens=36, text_tokens=30).batch(subject.processor, subject.config, 3)
    assert torch.equal(prompt.inputs["pixel_values"], again.inputs["pixel_values"])


# --- comparing --------------------------------------------------------------------------------------------------------


def test_rounds_go_there_and_back():
    assert list(interleaved(3, 4)) == [[0, 1, 2], [2, 1, 0]] * 2


def test_a_drift_of_the_machine_cancels_out():
    """ABBA while every run is slower than the last: the first of the two gains nothing."""
    clock = 100.0
    times: dict[int, list[float]] = {0: [], 1: []}
    for order in interleaved(2, 8):
        for subject in order:
            times[subject].append(clock)
            clock *= 1.01
    spread = paired(times[1], times[0])
    assert spread.median == pytest.approx(1, abs=2e-4)


def test_intervals_of_medians():
    assert [skipped_ranks(n) for n in (1, 2, 5, 6, 9, 20)] == [0, 0, 0, 0, 1, 5]  # of the sign test's table
    assert Spread.of([5, 1, 2, 3, 4]) == Spread(3, 1, 5)


def test_peak_memory_is_that_of_the_run():
    held = torch.ones(16 << 20, dtype=torch.uint8)
    peak = peak_bytes(lambda: torch.ones(64 << 20, dtype=torch.uint8), "cpu")
    assert peak is None or 60e6 < peak < 90e6
    assert held[0] == 1


def test_the_ideal_is_the_slower_of_operations_and_bytes():
    roofline = Roofline(flops_per_s=2e12, bytes_per_s=1e11, dtype="bfloat16")
    assert roofline.ideal_ms(4e12, 1e11) == 2000.0 and roofline.ideal_ms(1e12, 3e11) == 3000.0
    assert roofline.ideal_ms(None, 1) is None
    figures = SimpleNamespace(flops=4e12, decode_flops=2e9, step_bytes=1e10, prefill_ms=4000.0, decode_ms=125.0)
    assert roofline.shares(figures) == (0.5, 0.8)


def test_rates_are_measured(monkeypatch):
    monkeypatch.setattr("exporter.benchmark.roofline.SIDES", {"cpu": (64, 128)})
    monkeypatch.setattr("exporter.benchmark.roofline.COPIED", {"cpu": 2**20})
    found = measure_roofline("cpu", torch.bfloat16)
    assert found.flops_per_s > 0 and found.bytes_per_s > 0 and found.dtype == "bfloat16"


def test_the_table_says_how_near_the_ideal_each_comes(tiny, monkeypatch, capsys):
    monkeypatch.setattr("exporter.benchmark.bench.measure_roofline", lambda *_: Roofline(1e9, 1e9, "float32"))
    common = ["--visual-tokens", "25", "--text-tokens", "24", "--new-tokens", "2", "--rounds", "2", "--device", "cpu"]
    assert main(["bench", str(tiny("llava")), *common, "--quiet"]) == 0
    assert "of the ideal" not in capsys.readouterr().out  # on a CPU nobody is told unless they ask
    assert main(["bench", str(tiny("llava")), *common, "--roofline", "--quiet"]) == 0
    assert "ideal: the FLOPs at 0.001 TFLOP/s" in capsys.readouterr().out


@pytest.mark.slow
def test_bench(tiny, routed_folder, capsys, tmp_path):
    """The shape of the result; all ratios are to the reference; the figures of one and of several rows."""
    arguments = ["bench", routed_folder("llava"), tiny("llava"), "--reference", tiny("llava"), "--preset", "fast",
                 "--keep-layers", "5", "--visual-tokens", "25", "--text-tokens", "24", "--batch", "1,2",
                 "--new-tokens", "2", "--rounds", "2", "--device", "cpu", "--json", tmp_path / "out.json"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "out.json").read_text())
    base, fast, fewer, same = data["models"]
    assert [m["path"] for m in data["models"]] == [str(tiny("llava"))] + [str(routed_folder("llava"))] * 2 + [
        str(tiny("llava"))
    ]
    assert fast["budget"] == {"preset": "fast"} and same["budget"] is None
    assert fewer["budget"] == {"keep_visual_tokens": None, "keep_layers": 5}
    assert base["ratio_to_reference"] is None
    assert same["ratio_to_reference"]["flops"] == same["ratio_to_reference"]["kv_bytes"] == 1
    for model in data["models"]:
        assert [one["batch"] for one in model["batches"]] == [1, 2] and model["batch"] == 1
        assert all(one["kv_bytes"] == one["kv_bytes_formula"] > 0 for one in model["batches"])
        assert model["first_token_ms"] == pytest.approx(model["vision_ms"] + model["prefill_ms"], rel=0.3)
        assert f"{model['prefill_ms']:.1f}" in printed
    ratio = fast["ratio_to_reference"]
    assert ratio["flops"] == fast["flops"] / base["flops"] < 0.6
    assert ratio["kv_bytes"] == fast["kv_bytes"] / base["kv_bytes"] < 0.6
    low, high = ratio["intervals"]["prefill_ms"]
    assert low <= ratio["prefill_ms"] <= high
    assert ratio["achieved"]["prefill"] == pytest.approx(ratio["flops"] / ratio["prefill_ms"])
    assert ratio["achieved"]["decode"] == pytest.approx(ratio["step_bytes"] / ratio["decode_ms"])
    assert set(data["hardware"]) == {"device", "threads"} and data["versions"]["torch"] == torch.__version__


def test_without_a_reference_a_routed_model_is_compared_with_itself_run_whole(routed_folder):
    folder = routed_folder("llava")
    done = bench([folder], budgets=[FEW, {"preset": "off"}], workload=SMALL, options=QUICK)
    assert [model.budget for model in done.models] == [None, FEW]


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"attention": "eager"}, {"compile": True}])
def test_other_ways_to_run(how, routed_folder, monkeypatch):
    compiled, compile_module = [], torch.nn.Module.compile

    def quickly(module, **options):  # the default backend takes a minute for six layers
        compiled.append(module)
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    done = bench(
        [routed_folder("llava")], budgets=[FEW], workload=SMALL,
        options=BenchOptions(device="cpu", new_tokens=1, rounds=2, **how),
    )  # fmt: skip
    assert ("eager" if "attention" in how else "compiled") in done.models[1].runtime
    assert len(compiled) == (6 * 3 if "compile" in how else 0)
    assert done.models[1].batches[0].ratio_to_reference["flops"] < 1


def test_a_cache_of_another_size_is_a_failed_check(tiny, monkeypatch):
    monkeypatch.setattr("exporter.benchmark.torch_subject.kv_bytes", lambda *_, **__: 12)
    done = bench([tiny("llava")], workload=SMALL, options=QUICK)
    with pytest.raises(CheckFailed, match="and should hold 12"):
        done.check_caches()


@pytest.mark.slow
def test_figures_go_into_record_and_card(tiny, questions, tmp_path, unverified):
    folder = compress(recipe(tiny("llava"), questions), tmp_path / "small")
    assert "How fast it is" not in (folder / "README.md").read_text()
    for _ in range(2):  # the second replaces the first
        done = bench([folder], reference=tiny("llava"), workload=SMALL, options=QUICK)
    (entry,) = read_record(folder).to_data()["benchmarks"]
    figures = done.models[1].batches[0]
    assert entry["batches"][0]["prefill_ms"] == figures.prefill_ms
    assert entry["hardware"]["device"] and entry["date"] and entry["versions"]["transformers"]
    text = (folder / "README.md").read_text()
    assert "How fast it is" in text and entry["date"] in text and entry["hardware"]["device"] in text
    for name in ("prefill_ms", "decode_ms", "flops", "kv_bytes"):
        assert f"| {figures.ratio_to_reference[name]:.3f} |" in text


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workload": {"visual_tokens": 7}}, "visual_tokens=7: .* no square images of that many tokens: ask for 25"),
        ({"workload": {"visual_tokens": 25, "text_tokens": 3}}, "text_tokens=3 is less than the .* ask for"),
        ({"workload": {"text_tokens": 0}}, "text_tokens=0: at least 1"),
        ({"workload": {"task": "x.jsonl", "visual_tokens": 4}}, "a task, which has prompts of its own"),
        ({"workload": {"task": "nothing.jsonl"}}, "there is no file or folder 'nothing.jsonl'"),
        ({"options": {"batches": (1, 0)}}, r"batch sizes \[1, 0\]: each must be 1 or more"),
        ({"options": {"new_tokens": 0}}, "new_tokens=0: at least 1"),
        ({"options": {"rounds": 3}}, "rounds=3: an even number"),
        ({"options": {"attention": "magic"}}, "attention 'magic' is not known: eager, sdpa"),
        ({"options": {"attention": "flash_attention_2"}}, "attention 'flash_attention_2' can't run here"),
        ({"options": {"device": "auto"}}, "can't be timed against another: name one device"),
        ({"budgets": [{"preset": "turbo"}]}, "preset 'turbo' is not known: this model has off, quality"),
        ({"budgets": [{"keep_layers": 2}]}, "keep_layers=2 is out of range"),
        ({"budgets": [{"keep_visual_tokens": 0}]}, "keep_visual_tokens=0 keeps nothing"),
    ],
)
def test_wrong_input(given, message, routed_folder):
    with pytest.raises(InputError, match=message):
        bench(
            [routed_folder("llava")],
            budgets=given.get("budgets", ()),
            workload=Workload(**given.get("workload", {})),
            options=BenchOptions(**{"device": "cpu", "rounds": 2, "new_tokens": 1, **given.get("options", {})}),
        )


def test_a_budget_needs_a_router(tiny):
    with pytest.raises(
        InputError, match=r"no router here, so nothing can run under \{'preset': 'fast'\}: leave it out"
    ):
        bench([tiny("llava")], budgets=[{"preset": "fast"}], options=QUICK)


def test_a_router_that_does_not_fit(routed_folder, tmp_path):
    folder = shutil.copytree(routed_folder("llava"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["router"]["trained_for"] = {"hidden_size": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="model: this router was trained for another base model"):
        bench([folder], options=QUICK)
    shutil.rmtree(folder / "router")
    with pytest.raises(InputError, match=r"has no router/model\.safetensors"):
        bench([folder], options=QUICK)


def test_a_broken_image_of_a_task(routed_folder, tmp_path):
    picture(tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "task.jsonl").write_text('{"image": "a.png", "question": "what?"}\n')
    with pytest.raises(InputError, match=r"a\.png can't be read as an image"):
        bench([routed_folder("llava")], workload=Workload(task=str(tmp_path / "task.jsonl")), options=QUICK)
