"""The examples run, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mates_hf import load_round

ROOT = Path(__file__).parent.parent
WORDS = {
    "sea": "the ship sailed over a grey wave and the captain watched the harbour light".split(),
    "code": "def return import class self value index error list print while lambda".split(),
}


def passage(kind: str, rng: np.random.Generator, length: int = 60) -> str:
    return " ".join(rng.choice(WORDS[kind], length))


@pytest.mark.slow
def test_pretrain_on_local_files(tmp_path):
    rng = np.random.default_rng(0)
    pool = [{"body": passage(kind, rng), "domain": kind} for kind in rng.choice(list(WORDS), 500)]
    reference = [{"text": passage("sea", rng)} for _ in range(40)]
    for name, rows in {"pool.jsonl": pool, "reference.jsonl": reference}.items():
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    command = f"""{ROOT}/examples/pretrain.py --output_dir {tmp_path}/run --dataset json
        --data_files {tmp_path}/pool.jsonl --text_column body --group_column domain
        --reference {tmp_path}/reference.jsonl --seeds 2 --max_steps 24 --update_steps 8 --num_probes 40
        --selection_ratio 0.5 --candidate_scope pool --block_size 32 --vocab_size 300 --hidden_size 32 --num_layers 1
        --per_device_train_batch_size 4 --learning_rate 3e-3 --evaluate_steps 8 --save_strategy no --report_to none
        --extend_random 1.5 --on_weak_signal select --use_cpu true --disable_tqdm true"""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(r["arm"], r["seed"]) for r in results["results"]] == [
        ("mates", 0), ("random", 0), ("mates", 1), ("random", 1)
    ]  # fmt: skip
    assert [r["curve"][-1]["step"] for r in results["results"]] == [24, 36, 24, 36]
    assert len(results["summary"]["paired"]) == 3
    assert (tmp_path / "run" / "held_out_loss.png").exists()
    record = load_round(tmp_path / "run" / "mates-0" / "_mates" / "round-0001")
    assert results["summary"]["rounds"][0]["spearman"] == record.info["guard"]["spearman"]
    assert "held-out Spearman" in done.stdout
