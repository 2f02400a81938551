"""The cost of a compression before it is run: parameters, bytes, time and memory. Nothing is loaded or written."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoints.memory import parse_size
from ..checkpoints.safetensors_ranges import COPY_CHUNK_BYTES
from ..clean_room import REFERENCE_TOKENS
from ..data.batches import by_size, make_batches, spread
from ..fold.reconstruction import refits
from ..methods import FOLDS, LOCALIZERS, Function, resolve
from ..models.drafting import may_draft
from ..models.flops import active_parameters, image_patches, kv_bytes_per_token, tower_parameters
from ..models.loading import AT_ONCE, PartSizes
from ..models.questions import JobSize, portion
from ..plan import make_plan
from ..recipe import Method
from .job import CompressionJob

LOOKED_AT = 16  # questions that are processed to learn how long they are
ANSWER_GUESS = 16  # tokens of an answer: how long they are is not known before the model is run
LABELLED = 2  # passes that answers take where all questions are labelled, and the labels mostly right
UNGUESSED, GUESSED = 2, 0.6  # passes of other answers, and for each token of the longest: guesses come from answers
KNOWN_REFERENCE = 2  # passes of the smaller model's reference answer where the original's is a guess at it
UNKNOWN_REFERENCE = 6  # where the original has not got far with its own
DISK_BYTES_PER_SECOND = 1e9  # that a checkpoint is read and written with, roughly
ACTIVATION_COPIES = 12  # of [B, S, D] that a layer and its measurement hold at a time, roughly
MATRICES = 6  # [D, D] in float64 that a fold holds at a time
LEAST_WIDTH, MOST_WIDTH = 1024, 4096  # of matrices whose product is timed
PROCESS_BYTES = 450_000_000  # of libraries, beside what --memory counts


@dataclass(frozen=True)
class Estimate:
    layers: int
    drop: int
    parameters: int
    parameters_after: int
    bytes: int
    bytes_after: int
    kv_bytes_per_token: int
    tokens: int
    forward_passes: float
    flops: float
    seconds: float
    memory_bytes: int
    sweeps: int  # times that layers on disk are read
    answer_passes: int  # of these, that give answers
    bytes_to_read: int | None  # of weights; None where all of them are in memory
    stages: dict[str, float]  # seconds of each


@dataclass(frozen=True)
class Rates:
    """What a machine reaches."""

    flops_per_second: float
    bytes_per_second: float = DISK_BYTES_PER_SECOND


@dataclass(frozen=True)
class Running:
    """What running the model takes."""

    tokens: int = 0
    passes: float = 0.0  # through all decoder layers, over these tokens
    of_a_pass: float = 0.0  # operations
    memory_bytes: int = COPY_CHUNK_BYTES
    beside_bytes: int = 0  # of this, that are no weights and no states between layers
    stages: dict[str, float] = field(default_factory=dict)  # passes of each

    @property
    def flops(self) -> float:
        return self.passes * self.of_a_pass


def estimate(job: CompressionJob, rates: Rates | None = None) -> Estimate:
    """Estimate a job: sizes are exact up to which layers go, time and memory are rough.

    Args:
        rates: of the machine that it is to run on; None: of this one, whose products of matrices are timed.
    """
    per_layer = job.source.parameters_per_layer
    weights = job.source.weights
    gone = round(job.count * sum(per_layer) / len(per_layer))
    gone_bytes = round(job.count * layer_bytes(job) / len(per_layer))
    running = _running(job) if job.needs_model else Running()
    if rates is None:
        rates = Rates(flops_per_second(job) if job.needs_model else math.inf)
    reading = _reading(job) if job.needs_model and job.options.memory else Reading()
    stages = _seconds(running, reading, weights.num_bytes, rates)
    return Estimate(
        layers=len(per_layer),
        drop=job.count,
        parameters=weights.num_parameters,
        parameters_after=weights.num_parameters - gone,
        bytes=weights.num_bytes,
        bytes_after=weights.num_bytes - gone_bytes,
        kv_bytes_per_token=kv_bytes_per_token(job.source.config, job.dtype),
        tokens=running.tokens,
        forward_passes=running.passes,
        flops=running.flops,
        seconds=sum(stages.values()),
        memory_bytes=running.memory_bytes if reading.num_bytes is None else _streamed_bytes(job, running),
        sweeps=reading.sweeps,
        answer_passes=reading.answer_passes,
        bytes_to_read=reading.num_bytes,
        stages=stages,
    )


def _seconds(running: Running, reading: Reading, num_bytes: int, rates: Rates) -> dict[str, float]:
    """Return the time of each stage: layers are read while others run, and the checkpoint is read and written."""
    seconds = {
        name: max(
            running.stages.get(name, 0.0) * running.of_a_pass / rates.flops_per_second,
            reading.stages.get(name, 0.0) / rates.bytes_per_second,
        )
        for name in {**running.stages, **reading.stages}
    }
    return seconds | {"copy": 2 * num_bytes / rates.bytes_per_second}


def _streamed_bytes(job: CompressionJob, running: Running) -> int:
    """Return what a process takes that may keep so much of weights and states, with what it computes beside these."""
    return parse_size(job.options.memory or "") + PROCESS_BYTES + running.beside_bytes


def _running(job: CompressionJob) -> Running:
    """Return what running the model takes: decoder layers, of whose experts few run, and the vision tower."""
    tokens, patches, longest = _tokens(job)
    width = job.source.config.get_text_config().hidden_size
    stages = stage_passes(job, tokens / len(job.calibration.samples))
    activations = ACTIVATION_COPIES * job.options.batch_size * longest * width * 4
    sums = MATRICES * width * width * 8
    weights = job.source.weights.num_parameters * job.dtype.itemsize
    return Running(
        tokens=tokens,
        passes=sum(stages.values()),
        of_a_pass=2 * (tokens * sum(active_parameters(job.source)) + patches * tower_parameters(job.source)),
        memory_bytes=round(weights + activations + sums + _streams(job, tokens) * width * job.dtype.itemsize),
        beside_bytes=max(activations, sums if job.count else 0),
        stages=stages,
    )


@dataclass(frozen=True)
class Reading:
    """How often layers on disk are read."""

    sweeps: int = 0
    answer_passes: int = 0  # of these, that give answers
    num_bytes: int | None = None  # of weights, in all; None: no layer is on disk
    stages: dict[str, float] = field(default_factory=dict)  # bytes of each


def _reading(job: CompressionJob) -> Reading:
    """Return how often layers on disk are read, with exchanges of layers at their most and answers guessed.

    Raises: InputError where --memory allows less than streaming needs.
    """
    sizes = PartSizes.of(job.source, job.dtype.itemsize)
    allowed = parse_size(job.options.memory or "")
    if sizes.share_out(allowed, job.source.name)[0] == len(sizes.layers):
        return Reading()
    size = replace(_likely(job), streamed=True)
    localizing: tuple[float, ...] = ()
    folding: tuple[float, ...] = ()
    if job.reads_questions:
        localizing = _sweeps(LOCALIZERS[job.recipe.localizer.name].sweeps, size, job.recipe.localizer)
    if job.count:
        folding = _sweeps(FOLDS[job.fold.name].sweeps, size, job.fold)
    answers, reference = _answer_passes(job)
    answers = answers if localizing or folding else 0
    remain = 1 - job.count / len(sizes.layers)
    shares = {"answers": (1.0,) * answers, "localize": localizing, "fold": folding, "reference": (remain,) * reference}
    on_disk = layer_bytes(job)
    stages = {name: on_disk * read for name, read in _read(shares, sizes, allowed - sizes.least, job.device).items()}
    stages["load"] = job.source.weights.num_bytes - on_disk
    sweeps = round(sum(localizing) + sum(folding)) + answers + reference
    return Reading(sweeps, answers + reference, round(sum(stages.values())), stages)


def _read(shares: dict[str, tuple[float, ...]], sizes: PartSizes, left: int, device: str) -> dict[str, float]:
    """Return how many times all layers each stage reads, from the shares of them that its passes go through.

    The last ones stay, and are read by the first pass alone; a fold, which goes back to a layer, leaves one fewer.
    """
    stay = sizes.layers_that_stay(left, device) + AT_ONCE - 2
    read = dict.fromkeys(shares, 0.0)
    first = True
    for name, passes in shares.items():
        kept = min(max(stay - (name == "fold"), 0) / len(sizes.layers), 1.0)
        for share in passes:
            read[name] += share if first else max(share - kept, 0.0)
            first = False
    return read


def _answer_passes(job: CompressionJob) -> tuple[int, int]:
    """Return the passes that the answers take, and those of the smaller model's answer to the reference question."""
    longest = min(ANSWER_GUESS, job.recipe.calibration.answer_tokens)
    if not may_draft(job.source.config):
        return (0 if job.calibration.answers else longest), REFERENCE_TOKENS
    if job.calibration.answers:
        return 0, UNKNOWN_REFERENCE
    if all(sample.answers for sample in job.calibration.samples):
        return min(LABELLED, longest), UNKNOWN_REFERENCE
    known = job.recipe.calibration.answer_tokens >= REFERENCE_TOKENS
    return min(longest, UNGUESSED + math.ceil(GUESSED * longest)), KNOWN_REFERENCE if known else UNKNOWN_REFERENCE


def layer_bytes(job: CompressionJob) -> int:
    """Return the bytes of all decoder layers on disk."""
    entries = job.source.weights.entries.items()
    return sum(entry.num_bytes for name, entry in entries if job.source.layer_of(name) is not None)


def _likely(job: CompressionJob) -> JobSize:
    """Return the size of a job, with a plan where most choices lie."""
    layers, count = job.source.num_layers, job.count
    plan = make_plan(layers, range(layers - max(count, 1) - 1, layers - 1)[-layers + 1 :])
    return JobSize(len(job.calibration.samples), plan, count)


def forward_passes(job: CompressionJob, prompt_tokens: float) -> float:
    """Return what localizing and folding cost, in passes of all prompts through all decoder layers, answering included.

    Args:
        prompt_tokens: of a question, on average.
    """
    return sum(stage_passes(job, prompt_tokens).values())


def stage_passes(job: CompressionJob, prompt_tokens: float) -> dict[str, float]:
    """Return what stages cost, in passes of all prompts through all decoder layers.

    Args:
        prompt_tokens: of a question, on average.
    """
    fitted_on = prompt_tokens * portion("fit", len(job.calibration.samples))
    inner_bytes = fitted_on * inner_size(job.source.config) * job.dtype.itemsize
    size = replace(_likely(job), refits=refits(job.source.decoder, inner_bytes), streamed=_streamed(job))
    longer = 1 + min(ANSWER_GUESS, job.recipe.calibration.answer_tokens) / prompt_tokens  # with its answer
    localizing, ranked, folding, fitted = 0.0, 0.0, 0.0, 0.0
    if job.recipe.budget.layers is None:
        method = job.recipe.localizer
        localizing, ranked = _cost(LOCALIZERS[method.name].passes, size, method)
    if job.count:
        folding, fitted = _cost(FOLDS[job.fold.name].passes, size, job.fold)
    passes = {"answers": max(ranked, fitted), "localize": localizing, "fold": folding}
    return {name: longer * number for name, number in passes.items()}


def _streamed(job: CompressionJob) -> bool:
    """Tell whether --memory leaves layers on disk."""
    if not job.options.memory:
        return False
    sizes = PartSizes.of(job.source, job.dtype.itemsize)
    return sizes.share_out(parse_size(job.options.memory), job.source.name)[0] < len(sizes.layers)


def inner_size(config: Any) -> int:
    """Return how wide the inputs of a layer's down_proj are."""
    text = config.get_text_config()
    size = getattr(text, "intermediate_size", None)
    return size if isinstance(size, int) else 4 * int(text.hidden_size)


def _streams(job: CompressionJob, tokens: int) -> float:
    """Return how many tokens' states a refit holds: the original's and the smaller model's, of all it is fitted on."""
    if not FOLDS[job.fold.name].holds_states or job.source.decoder.unfoldable:
        return 0.0
    questions = len(job.calibration.samples)
    return 2 * tokens * portion("fit", questions) / questions


def _cost(passes: float | Function, size: JobSize, method: Method) -> tuple[float, float]:
    """Return what a method costs by its row: passes, and the share of the questions that it needs answers to."""
    if not isinstance(passes, float | int):
        cost: tuple[float, float] = resolve(passes)(size, method.options)
        return cost
    return passes, 1.0 if passes else 0.0


def _sweeps(sweeps: int | Function, size: JobSize, method: Method) -> tuple[float, ...]:
    """Return the share of the layers that each pass of a method reads."""
    shares = sweeps if isinstance(sweeps, int) else resolve(sweeps)(size, method.options)
    return (1.0,) * shares if isinstance(shares, int) else tuple(shares)


def _tokens(job: CompressionJob) -> tuple[int, int, int]:
    """Return tokens and image patches of all calibration questions, from a few of all sizes, and the most tokens."""
    samples = by_size(job.calibration.samples)
    looked_at = list(spread(samples, LOOKED_AT / len(samples)))
    batches = list(make_batches(looked_at, job.processor, job.source.config, batch_size=1))
    lengths = [batch.is_visual.numel() for batch in batches]
    patches = sum(image_patches(batch.inputs, job.source.config) for batch in batches)
    share = len(samples) / len(lengths)
    return round(sum(lengths) * share), round(patches * share), max(lengths)


def flops_per_second(job: CompressionJob, rows: int = 512) -> float:
    """Return what the device reaches in products of matrices as wide as the decoder's, less a third for the rest.

    What is wider than a processor's cache is slower: a model of 64 is timed as one of LEAST_WIDTH, one of more than
    MOST_WIDTH as one of that.
    """
    import torch

    config = job.source.config
    width, inner = (
        min(max(size, LEAST_WIDTH), MOST_WIDTH)
        for size in (int(config.get_text_config().hidden_size), inner_size(config))
    )
    a = torch.randn(rows, width, dtype=job.dtype, device=job.device)
    b = torch.randn(inner, width, dtype=job.dtype, device=job.device)
    for _ in range(2):
        a @ b.T
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        (a @ b.T).sum().item()
        best = max(best, 2 * rows * width * inner / (time.perf_counter() - begin))
    return best * 2 / 3
