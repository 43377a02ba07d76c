"""Tests for a card, which carry the marker `gpu`; without one, those that can run on the processor at tiny size.

`python -m benchmarks gpu` runs them with a deadline and keeps each outcome as it comes.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

OUTCOMES, DEADLINE = "MATES_GPU_OUTCOMES", "MATES_GPU_DEADLINE"
HERE = Path(__file__).parent
_longest = [0.0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def _kept() -> dict[str, dict[str, Any]]:
    path = Path(os.environ.get(OUTCOMES, ""))
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {found["test"]: found for found in map(json.loads, lines)}


def _keep(name: str, outcome: str, seconds: float) -> None:
    if path := os.environ.get(OUTCOMES):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": name, "outcome": outcome, "seconds": seconds}) + "\n")


def _name(node: str) -> str:
    return node.removeprefix("tests/gpu/")


@pytest.fixture(autouse=True)
def while_there_is_time(request: pytest.FixtureRequest) -> None:
    """Skip what passed before, and begin nothing that would end after the deadline."""
    if _kept().get(_name(request.node.nodeid), {}).get("outcome") == "passed":
        pytest.skip("passed before")
    deadline = float(os.environ.get(DEADLINE, "inf"))
    if time.time() + _longest[0] > deadline:
        pytest.skip("no time left")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each outcome, as it comes."""
    if not report.nodeid.startswith("tests/gpu/") or not (report.when == "call" or report.outcome != "passed"):
        return
    if report.when == "call":
        _longest[0] = max(_longest[0], report.duration)
    reason = str(report.longrepr) if report.skipped else ""
    if "passed before" not in reason:
        outcome = "no time" if "no time left" in reason else report.outcome
        _keep(_name(report.nodeid), outcome, report.duration)


@pytest.fixture
def device() -> torch.device:
    """The card, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cuda() -> torch.device:
    """The card; the test is skipped without."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    return torch.device("cuda")
