"""The benchmarks behind the README's figures: their quick runs end, go on, and their pages follow from their JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True, text=True, env=environment, timeout=1_200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["selection", "fidelity", "selector_gain", "rows_cost", "averaging_cost", "influence_models", "faults"],
)
def test_the_page_follows_from_the_committed_json(name: str) -> None:
    run(f"{name}.py", "--check")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit_file"),
    [("selection", "lambada--ours--0.json"), ("fidelity", None), ("faults", "labels:_last_error.json")],
)
def test_a_quick_run_ends_and_goes_on_where_it_was_stopped(name: str, unit_file: str | None, tmp_path: Path) -> None:
    arguments = ("--quick", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    run(f"{name}.py", *arguments)
    page = tmp_path / "out" / f"{name}-quick.md"
    units = sorted((tmp_path / "work").rglob(unit_file or "*in_batch*late*.json"))
    assert len(units) == 1
    before = page.read_text(encoding="utf-8")
    times = {path: path.stat().st_mtime_ns for path in units[0].parent.glob("*.json")}
    assert len(json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["units"]) == len(times) > 1
    # Nothing is done twice, and the page is made of what is there.
    run(f"{name}.py", *arguments)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert page.read_text(encoding="utf-8") == before
    run(f"{name}.py", "--quick", "--check", "--out", str(tmp_path / "out"))
