"""A trial of a model type on a small random model: a folder as on the hub, cut, loaded, compared.

Every statement is the outcome of a run. What does not hold is a sentence that says what was tried.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.source import Source, open_weights_only
from ..checkpoints.writer import write_checkpoint
from ..errors import InputError
from ..families import DECODERS, is_listed, protected_layers
from ..models.capture import on_output
from ..models.replay import Trace, last_output, switched_off, walk
from ..models.variants import Variant, assembled
from ..onnx.rows import SUPPORTED
from ..onnx.trial import why_not_exported
from ..plan import PruningPlan, make_plan
from ..probe.opened import written_by
from ..probe.routed import as_routed, tried
from ..probe.stack import NoStack, build, check_stack, find_decoder, run_text, takes_text_alone, token_inputs
from ..probe.tiny_config import tiny_config

LAYERS = 12
ROUTED_LAYERS = 6  # of what is run routed, many times
AS_PUBLISHED: dict[str, dict[str, Any]] = {  # what all checkpoints of a type have, and its default configuration lacks
    "lfm2_vl": {"text_config": {"model_type": "lfm2", "full_attn_idxs": [2, 5, 8, 10, 12, 14]}},
    "minimax_m3_vl": {"text_config": {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57}},
}
CLOSE = 2e-4  # of logits, relative to the largest
NEW_TOKENS = 4


class Failed(Exception):  # noqa: N818 - what was found
    """Something that was tried did not hold; the message is a clause that says what."""


@dataclass
class TypeFindings:
    """The findings for one model type: None where a thing works, or the reason why it does not."""

    model_type: str
    layers: tuple[str, ...] = ()  # the kinds of layers: classes, and layer_types where they differ
    compress: str | None = None
    localize: str | None = None
    fold: str | None = None
    route: str | None = None
    onnx: str | None = None
    protected: tuple[int, ...] = ()
    listed: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def off(self, reason: str) -> TypeFindings:
        """Note that nothing works, for one reason."""
        self.compress = self.localize = self.fold = self.route = self.onnx = reason
        return self


def try_type(model_type: str, layers: int = LAYERS) -> TypeFindings:
    """Build a small model of a type and try everything on it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    findings = TypeFindings(model_type)
    try:
        config = tiny_config(CONFIG_MAPPING[model_type](), layers)
        model = build(config)
    except Exception as error:  # settings that no default goes with, a package that is missing
        return findings.off(f"no small model of its default configuration is built: {first_line(error)}")
    return try_model(model, findings)


def try_model(model: Any, findings: TypeFindings) -> TypeFindings:
    """Try everything on a small model."""
    try:
        check_stack(model)
    except NoStack as error:
        return findings.off(str(error))
    findings.layers, findings.listed = kinds(model), is_listed(model.config)
    findings.compress = outcome(lambda: try_compress(model, findings))
    findings.localize = findings.compress or outcome(lambda: try_replay(model))
    findings.fold = findings.localize or why_no_fold(model)
    findings.route = findings.compress or why_no_route(findings)
    findings.onnx = findings.compress or why_no_onnx(findings)
    return findings


def why_no_fold(model: Any) -> str | None:
    """Return why no fold is exact; None where one is, as reconstruction is below norms that the table names."""
    row = DECODERS.get(model.config.get_text_config().model_type)
    return None if row is not None and row.post_norm else written_by(model).unfoldable


def why_no_onnx(findings: TypeFindings) -> str | None:
    """Return why a small model of a type's checkpoints is not exported to ONNX, None if it is; rows are tested."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if findings.listed and findings.model_type in SUPPORTED:
        return None
    return why_not_exported(CONFIG_MAPPING[findings.model_type](**AS_PUBLISHED.get(findings.model_type, {})))


def why_no_route(findings: TypeFindings) -> str | None:
    """Return why a small model of a type's checkpoints does not route, None if it does; the tables' types do."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if findings.listed:
        return None
    config = CONFIG_MAPPING[findings.model_type](**AS_PUBLISHED.get(findings.model_type, {}))
    trial = tried(findings.model_type, json.dumps(config.to_dict(), sort_keys=True, default=str), ROUTED_LAYERS)
    findings.details["routed_with_picture"] = trial.with_picture
    return trial.reason or outcome(lambda: try_names(build(tiny_config(config, 2))))


def try_names(model: Any) -> None:
    """Save a small model, routed, and load it by its routed class: names on disk are the hub's, weights the same."""
    routed = as_routed(copy.deepcopy(model))
    with tempfile.TemporaryDirectory(prefix="lvlm-exporter-trial-") as name:
        stock, saved = Path(name) / "stock", Path(name) / "routed"
        model.save_pretrained(stock)
        routed.save_pretrained(saved)
        again = type(routed).from_pretrained(saved)
        names = [
            {tensor for path in folder.glob("*.safetensors") for tensor in safe_names(path)}
            for folder in (stock, saved)
        ]
    if names[0] != names[1]:
        raise Failed("routed, it is saved under other names than the hub's")
    for parameter, (name, expected) in zip(again.parameters(), routed.named_parameters(), strict=True):
        if not torch.equal(parameter, expected):
            raise Failed(f"routed, it is loaded with another {name} than was saved")


def outcome(attempt: Callable[[], object]) -> str | None:
    """Return why an attempt does not hold, None where it does."""
    try:
        attempt()
    except (Failed, InputError) as error:
        return str(error).rstrip(".")
    except Exception as error:  # whatever a model's code makes of fewer layers
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def kinds(model: Any) -> tuple[str, ...]:
    """Return the kinds of decoder layers that there are, in order of appearance."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    layers = find_decoder(model).layers
    names = [type(layer).__name__ for layer in layers]
    if types and len(types) == len(layers):
        names = [f"{name} ({kind})" for name, kind in zip(names, types, strict=True)]
    return tuple(dict.fromkeys(names))


# --- compress ---------------------------------------------------------------------------------------------------------


def try_compress(model: Any, findings: TypeFindings) -> None:
    """Write the model as on the hub, cut it by nothing and by some layers, and compare what transformers loads."""
    with tempfile.TemporaryDirectory(prefix="lvlm-exporter-trial-") as name:
        folder = Path(name)
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder / "whole")
        source = open_weights_only(folder / "whole")
        findings.protected = protected_layers(source.config)
        uncut = written(source, make_plan(source.num_layers, ()), folder / "uncut")
        for before, after in zip(source.weights.shards, sorted(uncut.glob("*.safetensors")), strict=True):
            if sorted(tensors(before.path)) != sorted(tensors(after)):
                raise Failed("cut by nothing, it is written with other bytes")
        inputs = token_inputs(model.config)
        whole = run_text(load(folder / "whole"), inputs, use_cache=False)
        if not torch.equal(run_text(load(uncut), inputs, use_cache=False), whole):
            raise Failed("cut by nothing, it gives other logits")
        plan = plan_for(source, findings.protected)
        smaller = load(written(source, plan, folder / "cut"))
        with assembled(model, Variant(plan)):
            expected = run_text(model, inputs, use_cache=False)
        same(run_text(smaller, inputs, use_cache=False), expected, f"without layers {list(plan.drop)}, as written")
        if bool(torch.isclose(expected, whole, rtol=1e-3, atol=1e-4).all()):
            raise Failed("a layer less changes nothing: its layers are not what its logits come from")
        if (
            takes_text_alone(smaller)
            and (gap := cache_gap(smaller, inputs)) > CLOSE
            and cache_gap(model, inputs) <= CLOSE
        ):
            raise Failed(f"with a cache the smaller model says tokens that are {gap:.1e} below the best without")


def plan_for(source: Source, protected: tuple[int, ...]) -> PruningPlan:
    """Choose two layers that may go, not side by side: one of every kind where there are two kinds."""
    free = [layer for layer in range(source.num_layers) if layer not in protected]
    types = getattr(source.config.get_text_config(), "layer_types", None) or [""] * source.num_layers
    if len(free) < 3:
        raise Failed(f"all but {len(free)} of its {source.num_layers} layers are leaned on by others")
    first = free[1]
    other = next(
        (layer for layer in reversed(free) if types[layer] != types[first] and abs(layer - first) > 1), free[-1]
    )
    return make_plan(source.num_layers, sorted({first, other}))


def written(source: Source, plan: PruningPlan, folder: Path) -> Path:
    folder.mkdir()
    write_checkpoint(source, plan, {}, folder)
    return folder


def tensors(path: Path) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Read every tensor of a safetensors file with its bytes."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        stored = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118 - no mapping
    return [(n, str(t.dtype), tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in stored]


def safe_names(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def load(folder: Path) -> Any:
    """Load as anyone does, and refuse what transformers has to fill in."""
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise Failed(f"{len(names)} {kind.replace('_', ' ')} when it is loaded, {names[0]} among them")
    return model.eval()


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    difference = float((actual - expected).abs().max() / expected.abs().max())
    if not difference <= CLOSE:
        raise Failed(
            f"{what}, its logits differ by {difference:.1e} from those of the model that the layers were cut from"
        )


def cache_gap(model: Any, inputs: dict[str, Tensor]) -> float:
    """Return how far the tokens said with a cache are below the best without, relative to the largest logit.

    PaliGemma's prompt sees itself both ways, which a longer prompt without its token types does not repeat.
    """
    try:
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    except Exception as error:
        raise Failed(f"it can't generate: {first_line(error)}") from error
    logits = run_text(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, use_cache=False)
    length = inputs["input_ids"].shape[1]
    chosen = logits[:, length - 1 : -1].gather(-1, tokens[:, length:, None])[..., 0]
    return float(((logits[:, length - 1 : -1].amax(-1) - chosen) / logits.abs().max()).max())


# --- localize ---------------------------------------------------------------------------------------------------------


def try_replay(model: Any) -> None:
    """Run the layers one at a time, as localizers and folds do, and compare with the model's own pass."""
    inputs = token_inputs(model.config)
    layers = list(find_decoder(model).layers)
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    with torch.no_grad(), switched_off(layers, calls):
        run_text(model, inputs, use_cache=False)
    if len(calls) != len(layers):
        raise Failed(
            f"on text alone {len(calls)} of its {len(layers)} layers run (others attend to a picture, or loop)"
        )
    outputs: list[Any] = []
    with torch.no_grad(), on_output(layers[-1], outputs.append):
        run_text(model, inputs, use_cache=False)
    last = [output[0] if isinstance(output, tuple) else output for output in outputs]
    traced = Trace(calls[0][0], tuple(keywords for _, keywords in calls))
    try:
        replayed = last_output(walk(layers, traced), traced.entry)
    except Exception as error:  # a layer that misses what the one before hands on
        raise Failed(f"its layers can't be run one at a time: {first_line(error)}") from error
    difference = float((replayed - last[0]).abs().max() / last[0].abs().max())
    if not difference <= CLOSE:
        raise Failed(f"its layers hand on more than the hidden state: run one at a time they are {difference:.1e} off")
