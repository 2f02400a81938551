"""Patches that run through a vision tower, of images and of frames, by grids and sizes that are counted by hand."""

from __future__ import annotations

import pytest
import torch

from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor
from exporter.data.batches import make_batch
from exporter.data.calibration import load_calibration
from exporter.modeling.modeling_mplug_owl2 import MPLUGOwl2Config
from exporter.modeling.modeling_qwen_vl import QWenVLConfig
from exporter.models.flops import image_patches


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_patches_of_frames_count(family, tiny, clips):
    source = open_source(str(tiny(family)))
    inputs = make_batch(
        load_calibration(str(clips), samples=2).samples, load_processor(source.folder), source.config
    ).inputs
    grids, vision = inputs.get("video_grid_thw"), source.config.vision_config
    a_frame = (vision.image_size // vision.patch_size) ** 2 if grids is None else 0
    assert image_patches(inputs, source.config) == (2 * 4 * a_frame or int(grids.prod(1).sum()))


@pytest.mark.parametrize(
    "config",
    [
        MPLUGOwl2Config(visual_config={"visual_model": {"patch_size": 14}, "visual_abstractor": {}}),
        QWenVLConfig(visual={"patch_size": 14}),
    ],
    ids=["mplug_owl2", "qwen"],
)
def test_types_of_ours_have_their_towers_elsewhere(config):
    assert image_patches({"pixel_values": torch.zeros(2, 3, 448, 448)}, config) == 2 * 32 * 32
