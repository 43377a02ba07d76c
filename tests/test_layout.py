"""Ratchets: import direction, circles, closed rooms, public names, light import, who prints, length of modules."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mates_hf
from mates_hf import moved

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mates_hf"
FILES_FOR_OTHERS = {"configs"}  # data that accelerate reads; no part of the flow
OTHER_ENGINES = "integrations"  # right of all: launchers call it, nothing of the flow does
PILOT = "pilot"  # right of all: it runs the whole flow as a user would
ACCOUNTS = "answering"  # right of all: it reads what a run left
COMMANDS = "cli"  # right of all, and the only folder that prints
FOLDERS = sorted(
    path.name
    for path in PACKAGE.iterdir()
    if path.is_dir()
    and any(path.glob("*.py"))
    and path.name not in FILES_FOR_OTHERS | {OTHER_ENGINES, PILOT, ACCOUNTS, COMMANDS}
)
MODULES = sorted(PACKAGE.rglob("*.py"))
LEFT_OF_ALL = {
    "allow", "config", "config_rules", "disk", "display", "errors", "flops", "moved", "paths", "records",
    "round_files", "round_record", "round_writer",
}  # fmt: skip
RIGHT_OF_ALL = {COMMANDS, "__init__", "__main__"}
DOORS = {  # closed rooms, and the module beside each that opens it
    "influence.optimizer": ["mates_hf.influence.preconditioner"],
    "prediction.encoder": ["mates_hf.prediction.encoder_model"],
    "prediction.features": ["mates_hf.prediction.feature_model"],
    "prediction.ngram": ["mates_hf.prediction.ngram_model", "mates_hf.prediction.moore_lewis"],
    "prediction.text": ["mates_hf.prediction.text_model"],
    "reporting.page": [
        "mates_hf.reporting.report",
        "mates_hf.reporting.comparison",
        "mates_hf.training.kept_page",
        "mates_hf.training.run_report",
    ],
    "training.checks": [
        "mates_hf.training.callback",
        "mates_hf.training.loop",
        "mates_hf.training.start",
        "mates_hf.training.fit.warm_up",
    ],
    "training.fit": ["mates_hf.training.selector_fit", "mates_hf.cli.fit"],
    "training.replay": ["mates_hf.training.verify"],
    "training.stream": [
        "mates_hf.training.rounds",
        "mates_hf.training.session",
        "mates_hf.training.supply",
        "mates_hf.training.replay.stream",
    ],
    "selection.files": ["mates_hf.selection.file_scoring"],
}
MAX_MODULE_LINES = 400
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "evaluate", "matplotlib", "sklearn", "numba")


def name_of(path: Path) -> str:
    """`mates_hf.data.rows`; a package is `mates_hf.data.__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def rank(module: str) -> int:
    """Place in the flow: a module may import what has its own rank or a lower one."""
    top = module.split(".")[1]
    if top in LEFT_OF_ALL:
        return 0
    if top in RIGHT_OF_ALL | FILES_FOR_OTHERS | {OTHER_ENGINES, PILOT, ACCOUNTS}:
        return len(FOLDERS) + 1
    return FOLDERS.index(top) + 1


def imported(source: str, module: str) -> Iterator[str]:
    """Every `mates_hf` module that the source imports, also inside functions and by name; the root is `mates_hf`."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found = [".".join([*base, *([node.module] if node.module else [])])]
            if found[0] in {"mates_hf", *(f"mates_hf.{folder}" for folder in (*FOLDERS, *DOORS))}:
                # `from mates_hf.data import rows` imports a module, `from mates_hf import X` asks the root for X.
                found += [f"{found[0]}.{alias.name}" for alias in node.names if found[0] != "mates_hf"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        yield from (name for name in found if name.split(".")[0] == "mates_hf")


def violations(source: str, module: str) -> list[str]:
    """Imports that go to the package root or to the right."""
    found = []
    for name in imported(source, module):
        if name == "mates_hf":
            found.append(f"{module} imports the package root")
        elif rank(name) > rank(module):
            found.append(f"{module} imports {name}, which is right of it")
        elif (room := room_of(name)) and room != room_of(module) and module not in DOORS[room]:
            found.append(f"{module} imports {name}, which only {DOORS[room]} may open")
    return found


def room_of(module: str) -> str | None:
    """The closed room that a module lies in: a folder inside of one of the flow's folders."""
    parts = module.split(".")
    return ".".join(parts[1:3]) if len(parts) > 3 and ".".join(parts[1:3]) in DOORS else None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, by whatever way round."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found: set[str] = set()
        todo = [start]
        while todo:
            for name in graph.get(todo.pop(), set()) - found:
                found.add(name)
                todo.append(name)
        reached[start] = found
    return sorted({tuple(sorted(b for b in found if a in reached.get(b, ()))) for a, found in reached.items()} - {()})


def import_graph() -> dict[str, set[str]]:
    """Which module imports which, imports for type checkers included."""
    known = {name_of(path).removesuffix(".__init__"): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        if module == "mates_hf":  # it only looks names up
            continue
        found = set(imported(path.read_text(encoding="utf-8"), name_of(path)))
        graph[module] = {name for name in found if name in known and name != module}
    return graph


def test_no_module_imports_itself_by_a_way_round() -> None:
    assert circles(import_graph()) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]


def test_every_room_has_its_door() -> None:
    inner = {".".join(path.relative_to(PACKAGE).parts[:2]) for path in PACKAGE.glob("*/*/*.py")}
    assert inner - {"evaluation.metrics", "evaluation.tasks"} == set(DOORS)  # those two hold other libraries' files
    for room, doors in DOORS.items():
        for door in doors:
            assert (ROOT / Path(*door.split("."))).with_suffix(".py").exists(), room


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_left(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), name_of(path)) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from mates_hf.training.rounds import run_round", "mates_hf.selection.choose"),
        ("def f():\n    import mates_hf.prediction.ngram_model", "mates_hf.data.pool"),
        ("from ..selection import choose", "mates_hf.prediction.judge"),
        ("from mates_hf import MatesConfig", "mates_hf.training.rounds"),
        ("import mates_hf", "mates_hf.training.rounds"),
        ("from .. import records", "mates_hf.training.rounds"),
        ("from mates_hf.data.rows import TokenRows", "mates_hf.records"),
        ("import importlib\nimportlib.import_module('mates_hf.training.rounds')", "mates_hf.data.pool"),
        ("from mates_hf.cli import main", "mates_hf.training.rounds"),
        ("from mates_hf.integrations.axolotl import MatesPlugin", "mates_hf.training.callback"),
        ("from mates_hf.pilot.verdict import decide", "mates_hf.reporting.payback"),
        ("from mates_hf.prediction.ngram import tables", "mates_hf.prediction.judge"),
        ("from mates_hf.prediction.ngram.tables import Tables", "mates_hf.training.rounds"),
        ("from mates_hf.influence.optimizer.muon_step import MuonStep", "mates_hf.influence.difference"),
    ],
)
def test_the_check_sees_a_wrong_import(source: str, module: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from mates_hf.data.rows import TokenRows", "mates_hf.training.rounds"),
        ("from . import sampler", "mates_hf.training.rounds"),
        ("from mates_hf.config import MatesConfig", "mates_hf.data.pool"),
        ("import numpy", "mates_hf.records"),
        ("import mates_hf_plugin", "mates_hf.records"),
    ],
)
def test_the_check_lets_a_right_import_pass(source: str, module: str) -> None:
    assert violations(source, module) == []


def test_flow_is_the_folder_list() -> None:
    assert FOLDERS == [
        "data", "engine", "evaluation", "influence", "prediction", "reporting", "selection", "training",
    ]  # fmt: skip
    tops = {path.stem for path in PACKAGE.glob("*.py")}
    assert tops == (LEFT_OF_ALL | RIGHT_OF_ALL) - {COMMANDS}


def test_public_names_exist() -> None:
    assert mates_hf.__all__ == sorted(mates_hf.__all__)
    for name in mates_hf.__all__:
        value = getattr(mates_hf, name)
        assert value.__name__ == name
        assert value.__doc__
        assert getattr(importlib.import_module(value.__module__), name) is value
    assert set(mates_hf.__all__) <= set(dir(mates_hf))
    with pytest.raises(AttributeError, match="no attribute 'MatesCalback'"):
        _ = mates_hf.MatesCalback


def test_old_import_paths_of_public_names_work() -> None:
    for old, new in moved.NEW_HOME.items():
        with pytest.warns(DeprecationWarning, match=new.replace(".", r"\.")):
            found = importlib.import_module(old)
        names = [
            name
            for name in vars(importlib.import_module(new))
            if name in (*mates_hf.__all__, "HiddenStateInfluenceModel")
        ]
        assert names
        assert all(getattr(found, name) is getattr(importlib.import_module(new), name) for name in names)
        del sys.modules[old]
    from mates_hf.records import MatesError

    assert MatesError is mates_hf.MatesError


def test_import_is_light() -> None:
    code = f"import sys, mates_hf; dir(mates_hf); print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module",
    [
        "mates_hf.records",
        "mates_hf.round_files",
        "mates_hf.config",
        "mates_hf.data.rows",
        "mates_hf.training.verify",
        "mates_hf.training.run_report",
        "mates_hf.reporting.comparison",
        "mates_hf.cli",
    ],
)
def test_a_round_is_read_without_torch(module: str) -> None:
    code = f"import sys, {module}, mates_hf; mates_hf.load_round; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != COMMANDS], ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short_and_introduce_themselves(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_MODULE_LINES
    assert ast.get_docstring(ast.parse(source))


def test_there_is_no_drawer() -> None:
    assert [name_of(path) for path in MODULES if re.search(r"utils?|helpers?|common|misc", path.stem)] == []
    test_folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    assert test_folders <= {*FOLDERS, OTHER_ENGINES, PILOT, ACCOUNTS, "gpu"}  # the last: what a card is needed for


def test_no_file_names_a_machine() -> None:
    machine_path = re.compile(r"(?<![\w.~$}])/(?:home|root|work|Users|opt|mnt)/\w")
    suffixes = {".py", ".md", ".toml", ".txt", ".json", ".yaml", ".sh", ""}
    places = [PACKAGE, *(ROOT / name for name in ("tests", "examples", "benchmarks", ".ci"))]
    files = [path for place in places for path in place.rglob("*")] + list(ROOT.iterdir())
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if machine_path.search(line)
    ]
    assert found == []
