"""Renders the model card, README.md of a compressed checkpoint, from its record; a person's own text in it stays.

Every figure in it was measured on that checkpoint and stands in compression.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoints.choice_types import FoldPart, JudgedPart, rounds_of
from ..checkpoints.json_file import read_json
from ..checkpoints.own_types import OWN_TYPES
from ..checkpoints.record import RECORD, CheckpointRecord, read_record
from ..checkpoints.record_types import HealPart, RouterPart, ServingPart
from ..errors import InputError
from ..families import OWN_FAMILIES
from ..localize.scores import LayerScores
from ..methods import fold_row, localizer_row
from ..models.divergence import Z
from .card_file import CARD, write_card
from .figures import EXACT_MATCH, describe, metric_figure, metric_title, score_name
from .licence import card_text, licence_sentence
from .plots import plot_scores, plot_training

LOADING = re.compile(r'from_pretrained\("([^"]+)"')


def card(folder: Path, name: str | None = None) -> Path:
    """Render README.md and the pictures of a compressed folder from its compression.json; own text in it stays.

    Args:
        name: hub id that it is or will be loaded by; None: the one that its card shows, or the folder's name.
    Raises: InputError where the folder is not one of ours, or its record is damaged.
    """
    from jinja2 import UndefinedError

    record = read_record(folder)
    name = name or shown_name(folder)
    try:
        data, text = metadata(record, name), body(record, name)
        draw(record, folder)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, UndefinedError) as error:
        raise InputError(
            f"{folder / RECORD} is damaged: a card can't be made from it ({type(error).__name__}: {error})."
        ) from error
    return write_card(folder, data, text)


def draw(record: CheckpointRecord, folder: Path) -> None:
    """Draw the layer scores and the router's training curve, where the record holds them, into `folder`/assets."""
    scores = record.scores
    if not localizer_row(scores.method).control and record.plan.drop:
        (folder / "assets").mkdir(exist_ok=True)
        plot_scores(
            LayerScores(scores.method, scores.values, scores.drop, scores.details),
            folder / "assets" / "layer_scores.png",
            record.protect,
        )
    for training, title, name in _trainings(record):
        (folder / "assets").mkdir(exist_ok=True)
        plot_training(training.curve, folder / "assets" / name, title)


def _trainings(record: CheckpointRecord) -> Iterator[tuple[RouterPart | ServingPart | HealPart, str, str]]:
    """Yield what was trained, with the title and the file of its curve."""
    if record.heal is not None:
        yield record.heal, "healing", "healing.png"
    if record.router is not None:
        yield record.router, "training the router", "router_training.png"
    if record.serving is not None:
        yield record.serving, "training the serving router", "serving_training.png"


def shown_name(folder: Path) -> str:
    """Return the name that a card loads its model by: the hub id that it shows already, else the folder's name."""
    shown = loading_name(folder)
    return shown if shown and shown.count("/") == 1 and shown[0] not in "./~" else folder.absolute().name


def loading_name(folder: Path) -> str | None:
    """Return the name in a card's loading example, None where there is none."""
    shown = LOADING.search(card_text(folder / CARD))
    return shown[1] if shown else None


def template(name: str) -> Any:
    """Return a template of `model_cards/`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
        lstrip_blocks=False,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(name)


def body(record: CheckpointRecord, name: str) -> str:
    """Render the card's text from a record, under the name that the model is loaded by."""
    import yaml

    data = record.to_data()
    fold = dict(data["fold"])
    row = fold_row(fold["name"])
    fold["title"], fold["link"] = row.title, row.link
    fold["places"] = _places(fold["tensors"])
    fold["sure"], fold["fell_back"] = sureness(record.fold), record.fold.fell_back
    rendered: str = template("compressed.md.jinja").render(
        data,
        evaluations=[e for e in data["evaluations"] if not e.get("budget")],
        budgets=[e for e in data["evaluations"] if e.get("budget")],
        routes=record.routes,
        several_references=len({e.reference_name for e in record.evaluations if e.reference is not None}) > 1,
        describe=describe,
        scored=score_name(metric_title(e) for e in data["evaluations"]) if data["evaluations"] else EXACT_MATCH,
        metric_figure=metric_figure,
        title=name.split("/")[-1],
        load_name=name,
        fold=fold,
        chosen=_choice(record),
        measured_scores=not localizer_row(record.scores.method).control,
        healed=is_healed(record),
        teacher_name=model_name(record.heal.teacher.name) if record.heal is not None else "",
        pct=_percent,
        ratio=ratio_cell,
        budget_name=budget_name,
        model_type=record.source.model_type,
        family_example=family.example if (family := OWN_FAMILIES.get(record.source.model_type)) else "",
        own_code=_own_code(record),
        recipe_yaml=yaml.safe_dump(record.recipe, sort_keys=False),
        base_sentence=_base_sentence(record),
        licence_sentence=licence_sentence(data["source"]),
    )
    return rendered


def _own_code(record: CheckpointRecord) -> str:
    """Return the modeling file of the folder that runs a type of ours, '' for every other type."""
    if (our_type := OWN_TYPES.get(record.source.model_type)) is None:
        return ""
    return f"{our_type.module if record.router is None else our_type.routed_module}.py"


def _base_sentence(record: CheckpointRecord) -> str:
    """Return what it is, and what of: 'This is [a/b](https://huggingface.co/a/b) with fewer layers.'"""
    source = record.source
    base = source.base_model
    named = f"[{base}](https://huggingface.co/{base})" if base else f"`{model_name(source.name).split('@')[0]}`"
    changes = ["in another format"] if record.conversion is not None else []
    if record.plan.drop:
        changes.append("with fewer layers")
    if is_healed(record):
        changes.append("healed by self-distillation")
    if record.router is not None:
        changes.append("with a router")
    if record.serving is not None:
        changes.append("with a serving router")
    return f"This is {named} {' and '.join(changes) or 'unchanged'}."


def is_healed(record: CheckpointRecord) -> bool:
    """Tell whether what healing learnt is in the weights."""
    return record.heal is not None and record.heal.kept


def template_folder() -> Path:
    """Return `model_cards/`: beside the package in the repository, inside it where it was installed."""
    here = Path(__file__).parent.parent
    inside = here / "model_cards"
    return inside if inside.is_dir() else here.parent / "model_cards"


def metadata(record: CheckpointRecord, name: str) -> str:
    """Return the YAML that the hub reads: base model and relation, licence, tags, measured results as model-index."""
    from huggingface_hub import EvalResult

    results = {
        (e["fingerprint"], str(e.get("budget")), e.get("metric")): EvalResult(
            task_type="image-text-to-text",
            dataset_type=e["task"],
            dataset_name=e["task"] + (f" ({describe(e['budget'])})" if e.get("budget") else ""),
            # The hub puts results of equal type, config, split and revision together, whatever their names.
            dataset_config=describe(e["budget"]) if e.get("budget") else None,
            dataset_revision=e["fingerprint"],
            metric_type=e.get("metric") or "exact_match",
            metric_value=round(e["accuracy"], 4),
            metric_name=f"{metric_title(e)}, n={e['n']}, 95% CI {e['interval'][0]:.3f}-{e['interval'][1]:.3f}",
        )
        for e in record.data[
            "evaluations"
        ]  # against another reference the same answers are as right: the last one counts
    }
    return hub_metadata(
        record.data["source"],
        name,
        library="transformers",
        tags=_tags(record),
        relation="finetune",
        results=[*results.values()],
    )


def hub_metadata(
    source: dict[str, Any], name: str, library: str, tags: list[str], relation: str, results: Any = ()
) -> str:
    """Return what the hub reads in a card, as YAML.

    Args:
        source: of a record: its base_model and license.
        relation: to the base model, where there is one: 'finetune', 'quantized'.
        results: EvalResults of the model-index.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        model_name=name.split("/")[-1],
        base_model=source["base_model"],
        license=source["license"].get("license"),
        license_name=source["license"].get("license_name"),
        license_link=source["license"].get("license_link"),
        library_name=library,
        pipeline_tag="image-text-to-text",
        tags=tags,
        eval_results=list(results) or None,
    )
    if source["base_model"]:
        data["base_model_relation"] = relation
    return data.to_yaml() + "\n"


def _tags(record: CheckpointRecord) -> list[str]:
    pruned = ["layer-pruning", "compressed", record.scores.method] if record.plan.drop else []
    has_router = record.router is not None or record.serving is not None
    routed = ["token-pruning", "custom_code"] if has_router else []
    if record.router is not None and record.router.settings.candidates:
        routed.append("layer-skipping")
    custom_code = ["custom_code"] if record.source.model_type in OWN_TYPES else []
    healed = ["distillation"] if is_healed(record) else []
    return list(dict.fromkeys(["lvlm-exporter", *pruned, *healed, *routed, *custom_code]))


def base_model_of(name: str, folder: Path, stated: str | None) -> str | None:
    """Return the hub id of the source: stated in the recipe, or the source itself, or what its own record says."""
    if stated:
        return stated
    if not Path(name).expanduser().is_dir():
        return name.removeprefix("hub:").split("@")[0]
    if (folder / RECORD).exists():
        recorded: str | None = read_json(folder / RECORD).get("source", {}).get("base_model")
        return recorded
    return None


def model_name(name: str) -> str:
    """Return what a card calls a model: its hub id, or its folder's name without the way to it."""
    return Path(name).absolute().name if Path(name).expanduser().is_dir() else name.removeprefix("hub:")


def _choice(record: CheckpointRecord) -> str:
    """Return how the layers were chosen, in a sentence."""
    row, data = localizer_row(record.scores.method), record.calibration
    if row.control:
        return row.title
    tokens = data.tokens
    counted = f" (at most {tokens['visual']:,} visual and {tokens['text']:,} text tokens in one pass)" if tokens else ""
    read, total = record.scores.details.get("questions", data.samples), data.samples
    questions = f"{total}" if read == total else f"{read} of {total}"
    told = f"They were chosen by [{row.title}]({row.link}) from {questions} unlabelled questions about images{counted}."
    return told + _next_set(record)


def _next_set(record: CheckpointRecord) -> str:
    """Return how sure the choice of the layers is, in a sentence; empty where no other set was judged with a fold."""
    rounds = rounds_of(record.scores.details)
    if not rounds or sorted(rounds[-1].chosen) != sorted(record.plan.drop):
        return ""
    others = [judged for judged in rounds[-1].sets if judged.drop != rounds[-1].chosen and judged.more is not None]
    if not others:
        return ""
    second = min(others, key=lambda judged: judged.kl)
    return (
        f" Of the other sets, layers {', '.join(map(str, second.drop))} came next: judged with a quick fold on "
        f"{second.questions} held-out questions, they would depart from the base model's answers by "
        f"{_difference(second)}."
    )


def _difference(judged: JudgedPart) -> str:
    """Return a paired difference of divergences in words, and whether it is within its noise."""
    more, error = judged.more or 0.0, judged.error
    if error is None:  # of one picture there is none
        return f"{abs(more):.4f} nats a token {'more' if more >= 0 else 'less'}"
    direction = "more" if more >= 0 else "less"
    noise = ", within its noise" if abs(more) <= Z * error else ""
    return f"{abs(more):.4f} ± {error:.4f} nats a token {direction} (paired, ± its standard error over pictures{noise})"


def sureness(fold: FoldPart) -> str:
    """Return how sure the choice of the fold is, in a paragraph; empty where nothing was held out."""
    chosen, without, other = fold.held_out, fold.without, fold.runner_up
    if chosen is None or without is None:
        return ""
    interval = ""
    if chosen.interval is not None:  # of one picture there is none
        low, high = chosen.interval
        interval = f" (95 % interval {low:.4f} to {high:.4f})"
    text = (
        f"This was chosen on {chosen.questions} held-out questions about pictures that nothing was fitted on: there "
        f"the divergence from the base model's own answers is {chosen.kl:.4f} nats a token{interval}"
    )
    if fold.name != "none":
        text += f", without a fold it would be {without.kl:.4f}"
    if other and other.name != "none":
        text += f", with the runner-up, `{other.name}`, {other.kl:.4f}"
    text += "."
    if chosen.state_error is not None and without.state_error is not None:
        text += (
            " The last hidden states where text is read and answers are said have a relative squared error (the "
            f"geometric mean of both) of {chosen.state_error:.4f}"
        )
        text += "." if fold.name == "none" else f", without a fold of {without.state_error:.4f}."
    if other and other.more is not None:
        name = "no fold" if other.name == "none" else f"`{other.name}`"
        text += f" With {name} it would be {_difference(other)}."
    return text


def _places(tensors: list[str]) -> str:
    """Return 'down_proj of layers 3, 7 and o_proj of layer 7' from "layer 3's mlp.down_proj.weight" and so on."""
    layers: dict[str, list[str]] = {}
    for tensor in tensors:
        layer, name = tensor.removeprefix("layer ").split("'s ")
        layers.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(layer)
    return " and ".join(
        f"{name} of {'layers' if len(numbers) > 1 else 'layer'} {', '.join(numbers)}"
        for name, numbers in layers.items()
    )


def ratio_cell(ratios: dict[str, Any], name: str) -> str:
    return "–" if ratios.get(name) is None else f"{ratios[name]:.3f}"


def budget_name(budget: dict[str, Any] | None) -> str:
    """Return 'keep_visual_tokens=144', as it is written in a call."""
    return ", ".join(f"{key}={value!r}" for key, value in (budget or {}).items() if value is not None) or "all of it"


def _percent(measured: dict[str, Any]) -> str:
    low, high = measured["interval"]
    return f"{100 * measured['accuracy']:.1f} % ({100 * low:.1f}–{100 * high:.1f})"
