"""A search for a model's decoder layers; and a run of it on text alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

WANT_PICTURES: set[type] = set()  # classes whose pass failed on text alone
NORMS = ("norm", "final_layernorm", "final_norm", "layer_norm", "ln_f", "norm_f")  # behind the last layer
DIVIDED = ("granite_docling", "granite4_vision")  # types that divide logits; others with such a language model do not
BOUNDED = ("muse_glimmer", "muse_spark")  # types that multiply logits and bound them
INNER = ("model", "decoder", "language_model")  # where a head wraps the stack


class NoStack(ValueError):  # noqa: N818 - what was found, and no fault
    """There is no single stack of decoder layers; the message is a sentence that says what there is."""


def find_decoder(model: Any) -> Any:
    """Return the module whose `layers` are the decoder layers.

    Raises: NoStack with what was found in its place.
    """
    decoder = model.get_decoder()
    if is_encoder_decoder(model):
        raise NoStack("it is an encoder and a decoder, whose layers attend to each other")
    for _ in range(4):
        if isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            return decoder
        deeper = decoder.get_decoder() if hasattr(decoder, "get_decoder") else None
        if deeper is None or deeper is decoder:
            deeper = next((getattr(decoder, name) for name in INNER if hasattr(decoder, name)), None)
        if deeper is None:
            break
        decoder = deeper
    raise NoStack(f"get_decoder() leads to {type(decoder).__name__}, which has no list of layers")


def final_norm(model: Any) -> Any:
    """Return the norm behind the last decoder layer. Raises: NoStack where there is none by a known name."""
    decoder = find_decoder(model)
    norm = next((getattr(decoder, name) for name in NORMS if hasattr(decoder, name)), None)
    if norm is None:
        raise NoStack(f"{type(decoder).__name__} has no norm behind its layers by the name of {', '.join(NORMS)}")
    return norm


def head_logits(model: Any, output: Tensor) -> Tensor:
    """Return the logits of what the last decoder layer puts out, [..., D] to [..., vocabulary]."""
    return logits_of(model, final_norm(model)(output))


def logits_of(model: Any, states: Tensor) -> Tensor:
    """Return the logits of states behind the last norm, [..., D] to [..., vocabulary]."""
    logits: Tensor = model.get_output_embeddings()(states)
    text, model_type = model.config.get_text_config(), model.config.model_type
    if scale := getattr(model, "logit_scale", None):
        logits = logits * scale
    if model_type in DIVIDED:
        logits = logits / text.logits_scaling
    if model_type in BOUNDED:
        bound = text.final_logit_softcapping
        logits = torch.tanh(logits * text.output_multiplier / bound) * bound
    return logits


def is_encoder_decoder(model: Any) -> bool:
    """Tell whether text is written by a decoder that attends to an encoder."""
    text = model.config.get_text_config()
    return bool(getattr(model.config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False))


def stack_path(model: Any) -> str:
    """Return the dotted name of the list of decoder layers inside the model, 'model.language_model.layers' for one."""
    layers = find_decoder(model).layers
    path: str = next(name for name, module in model.named_modules() if module is layers)
    return path


def check_stack(model: Any) -> Any:
    """Return the decoder, whose layers are as many as its configuration says. Raises NoStack."""
    decoder = find_decoder(model)
    stated = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if stated != len(decoder.layers):
        raise NoStack(f"its configuration says {stated} decoder layers, and {len(decoder.layers)} are built")
    return decoder


def build(config: Any, seed: int = 0) -> Any:
    """Build the model of a (tiny) configuration with random weights under which every layer and bias counts."""
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False).float()
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:  # norms start at 1 (or at 0), biases at 0
                parameter += 0.1 * noise
            elif "embed" not in name or parameter.ndim != 2:
                fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
                parameter.copy_(max(fan_in, 1) ** -0.5 * noise)
    return model


def token_inputs(config: Any, length: int = 14, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Return token ids without any that a configuration names: plain text."""
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    most = int(getattr(text, "vocab_size", 0) or 300)
    ids = torch.randint(most // 2, most - 40, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run_text(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """Return the logits [B, S, V] of a run on text alone, by the decoder itself where the model wants a picture."""
    accepted = inspect.signature(model.forward).parameters
    options = {name: value for name, value in more.items() if name in accepted or "kwargs" in accepted}
    with torch.no_grad():
        if takes_text_alone(model):
            try:
                out: Tensor = model(**inputs, **options).logits
                return out
            except (TypeError, ValueError, AttributeError):
                WANT_PICTURES.add(type(model))
        hidden = find_decoder(model)(**inputs, use_cache=False).last_hidden_state
        through_head: Tensor = model.get_output_embeddings()(hidden)
        return through_head


def takes_text_alone(model: Any) -> bool:
    """Tell whether the model runs without pixels, as far as is known: a run that fails shows that it does not."""
    parameter = inspect.signature(model.forward).parameters.get("pixel_values")
    optional = parameter is None or parameter.default is not inspect.Parameter.empty
    return optional and type(model) not in WANT_PICTURES
