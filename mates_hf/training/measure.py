"""What all processes measure together when the main one asks: a round's labels, its audit, a check's few rows.

Where it is used: the main process runs the round (`rounds`) and asks; the others `assist` until it says what comes
next. Model, optimizer, pool and reference are there in every process, so a question is a few ids and numbers.

An audit is worth less than the run: what goes wrong in one, in any process, ends the audit in all of them and no more.
Only where weights are sharded and one process fails amid a forward pass does the run end, by that process's name: the
others wait for it where nobody could tell them.

Trade-off: every process reads all probed rows and holds all labels, though it measures only its share. They are small
beside the model, and probes stay free of who does what.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mates_hf.config import NUM_AUDIT_PASSAGES
from mates_hf.engine.digest import weights_digest
from mates_hf.engine.model_traits import is_out_of_memory, is_sharded
from mates_hf.engine.processes import ProcessError, Processes
from mates_hf.engine.running_statistics import running_statistics, with_statistics
from mates_hf.errors import InfluenceError, UnrankableError
from mates_hf.flops import sentinel_passages
from mates_hf.influence.micro_batches import ProbeMemoryError
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.training.run import Run

_MEETING_SECONDS = 8.0  # in which all come to a meeting, or sit in a collective of the model's own


def measure_labels(run: Run, ids: IntArray, shards_dir: Path) -> InfluenceLabels:
    """Labels of a round's probed candidates, by the run's own probe on the whole reference task.

    What is measured goes to `shards_dir` bit by bit, so that a killed probe goes on from there.
    """
    _ask(run, "labels", ids)
    return _labels(run, ids, shards_dir)


def measure_audit(
    run: Run, ids: IntArray, *, epsilon: float, seed: int
) -> tuple[InfluenceLabels, InfluenceLabels] | str:
    """The same candidates by the derivative of a single step and by real steps, both on the same few passages.

    Args:
        run: the run's state.
        ids: Pool rows of the candidates.
        epsilon: that the round's labels were measured with.
        seed: Random seed of which passages are read.

    Returns:
        Both labels, or in one line why there are none.
    """
    _ask(run, "audit", ids, epsilon=epsilon, seed=seed)
    return _audit(run, ids, epsilon, seed)


def measure_sentinel(run: Run, ids: IntArray, *, epsilon: float | None, seed: int) -> InfluenceLabels:
    """Labels of a few candidates on a share of the reference task; the same share for the same seed."""
    _ask(run, "sentinel", ids, epsilon=epsilon, seed=seed)
    return _sentinel(run, ids, epsilon, seed)


def measure_digest(run: Run) -> str:
    """Digest of the weights as they are, which all processes add up."""
    _ask(run, "digest", np.zeros(0, np.int64))
    return weights_digest(run.model, run.processes)


def release(run: Run, due: int | None) -> None:
    """Tell the processes that assist that nothing more is measured.

    Args:
        run: the run's state.
        due: the step at whose end the round's order is needed; None where no round was due, and all go on as before.
    """
    run.processes.publish({"go_on": True, "due": due})


def assist(run: Run) -> int | None:
    """Every process but the main one: measure what it asks for, until it says that nothing more is.

    Args:
        run: the run's state.

    Returns:
        The step at whose end the order of a round is needed, or None where there is no round.

    Raises:
        ProcessError: the main process failed.
    """
    while True:
        message, arrays = run.processes.receive()
        if "measure" not in message:
            due: int | None = message["due"]
            return due
        with with_statistics(run.model, arrays):
            _assist(run, message, arrays)


def _assist(run: Run, message: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Measure once what the main process asks for."""
    what = message["measure"]
    if what == "labels":
        _labels(run, arrays["ids"], None)
    elif what == "digest":
        weights_digest(run.model, run.processes)
    elif what == "audit":
        _audit(run, arrays["ids"], message["epsilon"], message["seed"])
    elif what == "sentinel":
        with contextlib.suppress(InfluenceError):  # which the main process sees as well, and decides upon
            _sentinel(run, arrays["ids"], message["epsilon"], message["seed"])


def _ask(run: Run, what: str, ids: IntArray, **details: Any) -> None:
    statistics = running_statistics(run.model) if run.processes.size > 1 else {}
    run.processes.publish({"measure": what, **details}, ids=np.asarray(ids, np.int64), **statistics)


def _labels(run: Run, ids: IntArray, shards_dir: Path | None) -> InfluenceLabels:
    probe = run.probe.for_run(dataclasses.replace(run.settings, shards_dir=shards_dir))
    try:
        return probe.measure(run.model, run.optimizer, run.reference, run.pool.select(ids)).check()
    except UnrankableError as error:
        if error.labels is None:
            raise
        labels: InfluenceLabels = error.labels
        return labels  # the round sees that they rank nothing, and stays in the own order


class _OtherFailedError(Exception):
    """Another process could not do its share of an audit."""


class _NobodyCameError(Exception):
    """The others wait for this process where nobody can tell them that it failed."""


class _Together(Processes):
    """Processes of which one may fail without the others waiting for it: each says so where they next meet.

    Args:
        processes: those of the run.
    """

    def __init__(self, processes: Processes) -> None:
        vars(self).update(vars(processes))
        self.until: float | None = None  # time.monotonic

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """As always, unless a process has failed since they last met."""
        self.meet()
        return super().sum(values)

    def meet(self, *, failed: bool = False) -> None:
        """Say whether this process has failed, and hear it of the others; once for each meeting of theirs."""
        num_failed = super().sum(np.array([float(failed)]))[0]
        if num_failed and not failed:
            raise _OtherFailedError

    def _wait_for(self, work: Any) -> None:
        """As always, but not for longer than `until`, if that is set."""
        while self.until is not None and not work.is_completed() and time.monotonic() < self.until:
            time.sleep(0.01)
        if self.until is not None and not work.is_completed():
            raise _NobodyCameError
        super()._wait_for(work)


def _audit(run: Run, ids: IntArray, epsilon: float, seed: int) -> tuple[InfluenceLabels, InfluenceLabels] | str:
    together, unmet = _Together(run.processes), None
    try:
        found = _audit_labels(run, ids, epsilon, seed, together)
        together.meet()
        return found
    except ProcessError:
        raise  # a connection is gone, which is the run's end anyway
    except _OtherFailedError:
        return "another process could not measure its share"
    except Exception as error:
        ran_out = isinstance(error, ProbeMemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error))
        if ran_out and run.processes.size > 1 and is_sharded(run.model):
            raise  # the others wait for this one in the middle of a forward pass
        reason = f"{type(error).__name__}: {error}"
        if run.processes.size > 1 and (is_sharded(run.model) or getattr(run.probe, "loss", None) is not None):
            together.until, unmet = time.monotonic() + _MEETING_SECONDS, error
    # Outside of the handler, so that the traceback no longer holds the tensors of what failed.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        together.meet(failed=True)
    except _NobodyCameError:
        assert unmet is not None
        raise unmet from None
    return reason


def _audit_labels(
    run: Run, ids: IntArray, epsilon: float, seed: int, processes: Processes
) -> tuple[InfluenceLabels, InfluenceLabels]:
    assert isinstance(run.probe, DirectionalProbe)
    candidates, passages = run.pool.select(ids), run.reference.subset(NUM_AUDIT_PASSAGES, seed)
    quiet = dataclasses.replace(run.settings, progress=False, processes=processes)
    probe = dataclasses.replace(run.probe, processes=None)
    derivative = dataclasses.replace(probe.for_run(quiet), epsilon=epsilon, path_steps=1)
    real_steps = OneStepProbe(loss=run.probe.loss, reference_loss=run.probe.reference_loss).for_run(quiet)
    return (
        derivative.measure(run.model, run.optimizer, passages, candidates),
        real_steps.measure(run.model, run.optimizer, passages, candidates),
    )


def _sentinel(run: Run, ids: IntArray, epsilon: float | None, seed: int) -> InfluenceLabels:
    # The sentinel's own seed: a drift check must read what the round did, whatever the seed of the round to come.
    probe = run.probe.for_run(dataclasses.replace(run.settings, progress=False, seed=seed))
    if isinstance(probe, DirectionalProbe):
        probe = dataclasses.replace(probe, epsilon=epsilon)
    num = sentinel_passages(len(run.reference), trains=isinstance(run.probe, LossReductionProbe))
    passages = run.reference.subset(num, seed)
    return probe.measure(run.model, run.optimizer, passages, run.pool.select(ids)).check()
