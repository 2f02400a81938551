"""One image from wherever a line or a data set has it, as the RGB pixels that a viewer would show.

What stands in a line: a path, a `file://` address, a data URI, base64, bytes, a dict of these as `datasets` stores it,
or an http(s) address where the user allows it. What a `Sample` holds is a `Path` or an `Encoded`: nothing is decoded,
and of a data set nothing is read, before `open_image`.

Shapes: images of W x H pixels.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import io
import os
import re
import stat
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

SHOWN = 80  # characters of a name in messages: a data URI has millions
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
BASE64 = re.compile(r"^[A-Za-z0-9+/_=\s-]{64,}$")
KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
WHITE = (255, 255, 255)  # what stands behind transparent pixels
SIXTEEN_BIT = 65535
PROGRAMS = ("EPS", "IPTC")  # Pillow hands the first to Ghostscript; the second may hold the first
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")


@dataclass(frozen=True)
class Encoded:
    """An image file that is not a file here: `read` gives its bytes whenever they are asked for."""

    name: str  # for messages
    read: Callable[[], bytes]

    def tobytes(self) -> bytes:
        """Return the bytes of the file, as PIL images return those of their pixels: what fingerprints are made of."""
        return self.read()


# --- what stands in a line --------------------------------------------------------------------------------------------


def image_from(value: Any, folder: Path, origin: str, *, allow_urls: bool = False) -> Path | Encoded:
    """Find out where an image is that a line or a row of a data set names. Nothing is opened.

    Args:
        folder: what relative paths are relative to.
        origin: 'file.jsonl line 3', for messages.
        allow_urls: http and https addresses may be fetched.
    Raises: InputError for what can be no image.
    """
    if isinstance(value, Path | Encoded):
        return value
    if isinstance(value, str):
        return _from_text(value, folder, origin, allow_urls)
    if isinstance(value, bytes | bytearray):
        return _encoded("bytes", bytes(value))
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return _encoded("bytes", _as_bytes(value["bytes"], origin))
        for key in ("path", "url", "image", "image_url", "base64", "data"):
            if value.get(key) is not None:
                return image_from(value[key], folder, origin, allow_urls=allow_urls)
    raise InputError(
        f"{origin}: an image is a path, not {short(repr(value))}. Give a path, a data URI, or {{'bytes', 'path'}}."
    )


def _as_bytes(value: Any, origin: str) -> bytes:
    """Decode bytes that JSON holds as base64."""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str):
        return _data_uri(f"data:;base64,{value}", origin)
    raise InputError(f"{origin}: the bytes of an image are {type(value).__name__}: base64 is needed.")


def _from_text(text: str, folder: Path, origin: str, allow_urls: bool) -> Path | Encoded:
    if not text.strip():
        raise InputError(f"{origin}: the name of an image is empty.")
    if text[:5].lower() == "data:":
        return _encoded("a data URI", _data_uri(text, origin))
    if scheme := SCHEME.match(text):
        return _from_address(text, scheme[1].lower(), origin, allow_urls)
    if len(text) >= 64 and BASE64.match(text) and not _is_there(folder / text):
        with_padding = "".join(text.split())
        try:
            content = base64.b64decode(with_padding + "=" * (-len(with_padding) % 4), validate=True)
        except ValueError:
            return folder / text
        if _looks_like_an_image(content):
            return _encoded("base64", content)
    return folder / text


def _from_address(text: str, scheme: str, origin: str, allow_urls: bool) -> Path | Encoded:
    if scheme == "file":
        address = urllib.parse.urlsplit(text)
        if address.netloc not in ("", "localhost"):
            raise InputError(
                f"{origin}: {short(text)} names another machine: write file:///PATH for a file on this one."
            )
        return Path(urllib.parse.unquote(address.path))
    if scheme not in ("http", "https"):
        raise InputError(f"{origin}: {scheme}:// addresses are not read ({short(text)}): download the image.")
    if not allow_urls:
        raise InputError(
            f"{origin}: {short(text)} is on the web, and nothing is fetched unasked: download the image, or give "
            "--allow-urls."
        )
    from .remote_images import fetched

    return Encoded(short(text), lambda: fetched(text))


def _data_uri(text: str, origin: str) -> bytes:
    """Decode `data:image/png;base64,...`; Raises InputError."""
    head, comma, body = text.partition(",")
    if not comma:
        raise InputError(f"{origin}: {short(text)} is no data URI: a comma must stand before the data.")
    body = "".join(urllib.parse.unquote(body).split()) if head.lower().endswith(";base64") else body
    if not head.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    body = body.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{origin}: the data URI {short(text)} holds no valid base64 ({error}).") from error


def _looks_like_an_image(content: bytes) -> bool:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.open(io.BytesIO(content), formats=readable_formats()).close()
        except Exception:
            return False
    return True


def _encoded(name: str, content: bytes) -> Encoded:
    return Encoded(name, lambda: content)


def short(text: str) -> str:
    """Shorten what a user wrote, for a message of one line."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]} ({len(text):,} characters)"  # a path is known by its end


# --- opening ----------------------------------------------------------------------------------------------------------


def open_image(image: Any, origin: str) -> Any:
    """Return upright RGB pixels. Raises InputError that names the image and where it was asked for."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return as_rgb(image)
    with _opened(image, origin) as file:
        return as_rgb(file)


def open_bytes(image: Any, origin: str) -> bytes:
    """Return the bytes of the file, or the pixels of an image of PIL. Raises InputError."""
    if isinstance(image, Path):
        _regular_size(image, short(str(image)), origin)
        return image.read_bytes()
    content: bytes = image.tobytes()
    return content


def image_pixels(image: Any) -> int:
    """Return W x H by the header; 0 for one that can't be read."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.width * image.height
    try:
        with _opened(image, "") as file:
            return int(file.width * file.height)
    except InputError:
        return 0


@contextlib.contextmanager
def _opened(image: Path | Encoded, origin: str) -> Iterator[Any]:
    """Open a PIL file; whatever goes wrong with it until the end of the block is an InputError."""
    from PIL import Image

    name = short(str(image) if isinstance(image, Path) else image.name)
    size = _regular_size(image, name, origin) if isinstance(image, Path) else None
    content: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF, of sizes: what matters is raised
        try:
            content = image if isinstance(image, Path) else io.BytesIO(image.read())
            size = content.getbuffer().nbytes if isinstance(content, io.BytesIO) else size
            with Image.open(content, formats=readable_formats()) as file:
                yield file
        except InputError as error:
            raise InputError(f"{origin}: {error}") from error
        except Image.DecompressionBombError as error:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
            raise InputError(
                f"{_at(origin, name)} is larger than {limit:.0f} megapixels, the most that Pillow opens. Make it "
                "smaller."
            ) from error
        except Exception as error:  # Pillow's readers raise what they like on damaged files, SyntaxError among them
            if _begin_of(content).startswith(POSTSCRIPT):
                raise InputError(
                    f"{_at(origin, name)} is PostScript (EPS): to see it, a program in it would have to be run. "
                    "Convert it to PNG."
                ) from error
            raise InputError(
                f"{_at(origin, name)} can't be read as an image ({size} bytes). Replace it or take the line out."
            ) from error


@functools.cache
def readable_formats() -> list[str]:
    """Return the formats that Pillow reads by itself, plug-ins included, without those that start a program."""
    from PIL import Image

    Image.init()
    return [name for name in Image.ID if name not in PROGRAMS]


def _begin_of(content: Any) -> bytes:
    """Return the first bytes of a file that Pillow could not open; none where it could not even be read."""
    if isinstance(content, io.BytesIO):
        return content.getvalue()[:16]
    with contextlib.suppress(OSError, AttributeError), content.open("rb") as file:
        begin: bytes = file.read(16)
        return begin
    return b""


def _at(origin: str, name: str, before: str = "") -> str:
    """Name the image and where it was asked for; an image of a folder is both."""
    return f"{before}{name}" if short(origin) == name else f"{origin}: {before}{name}"


def _regular_size(path: Path, name: str, origin: str) -> int:
    """Return the size of a file. Raises InputError for what is none: opening a named pipe would wait for ever."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # no such file, a name too long, a NUL in it
        if isinstance(error, PermissionError):
            raise InputError(f"{_at(origin, name)} may not be read (permission denied).") from error
        raise InputError(f"{_at(origin, name, 'there is no image ')}.") from error
    for is_kind, kind in KINDS.items():
        if is_kind(status.st_mode):
            raise InputError(f"{_at(origin, name)} is {kind}, not an image file.")
    if not os.access(path, os.R_OK):
        raise InputError(f"{_at(origin, name)} may not be read (permission denied).")
    return status.st_size


def _is_there(path: Path) -> bool:
    return os.path.exists(path)


# --- to RGB -----------------------------------------------------------------------------------------------------------


def as_rgb(image: Any) -> Any:
    """Turn the first frame upright and convert it to RGB, whatever it is made of.

    Transparent pixels show white. 16-bit gray keeps its 8 highest bits, where Pillow's own conversion makes everything
    above 255 white; wider integers and floats are read by their range (`_gray`).
    """
    upright = _upright(image)
    if upright.mode == "RGB":
        # RGB and gray PNGs name one color as transparent instead of having an alpha channel.
        return upright if "transparency" not in upright.info else _on_white(upright.convert("RGBA"))
    if upright.mode.startswith("I") or upright.mode == "F":
        return _gray(upright, png=image.format == "PNG").convert("RGB")
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        return _on_white(upright.convert("RGBA"))
    return upright.convert("RGB")


def _upright(image: Any) -> Any:
    """Apply the orientation that a camera noted; one that can't be read is none."""
    from PIL import ImageOps

    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF raises a dozen types; the pixels are sound
        return image.copy()


def _on_white(image: Any) -> Any:
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")


def _gray(image: Any, png: bool) -> Any:
    """Bring integers of 16 or 32 bits, or floats, to 8 bits.

    16 bits: the full range. 32-bit integers and floats say nothing of their range: values up to 255 (floats up to 1:
    up to 1) are taken as they are, integers up to 65535 as 16 bits, anything else from its smallest to its largest.
    Raises: ValueError for NaN and infinite values.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise InputError("the image holds NaN or infinite values.")
    if image.mode.startswith("I;16") or (image.mode == "I" and png):
        low, high = 0.0, float(SIXTEEN_BIT)
    elif low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if image.mode == "F" and high <= 1 else 255.0
    elif image.mode == "I" and low >= 0 and high <= SIXTEEN_BIT:
        low, high = 0.0, float(SIXTEEN_BIT)
    scaled = (values - low) / max(high - low, 1e-300) * 255
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
