"""Every kind of image file gives the pixels that a viewer shows, or one sentence."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import socket
import threading

import numpy as np
import pytest
from PIL import Image

from exporter.data.calibration import load_calibration
from exporter.data.images import Encoded, as_rgb, image_from, image_pixels, open_image, readable_formats
from exporter.errors import InputError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(content: bytes) -> Image.Image:
    return open_image(Encoded("a test", lambda: content), "here")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_s_orientation_is_applied(orientation):
    """As `load_image` of transformers does, which served models are asked through."""
    from transformers.image_utils import load_image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, exif=exif)
    turned = seen(content)
    assert turned.size == ((6, 10) if orientation > 4 else (10, 6))
    assert np.array_equal(turned, load_image("data:image/png;base64," + base64.b64encode(content).decode()))


def test_damaged_exif_is_no_orientation():
    content = encoded(Image.new("RGB", (8, 4), RED), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30)
    assert seen(content).size == (8, 4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(kind):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    shown = np.asarray(seen(encoded(Image.fromarray(values), kind)))
    assert shown[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (np.array([[0, 100, 255]], np.int32), "TIFF", [0, 100, 255]),
        (np.array([[0, 32896, 65535]], np.int32), "TIFF", [0, 128, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), "TIFF", [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), "TIFF", [0, 128, 255]),
        (np.array([[0.0, 100.0, 200.0]], np.float32), "TIFF", [0, 100, 200]),
        (np.array([[-2.0, 0.0, 2.0]], np.float32), "TIFF", [0, 128, 255]),
        (np.array([[300.0, 300.0]], np.float32), "TIFF", [0, 0]),
    ],
)
def test_wide_integers_and_floats(values, kind, expected):
    assert np.asarray(seen(encoded(Image.fromarray(values), kind)))[0, :, 0].tolist() == expected


def test_floats_that_are_none():
    with pytest.raises(InputError, match="here: the image holds NaN or infinite values"):
        seen(encoded(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "TIFF"))


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    return encoded(image, **({"transparency": 1} if transparent else {}))


def with_alpha(mode: str) -> bytes:
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (*BLUE, 0))
    return encoded(image.convert(mode))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (palette(False), [RED, BLUE]),
        (palette(True), [RED, (255, 255, 255)]),
        (with_alpha("RGBA"), [RED, (255, 255, 255)]),
        (with_alpha("LA"), [(76, 76, 76), (255, 255, 255)]),
        (encoded(Image.new("L", (2, 1), 7), transparency=7), [(255, 255, 255)] * 2),
        (encoded(Image.new("RGB", (2, 1), RED), transparency=RED), [(255, 255, 255)] * 2),
        (encoded(Image.new("1", (2, 1), 1)), [(255, 255, 255)] * 2),
        (encoded(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), [RED, RED]),
        (encoded(Image.new("HSV", (2, 1), (0, 255, 255)).convert("RGB")), [RED, RED]),
    ],
)
def test_palettes_transparency_and_other_colors(content, expected):
    image = seen(content)
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(2)] == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    shown = seen(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert shown.getpixel((0, 0)) == RED


def test_images_in_memory_are_converted_too():
    assert as_rgb(Image.new("LA", (2, 2), (9, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert image_pixels(Image.new("L", (3, 5))) == 15


# --- where an image is ------------------------------------------------------------------------------------------------


def lines(tmp_path, *records):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": "what?", **record}) + "\n" for record in records))
    return str(path)


def test_addresses_of_all_kinds(tmp_path):
    content = encoded(Image.new("RGB", (3, 2), RED))
    (tmp_path / "a b.png").write_bytes(content)
    word = base64.b64encode(content).decode()
    path = lines(
        tmp_path,
        {"image": "a b.png"},
        {"image": str(tmp_path / "a b.png")},
        {"image": f"file://{tmp_path}/a%20b.png"},
        {"image": f"data:image/png;base64,{word}"},
        {"image": f"DATA:image/png;charset=utf-8;base64,{word[:20]}\n{word[20:].rstrip('=')}"},
        {"image": "data:image/png;base64," + base64.urlsafe_b64encode(content).decode()},
        {"image": "data:image/png," + "".join(f"%{byte:02x}" for byte in content)},
        {"image": word},
        {"image": {"bytes": word, "path": None}},
        {"image": {"bytes": None, "path": "a b.png"}},
        {"images": [{"url": f"data:;base64,{word}"}]},
    )
    for sample in load_calibration(path, samples=None).samples:
        assert sample.open_images()[0].getpixel((2, 1)) == RED, sample.origin
        assert sample.pixels == 6
    assert load_calibration(path, samples=None).fingerprint


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,AAAA%%%", "holds no valid base64"),
        ("data:image/png;base64", "is no data URI: a comma"),
        ("data:image/png;base64,aGVsbG8=", r"a data URI can't be read as an image \(5 bytes\)"),
        ("x" * 5000 + ".png", r"there is no image .*\.\.\..* \([\d,]+ characters\)\.$"),
        ("a\0.png", "there is no image"),
        ("\ud800.png", "there is no image"),
        ("", "the name of an image is empty"),
        (".", "is a folder, not an image file"),
        ("http://localhost:1/a.png", "nothing is fetched unasked: download the image, or give --allow-urls"),
        ("HTTPS://localhost/a.png", "nothing is fetched unasked"),
        ("s3://bucket/a.png", "s3:// addresses are not read"),
        ("file://elsewhere/a.png", "names another machine"),
        (None, "a question without an image .*; of 1 questions none has one|is null"),
        ([None], "an image is null"),
        ([3], "an image is a path, not 3"),
        ([["a.png"]], "an image is a path, not"),
        ({"bytes": 7}, "the bytes of an image are int"),
        ({"bytes": None, "path": None}, "an image is a path, not"),
        ("truncated.png", r"truncated.png.* can't be read as an image \(\d+ bytes\)"),
        ("empty.png", r"empty.png.* can't be read as an image \(0 bytes\)"),
        ("text.png", r"can't be read as an image \(5 bytes\)"),
        ("nothing.png", "there is no image .*nothing.png"),
        ("bomb.png", "is larger than .* megapixels"),
        ("pipe.png", "is a named pipe, not an image file"),
        ("/dev/zero", "is a device, not an image file"),
        ("socket.png", "is a socket, not an image file"),
        ("broken-link.png", "there is no image"),
    ],
)
def test_what_is_no_image_is_one_sentence(image, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("1", (200, 200)).save("bomb.png")
    os.mkfifo("pipe.png")
    (tmp_path / "broken-link.png").symlink_to("nowhere.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        with pytest.raises(InputError, match=message) as told:
            load_calibration(lines(tmp_path, {"image": image}), samples=None).samples[0].open_images()
    assert "line 1" in str(told.value)
    assert len(str(told.value)) < 700


@pytest.mark.parametrize("name", ["program.eps", "program.png"])
def test_pictures_that_are_programs_are_not_run(name, tmp_path, monkeypatch):
    """Pillow would start Ghostscript for them, whatever the file is called."""

    def ran(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", ran)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "EPS")
    (tmp_path / name).write_bytes(buffer.getvalue())
    inline = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    for image in (name, inline):
        with pytest.raises(InputError, match=r"line 1: .* is PostScript \(EPS\): .* Convert it to PNG"):
            load_calibration(lines(tmp_path, {"image": image}), samples=None).samples[0].open_images()
    assert {"PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"} <= set(readable_formats())


def test_an_image_of_a_folder_is_named_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("hello")
    (tmp_path / "c.png").symlink_to("nowhere.png")
    for sample in load_calibration(str(tmp_path), samples=None).samples:
        with pytest.raises(InputError, match=r"named pipe|5 bytes|there is no image") as told:
            sample.open_images()
        assert str(told.value).count(".png") == 1


def test_a_folder_from_a_mac(tmp_path):
    folder = tmp_path / "photos"
    for place in ("", "__MACOSX", ".Trashes", "x.png"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    Image.new("RGB", (4, 4)).save(folder / "x.png" / "b.JPG", "JPEG")
    for place in ("._a.png", "__MACOSX/a.png", ".Trashes/a.png", ".DS_Store"):
        (folder / place).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    samples = load_calibration(str(folder), samples=None).samples
    assert [os.path.relpath(sample.images[0], folder) for sample in samples] == ["a.png", "x.png/b.JPG"]
    os.mkfifo(folder / "c.png")
    with pytest.raises(InputError, match=r"c\.png is a named pipe"):
        [sample.open_images() for sample in load_calibration(str(folder), samples=None).samples]


def test_web_images_are_fetched_on_request_and_once(tmp_path):
    content, asked = encoded(Image.new("RGB", (3, 2), RED)), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        path = lines(tmp_path, {"image": f"{address}/a.png"}, {"image": f"{address}/none.png"})
        found, missing = load_calibration(path, samples=None, allow_urls=True).samples
        assert asked == []
        assert [found.open_images()[0].getpixel((0, 0)) for _ in range(2)] == [RED, RED]
        assert asked == ["/a.png"]
        with pytest.raises(InputError, match=r"line 2: .*none.png can't be fetched \(HTTP Error 404"):
            missing.open_images()
        server.shutdown()


def test_bytes_as_a_table_has_them(tmp_path):
    content = encoded(Image.new("RGB", (3, 2), RED))
    for value in (content, {"bytes": content, "path": "a.png"}):
        assert open_image(image_from(value, tmp_path, "here"), "here").size == (3, 2)
