"""Questions about videos, and about several images: the whole way, from the layers chosen to a routed answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fixtures.checkpoints import FAMILIES
from fixtures.videos import VIDEO_FAMILIES
from tiny_models import SIZES, random_image

from exporter.checkpoints.record import read_record
from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor
from exporter.data.batches import make_batch
from exporter.data.calibration import load_calibration
from exporter.evaluation.evaluate import evaluate
from exporter.pipeline import compress
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Method, Recipe, RouterRecipe
from exporter.routing.requests import BudgetGrid

NUMBER = 8  # of questions: the fewest that a router learns from


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Questions about two images of different sizes each."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    lines = []
    for number in range(NUMBER):
        names = [f"{number}-{image}.png" for image in (0, 1)]
        for shift, name in enumerate(names):
            random_image(random, SIZES[(number + shift) % len(SIZES)]).save(folder / name)
        lines.append({"images": names, "question": "which digit is the same?", "answer": "two"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def routed_on(family, data, tiny, folder):
    """Compress a tiny model by questions and train a router on them, for two steps.

    Returns: the folder, what `evaluate` says, and the visual tokens of each question.
    """
    source, number = tiny(family), {"samples": NUMBER, "answer_tokens": 2}
    router = RouterRecipe(CalibrationData(str(data), **number), steps=2, batch_size=2)
    recipe = Recipe(
        str(source),
        CalibrationData(str(data), **number),
        LayerBudget(drop_layers=1),
        localizer=Method("block_influence"),
        fold=Method("none" if family in ("glm4v", "gemma3") else "scp"),
        router=router,
    )
    made = compress(recipe, folder / "made")
    samples = load_calibration(str(data), samples=NUMBER).samples
    opened = open_source(str(source))
    processor = load_processor(opened.folder)
    visual = [int(make_batch([sample], processor, opened.config).is_visual.sum()) for sample in samples]
    half = BudgetGrid(keep_visual_tokens=(0.5,))
    return made, evaluate([made], data, reference=source, budgets=half, max_new_tokens=2), visual


def check(made, evaluation, visual):
    """Check the counts of visual tokens in the record, and that half of them cost less than the whole."""
    data = read_record(made).to_data()
    assert min(visual) <= data["calibration"]["tokens"]["visual"] <= sum(visual)
    whole, half = evaluation.models
    assert whole.n == half.n >= NUMBER
    assert whole.kl is None and half.kl > 0 and half.tokens == 2 * half.n
    assert half.decoder_flops_share < 1
    for picture in data.get("routes", ()):
        assert (made / picture["file"]).exists()


def all_but(one, families):
    """Return all families, of which one is tested in every run and the others by night."""
    return [f if f == one else pytest.param(f, marks=pytest.mark.long_tail) for f in families]


@pytest.mark.slow
@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("family", all_but("qwen2_5_vl", VIDEO_FAMILIES))
def test_videos_from_calibration_to_a_budget(family, tiny, clips, tmp_path):
    check(*routed_on(family, clips, tiny, tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("family", all_but("llava_onevision", FAMILIES))
def test_several_images_from_calibration_to_a_budget(family, tiny, pairs, tmp_path):
    check(*routed_on(family, pairs, tiny, tmp_path))
