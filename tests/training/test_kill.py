"""A run that is killed outright goes on as if nothing had happened: real processes, SIGKILL, compared to the bit.

`python -m benchmarks kills` does it; here are its first points, one in each phase of a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mates_hf.disk import replace_path, write_array
from mates_hf.round_writer import RoundWriter

ROOT = Path(__file__).resolve().parents[2]


NUM_PHASES = 14


@pytest.mark.slow
def test_killed_at_a_random_line_of_each_phase_and_resumed(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "kills", "--points", str(NUM_PHASES), "--settings", "4"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NUM_PHASES} points, runs that differ: 0" in done.stdout
    (path,) = (tmp_path / "out").glob("kills_*.json")
    points = json.loads(path.read_text())["points"]
    assert len({point["deaths"][0]["phase"] for point in points}) == NUM_PHASES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked")
def test_a_power_cut_takes_back_what_was_not_flushed_and_a_rounds_name(tmp_path):
    from benchmarks.reliability.kills.dying import Journal, cut_power

    rounds_dir, key = tmp_path / "run", {"step": 1}

    def work() -> None:
        Journal(tmp_path / "journal.txt", rounds_dir).start()
        writer = RoundWriter(rounds_dir, 1, key)
        write_array(writer.path / "selection.npy", np.arange(3))
        writer.finish({"number": 1, "order_sha256": hashlib.sha256(np.arange(3).tobytes()).hexdigest()})
        (rounds_dir / "flushed.tmp").touch()
        replace_path(rounds_dir / "flushed.tmp", rounds_dir / "flushed")
        (rounds_dir / "lost.tmp").touch()
        os.replace(rounds_dir / "lost.tmp", rounds_dir / "lost")

    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert cut_power(tmp_path) == ["lost", "round-0001"]
    assert sorted(path.name for path in rounds_dir.iterdir()) == ["flushed", "lost.tmp", "round-0001.partial"]
    assert RoundWriter(rounds_dir, 1, key).complete
