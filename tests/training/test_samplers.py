"""Samplers of every kind in several processes: no row twice, and the order of the run without the callback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mates_hf import load_round
from tests.launch import free_port, start_processes
from tests.training.settings import NO_FILE, proves

pytestmark = pytest.mark.slow

SEVERAL = "samplers in several processes: sequential, grouped by length, `use_seedable_sampler=False`, one's own"
DIFFERS = "a sampler that draws another order in each process"
UNEVEN = "`accelerator_config.even_batches=False` where processes get different numbers of batches"
SIZE, BATCH = 2, 4
SUPPORTED = ["sequential", "grouped", "grouped, synchronised", "subset", "unseedable", "own"]


def train(tmp_path: Path, kinds: list[str], *, fsdp2: bool) -> list[dict[str, Any]]:
    """What each process saw."""
    port = free_port()
    given = {"output_dir": str(tmp_path), "result": str(tmp_path / "result"), "kinds": kinds, "fsdp2": fsdp2}
    processes = start_processes(["tests/training/sampler_worker.py", json.dumps(given)], SIZE, port)
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * SIZE, errors[0][-3000:] + errors[1][-3000:]
    return [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(SIZE)]


def in_order(results: list[dict[str, Any]], kind: str, run: str) -> list[int]:
    """Pool rows of a run over all processes, in global order."""
    parts = [np.array(result[kind][run]).reshape(-1, BATCH) for result in results]
    return np.concatenate(parts, axis=1).reshape(-1).tolist()


def assert_one_order(tmp_path: Path, results: list[dict[str, Any]], kind: str) -> None:
    plain, ours, stopped = (in_order(results, kind, run) for run in ("plain", "ours", "stopped"))
    record = load_round(tmp_path / f"ours-{results[0][kind]['number']}" / "_mates" / "round-0001")
    begin = record.info["from_position"]
    assert ours[:begin] == plain[:begin], kind
    assert ours[begin:] == np.asarray(record.selection).tolist(), kind
    assert ours[begin:] != plain[begin:], kind
    assert len(set(ours)) == len(ours) == len(plain), kind
    assert not set(record.labels.candidate_id.tolist()) & set(ours), kind
    assert stopped == ours, kind


@proves(SEVERAL, "the order before the first selection is that without the callback; no row twice; resumes exactly",
        note="DDP and FSDP2; all processes are compared")  # fmt: skip
@proves(DIFFERS, NO_FILE, outcome="refused", note="at the first batch; the message names the way out")
@proves(UNEVEN, NO_FILE, outcome="refused")
def test_samplers_of_every_kind_under_ddp(tmp_path):
    results = train(tmp_path, [*SUPPORTED, "own stream", "uneven"], fsdp2=False)
    for kind in SUPPORTED:
        assert_one_order(tmp_path, results, kind)
    for result in results:
        assert "UnsupportedSettingError" in result["own stream"]
        assert "sampler (OwnStream) draws another one in processes [1]" in result["own stream"]
        assert "`accelerator_config.use_seedable_sampler=False`" in result["own stream"]
        assert "`accelerator_config.even_batches=False`" in result["uneven"]
    assert not list(tmp_path.glob("refused-*/**/_mates"))


@proves(SEVERAL, "the same with weights sharded by FSDP2")
def test_samplers_of_every_kind_under_fsdp2(tmp_path):
    results = train(tmp_path, ["own"], fsdp2=True)
    assert_one_order(tmp_path, results, "own")
