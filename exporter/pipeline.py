"""The whole story: from a recipe to a checkpoint that has been verified before it gets its name."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint, clean_room
from .calibration import Calibration, check_prompt, load_calibration
from .errors import InputError
from .families import protected_layers
from .files import hashes
from .fold import FOLDS
from .fold.job import FoldJob
from .fold.sets import FoldedSets
from .held_out import HeldOut
from .licence import inherited_licence
from .localize import LOCALIZERS, LocalizeJob, check_scores, explicit
from .model_card import base_model_of, card
from .plan import Budget, PruningPlan, breaks_period, make_plan
from .questions import Questions
from .recipe import (
    DEFAULT_FOLD,
    ROUTER_SAMPLES,
    CalibrationData,
    Method,
    Recipe,
    RouterRecipe,
    RunOptions,
    check_options,
)
from .replay import Folded
from .routed_checkpoint import unlabelled, with_router
from .routing import check_routable, default_settings
from .scores import LayerScores
from .source import (
    Source,
    compute_dtype,
    file_hashes,
    load_config,
    load_model,
    open_source,
    pick_device,
    read_json,
)
from .variants import Variant, assembled
from .verification import require
from .weight_files import open_weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, what is done, how many -> the same items


def silent(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    return items


def compress(recipe: Recipe, out: Path | str, options: RunOptions = RunOptions(), progress: Progress = silent) -> Path:
    """Localize, fold, write, describe, verify: the recipe's checkpoint in the folder `out`.

    Returns: the folder. Raises: InputError for wrong input, CheckFailed where the result does not verify; in both
    cases nothing is left at `out`.
    """
    out = Path(out)
    checkpoint.check_target(out)
    if recipe.router is None:
        return _compress(recipe, out, options, progress)
    check_router(recipe)
    with checkpoint.room(out) as room:
        plain = _compress(dataclasses.replace(recipe, router=None), room / out.name, options, progress)
        data = router_data(recipe.router, recipe.calibration)
        return with_router(plain, recipe.router, data, out, options, progress)


def route(
    model: str | Path,
    router: RouterRecipe,
    out: Path | str,
    options: RunOptions = RunOptions(),
    progress: Progress = silent,
) -> Path:
    """Train a router for a checkpoint, pruned by us or as its authors made it; write a copy of it with the router.

    Args:
        model: folder or hub id.
        router: its `calibration` names the unlabelled questions.
    Returns: the folder. Raises: InputError, CheckFailed, as `compress`.
    """
    model, out = str(model), Path(out)
    checkpoint.check_target(out)
    if router.calibration is None:
        raise InputError("a router is trained on questions about images: name them with --calibration FILE.")
    source = open_source(model)
    check_routable(source.config)
    if (source.folder / checkpoint.RECORD).exists():
        return with_router(source.folder, router, router.calibration, out, options, progress)
    return compress(Recipe(model, router.calibration, Budget(layers=()), router=router), out, options, progress)


def router_data(router: RouterRecipe, calibration: CalibrationData) -> CalibrationData:
    """The router's own questions; where none are named the compression's, all of them up to ROUTER_SAMPLES."""
    return router.calibration or dataclasses.replace(calibration, samples=ROUTER_SAMPLES)


def check_router(recipe: Recipe) -> None:
    """What is wrong with the router's part is said before the layers are looked at."""
    from .router_losses import check_loss

    router = recipe.router
    assert router is not None
    config = open_source(recipe.model, recipe.revision).config
    check_routable(config)
    check_loss(router.loss)
    default_settings(config, router.drop_at, router.candidates)  # what does not fit all layers fits fewer still less
    unlabelled(router_data(router, recipe.calibration), router.seed)


def _compress(recipe: Recipe, out: Path, options: RunOptions, progress: Progress) -> Path:
    begin = time.monotonic()
    job = prepare(recipe, options, progress)
    checkpoint.check_space(out, job.source.weights.num_bytes)
    model, ignored = job.load_model()
    questions = job.questions(model)
    scores = localize(job, model, questions)
    plan = make_plan(job.source.num_layers, scores.drop)
    if broken := breaks_period(job.source.config, plan.keep):
        logger.warning("%s: %s", out.name, broken)
    folded, fold = fold_gaps(job, model, questions, plan)
    with assembled(model, Variant(plan, folded)):
        reference = clean_room.reference_answer(model, job.processor)
    del model, questions.model  # verification loads the checkpoint again: there is memory for one
    record = describe(job, questions, scores, plan, fold, reference)
    record["source"]["unexpected_keys"] = ignored
    with checkpoint.staged(out) as stage:
        kept = sum(
            piece.entry.num_bytes for shard in checkpoint.kept_pieces(job.source, plan, folded) for piece in shard
        )
        write_with_progress(job.source, plan, folded, stage, progress, kept)
        record["measured"] = measure(stage, record, time.monotonic() - begin)
        checkpoint.write_record(stage, record)
        card(stage, out.name)
        require(stage, job.device)
    return out


# --- the steps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A recipe with everything it names opened and checked, but for the model itself."""

    recipe: Recipe
    options: RunOptions
    source: Source
    calibration: Calibration
    processor: Any
    device: str
    dtype: torch.dtype
    protect: tuple[int, ...]
    count: int  # layers that are to go
    progress: Progress

    def questions(self, model: Any) -> Questions:
        """The calibration questions, to be answered by the model when they are first read."""
        return Questions(
            model,
            self.processor,
            self.calibration.samples,
            self.options.batch_size,
            self.recipe.seed,
            self.progress,
            self.recipe.calibration.answer_tokens,
        )

    @property
    def multiplier(self) -> float:
        """Of what a block adds to the residual stream."""
        return float(getattr(self.source.config.get_text_config(), self.source.decoder.residual_multiplier or "", 1.0))

    @property
    def fold(self) -> Method:
        """The recipe's fold, the default where it names none."""
        return self.recipe.fold or Method(DEFAULT_FOLD)

    def load_model(self) -> tuple[Any, list[str]]:
        """The model, and names of tensors that transformers ignores."""
        return load_model(self.source, self.device, self.dtype, self.options.memory)


def prepare(recipe: Recipe, options: RunOptions, progress: Progress = silent) -> Job:
    """Everything that can be wrong with the input is found here, the cheap things first."""
    source = open_source(recipe.model, recipe.revision)
    protect = protected_layers(source.config) if recipe.protect is None else recipe.protect
    if bad := [layer for layer in protect if not 0 <= layer < source.num_layers]:
        raise InputError(f"protect names layer {bad[0]}: the decoder has layers 0 to {source.num_layers - 1}.")
    per_layer = source.parameters_per_layer
    count = recipe.budget.count(per_layer, source.weights.num_parameters - sum(per_layer), protect)
    check_options(LOCALIZERS[recipe.localizer.name], recipe.localizer, "localizer")
    if recipe.fold is not None:
        check_options(FOLDS[recipe.fold.name], recipe.fold, "fold")
    calibration = load_for(recipe)
    for sample in progress(calibration.samples, "check images", len(calibration.samples)):
        sample.chat()
        sample.open_images()
    device = pick_device(options.device)
    dtype = compute_dtype(options.dtype, source.config, device)
    processor = clean_room.load_processor(source.folder)
    check_prompt(calibration.samples, processor, source.config)
    return Job(recipe, options, source, calibration, processor, device, dtype, tuple(protect), count, progress)


def load_for(recipe: Recipe) -> Calibration:
    """The recipe's calibration questions."""
    data = recipe.calibration
    return load_calibration(
        data.data,
        samples=data.samples,
        seed=recipe.seed,
        columns=data.columns,
        split=data.split,
        prompt=data.prompt,
        config=data.config,
        allow_urls=data.allow_urls,
    )


def localize(job: Job, model: Any, questions: Questions) -> LayerScores:
    """The layers to drop, by the recipe's localizer or as the recipe names them."""
    if job.recipe.budget.layers is not None:
        return explicit(job.source.num_layers, job.recipe.budget.layers)
    method = job.recipe.localizer
    folded = FoldedSets(model, HeldOut(model, questions), reader(job.source), job.source.decoder, job.multiplier)
    measured_from = LocalizeJob(
        model, job.source.num_layers, questions, job.recipe.seed, None if questions.split.too_few else folded
    )
    return check_scores(LOCALIZERS[method.name](measured_from, job.count, job.protect, **method.options), job.count)


def fold_gaps(job: Job, model: Any, questions: Questions, plan: PruningPlan) -> tuple[Folded, dict[str, Any]]:
    """New weights for the layers that stay, and what the record says of them."""
    method = job.fold
    made = fold_job(job, model, questions, plan)
    folded = FOLDS[method.name](made, **method.options) if plan.drop else {}
    tensors = [f"layer {layer}'s {name}" for layer, name in sorted(folded)]
    told = {"name": method.name if plan.drop else "none", "options": method.options, "reason": "", **made.report}
    return folded, {**told, "tensors": tensors}


def fold_job(
    job: Job, model: Any, questions: Questions, plan: PruningPlan, memo: dict[Any, Any] | None = None
) -> FoldJob:
    """What a fold of the plan works from.

    Args:
        memo: where gaps are kept that several folds of one model share.
    """
    return FoldJob(
        model,
        functools.partial(questions.batches, f"fold ({job.fold.name})"),
        plan,
        reader(job.source),
        job.source.decoder,
        job.multiplier,
        {} if memo is None else memo,
        HeldOut(model, questions),
        half_of=questions.half_of,
    )


def reader(source: Source) -> Callable[[int, str], Any]:
    """Reads a decoder layer's tensor by its name inside the layer, from disk; None where there is none."""

    def read(layer: int, name: str) -> Any:
        full = f"{source.layer_prefix}{layer}.{name}"
        return source.weights.read(full) if full in source.weights.entries else None

    return read


def write_with_progress(
    source: Source, plan: PruningPlan, folded: Folded, stage: Path, progress: Progress, num_bytes: int
) -> None:
    """Write the checkpoint, a step of the progress bar per MiB."""
    unit = 1 << 20
    ticks = iter(progress(range(num_bytes // unit + 1), "write", num_bytes // unit + 1))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        for _ in range((done + count) // unit - done // unit):
            next(ticks, None)
        done += count

    checkpoint.write_checkpoint(source, plan, folded, stage, advance)
    for _ in ticks:
        pass


def score(recipe: Recipe, options: RunOptions = RunOptions(), progress: Progress = silent) -> tuple[Job, LayerScores]:
    """Only localize; writes nothing. Returns what was opened, and the scores."""
    job = prepare(recipe, options, progress)
    model = job.load_model()[0]
    return job, localize(job, model, job.questions(model))


# --- the record -------------------------------------------------------------------------------------------------------


def describe(
    job: Job,
    questions: Questions,
    scores: LayerScores,
    plan: PruningPlan,
    fold: dict[str, Any],
    reference: dict[str, Any],
) -> dict[str, Any]:
    """compression.json: everything that is needed to understand the checkpoint and to make it again."""
    source, dtype = job.source, str(job.dtype).removeprefix("torch.")
    base_model = base_model_of(source.name, source.folder, job.recipe.base_model)
    return {
        "format": 1,
        "recipe": job.recipe.to_data(),
        "run": {
            "device": job.device,
            "dtype": dtype,
            "batch_size": job.options.batch_size,
            "memory": job.options.memory,
        },
        "source": {
            "name": source.name,
            "revision": source.revision,
            "model_type": source.config.model_type,
            "base_model": base_model,
            "license": inherited_licence(source.folder, base_model),
            "parameters": source.weights.num_parameters,
            "bytes": source.weights.num_bytes,
            "kv_bytes_per_token": kv_bytes_per_token(source.config, job.dtype),
            "files": file_hashes(source),
        },
        "calibration": {
            "data": job.recipe.calibration.data,
            "samples": len(job.calibration.samples),
            "of": job.calibration.total,
            "fingerprint": job.calibration.fingerprint,
            "tokens": questions.tokens,
            "answer_tokens": sum(len(tokens) for tokens in questions.answers.values()),
            "pictures": questions.split.num_pictures,
            "held_out": len(questions.split.held_out),
        },
        "protect": list(job.protect),
        "scores": {
            "method": scores.method,
            "values": list(scores.values),
            "drop": list(scores.drop),
            "details": scores.details,
        },
        "plan": {
            "num_layers": plan.num_layers,
            "drop": list(plan.drop),
            "keep": list(plan.keep),
            "broken_period": breaks_period(source.config, plan.keep),
        },
        "fold": fold,
        "reference": {**reference, "question": clean_room.REFERENCE_QUESTION, "dtype": dtype},
        "evaluations": [],
        "versions": versions(),
    }


def measure(folder: Path, record: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the written checkpoint weighs."""
    import torch

    weights = open_weights(folder)
    config = load_config(folder, read_json(folder / "config.json"))
    return {
        "parameters": weights.num_parameters,
        "bytes": weights.num_bytes,
        "seconds": round(seconds, 2),
        "kv_bytes_per_token": kv_bytes_per_token(config, getattr(torch, record["run"]["dtype"])),
        "files": hashes(folder),
    }


def kv_bytes_per_token(config: Any, dtype: Any) -> int:
    """Keys and values of all decoder layers for one token, in bytes."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * dtype.itemsize)


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    from . import __version__

    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"exporter": __version__, "python": platform.python_version(), **packages}
