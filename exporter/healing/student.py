"""The smaller model as it learns: low-rank updates (LoRA, arXiv 2106.09685; PEFT's) on its decoder's linear maps.

Everything but the decoder is run without gradients, once a batch. The decoder's layers are then run one by one; where
what they keep for their gradients would be large, each is run a second time instead.

Shapes: B questions, S tokens, A answer tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..checkpoints.source import Source
from ..data.batches import make_batch
from ..data.samples import Sample
from ..errors import InputError
from ..models.answers import AnsweredBatch, with_answers
from ..models.last_state import last_state
from ..models.loading import text_decoder
from ..models.replay import trace
from ..probe.stack import head_logits
from .adapter import SCALING

NORMS = (  # how the names of norms end, those of Qwen-VL and mPLUG-Owl2 among them
    "norm.weight", "ln_1.weight", "ln_2.weight", "multiway.0.weight", "multiway.1.weight",
)  # fmt: skip
MISSING = "healing learns low-rank updates with PEFT, which is not installed: pip install 'lvlm-exporter[heal]'."


def require_peft() -> Any:
    """Return the module `peft`. Raises: InputError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise InputError(MISSING) from error
    return peft


@dataclass(frozen=True)
class Student:
    """A model whose decoder layers have low-rank updates, in place."""

    model: Any
    processor: Any
    adapted: dict[str, Any]  # PEFT's module, by the name of the linear map: 'layers.3.mlp.down_proj'
    norms: dict[str, nn.Parameter]  # by name

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return everything that is learnt, by name."""
        learnt: dict[str, nn.Parameter] = {}
        for name, module in self.adapted.items():
            learnt[f"{name}.lora_A"] = module.lora_A["default"].weight  # [R, inputs]
            learnt[f"{name}.lora_B"] = module.lora_B["default"].weight  # [outputs, R]
        return learnt | self.norms

    def log_q(self, answered: AnsweredBatch) -> Tensor:
        """Return log-probabilities where an answer token is predicted, [A of the batch, V], with their gradients."""
        traced = trace(self.model, answered.batch, torch.no_grad)
        output = last_state(self.model, traced, traced.entry)
        log_q: Tensor = head_logits(self.model, output[answered.predicts]).float().log_softmax(-1)
        return log_q

    def merge(self, tensors: Mapping[tuple[int, str], Callable[[], Tensor]]) -> None:
        """Put merged tensors in the place of updates and norms: the model is a plain one again, as it is written."""
        decoder = text_decoder(self.model)
        for name, module in self.adapted.items():
            plain, (path, _, last) = module.get_base_layer(), name.rpartition(".")
            setattr(decoder.get_submodule(path), last, plain)
        for (layer, name), make in tensors.items():
            parameter = decoder.layers[layer].get_parameter(name)
            parameter.data.copy_(make())
        self.model.requires_grad_(False)

    def batch(self, samples: list[Sample], answers: tuple[Tensor, ...]) -> AnsweredBatch:
        """Return questions with the original's answers [A] appended."""
        device = self.model.device
        lengths = torch.tensor([len(tokens) for tokens in answers])
        tokens = pad_sequence(list(answers), batch_first=True).to(device)
        real = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(device)
        prompts = make_batch(samples, self.processor, self.model.config).to(device)
        return with_answers(self.model, prompts, tokens, real)


def prepared(model: Any, processor: Any, source: Source, rank: int, norms: bool, seed: int) -> Student:
    """Give the decoder's linear maps low-rank updates that are nothing yet. The model is changed in place.

    Only maps that the checkpoint stores under their own names are taken: the result must be the same tensors.
    """
    peft = require_peft()
    decoder = text_decoder(model)
    if norms and model.dtype != torch.float32:
        raise InputError(
            f"heal: norms are trained in float32 only, since {model.dtype} loses small steps: use --dtype float32."
        )
    names = list(linear_maps(decoder, source))
    if not names:
        raise InputError(
            f"{source.name} stores none of its decoder layers' linear maps as a matrix of its own: it can't be healed."
        )
    torch.manual_seed(seed)
    path = next(name for name, module in decoder.named_modules() if module is decoder.layers)  # 'h' in Qwen-VL
    maps = [path + name.removeprefix("layers") for name in names]
    config = peft.LoraConfig(r=rank, lora_alpha=round(SCALING * rank), target_modules=maps, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, decoder)
    adapted = {name: decoder.get_submodule(name) for name in names}
    for module in adapted.values():  # steps are lost in the rounding of half precision; PEFT casts what comes and goes
        module.lora_A["default"].float()
        module.lora_B["default"].float()
    learnt: dict[str, nn.Parameter] = {}
    for name, parameter in decoder.layers.named_parameters(prefix="layers"):
        if norms and parameter.ndim == 1 and name.endswith(NORMS) and _stored(source, name, parameter):
            learnt[name] = parameter.requires_grad_()
    return Student(model, processor, adapted, learnt)


def linear_maps(decoder: Any, source: Source) -> Iterator[str]:
    """Yield the names of the linear maps in decoder layers, 'layers.3.mlp.down_proj', that are stored as they are."""
    for name, module in decoder.layers.named_modules(prefix="layers"):
        if type(module) is nn.Linear and _stored(source, f"{name}.weight", module.weight):
            yield name


def _stored(source: Source, name: str, parameter: Tensor) -> bool:
    """Tell whether a parameter lies in the checkpoint under its own name, in its own shape."""
    entry = source.weights.entries.get(source.layer_prefix + name.removeprefix("layers."))
    return entry is not None and entry.shape == tuple(parameter.shape)
