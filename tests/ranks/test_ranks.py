"""Several processes for one run: the bytes of one, and one sentence for what goes wrong."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.checkpoints import few_held_out, without_verification
from fixtures.processes import command, compressions
from torch import distributed

from exporter import ranks
from exporter.checkpoints.files import ADAPTER_FILE
from exporter.checkpoints.source import open_source
from exporter.cli import main
from exporter.compression import steps
from exporter.errors import InputError
from exporter.fold.moments import ExactSum, MomentSums, bounds_of
from exporter.healing import teacher, training
from exporter.models.loading import PartSizes
from exporter.pipeline import compress
from exporter.recipe import RunOptions, load_recipe

# family, localizer, fold, batch size; of 12 questions 9 are fitted on and 3 held out: shares are uneven, and some empty
RUNS = (
    ("llava", "best_of", "auto", 2),
    ("llava", {"name": "fisher", "draws": 1}, {"name": "reconstruction", "ridge": "auto"}, 1),
    ("llava", "angular", "least_squares", 8),
    ("gemma3", "greedy", "reconstruction", 4),
    ("qwen3_vl", "tis", {"name": "scp_both", "per": "layer", "tokens": "important"}, 4),
)
# what is trained, on 24 questions of which 20 or 21 are learnt from: steps of parts of 4, 4 and 2, or 4 and 2 questions
HEAL = {"steps": 6, "rank": 2, "batch_size": 10, "learning_rate": 0.02, "exchanges": 1}
ROUTER = {"steps": 3, "batch_size": 6}
TRAINED = {
    "healed": {"heal": HEAL},
    "routed": {"router": ROUTER},
    "served": {"heal": HEAL | {"steps": 2}, "router": ROUTER | {"serve": True, "question_aware": True}},
}


@pytest.fixture(scope="module")
def asked(questions, tmp_path_factory) -> Path:
    """Two questions about each of a dozen pictures."""
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    images = [str(questions.parent / line["image"]) for line in lines]
    path = tmp_path_factory.mktemp("asked") / "calibration.jsonl"
    texts = [[line["question"] for line in some] for some in (lines, lines[1:] + lines[:1])]
    twice = [{"image": image, "question": text} for some in texts for image, text in zip(images, some, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in twice))
    return path


@pytest.fixture(scope="module")
def jobs(tiny, questions, asked, tmp_path_factory) -> list[tuple[Path, str, dict[str, object]]]:
    """Recipe files with names for their results, and the options they run by; the last one streams from disk."""
    folder = tmp_path_factory.mktemp("recipes")
    made: list[tuple[Path, str, dict[str, object]]] = []
    for number, (family, localizer, fold, batch_size) in enumerate(RUNS):
        calibration = {"data": str(questions), "samples": 12, "answer_tokens": 4}
        recipe = {"model": str(tiny(family)), "calibration": calibration, "drop_layers": 2, "protect": []}
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump(recipe | {"localizer": localizer, "fold": fold}))
        made.append((path, str(number), {"batch_size": batch_size}))
    for name, trained in TRAINED.items():
        calibration = {"data": str(asked), "answer_tokens": 4}
        recipe = {"model": str(tiny("llava")), "calibration": calibration, "layers": [2, 3], "fold": "none"}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe | trained))
        made.append((path, name, {"batch_size": 4}))
    source = open_source(str(tiny("llava")))
    least = f"{PartSizes.of(source, 4).least / 1000 + 1:.0f}KB"
    return [*made, (made[0][0], "streamed", {"batch_size": 2, "memory": least})]


@pytest.fixture(scope="module")
def alone(jobs, tmp_path_factory) -> Callable[[str], Path]:
    """What one process makes of them, by name."""
    folder = tmp_path_factory.mktemp("alone")
    by_name = {name: (recipe, options) for recipe, name, options in jobs}

    @functools.cache
    def made(name: str) -> Path:
        recipe, options = by_name[name]
        with without_verification(), few_held_out():
            return compress(load_recipe(recipe), folder / name, RunOptions(**options))

    return made


def record_of(folder: Path) -> dict:
    """Return the record, without what tells how long a run took and how much each process read."""
    record = json.loads((folder / "compression.json").read_text())
    for part in ("measured", "heal", "router", "serving"):
        for name in ("seconds", "bytes_read"):
            record.get(part, {}).pop(name, None)
    return record


@pytest.mark.slow
@pytest.mark.clean_process
@pytest.mark.parametrize("number", [2, pytest.param(3, marks=pytest.mark.long_tail)])
def test_several_processes_make_the_bytes_and_the_figures_of_one(number, jobs, alone, tmp_path):
    compressions(number, [(recipe, tmp_path / name, options) for recipe, name, options in jobs], tmp_path)
    for _, name, _ in jobs:
        ours, theirs = tmp_path / name, alone(name)
        weights = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
        for file in weights:
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), (name, file)
        records = [record_of(ours), record_of(theirs)]
        if name == "streamed":  # each process guesses from what it was told: passes of other widths round otherwise
            margins = [record["reference"].pop("margins") for record in records]
            assert margins[0] == pytest.approx(margins[1], abs=1e-4)
        assert records[0] == records[1], name
    assert not list(tmp_path.glob(".*")), "nothing is left beside the results"
    auto = record_of(tmp_path / "0")
    assert "held_out" in auto["fold"] and auto["scores"]["details"]["rounds"], "sets and folds were judged"
    assert record_of(tmp_path / "healed")["heal"]["kept"] and record_of(tmp_path / "routed")["router"]["measured"]
    assert record_of(tmp_path / "served")["serving"]["measured"]


@pytest.mark.slow
@pytest.mark.clean_process
def test_an_evaluation_by_several_processes_says_what_one_says(alone, tiny, task, tmp_path):
    """Of 12 questions in batches of 5, in other batches by each process; and answers are kept in the order of one."""
    words = ["evaluate", str(alone("2")), "--reference", str(tiny("llava")), "--task", str(task), "--quiet"]
    words += ["--max-new-tokens", "4", "--batch-size", "5", "--no-card"]

    def files(name: str) -> list[str]:
        return ["--json", str(tmp_path / f"{name}.json"), "--predictions", str(tmp_path / f"{name}.jsonl")]

    assert main([*words, *files("one")]) == 0
    printed, codes = command(2, [*words, *files("two")], tmp_path)
    assert codes == ["0", "0"], printed
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for model in (*one["models"], *two["models"]):
        model.pop("seconds")
    assert one == two and one["models"][1]["kl"] > 0
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.clean_process
def test_scores_of_the_reference_model_by_several_processes_are_those_of_one(digits, tmp_path):
    questions = str(digits / "data" / "calibration.jsonl")
    words = [
        "score",
        str(digits / "model"),
        "--calibration",
        questions,
        "--samples",
        "12",
        "--batch-size",
        "4",
        "--quiet",
    ]
    words += ["--drop-layers", "2"]
    assert main([*words, "--save", str(tmp_path / "one.json")]) == 0
    printed, codes = command(2, [*words, "--save", str(tmp_path / "two.json")], tmp_path)
    assert codes == ["0", "0"] and printed.count("kept: ") == 1, printed
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def words_for(recipe: Path, out: Path) -> list[str]:
    return ["compress", "--recipe", str(recipe), "--out", str(out), "--quiet"]


def sentences(printed: str) -> list[str]:
    return [line.removeprefix("lvlm-exporter: ") for line in printed.splitlines() if line.startswith("lvlm-exporter: ")]


@pytest.mark.slow
@pytest.mark.clean_process
def test_a_process_that_dies_ends_all_with_one_sentence_and_one_process_goes_on(jobs, alone, tmp_path, monkeypatch):
    (recipe, _, options), expected = jobs[2], alone("2")
    words = [*words_for(recipe, tmp_path / "small"), "--batch-size", str(options["batch_size"])]
    killed = """
from exporter.compression import steps
if rank == "1":
    steps.fold_gaps = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""
    printed, codes = command(2, words, tmp_path, killed)
    (sentence,) = sentences(printed)
    assert "process 1 of 2 has ended without a word" in sentence and "nothing was written" in sentence
    assert codes == ["2", ""]
    assert not (tmp_path / "small").exists() and (tmp_path / ".small.compressing" / "scores.safetensors").exists()
    monkeypatch.setattr(steps, "localize", lambda *_: pytest.fail("the layers are chosen already"))
    with without_verification():
        assert main(words) == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "small" / file).read_bytes() == (expected / file).read_bytes()
    assert not (tmp_path / ".small.compressing").exists()


@pytest.mark.slow
@pytest.mark.clean_process
def test_healing_of_which_a_process_dies_goes_on_in_one_process(jobs, alone, tmp_path, monkeypatch):
    recipe, _, options = next(job for job in jobs if job[1] == "healed")
    expected = alone("healed")
    words = [*words_for(recipe, tmp_path / "small"), "--batch-size", str(options["batch_size"])]
    killed = """
from exporter.healing import training
training.SAVE_EVERY, step_of = 2, training.one_step
def one_step(student, questions, settings, step):
    if rank == "1" and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of(student, questions, settings, step)
training.one_step = one_step
"""
    printed, codes = command(2, words, tmp_path, killed)
    (sentence,) = sentences(printed)
    assert "process 1 of 2 has ended without a word" in sentence and codes == ["2", ""]
    assert not (tmp_path / "small").exists() and (tmp_path / ".small.healing" / "training.state").exists()
    monkeypatch.setattr(teacher, "teacher_outputs", lambda *_: pytest.fail("all is answered already"))
    ran, step_of = [], training.one_step
    monkeypatch.setattr(training, "one_step", lambda *some: ran.append(some[-1]) or step_of(*some))
    with without_verification():
        assert main(words) == 0
    assert ran and ran[0] == 3
    for file in ("model.safetensors", ADAPTER_FILE):
        assert (tmp_path / "small" / file).read_bytes() == (expected / file).read_bytes()
    assert not list(tmp_path.glob(".small*"))


@pytest.mark.slow
@pytest.mark.clean_process
def test_what_one_process_finds_wrong_ends_all_with_its_sentence(jobs, questions, tmp_path):
    """The second image is looked at by the second process alone."""
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    images = [str(questions.parent / line["image"]) for line in lines]
    images[1] = "broken.png"
    data = tmp_path / "damaged.jsonl"
    data.write_text(
        "".join(json.dumps(line | {"image": image}) + "\n" for line, image in zip(lines, images, strict=True))
    )
    (tmp_path / "broken.png").write_bytes(b"no picture")
    recipe = yaml.safe_load(jobs[2][0].read_text())
    recipe["calibration"]["data"] = str(data)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    printed, codes = command(2, words_for(path, tmp_path / "small"), tmp_path)
    (sentence,) = sentences(printed)
    assert "broken.png" in sentence and codes == ["2", "2"]
    assert not list(tmp_path.glob("*small*"))


@pytest.mark.slow
@pytest.mark.clean_process
def test_processes_with_different_recipes_are_refused(jobs, tmp_path):
    for rank, (recipe, *_) in enumerate(jobs[:2]):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "recipe.yaml").write_text(recipe.read_text())
    printed, codes = command(2, words_for(Path("recipe.yaml"), tmp_path / "small"), tmp_path)
    (sentence,) = sentences(printed)
    assert "the processes of one run differ in the recipe: process 1 has not what process 0 has" in sentence
    assert codes == ["2", "2"] and not list(tmp_path.glob("*small*"))


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "small"],
        ["bench", "small"],
        ["compare", "recipe.yaml", "--out", "x"],
        ["search", "model", "--calibration", "c", "--task", "t", "--out", "x", "--speedup", "2"],
    ],
)
def test_what_several_processes_can_not_share_is_refused_by_the_first(words, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for rank, local_rank in (("0", "0"), ("1", "1"), ("1", "0"), ("1", None)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(words) == 2
        said = capsys.readouterr().err
        assert ("runs in one process, and 2 were started" in said) == (local_rank != "1"), "the first of each machine"
        assert local_rank != "1" or not said


def test_without_a_place_to_meet_a_process_is_alone(monkeypatch):
    """Schedulers and notebooks set some of what a launcher sets."""
    for name in ranks.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "3"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
        assert ranks.launched() == 1
    with ranks.joined("verify", ["compress"], []):
        assert ranks.world() == 1 and not ranks.is_silent()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert ranks.launched() == 8


def test_what_the_first_process_computes_for_all_is_whole(monkeypatch):
    """As in a dry run, which looks at all images; the others wait, and answer nothing that is asked of them."""
    group = ranks.Group(rank=0, world=2, local_rank=0, store=None)
    monkeypatch.setattr(ranks, "_group", group)
    monkeypatch.setattr(ranks, "_together", lambda call: None)

    def compute() -> list[int]:
        assert ranks.world() == 1 and ranks.total(3) == 3
        return ranks.gathered(ranks.share([1, 2, 3]))

    assert ranks.from_first(compute) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        ranks.from_first(lambda: 1 // 0)
    assert ranks.world() == 2 and list(ranks.share([1, 2, 3])) == [1, 3]


@pytest.mark.parametrize("cause", [None, OSError("full")])
def test_the_others_learn_whether_an_input_or_the_system_has_failed(cause, monkeypatch):
    """What is finished is kept where a disk is full, also where that was another process's (compression/stages.py)."""
    store = distributed.HashStore()  # type: ignore[attr-defined]
    groups = [ranks.Group(rank=rank, world=2, local_rank=rank, store=store) for rank in range(2)]
    error = InputError("no room")
    error.__cause__ = cause
    monkeypatch.setattr(ranks, "_silent", False)
    monkeypatch.setattr(ranks, "_group", groups[1])
    assert ranks._said_first(groups[1], error) and not ranks._said_first(groups[0], error)
    monkeypatch.setattr(ranks, "_group", groups[0])
    with pytest.raises(InputError, match="no room") as met:
        ranks.interrupted()
    assert isinstance(met.value.__cause__, OSError) == (cause is not None) and ranks.is_silent()


# --- sums -------------------------------------------------------------------------------------------------------------


def test_a_sum_is_the_same_bits_in_any_order_and_in_any_shares():
    noise = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-12, 6, 40)
    batches = [torch.randn(5, 7, generator=noise) * sizes[torch.randperm(40, generator=noise)[:7]] for _ in range(60)]
    largest = float(batches[0].abs().max())

    def parts_of(some: list[torch.Tensor]) -> list[torch.Tensor]:
        added = ExactSum(5, 7, largest=largest)
        for batch in some:
            added.add(batch)
        return added.parts

    def total_of(*shares: list[torch.Tensor]) -> torch.Tensor:
        coarse, fine = (sum(parts) for parts in zip(*map(parts_of, shares), strict=True))
        return coarse + fine

    alone = total_of(batches)
    assert torch.equal(alone, total_of(batches[::-1]))
    for number in (2, 3, 7):
        assert torch.equal(alone, total_of(*(batches[rank::number] for rank in range(number))))
    naive = [sum(batch.double() for batch in order) for order in (batches, batches[::-1])]
    assert not torch.equal(*naive), "added up in float64, it is not"
    torch.testing.assert_close(alone, naive[0], rtol=1e-12, atol=0)


def test_moments_are_the_products():
    noise, rows = torch.Generator().manual_seed(1), 50
    x, y = torch.randn(rows, 6, generator=noise), torch.randn(rows, 3, generator=noise)
    sums = MomentSums(6, 3, bounds_of(x[:5], y[:5]))
    for begin in range(0, rows, 5):
        sums.add(x[begin : begin + 5], y[begin : begin + 5])
    moments = sums.total()
    torch.testing.assert_close(moments.xx, x.double().T @ x.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.xy, x.double().T @ y.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.yy, y.double().square().sum(0), rtol=1e-5, atol=1e-5)
    assert moments.count == rows
