"""The tests marked `gpu`, one after the other while there is time; those that passed are not run again.

Each test's outcome is written as it ends, so a test that takes the process down loses its own alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.lab.machine import ROOT
from benchmarks.reliability.gpu.device import Task

FOLDER = "tests/gpu"


def run(task: Task) -> dict[str, Any]:
    """Outcomes by test; done when every test has one."""
    if importlib.util.find_spec("pytest") is None:
        return {"done": False, "error": "pytest is not installed", "outcomes": {}}
    kept = Path(task.work, "gpu-tests.jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MATES_GPU_OUTCOMES": str(kept), "OMP_NUM_THREADS": str(task.threads)}
    if task.seconds != float("inf"):
        environment["MATES_GPU_DEADLINE"] = str(task.begun + task.seconds)
    selected = ["-k", "precision"] if task.quick else []
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *selected, FOLDER],
        cwd=ROOT, env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    outcomes: dict[str, dict[str, Any]] = {}
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.exists() else ():
        found = json.loads(line)
        outcomes[found.pop("test")] = found
    failed = [name for name, found in outcomes.items() if found["outcome"] == "failed"]
    return {
        "done": done.returncode in (0, 1) and not any(found["outcome"] == "no time" for found in outcomes.values()),
        "outcomes": outcomes, "pytest_seconds": time.monotonic() - begun,
        **({"error": f"{len(failed)} tests failed: {', '.join(failed)}"[:500]} if failed else {}),
        **({"error": done.stdout[-500:] + done.stderr[-500:]} if done.returncode not in (0, 1) else {}),
    }  # fmt: skip
