"""Frames of a video as a processor takes them, with or without torchvision.

The video processors of transformers do everything by themselves but a few operations on pixels, for which they call
torchvision. Where that is missing, these operations are done here and everything else stays theirs: sizes, patches,
frames in pairs, padding. Prompts with timestamps and numbers of tokens are the text processors' affair in any case.

Shapes: T frames, H x W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TORCHVISION = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)
LANCZOS = 1  # in PIL's numbers
MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # of torch, by PIL's numbers
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclass(frozen=True)
class Clip:
    """Some frames of a video, and when each of them is seen: after indices / fps seconds."""

    frames: tuple[Any, ...]  # RGB images of PIL of one size
    indices: tuple[float, ...]  # of each frame among all frames of the video
    total: float  # frames of the video
    fps: float  # of the video

    @property
    def metadata(self) -> dict[str, Any]:
        """Return what transformers calls the metadata of a video whose frames were chosen already."""
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.total / self.fps,
            "frames_indices": list(self.indices),
        }


class VideoError(ValueError):
    """A processor takes no videos, or not these together."""


def video_options(processor: Any, videos: list[list[Clip]]) -> dict[str, Any]:
    """Return the arguments of a processor for the videos of each chat; none where there are no videos.

    Raises: VideoError where it takes none, or only videos of as many frames together.
    """
    clips = [clip for row in videos for clip in row]
    if not clips:
        return {}
    check_takes_video(processor)
    counts = sorted({len(clip.frames) for clip in clips})
    if len(counts) > 1 and not has_grids(processor):
        in_one = any(len({len(clip.frames) for clip in row}) > 1 for row in videos)
        raise VideoError(
            f"{_name(processor)} takes videos of as many frames in one {'question' if in_one else 'batch'}, not of "
            f"{counts[0]} and {counts[-1]}: give them as many frames"
            + ("" if in_one else ", or set the batch size to 1")
        )
    import torch

    return {
        "videos": [  # [T, H, W, 3] each; by chats, as earlier releases count them
            [torch.stack([pixels_of(frame) for frame in clip.frames]) for clip in row] for row in videos
        ],
        "video_metadata": [clip.metadata for clip in clips],
        "do_sample_frames": False,
    }


def pixels_of(image: Any) -> Any:
    """Return the bytes of an RGB image, [H, W, 3]."""
    import torch

    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)


def has_grids(processor: Any) -> bool:
    """Tell whether patches of all videos are in one row, with the grid of each, so that any go together."""
    return "video_grid_thw" in getattr(processor.video_processor, "model_input_names", ())


def check_takes_video(processor: Any) -> None:
    """Raise VideoError for a processor that takes no videos, or can't here."""
    if getattr(processor, "video_token", None) is None:
        raise VideoError(f"{_name(processor)} takes no video: give its frames as several images, under 'images'")
    if getattr(processor, "video_processor", None) is None:
        raise VideoError(
            f"the video processor of {_name(processor)} needs torchvision, or its settings can't be read: install it, "
            "or give the frames as several images, under 'images'"
        )


def check_takes_both(processor: Any) -> None:
    """Raise VideoError for a processor that gives the pixels of images and of videos the same name (SmolVLM's)."""
    if "pixel_values" in getattr(processor.video_processor, "model_input_names", ()):
        raise _takes_one_kind(processor)


def check_told_apart(processor: Any, inputs: dict[str, Any]) -> None:
    """Raise VideoError where images and videos have one placeholder, so that the model takes all for images (GLM-4.1V).

    Args:
        inputs: that the processor made of both.
    """
    both = {"pixel_values", "pixel_values_videos"} <= inputs.keys()
    if both and not bool((inputs["input_ids"] == getattr(processor, "video_token_id", None)).any()):
        raise _takes_one_kind(processor)


def _takes_one_kind(processor: Any) -> VideoError:
    return VideoError(
        f"{_name(processor)} takes images or videos in one batch, not both: ask about them apart, with a batch size of "
        "1, or give the frames as several images, under 'images'"
    )


def _name(processor: Any) -> str:
    return type(processor).__name__.removeprefix("ImageOnly")


def number_words(number: int) -> str:
    """Spell a number below 1000 in English, as the package num2words does; digits from there."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{ONES[hundreds]} hundred" + (f" and {number_words(rest)}" if rest else "")
    return str(number)


# --- without torchvision ----------------------------------------------------------------------------------------------


def video_processor(folder: Path) -> Any:
    """Return the video processor that a folder names, without torchvision; None where it names none, or it needs more.

    The settings are read where transformers looks for them: processor_config.json, video_preprocessor_config.json, or
    those of the image processor, whose class then tells the video processor's.
    """
    try:
        from transformers.video_processing_utils import VideoProcessorMixin

        settings, _ = VideoProcessorMixin.get_video_processor_dict(folder)
        inferred = str(settings.get("image_processor_type") or "").removesuffix("Fast").removesuffix("Pil")
        name = settings.get("video_processor_type") or inferred.replace("ImageProcessor", "VideoProcessor")
        stock = _stock_class(str(name))
        return None if stock is None else without_torchvision(stock).from_pretrained(folder)
    except Exception:  # of other releases, of types that need more of torchvision, of damaged settings: no videos then
        return None


def _stock_class(name: str) -> Any:
    """Return a video processor class by its name; None where transformers has none of it."""
    import transformers.models

    type_name = name.removesuffix("VideoProcessor").lower()
    if type_name == name.lower():
        return None
    for module in pkgutil.iter_modules(transformers.models.__path__):
        if module.name.replace("_", "") == type_name:
            path = f"transformers.models.{module.name}.video_processing_{module.name}"
            with torchvision_by_name():
                return getattr(importlib.import_module(path), name)
    return None


@contextlib.contextmanager
def torchvision_by_name() -> Iterator[None]:
    """Let modules be imported that name torchvision at their top; they use it in annotations and in what is replaced.

    transformers has asked by then whether torchvision is there, and remembers that it is not.
    """
    from transformers.utils import is_torchvision_available

    added = []
    if not is_torchvision_available():
        added = [name for name in TORCHVISION if name not in sys.modules]
        for name in added:
            module = types.ModuleType(name)
            module.__path__ = []
            sys.modules[name] = module
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


@functools.cache
def without_torchvision(stock: Any) -> Any:
    """Return a video processor class with its operations on pixels in torch and PIL."""
    from transformers.image_processing_backends import TorchvisionBackend

    class Pixels(TorchvisionBackend):  # type: ignore[misc]
        """Comes after the stock class and before torchvision's in the order of resolution: it stands in for it."""

        def resize(self, image: Any, size: Any, resample: Any = None, **_: Any) -> Any:
            return resized(image, new_size(image, size), int(2 if resample is None else resample))

        def normalize(self, image: Any, mean: Any, std: Any, **_: Any) -> Any:
            import torch

            mean, std = (torch.as_tensor(value, dtype=image.dtype)[:, None, None] for value in (mean, std))
            return (image - mean) / std

        def center_crop(self, image: Any, size: Any, **_: Any) -> Any:
            return center_cropped(image, size.height, size.width)

    class WithoutTorchvision(stock, Pixels):  # type: ignore[misc]
        def convert_to_rgb(self, video: Any) -> Any:
            return video  # our frames are

    WithoutTorchvision.__name__ = WithoutTorchvision.__qualname__ = stock.__name__
    return WithoutTorchvision


def new_size(image: Any, size: Any) -> tuple[int, int]:
    """Return height and width after resizing [..., H, W]. Raises ValueError for a size of another kind."""
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge and not size.longest_edge:
        height, width = image.shape[-2:]
        longest = int(size.shortest_edge * max(height, width) / min(height, width))
        return (longest, size.shortest_edge) if height > width else (size.shortest_edge, longest)
    raise ValueError(f"frames can't be resized to {size} without torchvision.")


def resized(image: Any, size: tuple[int, int], resample: int) -> Any:
    """Resize [..., C, H, W] of bytes with antialiasing, as torchvision does: by torch's own functions, LANCZOS by PIL.

    Args:
        resample: in PIL's numbers. Raises KeyError for one that torch does not have.
    """
    import torch
    from PIL import Image

    frames = image.reshape(-1, *image.shape[-3:])
    if resample == LANCZOS:
        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
        smaller = [pixels_of(picture.resize(size[::-1], Image.Resampling.LANCZOS)) for picture in pictures]
        new = torch.stack(smaller).permute(0, 3, 1, 2)
    else:
        smooth = {} if MODES[resample] == "nearest" else {"antialias": True, "align_corners": False}
        new = torch.nn.functional.interpolate(frames, size, mode=MODES[resample], **smooth)
    return new.reshape(*image.shape[:-2], *size)


def center_cropped(image: Any, height: int, width: int) -> Any:
    """Cut the middle out of [..., H, W]; what is smaller gets a black border first."""
    from torch.nn import functional

    down, across = max(0, height - image.shape[-2]), max(0, width - image.shape[-1])
    if down or across:
        image = functional.pad(image, (across // 2, (across + 1) // 2, down // 2, (down + 1) // 2))
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]
