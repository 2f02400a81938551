"""The shape of the code, as a test: who may import whom, sizes, names, and what documents say of the command line."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.cli import parser
from exporter.modeling.released import shipped_files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "exporter"
# The floors, from the bottom: a folder or file imports from its own folder and from floors below, never from its own
# floor's other rooms or from above. docs/architecture.md and CONTRIBUTING.md show the same table.
FLOORS = (
    ("errors", "version", "progress", "clean_room", "modeling"),
    ("families", "methods", "ranks"),
    ("plan", "plain_data", "probe"),
    ("checkpoints", "recipe"),
    ("data",),
    ("models",),
    ("localize",),
    ("fold", "cards"),
    ("compression", "healing", "routing", "onnx", "conversion"),
    ("pipeline", "evaluation", "benchmark", "survey"),
    ("comparison", "publishing", "report"),
    ("outcome",),
    ("cli",),
    ("plugins", "__init__", "__main__"),
)
LARGEST_FILE = 450  # lines
LARGE_FUNCTION = 40  # lines
LARGE_SHARE = 0.01  # of all functions


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in source_files():
        yield path, ast.parse(path.read_text())


def dotted_name(path: Path) -> str:
    """Return a file's name as an import writes it, 'exporter.' left out; '' is the package itself."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted_name(path): path for path in source_files()}


def room(name: str) -> str:
    return name.split(".")[0] or "__init__"


def imported(path: Path, tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield every name that a file imports, wherever it does: (dotted name, whether it is this package's own)."""
    package = list(path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, False
        elif isinstance(node, ast.ImportFrom) and not node.level:
            own = (node.module or "").split(".")[0] == "exporter"
            yield (node.module or "").removeprefix("exporter.") if own else node.module or "", own
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield (full if full in MODULES else ".".join(base)), True


def own_imports(path: Path, tree: ast.Module) -> set[str]:
    return {name for name, own in imported(path, tree) if own} - {dotted_name(path)}


def foreign_imports(path: Path) -> set[str]:
    """Return the packages that a file needs beside the standard library; this one's modules as 'exporter.…'."""
    tree = ast.parse(path.read_text())
    names = {f"exporter.{name}" if own else name.split(".")[0] for name, own in imported(path, tree)}
    return names - set(sys.stdlib_module_names)


def test_every_room_has_a_floor():
    rooms = {room(name) for name in MODULES}
    assert rooms == {name for floor in FLOORS for name in floor}


def test_imports_point_down():
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = []
    for path, tree in trees():
        mine = room(dotted_name(path))
        for name in own_imports(path, tree):
            if room(name) not in (mine, "__init__") and mine not in FLOORS[-1] and height[room(name)] >= height[mine]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    needs = {dotted_name(path): own_imports(path, tree) - {""} for path, tree in trees()}
    del needs[""]  # the package's own table of names, which is read when one is used
    settled: set[str] = set()
    while free := {name for name, needed in needs.items() if name not in settled and needed & needs.keys() <= settled}:
        settled |= free
    # what is left leans on a circle; packages whose __init__ gathers their own files are no circle by themselves
    assert not sorted(needs.keys() - settled)


def test_the_wheel_holds_the_package():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel.keys() == {"packages", "force-include"} and wheel["packages"] == ["exporter"]
    assert wheel["force-include"]["model_cards"] == "exporter/model_cards"
    assert (PACKAGE / "py.typed").exists()


def test_the_namespace_of_optimums_plug_ins_stays_one():
    # An __init__.py there would hide optimum's own packages, or be one of theirs (PEP 420).
    assert not list((PACKAGE / "plugins" / "optimum").rglob("__init__.py"))


def test_files_and_functions_are_small():
    assert not [f"{path}: {n}" for path in source_files() if (n := len(path.read_text().splitlines())) > LARGEST_FILE]
    functions = [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(PACKAGE)}:{node.name}")
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    large = sorted(one for one in functions if one[0] > LARGE_FUNCTION)
    assert len(large) <= LARGE_SHARE * len(functions), large


def test_no_two_public_classes_share_a_name():
    places: dict[str, list[str]] = {}
    for path, tree in trees():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_nobody_imports_a_private_name_of_another_file():
    wrong = [
        f"{path.relative_to(PACKAGE)}: {alias.name}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("exporter"))
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not wrong


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document):
    """By their path from the root, and by links."""
    text = document.read_text()
    names = [ROOT / name for name in re.findall(r"`((?:exporter|tests|docs|examples)/[\w./-]+)`", text)]
    names += [document.parent / name for name in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)]
    assert not [str(name) for name in names if not name.exists()]


def test_files_that_docstrings_name_exist():
    """Of the package, its tests, its documents' scripts and its examples."""
    wrong = []
    published = ROOT / "tests" / "fixtures" / "published"  # as releases wrote them
    folders = ("exporter", "tests", "docs", "examples")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py") if published not in path.parents):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            for name in re.findall(
                r"(?<![\w/.-])((?:exporter|tests|examples|docs)/[\w/.-]+\.\w+)", ast.get_docstring(node) or ""
            ):
                if not (ROOT / name).exists():
                    wrong.append(f"{path.relative_to(ROOT)} names {name}")
    assert not wrong


def test_contributing_says_where_each_thing_is_added():
    """A row for each, and the tables that it names are in the files that it names."""
    rows = re.findall(r"^\| (an? [^|]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
    questions = ("a localizer", "a fold", "a family of models", "a metric", "a subcommand", "an ONNX family")
    assert set(questions) <= {what for what, *_ in rows}
    for what, where, _ in rows:
        (file,) = re.findall(r"`([\w/]+\.py)`", where)
        for table in re.findall(r"`([A-Z]+)`", where):
            assert re.search(rf"^{table}\b", (ROOT / file).read_text(), flags=re.M), (what, table)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_documents_show_the_floors(document):
    """Each floor is a row of the document's table, in this order."""
    shown = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / document).read_text(), flags=re.M)
    rows = [tuple(re.findall(r"`([\w]+)(?:\.py|/)?`", names)) for _, names in shown]
    assert rows == list(FLOORS)


PRIVATE_WORDS = frozenset("one own found made said given of asked wanted".split())


def bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every name that a file binds: variables, arguments, functions, classes, fields, errors, imports renamed.

    A class's own `of` is left out: one reads it behind the class, `Rate.of(values)`, or it is an entry of a record.
    """
    members = {
        id(member.target) if isinstance(member, ast.AnnAssign) else id(member)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for member in node.body
    }
    for node in ast.walk(tree):
        name: str | None = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler | ast.MatchAs):
            name = node.name
        elif isinstance(node, ast.alias):
            name = node.asname
        if name is not None and not (name == "of" and id(node) in members):
            yield getattr(node, "lineno", 0), name


def test_names_say_what_they_hold():
    """'found' may be a match, a folder or forty candidates: a reader has to go back to its making to know which."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path, tree in trees()
        for line, name in bound_names(tree)
        if name in PRIVATE_WORDS
    ]
    assert not wrong


MOST_BY_POSITION = 4  # arguments of a call


def is_of_the_package(call: ast.Call, here: set[str], methods: set[str]) -> bool:
    """Tell whether a call is surely one of our own functions: by a name of this file, `self.`, `cls` or a class.

    Args:
        here: functions and classes that the file defines or imports from the package.
        methods: functions of all classes of the package.
    """
    called = call.func
    if isinstance(called, ast.Name):
        return called.id in here or called.id == "cls"
    if not isinstance(called, ast.Attribute) or called.attr not in methods or not isinstance(called.value, ast.Name):
        return False
    return called.value.id in ("self", "cls") or (called.value.id in here and called.value.id[0].isupper())


def test_many_arguments_are_passed_by_name():
    """Five values in a row say nothing of what they are, and two that change places are no error."""
    functions = [node for _, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    classes = [node for _, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {member.name for node in classes for member in node.body if isinstance(member, ast.FunctionDef)}
    of_any_number = {node.name for node in functions if node.args.vararg is not None}
    wrong = []
    for path, tree in trees():
        here = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                here |= {alias.asname or alias.name for alias in node.names}
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > MOST_BY_POSITION)
        for call in calls:
            if is_of_the_package(call, here - of_any_number, methods - of_any_number):
                wrong.append(f"{path.relative_to(PACKAGE)}:{call.lineno} {ast.unparse(call.func)}")
    assert not wrong


NO_VERBS = frozenset(
    "A All An Another As At Both By Each Equal Every Everything Exact Exactly For From How If In It Its Kept Known "
    "Last Left No None Not Nothing Of On One Only Plain Real Right So Some That The These They This Those To Under "
    "What When Where Whether Which Who Whole Why With Without Wrong".split()
)


def test_docstrings_of_functions_begin_with_a_verb():
    """'Return the route', not 'The route' and not 'Returns the route'; properties may be named by a noun."""
    wrong = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (text := ast.get_docstring(node)):
                continue
            if any(ast.unparse(mark).endswith("property") for mark in node.decorator_list):
                continue
            first = text.split()[0].rstrip(",:.")
            is_verb = re.fullmatch(r"[A-Z][a-z]+", first) and first not in NO_VERBS
            if not is_verb or (first.endswith("s") and not first.endswith("ss")):
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.name}: {text.splitlines()[0]}")
    assert not wrong


def test_the_clean_room_needs_nothing_of_ours():
    for path in (PACKAGE / "clean_room").glob("*.py"):
        used = {name for name in foreign_imports(path) if not name.startswith("exporter.clean_room")}
        onnx = {"numpy", "onnx"} if "onnx" in path.name else set()  # onnxruntime comes with the runner
        assert used <= {"torch", "transformers", "PIL"} | onnx, path


def test_the_onnx_runner_needs_neither_torch_nor_the_rest_of_the_package():
    for path in (PACKAGE / "onnx" / "runtime").glob("*.py"):
        used = {name for name in foreign_imports(path) if not name.startswith("exporter.onnx.runtime")}
        # without the last two as well: its clean process has no exporter, and only names of the hub need the hub
        assert used <= {"numpy", "onnxruntime", "huggingface_hub", "exporter.errors"}, path


def test_what_travels_with_a_checkpoint_needs_nothing_of_ours():
    for path in shipped_files():
        used = {name for name in foreign_imports(path) if not name.startswith("exporter.modeling")}
        assert used <= {"torch", "transformers", "safetensors"}, path  # transformers cannot do without safetensors


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()  # hatch takes every file of the package into the wheel


def test_hooks_are_in_one_file():
    """Of models in capture.py; of the small ones that a probe disturbs in writes.py."""
    with_hooks = {path.name for path in source_files() if "register_forward" in path.read_text()}
    assert with_hooks == {"capture.py", "writes.py"}


@pytest.mark.clean_process
@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"import sys; sys.argv = ['lvlm-exporter', *{arguments!r}]\nfrom exporter.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nprint(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[-1] == "[]"


def documented_commands() -> list[str]:
    """Return every `lvlm-exporter ...` line of the documents and of the subcommands' help."""
    commands = []
    for path in (
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("examples/**/*.yaml"),
    ):
        text = path.read_text().replace("\\\n", " ")
        if path.suffix == ".md":
            text = "\n".join(
                re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S) + re.findall(r"`([^`\n]+)`", text)
            )
        for line in text.splitlines():
            if match := re.match(r"\s*(?:\$ |# )?(lvlm-exporter [a-z]+ .*)", line):
                commands.append(match[1].split("  #")[0])
    actions = parser()._subparsers._group_actions[0].choices.values()
    commands += [subcommand.epilog.split("\n  ", 1)[1].split("\n\n")[0] for subcommand in actions]
    return commands


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command):
    parser().parse_args(shlex.split(command)[1:])


def test_messages_name_no_private_places():
    for path in (*source_files(), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")):
        assert "/root/" not in path.read_text()
