"""Routers and rules in one table: cells are what `evaluate` says, a column costs the same, the oracle is no worse."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from fixtures.videos import chat, clip

from exporter.checkpoints.source import open_source
from exporter.clean_room import encode, load_processor
from exporter.cli.entry import main
from exporter.comparison.oracle import Search, images_seen_once, search, swapped
from exporter.comparison.routers import compare_routes
from exporter.comparison.routes import tables_from_data
from exporter.data.batches import make_batch
from exporter.data.calibration import read_samples
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.modeling.routed_route import Budget
from exporter.models.loading import load_model
from exporter.recipe import RunOptions
from exporter.routing.requests import BudgetGrid
from exporter.routing.rules import Rule, generators, make_route

OPTIONS = RunOptions(batch_size=5)


@pytest.fixture
def tables(tiny, routed_folder, task, questions):
    rows = [
        {"name": "router", "folder": str(routed_folder)},
        {"name": "tokens", "folder": str(routed_folder), "rule": "router+all"},
        {"name": "FastV", "rule": "fastv"},
        {"name": "FastV + ShortGPT", "rule": "fastv+shortgpt"},
        {"name": "layers", "rule": "random+random"},
        {"name": "oracle", "rule": "oracle", "folder": str(routed_folder)},
    ]
    budgets = [{"keep_visual_tokens": 0.6}, {"keep_visual_tokens": 0.6, "keep_layers": 5}]
    return {
        "model": str(tiny("llava")), "task": str(task), "calibration": str(questions), "rows": rows,
        "budgets": budgets, "oracle": {"candidates": 3, "swaps": 4}, "task_samples": 6,
    }  # fmt: skip


@pytest.mark.slow
def test_the_table(tables, routed_folder, tiny, task, tmp_path, capsys):
    path = tmp_path / "tables.yaml"
    path.write_text(yaml.safe_dump(tables))
    out = tmp_path / "out"
    assert main(["compare", str(path), "--out", str(out), "--quiet", "--batch-size", "5"]) == 0
    printed = capsys.readouterr().out
    assert "oracle: best of 3 selections and 4 swaps" in printed
    for name in ("results.json", "table.md", "accuracy.png"):
        assert (out / name).stat().st_size > 0
    results = json.loads((out / "results.json").read_text())
    cells = {(cell["row"], cell["column"]): cell for cell in results["cells"]}
    wanted = BudgetGrid((0.6,), (5,))
    done = evaluate(
        [routed_folder], task, reference=tiny("llava"), budgets=wanted, samples=6, options=OPTIONS, update_cards=False
    )
    plain, routed = done.models
    cell = cells["router", 1]
    assert results["original"]["accuracy"] == plain.accuracy
    assert (cell["accuracy"], cell["n"]) == (routed.accuracy, 6)
    assert cell["kl"] == pytest.approx(routed.kl, rel=1e-3)
    assert cell["agreement"] == pytest.approx(routed.agreement)
    assert cell["flops_share"] == pytest.approx(routed.flops_share)
    for column in (0, 1):  # equal cost, but for the router's own
        for row in ("tokens", "FastV", "layers"):
            if (row, column) in cells:
                assert (
                    abs(cells[row, column]["decoder_flops_share"] - cells["router", column]["decoder_flops_share"])
                    < 0.06
                )
    assert cells["FastV", 0]["budget"]["keep_visual_tokens"] < 0.6  # two layers see all of them
    assert cells["oracle", 0]["kl"] <= cells["router", 0]["kl"]
    before = (out / "rows.jsonl").read_text()
    again = compare_routes(tables_from_data(tables), out, OPTIONS)
    assert (out / "rows.jsonl").read_text() == before and again.cell("router", 1).kl == cell["kl"]
    with pytest.raises(InputError, match="holds another comparison"):
        compare_routes(tables_from_data(tables | {"seed": 1}), out, OPTIONS)


def test_the_search_finds_what_it_is_told_to_look_for(routed_model, routed_folder, task):
    """Divergence is the distance to a hidden selection: swaps must come close to it, and never further away."""
    batch = make_batch(read_samples(str(task))[:3], load_processor(routed_folder), routed_model.config)
    target = make_route(routed_model, batch, Budget(8), Rule.parse("random+all"), seed="hidden").keep
    distances: list[torch.Tensor] = []

    def divergence(route):
        distances.append((route.keep != target).sum(1).float())
        return distances[-1]

    found = search(routed_model, batch, Budget(8), divergence, Search(candidates=4, swaps=300))
    assert len(distances) == 304
    last = (found.keep != target).sum(1)
    assert (last <= torch.stack(distances).amin(0)).all() and (last <= 6).all()  # at random it is 11
    assert [len(tokens) for tokens in found.kept_tokens()] == [8, 8, 8]
    other = swapped(found, 1.0, generators(batch.samples, 0))
    assert (other.keep != found.keep).sum(1).tolist() == [4, 4, 4]  # a quarter of 8 each way
    assert (other.keep | other.visual)[~batch.is_visual].all()


def test_images_are_seen_once(routed_model, routed_folder, task):
    samples, processor = read_samples(str(task)), load_processor(routed_folder)
    first, second = (make_batch(part, processor, routed_model.config) for part in (samples[:2], samples[2:4]))
    seen = []
    handle = routed_model.base_model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    try:
        with torch.no_grad():
            expected = [routed_model(**batch.inputs, preset="off").logits for batch in (first, second)]
            seen.clear()
            for batch, logits in zip((first, second), expected, strict=True):
                with images_seen_once(routed_model):
                    for _ in range(3):
                        assert torch.equal(routed_model(**batch.inputs, preset="off").logits, logits)
    finally:
        handle.remove()
    assert len(seen) == 2


def test_videos_are_seen_once(routed, clips):
    case = routed("qwen2_vl")
    batch = make_batch(read_samples(str(clips))[:2], case.processor, case.model.config)
    seen = []
    handle = case.model.base_model.visual.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), images_seen_once(case.model):
        first, second = (case.model(**batch.inputs, preset="off").logits for _ in range(2))
    handle.remove()
    assert torch.equal(first, second) and len(seen) == 1
    assert "get_video_features" not in vars(case.model.base_model)


def test_images_and_videos_of_one_question_are_told_apart(tiny):
    """Qwen3-VL asks for a video's features by the function for images."""
    source = open_source(str(tiny("qwen3_vl")))
    model = load_model(source, "cpu", torch.float32)[0]
    images, videos = [list(clip(1).frames)], [[clip(3)]]
    inputs = encode(load_processor(source.folder), [chat("image", "video")], images, videos)
    with torch.no_grad():
        expected = model(**inputs).logits
        with images_seen_once(model):
            for _ in range(2):
                assert torch.equal(model(**inputs).logits, expected)


def test_mistakes_in_a_comparison_of_routes(tables, tmp_path):
    def refused(**changes):
        with pytest.raises(InputError) as caught:
            compare_routes(
                tables_from_data({k: v for k, v in (tables | changes).items() if v is not None}), tmp_path / "o"
            )
        return str(caught.value)

    assert "needs 'task'" in refused(task=None)
    assert "rows must be a list" in refused(rows="router")
    assert "did you mean 'budgets'" in refused(budget=[])
    assert "equal: 'time' is not known: flops, budget" in refused(equal="time")
    assert "a row needs 'name'" in refused(rows=[{"rule": "fastv"}])
    assert "two rows are called 'a'" in refused(rows=[{"name": "a"}, {"name": "a"}])
    assert "rule 'fastvv' is not known" in refused(rows=[{"name": "a", "rule": "fastvv"}])
    assert "has no router" in refused(rows=[{"name": "a"}])
    assert "row 'a': keep_layers=1 is out of range" in refused(
        rows=[{"name": "a", "rule": "random"}], budgets=[{"keep_layers": 1}]
    )
    assert "add calibration: FILE" in refused(rows=[{"name": "a", "rule": "shortgpt"}], calibration=None)
