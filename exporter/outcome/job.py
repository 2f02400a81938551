"""A search with everything that it names opened and checked; what of it this model and machine take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..benchmark.workload import Workload
from ..checkpoints.source import file_hashes
from ..compression.estimate import estimate, flops_per_second
from ..compression.job import CompressionJob
from ..compression.job import prepare as prepare_compression
from ..data.batches import Batch
from ..data.task import Task
from ..data.uses import check_not_kept_aside
from ..errors import InputError
from ..evaluation.metrics.task import compared_task
from ..healing.healed import check_healing
from ..healing.schedule import Schedule
from ..onnx.pipeline import ExportOptions, check_environment
from ..onnx.trial import check_exported
from ..plan import LayerBudget
from ..progress import Progress, silent
from ..recipe import HealRecipe, Recipe, RouterRecipe, RunOptions
from ..routing.settings import check_routable
from ..routing.with_router import unlabelled
from .answer_cost import AnswerCost, Question, by_size
from .goal import EXTRAS, SearchRecipe
from .prediction import Predictor, Sizes
from .step_costs import StepCosts

ANSWER_GUESS = 16  # tokens of an answer, until the original has given some
ROUTER_PASSES = 5.0  # forward passes that a router's training step is as much as: marks, choices and what is learnt
EXPORT_S = 30.0  # an export's guess, and for each GB
EXPORT_S_A_GB = 120.0


@dataclass(frozen=True)
class SearchJob:
    """A search, opened and checked."""

    recipe: SearchRecipe
    options: RunOptions
    compression: CompressionJob
    task: Task
    prompt: Batch  # that is timed: the task's first question
    available: tuple[str, ...]  # of EXTRAS
    left_out: dict[str, str]  # of EXTRAS, and why

    @property
    def free(self) -> int:
        """Return how many layers may go."""
        total = self.compression.source.num_layers
        return min(total - len(set(self.compression.protect)), total - 1)

    @property
    def workload(self) -> Workload:
        return Workload(self.recipe.task.data, seed=self.recipe.seed, **self.recipe.task.options)

    def question(self, answer: int = ANSWER_GUESS) -> Question:
        real = int(self.prompt.inputs.get("attention_mask", self.prompt.is_visual | True).sum())
        visual = int(self.prompt.is_visual.sum())
        return Question(visual, real - visual, answer)

    def depends_on(self) -> list[Any]:
        """Return everything that a result depends on."""
        compression = self.compression
        elsewhere = compression.calibration.answers
        return [
            self.recipe.to_data(),
            file_hashes(compression.source),
            compression.calibration.fingerprint,
            self.task.fingerprint,
            self.task.answers_fingerprint,
            [compression.device, str(compression.dtype), list(self.available)],
            *([] if elsewhere is None else [elsewhere.sha256]),
        ]

    def sizes(self) -> Sizes:
        source = self.compression.source
        per_layer = source.parameters_per_layer
        average = sum(per_layer) / len(per_layer)
        itemsize = self.compression.dtype.itemsize
        return Sizes(
            len(per_layer), source.weights.num_parameters, layer_parameters=average, itemsize=itemsize, free=self.free
        )

    def predictor(self) -> Predictor:
        """Return what is expected by numbers of parameters alone, before anything was timed."""
        sizes, question = self.sizes(), self.question()
        text = self.compression.source.config.get_text_config()
        head = text.vocab_size * text.hidden_size
        others = max(0, sizes.parameters - sizes.layers * sizes.layer_parameters - head)
        cost: AnswerCost = by_size(
            sizes.layers, sizes.layer_parameters, head_parameters=head, other_parameters=others, question=question
        )
        return Predictor(sizes, question, cost, cost, timed=False)


def prepare_search(recipe: SearchRecipe, options: RunOptions, progress: Progress = silent) -> SearchJob:
    """Open and check everything, the cheap things first. Raises: InputError for whatever is wrong with it."""
    compression = Recipe(recipe.model, recipe.calibration, LayerBudget(drop_layers=0), seed=recipe.seed)
    job = prepare_compression(compression, options, progress)
    if any(name in job.source.raw_config for name in ("router", "serving_router")):
        raise InputError(f"{recipe.model} has a router, which was trained for its layers: search from the one without.")
    if job.device == "auto":
        raise InputError("what runs on several devices is not timed: name one with --device.")
    check_not_kept_aside(recipe.task.data, "a search, which chooses by its task")
    task = compared_task(recipe.task, recipe.task_samples, recipe.seed)
    for sample in task.samples:
        sample.check()
    left_out = dict.fromkeys(recipe.without, "it was asked to be left out")
    for name, check in _checks(recipe, job, task).items():
        try:
            if name not in left_out:
                check()
        except InputError as error:
            left_out[name] = str(error)
    workload = Workload(recipe.task.data, seed=recipe.seed, **recipe.task.options)
    prompt = workload.batch(job.processor, job.source.config, 1)
    search_job = SearchJob(
        recipe,
        options,
        compression=job,
        task=task,
        prompt=prompt,
        available=tuple(e for e in EXTRAS if e not in left_out),
        left_out=left_out,
    )
    _check_goal(search_job)
    return search_job


def _checks(recipe: SearchRecipe, job: CompressionJob, task: Task) -> dict[str, Callable[[], object]]:
    """Return what each of EXTRAS needs, as functions that raise InputError."""

    def router() -> None:
        check_routable(job.source.config)
        unlabelled(recipe.calibration, recipe.seed)

    def int8() -> None:
        if job.device != "cpu":
            raise InputError(f"int8 weights are made for the CPU, and this search runs on {job.device}.")
        if any(sample.videos for sample in task.samples):
            raise InputError("int8 weights run on ONNX graphs, which take no videos, and the task has some.")
        check_environment(ExportOptions(quantize="int8"))
        check_exported(job.source.config)

    return {
        "heal": lambda: check_healing(HealRecipe(seed=recipe.seed), recipe.heal_calibration),
        "router": router,
        "int8": int8,
    }


def _check_goal(job: SearchJob) -> None:
    """Raise InputError for goals that no number of layers reaches, where that is known from sizes alone."""
    if job.free < 1:
        raise InputError(f"{job.recipe.model}: no layer may go, so that there is nothing to search among.")
    goal, sizes = job.recipe.goal, job.sizes()
    if goal.params is not None:
        least = sizes.parameters_without(job.free)
        if goal.params < least:
            raise InputError(
                f"params={goal.params:,} can't be met: without any of the {job.free} layers that may go {least:,} "
                "parameters are left."
            )
        if goal.params >= sizes.parameters:
            raise InputError(f"params={goal.params:,}: the model has {sizes.parameters:,}, which is no more.")
    if goal.memory is not None and goal.memory < (least := sizes.memory(job.free, int8="int8" in job.available)):
        raise InputError(
            f"memory={goal.memory:,} bytes can't be met: without any of the {job.free} layers that may go weights take "
            f"{least:,} bytes."
        )


def step_costs(job: SearchJob) -> StepCosts:
    """Return guesses of what steps take, from passes over the questions and this machine's speed."""
    compression = job.compression
    guess = estimate(compression)
    questions = len(compression.calibration.samples)
    one_pass = 2 * guess.tokens * sum(compression.source.parameters_per_layer) / flops_per_second(compression)
    guesses = {"compress": 4 * one_pass + 5.0, "measure": 3 * one_pass * len(job.task.samples) / questions + 10.0}
    if "heal" in job.available:
        _, fit, held_out = check_healing(HealRecipe(seed=job.recipe.seed), job.recipe.heal_calibration)
        passes = Schedule(HealRecipe(), len(fit), len(held_out)).forward_passes(0.75)
        guesses["heal"] = passes * one_pass * (len(fit) + len(held_out)) / questions + 5.0
    if "router" in job.available:
        router = RouterRecipe()
        guesses["route"] = ROUTER_PASSES * router.training_steps * router.batch_size / questions * one_pass + 5.0
    if "int8" in job.available:
        guesses["export"] = EXPORT_S + EXPORT_S_A_GB * compression.source.weights.num_bytes / 1e9
    return StepCosts(guesses)
