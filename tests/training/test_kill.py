"""A run that is killed outright goes on as if nothing had happened: real processes, SIGKILL, compared to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mates_hf import MatesCallback
from mates_hf.influence.ngram import NgramInfluenceModel
from mates_hf.training import rounds
from tests.training.kit import make_arguments, make_reference, run, small_config

output_dir, kill_at, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"

def die_in(name):
    inner = getattr(rounds, name)
    def dying(run, *args):
        if kill_at == f"before {name}":
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(run, *args)
        if kill_at == f"after {name}":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(rounds, name, dying)

for name in ("_probe", "_audit", "_fit", "_score", "_select", "_take_over"):
    die_in(name)

args = make_arguments(output_dir, save_strategy="steps", save_steps=4)
callback = MatesCallback(make_reference(), small_config(switch_lead_steps=3))
result = run(args, [callback], dropout=0.1, resume=True if resume else None)
weights = float(sum(value.double().abs().sum() for value in result.weights.values()))
(output_dir / "result.json").write_text(json.dumps({"rows": result.rows, "losses": result.losses, "weights": weights}))
"""


def train(tmp_path: Path, output_dir: Path, kill_at: str, mode: str) -> int:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(output_dir), kill_at, mode]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["before _probe", "after _probe", "after _audit", "after _fit", "after _score",
                                   "after _select", "after _take_over"])  # fmt: skip
def test_killed_in_a_stage_and_resumed(tmp_path, whole_run, stage):
    output_dir = tmp_path / "run"
    assert train(tmp_path, output_dir, stage, "fresh") == -signal.SIGKILL
    assert not (output_dir / "result.json").exists()
    probes = output_dir / "_mates" / "round-0001.partial" / "probes.parquet"
    written = probes.stat().st_mtime_ns if probes.exists() else None
    assert train(tmp_path, output_dir, "never", "resume") == 0
    result = json.loads((output_dir / "result.json").read_text())
    assert result["losses"] == whole_run["losses"]
    assert result["weights"] == whole_run["weights"]
    assert result["rows"] == whole_run["rows"][16:]  # the checkpoint at step 4, in batches of 4
    if written is not None:  # a finished stage is loaded, not recomputed
        assert (output_dir / "_mates" / "round-0001" / "probes.parquet").stat().st_mtime_ns == written


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("whole")
    assert train(tmp_path, tmp_path / "run", "never", "fresh") == 0
    return json.loads((tmp_path / "run" / "result.json").read_text())
