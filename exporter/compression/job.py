"""A recipe with everything that it names opened and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import ranks
from ..checkpoints.source import Source, file_hashes, open_source
from ..clean_room import load_processor
from ..data.batches import check_prompt
from ..data.calibration import Calibration, questions_of
from ..data.given import given_answers
from ..errors import InputError
from ..families import protected_layers
from ..localize.scores import LayerScores
from ..localize.stored import StoredScores, check_asked, check_source, chosen_from
from ..methods import FOLDS, LOCALIZERS
from ..models.loading import compute_dtype, load_model, pick_device
from ..models.questions import Questions
from ..plan import LayerBudget
from ..progress import Progress, silent
from ..recipe import DEFAULT_FOLD, Method, Recipe, RunOptions, check_method

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CompressionJob:
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
    stored: StoredScores | None = None
    chosen: LayerScores | None = None  # from stored scores

    def questions(self, model: Any) -> Questions:
        """Return the calibration questions, to be answered by the model when they are first read."""
        return Questions(
            model=model,
            processor=self.processor,
            samples=self.calibration.samples,
            batch_size=self.options.batch_size,
            seed=self.recipe.seed,
            progress=self.progress,
            answer_tokens=self.recipe.calibration.answer_tokens,
            elsewhere=self.calibration.answers,
        )

    @property
    def needs_model(self) -> bool:
        return self.recipe.needs_model(self.chosen is not None)

    @property
    def reads_questions(self) -> bool:
        """Tell whether the layers are chosen by looking at what the model does."""
        named = self.chosen is not None or self.recipe.budget.layers is not None
        return not (named or LOCALIZERS[self.recipe.localizer.name].control)

    @property
    def chosen_by(self) -> str:
        """Say how the layers are chosen."""
        if self.recipe.budget.layers is not None:
            return "name"
        return f"stored scores of {self.recipe.localizer.name}" if self.chosen else self.recipe.localizer.name

    @property
    def multiplier(self) -> float:
        """Return the factor by which a block's output is multiplied before it enters the residual stream."""
        if self.source.decoder.factor is not None:
            return self.source.decoder.factor
        return float(getattr(self.source.config.get_text_config(), self.source.decoder.residual_multiplier or "", 1.0))

    @property
    def fold(self) -> Method:
        """Return the recipe's fold, the default where it names none."""
        return self.recipe.fold or Method(DEFAULT_FOLD)

    def count_of(self, budget: LayerBudget) -> int:
        """Return how many layers go under a budget. Raises InputError where it can't be met."""
        return layers_to_go(budget, self.source, self.protect)

    def load_model(self) -> tuple[Any, list[str]]:
        """Return the model, and names of tensors that transformers ignores."""
        return load_model(self.source, self.device, self.dtype, self.options.memory, by_layer=True)


def prepare(
    recipe: Recipe, options: RunOptions, progress: Progress = silent, stored: StoredScores | None = None
) -> CompressionJob:
    """Open and check everything that can be wrong with the input, the cheap things first.

    Args:
        stored: scores of the layers that are there already.
    """
    if stored is not None and recipe.budget.layers is not None:
        raise InputError(
            "the recipe names the layers to remove, so that stored scores change nothing: leave one of them out."
        )
    source = open_source(recipe.model, recipe.revision)
    protect = protected_layers(source.config) if recipe.protect is None else recipe.protect
    if bad := [layer for layer in protect if not 0 <= layer < source.num_layers]:
        raise InputError(f"protect names layer {bad[0]}: the decoder has layers 0 to {source.num_layers - 1}.")
    count = layers_to_go(recipe.budget, source, protect)
    check_method(recipe.localizer, LOCALIZERS, "localizer")
    if recipe.fold is not None:
        check_method(recipe.fold, FOLDS, "fold")
    if not recipe.calibration.data and recipe.needs_model(stored is not None):
        raise InputError(
            "questions about images are needed to choose layers and to fold: name them with --calibration FILE. None "
            "are needed where layers are named (--layers) or scored already (--scores FILE) and --fold is none."
        )
    calibration = load_for(recipe)
    if calibration.answers is not None:
        calibration.answers.check_layers(source.num_layers)
    mine = ranks.share(calibration.samples)
    for sample in progress(mine, "check images", len(mine)):
        sample.check()
    device = pick_device(options.device)
    dtype = compute_dtype(options.dtype, source.config, device)
    processor = load_processor(source.folder)
    check_prompt(calibration.samples, processor, source.config)
    chosen = None
    if stored is not None:
        check_asked(stored, recipe.localizer, calibration.fingerprint if calibration.samples else None)
        check_source(stored, file_hashes(source), source.num_layers, source.name)
        chosen = chosen_from(stored, count, protect)
        recipe = dataclasses.replace(recipe, localizer=stored.method)
    return CompressionJob(
        recipe=recipe,
        options=options,
        source=source,
        calibration=calibration,
        processor=processor,
        device=device,
        dtype=dtype,
        protect=tuple(protect),
        count=count,
        progress=progress,
        stored=stored,
        chosen=chosen,
    )


def layers_to_go(budget: LayerBudget, source: Source, protect: Collection[int]) -> int:
    per_layer = source.parameters_per_layer
    return budget.count(per_layer, source.weights.num_parameters - sum(per_layer), protect)


def load_for(recipe: Recipe) -> Calibration:
    """Load the recipe's calibration questions; none where it names none."""
    if not recipe.calibration.data:
        return Calibration((), "", 0, recipe.seed)
    data = recipe.calibration
    calibration = questions_of(data, recipe.seed)
    if data.answers is None:
        return calibration
    return dataclasses.replace(
        calibration,
        answers=given_answers(data.answers, calibration.samples, allow_urls=data.allow_urls, frames=data.frames),
    )
