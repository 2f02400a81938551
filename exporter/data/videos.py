"""A video from what stands in a line: a list of its frames, as images, or a file that PyAV reads.

What a `Sample` holds is a `Video`: no frame is decoded before `open_video`.

Shapes: T frames of W x H pixels.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .images import Encoded, image_from, image_pixels, open_bytes, open_image, short

if TYPE_CHECKING:
    from ..clean_room import Clip

DEFAULT_FPS = 2.0  # of frames that come without a time: what Qwen's own tools sample, and take where nothing is said
DEFAULT_FRAMES = 8  # that are taken of a file
FRAME_KEYS = ("frames", "images")
FILE_KEYS = ("path", "video", "url", "video_url")
TIME_KEYS = ("fps", "timestamps")


@dataclass(frozen=True)
class Video:
    """The frames of a video and their times, or a file of which some frames are taken, evenly spread."""

    frames: tuple[Path | Encoded, ...] = ()
    fps: float = DEFAULT_FPS  # of the frames; a file knows its own
    timestamps: tuple[float, ...] | None = None  # seconds of each frame; None: by `fps`
    file: Path | None = None
    most_frames: int = DEFAULT_FRAMES  # that are taken of a file

    @functools.cached_property
    def pixels(self) -> int:
        """Return the pixels of all frames that are taken, by their headers; 0 where they can't be read."""
        if self.file is None:
            return sum(map(image_pixels, self.frames))
        try:
            with _opened(self.file, "") as stream:
                number = stream.frames or self.most_frames
                return int(stream.width * stream.height * min(number, self.most_frames))
        except InputError:
            return 0

    def contents(self, origin: str) -> Iterator[bytes]:
        """Yield what tells this video from others: how it is read, and the bytes of its files. Raises InputError."""
        yield repr((self.fps, self.timestamps, self.most_frames if self.file else len(self.frames))).encode()
        for part in self.frames or (self.file,):
            yield open_bytes(part, origin)

    def digest(self, origin: str) -> bytes:
        """Return SHA-256 over `contents`."""
        digest = hashlib.sha256()
        for content in self.contents(origin):
            digest.update(content)
        return digest.digest()


# --- what stands in a line --------------------------------------------------------------------------------------------


def video_from(
    value: Any, folder: Path, origin: str, *, times: Mapping[str, Any], frames: int | None, allow_urls: bool = False
) -> Video:
    """Find out what video a line names: a list of images, a file, or a mapping with either. Nothing is opened.

    Args:
        folder: what relative paths are relative to.
        times: 'fps' or 'timestamps' of the line, where the value has none of its own.
        frames: the most to take of a file; None: DEFAULT_FRAMES.
    Raises: InputError for what can be no video.
    """
    if isinstance(value, Mapping):
        times = {key: value[key] for key in TIME_KEYS if value.get(key) is not None} or times
        keys = [key for key in (*FRAME_KEYS, *FILE_KEYS) if value.get(key) is not None]
        if not keys:
            raise InputError(f"{origin}: a video has 'frames', a list of images, or 'path', a file; this has neither.")
        value = value[keys[0]]
    if isinstance(value, str | Path):
        return _from_file(str(value), folder, origin, times=times, frames=frames)
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{origin}: a video is a list of images or the path of a file, not {short(repr(value))}.")
    shown = tuple(image_from(frame, folder, origin, allow_urls=allow_urls) for frame in value)
    fps, timestamps = _times(times, len(shown), origin)
    return Video(shown, fps, timestamps)


def _from_file(name: str, folder: Path, origin: str, *, times: Mapping[str, Any], frames: int | None) -> Video:
    if times:
        raise InputError(f"{origin}: a video file knows its own times: take '{next(iter(times))}' out.")
    path = name.removeprefix("file://")
    if not path.strip() or "://" in path or path[:5].lower() == "data:":
        raise InputError(f"{origin}: the video {short(name)!r} is no path of a file: download it.")
    return Video(file=folder / path, most_frames=frames or DEFAULT_FRAMES)


def _times(times: Mapping[str, Any], number: int, origin: str) -> tuple[float, tuple[float, ...] | None]:
    """Return frames a second, and the seconds of each frame where they are given. Raises InputError."""
    if len(times) > 1:
        raise InputError(f"{origin}: a video has 'fps' or 'timestamps', not both.")
    fps = times.get("fps", DEFAULT_FPS)
    if not _is_number(fps) or fps <= 0:
        raise InputError(f"{origin}: fps={short(repr(fps))}: a number of frames a second above 0 is needed.")
    if (seconds := times.get("timestamps")) is None:
        return float(fps), None
    if not isinstance(seconds, list | tuple) or not all(map(_is_number, seconds)) or len(seconds) != number:
        raise InputError(f"{origin}: timestamps: a list of {number} numbers is needed, one for each frame, in seconds.")
    if seconds[0] < 0 or any(after <= before for before, after in itertools.pairwise(seconds)):
        raise InputError(f"{origin}: timestamps must rise from frame to frame, from 0 or later.")
    return float(fps), tuple(map(float, seconds))


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


# --- opening ----------------------------------------------------------------------------------------------------------


def open_video(video: Video, origin: str) -> Clip:
    """Return upright RGB frames of one size with their times. Raises InputError that names what can't be read."""
    from ..clean_room import Clip

    if video.file is not None:
        return _read(video.file, video.most_frames, origin)
    frames = tuple(open_image(frame, origin) for frame in video.frames)
    if other := next((frame for frame in frames if frame.size != frames[0].size), None):
        first = "{} x {}".format(*frames[0].size)
        raise InputError(
            f"{origin}: the frames of a video are of one size, and these are of {first} and {other.width} x "
            f"{other.height} pixels: resize them, or give them as several images, under 'images'."
        )
    if video.timestamps is None:
        return Clip(frames, tuple(range(len(frames))), len(frames), video.fps)
    return Clip(frames, video.timestamps, _duration(video.timestamps), fps=1.0)


def _duration(seconds: Sequence[float]) -> float:
    """Return the seconds that frames at these times stand for, the last one as long as the others on average."""
    if len(seconds) == 1:
        return 1 / DEFAULT_FPS
    return (seconds[-1] - seconds[0]) * len(seconds) / (len(seconds) - 1)


def chosen_frames(total: int, most: int) -> list[int]:
    """Return the frames of a file that are taken: the middles of as many equal parts, all where there are few."""
    number = min(total, most)
    return [(2 * part + 1) * total // (2 * number) for part in range(number)]


def _read(path: Path, most: int, origin: str) -> Clip:
    """Decode the chosen frames of a file, one pass from its begin. Raises InputError."""
    from ..clean_room import Clip

    with _opened(path, origin) as stream:
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        total = stream.frames
    taken = _decoded(path, origin, chosen_frames(total, most)) if total else {}
    if len(taken) < min(total, most) or not total:  # the container doesn't say how many, or says more than there are
        with _opened(path, origin) as stream:
            total = sum(1 for _ in stream.container.decode(stream))
        taken = _decoded(path, origin, chosen_frames(total, most)) if total else {}
    if not taken or fps <= 0:
        raise InputError(f"{origin}: {short(str(path))} holds no frames that can be read.")
    return Clip(tuple(taken.values()), tuple(taken), total, fps)


def _decoded(path: Path, origin: str, numbers: Sequence[int]) -> dict[int, Any]:
    """Return frames of a file by their numbers, RGB images; without those behind its end."""
    taken: dict[int, Any] = {}
    with _opened(path, origin) as stream:
        for number, frame in enumerate(stream.container.decode(stream)):
            if number in numbers:
                taken[number] = frame.to_image().convert("RGB")
            if len(taken) == len(numbers):
                break
    return taken


class _opened:  # noqa: N801 - a context manager, used as `with _opened(path, origin) as stream`
    """Open the first video stream of a file; whatever goes wrong with it until the end of the block is an InputError.

    Raises: InputError that says what to install, or that names the file.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self.path, self.origin = path, origin

    def __enter__(self) -> Any:
        try:
            import av
        except ImportError as error:
            raise InputError(
                f"{self.origin}: {short(str(self.path))} is a video file, which PyAV reads: pip install av, or give "
                "its frames as a list of images."
            ) from error
        if not self.path.is_file():
            raise InputError(f"{self.origin}: there is no video {short(str(self.path))}.")
        try:
            self.container = av.open(str(self.path))
        except Exception as error:  # av's errors are OSErrors, ValueErrors and types of its own
            raise self._unreadable() from error
        if not self.container.streams.video:
            self.container.close()
            raise self._unreadable()
        return self.container.streams.video[0]

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        self.container.close()
        if error is not None and not isinstance(error, InputError | KeyboardInterrupt):
            raise self._unreadable() from error

    def _unreadable(self) -> InputError:
        return InputError(f"{self.origin}: {short(str(self.path))} can't be read as a video. Replace it.")
