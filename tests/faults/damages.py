"""Ways to damage a file. Each takes a seeded generator and the file's path, changes what lies there, and says how.

A damage that leaves a file of the same form behind, with another value of the same type in it, makes another input
rather than a broken one: `same_form` tells the two apart after the fact.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RECORDS = ("compression.json", "onnx.json")
MEASURED = ("evaluations", "benchmarks", "routes")  # of a record: lists that grow with what is measured
IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")
Damage = Callable[[random.Random, Path], str]

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.5, 1e308, -1e308, math.nan, math.inf, -math.inf, 1 << 31, 1 << 63,
    10**30, -(1 << 40), "", " ", "x", "0", "NaN", "null", "../../../etc/passwd", "/etc/passwd", "a" * 100_000, "\x00",
    "\ud800", "\u202e\u2028", "é" * 50, "{{", "%s%n", [], {}, [None], [[]], [1, "a", None], {"x": 1}, {"": {}}, [-1],
)  # fmt: skip


# --- any file ---------------------------------------------------------------------------------------------------------


def emptied(random: random.Random, path: Path) -> str:
    path.write_bytes(b"")
    return "empty"


def truncated(random: random.Random, path: Path) -> str:
    content = path.read_bytes()
    cut = random.choice((random.randrange(max(len(content), 1)), max(len(content) - 1, 0), min(7, len(content))))
    path.write_bytes(content[:cut])
    return f"cut to {cut} of {len(content)} bytes"


def flipped(random: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    places = sorted(random.randrange(len(content)) for _ in range(random.choice((1, 1, 1, 2, 8))) if content)
    for place in places:
        content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return f"bits flipped at {places}"


def flipped_early(random: random.Random, path: Path) -> str:
    """Flip bits where the headers are."""
    content = bytearray(path.read_bytes())
    places = sorted(random.randrange(min(len(content), 600)) for _ in range(random.choice((1, 2, 4))) if content)
    for place in places:
        content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return f"bits flipped at {places}"


def random_bytes(random: random.Random, path: Path) -> str:
    number = random.choice((1, 8, 1000))
    path.write_bytes(random.randbytes(number))
    return f"{number} random bytes"


def zeroed(random: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    start = random.randrange(max(len(content), 1))
    length = min(len(content) - start, random.choice((1, 16, 4096, 1 << 30)))
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    return f"{length} zeros from {start}"


def appended(random: random.Random, path: Path) -> str:
    rest = random.choice((b"\x00", b"}", b"garbage", b"\n\n", b"\xff\xfe", b"{}", random.randbytes(100)))
    with path.open("ab") as file:
        file.write(rest)
    return f"{rest[:12]!r} appended"


def doubled(random: random.Random, path: Path) -> str:
    path.write_bytes(path.read_bytes() * 2)
    return "its content twice"


def inserted(random: random.Random, path: Path) -> str:
    content = path.read_bytes()
    place = random.randrange(len(content) + 1)
    more = random.choice((b"\x00", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\r", b'"', b"\\", b"\n", b"{", b"]", b"%}"))
    path.write_bytes(content[:place] + more + content[place:])
    return f"{more!r} put in at {place}"


def recoded(random: random.Random, path: Path) -> str:
    text = path.read_bytes().decode("utf-8", "replace")
    code = random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp037"))
    path.write_bytes(text.encode(code, "replace"))
    return f"written as {code}"


def line_ends(random: random.Random, path: Path) -> str:
    end = random.choice((b"\r\n", b"\r", b"\n\n", b"\x0b", b"\xe2\x80\xa8"))
    path.write_bytes(path.read_bytes().replace(b"\n", end))
    return f"lines end with {end!r}"


def other_text(random: random.Random, path: Path) -> str:
    text = random.choice(
        (
            "<!DOCTYPE html><html><body>404</body></html>",
            "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n",
            "null", "[]", "{}", "0", '""', "true", "NaN", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "\n",
            "---\n",
        )
    )  # fmt: skip
    path.write_text(text)
    return f"holds {text[:24]!r} only"


def missing(random: random.Random, path: Path) -> str:
    path.unlink()
    return "missing"


def folder(random: random.Random, path: Path) -> str:
    path.unlink()
    path.mkdir()
    if random.random() < 0.5:
        (path / "x").write_text("x")
    return "a folder"


def pipe(random: random.Random, path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a named pipe"


def device(random: random.Random, path: Path) -> str:
    path.unlink()
    target = random.choice(("/dev/zero", "/dev/null", "/dev/full"))
    path.symlink_to(target)
    return f"a link to {target}"


def link(random: random.Random, path: Path) -> str:
    kept = path.read_bytes()
    path.unlink()
    where = random.choice(("nowhere", "itself", "a folder", "the same bytes outside"))
    if where == "nowhere":
        path.symlink_to("not-there")
    elif where == "itself":
        path.symlink_to(path.name)
    elif where == "a folder":
        elsewhere = Path.cwd() / "elsewhere"  # an empty one: what lies in another differs from run to run
        elsewhere.mkdir()
        path.symlink_to(elsewhere)
    else:
        outside = Path.cwd() / "outside"
        outside.write_bytes(kept)
        path.symlink_to(outside)
    return f"a link to {where}"


def unreadable(random: random.Random, path: Path) -> str:
    path.chmod(0)
    return "not readable"


ANY: tuple[Damage, ...] = (
    emptied, truncated, truncated, flipped, flipped, flipped_early, random_bytes, zeroed, appended, doubled, inserted,
    inserted, other_text, missing, folder, pipe, device, link, unreadable,
)  # fmt: skip
TEXT: tuple[Damage, ...] = (*ANY, recoded, recoded, line_ends)


# --- JSON and YAML ----------------------------------------------------------------------------------------------------


def places(data: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value below the top of a document."""
    if isinstance(data, dict | list):
        for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
            yield (*above, key)
            yield from places(value, (*above, key))


def changed(random: random.Random, data: Any) -> str:
    """Change one value or key of a document in place."""
    found = list(places(data))
    if not found:
        return "nothing to change"
    depth = random.randrange(1, 1 + max(map(len, found)))  # each depth as often: most values lie deep
    path = random.choice([place for place in found if len(place) <= depth])
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    key, shown = path[-1], ".".join(map(str, path))[:80]
    what = random.choice(("set", "set", "set", "type", "type", "removed", "removed", "wrapped", "renamed", "swapped"))
    if what == "removed":
        del parent[key]
    elif what == "wrapped":
        parent[key] = random.choice(([parent[key]], {"x": parent[key]}, [parent[key]] * 2))
    elif what == "renamed" and isinstance(parent, dict):
        parent[random.choice((f"{key}x", str(key).upper(), "", f" {key}"))] = parent.pop(key)
    elif what == "swapped":
        other = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
        shown += f" with {other}"
    elif what == "type":
        parent[key] = other_type(random, parent[key])
    else:
        what, parent[key] = "set", random.choice(ODD_VALUES)
    tail = f" to {parent[key]!r:.40}" if what in ("set", "type") else ""
    return f"{shown} {what}{tail}".encode(errors="backslashreplace").decode()


def other_type(random: random.Random, value: Any) -> Any:
    """The value said in another type, or another value of the same type."""
    if isinstance(value, bool):
        return random.choice((int(value), str(value).lower(), not value))
    if isinstance(value, int | float):
        return random.choice((str(value), float(value), -value, value + 1, value * 1000, [value], value == 0))
    if isinstance(value, str):
        return random.choice(
            ([value], {"name": value}, value.upper(), value[:-1], value + "x", value.encode().hex(), 3)
        )
    if isinstance(value, list):
        return random.choice(({}, str(value), dict(enumerate(map(str, value))), value * 2, value[:-1], value[::-1]))
    return random.choice(([], "x", 0, None, {}))


def json_changed(random: random.Random, path: Path) -> str:
    data = json.loads(path.read_text())
    said = [changed(random, data) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    path.write_text(json.dumps(data, indent=random.choice((None, 2))))
    return "; ".join(said)


def key_twice(random: random.Random, path: Path) -> str:
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or not data:
        return "nothing to double"
    key = random.choice(list(data))
    value = other_type(random, data[key])
    path.write_text(json.dumps(data)[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}")
    return f"{key} twice"


def deep(random: random.Random, path: Path) -> str:
    data = json.loads(path.read_text())
    depth = random.choice((50, 900, 3000, 100_000))
    text = json.dumps(data)
    nested = "[" * depth + "]" * depth
    if isinstance(data, dict) and data:
        key = random.choice([*data, "unknown_key"])
        text = json.dumps({k: v for k, v in data.items() if k != key} | {key: "NESTED"})
    path.write_text(text.replace('"NESTED"', nested) if '"NESTED"' in text else nested)
    return f"{depth} lists in each other"


JSON: tuple[Damage, ...] = (*TEXT, *(json_changed,) * 34, key_twice, deep)


def line_changed(random: random.Random, path: Path) -> str:
    """Change a line of a JSONL file."""
    lines = path.read_text().split("\n")[:-1]
    number = random.randrange(len(lines))
    data = json.loads(lines[number])
    what = random.choice(("value", "value", "value", "value", "gone", "twice", "broken", "blank", "joined", "other"))
    said = what
    if what == "value":
        said = changed(random, data)
        lines[number] = json.dumps(data)
    elif what == "gone":
        del lines[number]
    elif what == "twice":
        lines.insert(number, lines[number])
    elif what == "broken":
        lines[number] = lines[number][: random.randrange(1, len(lines[number]))]
    elif what == "blank":
        lines.insert(number, random.choice(("", "   ", "\t")))
    elif what == "joined":
        lines[number] += lines[number - 1]
        del lines[number - 1]
    else:
        lines[number] = random.choice(("null", "[]", "3", '"x"', "{}", "[" * 5000, "NaN", '{"index": true}'))
    path.write_text("".join(line + "\n" for line in lines))
    return f"line {number + 1}: {said}"


LINES: tuple[Damage, ...] = (*TEXT, *(line_changed,) * 34)


def yaml_changed(random: random.Random, path: Path) -> str:
    import yaml

    data = yaml.safe_load(path.read_text())
    said = changed(random, data)
    path.write_text(yaml.safe_dump(data, allow_unicode=True))
    return said


def yaml_odd(random: random.Random, path: Path) -> str:
    more = random.choice(
        (
            "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: *c\n",
            "x: !!python/object/apply:os.system [true]\n", "when: 2026-13-45\n", "when: 2026-01-01\n", "on: yes\n",
            "seed: 0o17\n", "seed: 1_000\n", "seed: 1:30\n", "<<: {seed: 1}\n", "? [a, b]\n: c\n", "\tseed: 1\n",
            "seed: 1\nseed: 2\n", "---\nseed: 1\n", "seed: .nan\n", "seed: 1e3\n", "seed: ~\n", "&x seed: *x\n",
            "1: 2\n",
            "a: &loop [*loop]\n", "seed: !!binary aGFsbG8=\n", "seed: !!set {a, b}\n", "model: *nobody\n",
        )
    )  # fmt: skip
    path.write_text(path.read_text() + more)
    return f"{more!r} at its end"


YAML: tuple[Damage, ...] = (*TEXT, *(yaml_changed,) * 30, *(yaml_odd,) * 10)


# --- safetensors ------------------------------------------------------------------------------------------------------


def header_changed(random: random.Random, path: Path) -> str:
    """Change the JSON that a safetensors file begins with; its data stay."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    what = random.choice(("value", "value", "value", "tensor", "tensor", "tensor", "length"))
    if what == "length":
        number = random.choice((0, 1, length - 1, length + 1, length + 8, 1 << 40, (1 << 64) - 1, 100 << 20))
        path.write_bytes(struct.pack("<Q", number) + content[8:])
        return f"header length {number}"
    if what == "value":
        said = changed(random, header)
    else:
        name = random.choice([key for key in header if key != "__metadata__"])
        said = f"{name}: {_tensor_changed(random, header, name)}"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return said


def _tensor_changed(random: random.Random, header: dict[str, Any], name: str) -> str:
    entry = header[name]
    what = random.choice(("dtype", "shape", "transposed", "offsets", "shifted", "other's data", "renamed", "gone"))
    start, end = entry["data_offsets"]
    if what == "dtype":
        entry["dtype"] = random.choice(("F16", "BF16", "F64", "I32", "I8", "U64", "F8_E4M3", "F4", "f32", "", "BOOL"))
    elif what == "shape":
        entry["shape"] = random.choice(([], [0], [-1], [1 << 40], [*entry["shape"], 1], entry["shape"][:-1], [2.5]))
    elif what == "transposed":
        entry["shape"] = entry["shape"][::-1]
    elif what == "offsets":
        entry["data_offsets"] = random.choice(
            ([end, start], [0, 0], [start], [start, end, end], [-4, end], [0, 1 << 50])
        )
    elif what == "shifted":
        entry["data_offsets"] = [start + 4, end + 4]
    elif what == "other's data":
        other = random.choice([key for key in header if key != "__metadata__"])
        entry["data_offsets"] = header[other]["data_offsets"]
    elif what == "renamed":
        header[random.choice((f"{name}x", name.replace("layers.1", "layers.99"), "../x", ""))] = header.pop(name)
    else:
        del header[name]
    return what


def weights_changed(random: random.Random, path: Path) -> str:
    """Put numbers that are none into the data."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    number = random.choice((math.nan, math.inf, -math.inf))
    room = (len(content) - 8 - length) // 4
    if room <= 0:
        return "nothing to change"
    places = [random.randrange(room) for _ in range(random.choice((1, 100)))]
    for place in places:
        content[8 + length + 4 * place : 12 + length + 4 * place] = struct.pack("<f", number)
    path.write_bytes(content)
    return f"{number} in {len(places)} places"


WEIGHTS: tuple[Damage, ...] = (*ANY, *(header_changed,) * 14, *(weights_changed,) * 5)


# --- templates, images, tables, states --------------------------------------------------------------------------------


def template_changed(random: random.Random, path: Path) -> str:
    text = path.read_text()
    bad = random.choice(
        (
            "{% for %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages[99] }}", "{{ nobody.nothing }}",
            "{% if %}", "{{ messages | nofilter }}", "{% include 'x' %}", "{{ ''.__class__.__mro__ }}", "{{ namespace",
            "{% set x = messages.pop() %}", "{{ strftime_now(1) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{% for a in range(100000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}", "{% generation %}",
            "<image>",
        )
    )  # fmt: skip
    if path.suffix == ".json":
        data = json.loads(text)
        data["chat_template"] = random.choice((bad, data["chat_template"] + bad, bad + data["chat_template"]))
        path.write_text(json.dumps(data))
    else:
        path.write_text(random.choice((bad, text + bad, bad + text)))
    return f"the template with {bad[:40]!r}"


TEMPLATE: tuple[Damage, ...] = (*TEXT, *(template_changed,) * 20)


def image_changed(random: random.Random, path: Path) -> str:
    """Another kind of picture, or a header that lies."""
    from PIL import Image

    what = random.choice(("bomb", "mode", "format", "tiny", "text", "frames", "chunk"))
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if what == "bomb":
        size = random.choice(((1 << 31) - 1, 60_000, 0))
        body = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + path.read_bytes()[33:])
        return f"a header of {size} x {size} pixels"
    if what == "mode":
        mode = random.choice(("L", "1", "P", "LA", "RGBA", "I;16", "I", "F"))
        _of_mode(image, mode).save(path, "TIFF" if mode in ("I", "F") else "PNG")  # PNG has at most 16 bits
        return f"mode {mode}"
    if what == "format":
        format = random.choice(("JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"))
        image.save(path, format)
        return f"{format} under its name"
    if what == "tiny":
        width, height = random.choice(((1, 1), (1, 300), (300, 1), (2, 2)))
        image.resize((width, height)).save(path, "PNG")
        return f"{width} x {height} pixels"
    if what == "frames":
        image.save(path, "GIF", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
        return "an animation"
    content = path.read_bytes()
    if what == "chunk":
        start = random.randrange(8, len(content))
        path.write_bytes(content[:start] + content[start + random.randrange(1, 40) :])
        return f"a piece gone at {start}"
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return "an SVG"


def _of_mode(image: Any, mode: str) -> Any:
    """Return an image in a mode of PIL; one of 16 bits or more shows the same brightness as one of 8."""
    import numpy
    from PIL import Image

    if mode not in ("I;16", "I", "F"):
        return image.convert(mode)
    grey = numpy.asarray(image.convert("L"))
    kinds = {"I;16": grey.astype("<u2") * 257, "I": grey.astype("<i4") * 257, "F": grey.astype("<f4") / 255}
    return Image.fromarray(kinds[mode])


IMAGE: tuple[Damage, ...] = (*ANY, *(image_changed,) * 14)


def table_changed(random: random.Random, path: Path) -> str:
    """Change a column of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    names = table.column_names
    name = random.choice(names)
    index, rows = names.index(name), table.num_rows
    what = random.choice(("gone", "null", "numbers", "text", "lists", "no rows", "renamed", "twice"))
    if what == "gone":
        table = table.drop_columns([name])
    elif what == "no rows":
        table = table.slice(0, 0)
    elif what == "renamed":
        table = table.rename_columns([f"{each}x" if each == name else each for each in names])
    elif what == "twice":
        table = table.append_column(name, table[name])
    else:
        values = {"null": [None] * rows, "numbers": list(range(rows)), "text": ["x"] * rows, "lists": [["a"]] * rows}
        table = table.set_column(index, name, pyarrow.array(values[what]))
    pyarrow.parquet.write_table(table, path)
    return f"column {name}: {what}"


TABLE: tuple[Damage, ...] = (*ANY, *(table_changed,) * 16)


def state_changed(random: random.Random, path: Path) -> str:
    """Change an entry of what torch.save has written."""
    import torch

    state = torch.load(path, weights_only=True)
    said = changed(random, state)
    torch.save(state, path)
    return said


STATE: tuple[Damage, ...] = (*ANY, *(state_changed,) * 24)


def front_matter_changed(random: random.Random, path: Path) -> str:
    """Change what stands between the two lines of a card's front matter."""
    import yaml

    text = path.read_text()
    _, matter, body = text.split("---\n", 2)
    data = yaml.safe_load(matter)
    if random.random() < 0.7:
        said = changed(random, data)
        matter = yaml.safe_dump(data, allow_unicode=True)
    else:
        said = random.choice(
            ("a: [", "license: [a, b]\n", "license: 3\n", "- x\n", "\tx: 1\n", "license: &a [*a]\n", "")
        )
        matter = said if random.random() < 0.5 else matter + said
    path.write_text(f"---\n{matter}---\n{body}")
    return f"front matter: {said!r:.80}"


CARD: tuple[Damage, ...] = (*TEXT, *(front_matter_changed,) * 20)


# --- afterwards -------------------------------------------------------------------------------------------------------


def same_form(before: bytes, after: bytes, name: str) -> bool:
    """Tell whether a damaged file is as well-formed as it was: another value, but no wrong one that could be seen."""
    ending = Path(name).suffix
    try:
        if Path(name).name == "tokenizer.json":
            return _as_tokenizers(*(json.loads(text) for text in (before, after)))
        if Path(name).name in IMAGE_SETTINGS:
            before, after = (json.dumps(_as_lists(json.loads(text))).encode() for text in (before, after))
        if Path(name).name in RECORDS:
            before = json.dumps(_measured(json.loads(before), json.loads(after))).encode()
        if ending == ".json":
            return _alike(*(_without_private(_without_ids(json.loads(text))) for text in (before, after)))
        if ending == ".jsonl":
            return _lines_alike(before, after)
        if ending in (".yaml", ".yml"):
            import yaml

            old, new = yaml.safe_load(before), yaml.safe_load(after)
            added = {key: value for key, value in new.items() if key not in old}  # what is no key is refused
            emptied: dict[str, list[Any]] = {
                key: [] for key, value in new.items() if value == [] and isinstance(old.get(key), list)
            }
            return _alike(old | added | emptied, new)
        if ending == ".safetensors":
            return _weights_alike(before, after)
        if ending in (".png", ".jpg"):
            return _is_picture(after)
        if ending == ".parquet":
            return _is_table(before, after)
        if ending == ".md":
            return True  # whatever a person writes into a card stays
        return after.decode("utf-8") != "" and b"\x00" not in after
    except (ValueError, OSError, KeyError, TypeError, RecursionError, struct.error, SyntaxError):
        return False
    except Exception as error:  # of the packages that were asked: yaml's, pyarrow's, PIL's
        return type(error).__module__.partition(".")[0] not in ("yaml", "pyarrow", "PIL", "builtins")


def _alike(before: Any, after: Any) -> bool:
    """Keys that were there before, with values of the same types; numbers finite, and of the same sign.

    JSON has one type of numbers: a whole one may stand where another may.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() >= after.keys() and all(_alike(before[key], after[key]) for key in after)
    if isinstance(before, dict) and before.get("type") == "text" and isinstance(after, str):
        return True  # a part of a turn, as its text alone
    if isinstance(before, list) and isinstance(after, list):
        return bool(after) >= bool(before) and all(any(_alike(old, new) for old in before) for new in after)
    if type(before) is not type(after) and (type(before), type(after)) != (float, int):
        return False
    return not isinstance(after, int | float) or (math.isfinite(after) and (after < 0) <= (before < 0))


def _as_tokenizers(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Tell whether a tokenizer.json is one still: any words, each with an id of its own.

    A word of another spelling makes other ids of a question, and nothing in the folder says which words were meant: a
    vocabulary is whatever its file says. The rest of the file must be of the same form as it was.
    """
    old, new = copy.deepcopy(before), copy.deepcopy(after)
    old["model"].pop("vocab")
    words = new["model"].pop("vocab")
    ids = [index for index in words.values() if type(index) is int and index >= 0]
    return len(set(ids)) == len(words) and _alike(old, new)


def _measured(record: Any, other: Any) -> Any:
    """Empty a record's lists of measurements that are empty in the other: none need have been made."""
    if not isinstance(record, dict) or not isinstance(other, dict):
        return record
    return record | {key: [] for key in MEASURED if isinstance(record.get(key), list) and other.get(key) == []}


def _without_ids(data: Any) -> Any:
    """Leave out the 'id' of the rows of a list: nobody reads it, under whatever name."""
    if not isinstance(data, list):
        return data
    return [
        {k: v for k, v in row.items() if k.strip().lower() not in ("id", "idx", "")} if isinstance(row, dict) else row
        for row in data
    ]


def _without_private(data: Any) -> Any:
    """Leave out what transformers notes for itself, such as '_pad_token_id': no configuration reads it."""
    if not isinstance(data, dict):
        return data
    return {k: v for k, v in data.items() if not k.startswith("_") or k == "_name_or_path"}


def _as_lists(data: Any) -> Any:
    """Write what images are scaled by as a list: one number for all channels is well-formed too."""
    if not isinstance(data, dict):
        return data
    scaled = {key: [data[key]] for key in ("image_mean", "image_std") if isinstance(data.get(key), int | float)}
    return data | scaled


def _as_read(rows: list[Any]) -> list[Any]:
    """Leave out of questions what may be anything: their type, and entries that nobody reads, under whatever name.

    Several images are as well-formed as one of them.
    """
    read = ("question", "answer", "choices")
    return [
        {k: v for k, v in row.items() if k in read} | {"image": _first_image(row.get("image"))}
        if isinstance(row, dict)
        else row
        for row in rows
    ]


def _first_image(image: Any) -> Any:
    several = isinstance(image, list) and image and all(isinstance(name, str) for name in image)
    return image[0] if several else image


def _lines_alike(before: bytes, after: bytes) -> bool:
    old = [json.loads(line) for line in before.decode().split("\n") if line.strip()]
    new = [json.loads(line) for line in after.decode().split("\n") if line.strip()]
    if "question" in old[0]:
        old, new = _as_read(old), _as_read(new)
    return bool(new) and all(any(_alike(line, known) or _alike(known, line) for known in old) for line in new)


def _weights_alike(before: bytes, after: bytes) -> bool:
    """The same header, or one whose entries only changed places; the data finite."""
    import numpy

    def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
        (length,) = struct.unpack("<Q", content[:8])
        return json.loads(content[8 : 8 + length]), content[8 + length :]

    (old, data_before), (new, data) = parts(before), parts(after)
    old.pop("__metadata__", None)
    new.pop("__metadata__", None)
    if not _same_entries(old, new) or len(data) != len(data_before):
        return False
    return bool(numpy.isfinite(numpy.frombuffer(data, "<f4")).all())


def _same_entries(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Tell whether headers name the same tensors: which of two of one shape holds which values nobody can tell."""

    def shapes(header: dict[str, Any]) -> dict[str, Any]:
        return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}

    def ranges(header: dict[str, Any]) -> list[Any]:
        return sorted(entry["data_offsets"] for entry in header.values())

    return shapes(old) == shapes(new) and ranges(old) == ranges(new)


def _is_picture(content: bytes) -> bool:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        image.load()
    return True


def _is_table(before: bytes, after: bytes) -> bool:
    import pyarrow
    import pyarrow.parquet

    old, new = (pyarrow.parquet.read_table(pyarrow.BufferReader(content)) for content in (before, after))
    rest = [[field for field in table.schema if field.name != "type"] for table in (old, new)]  # a type is of any kind
    return rest[0] == rest[1] and new.num_rows > 0


def clear(folder: Path) -> None:
    """Remove a case's folder, whatever its damage was."""
    for path in folder.rglob("*"):
        if not path.is_symlink() and not os.access(path, os.R_OK):
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
