"""A recipe as data: frozen dataclasses to and from YAML, strictly. RunOptions has device, dtype and the like.

Imports nothing heavy: the command line reads it to explain usage.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError, nearest
from .methods import FOLDS, LOCALIZERS, LOSSES, Fold, Localizer, RouterLoss, fits, in_words, resolve
from .plain_data import check_keys, check_types, integers, is_whole, paths_as_text
from .plan import LayerBudget

T = TypeVar("T")
Rows = Mapping[str, Localizer] | Mapping[str, Fold] | Mapping[str, RouterLoss]  # a table of exporter/methods.py
DEFAULT_LOCALIZER, DEFAULT_FOLD = "best_of", "auto"
DEFAULT_SAMPLES = 512
ROUTER_SAMPLES = 5000  # as many as PAR's authors drew
ROUTER_STEPS = 300  # of training a router inside the decoder
SERVING_STEPS = 1200  # of a serving router, which has to say in rows what positions no longer say
HEAL_LOSS_NAMES = ("forward", "reverse", "symmetric")
HEAL_SAMPLES = 2048


@dataclass(frozen=True)
class Method:
    """A localizer or a fold with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def to_data(self) -> Any:
        return {"name": self.name, **self.options} if self.options else self.name


@dataclass(frozen=True)
class CalibrationData:
    """Images with questions, no labels: where they are and how many are drawn."""

    data: str  # JSONL file, folder of images, or 'datasets:ID'
    samples: int | None = DEFAULT_SAMPLES  # None: all
    columns: dict[str, str] = field(default_factory=dict)  # of a data set
    split: str = "train"
    prompt: str = "Describe this image."  # put to the images of a folder
    config: str | None = None  # of a data set that has several configurations
    allow_urls: bool = False  # fetch images that stand as web addresses
    frames: int | None = None  # the most to take of a video file, evenly spread; None: 8
    answer_tokens: int = 128  # that the model's own answer to a question may take
    answers: str | None = None  # file of answers that it gave elsewhere; None: it gives them here

    def __post_init__(self) -> None:
        paths_as_text(self, "data", "answers")
        if not is_whole(self.answer_tokens) or self.answer_tokens < 1:
            raise InputError(f"calibration: answer_tokens={self.answer_tokens!r}: a whole number from 1 up is needed.")

    @property
    def unanswered(self) -> CalibrationData:
        """Return the same questions without the answers, for what is trained on others than these."""
        return dataclasses.replace(self, answers=None)

    def to_data(self) -> Any:
        """Return 'data' alone where everything else is left to its default."""
        data = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name == "data" or getattr(self, f.name) != _default(f)
        }
        return data if len(data) > 1 else self.data


def refuse_answers(calibration: CalibrationData | None, why: str) -> None:
    """Raise InputError for answers given elsewhere where they are of no use."""
    if calibration is not None and calibration.answers is not None:
        raise InputError(f"{why}, which no file of answers holds: take 'answers' out of its calibration.")


NO_QUESTIONS = CalibrationData("")  # of a recipe that needs none: its layers are named or scored, nothing is folded
ASKED_ONCE_READ = ("metric", "suffix", "types")  # what becomes of a task's questions once they are read


@dataclass(frozen=True)
class TaskData:
    """Questions with answers, of a comparison: where they are, as `evaluate` takes them."""

    data: str  # JSONL or parquet file, or 'datasets:ID'
    columns: dict[str, str] = field(default_factory=dict)  # of a data set
    split: str | None = None  # None: the only one
    config: str | None = None
    allow_urls: bool = False
    frames: int | None = None  # the most to take of a video file, evenly spread; None: 8
    metric: str | None = None  # None: what its columns clearly ask for, else exact match
    suffix: str | None = None  # put behind every question
    types: tuple[str, ...] | None = None  # of questions that are put, by the column 'type'; None: all

    def __post_init__(self) -> None:
        paths_as_text(self, "data")

    @property
    def options(self) -> dict[str, Any]:
        """Return the arguments that read a task, beside where it is."""
        return {name: v for name, v in vars(self).items() if name not in ("data", *ASKED_ONCE_READ)}

    def to_data(self) -> Any:
        """Return 'data' alone where everything else is left to its default."""
        rest = {name: v for name, v in vars(self).items() if name not in (*ASKED_ONCE_READ, "frames") or v is not None}
        return rest if self != TaskData(self.data) else self.data


@dataclass(frozen=True)
class RouterRecipe:
    """A router that is trained for a checkpoint."""

    calibration: CalibrationData | None = None  # unlabelled questions; None: the compression's own, all of them
    steps: int | None = None  # None: ROUTER_STEPS, of a serving router SERVING_STEPS
    batch_size: int = 16
    learning_rate: float = 2e-3
    loss: Method = Method("importance")
    drop_at: int | None = None  # the layer before which visual tokens leave; None: 2, or the first that may be skipped
    candidates: int | None = None  # of the last layers, that may be skipped; None: half of them
    read_at: int | None = None  # the router reads what enters this layer, 0 the embeddings; None: drop_at
    seed: int = 0
    serve: bool = False  # a serving router: tokens leave between projector and decoder, no layer is skipped
    question_aware: bool = False  # a serving router that may be told the question

    def __post_init__(self) -> None:
        least_of = {"steps": 1, "candidates": 0, "drop_at": 0, "read_at": 0}
        wholes = {name: least for name, least in least_of.items() if getattr(self, name) is not None}
        for name, least in {"batch_size": 1, "seed": 0, **wholes}.items():
            if not is_whole(value := getattr(self, name)) or value < least:
                raise InputError(f"router: {name}={value!r}: a whole number from {least} up is needed.")
        if not isinstance(self.learning_rate, float | int) or not 0 < self.learning_rate < 1:
            raise InputError(f"router: learning_rate={self.learning_rate!r}: a number between 0 and 1 is needed.")
        refuse_answers(self.calibration, "router: it learns from the distributions behind the model's answers")

    @property
    def training_steps(self) -> int:
        return self.steps or (SERVING_STEPS if self.serve else ROUTER_STEPS)

    def to_data(self) -> dict[str, Any]:
        """Return plain data; what is left to defaults stays out."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)}
        if self.calibration is not None:
            data["calibration"] = self.calibration.to_data()
        if "loss" in data:
            data["loss"] = self.loss.to_data()
        return data


@dataclass(frozen=True)
class HealRecipe:
    """A smaller model that learns from unlabelled questions to say what the original says."""

    calibration: CalibrationData | None = None  # None: the compression's own questions
    teacher: str | None = None  # folder or hub id; None: the model that was compressed
    steps: int | None = None  # at most, held-out questions may stop it before; None: ten times the questions
    rank: int = 16  # of the updates
    learning_rate: float = 1e-3
    batch_size: int = 16
    exchanges: int = 9  # times that questions change places before the first pairs come again; 0: never
    loss: str = "forward"
    norms: bool = False  # learn the decoder layers' norms, too
    top: int = 64  # likeliest tokens that are kept of each of the original's distributions
    seed: int | None = None  # None: the compression's, so that the same questions are drawn and held out

    def __post_init__(self) -> None:
        paths_as_text(self, "teacher")
        wholes = {"steps": 1, "rank": 1, "batch_size": 1, "exchanges": 0, "top": 1, "seed": 0}
        for name, least in wholes.items():
            value = getattr(self, name)
            if name in ("steps", "seed") and value is None:
                continue
            if not is_whole(value) or value < least:
                raise InputError(f"heal: {name}={value!r}: a whole number from {least} up is needed.")
        if not isinstance(self.learning_rate, float | int) or not 0 < self.learning_rate < 1:
            raise InputError(f"heal: learning_rate={self.learning_rate!r}: a number between 0 and 1 is needed.")
        if self.loss not in HEAL_LOSS_NAMES:
            raise InputError(f"heal: loss '{self.loss}' is not known: {nearest(str(self.loss), HEAL_LOSS_NAMES)}")
        if not isinstance(self.norms, bool):
            raise InputError(f"heal: norms={self.norms!r}: true or false is needed.")
        if self.teacher is not None and not isinstance(self.teacher, str):
            raise InputError(f"heal: teacher must be a text, not {self.teacher!r}.")
        refuse_answers(self.calibration, "heal: it learns from the distributions behind the original's answers")

    def seeded(self, seed: int) -> HealRecipe:
        """Return the same with a seed, where it has none of its own."""
        return self if self.seed is not None else dataclasses.replace(self, seed=seed)

    def to_data(self) -> dict[str, Any]:
        """Return plain data; what is left to defaults stays out."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)}
        if self.calibration is not None:
            data["calibration"] = self.calibration.to_data()
        return data


@dataclass(frozen=True)
class Recipe:
    """One compression. Equal recipes on equal sources give equal checkpoints."""

    model: str
    calibration: CalibrationData
    budget: LayerBudget
    revision: str | None = None
    localizer: Method = Method(DEFAULT_LOCALIZER)
    fold: Method | None = None  # None: the default
    protect: tuple[int, ...] | None = None  # None: what the family needs
    keep_period: bool = False  # layers of different kinds take turns in the result as they do in the base model
    seed: int = 0
    base_model: str | None = None  # hub id that the card names where `model` is a local folder
    heal: HealRecipe | None = None  # after the fold, before the router
    router: RouterRecipe | None = None  # trained for the result; None: the result is a plain checkpoint

    def __post_init__(self) -> None:
        paths_as_text(self, "model")
        if not isinstance(self.model, str) or not self.model.strip():
            raise InputError(f"model must be a folder or a hub id, not {self.model!r}.")
        if not isinstance(self.revision, str | None):
            raise InputError(f"revision must be a text, not {self.revision!r}: put it in quotes.")
        if not is_whole(self.seed) or not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"seed must be a whole number from 0 to {LARGEST_SEED}, not {self.seed!r}.")
        named = self.base_model
        if named is not None and not (isinstance(named, str) and HUB_NAME.fullmatch(named)):
            raise InputError(f"base_model must be a name on the hub (USER/NAME), not {named!r}: the card links to it.")

    def needs_model(self, scored: bool) -> bool:
        """Tell whether a forward pass is needed: not where layers are named, or scored already, and nothing follows."""
        chosen = scored or self.budget.layers is not None or LOCALIZERS[self.localizer.name].control
        return not chosen or self.fold is None or self.fold.name != "none" or bool(self.heal or self.router)

    def to_data(self) -> dict[str, Any]:
        """Return plain data, as YAML and compression.json hold it; what is left to defaults stays out."""
        data: dict[str, Any] = {"model": self.model}
        if self.revision:
            data["revision"] = self.revision
        if self.calibration.data:
            data["calibration"] = self.calibration.to_data()
        data |= {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.budget).items() if v is not None}
        data["localizer"] = self.localizer.to_data()
        data |= {"fold": self.fold.to_data()} if self.fold is not None else {}
        if self.protect is not None:
            data["protect"] = list(self.protect)
        data |= {"keep_period": True} if self.keep_period else {}
        data["seed"] = self.seed
        if self.base_model:
            data["base_model"] = self.base_model
        return data | {name: part.to_data() for name in ("heal", "router") if (part := getattr(self, name)) is not None}


@dataclass(frozen=True)
class RunOptions:
    """Options of a run: none of them changes what the result is meant to be."""

    device: str | None = None  # None: the first GPU, else the CPU
    dtype: str = "auto"
    memory: str | None = None
    batch_size: int = 8


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


# --- reading ----------------------------------------------------------------------------------------------------------

LARGEST_SEED = 2**32 - 1  # of numpy's generators
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # old repositories have no user: bert-base-uncased
KIND_NAMES = {str: "text", Mapping: "a mapping", bool: "true or false"}
BUDGET_KEYS = tuple(f.name for f in dataclasses.fields(LayerBudget))
RECIPE_KEYS = (*(f.name for f in dataclasses.fields(Recipe) if f.name != "budget"), *BUDGET_KEYS)


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe's YAML. Unknown keys are errors that name the nearest known one."""
    return from_yaml(path, recipe_from_data)


def from_yaml(path: Path | str, parse: Callable[[Any], T]) -> T:
    """Return what `parse` makes of a YAML file; errors name the file."""
    import yaml

    path = Path(path).expanduser()
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would be read without end
            raise InputError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}, not a recipe.")
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"there is no recipe {path}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: other bytes, a date that there is not
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())[:300]}") from error
    try:
        return parse(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def recipe_from_data(data: Any) -> Recipe:
    check_keys(data, RECIPE_KEYS, "a recipe")
    if "model" not in data:
        raise InputError("a recipe needs 'model'.")
    budget = {key: data[key] for key in BUDGET_KEYS if data.get(key) is not None}
    if "layers" in budget:
        budget["layers"] = integers(budget["layers"], "layers")
    for key in ("drop_layers", "target_params"):
        if key in budget and not is_whole(budget[key]):
            raise InputError(f"{key} must be a whole number, not {budget[key]!r}.")
    if not (fits(ratio := budget.get("drop_ratio", 0.0), float) or (isinstance(ratio, float | int) and ratio < 0)):
        raise InputError(f"drop_ratio must be a number, not {budget['drop_ratio']!r}.")
    check_types(Recipe, data, ("keep_period",))
    protect = data.get("protect")
    return Recipe(
        model=data["model"],
        calibration=calibration_from_data(data["calibration"]) if "calibration" in data else NO_QUESTIONS,
        budget=LayerBudget(**budget),
        revision=data.get("revision"),
        localizer=read_method(data.get("localizer", DEFAULT_LOCALIZER), LOCALIZERS, "localizer"),
        fold=read_method(data["fold"], FOLDS, "fold") if data.get("fold") is not None else None,
        protect=None if protect is None else integers(protect, "protect"),
        keep_period=data.get("keep_period", False),
        seed=data.get("seed", 0),
        base_model=data.get("base_model"),
        heal=heal_from_data(data["heal"]) if data.get("heal") not in (None, False) else None,
        router=router_from_data(data["router"]) if data.get("router") not in (None, False) else None,
    )


def calibration_from_data(data: Any) -> CalibrationData:
    data = _named(CalibrationData, data, "calibration", "a JSONL file, a folder of images or datasets:ID")
    if isinstance(samples := data.get("samples"), bool) or not isinstance(samples, int | None):
        raise InputError(f"calibration: samples must be a whole number or null, not {samples!r}.")
    kinds = {"data": str, "columns": Mapping, "split": str, "prompt": str, "allow_urls": bool, "answers": str}
    _check_kinds(data, kinds, "calibration")
    return CalibrationData(**data)


def task_from_data(data: Any) -> TaskData:
    data = _named(TaskData, data, "task", "a JSONL file or datasets:ID")
    _check_kinds(data, {name: str for name in ("split", "metric", "suffix") if data.get(name) is not None}, "task")
    _check_kinds(data, {"data": str, "columns": Mapping, "allow_urls": bool}, "task")
    if (types := data.get("types")) is not None:
        if not isinstance(types, list) or not types or not all(isinstance(name, str) for name in types):
            raise InputError(f"task: types must be a list of texts, not {types!r:.80}.")
        data = {**data, "types": tuple(types)}
    return TaskData(**data)


def _named(cls: Any, data: Any, what: str, sources: str) -> Mapping[str, Any]:
    """Return a mapping with 'data' and whatever else is given; a text or path alone is 'data'. Raises InputError."""
    data = {"data": str(data)} if isinstance(data, str | Path) else data
    check_keys(data, [f.name for f in dataclasses.fields(cls)], what)
    if "data" not in data:
        raise InputError(f"{what} needs 'data': {sources}.")
    if not isinstance(config := data.get("config"), str | None):
        raise InputError(f"{what}: config must be a text, not {config!r}.")
    checked: Mapping[str, Any] = data
    return checked


def _check_kinds(data: Mapping[str, Any], kinds: Mapping[str, Any], what: str) -> None:
    for name, kind in kinds.items():
        if name in data and not isinstance(data[name], kind):
            raise InputError(f"{what}: {name} must be {KIND_NAMES[kind]}, not {data[name]!r}.")
    for pair in dict(data.get("columns", {})).items():
        if not all(isinstance(part, str) for part in pair):
            raise InputError(f"{what}: columns must map texts to texts, not {pair[0]!r} to {pair[1]!r}.")


def router_from_data(data: Any) -> RouterRecipe:
    """Read 'true', or a mapping of what is not left to defaults."""
    read = _settings(RouterRecipe, data, "router")
    check_types(RouterRecipe, read, ("serve", "question_aware"))
    if "loss" in read:
        read["loss"] = read_method(read["loss"], LOSSES, "loss")
    return RouterRecipe(**read)


def heal_from_data(data: Any) -> HealRecipe:
    """Read 'true', or a mapping of what is not left to defaults."""
    return HealRecipe(**_settings(HealRecipe, data, "heal"))


def _settings(cls: Any, data: Any, what: str) -> dict[str, Any]:
    read = {} if data is True else data
    check_keys(read, [f.name for f in dataclasses.fields(cls)], what)
    of_its_own = {"calibration": calibration_from_data(read["calibration"])} if read.get("calibration") else {}
    return {**read, **of_its_own}


def read_method(value: Any, table: Rows, kind: str) -> Method:
    """Read 'scp' or {'name': 'scp', 'k': 16}. Options are checked against the method itself when it runs."""
    options = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in table:
        raise InputError(f"{kind} '{name}' is not known: {nearest(str(name), tuple(table))}")
    return Method(name, options)


def check_method(method: Method, table: Rows, kind: str) -> None:
    """Check that the method's options are keyword-only arguments of its function and of the annotated types.

    Raises: InputError that names the option.
    """
    import inspect
    from typing import get_type_hints

    function = resolve(table[method.name].run)
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    hints = get_type_hints(function)
    for name, value in method.options.items():
        if name not in known:
            raise InputError(
                f"{kind} '{method.name}' has no option '{name}': " + (nearest(name, known) if known else "it has none.")
            )
        if not fits(value, hints[name]):
            raise InputError(f"{kind} '{method.name}': {name} must be {in_words(hints[name])}, not {value!r}.")
