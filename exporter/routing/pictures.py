"""Pictures of routes: the visual tokens that stay, over the image, and the layers that run, a question a picture.

Shapes: V visual tokens of an image, H x W pixels, L layers.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cards.plots import KEPT, PROTECTED, save
from ..checkpoints.files import is_snapshot
from ..checkpoints.record import RECORD, check_updatable, read_record, write_record
from ..clean_room import greedy_answers
from ..data.batches import make_batch
from ..data.samples import Sample
from ..modeling.routed_route import Budget, Route
from .rules import Rule, make_route

FADED, GRAY = 0.25, 0.6  # a dropped patch shows a quarter of its colour on gray, which images hold little of
PICTURES = 4  # of a checkpoint, in its card
ANSWER_TOKENS = 32  # of the answer over a picture


@dataclass(frozen=True)
class PatchGrid:
    """One grid of visual tokens over an image, and which of them stay."""

    kept: Tensor  # [rows, columns] bool

    def mask(self, height: int, width: int) -> np.ndarray[Any, Any]:
        """Return True at the pixels of kept tokens, [height, width]."""
        rows = np.arange(height) * self.kept.shape[0] // height
        columns = np.arange(width) * self.kept.shape[1] // width
        return np.asarray(self.kept.numpy()[rows[:, None], columns[None]])


def grids(coordinates: Tensor, kept: Tensor) -> list[PatchGrid]:
    """Return the grids of one image, in order: a finer one or a further tile begins where the rows begin again.

    Args:
        coordinates: [V, 2] row and column, 0 to 1; a column of 1 is the end of a line, which shows nothing.
        kept: [V]
    """
    inside = coordinates[:, 1] < 1
    coordinates, kept = coordinates[inside], kept[inside]
    starts = [0, *(torch.nonzero(coordinates[1:, 0] < coordinates[:-1, 0])[:, 0] + 1).tolist(), len(coordinates)]
    grids = []
    for begin, end in itertools.pairwise(starts):
        part = coordinates[begin:end]
        (rows, row), (columns, column) = (torch.unique(part[:, axis], return_inverse=True) for axis in (0, 1))
        cells = torch.zeros(len(rows), len(columns), dtype=torch.bool)
        cells[row, column] = kept[begin:end]
        grids.append(PatchGrid(cells))
    return grids


def image_grids(route: Route, sequence: int) -> list[list[PatchGrid]]:
    """Return for each image of a sequence its grids."""
    visual = route.visual[sequence].cpu()
    coordinates, kept = route.coordinates[sequence].cpu()[visual], route.keep[sequence].cpu()[visual]
    numbers = coordinates[:, 0].long()
    return [grids(coordinates[numbers == n, 1:], kept[numbers == n]) for n in numbers.unique().tolist()]


def draw_route(images: Sequence[Any], route: Route, sequence: int, question: str, answer: str, path: Path) -> None:
    """Draw one picture: each grid of each image with what was left out faded, and the layers below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (image, grid) for image, grids in zip(images, image_grids(route, sequence), strict=True) for grid in grids
    ]
    layers = route.layers[sequence].tolist()
    drawn = pyplot.figure(figsize=(max(3.2, 2.2 * len(panels)), 3.3), layout="constrained")
    parts: Any = drawn.subfigures(2, 1, height_ratios=(5, 1))
    above, below = parts
    for axes, (image, grid) in zip(np.atleast_1d(above.subplots(1, len(panels))), panels, strict=True):
        pixels = np.asarray(image, dtype=float) / 255
        mask = grid.mask(*pixels.shape[:2])[..., None]
        faded = FADED * pixels + (1 - FADED) * GRAY
        axes.imshow(np.where(mask, pixels, faded), interpolation="nearest")
        axes.set_title(f"{int(grid.kept.sum())} of {grid.kept.numel()} tokens", fontsize="small")
        axes.set_axis_off()
    axes = below.subplots()
    colors = [KEPT if runs else "white" for runs in layers]
    axes.bar(range(len(layers)), 1, color=colors, edgecolor=PROTECTED, width=0.85)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(0, len(layers), max(1, len(layers) // 12)))
    axes.tick_params(length=0, labelsize="small")
    axes.set_xlabel(f"{sum(layers)} of {len(layers)} layers run", fontsize="small")
    drawn.suptitle("\n".join(textwrap.wrap(f"{question} {answer}", 60)), fontsize="medium")
    save(drawn, path)


def show_routes(folder: Path, model: Any, processor: Any, samples: Sequence[Sample], budget: Budget) -> bool:
    """Draw what the router keeps of a few questions, for a checkpoint's card. False: not ours, nothing is drawn."""
    if not (folder / RECORD).exists() or is_snapshot(folder):
        return False
    check_updatable(folder)
    routes = draw_examples(model, processor, samples=spread_out(samples), budget=budget, folder=folder)
    write_record(folder, read_record(folder).to_data() | {"routes": routes})
    return True


def draw_examples(
    model: Any, processor: Any, samples: Sequence[Sample], budget: Budget, folder: Path, rule: Rule | None = None
) -> list[dict[str, str]]:
    """Draw a few questions into `folder`/assets; return what the record says of them.

    Args:
        model: a routed one, whose router chooses unless there is a rule.
    """
    (folder / "assets").mkdir(exist_ok=True)
    pictures = []
    for number, sample in enumerate(samples[:PICTURES]):
        batch = make_batch([sample], processor, model.config).to(model.device)
        route = make_route(model, batch, budget, rule or Rule("router", "router"))
        answers = greedy_answers(model, batch.inputs, ANSWER_TOKENS, route=route)
        answer = processor.tokenizer.decode(answers[0], skip_special_tokens=True)
        images = pictures_shown(sample, processor, number=len(image_grids(route, sequence=0)))
        if images is None:
            continue
        file = Path("assets") / f"route_{number}.png"
        question = question_of(sample)
        draw_route(images, route, sequence=0, question=question, answer=answer.strip(), path=folder / file)
        pictures.append({"file": str(file), "question": question})
    return pictures


def pictures_shown(sample: Sample, processor: Any, number: int) -> list[Any] | None:
    """Return the images of a question or the frames of its videos, as the model sees them, one for each of its grids.

    Args:
        number: of grids; of frames that the model sees in pairs, each pair has one, and the first is shown.
    Returns: None where there are others than these, or both kinds, whose order is the chat template's affair.
    """
    images = [as_seen(image, processor) for image in sample.open_images()]
    videos = [clip.frames for clip in sample.open_videos()]
    if images and videos:
        return None
    for step in (1, 2):
        shown = images or [frame for frames in videos for frame in frames[::step]]
        if len(shown) == number:
            return shown
    return None


def question_of(sample: Sample) -> str:
    content = next(turn for turn in reversed(sample.messages) if turn["role"] == "user")["content"]
    text = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
    return " ".join(text.split())


def as_seen(image: Any, processor: Any) -> Any:
    """Cut the part that the model sees: processors that crop (CLIP's for LLaVA 1.5) take the middle square."""
    image_processor = processor.image_processor
    if not getattr(image_processor, "do_center_crop", False) or hasattr(image_processor, "image_grid_pinpoints"):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def spread_out(samples: Sequence[Sample], number: int = PICTURES) -> list[Sample]:
    """Return a few samples of different types of question, as far as there are, and of different images."""
    first: dict[str, Sample] = {}
    step = max(1, len(samples) // (8 * number))
    for sample in samples[::step]:
        first.setdefault(sample.type or question_of(sample), sample)
    return list(first.values())[:number]
