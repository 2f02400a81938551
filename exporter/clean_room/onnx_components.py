"""Compare each component of an ONNX folder with torch's: image features, embeddings, logits, cache, routes, answers.

Shapes: B sequences, S tokens of the prompt, N new tokens, V vocabulary, F image features, D hidden size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from .reference import first_difference

NEW_TOKENS = 8
IMAGE_INPUTS = (
    *("pixel_values", "image_sizes", "pixel_attention_mask", "batch_num_images"),
    *("image_grid_thw", "grid_thw", "grid_thws", "image_merge_sizes"),
)


@dataclass
class Difference:
    """The difference of a graph's output from torch's, over all that was compared."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    scale: float = 1.0  # largest magnitude met, at least 1

    def add(self, actual: Any, expected: Any) -> None:
        import numpy as np

        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        if actual.shape != expected.shape:
            raise ValueError(f"shape {actual.shape} instead of {expected.shape}")
        if not actual.size:
            return
        off = np.abs(actual - expected)
        self.largest = max(self.largest, float("inf") if np.isnan(off).any() else float(off.max()))
        self.total, self.count = self.total + float(off.sum()), self.count + off.size
        self.scale = max(self.scale, float(np.abs(expected).max()))

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    def to_data(self) -> dict[str, float]:
        return {"max": self.largest, "mean": self.mean, "scale": self.scale}


def torch_features(model: Any, inputs: dict[str, Any]) -> Any:
    """Return features of all images in the prompt's order: [F, D]"""
    encode = next(holder.get_image_features for holder in (model.base_model, model) if can_encode(holder))
    accepted = inspect.signature(encode).parameters
    image_inputs = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs and name in accepted}
    return features_in_order(encode(**image_inputs))


def can_encode(holder: Any) -> bool:
    return hasattr(holder, "get_image_features")


def features_in_order(encoded: Any) -> Any:
    """Return what `get_image_features` gives as [F, D], all pictures in order.

    Sets of features that enter behind decoder layers stand beside the first one: [F, D * (1 + sets)].
    """
    import torch

    def flat(features: Any) -> Any:
        parts = [features] if isinstance(features, torch.Tensor) else features
        flattened = [part.reshape(-1, part.shape[-1]) for part in parts]
        return flattened[0] if len(flattened) == 1 else torch.cat(flattened)

    first = flat(getattr(encoded, "pooler_output", encoded))
    further = [flat(features) for features in getattr(encoded, "deepstack_features", None) or ()]
    return torch.cat([first, *further], -1) if further else first


def compare_parts(
    model: Any, runner: Any, inputs: dict[str, Any], prompt: Any, differences: dict[str, Difference]
) -> None:
    """Compare the image features and the embeddings."""
    from torch.nn import functional

    features = torch_features(model, inputs)
    runner_features = runner.image_features(prompt)
    width = features.shape[-1]  # the layout of transformers.js may mark features in a channel more
    differences["vision: image_features"].add(runner_features.numpy()[:, :width], features)
    ids = inputs["input_ids"]
    visual = ids == runner.manifest["image_token_id"]
    embeds = model.get_input_embeddings()(ids.masked_fill(visual, 0))
    embeds = functional.pad(embeds, (0, width - embeds.shape[-1]))
    embeds = embeds.masked_scatter(visual[..., None], features)
    runner_embeds = runner.embedded(prompt, runner_features).numpy()[..., :width]
    differences["embeddings: inputs_embeds"].add(runner_embeds[prompt.real], embeds[inputs["attention_mask"].bool()])


def compare_decoder(
    runner: Any, inputs: dict[str, Any], prompt: Any, generated: Any, compared: Any, differences: dict[str, Difference]
) -> int:
    """Compare the logits of the prompt and of each step of torch's answer, the best tokens, and the cache at the end.

    Args:
        compared: [B] True: those that are compared.
    """
    length = inputs["input_ids"].shape[1]
    answer = generated.sequences[:, length:].numpy()  # [B, N]
    logits, state = runner.prefill(prompt, NEW_TOKENS)
    equal = 0
    for step in range(NEW_TOKENS):
        expected = generated.logits[step].float().numpy()[compared]  # [b, V]
        chosen = logits[compared]
        name = "decoder (prompt): logits" if step == 0 else "decoder (step): logits"
        differences[name].add(chosen, expected)
        equal += int((chosen.argmax(-1) == expected.argmax(-1)).sum())
        if step + 1 < NEW_TOKENS:
            logits = runner.step(state, answer[:, step])
    if "router" not in runner.manifest:  # behind a router each side lays out what stays in its own way
        compare_cache(runner, state, inputs=inputs, generated=generated, differences=differences)
    return equal


def compare_cache(
    runner: Any, state: Any, inputs: dict[str, Any], generated: Any, differences: dict[str, Difference]
) -> None:
    """Compare keys and values of each layer at the end of an answer, padding left out."""
    import numpy as np

    mask = inputs["attention_mask"].bool().numpy()
    mask = np.concatenate([mask, np.ones((len(mask), NEW_TOKENS - 1), bool)], 1)  # [B, S + N - 1]
    shared = runner.manifest["cache"] == "shared"
    cache = (
        generated.cache if hasattr(generated, "cache") else generated.past_key_values
    )  # since transformers 5.24, before
    for layer_idx, layer in enumerate(cache.layers):
        for part, tensor in (("key", layer.keys), ("value", layer.values)):
            if tensor.shape[2] != mask.shape[1]:
                continue  # a sliding window: torch has forgotten the beginning
            mine = state.cache[f"{layer_idx}.{part}"].numpy()
            real = np.arange(mine.shape[2])[None] < state.lengths[:, None] if shared else mask
            theirs = tensor.float().numpy().swapaxes(1, 2)[mask]
            differences[f"decoder: present.{layer_idx}.{part}"].add(mine.swapaxes(1, 2)[real], theirs)


def compare_answers(model: Any, runner: Any, inputs: dict[str, Any], compared: Any, tolerance: float) -> list[str]:
    """Compare whole answers by each side's own `generate`, with the folder's generation settings, greedily.

    Args:
        compared: [B] True: those that are compared.
    """
    import numpy as np
    import torch

    generated = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    length = inputs["input_ids"].shape[1]
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    tokens = runner.generate(**arrays, max_new_tokens=NEW_TOKENS, do_sample=False)[:, length:]
    expected = generated.sequences[:, length:].numpy()
    scores = torch.stack(generated.scores, 1).float()  # [B, N, V]
    best = scores.topk(2).values
    largest = torch.where(scores.isfinite(), scores.abs(), 0).amax(-1)
    margins = (best[..., 0] - best[..., 1]) / largest
    if tokens.shape != expected.shape and compared.all():
        return [f"{tokens.shape[1]} tokens instead of {expected.shape[1]}"]
    width = min(tokens.shape[1], expected.shape[1])  # sequences that are not compared may go on for longer
    tokens, expected = tokens[:, :width], expected[:, :width]
    problems = []
    for sequence in np.flatnonzero(compared).tolist():
        rest = margins[sequence].nan_to_num(0).tolist()
        at = first_difference(tokens[sequence].tolist(), expected[sequence].tolist(), rest, tolerance)
        if at is not None:
            mine, theirs = tokens[sequence][at], expected[sequence][at]
            problems.append(f"token {at + 1} of question {sequence + 1} is {mine}, not {theirs}")
    return problems if not np.array_equal(tokens[compared], expected[compared]) else []


def compare_routes(
    model: Any, runner: Any, inputs: dict[str, Any], prompt: Any, tolerance: float
) -> tuple[list[str], Any]:
    """Return which visual tokens stay and which layers run, under the budget that both sides have now.

    Returns: problems, and in which sequences both sides go the same way, [B]. Where they don't, and the router's
        logits say that it is all the same within the tolerance, there is no problem, and nothing behind it can be
        compared.
    """
    import numpy as np

    _, state = runner.prefill(prompt, 1)
    theirs = model.route(**inputs)
    mask, problems, same = inputs["attention_mask"].bool(), [], []
    for sequence, real in enumerate(mask):
        tokens, layers = (None if x is None else x[sequence] for x in (theirs.token_logits, theirs.layer_logits))
        visual = theirs.visual[sequence][real].numpy()  # all others stay
        kept = theirs.keep[sequence][real].numpy()
        count = int(state.kept[sequence])
        mine = np.zeros_like(kept)
        mine[np.arange(count) if state.index is None else state.index[sequence, :count]] = True
        among = None if tokens is None else tokens[real][visual]
        if not mine[~visual].all() or not undecided(mine[visual], kept[visual], among, tolerance):
            problems.append(
                f"{int((mine != kept).sum())} tokens of question {sequence + 1} are chosen by one side only"
            )
        executed = theirs.layers[sequence][runner.manifest["router"]["candidates"]].numpy()
        if not undecided(state.runs[sequence], executed, layers, tolerance):
            problems.append(f"question {sequence + 1} runs other layers")
        same.append(np.array_equal(mine, kept) and np.array_equal(executed, state.runs[sequence]))
    return problems, np.array(same)


def undecided(mine: Any, theirs: Any, logits: Any, tolerance: float) -> bool:
    """Return whether two choices are one, or differ only in what has the same logits.

    Args:
        mine, theirs: [N] True: chosen.
        logits: [N] that the choice was made by.
        tolerance: a share of how far the logits lie apart.
    """
    import numpy as np

    differs = mine != theirs
    if not differs.any():
        return True
    if logits is None or mine.sum() != theirs.sum():
        return False
    values = logits.float().numpy()
    return float(np.ptp(values[differs])) <= tolerance * float(np.ptp(values))
