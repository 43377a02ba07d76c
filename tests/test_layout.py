"""Ratchets: import direction, public names, light import, who prints, how long a module is."""

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

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mates_hf"
FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py")))
MODULES = sorted(PACKAGE.rglob("*.py"))
LEFT_OF_ALL = {
    "config", "disk", "display", "model_traits", "paths", "preserve", "processes", "records", "round_files",
    "round_writer", "summaries", "watch",
}  # fmt: skip
RIGHT_OF_ALL = {"cli", "__init__", "__main__"}
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
    if top in RIGHT_OF_ALL:
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
            if found[0] in {"mates_hf", *(f"mates_hf.{folder}" for folder in FOLDERS)}:
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
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_left(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), name_of(path)) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from mates_hf.training.rounds import run_round", "mates_hf.selection.choose"),
        ("def f():\n    import mates_hf.influence.ngram", "mates_hf.data.pool"),
        ("from ..selection import choose", "mates_hf.influence.fit"),
        ("from mates_hf import MatesConfig", "mates_hf.training.rounds"),
        ("import mates_hf", "mates_hf.training.rounds"),
        ("from .. import records", "mates_hf.training.rounds"),
        ("from mates_hf.data.rows import TokenRows", "mates_hf.records"),
        ("import importlib\nimportlib.import_module('mates_hf.training.rounds')", "mates_hf.data.pool"),
        ("from mates_hf.cli import main", "mates_hf.training.rounds"),
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
    assert FOLDERS == ["data", "evaluation", "influence", "reporting", "selection", "training"]
    tops = {path.stem for path in PACKAGE.glob("*.py")}
    assert tops == LEFT_OF_ALL | RIGHT_OF_ALL


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
        "mates_hf.cli",
    ],
)
def test_a_round_is_read_without_torch(module: str) -> None:
    code = f"import sys, {module}, mates_hf; mates_hf.load_round; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "cli.py"], ids=name_of)
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
    assert test_folders <= set(FOLDERS)


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
