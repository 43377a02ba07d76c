"""Several real processes: the rows of one process, in its order; one writer; long waits; deaths; sharded weights."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mates_hf import load_round
from mates_hf.training.verify import verify_run
from tests.launch import free_port, start_processes
from tests.training.settings import proves

pytestmark = pytest.mark.slow

DDP, FSDP2 = "DDP, several processes (`accelerate launch`)", "FSDP2 (`fsdp` with `version: 2`, `fully_shard`)"
CONTEXT = "context parallelism (`ParallelismConfig(cp_size=...)`) with FSDP2 and SDPA"
SAME_ROWS = "the rows of one process in its order, at an equal total batch; influence within 1e-3 of one process's"
ROOT = Path(__file__).resolve().parents[2]
BATCH = 8  # rows of an optimizer step, over all processes


class Finished:
    """What the processes of a run left: exit codes, errors, and the result of each."""

    batch = BATCH

    def __init__(self, processes: list[subprocess.Popen[str]], result: str) -> None:
        # At once: one that fills the pipe of its errors waits until it is read, and the others with it.
        with ThreadPoolExecutor(len(processes)) as readers:
            self.errors = list(readers.map(lambda process: process.communicate(timeout=240)[1], processes))
        self.codes = [process.returncode for process in processes]
        paths = [Path(f"{result}-{rank}.json") for rank in range(len(processes))]
        self.results = [json.loads(path.read_text()) for path in paths if path.exists()]

    @property
    def rows(self) -> list[list[int]]:
        """Pool rows of each optimizer step, all processes together, in global order."""
        each = self.batch // len(self.results)
        parts = [np.array(result["rows"]).reshape(-1, each) for result in self.results]
        return np.concatenate(parts, axis=1).tolist()


def with_batch(size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run in `size` processes at the same total batch."""
    return {**settings, "args": {"per_device_train_batch_size": BATCH // size, **settings.get("args", {})}}


def start(tmp_path: Path, size: int, **settings: Any) -> Finished:
    """Train in `size` processes."""
    return launch(tmp_path, size, with_batch(size, settings))


def start_several(tmp_path: Path, size: int, runs: dict[str, dict[str, Any]]) -> dict[str, Finished]:
    """Several runs, one after the other, in one start of `size` processes; each has a folder of its name."""
    named = {name: {"output_dir": str(tmp_path / name), **with_batch(size, run)} for name, run in runs.items()}
    done = launch(tmp_path, size, {"runs": named})
    assert done.codes == [0] * size, done.errors
    found = {}
    for name in runs:
        found[name] = copy.copy(done)
        found[name].results = [result[name] for result in done.results]
    return found


def launch(tmp_path: Path, size: int, given: dict[str, Any]) -> Finished:
    """Processes of the worker, to their end."""
    port = free_port()
    result = str(tmp_path / f"result-{port}")
    processes = start_processes(["tests/training/worker.py", json.dumps({**given, "result": result})], size, port)
    try:
        return Finished(processes, result)
    finally:
        for process in processes:
            process.kill()


FINDS_LENGTHS = {
    "config": {"first_round_steps": 2, "switch_lead_steps": 2, "average_steps": 1, "on_weak_signal": "own_order"}
}
SCORED = {"scored": True, "config": {"score_column": "score"}, "args": {"remove_unused_columns": False}}
DRIFTS = {"config": {"average_steps": 2, "drift_check_steps": 3, "drift_spearman": 1.0}}


def checked_inside(size: int) -> dict[str, Any]:
    sizes = {"update_steps": 12, "first_round_steps": 3, "switch_lead_steps": 2, "average_steps": 1}
    config = {**sizes, "num_probes": 160, "held_out_fraction": 0.4, "on_weak_signal": "own_order"}
    args = {"max_steps": 36, "per_device_train_batch_size": 4 // size}
    return {"config": config, "turns_at": 25, "args": args}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Finished], Path]:
    """Runs of one process, and their folder."""
    tmp_path = tmp_path_factory.mktemp("one")
    runs = {"run": {}, "lengths": FINDS_LENGTHS, "checked": checked_inside(1), "drifts": DRIFTS, "scored": SCORED}
    return start_several(tmp_path, 1, runs), tmp_path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Finished], Path]:
    """The same in two processes, and some that only several processes can do."""
    tmp_path = tmp_path_factory.mktemp("two")
    shared = {"cp_size": 2, "args": {"per_device_train_batch_size": BATCH}}  # both processes have each row
    runs = {"run": {"own_dirs": True}, "lengths": FINDS_LENGTHS, "checked": checked_inside(2), "drifts": DRIFTS}
    runs["scored"] = SCORED
    return start_several(tmp_path, 2, {**runs, "fsdp2": {"fsdp2": True}, "context": shared}), tmp_path


@pytest.fixture(scope="module")
def alone(single: tuple[dict[str, Finished], Path]) -> tuple[Finished, Path]:
    return single[0]["run"], single[1] / "run"


@proves(DDP, SAME_ROWS, note="two processes; gloo")
def test_two_processes_train_on_the_rows_of_one_in_its_order(pair, alone):
    (one, one_dir), two, tmp_path = alone, pair[0]["run"], pair[1]
    assert two.rows == one.rows
    assert not (tmp_path / "run-of-1").exists()  # only the main process writes; no file system need be shared
    for number in (1, 2):
        expected, found = (load_round(path / f"_mates/round-000{number}") for path in (one_dir, tmp_path / "run"))
        np.testing.assert_array_equal(found.selection, expected.selection)
        np.testing.assert_array_equal(found.labels.candidate_id, expected.labels.candidate_id)
        np.testing.assert_allclose(
            found.labels.influence, expected.labels.influence, atol=1e-3 * np.abs(expected.labels.influence).max()
        )
    # Every process has the round's metrics, the main one's.
    assert [entry["mates/spearman"] for entry in two.results[0]["rounds"]] == [
        entry["mates/spearman"] for entry in two.results[1]["rounds"]
    ]


def test_two_processes_add_the_scores_of_a_column_as_one_does(pair, single):
    one, two = single[0]["scored"], pair[0]["scored"]
    assert two.rows == one.rows != single[0]["run"].rows
    for folder in (single[1], pair[1]):
        assert load_round(folder / "scored/_mates/round-0001").info["score_column"]["column"] == "score"


@proves(DDP, "their number may change at each resume")
@pytest.mark.parametrize("stages", [((2, 10), (1, 16), (2, 20)), ((2, 8), (1, 14), (2, 20))], ids=["window", "order"])
def test_the_number_of_processes_may_change_at_each_resume(tmp_path, alone, stages):
    one, _ = alone
    rows: list[list[int]] = []
    for size, stop in stages:
        args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 20}
        part = start(
            tmp_path,
            size,
            output_dir=str(tmp_path / "run"),
            args=args,
            stop_at=stop,
            resume=bool(rows),
        )
        assert part.codes == [0] * size, part.errors
        assert "running mean" not in "".join(part.errors)  # the averaged weights went from one to the other
        rows += part.rows
    assert rows == one.rows


@proves(FSDP2, "resumes exactly")
def test_a_sharded_run_stopped_inside_the_averaging_window_goes_on(tmp_path, alone):
    one, _ = alone
    rows: list[list[int]] = []
    for stop in (10, 20):
        settings = {"save_strategy": "steps", "save_steps": 10}
        part = start(
            tmp_path,
            2,
            output_dir=str(tmp_path / "run"),
            args=settings,
            stop_at=stop,
            resume=bool(rows),
            fsdp2=True,
        )
        assert part.codes == [0, 0], "".join(part.errors)[-6000:]
        assert "running mean" not in "".join(part.errors)
        rows += part.rows
    assert rows == one.rows


@proves("`ddp_timeout` shorter than a fit", "the run goes on")
def test_a_fit_longer_than_the_collective_timeout_does_not_end_the_run(tmp_path):
    run_dir = tmp_path / "run"
    two = start(tmp_path, 2, output_dir=str(run_dir), args={"ddp_timeout": 4, "max_steps": 10}, fit_seconds=10)
    assert two.codes == [0, 0], two.errors
    assert load_round(run_dir / "_mates/round-0001").selection is not None


def test_a_process_that_dies_ends_the_run_with_a_clear_error_and_no_half_written_round(tmp_path):
    two = start(tmp_path, 2, output_dir=str(tmp_path / "run"), dies=True)
    assert two.codes[1] == -signal.SIGKILL
    assert two.codes[0] not in (0, -signal.SIGKILL)
    assert "ProcessError: Process 1 of 2 (" in two.errors[0]
    assert "died or is frozen" in two.errors[0]
    assert not (tmp_path / "run/_mates/round-0001").exists()
    assert two.results == []


def test_an_error_in_the_main_process_stops_the_others(tmp_path):
    impossible = {"on_weak_signal": "error", "min_spearman": 1.0}
    two = start(tmp_path, 2, output_dir=str(tmp_path / "run"), config=impossible)
    assert 0 not in two.codes
    assert "WeakSignalError" in two.errors[0]
    assert "ProcessError: Process 0 of 2 (" in two.errors[1]
    assert "stopped this run: WeakSignalError" in two.errors[1]


@proves(
    FSDP2, SAME_ROWS, note="two processes; gloo, where accelerate itself leaves `fsdp` out and the test turns it on"
)
def test_weights_sharded_by_fsdp2_give_the_influence_and_rows_of_one_process(pair, alone):
    (one, one_dir), two, two_dir = alone, pair[0]["fsdp2"], pair[1] / "fsdp2"
    assert [result["sharded"] for result in two.results] == [True, True]
    assert two.rows == one.rows
    whole, in_chunks = np.array(two.results[0]["chunked"])  # of the output head
    np.testing.assert_allclose(in_chunks, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    expected, found = (load_round(path / "_mates/round-0001") for path in (one_dir, two_dir))
    assert np.abs(found.labels.influence).max() > 0
    np.testing.assert_allclose(
        found.labels.influence, expected.labels.influence, atol=1e-3 * np.abs(expected.labels.influence).max()
    )
    np.testing.assert_array_equal(found.selection, expected.selection)


@proves(CONTEXT, "probes are run whole; " + SAME_ROWS)
@proves(
    CONTEXT, "its losses are those of one process",
    note="by whole rows over all processes. Two of them, gloo; torch's ring attention has no CPU kernel, so keys are "
    "gathered in its place: training with the ring itself needs GPUs and was not run",
)  # fmt: skip
def test_processes_that_share_rows_train_and_measure_as_one_process(pair, alone):
    (one, one_dir), two, two_dir = alone, pair[0]["context"], pair[1] / "context"
    assert [result["sharded"] for result in two.results] == [True, True]
    assert [result["rows"] for result in two.results] == [sum(one.rows, [])] * 2
    np.testing.assert_allclose(two.results[0]["losses"], one.results[0]["losses"], rtol=1e-5)
    expected, found = (load_round(path / "_mates/round-0001") for path in (one_dir, two_dir))
    np.testing.assert_array_equal(found.selection, expected.selection)
    np.testing.assert_allclose(
        found.labels.influence, expected.labels.influence, atol=1e-3 * np.abs(expected.labels.influence).max()
    )


def test_accelerate_launch_starts_it_as_users_do(tmp_path, alone):
    one, _ = alone
    result = str(tmp_path / "result")
    settings = {"args": {"per_device_train_batch_size": BATCH // 2}, "output_dir": str(tmp_path / "run")}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["tests/training/worker.py", json.dumps({**settings, "result": result})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    parts = [np.array(json.loads(Path(f"{result}-{rank}.json").read_text())["rows"]).reshape(-1, 4) for rank in (0, 1)]
    assert np.concatenate(parts, axis=1).tolist() == one.rows


def runs_of(name: str, single: Any, pair: Any) -> tuple[list[Finished], Path, Path]:
    """A run in one process and in two, and their folders."""
    return [single[0][name], pair[0][name]], single[1] / name, pair[1] / name


def test_rounds_that_find_their_length_are_those_of_one_process_and_verify(single, pair):
    runs, *folders = runs_of("lengths", single, pair)
    assert runs[0].rows == runs[1].rows
    assert verify_run(folders[1]).problem is None
    found = [
        [load_round(path).info["round_steps"] for path in sorted((folder / "_mates").glob("round-????"))]
        for folder in folders
    ]
    assert found[0] == found[1]
    assert len(set(found[0])) > 1


def test_rounds_that_a_check_inside_ends_are_those_of_one_process_and_verify(single, pair):
    runs, _, two_dir = runs_of("checked", single, pair)
    for finished in runs:
        finished.batch = 4
    assert runs[0].rows == runs[1].rows
    assert verify_run(two_dir).problem is None
    early = load_round(two_dir / "_mates/round-0004").info["early"]
    assert (early["round"], early["step"]) == (3, 27)
    assert (two_dir / "_mates/round-0003/check-000027.json").exists()


def test_rounds_that_drift_starts_early_are_those_of_one_process_and_verify(single, pair):
    runs, _, two_dir = runs_of("drifts", single, pair)
    assert runs[0].rows == runs[1].rows
    result = verify_run(two_dir)
    assert result.problem is None
    assert [checked.number for checked in result.rounds] == [1, 2, 3, 4, 5]
