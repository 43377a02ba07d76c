"""The benchmarks: all are listed, pages follow from their JSON, rooms are closed, and quick runs end and go on."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.lab import harness

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
MODULES = sorted(path for path in BENCHMARKS.rglob("*.py") if path.parent != BENCHMARKS)
RESULT = re.compile(r"(?P<name>[a-z_]+)_(cpu\d+|[a-z0-9]+)_20\d\d-(0[1-9]|1[0-2])")


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True, text=True, env=environment, timeout=1_200, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return done.stdout


def room_of(module: str) -> str:
    """`benchmarks.lab`, or the question that a module belongs to: `benchmarks.quality.selection`."""
    return ".".join(module.split(".")[: 2 if module.startswith("benchmarks.lab") else 3])


def strays(source: str, module: str) -> Iterator[str]:
    """Imports that leave a module's room for another than `lab`."""
    for node in ast.walk(ast.parse(source)):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            found = ["relative"] * node.level or [f"{node.module}.{alias.name}" for alias in node.names]
        for name in found:
            inside = name.startswith("benchmarks.") and room_of(name) in (room_of(module), "benchmarks.lab")
            if name.split(".")[0] in ("benchmarks", "tests", "examples", "relative") and not inside:
                yield name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_a_question_imports_from_the_lab_alone(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert list(strays(path.read_text(encoding="utf-8"), module)) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from benchmarks.cost.probe_speed import run", "benchmarks.quality.selection.page"),
        ("def f():\n    from tests.launch import free_port", "benchmarks.reliability.kills"),
        ("from ..cost import probe_speed", "benchmarks.quality.fidelity"),
        ("import benchmarks.cost.overhead", "benchmarks.lab.units"),
        ("from benchmarks.quality import fidelity", "benchmarks.quality.selection"),
    ],
)
def test_the_rule_sees_a_wrong_import(source: str, module: str) -> None:
    assert list(strays(source, module))


def test_help_lists_every_question_and_the_readme_answers_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        harness.main(["--help"])
    listed, readme = capsys.readouterr().out, (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    rooms = [*BENCHMARKS.glob("*/*.py"), *BENCHMARKS.glob("*/*/__init__.py")]
    names = {
        path.parent.name if path.name == "__init__.py" else path.stem for path in rooms if "lab" not in path.parts
    }
    assert names - {"quality", "cost", "reliability"} == set(harness.questions())
    for name, question in harness.questions().items():
        assert f"  {name} " in listed
        assert question.asks in listed
        assert len(question.asks) > 30
        assert f"[`{name}`](results/{name}_" in readme, name


def test_every_result_is_named_by_question_hardware_and_month() -> None:
    known, results = harness.questions(), sorted((BENCHMARKS / "results").iterdir())
    for path in results:
        found = RESULT.fullmatch(path.stem)
        assert found, path.name
        assert harness.question_of(path, known), path.name
    assert {path.stem for path in results if path.suffix == ".md"} == {p.stem for p in results if p.suffix == ".json"}


def test_an_unknown_question_and_a_result_of_none_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no question `nothing`"):
        harness.main(["nothing"])
    assert harness.check_all(tmp_path, None) == 1  # nothing to check is no good news
    (tmp_path / "nothing_cpu2_2026-11.json").write_text("{}")
    assert harness.check_all(tmp_path, None) == 1
    assert "no such question" in capsys.readouterr().out


def test_a_page_that_does_not_follow_is_told(tmp_path: Path) -> None:
    for path in (BENCHMARKS / "results").glob("large_pool_*.[jm]*"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8").replace("Not in these", "Also in these"))
    assert harness.check_all(tmp_path, "large_pool") == 1
    assert harness.check_all(tmp_path, "rows_cost") == 1  # there is none
    (path,) = tmp_path.glob("*.json")
    harness.write_page(harness.questions()["large_pool"].module(), path)
    assert harness.check_all(tmp_path, "large_pool") == 0


def test_json_is_what_was_given_with_a_line_for_each_entry() -> None:
    document = {"quick": True, "units": {"a": {"x": 1 / 3}, "b": {"x": None}}, "n": [1, 2.0]}
    text = harness.as_json(document, 4)
    assert json.loads(text) == {"quick": True, "units": {"a": {"x": 0.3333}, "b": {"x": None}}, "n": [1, 2.0]}
    assert '\n"b":' in text
    assert json.loads(harness.as_json({"points": [], "n": 1}, 4)) == {"points": [], "n": 1}


@pytest.mark.slow
def test_every_page_follows_from_the_committed_json() -> None:
    assert "follow from their JSON" in run("--check")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit_file"),
    [("selection", "lambada--ours--0.json"), ("faults", "labels:_last_error.json")],
)
def test_a_quick_run_ends_and_goes_on_where_it_was_stopped(name: str, unit_file: str, tmp_path: Path) -> None:
    arguments = (name, "--quick", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    run(*arguments)
    (page,) = (tmp_path / "out").glob(f"{name}-quick_*.md")
    units = sorted((tmp_path / "work").rglob(unit_file))
    assert len(units) == 1
    before = page.read_text(encoding="utf-8")
    times = {path: path.stat().st_mtime_ns for path in units[0].parent.glob("*.json")}
    assert len(json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["units"]) == len(times) > 1
    # Nothing is done twice, and the page is made of what is there.
    run(*arguments)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert page.read_text(encoding="utf-8") == before
    run(name, "--check", "--out", str(tmp_path / "out"))


def test_every_place_of_a_fault_is_there() -> None:
    from benchmarks.reliability.faults.places import all_faults

    for fault in all_faults():
        assert callable(pkgutil.resolve_name(fault.target)), fault.target
