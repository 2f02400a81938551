"""Videos in the routed model: frames are images to the router, and what is left runs as stock layers run it.

Legend: B rows, S tokens, L layers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures.routed import CLOSE, generated, routed_logits
from fixtures.videos import VIDEO_FAMILIES, chat, clip
from tiny_models import random_image

from exporter.clean_room import encode, extend
from exporter.families import visual_token_ids
from exporter.modeling.routed_places import coordinates_of
from exporter.modeling.routed_route import Route
from exporter.modeling.routed_router import best_tokens
from exporter.probe.stock_layers import Stock

# A question about a video of three grids of frames, and a longer one about one of two: padded in a batch.
FRAMES = {"qwen2_vl": (5, 4), "qwen2_5_vl": (5, 4), "qwen3_vl": (5, 4), "glm4v": (5, 4)}


def prompts(case, rows=(0, 1)):
    lengths = FRAMES.get(case.family, (3, 3))
    chats = [chat("video", question=("what?", "how many digits are there?")[row]) for row in rows]
    return encode(case.processor, chats, [[]] * len(rows), [[clip(lengths[row], fps=4.0, seed=row)] for row in rows])


def visual_of(case, batch):
    return torch.isin(batch["input_ids"], torch.tensor(visual_token_ids(case.model.config)))


def random_route(case, batch, seed=0):
    random = torch.Generator().manual_seed(seed)
    visual = visual_of(case, batch)
    keep = ~visual | (torch.rand(visual.shape, generator=random) < 0.4)
    layers = torch.rand(len(keep), case.num_layers, generator=random) < 0.6
    layers[:, 1], layers[:, -2] = True, False
    return Route(keep=keep, layers=layers)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_logits_are_those_of_stock_layers_on_what_is_left(family, routed):
    case = routed(family, 2)
    batch = prompts(case, [0])
    route = random_route(case, batch)
    stock = Stock(case.plain, [batch])
    with torch.no_grad():
        expected = stock.left(batch, keep=route.keep[0], layers=route.layers[0], drop_at=2)
    found = routed_logits(case, batch, route=route)[0, route.keep[0]]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_generated_is_uncached_and_a_batch_is_its_rows(family, routed):
    case = routed(family, 2)
    batch = prompts(case)
    length = batch["input_ids"].shape[1]
    made = generated(case, batch, keep_visual_tokens=0.5)
    visual = visual_of(case, batch)
    assert (made.route.keep & visual).sum(1).tolist() == [round(0.5 * n) for n in visual.sum(1).tolist()]
    answer = made.sequences[:, length:]
    whole = extend(batch, answer, torch.ones_like(answer, dtype=torch.bool), family)
    expected = routed_logits(case, whole, route=made.route)[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), expected, **CLOSE)
    for row in (0, 1):
        alone = generated(case, prompts(case, [row]), keep_visual_tokens=0.5)
        torch.testing.assert_close(torch.stack(alone.logits, 1)[0], torch.stack(made.logits, 1)[row], **CLOSE)


@pytest.mark.parametrize(("family", "step"), [("qwen2_vl", 1), ("qwen2_5_vl", 2), ("qwen3_vl", None)])
def test_the_time_axis_of_what_is_left(family, step, routed):
    """Against positions counted by hand: time, row and column, in steps of time that Qwen2.5-VL takes from the fps.

    4 frames a second in pairs are half a second a pair, and its vision configuration has 4 positions a second.
    Qwen3-VL puts the time into the text between frames, whose own time stands still.
    """
    case = routed(family, 2)
    batch = prompts(case, [0])
    visual = visual_of(case, batch)[0]
    _, rows, columns = (batch["video_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    positions, start, index = [], 0, 0
    while index < len(visual):
        if not visual[index]:
            positions.append((start, start, start))
            start, index = start + 1, index + 1
            continue
        length = int((~visual[index:]).float().argmax())
        cells = [(t, i, j) for t in range(length // (rows * columns)) for i in range(rows) for j in range(columns)]
        positions += [(start + t * (step or 1), start + i, start + j) for t, i, j in cells]
        start, index = start + max(rows, columns), index + length
    route = random_route(case, batch)
    narrowed = torch.tensor(positions).T[:, None, route.keep[0]]  # [3, 1, K]
    decoder = case.model.get_decoder()
    expected = decoder.rotary_emb(torch.zeros(1, 1), narrowed)
    given = []
    attention = decoder.layers[-1].self_attn
    handle = attention.register_forward_pre_hook(lambda _, __, keywords: given.append(keywords), with_kwargs=True)
    routed_logits(case, batch, route=Route(keep=route.keep))
    handle.remove()
    for found, wished in zip(given[0]["position_embeddings"], expected, strict=True):
        torch.testing.assert_close(found, wished)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_frames_are_images_to_the_router(family, routed):
    case = routed(family, 2)
    batch = prompts(case)
    visual = visual_of(case, batch)
    coordinates = coordinates_of(case.model.config, visual, batch)
    grids = batch.get("video_grid_thw")
    for row in (0, 1):
        places = coordinates[row, visual[row]]
        if grids is not None:
            frames, rows, columns = (grids[row] // torch.tensor([1, 2, 2])).tolist()
        else:
            frames, side = 3, {"llava_onevision": 2, "internvl": 4, "smolvlm": 3}[family]
            rows = columns = side
        each = [
            (frame, (i + 0.5) / rows, (j + 0.5) / columns)
            for frame in range(frames)
            for i in range(rows)
            for j in range(columns)
        ]
        end = [(frames - 1, 1.0, 1.0)] if family == "llava_onevision" else []  # the line end after the last frame
        torch.testing.assert_close(places, torch.tensor([*each, *end]))
    shown = case.model.route(**batch, keep_visual_tokens=0.5).coordinates
    torch.testing.assert_close(shown, coordinates)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_images_and_videos_in_one_conversation(family, routed):
    case = routed(family, 2)
    image = random_image(np.random.default_rng(3), (48, 48))
    batch = encode(case.processor, [chat("image", "video")], [[image]], [[clip(4)]])
    alone = encode(case.processor, [chat("image")], [[image]])
    visual = visual_of(case, batch)
    numbers = coordinates_of(case.model.config, visual, batch)[0, visual[0]]
    only = coordinates_of(case.model.config, visual_of(case, alone), alone)[0, visual_of(case, alone)[0]]
    torch.testing.assert_close(numbers[: len(only)], only)
    frames = [1, 2] if family == "qwen2_5_vl" else [1, 2, 3, 4]
    assert numbers[len(only) :, 0].unique().tolist() == frames
    made = generated(case, batch, keep_visual_tokens=0.5)
    torch.testing.assert_close(made.route.coordinates[0, visual[0]], numbers)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_no_frame_is_starved(family, routed):
    """With a floor, each frame keeps its best tokens even where another frame has all the highest scores."""
    case = routed(family, 2)
    batch = prompts(case, [0])
    visual = visual_of(case, batch)
    coordinates = coordinates_of(case.model.config, visual, batch)
    numbers = coordinates[0, visual[0], 0]
    logits = torch.where(coordinates[..., 0] == 1, 10.0, 0.0) + torch.linspace(0, 1, visual.shape[1])
    counts = torch.tensor([9])
    for floor, least in ((0.0, 0), (1.0, 3), (0.5, 1)):
        keep = best_tokens(logits, visual, budget=counts, patches=coordinates, image_floor=floor)
        kept = [int((keep[0, visual[0]] & (numbers == frame)).sum()) for frame in range(3)]
        assert sum(kept) == 9 and min(kept) >= least, (floor, kept)
        if floor == 0:
            assert kept[1] == min(9, int((numbers == 1).sum()))
