"""Real DeepSpeed in two processes: a probe leaves no trace in its engine, and data are chosen as by one plain process.

All settings run one after the other in one pair of processes, because each start costs more than a run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.launch import ROOT, free_port, run_script, start_processes
from tests.training.settings import proves

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
ZERO = "DeepSpeed ZeRO 1, 2 and 3 (`deepspeed`, `accelerate launch --use_deepspeed`), float32, bf16, CPU offload"
ZERO_0 = "DeepSpeed ZeRO 0 in float32"
WORKER = "tests/training/deepspeed_worker.py"
FLOAT32 = 1e-4  # of the largest label: sums of gradients in another order
BFLOAT16 = 0.98  # rank correlation with labels in float32
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def zero(stage: int, **changes: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **changes}}


def bf16(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "bf16": {"enabled": True}}


HOST, EVERYTHING_CUT = {"device": "cpu"}, {"stage3_param_persistence_threshold": 0}
TORCH_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
TIED = {"tied": True, "args": CHECKPOINTED}
# Name: config of DeepSpeed, what else differs, the class of DeepSpeed's optimizer.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    **{
        f"zero{stage}-{name}": (how(zero(stage)), {}, "DeepSpeedZeroOptimizer" + "_Stage3" * (stage == 3))
        for stage in (1, 2, 3)
        for name, how in (("float32", dict), ("bfloat16", bf16))
    },
    "zero0-float32": (zero(0), {}, "AdamW"),
    "zero3-nothing-persistent": (zero(3, **EVERYTHING_CUT), {}, "DeepSpeedZeroOptimizer_Stage3"),
    "zero3-nothing-persistent-bfloat16": (bf16(zero(3, **EVERYTHING_CUT)), {}, "DeepSpeedZeroOptimizer_Stage3"),
    "zero3-overlapping": (zero(3, overlap_comm=True, **EVERYTHING_CUT), {}, "DeepSpeedZeroOptimizer_Stage3"),
    "zero3-tied-checkpointed": (zero(3, **EVERYTHING_CUT), TIED, "DeepSpeedZeroOptimizer_Stage3"),
    "zero2-tied-checkpointed-overlapping": (zero(2, overlap_comm=True), TIED, "DeepSpeedZeroOptimizer"),
    "zero1-float32-gradients-bfloat16": (
        bf16({**zero(1), "data_types": {"grad_accum_dtype": "fp32"}}), {}, "BF16_Optimizer"),
    "zero2-offload-bfloat16": (
        bf16({**zero(2, offload_optimizer=HOST), "zero_force_ds_cpu_optimizer": False}), {}, "DeepSpeedZeroOptimizer"),
    "zero3-offload-bfloat16": (
        bf16({**zero(3, offload_optimizer=HOST, offload_param=HOST), "zero_force_ds_cpu_optimizer": False}), {},
        "DeepSpeedZeroOptimizer_Stage3"),
    "zero2-its-own-config-of-the-optimizer": ({**zero(2), "optimizer": TORCH_ADAMW}, {}, "DeepSpeedZeroOptimizer"),
}  # fmt: skip
IN_CHUNKS = ("zero1-bfloat16", "zero2-float32", "zero3-nothing-persistent", "zero3-tied-checkpointed")
SAVES = {"max_steps": 20, "save_strategy": "steps", "save_steps": 8}


def further_runs(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for stage in (1, 3):
        run = {"deepspeed": zero(stage), "selects": True, "folder": f"saved{stage}", "args": SAVES}
        found[f"selects{stage}"] = run
        checkpoint = str(folder / "two" / f"saved{stage}" / "checkpoint-8")
        found[f"resumes{stage}"] = {**run, "resume": checkpoint}
    found["loop"] = {"loop": zero(3, **EVERYTHING_CUT)}
    for evaluates in (True, False):
        found[f"evaluates{evaluates}"] = {"deepspeed": zero(3, **EVERYTHING_CUT), "evaluation": evaluation(evaluates)}
    return found


def evaluation(evaluates: bool) -> dict[str, Any]:
    return {"evaluates": evaluates, "tasks": ["mates_sciq_local"], "data_dir": os.environ["MATES_TEST_DATA"]}


def start(folder: Path, runs: list[dict[str, Any]], size: int, name: str) -> tuple[list[int], list[str], list[Any]]:
    """Exit codes, errors, and by process what it saw of each run."""
    given = {"output_dir": str(folder / name), "result": str(folder / f"result-{name}"), "runs": runs}
    processes = start_processes([WORKER, json.dumps(given)], size, free_port())
    try:
        # At once: one that fills the pipe of its errors waits until it is read, and the other with it.
        with ThreadPoolExecutor(size) as readers:
            errors = list(readers.map(lambda process: process.communicate(timeout=400)[1], processes))
    finally:
        for process in processes:
            process.kill()
    paths = [folder / f"result-{name}-{rank}.json" for rank in range(size)]
    return (
        [process.returncode for process in processes],
        errors,
        [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()],
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one plain process saw, by name, and what both of two under DeepSpeed saw."""
    from tests.evaluation.kit import write_local

    folder = tmp_path_factory.mktemp("deepspeed")
    os.environ["MATES_TEST_DATA"] = str(write_local(folder / "data"))
    batch = {"per_device_train_batch_size": 8}
    plain = {
        "plain": {"looks": True, "args": batch},
        "tied": {"looks": True, **TIED, "args": {**CHECKPOINTED, **batch}},
        "selects": {"selects": True, "args": {"max_steps": 20, **batch}},
        "plain loop": {"loop": None},
    }
    codes, errors, (one,) = start(folder, list(plain.values()), 1, "one")
    assert codes == [0], errors
    runs: dict[str, dict[str, Any]] = {}
    for name, (config, changes, _) in SETTINGS.items():
        runs[name] = {"deepspeed": config, "looks": True, "chunks": name in IN_CHUNKS, **changes}
        runs[f"{name} without"] = {"deepspeed": config, **changes}
    runs |= further_runs(folder)
    codes, errors, two = start(folder, list(runs.values()), 2, "two")
    assert codes == [0, 0], errors
    return dict(zip(plain, one, strict=True)) | {name: (two[0][i], two[1][i]) for i, name in enumerate(runs)}


def in_order(first: list[int], second: list[int], rows: int = 4) -> list[int]:
    """The rows of two processes as they make up batches."""
    return np.stack([np.reshape(first, (-1, rows)), np.reshape(second, (-1, rows))], 1).reshape(-1).tolist()


def ranks(values: list[float]) -> Any:
    return np.argsort(np.argsort(values))


@proves(
    ZERO,
    "gathered weights, float32 copies, moments and counters of the engine are the same after a probe, and so "
    "are the losses of the run; labels are in one plain process's order (bf16: rank correlation above 0.98)",
    note="two processes; gloo, for which accelerate has no backend and the test adds one; a round has no audit",
)
@proves(ZERO_0, "as ZeRO 1 to 3", note="trains as DDP does")
@pytest.mark.parametrize("name", SETTINGS)
def test_probes_leave_no_trace_in_the_engine_and_measure_what_one_process_does(results, name):
    config, changes, kind = SETTINGS[name]
    plain = results["tied" if "tied" in changes else "plain"]
    for seen, without in zip(results[name], results[f"{name} without"], strict=True):
        # Trained without DeepSpeed, all of this would hold as well.
        assert (seen["engine"], seen["optimizer"], seen["inner"]) == ("DeepSpeedEngine", kind, "AdamW")
        assert seen["same"]
        assert seen["end"] == without["end"]
        assert seen["losses"] == without["losses"]
        assert seen["equal"]
        assert seen["moved"]
    first, second = results[name]
    whole = 1 if kind == "AdamW" else 2
    assert first["stored"] + second["stored"] == 2 * plain["stored"] // whole
    for what in ("labels", "path", "averaged"):
        assert first[what] == second[what]
        expected, found = np.array(plain[what]), np.array(first[what])
        if "bf16" in config:
            assert np.corrcoef(ranks(expected), ranks(found))[0, 1] > BFLOAT16
        elif "optimizer" not in config:  # which has all parameters in one group, with weight decay
            assert ranks(found).tolist() == ranks(expected).tolist()
            assert np.abs(found - expected).max() < FLOAT32 * np.abs(expected).max()
    assert first["mean_losses"] == pytest.approx(plain["mean_losses"], rel=5e-3)
    assert first["digest"] == second["digest"]


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_losses_made_in_the_head_give_the_labels_of_all_logits(results, name):
    whole, in_chunks = np.array(results[name][0]["chunked"])
    apart = 1e-2 if "bf16" in SETTINGS[name][0] else 1e-5  # in bfloat16 each loss is rounded, and differs by less
    np.testing.assert_allclose(in_chunks, whole, rtol=0, atol=apart * np.abs(whole).max())
    assert results[name][1]["chunked"] == results[name][0]["chunked"]


@proves(ZERO, "the rows of one plain process in its order; resumes exactly")
@pytest.mark.parametrize("stage", [1, 3])
def test_rows_are_those_of_one_plain_process_also_when_resumed(results, stage):
    plain, (first, second) = results["selects"], results[f"selects{stage}"]
    assert in_order(first["rows"], second["rows"]) == plain["rows"]
    assert first["rounds"][-1]["mates/reference_loss"] == pytest.approx(plain["rounds"][-1]["mates/reference_loss"])
    resumed = results[f"resumes{stage}"]
    assert in_order(resumed[0]["rows"], resumed[1]["rows"]) == plain["rows"][8 * 8 :]
    assert resumed[0]["losses"] == first["losses"]
    assert [seen["weights"] for seen in resumed] == [first["weights"]] * 2


def test_a_loop_of_ones_own_chooses_the_rows_of_one_plain_process(results):
    assert [seen["optimizer"] for seen in results["loop"]] == ["DeepSpeedZeroOptimizer_Stage3"] * 2
    for seen in results["loop"]:
        assert [sorted(step) for step in seen["rows"]] == [sorted(step) for step in results["plain loop"]["rows"]]


def test_the_live_model_is_evaluated_under_zero_3_without_a_trace(results):
    logs = [[seen["log"] for seen in results[f"evaluates{evaluates}"]] for evaluates in (True, False)]
    losses = [[entry["loss"] for entry in each[0] if "loss" in entry] for each in logs]
    assert losses[0] == losses[1]  # dropout is on
    found = [[{k: v for k, v in e.items() if k.startswith("lm_eval/mates")} for e in log] for log in logs[0]]
    assert found[0] == found[1]
    assert sum(map(bool, found[0])) == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_a_process_that_fails_in_a_probe_does_not_let_the_other_wait_for_ever(tmp_path, stage):
    run = {"deepspeed": zero(stage), "selects": True, "fails": True, "args": {"max_steps": 20}}
    codes, errors, _ = start(tmp_path, [run], 2, "failing")
    assert all(codes)
    assert "process 1 broke" in errors[1]
    assert "Process 1 of 2" in errors[0]


@proves(ZERO, "the same by `accelerate launch`")
def test_accelerate_launch_starts_it_as_well(results, tmp_path):
    run = {"selects": True, "args": {"max_steps": 20}}
    given = {"output_dir": str(tmp_path / "out"), "result": str(tmp_path / "result"), "runs": [run]}
    launch = ["--use_deepspeed", "--zero_stage", "2", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--gradient_clipping", "1.0", "--main_process_port", free_port()]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, WORKER, json.dumps(given)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text(encoding="utf-8"))[0] for rank in (0, 1))
    assert first["optimizer"] == "DeepSpeedZeroOptimizer"
    assert in_order(first["rows"], second["rows"]) == results["selects"]["rows"]


CPU_ADAM = """
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from mates_hf.engine.deepspeed_optimizer import ShardedOptimizer
from mates_hf.engine.deepspeed_shards import weights_of
from mates_hf.influence.preconditioner import parameter_steps
from tests.engine.test_fragments import make_engine

for decoupled in (True, False):
    model, engine, flat = make_engine(DeepSpeedCPUAdam, weight_decay=0.1, adamw_mode=decoupled)
    weights = weights_of(engine, model)
    before = flat.detach().clone()
    for step in parameter_steps(ShardedOptimizer(weights, engine), list(weights.parameters().values())):
        step.write_null()
    null = flat.detach().clone()
    with torch.no_grad():
        flat.copy_(before)
    flat.grad = torch.zeros_like(flat)
    engine.optimizer.step()
    assert (null - before).abs().max() > 0.01
    assert torch.allclose(flat, null, atol=1e-5)
"""


def test_the_null_step_of_deepspeeds_cpu_adam_is_its_real_one(tmp_path, monkeypatch):
    from torch.utils.cpp_extension import _get_build_directory

    if not (Path(_get_build_directory("cpu_adam", False)) / "cpu_adam.so").exists():
        pytest.skip("its C++ part, which takes minutes to build, was never built here")
    if not os.environ.get("MATES_TEST_CPU_ADAM"):
        pytest.skip("its C++ part may have to be built again, which takes minutes: set MATES_TEST_CPU_ADAM=1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_script(tmp_path, CPU_ADAM, size=1)
