"""An audit is never fatal: what fails is recorded, told once, and the round selects; in all processes together."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mates_hf import MatesCallback, load_round
from mates_hf.engine.processes import Processes
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.training import measure
from tests.training.kit import make_arguments, make_pool, make_reference, run, small_config


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (ValueError("a loss of ours"), "ValueError: a loss of ours"),
    ],
)
def test_a_round_whose_audit_fails_selects_all_the_same(
    tmp_path: Path, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **settings: Any) -> Any:
        raise error

    monkeypatch.setattr(OneStepProbe, "measure", fail)
    with caplog.at_level(logging.WARNING):
        run(make_arguments(tmp_path, max_steps=10), [MatesCallback(make_reference(), small_config())], make_pool())
    record = load_round(tmp_path / "_mates" / "round-0001")
    assert record.info["fidelity"] == {"not_audited": reason}
    assert record.info["guard"]["decision"] == "select"
    assert [m.getMessage() for m in caplog.records if "not audited" in m.getMessage()] == [
        f"Round 1 is not audited: {reason}"
    ]


def test_an_audit_leaves_the_state_of_the_optimizer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of it is made, and so there is nothing to put back."""
    found: list[bool] = []

    def refuse(*args: Any, **settings: Any) -> Any:
        found.append(True)
        raise AssertionError("the optimizer's state was copied")

    monkeypatch.setattr("mates_hf.engine.preserve._remember_optimizer", refuse)
    run(make_arguments(tmp_path, max_steps=10), [MatesCallback(make_reference(), small_config())], make_pool())
    fidelity = load_round(tmp_path / "_mates" / "round-0001").info["fidelity"]
    assert not found
    assert fidelity["spearman"] > 0.5


class Pair(Processes):
    """Two processes as threads of one: what they add up meets at a barrier, and a lost one would leave it waiting."""

    shared: dict[int, npt.NDArray[Any]] = {}
    barrier = threading.Barrier(2, timeout=20)

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self.shared[self.rank] = values.copy()
        self.barrier.wait()
        total = self.shared[0] + self.shared[1]
        self.barrier.wait()
        values[...] = total
        return values


@pytest.mark.parametrize("fails_before", [0, 1, 2, 3, None])
def test_processes_end_an_audit_together(fails_before: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here(measure._Together, Pair):
        pass

    def work(run: Any, ids: Any, epsilon: float, seed: int, together: Processes) -> str:
        for number in range(4):
            if together.rank == 1 and number == fails_before:
                raise torch.OutOfMemoryError("out of memory")
            if number < 3:
                assert together.sum(np.ones(2)).tolist() == [2, 2]
        return "measured"

    monkeypatch.setattr(measure, "_Together", Here)
    monkeypatch.setattr(measure, "_audit_labels", work)
    found: dict[int, Any] = {}

    def audit(rank: int) -> None:
        class Run:
            processes = Pair(rank, 2)
            model = torch.nn.Linear(1, 1)
            probe = None  # neither a sharded model nor a loss of one's own

        found[rank] = measure._audit(Run(), np.zeros(1), 0.1, 0)  # type: ignore[arg-type]

    threads = [threading.Thread(target=audit, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    if fails_before is None:
        assert found == {0: "measured", 1: "measured"}
    else:
        assert found == {
            0: "another process could not measure its share",
            1: "OutOfMemoryError: out of memory",
        }
