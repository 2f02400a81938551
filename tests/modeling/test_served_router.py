"""The serving router, which stands alone: how many rows stay, where they lie, which ones, and what they carry."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from exporter.modeling.routed_places import any_resolution_shape
from exporter.modeling.served_cells import blocks, grids_of, means_of_cells, runs, softmax_of_cells
from exporter.modeling.served_router import (
    SERVING_ROUTER_FILE,
    ServingRouter,
    ServingSettings,
    best_rows,
    compact,
    load_serving_router,
    picture_coordinates,
    picture_places,
    positions_in_axes,
    select,
    served_positions,
    tokens_kept,
    why_untested,
)

D, N, Q = 24, 30, 5
SETTINGS = ServingSettings(bottleneck=16, num_heads=2, question_aware=True)
POOLED = replace(SETTINGS, pooled=True)
ENTRY = {"bottleneck": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def router() -> ServingRouter:
    """A router whose scores and correction are not zero any more."""
    torch.manual_seed(0)
    router = ServingRouter(D, SETTINGS).eval()
    torch.nn.init.normal_(router.up.weight)
    torch.nn.init.normal_(router.head[-1].weight)
    return router


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "budget", "kept"),
    [(64, 0.25, 16), (5, 0.5, 3), (7, 0.5, 4), (3, 0.1, 1), (10, 1.0, 10), (10, 1, 1), (10, 64, 10), (576, 0.75, 432)],
)
def test_so_many_tokens_stay(number: int, budget: float, kept: int) -> None:
    assert tokens_kept(number, budget) == kept


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0.0, r"keep_visual_tokens=0.0 is no share: give a float in \(0, 1\], or a whole count"),
        (1.5, "keep_visual_tokens=1.5 is no share"),
        (float("nan"), "keep_visual_tokens=nan is no share"),
        (0, "keep_visual_tokens=0 keeps nothing of the picture: give 1 or more"),
        (True, "keep_visual_tokens=True is neither a count"),
        ("half", "keep_visual_tokens='half' is neither a count"),
    ],
)
def test_what_is_no_budget_is_refused(budget: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens_kept(10, budget)
    with pytest.raises(ValueError, match=message):
        SETTINGS.budget(keep_visual_tokens=budget)
    with pytest.raises(ValueError, match=message):
        ServingSettings.of({"serving_router": {**ENTRY, "presets": {"mine": {"keep_visual_tokens": budget}}}})


def test_a_picture_without_rows_has_nothing_to_keep() -> None:
    with pytest.raises(ValueError, match="a picture of 0 rows has nothing to keep"):
        tokens_kept(0, 0.5)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_read_from_a_configuration_or_its_json() -> None:
    config = {"model_type": "llava", "text_config": {"hidden_size": D, "num_hidden_layers": 3}}
    entry = {**ENTRY, "trained_for": {"model_type": "llava", "hidden_size": D, "num_hidden_layers": 3}}
    settings = ServingSettings.of({**config, "serving_router": entry})
    text = SimpleNamespace(**config["text_config"])
    loaded = SimpleNamespace(model_type="llava", get_text_config=lambda: text, serving_router=entry)
    assert settings == ServingSettings.of(loaded)
    assert settings.budget() is None
    assert settings.budget("serve-fast") == 0.25
    assert settings.budget(keep_visual_tokens=7) == 7
    assert ServingSettings.of({**config, "serving_router": {**entry, "default": "serve-balanced"}}).budget() == 0.5


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "has no entry 'serving_router': this folder has no serving router; train one with `lvlm-exporter route"),
        ({**ENTRY, "width": 3}, "serving_router has no setting 'width'; it has: bottleneck"),
        ({"bottleneck": 16}, "serving_router says no 'num_heads'"),
        ({**ENTRY, "format": 9}, "is of format 9, this code runs format 1"),
        ({**ENTRY, "trained_for": {"hidden_size": 9}}, "trained for another base model: hidden_size 9, here it is 24"),
        ({**ENTRY, "depth": 0}, "depth=0 is no count of 1 or more"),
        ({**ENTRY, "num_heads": 3}, "bottleneck=16 is no multiple of twice num_heads=3"),
        ({**ENTRY, "default": "fast"}, "the default preset 'fast' is not among off, serve-accurate"),
        ({**ENTRY, "presets": {"mine": {}}}, "preset 'mine' is {}, not one entry 'keep_visual_tokens'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingSettings.of({"hidden_size": D, "serving_router": entry})


def test_a_request_names_one_budget_that_is_known() -> None:
    with pytest.raises(ValueError, match="give either preset='serve-fast' or keep_visual_tokens=3, not both"):
        SETTINGS.budget("serve-fast", 3)
    with pytest.raises(ValueError, match="preset 'fast' is not known: this serving router has off, serve-accurate"):
        SETTINGS.budget("fast")


def test_types_that_were_not_tested_are_named() -> None:
    assert why_untested({"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}) == ""
    assert why_untested({"model_type": "gemma3"}) == "a gemma3 model"
    pixtral = {"model_type": "llava", "vision_config": {"model_type": "pixtral"}}
    assert why_untested(pixtral) == "a llava model with Pixtral's vision tower"


# --- which ------------------------------------------------------------------------------------------------------------


def test_the_highest_of_each_run_stays_in_the_pictures_order() -> None:
    assert runs(5, 3).tolist() == [0, 0, 1, 1, 2]
    assert best_rows(torch.tensor([1.0, 3.0, 4.0, 1.0, -5.0]), runs(5, 3)).tolist() == [1, 2, 4]
    assert best_rows(torch.zeros(4), runs(4, 2)).tolist() == [0, 2]
    assert best_rows(torch.randn(7), runs(7, 7)).tolist() == list(range(7))
    for number, stays in ((36, 9), (577, 144), (10, 9)):
        assert torch.bincount(runs(number, stays)).min() >= number // stays


def grid(lines: int, columns: int) -> torch.Tensor:
    return picture_coordinates({}, lines * columns, grid=(1, lines, columns))


def test_cells_are_blocks_in_the_order_of_lines() -> None:
    two_by_two = [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert blocks(grid(4, 4), 4).tolist() == two_by_two
    assert blocks(grid(4, 4), 8).tolist() == [i // 2 for i in range(16)]  # pairs within lines, not across them
    assert blocks(grid(3, 1), 2).tolist() == [0, 0, 1]
    tiles = torch.cat([grid(4, 4), grid(2, 2), grid(2, 2)])
    assert blocks(tiles, 6).tolist() == [*two_by_two, *[4] * 4, *[5] * 4]
    assert blocks(tiles, 2).tolist() == runs(24, 2).tolist()  # fewer than tiles
    assert grids_of(tiles) == [(4, 4), (2, 2), (2, 2)]
    assert grids_of(torch.tensor([[0.2, 0.5], [0.2, 1.0], [0.8, 0.5]])) == [(3, 1)]  # lines of two and of one


def test_there_are_as_many_cells_as_rows_stay_whatever_the_grid() -> None:
    for lines in range(1, 7):
        for columns in range(1, 7):
            for stays in range(1, lines * columns + 1):
                cells = blocks(grid(lines, columns), stays)
                assert cells.unique().tolist() == list(range(stays)), (lines, columns, stays)


@pytest.mark.parametrize("asked", [False, True])
def test_what_stays_is_what_forward_gives(router: ServingRouter, features: torch.Tensor, asked: bool) -> None:
    question = torch.randn(Q, D) if asked else None
    coordinates = torch.rand(N, 2)
    logits, _ = router(features, coordinates, question)
    rows, index = select(router, features, 0.4, coordinates, question)
    assert torch.equal(index, best_rows(logits, runs(N, 12))) and len(index) == 12
    kept = torch.zeros(N).index_fill(0, index, 1.0)
    assert torch.equal(rows, router(features, coordinates, question, kept)[1][index])
    assert torch.equal(rows, compact(router, features, 0.4, coordinates, question))


def test_an_untrained_router_adds_nothing_and_a_trained_one_nothing_where_all_stay(features: torch.Tensor) -> None:
    fresh = ServingRouter(D, SETTINGS)
    rows, index = select(fresh, features, 0.5)
    assert torch.equal(rows, features[index]) and index.tolist() == list(range(0, N, 2))
    torch.nn.init.normal_(fresh.up.weight)
    assert compact(fresh, features, 1.0) is features
    assert not torch.equal(compact(fresh, features, 0.5), rows)


def test_an_untrained_router_with_pooled_rows_gives_the_means_of_blocks(features: torch.Tensor) -> None:
    fresh = ServingRouter(D, POOLED)
    for coordinates, cells in ((None, runs(N, 7)), (grid(5, 6), blocks(grid(5, 6), 7))):
        rows, index = select(fresh, features, 7, coordinates)
        means = [features[cells == cell].mean(0) for cell in range(7)]
        assert torch.allclose(rows, torch.stack(means), atol=1e-6)
        assert cells[index].tolist() == list(range(7))
        torch.nn.init.constant_(fresh.first, 50.0)  # nothing of the others is left
        rows, index = select(fresh, features, 7, coordinates)
        assert torch.allclose(rows, features[index], atol=1e-6)
        assert index.tolist() == best_rows(torch.zeros(N), cells).tolist()
        torch.nn.init.zeros_(fresh.first)
    assert compact(fresh, features, 1.0) is features


def test_pooled_rows_are_weighted_and_corrected_with_a_gradient_to_every_weight(features: torch.Tensor) -> None:
    torch.manual_seed(0)
    router, cells = ServingRouter(D, POOLED), blocks(grid(5, 6), 7)
    torch.nn.init.normal_(router.head[-1].weight)
    weights = softmax_of_cells(router(features, grid(5, 6))[0], cells)
    rows, index = select(router, features, 7, grid(5, 6), torch.randn(Q, D))
    assert torch.allclose(means_of_cells(torch.ones(N, 1), cells, weights), torch.ones(7, 1)) and len(rows) == 7
    plain, _ = select(router, features, 7, grid(5, 6))
    assert torch.allclose(plain, means_of_cells(features, cells, weights), atol=1e-5)
    assert not torch.allclose(plain, rows, atol=1e-3) and cells[index].tolist() == list(range(7))
    torch.nn.init.normal_(router.up.weight)
    rows, _ = select(router, features, 7, grid(5, 6), torch.randn(Q, D))
    gradients = torch.autograd.grad(rows.square().sum(), list(router.parameters()), allow_unused=True)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_what_is_carried_depends_on_what_leaves_and_has_a_gradient(
    router: ServingRouter, features: torch.Tensor
) -> None:
    kept = torch.zeros(N).index_fill(0, torch.arange(10), 1.0).requires_grad_()
    _, changed = router(features, kept=kept)
    assert not torch.allclose(changed[:10], router(features)[1][:10])
    (gradient,) = torch.autograd.grad(changed[:10].square().sum(), kept)
    assert (gradient[10:] != 0).any()


def test_the_order_of_a_question_counts(router: ServingRouter, features: torch.Tensor) -> None:
    question = torch.randn(Q, D)
    assert not torch.allclose(router(features, None, question)[0], router(features, None, question.flip(0))[0])
    assert torch.equal(router(features, None, question[:0])[0], router(features)[0])


def test_it_computes_in_float32_and_gives_the_dtype_of_the_features(
    router: ServingRouter, features: torch.Tensor
) -> None:
    half = features.bfloat16()
    rows = compact(router, half, 0.5)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, compact(router, half.float(), 0.5).bfloat16())


# --- where ------------------------------------------------------------------------------------------------------------


def test_places_of_grids_squares_and_tiles() -> None:
    qwen = {"vision_config": {"spatial_merge_size": 2}}
    places = picture_coordinates(qwen, 6, grid=torch.tensor([1, 4, 6]))
    assert places.tolist() == [[r, c] for r in (0.25, 0.75) for c in (pytest.approx(1 / 6), 0.5, pytest.approx(5 / 6))]
    square = {"vision_config": {"image_size": 8, "patch_size": 4}}
    assert torch.equal(picture_coordinates(square, 8), picture_coordinates(square, 4).repeat(2, 1))
    assert picture_coordinates(square, 4).tolist() == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    tiles = {"image_seq_length": 16, "vision_config": {"image_size": [32, 32], "patch_size": [4, 4]}}
    assert torch.equal(picture_coordinates(tiles, 48)[16:32], picture_coordinates(tiles, 16))
    assert picture_coordinates(square, 3)[:, 1].tolist() == [0.5] * 3


def test_places_of_any_resolution_are_those_of_the_routed_model() -> None:
    pinpoints = [[48, 48], [48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]
    entries = {"image_size": 48, "patch_size": 8}
    config = {"image_grid_pinpoints": pinpoints, "vision_config": entries}
    routed = SimpleNamespace(image_grid_pinpoints=pinpoints, vision_config=SimpleNamespace(**entries))
    for size in [(40, 40), (31, 95), (200, 57), (97, 96), (480, 640), (13, 160), (3, 400)]:
        shape = any_resolution_shape(routed, list(size))
        places = picture_coordinates(config, shape.length, size=torch.tensor(size))
        assert torch.allclose(places, shape.coordinates(shape.length)), size


def test_places_are_kept_by_the_middles_of_cells() -> None:
    qwen = {"vision_config": {"spatial_merge_size": 2}}
    places, side = picture_places(qwen, [1, 8, 12], 24)
    assert places.tolist() == [[row, column] for row in range(4) for column in range(6)]
    assert side == 6
    for stays in range(1, 24):
        places, side = picture_places(qwen, [1, 8, 12], stays)
        cells = blocks(picture_coordinates(qwen, 24, grid=[1, 8, 12]), stays)
        assert side == 6
        assert cells[places[:, 0] * 6 + places[:, 1]].tolist() == list(range(stays))
    assert picture_places(qwen, [1, 8, 12], 6)[0].tolist() == [[r, c] for r in (0, 2) for c in (0, 2, 4)]


def test_text_behind_a_shorter_picture_stands_where_it_did() -> None:
    picture = (torch.tensor([[0, 1], [2, 3]]), 4)
    positions = positions_in_axes(9, [(2, picture), (5, picture)])
    assert positions.tolist() == [
        [0, 1, 2, 2, 6, 7, 7, 11, 12],
        [0, 1, 2, 4, 6, 7, 9, 11, 12],
        [0, 1, 3, 5, 6, 8, 10, 11, 12],
    ]
    assert positions_in_axes(3, []).tolist() == [[0, 1, 2]] * 3


def test_places_are_kept_in_models_with_three_axes_only() -> None:
    entry = {**ENTRY, "keeps_places": True}
    assert ServingSettings.of({"serving_router": entry, "model_type": "qwen3_vl"}).keeps_places
    with pytest.raises(ValueError, match="keeps_places is for models with positions in three axes"):
        ServingSettings.of({"serving_router": entry, "model_type": "llava"})


def test_positions_are_compacted() -> None:
    visible = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert served_positions(visible).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert served_positions(torch.ones(3), axes=3).tolist() == [[0, 1, 2]] * 3


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_of_a_folder_is_read_and_that_of_another_refused(tmp_path: Path, router: ServingRouter) -> None:
    with pytest.raises(OSError, match=r"has no serving_router/model.safetensors: fetch the serving router's folder"):
        load_serving_router(tmp_path, D, SETTINGS)
    (tmp_path / "serving_router").mkdir()
    save_file(router.half().state_dict(), tmp_path / SERVING_ROUTER_FILE)
    loaded = load_serving_router(tmp_path, D, SETTINGS)
    router.float()
    assert all(torch.equal(tensor, router.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(ValueError, match=r"is not the serving router that config.json describes: input_norm.weight"):
        load_serving_router(tmp_path, D + 1, SETTINGS)


@pytest.mark.clean_process
def test_it_needs_torch_alone() -> None:
    code = (
        "import json, sys, torch, exporter; before = set(sys.modules); import exporter.modeling.served_router\n"
        "print(json.dumps(sorted(name.partition('.')[0] for name in set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(run.stdout)) <= {"exporter", "torch", *sys.stdlib_module_names}
