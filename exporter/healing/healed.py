"""From a smaller checkpoint to a healed one: ask the original, train, merge, judge, describe, verify."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import ranks
from ..cards.card_file import carry_card
from ..cards.model_card import card
from ..checkpoints.files import ADAPTER_FILE, file_hash, hashes, sha256
from ..checkpoints.record import RECORD, read_record, reference_part, write_record
from ..checkpoints.source import Source, file_hashes, open_source
from ..checkpoints.staging import check_space, check_target, staged
from ..checkpoints.temporary import held, temporary_folder
from ..checkpoints.verification import require
from ..checkpoints.writer import write_checkpoint
from ..clean_room import load_processor, reference_answer
from ..data.calibration import Calibration, questions_of
from ..data.exchanges import exchanged
from ..data.pictures import FEWEST, pictures_of
from ..errors import InputError
from ..models.divergence import Divergence
from ..models.loading import alike_options, compute_dtype, load_model, pick_device
from ..plan import PruningPlan
from ..progress import Progress
from ..recipe import CalibrationData, HealRecipe, RunOptions
from .adapter import merged, save_adapter
from .pairs import parted
from .schedule import Schedule
from .student import Student, prepared, require_peft
from .teacher import AnswerStore, store_answers
from .training import HealingQuestions, HealTraining, judged, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HealingJob:
    """Everything that healing a checkpoint needs, opened and checked but for the models themselves."""

    recipe: HealRecipe
    source: Source  # the smaller model
    teacher: Source
    calibration: Calibration
    answer_tokens: int
    device: str
    dtype: Any
    options: RunOptions
    fit: tuple[int, ...]  # questions to learn from
    held_out: tuple[int, ...]

    @property
    def seed(self) -> int:
        return self.recipe.seed or 0

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.recipe, len(self.fit), len(self.held_out))

    @property
    def top(self) -> int:
        return min(self.recipe.top, int(self.teacher.config.get_text_config().vocab_size))

    @property
    def alike(self) -> dict[str, Any]:
        """Return what processes that share the work must agree on, by names for a message."""
        return {
            "the recipe": [self.recipe.to_data(), self.answer_tokens],
            "the source": file_hashes(self.source),
            "the original": file_hashes(self.teacher),
            "the questions": self.calibration.fingerprint,
            "device, dtype, batch size or memory": alike_options(
                self.device, self.dtype, self.options.batch_size, self.options.memory
            ),
        }

    def fingerprint(self, *parts: Any) -> str:
        """Return one of the questions and the original's answers to them, and of further parts."""
        contents = [file_hashes(self.teacher), self.calibration.fingerprint, self.answer_tokens, self.top, *parts]
        contents += [self.seed, str(self.dtype), self.fit[:1], len(self.fit)]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def check_healing(heal: HealRecipe, data: CalibrationData) -> tuple[Calibration, list[int], list[int]]:
    """Return the questions, those to learn from and those to judge by, as indices.

    Raises: InputError for all that can be wrong before a model is there.
    """
    require_peft()
    seed = heal.seeded(0).seed or 0
    calibration = questions_of(data, seed)
    fit, held_out = parted(calibration.samples, seed)
    if not held_out:
        raise InputError(
            f"{data.data} has questions about {len(set(pictures_of(calibration.samples)))} pictures: healing needs "
            f"{FEWEST} or more, since some are held out to tell whether it helps."
        )
    for sample in ranks.share(calibration.samples):
        sample.check()
    return calibration, fit, held_out


def prepare_healing(
    plain: str, heal: HealRecipe, data: CalibrationData, teacher: str, options: RunOptions
) -> HealingJob:
    """Open and check everything, the cheap things first.

    Args:
        plain: the smaller model, a folder or a hub id.
        teacher: the original, likewise.
    """
    require_peft()
    source, original = open_source(plain), open_source(teacher)
    if any(name in source.raw_config for name in ("router", "serving_router")):
        raise InputError(
            f"{plain} has a router, which was trained for its weights as they are: heal the checkpoint without it, and "
            "train a router for the result (lvlm-exporter route)."
        )
    _check_same_words(source, original)
    calibration, fit, held_out = check_healing(heal, data)
    _check_other_weights(source, original)  # last: it reads both, as the run's fingerprint does
    device = pick_device(options.device)
    dtype = compute_dtype(options.dtype, source.config, device)
    if options.memory:
        logger.warning("--memory limits the original alone: the smaller model, which is trained, is loaded whole")
    return HealingJob(
        recipe=heal.seeded(0),
        source=source,
        teacher=original,
        calibration=calibration,
        answer_tokens=data.answer_tokens,
        device=device,
        dtype=dtype,
        options=options,
        fit=tuple(fit),
        held_out=tuple(held_out),
    )


def _check_same_words(source: Source, teacher: Source) -> None:
    """Raise InputError where the two models' tokens are not the same ones."""
    if source.config.model_type != teacher.config.model_type:
        raise InputError(
            f"{teacher.name} is a {teacher.config.model_type} model, {source.name} a {source.config.model_type} model: "
            "a model is healed by the one that it was made from."
        )
    words = [load_processor(model.folder).tokenizer.get_vocab() for model in (source, teacher)]
    if words[0] != words[1]:
        raise InputError(
            f"{teacher.name} and {source.name} have different vocabularies: a model is healed by the one that it was "
            "made from."
        )


def _check_other_weights(source: Source, teacher: Source) -> None:
    """Raise InputError where the two are one and the same model."""
    mine, theirs = ({file_hash(shard.path) for shard in model.stored.shards} for model in (source, teacher))
    if mine == theirs:
        raise InputError(
            f"{source.name} and {teacher.name} hold the same weights: a model has nothing to learn from itself. "
            "Name the model that it was made from as --teacher."
        )


def with_healing(
    plain: Path,
    heal: HealRecipe,
    data: CalibrationData,
    teacher: str,
    out: Path,
    options: RunOptions,
    progress: Progress,
    work: Path,
) -> Path:
    """Write a copy of the checkpoint `plain` that has learnt to say what its original says.

    Where held-out questions do not show that it helps, the copy has the weights of before, and its record says so.

    Args:
        work: a folder for what a run that is broken off goes on from; removed at the end.
    Raises: InputError for wrong input, CheckFailed where the result does not verify.
    """
    begin = time.monotonic()
    ranks.from_first(lambda: check_target(out))
    record = read_record(plain).to_data()
    refuse_healed(record, plain)
    job = prepare_healing(str(plain), heal, data=data, teacher=teacher, options=options)
    if ranks.world() > 1:
        ranks.same(job.alike)
    with _work_in(work, job, out) as work:
        questions = ask_teacher(job, work, progress)
        model, processor = load_model(job.source, job.device, job.dtype)[0], load_processor(job.source.folder)
        student = prepared(model, processor, job.source, rank=heal.rank, norms=heal.norms, seed=job.seed)
        told, adapter = _learnt(job, student, questions=questions, work=work, progress=progress)
        record["recipe"]["heal"] = {**heal.to_data(), "teacher": teacher, "calibration": data.to_data()}
        record["heal"] = {**told, "seconds": round(time.monotonic() - begin, 1)}
        if adapter is not None:
            answer = ranks.from_first(functools.partial(reference_answer, student.model, student.processor))
            record["reference"] = reference_part(answer, record["run"]["dtype"])
        del model, student
        ranks.from_first(lambda: written(job.source, plain, record=record, adapter=adapter, out=out, device=job.device))
    return out


@contextlib.contextmanager
def _work_in(work: Path, job: HealingJob, out: Path) -> Iterator[Path]:
    """Give the folder that a run which is broken off goes on from; it is removed where the block ends well.

    Of several processes the first has it, the others one of their own.
    """
    if not ranks.is_first():
        with temporary_folder("healing", work) as folder:
            yield folder
        return
    check_space(out, job.source.weights.num_bytes)
    check_space(work, job.schedule.disk_bytes(job.answer_tokens))
    work.mkdir(exist_ok=True)
    with held(work, "another run is healing"):
        yield work
    shutil.rmtree(work, ignore_errors=True)


def refuse_healed(record: dict[str, Any], folder: Path) -> None:
    """Raise InputError for a checkpoint that was healed: its record has room for one adapter."""
    if record.get("heal", {}).get("kept"):
        raise InputError(
            f"{folder} is healed already: heal the checkpoint that it was made from, with more questions or steps."
        )


def ask_teacher(job: HealingJob, work: Path, progress: Progress) -> HealingQuestions:
    """Let the original answer all questions that it has not answered yet, and let it go again."""
    samples = job.calibration.samples
    rounds = exchanged([samples[index] for index in job.fit], job.schedule.rounds, job.seed)
    store = AnswerStore(work, job.fingerprint(job.schedule.judging_rounds), job.top)
    judging = exchanged([samples[index] for index in job.held_out], job.schedule.judging_rounds, job.seed)
    questions = HealingQuestions(store, [sample for round_samples in judging for sample in round_samples], rounds)
    if store.missing(len(questions.all)):
        model = load_model(job.teacher, job.device, job.dtype, job.options.memory)[0]
        processor = load_processor(job.teacher.folder)
        store_answers(
            model,
            processor,
            samples=questions.all,
            store=store,
            batch_size=job.options.batch_size,
            answer_tokens=job.answer_tokens,
            progress=progress,
        )
    return questions


def _learnt(
    job: HealingJob, student: Student, questions: HealingQuestions, work: Path, progress: Progress
) -> tuple[dict[str, Any], Path | None]:
    """Train and merge. Return what the record says of it, and the adapter; None where nothing helped."""
    heal = job.recipe
    training = HealTraining(job.schedule.steps, heal.batch_size, heal.learning_rate, loss=heal.loss, seed=job.seed)
    before = judged(student, questions, heal.batch_size)
    key = job.fingerprint(heal.to_data(), file_hashes(job.source))
    best, curve = train(
        student, questions, training, before, progress=progress, state_file=work / "training.state", fingerprint=key
    )
    told = {
        "questions": len(job.fit),
        "pairs": len(questions.rounds) * len(job.fit),
        "answer_tokens": questions.store.tokens,
        "fingerprint": job.calibration.fingerprint,
        "teacher": {"name": job.teacher.name, "revision": job.teacher.revision},
        "parameters": sum(parameter.numel() for parameter in student.parameters.values()),
        "steps": training.steps,
        "steps_run": len(curve),
        "curve": curve,
        "before": _told(before),
    }
    if best.step:
        adapter = work / "adapter.safetensors"
        save_adapter(adapter, best.weights)
        student.merge(merged(job.source, adapter))
        after = judged(student, questions, heal.batch_size)  # of the weights as they are written, in their own dtype
        if after.mean < before.mean:
            kept = {"kept": True, "steps_kept": best.step, "after": _told(after)}
            return {**told, **kept, "adapter": {"file": ADAPTER_FILE, "sha256": sha256(adapter)}}, adapter
    logger.warning(
        "%s: after %d steps of healing held-out questions are no better than before (KL %.4f): the weights stay as "
        "they were. More questions help most", job.source.folder.name, len(curve), before.mean,
    )  # fmt: skip
    return {**told, "kept": False, "steps_kept": 0}, None


def _told(divergence: Divergence) -> dict[str, Any]:
    return {**divergence.to_data(), "pictures": len(set(divergence.pictures))}


def written(source: Source, plain: Path, record: dict[str, Any], adapter: Path | None, out: Path, device: str) -> None:
    """Write the checkpoint with what was learnt merged into it, the adapter beside its record, and verify it."""
    folded = merged(source, adapter) if adapter is not None else {}
    if adapter is not None:
        record["evaluations"] = []  # they were of other weights
        record.pop("routes", None)
    with staged(out) as stage:
        write_checkpoint(source, PruningPlan(source.num_layers, ()), folded, stage)
        if adapter is not None:
            (stage / ADAPTER_FILE).parent.mkdir()
            shutil.copyfile(adapter, stage / ADAPTER_FILE)
        record["measured"]["files"] = hashes(stage)
        write_record(stage, record)
        if (plain / RECORD).exists():
            carry_card(plain, stage)
        card(stage, out.name)
        require(stage, device)


def merged_again(plain: Path, healed: Path, out: Path, options: RunOptions) -> Path:
    """Write a copy of `plain` into which the adapter of the checkpoint `healed` is merged: no training, the same bytes.

    Raises: InputError where the adapter is missing, or not the one that the record names.
    """
    record, before = read_record(plain).to_data(), read_record(healed).to_data()
    path, told = healed / ADAPTER_FILE, before["heal"]
    if not path.is_file() or sha256(path) != told["adapter"]["sha256"].lower():
        raise InputError(
            f"{path} is missing, or not the adapter that {RECORD} names by its SHA-256: without it the checkpoint "
            "can't be made again bit for bit. Take the folder from where it was made."
        )
    source, device = open_source(str(plain)), pick_device(options.device)
    record["recipe"]["heal"], record["heal"] = before["recipe"]["heal"], told
    record["reference"] = before["reference"]  # the weights will be the same
    written(source, plain, record=record, adapter=path, out=out, device=device)
    return out
