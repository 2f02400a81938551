"""Names that are a slip, values that no picture could mean, types that no weight has; and healthy files left alone."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures.checkpoints import FAMILIES
from fixtures.damage import both, check, config, edit, header, said_of, tensors, write

from exporter.checkpoints.config_names import check_names, check_texts
from exporter.checkpoints.image_settings import check_image_names, check_image_settings
from exporter.checkpoints.near_names import is_slip, misspelt
from exporter.checkpoints.source import open_source
from exporter.checkpoints.tensor_types import check_types, refuse_not_finite
from exporter.cli.entry import main
from exporter.errors import InputError

IMAGES = "preprocessor_config.json"


def renamed(file: str, path: str, new: str) -> Any:
    """Return a change that gives an entry another name."""

    def change(folder):
        content = json.loads((folder / file).read_text())
        *parents, last = path.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[new] = place.pop(last)
        (folder / file).write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("entry", "known", "expected"),
    [
        ("image_stdx", "image_std", True),
        ("IMAGE_STD", "image_std", True),
        (" image_std", "image_std", True),
        ("image_sd", "image_std", True),
        ("cleqn_up", "clean_up", True),
        ("image_std", "image_mean", False),
        ("min_pixels", "max_pixels", False),
        ("boi_token_id", "bos_token_id", False),  # of an image, of a text
        ("hidden_sizes", "hidden_size", False),
        ("eps", "eps2", False),  # short names are near each other by chance
    ],
)
def test_what_is_a_slip(entry, known, expected):
    assert is_slip(entry, known) is expected


def test_only_what_is_missing_can_have_been_meant():
    assert list(misspelt({"size": 1, "sizex": 2}, {"size"})) == []
    assert list(misspelt({"sizex": 2, "unknown": 3, "_size": 1}, {"size"})) == [("sizex", "size")]


ROWS = {
    "a renamed deviation": (
        renamed(IMAGES, "image_std", "image_stdx"),
        r"'image_stdx'.* instead of .*mean 'image_std'",
    ),
    "a mean in capitals": (renamed(IMAGES, "image_mean", "IMAGE_MEAN"), "Did you mean 'image_mean'"),
    "a size with a space": (renamed(IMAGES, "size", " size"), "Did you mean 'size'"),
    "an entry without a name": (renamed(IMAGES, "size", ""), "has an entry without a name"),
    "a deviation beyond pixels": (edit(IMAGES, image_std=[0.5, 0.5, 2.0**63]), "scaled by numbers from 0 to 255"),
    "a negative mean": (edit(IMAGES, image_mean=-(1 << 40)), "scaled by numbers from 0 to 255"),
    "two channels": (edit(IMAGES, image_mean=[0.5, 0.5]), "one number is needed for each of 3 channels"),
    "a size of a pixel": (edit(IMAGES, size=1), "size=1; every picture would be made smaller than a patch of 8"),
    "a size below nothing": (edit(IMAGES, size=-0.5), "edges in pixels are needed"),
    "a size without edges": (edit(IMAGES, size={}), "edges in pixels are needed"),
    "an edge in words": (edit(IMAGES, size={"shortest_edge": "40"}), "edges in pixels are needed"),
    "a class that is a truth": (edit(IMAGES, processor_class=True), "processor_class=True; the name of a class"),
    "a truth in words": (edit(IMAGES, do_normalize="false"), "do_normalize='false'; true or false is needed"),
    "a filter that PIL has not": (edit(IMAGES, resample=9), "resample=9; the number of a filter"),
    "a renamed patch size": (
        renamed("processor_config.json", "patch_size", "patch_sizex"),
        "Did you mean 'patch_size'",
    ),
    "half a character": (write(IMAGES, r'{"image_processor_type": "\ud800"}'), "holds half of a character"),
    "a template with zeros": (write("chat_template.jinja", b"a\0\0"), "jinja holds 2 zero bytes"),
    "a template in Latin-1": (write("chat_template.jinja", b"\xe9"), "jinja is no text in UTF-8"),
    "a step without a name": (
        edit("tokenizer.json", post_processor__type=[1]),
        r"post_processor.type=\[1\]|no JSON|load",
    ),
    "a special token without ids": (
        edit("tokenizer.json", post_processor__special_tokens={}),
        "post_processor puts '<s>' around texts and has no ids for it",
    ),
    "a renamed epsilon": (
        both(
            config(text_config__rms_norm_eps=1e-3), renamed("config.json", "text_config__rms_norm_eps", "RMS_NORM_EPS")
        ),
        "'RMS_NORM_EPS', which nothing reads: 1e-06 would count instead of 0.001. Did you mean 'rms_norm_eps'",
    ),
    "a renamed theta": (
        renamed("config.json", "text_config__rope_parameters__rope_theta", "rope_thet"),
        "rope_theta|rope",
    ),
    "a theta that is a truth": (config(text_config__rope_parameters__rope_theta=False), "rope_theta=False; a number"),
    "a version that is a number": (config(transformers_version=128002), "transformers_version=128002; a text"),
    "a type that is none": (config(dtype={"x": 1}), "dtype={'x': 1}; the name of a type is needed"),
    "a class that is none": (config(architectures=[False]), r"architectures=\[False\]; a list of names"),
    "a configuration's entry without a name": (
        renamed("config.json", "text_config__head_dim", ""),
        "text_config has an entry without a name",
    ),
    "a bias of whole numbers": (
        header(lambda h, n: h[next(k for k in n if k.endswith("norm2.bias"))].update(dtype="I32")),
        "1 of its weights are whole numbers, .*norm2.bias .I32. among them",
    ),
    # left alone
    "a mean for all channels": (edit(IMAGES, image_mean=0.5, image_std=0.5), None),
    "a side for a square": (edit(IMAGES, size=40, crop_size=40), None),
    "entries of other programs": (
        both(
            edit(IMAGES, _valid_processor_keys=["images"], aspect_ratio_setting="anyres", video_sampling={"fps": 1}),
            config(mm_projector_lr=2e-5, neftune_noise_alpha=0.0, use_mm_proj=True, _pad_token_id=3),
            edit("processor_config.json", num_frames=8),
        ),
        None,
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_settings(row, damaged):
    change, expected = ROWS[row]
    check(damaged(change), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            renamed("config.json", "text_config__attention_dropout", "attention_dropoutx"),
            "no entry 'attention_dropout'",
        ),
        (renamed(IMAGES, "processor_class", "processor_classx"), "no entry 'processor_class'.*it changes no picture"),
        (config(text_config__pad_token_id=-2), "pad_token_id=-2, which is the id of no token"),
        (
            lambda folder: (folder / "tokenizer.json").write_text(
                (folder / "tokenizer.json").read_text().replace('"what": 40', '"what": 41')
            ),
            "gives the words 'what' and 'which' the same id, 41",
        ),
        (
            tensors(
                lambda t: (
                    [t.update({k: v.bfloat16()}) for k, v in list(t.items()) if k.endswith("norm.weight")]
                    + [t.update({k: v.half()}) for k, v in list(t.items()) if k.endswith("lm_head.weight")]
                )
            ),
            "1 in F16, language_model.lm_head.weight among them",
        ),
    ],
)
def test_what_changes_no_answer_is_said(change, said, damaged, caplog):
    with caplog.at_level(logging.WARNING):
        assert said_of(damaged(change)) is None
    assert re.search(said, caplog.text), caplog.text


def test_norms_and_routers_of_another_width_are_nobodys_fault(caplog):
    def entry(dtype: str) -> Any:
        return SimpleNamespace(dtype=dtype, path=SimpleNamespace(name="m.safetensors"))

    types = {"a.weight": entry("BF16"), "norm.weight": entry("F32"), "position_ids": entry("I64")}
    check_types("model", types)
    check_types("model", types | {"b.weight": entry("F8_E4M3")})
    assert caplog.text == ""
    with pytest.raises(InputError, match="1 of its weights are whole numbers, gate"):
        check_types("model", {"gate": entry("I32")}, all_learnt=True)


def test_weights_that_are_no_numbers_are_named(damaged):
    key = "language_model.lm_head.weight"
    source = open_source(str(damaged(tensors(lambda t: t[key].view(-1)[:1].fill_(torch.nan)))))
    with pytest.raises(InputError, match=f"tensor {key} holds NaN"):
        refuse_not_finite(source.name, source.weights)


@pytest.mark.clean_process
def test_a_weight_that_no_answer_meets_is_still_no_number(damaged, tmp_path, capsys):
    """The last row of the embeddings is of no token of the reference question, and layers by name load no model."""
    key = "language_model.model.embed_tokens.weight"
    model = damaged(tensors(lambda t: t[key][-1, :1].fill_(torch.inf)))
    command = ["compress", str(model), "--layers", "1", "--fold", "none", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 2
    assert f"tensor {key} holds NaN or infinite values" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- healthy files, as released models have them ---------------------------------------------------------------------

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
ON = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 0.00392156862745098,
    "resample": 3,
}
PINPOINTS = {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]], "aspect_ratio_setting": "anyres"}
CROP = {"crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "size": {"shortest_edge": 336}}
PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
RELEASED: dict[str, dict[str, Any]] = {
    "LLaVA 1.5": {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "_valid_processor_keys": ["images", "do_resize", "size"],
        **CLIP,
        **ON,
        **CROP,
    },
    "CLIP, old": {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": 336,
        "size": 336,
        **CLIP,
        "do_center_crop": True,
        "resample": 3,
    },
    "LLaVA-NeXT": {
        "image_processor_type": "LlavaNextImageProcessor",
        "do_pad": True,
        **PINPOINTS,
        **CLIP,
        **ON,
        **CROP,
    },
    "LLaVA-OneVision": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_pad": True,
        **PINPOINTS,
        **HALVES,
        **ON,
        "size": {"height": 384, "width": 384},
        "vision_feature_select_strategy": "full",
    },
    "Qwen2-VL": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        **PATCHES,
        **CLIP,
    },
    "Qwen2.5-VL": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "do_convert_rgb": True,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        **PATCHES,
        **CLIP,
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    },
    "Qwen3-VL": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        **PATCHES,
        "patch_size": 16,
        **HALVES,
        "processor_class": "Qwen3VLProcessor",
    },
    "InternVL": {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "crop_size": None,
        "crop_to_patches": False,
        "data_format": "channels_first",
        "default_to_square": True,
        "device": None,
        "do_center_crop": None,
        "input_data_format": None,
        "max_patches": 12,
        "min_patches": 1,
        "return_tensors": None,
        "size": {"height": 448, "width": 448},
        **CLIP,
        **ON,
    },
    "Idefics3": {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_image_splitting": True,
        "do_pad": True,
        "max_image_size": {"longest_edge": 364},
        "size": {"longest_edge": 1456},
        **HALVES,
        **ON,
        "resample": 1,
    },
    "SmolVLM 2": {
        "image_processor_type": "SmolVLMImageProcessor",
        "do_image_splitting": True,
        "do_pad": True,
        "max_image_size": {"longest_edge": 512},
        "size": {"longest_edge": 2048},
        **HALVES,
        **ON,
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
        "resample": 1,
    },
    "Gemma 3": {
        "image_processor_type": "Gemma3ImageProcessor",
        "do_pan_and_scan": None,
        "image_seq_length": 256,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "resample": 2,
        "pan_and_scan_min_ratio_to_activate": None,
        "size": {"height": 896, "width": 896},
        **HALVES,
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
    },
    "PaliGemma": {
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": 256,
        "do_convert_rgb": None,
        "do_normalize": True,
        "size": {"height": 224, "width": 224},
        **HALVES,
        "resample": 3,
    },
    "Pixtral": {
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": {"height": 16, "width": 16},
        "size": {"longest_edge": 1024},
        "_valid_processor_keys": ["images"],
        **CLIP,
        **ON,
    },
    "Mistral 3": {
        "image_processor_type": "PixtralImageProcessorFast",
        "patch_size": 14,
        "size": {"longest_edge": 1540},
        "crop_size": None,
        "default_to_square": True,
        "do_center_crop": None,
        **CLIP,
        **ON,
    },
    "GLM 4.1V": {
        "image_processor_type": "Glm4vImageProcessor",
        "processor_class": "Glm4vProcessor",
        "do_rescale": True,
        "size": {"shortest_edge": 12544, "longest_edge": 9633792},
        **PATCHES,
        **CLIP,
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_settings_of_released_models_pass_without_a_word(name, tmp_path, caplog):
    from transformers import AutoImageProcessor

    (tmp_path / IMAGES).write_text(json.dumps(RELEASED[name]))
    vision = SimpleNamespace(patch_size=14, num_channels=3)
    with caplog.at_level(logging.WARNING, "exporter"):
        check_image_settings(IMAGES, RELEASED[name], SimpleNamespace(vision_config=vision))
        check_image_names(IMAGES, RELEASED[name], AutoImageProcessor.from_pretrained(tmp_path))
    assert [record for record in caplog.records if record.name.startswith("exporter")] == []


TEXT = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 0, "torch_dtype": "float16"}
RELEASED_CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": TEXT | {"_name_or_path": "lmsys/vicuna-7b-v1.5", "rope_scaling": None, "rope_theta": 1e4},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 768, "vocab_size": 32000},
        "ignore_index": -100,
        "torch_dtype": "float16",
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "vision_feature_layer": -2,
        "architectures": ["LlavaForConditionalGeneration"],
    },
    "qwen2_vl": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rope_theta": 1000000.0,
        "vision_start_token_id": 151652,
        "bos_token_id": 151643,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "mlp_ratio": 4,
            "num_heads": 2,
            "in_chans": 3,
            "in_channels": 3,
            "hidden_size": 64,
            "spatial_patch_size": 14,
        },
    },
    "smolvlm": {
        "text_config": TEXT
        | {
            "_flash_attn_2_enabled": True,
            "pixel_shuffle_factor": 4,
            "use_resampler": False,
            "neftune_noise_alpha": 0.0,
            "qk_layer_norms": False,
            "perceiver_config": {"qk_layer_norms_perceiver": 1},
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "size": {"longest_edge": 2048},
            "max_image_size": {"longest_edge": 512},
            "tie_word_embeddings": False,
            "use_base_siglip": False,
        },
    },
    "gemma3": {
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
    },
}


@pytest.mark.parametrize("model_type", RELEASED_CONFIGS)
def test_configurations_of_released_models_pass_without_a_word(model_type, caplog):
    from transformers import AutoConfig

    raw = RELEASED_CONFIGS[model_type] | {"model_type": model_type, "transformers_version": "4.40.0"}
    with caplog.at_level(logging.WARNING, "exporter"):
        check_texts("model", raw)
        check_names("model", raw, AutoConfig.for_model(**json.loads(json.dumps(raw))))
    assert [record for record in caplog.records if record.name.startswith("exporter")] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_checkpoints_open_without_a_word(family, tiny, caplog):
    with caplog.at_level(logging.WARNING, "exporter"):
        open_source(str(tiny(family)))
    assert caplog.text == ""
