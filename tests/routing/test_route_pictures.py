"""Pictures of routes show what stays: the pixels of kept tokens are as they were, the others are faded."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from exporter.cards.model_card import card
from exporter.clean_room import load_processor
from exporter.data.calibration import read_samples
from exporter.evaluation.evaluate import tightest
from exporter.modeling.routed_route import Budget, Route
from exporter.routing.pictures import as_seen, draw_route, grids, image_grids, pictures_shown, show_routes, spread_out
from exporter.routing.requests import BudgetRequest
from exporter.routing.rules import Rule


def test_grids_of_places():
    """A coarse tile of 2 x 2, then 1 x 3 with a line end."""
    square = [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    places = torch.tensor([*square, [0.5, 1 / 6], [0.5, 0.5], [0.5, 5 / 6], [0.5, 1.0]])
    coarse, fine = grids(places, torch.tensor([1, 0, 0, 1, 0, 0, 1, 1]).bool())
    assert coarse.kept.tolist() == [[True, False], [False, True]]
    assert fine.kept.tolist() == [[False, False, True]]
    mask = coarse.mask(4, 6)
    assert mask[:2, :3].all() and mask[2:, 3:].all() and mask.sum() == 12
    assert fine.mask(2, 9)[:, 6:].all() and fine.mask(2, 9).sum() == 6


@pytest.mark.parametrize(
    ("family", "shapes"), [("llava", [(5, 5)]), ("llava_next", [(3, 3), (3, 6)]), ("mistral3", None)]
)
def test_grids_of_a_route(family, shapes, routed):
    case = routed(family)
    batch = case.prompts([1])  # twice as wide as high
    route = case.model.route(**batch, keep_visual_tokens=0.5)
    (found,) = image_grids(route, 0)
    assert shapes is None or [tuple(grid.kept.shape) for grid in found] == shapes
    line_ends = int((route.coordinates[0][route.visual[0]][:, 2] == 1).sum())
    total = sum(grid.kept.numel() for grid in found)
    assert total + line_ends == int(route.visual.sum())
    kept = route.kept_coordinates()[0]
    assert sum(int(grid.kept.sum()) for grid in found) == int((kept[:, 2] < 1).sum())


def test_a_picture_shows_what_stays(tmp_path):
    visual = torch.ones(1, 4, dtype=torch.bool)
    places = torch.tensor([[[0, 0.25, 0.25], [0, 0.25, 0.75], [0, 0.75, 0.25], [0, 0.75, 0.75]]])
    layers = torch.tensor([[True, True, False, True]])
    route = Route(torch.tensor([[True, False, False, False]]), layers, visual, places)
    white = Image.new("RGB", (40, 40), "white")
    draw_route([white], route, 0, "which corner?", "top left", tmp_path / "a.png")
    pixels = pyplot.imread(tmp_path / "a.png")[..., :3]
    dim = np.isclose(pixels, 0.7, atol=0.02).all(-1)
    rows, columns = (np.nonzero(dim.sum(axis) > 50)[0] for axis in (1, 0))  # letters have such grays too, but few
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert abs(height - width) <= 2  # three quarters of a square are faded, the top left one is not
    inside = dim[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert inside.mean() == pytest.approx(0.75, abs=0.03) and not inside[: height // 2 - 1, : width // 2 - 1].any()


@pytest.mark.slow
def test_pictures_reach_record_and_card(routed_folder, routed_model, task):
    samples = read_samples(str(task))
    processor = load_processor(routed_folder)
    assert show_routes(routed_folder, routed_model, processor, samples, Budget(0.5, 5))
    routes = json.loads((routed_folder / "compression.json").read_text())["routes"]
    assert len(routes) == len(spread_out(samples)) == 2  # types of question
    card(routed_folder)
    text = (routed_folder / "README.md").read_text()
    for picture in routes:
        assert (routed_folder / picture["file"]).stat().st_size > 0
        assert f"]({picture['file']})" in text and picture["question"] in text


def test_pictures_are_only_for_checkpoints_of_ours(routed_model, tiny, task, routed_folder):
    assert not show_routes(
        tiny("llava"), routed_model, load_processor(routed_folder), read_samples(str(task)), Budget(0.5)
    )
    assert not (tiny("llava") / "assets").exists()


def test_images_are_shown_as_they_are_seen(routed_folder, routed):
    image = Image.new("RGB", (60, 40))
    assert as_seen(image, load_processor(routed_folder)).size == (40, 40)  # CLIP's crop
    assert as_seen(image, routed("llava_next").processor).size == (60, 40)


def test_frames_are_shown_one_for_each_grid(routed, clips):
    sample = read_samples(str(clips))[0]
    for family, frames in (("qwen2_vl", [0, 2]), ("internvl", [0, 1, 2, 3])):  # pairs, and one by one
        case = routed(family)
        shown = pictures_shown(sample, case.processor, number=len(frames))
        whole = sample.open_videos()[0].frames
        assert [image.tobytes() for image in shown] == [whole[frame].tobytes() for frame in frames]
        assert pictures_shown(sample, case.processor, number=3) is None


def test_of_several_budgets_the_tightest_is_drawn():
    """Of those under which the router chose."""
    asks = [
        None,
        BudgetRequest(Budget(1.0)),
        BudgetRequest(Budget(0.25, 5)),
        BudgetRequest(Budget(0.5)),
        BudgetRequest(Budget(0.1), Rule("random", "all")),
    ]
    shares = [None, 1.01, 0.4, 0.6, 0.3]
    results = [SimpleNamespace(decoder_flops_share=share) for share in shares]
    assert tightest(asks, results) == Budget(0.25, 5)
    assert tightest(asks[:1], results[:1]) is None
