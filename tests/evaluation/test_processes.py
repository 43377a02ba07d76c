"""Several real processes evaluate together: the metrics of one, equal everywhere, however long the main one takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.kit import write_local
from tests.launch import free_port, start_processes

pytestmark = pytest.mark.slow

TASKS = ["mates_sciq_local", "mates_boolq_local", "mates_lambada_all_tokens_local"]
FLOAT32 = 1e-4  # sums of float32 log-likelihoods, in other batches and with sharded weights


def start(tmp_path: Path, size: int, **settings: Any) -> tuple[list[int], list[str], list[dict[str, Any]]]:
    """Exit codes, errors and results of a run in `size` processes at the same total batch."""
    port = free_port()
    result = str(tmp_path / f"result-{port}")
    args = {"per_device_train_batch_size": 4 // size, **settings.pop("args", {})}
    given = {"args": args, "result": result, "tasks": TASKS, "evaluates": True, "output_dir": str(tmp_path / port)}
    given |= {"data_dir": str(write_local(tmp_path / "data")), **settings}
    processes = start_processes(["tests/evaluation/worker.py", json.dumps(given)], size, port)
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    paths = [Path(f"{result}-{rank}.json") for rank in range(size)]
    codes = [process.returncode for process in processes]
    return codes, errors, [json.loads(path.read_text()) for path in paths if path.exists()]


def evaluations(result: dict[str, Any]) -> dict[int, dict[str, float]]:
    return {
        entry["step"]: {name: value for name, value in entry.items() if name.startswith("lm_eval/mates")}
        for entry in result["log"]
        if "lm_eval/seconds" in entry
    }


def losses(result: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in result["log"] if "loss" in entry]


@pytest.mark.parametrize("fsdp2", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_share_an_evaluation_and_train_as_without(tmp_path, fsdp2) -> None:
    codes, errors, with_it = start(tmp_path, 2, fsdp2=fsdp2, seconds=6, args={"ddp_timeout": 4})
    assert codes == [0, 0], errors
    codes, errors, without = start(tmp_path, 2, fsdp2=fsdp2, evaluates=False)
    assert codes == [0, 0], errors
    assert losses(with_it[0]) == losses(without[0])  # dropout is on
    assert evaluations(with_it[0]) == evaluations(with_it[1])
    assert [result["sharded"] for result in with_it] == [fsdp2, fsdp2]
    assert sorted(evaluations(with_it[0])) == [2, 4]
    at = evaluations(with_it[0])[2]
    assert len(at) == 12
    assert at != evaluations(with_it[0])[4]


@pytest.mark.parametrize("fsdp2", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_measure_what_one_does(tmp_path, fsdp2) -> None:
    # At a learning rate of 0 all runs have the same weights, so only the way of measuring differs.
    settings = {"args": {"learning_rate": 0.0}}
    _, errors, one = start(tmp_path, 1, **settings)
    assert one, errors
    codes, errors, two = start(tmp_path, 2, fsdp2=fsdp2, args={**settings["args"], "per_device_train_batch_size": 2})
    assert codes == [0, 0], errors
    assert evaluations(two[0])[4] == pytest.approx(evaluations(one[0])[4], rel=FLOAT32)


def test_what_stops_the_main_process_stops_the_other_by_name(tmp_path) -> None:
    codes, errors, _ = start(tmp_path, 2, tasks=["mates_sciq_local", "mates_piqa_local"], breaks=True)
    assert all(codes)
    assert "EvaluationError" in errors[0]
    assert "NaN" in errors[0]
    assert "ProcessError: Process 0 of 2 (" in errors[1]
    assert "stopped this run: EvaluationError" in errors[1]
