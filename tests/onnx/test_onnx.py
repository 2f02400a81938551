"""ONNX: graphs that say what torch says, a runner without torch, and every way an export is refused.

Export and comparison are the product's own; here the comparison runs in this process, which is quicker, and once in the
clean one (`test_export_from_the_command_line`).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fixtures.onnx_folders import for_cuda, here
from tiny_models import inputs

import exporter
from exporter import CheckFailed, InputError
from exporter.benchmark.figures import BenchOptions
from exporter.benchmark.workload import Workload
from exporter.clean_room import compare_onnx, generate, load_processor, verify_checkpoint
from exporter.clean_room.compare_onnx import check_graph
from exporter.cli.entry import main
from exporter.families import FAMILIES
from exporter.onnx import ExportOptions, pipeline, tracing, trial
from exporter.onnx.graphs import quantize
from exporter.onnx.graphs.decoder import Embeddings
from exporter.onnx.graphs.graph import trace
from exporter.onnx.manifest import write_manifest
from exporter.onnx.pipeline import PACKAGES, export
from exporter.onnx.rows import SUPPORTED
from exporter.onnx.runtime import prepare
from exporter.onnx.runtime.folder import check_provider
from exporter.onnx.runtime.prepare import best_grid, shrunk, unpadded
from exporter.onnx.runtime.sampling import Sampling
from exporter.recipe import recipe_from_data
from exporter.survey.table import listed_findings

ROOT = Path(__file__).parents[2]


def test_graphs_do_not_tell_where_they_were_exported(exported):
    """torch writes a stack trace into every node, with the folders of the machine."""
    _, folder = exported("llava")
    for path in folder.glob("*.onnx"):
        assert not [origin for origin in (b".py", str(ROOT).encode(), b"stack_trace") if origin in path.read_bytes()]


def test_a_transformers_without_fused_operators_is_refused(tiny, tmp_path, monkeypatch):
    import transformers.exporters

    monkeypatch.setattr(transformers.exporters, "OnnxConfig", lambda dynamic, opset_version: None)
    with pytest.raises(InputError, match=r"can't write graphs with ONNX Runtime's operators: .* needs 5\.23 or newer"):
        export(tiny("llava"), tmp_path / "onnx")


def torch_model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


# --- families ---------------------------------------------------------------------------------------------------------


# Beside the rows some that a probe finds: its own encoder tile by tile; visual features that enter after layers, and
# position embeddings resampled for each picture.
@pytest.mark.parametrize(
    "family",
    [*SUPPORTED, "vipllava", *(pytest.param(name, marks=pytest.mark.long_tail) for name in ("qwen3_vl", "glm4v"))],
)
def test_graphs_say_what_torch_says(family, exported):
    """Features, embeddings, logits of prompt and steps, the cache; greedy tokens; batch 1 to 3, several images."""
    source, folder = exported(family)
    report = json.loads((folder / "onnx.json").read_text())["validation"]
    logits = {name: found["max"] for name, found in report["outputs"].items() if "logits" in name}
    assert len(logits) == 2 and max(logits.values()) <= 1e-4
    assert report["equal_tokens"] == report["tokens"] >= 32

    processor = load_processor(folder)  # questions and images that the export did not see
    batch = inputs(processor, batch=3, seed=3)
    batch.pop("labels", None)
    expected = generate(torch_model(source), batch, new_tokens=12).sequences
    found = exporter.onnx.load(folder).generate(**batch, max_new_tokens=12, eos_token_id=())
    assert np.array_equal(found, expected)


def test_heads_are_not_split_and_put_together_again(exported):
    _, folder = exported("llava")
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") > 1 and kinds.count("Reshape") <= 3  # the rotary embedding's


# One for each kind of cache and positions, where CUDA has operators of its own; towers are the same on the CPU.
@pytest.mark.parametrize(
    "family",
    ["llava", *(pytest.param(name, marks=pytest.mark.long_tail) for name in ("mistral3", "qwen2_5_vl", "gemma3"))],
)
def test_graphs_for_cuda_say_what_torch_says(family, exported, tmp_path, monkeypatch):
    source, _ = exported(family)
    folder = export(source, tmp_path / "onnx", for_cuda(monkeypatch))
    manifest = json.loads((folder / "onnx.json").read_text())
    assert (manifest["device"], manifest["dtype"]) == ("cuda", "float16")
    report = manifest["validation"]
    assert report["equal_tokens"] >= 0.9 * report["tokens"] >= 0.9 * 32
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    floats = {value.type.tensor_type.elem_type for value in graph.input} & {1, 10}
    assert floats == {onnx.TensorProto.FLOAT16}


def test_values_that_half_precision_can_not_hold(exported, tmp_path, monkeypatch):
    source = shutil.copytree(exported("llava")[0], tmp_path / "model")
    model = torch_model(source)
    model.get_decoder().layers[0].mlp.down_proj.weight.data *= 1e5
    model.save_pretrained(source)
    with pytest.raises(CheckFailed, match="its values don't fit into float16, export with --dtype float32"):
        export(source, tmp_path / "onnx", for_cuda(monkeypatch))
    assert not (tmp_path / "onnx").exists()


def test_the_reference_model(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "validate", here)
    questions = ExportOptions(calibration=str(digits / "data" / "calibration.jsonl"), samples=4)
    folder = export(digits / "model", tmp_path / "onnx", questions)
    report = json.loads((folder / "onnx.json").read_text())["validation"]
    assert max(found["max"] for name, found in report["outputs"].items() if "logits" in name) <= 1e-4
    assert report["equal_tokens"] == report["tokens"]


def test_every_family_is_exported():
    exported_types = {found.model_type for found in listed_findings() if found.onnx is None}
    assert set(SUPPORTED) <= set(FAMILIES) <= exported_types


def test_other_types_are_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"can't be exported to ONNX: .+ `lvlm-exporter families` lists the types"):
        export(tiny("qwen3_5"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_router_of_a_type_without_a_row_is_refused(tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny("vipllava"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"router": {"drop_at": 1}}))
    monkeypatch.setattr(trial, "tried", lambda *_: None)
    with pytest.raises(InputError, match="has a router, and routed graphs are written for the types of a table only"):
        export(folder, tmp_path / "out")


def test_rows_may_be_padded_on_either_side(exported):
    _, folder = exported("llava")
    processor, model = load_processor(folder), exporter.onnx.load(folder)
    left = inputs(processor, batch=3)
    right = dict(left)
    for name in ("input_ids", "attention_mask"):
        rows = [row[mask.bool()] for row, mask in zip(left[name], left["attention_mask"], strict=True)]
        right[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    length = left["input_ids"].shape[1]
    answers = [model.generate(**given, max_new_tokens=6)[:, length:] for given in (left, right)]
    assert np.array_equal(*answers)


def test_a_sliding_window_is_as_wide_as_torchs(exported, tmp_path, monkeypatch):
    source = shutil.copytree(exported("llava_next")[0], tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["sliding_window"] = 7  # tokens, fewer than any prompt has
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(pipeline, "validate", here)
    export(source, tmp_path / "onnx")


# --- quantised weights ------------------------------------------------------------------------------------------------


def test_int8_weights(exported, tmp_path):
    source, folder = exported("llava")
    copy = shutil.copytree(folder, tmp_path / "int8")
    quantize.quantize(copy, "int8", "cpu")
    kinds = {node.op_type for node in onnx.load(copy / "decoder.onnx", load_external_data=False).graph.node}
    assert "MatMulNBits" in kinds and "MatMul" not in kinds
    before, after = ((place / "decoder.onnx.data").stat().st_size for place in (folder, copy))
    assert after < 0.4 * before
    manifest = json.loads((copy / "onnx.json").read_text())
    write_manifest(copy, manifest)
    report = here(copy, {**manifest, "source": str(source), "quantize": "int8"}, [])
    assert report["equal_tokens"] >= 0.8 * report["tokens"]  # a random model's best tokens are close together


# --- validation -------------------------------------------------------------------------------------------------------


def test_a_wrong_component_is_named_and_leaves_no_folder(exported, tmp_path, monkeypatch):
    source, _ = exported("llava")

    class Off(Embeddings):
        def forward(self, input_ids, image_features):
            return {"inputs_embeds": super().forward(input_ids, image_features)["inputs_embeds"] + 0.01}

    monkeypatch.setattr(tracing, "Embeddings", Off)
    monkeypatch.setattr(pipeline, "validate", here)
    with pytest.raises(CheckFailed, match=r"embeddings: inputs_embeds differs from torch by 1\.0e-02"):
        export(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_checker_finds_what_no_comparison_would(exported, tmp_path):
    _, folder = exported("llava")
    path = Path(shutil.copy(folder / "embeddings.onnx", tmp_path))
    shutil.copy(folder / "embeddings.onnx.data", tmp_path)
    assert not check_graph(path, 20)
    assert check_graph(path, 19) == ["opset 20 instead of 19"]
    graph = onnx.load(path, load_external_data=False)
    graph.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(graph, path)
    assert "onnx's checker says: " in check_graph(path, 20)[0]


def test_an_operator_without_onnx_form_is_named(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return {"y": torch.special.bessel_j0(x)}

        def samples(self):
            return {"x": torch.rand(2, 3)}

        def dynamic(self):
            return {"x": {0: torch.export.Dim("rows")}}

    with pytest.raises(InputError, match=r"the vision of this model can't be written as ONNX: operator .*bessel_j0"):
        trace(Odd(), tmp_path / "vision.onnx", "cpu", 20)


def test_tolerances_are_those_of_checkpoints():
    assert compare_onnx.TOLERANCE["float32"] == verify_checkpoint.TOLERANCE["float32"]


# --- the command line, with its clean process -------------------------------------------------------------------------


def test_export_from_the_command_line(exported, tmp_path, questions, capsys):
    source, _ = exported("llava")
    out, data = tmp_path / "onnx", tmp_path / "result.json"
    command = ["onnx", source, "--out", out, "--calibration", questions, "--samples", 4, "--json", data]
    assert main([str(part) for part in command]) == 0
    said = capsys.readouterr().out
    assert "decoder (step): logits" in said and "validated in a clean process" in said
    result = json.loads(data.read_text())
    assert result["path"] == str(out) and result["validation"]["tokens"] >= 80  # 4 questions more than usual
    assert set(result["files"]) == {path.name for path in out.glob("*.onnx*")}
    assert set(result["sha256"]) == {path.name for path in out.iterdir()} - {"onnx.json", "README.md"}
    carried = {path.name for path in source.iterdir() if path.suffix in (".json", ".jinja")}
    assert {path.name for path in out.iterdir()} == carried | set(result["files"]) | {"onnx.json", "README.md"}
    text = (out / "README.md").read_text()
    assert "decoder (step): logits" in text and "Its speed has not been measured yet" in text
    assert main(["card", str(out)]) == 0 and (out / "README.md").read_text() == text


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_standalone_example(dtype, exported, tmp_path, capsys, monkeypatch):
    source, folder = exported("llava")
    if dtype != "float32":
        monkeypatch.setattr(pipeline, "validate", here)
        whole, folder = folder, export(source, tmp_path / "onnx", ExportOptions(dtype=dtype))
        sizes = [sum(path.stat().st_size for path in place.glob("*.data")) for place in (folder, whole)]
        assert sizes[0] < 0.6 * sizes[1]
    from fixtures.checkpoints import picture
    from PIL import Image

    image, processor = picture(tmp_path / "a.png"), load_processor(folder)
    monkeypatch.setattr(sys, "argv", ["onnx_standalone.py", str(folder), str(image), "what color is the digit?"])
    runpy.run_path(str(ROOT / "examples" / "onnx_standalone.py"), run_name="__main__")
    said = capsys.readouterr().out.strip()
    parts = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "what color is the digit?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "np"}
    given = processor.apply_chat_template([{"role": "user", "content": parts}], **options)
    tokens = exporter.onnx.load(folder).generate(**given, max_new_tokens=64)[0, given["input_ids"].shape[1] :]
    assert said == processor.decode(tokens, skip_special_tokens=True).strip() and said


# --- what the host computes, against transformers ---------------------------------------------------------------------

IMAGE_SIZES = [(640, 480), (100, 900), (333, 517), (1200, 1190), (24, 24), (2000, 500)]  # height, width


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_tiles_are_put_together_as_transformers_does(size):
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008], [1680, 1680]]
    grid = best_grid(size, {"pinpoints": pinpoints, "tile": 336})
    assert grid == tuple(side // 336 for side in select_best_resolution(size, pinpoints))
    features = torch.randn(5, grid[0] * 24, grid[1] * 24)
    index = np.arange(features[0].numel()).reshape(features.shape[1:])
    kept = unpad_image(features, size)
    assert torch.equal(features.flatten(1)[:, unpadded(index, size)], kept)


@pytest.mark.parametrize(("rows", "columns"), [(50, 61), (24, 24), (120, 17), (33, 72)])
def test_features_are_shrunk_as_torch_interpolates(rows, columns):
    features = torch.randn(5, rows, columns)
    index, weight = shrunk(np.arange(rows * columns).reshape(rows, columns), 8, 9)
    found = (features.flatten(1)[:, index] * torch.from_numpy(weight)).sum(-1)
    ratio = (rows * columns / (9 * 64)) ** 0.5
    size = [int(rows // ratio), int(columns // ratio)] if ratio > 1.1 else [rows, columns]
    expected = torch.nn.functional.interpolate(features[None], size, mode="bilinear")[0]
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", [(1, 8, 12), (1, 10, 6), (1, 2, 26), (1, 14, 14)])
def test_windows_and_positions_of_patches(grid):
    """Ragged windows too: transformers' own export is silently wrong for them."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    rows, columns = grid[1:]
    given = {"image_grid_thw": np.array([grid]), "pixel_values": np.zeros((rows * columns, 3))}
    feed = prepare_module().patches({"merge": 2, "window": 2}, given)[0]
    table = torch.tensor([grid])
    assert np.array_equal(feed["patch_positions"], get_vision_position_ids(table, 2))
    index, ends = get_vision_window_index(table, spatial_merge_size=2, window_size=20, patch_size=5)
    numbers = feed["patch_window"].reshape(-1, 4)
    assert (numbers == numbers[:, :1]).all()
    ends = torch.unique_consecutive(ends).tolist()
    index = index.numpy()
    windows = [set(numbers[index[a // 4 : b // 4], 0].tolist()) for a, b in itertools.pairwise(ends)]
    assert all(len(window) == 1 for window in windows)
    assert len(set.union(*windows)) == len(windows)


def prepare_module():
    return importlib.import_module("exporter.onnx.runtime.prepare")


def test_three_positions_are_those_of_transformers(tiny):
    folder = tiny("qwen2_5_vl")
    model, processor = torch_model(folder), load_processor(folder)
    batch = inputs(processor, batch=3, images=[2, 0, 1])
    expected, delta = model.model.get_rope_index(**{k: v for k, v in batch.items() if k != "pixel_values"})
    manifest = {"mrope": True, "vision": {"merge": 2}, "image_token_id": model.config.image_token_id}
    rows = [row[mask.bool()].numpy() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    found = prepare_module().sequence_positions(manifest, rows, batch["image_grid_thw"].numpy())
    for row, positions in enumerate(found):
        real = batch["attention_mask"][row].bool()
        assert np.array_equal(positions, expected[:, row, real])
        assert positions.max() + 1 == len(rows[row]) + delta[row]


def test_sampling_is_that_of_transformers():
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(0)
    logits, seen = 4 * torch.randn(3, 40), torch.randint(40, (3, 9))
    chain = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)]
    expected = LogitsProcessorList(chain)(seen, logits).softmax(-1)
    sampling = Sampling(do_sample=True, temperature=0.7, top_k=12, top_p=0.8)
    np.testing.assert_allclose(sampling._probabilities(logits.double().numpy()), expected, atol=1e-6)
    penalised = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits).argmax(-1)
    greedy = Sampling(repetition_penalty=1.7).pick(logits.numpy(), seen.numpy(), np.random.default_rng(0))
    assert np.array_equal(greedy, penalised)


def test_sampling_is_seeded_and_stops(exported):
    _, folder = exported("llava")
    model, given = exporter.onnx.load(folder), inputs(load_processor(folder), batch=2)
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8, "eos_token_id": ()}
    first, again, other = (model.generate(seed=seed, **given, **options) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    length = given["input_ids"].shape[1]
    greedy = model.generate(**given, max_new_tokens=8, eos_token_id=())[:, length:]
    stop = int(greedy[0, 2])
    stopped = model.generate(**given, max_new_tokens=8, eos_token_id=stop, pad_token_id=0)[:, length:]
    for row, whole in zip(stopped, greedy, strict=True):
        end = whole.tolist().index(stop) + 1 if stop in whole else 8
        assert row.tolist() == (whole[:end].tolist() + [0] * 8)[: len(row)]


# --- what is refused, and how -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, r"opset 17 can't be written: 18 to \d+ can"),
        ({"opset": 999}, r"opset 999 can't be written"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' is not exported to ONNX: auto, float32, float16"),
        ({"quantize": "int3"}, "quantize 'int3' is not known: int8, int4"),
        ({"device": "cuda"}, r"onnxruntime 1\.\d+\.\d+ has no CUDAExecutionProvider: .* pip install onnxruntime-gpu"),
        ({"device": "tpu"}, "device 'tpu' is not known: cpu, cuda"),
    ],
)
def test_bad_options(options, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        export(tiny("llava"), tmp_path / "out", ExportOptions(**options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named(package, tiny, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else real(name, *more))
    with pytest.raises(InputError, match=rf"{package} is not installed.+pip install lvlm-exporter\[onnx\]"):
        export(tiny("llava"), tmp_path / "out")


def test_the_runner_says_that_onnxruntime_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="onnxruntime is not installed: pip install onnxruntime"):
        check_provider("cpu")


def test_too_little_disk(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs 0\.00 GB, its disk has 0\.00 GB free"):
        export(tiny("llava"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.clean_process
def test_a_checkpoint_that_does_not_verify(tiny, tmp_path, questions, capsys, unverified):
    recipe = recipe_from_data({"model": str(tiny("llava")), "calibration": {"data": str(questions)}, "layers": [3]})
    small = exporter.compress(recipe, tmp_path / "small")
    record = json.loads((small / "compression.json").read_text())
    record["reference"]["tokens"][0] += 1
    (small / "compression.json").write_text(json.dumps(record))
    assert main(["onnx", str(small), "--out", str(tmp_path / "out")]) == 2
    assert "small does not verify and is not exported: token 1 of the reference answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_videos_are_refused(tiny, tmp_path, clips):
    with pytest.raises(InputError, match="ONNX graphs take images and no videos: name questions about images"):
        export(tiny("qwen2_vl"), tmp_path / "out", ExportOptions(calibration=str(clips), samples=2))
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_stays(tiny, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match="exists already"):
        export(tiny("llava"), tmp_path)


def spoil(folder: Path, how: str) -> None:
    manifest = json.loads((folder / "onnx.json").read_text())
    match how:
        case "none":
            (folder / "onnx.json").unlink()
        case "damaged":
            (folder / "onnx.json").write_text("{")
        case "format":
            (folder / "onnx.json").write_text(json.dumps(manifest | {"format": 99}))
        case "short":
            (folder / "decoder.onnx.data").write_bytes(b"")
        case "missing":
            (folder / "vision.onnx").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("none", "has no onnx.json: it is no folder that `lvlm-exporter onnx` wrote"),
        ("damaged", "onnx.json is damaged"),
        ("format", "has format 99, this version reads 3: export again"),
        ("short", r"decoder.onnx.data is 0 bytes instead of \d+ bytes: the folder is incomplete"),
        ("missing", r"vision.onnx is not there instead of \d+ bytes"),
    ],
)
def test_a_damaged_folder_is_not_loaded(how, message, exported, tmp_path):
    copy = shutil.copytree(exported("llava")[1], tmp_path / "copy")
    spoil(copy, how)
    with pytest.raises(InputError, match=message):
        exporter.onnx.load(copy)


def test_cuda_is_never_replaced_by_the_cpu(exported, tmp_path):
    copy = shutil.copytree(exported("llava")[1], tmp_path / "copy")
    with pytest.raises(InputError, match=r"was exported for cpu: .* Export again with --device cuda"):
        exporter.onnx.load(copy, device="cuda")
    manifest = json.loads((copy / "onnx.json").read_text())
    (copy / "onnx.json").write_text(json.dumps(manifest | {"device": "cuda"}))
    with pytest.raises(InputError, match="has no CUDAExecutionProvider"):
        exporter.onnx.load(copy)


def test_questions_that_the_graphs_have_no_inputs_for(exported):
    _, folder = exported("llava")
    model, given = exporter.onnx.load(folder), inputs(load_processor(folder))
    ids = given["input_ids"]
    cases = [
        ({**given, "pixel_values_videos": ids}, "input 'pixel_values_videos' has no place in this model's graphs"),
        ({**given, "attention_mask": ids[:, :3]}, "must be \\[sequences, tokens\\]"),
        ({"input_ids": ids}, r"the prompt has 25 image tokens, its images make 0 features"),
        ({"max_new_tokens": 3}, "generate needs input_ids"),
        ({**given, "beams": 3}, "generate takes no 'beams'"),
        ({**given, "num_beams": 3}, "num_beams=3 is not implemented here: pass num_beams=1"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            model.generate(**options)


def test_images_that_a_kind_can_not_take():
    module = prepare_module()
    padded = {"pixel_values": np.ones((1, 2, 3, 4, 4)), "pixel_attention_mask": np.zeros((1, 2, 4, 4))}
    with pytest.raises(InputError, match="padded within its tile"):
        module.real_tiles({}, padded)
    video = {"pixel_values": np.ones((8, 3)), "image_grid_thw": np.array([[2, 2, 2]])}
    with pytest.raises(InputError, match="says 2 frames: videos are not exported"):
        module.patches({"merge": 2, "window": 0}, video)
    with pytest.raises(InputError, match="more images in the prompt than in image_grid_thw"):
        module._three_positions(np.array([True]), [], 2)


def test_a_text_without_images(exported):
    source, folder = exported("llava")
    given = inputs(load_processor(folder), batch=2, images=0)
    expected = generate(torch_model(source), given, new_tokens=6).sequences
    assert np.array_equal(exporter.onnx.load(folder).generate(**given, max_new_tokens=6, eos_token_id=()), expected)


@pytest.mark.clean_process
def test_the_runner_runs_without_torch(exported):
    """The runner, loaded by its path, in a process in which neither torch nor this package can be imported."""
    _, folder = exported("llava")
    script = (
        "import sys, importlib.util\n"
        "for name in ('torch', 'transformers', 'exporter'): sys.modules[name] = None\n"
        "path = sys.argv[1]\n"
        "spec = importlib.util.spec_from_file_location('runtime', path + '/__init__.py',"
        " submodule_search_locations=[path])\n"
        "runtime = sys.modules['runtime'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(runtime)\n"
        "import numpy as np\n"
        "print(runtime.load(sys.argv[2]).generate(input_ids=np.array([[5, 6, 7]]), max_new_tokens=4).shape)\n"
    )
    runtime = Path(prepare.__code__.co_filename).parent
    command = [sys.executable, "-P", "-c", script, str(runtime), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert ran.stdout.strip() in ("(1, 7)", "(1, 6)", "(1, 5)", "(1, 4)"), ran.stderr


# --- speed ------------------------------------------------------------------------------------------------------------

SMALL = Workload(visual_tokens=25, text_tokens=24)


def quickly(module, **options):
    """torch.compile without its code generator, which takes a minute."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **options)


def test_bench_runs_the_checkpoint_in_all_ways_beside_its_onnx_folder(exported, monkeypatch, tmp_path, capsys):
    """sdpa is the reference; weights are shared; operations and bytes agree between the runtimes; the card tells."""
    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    source, made = exported("llava")
    folder = shutil.copytree(made, tmp_path / "onnx")
    arguments = ["bench", folder, "--visual-tokens", "25", "--text-tokens", "24", "--rounds", "2", "--new-tokens", "2",
                 "--batch", "1,2", "--json", tmp_path / "out.json"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    printed, card = capsys.readouterr().out, (folder / "README.md").read_text()
    models = json.loads((tmp_path / "out.json").read_text())["models"]
    ways = [
        "torch, sdpa, float32",
        "torch, eager, float32",
        "torch, sdpa, float32, compiled",
        "ONNX Runtime, cpu, float32",
    ]
    assert [model["runtime"] for model in models] == ways
    assert [Path(model["path"]) for model in models] == [source] * 3 + [folder]
    for way, model in zip(ways, models, strict=True):
        assert f"[{way}]" in printed and f": {way} |" in card and f"| {model['prefill_ms']:.1f} |" in card
        for name in ("flops", "decode_flops", "kv_bytes", "kv_bytes_formula", "step_bytes"):
            assert model[name] == pytest.approx(models[0][name], rel=0.02), name
    assert models[3]["ratio_to_reference"]["flops"] == pytest.approx(1, abs=1e-3)


def test_onnx_folders_are_compared_with_each_other(exported, tmp_path):
    """Neither torch nor the checkpoint is asked; what the records say is replaced by the same measurement."""
    _, folder = exported("llava")
    small = shutil.copytree(folder, tmp_path / "small")
    for _ in range(2):
        done = exporter.bench([small], reference=folder, workload=SMALL, options=BenchOptions(new_tokens=2, rounds=2))
    assert [model.runtime for model in done.models] == ["ONNX Runtime, cpu, float32"] * 2
    done.check_caches()
    (entry,) = json.loads((small / "onnx.json").read_text())["benchmarks"]
    assert [Path(model["path"]) for model in entry["models"]] == [folder, small]
    assert exporter.onnx.load(small)  # the record is still one
    assert "benchmarks" not in json.loads((folder / "onnx.json").read_text())  # the reference's is left alone
    exporter.bench([small], reference=small, workload=SMALL, options=BenchOptions(new_tokens=2, rounds=2))
    itself = json.loads((small / "onnx.json").read_text())["benchmarks"][-1]["models"]
    assert [model["ratio_to_reference"] is None for model in itself] == [True, False]


def test_what_bench_can_not_do_with_onnx_folders(exported, tmp_path):
    _, made = exported("llava")
    folder = shutil.copytree(made, tmp_path / "onnx")
    quick = BenchOptions(new_tokens=1, rounds=2)
    with pytest.raises(InputError, match="no router here, so nothing can run under"):
        exporter.bench([folder], reference=folder, budgets=[{"preset": "fast"}], options=quick)
    manifest = json.loads((folder / "onnx.json").read_text())
    manifest["source"]["name"] = str(tmp_path / "gone")
    manifest |= {"device": "cuda", "cache": "growing"}
    (folder / "onnx.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was exported for cuda: its operators are fused"):
        exporter.bench([made], reference=folder, options=quick)
    manifest |= {"device": "cpu", "cache": "shared"}
    (folder / "onnx.json").write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=r"gone, which it was exported from, but that cannot be .*Name a checkpoint or an ONNX"
    ):
        exporter.bench([folder], options=quick)
