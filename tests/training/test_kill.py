"""A run that is killed outright goes on as if nothing had happened: real processes, SIGKILL, compared to the bit.

`benchmarks/kills.py` does it; here are its first points, one in each phase of a run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


NUM_PHASES = 14


@pytest.mark.slow
def test_killed_at_a_random_line_of_each_phase_and_resumed(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--points", str(NUM_PHASES), "--settings", "4"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NUM_PHASES} points, runs that differ: 0" in done.stdout
    points = json.loads((tmp_path / "out" / "kills.json").read_text())["points"]
    assert len({point["deaths"][0]["phase"] for point in points}) == NUM_PHASES
