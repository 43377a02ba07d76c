"""Does a row fit into a device whole, where training only ever sees parts of it (context parallelism)?

Where it is used: `start` asks before the first step of a run whose processes share rows. A probe runs rows whole, on
all processes, forward and backward; the run's own steps say nothing of whether that fits.

Trade-off: the longest of 64 fixed rows stands for all of the pool, and it runs before the optimizer has any state.
What it took is kept for the check at the end of the first step (`memory`), which counts the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from mates_hf.data.batches import Candidates, LossFunction
from mates_hf.data.columns import fixed_positions
from mates_hf.data.pool import CandidatePool
from mates_hf.engine.model_traits import is_out_of_memory
from mates_hf.engine.preserve import in_evaluation, preserved
from mates_hf.errors import MatesError
from mates_hf.influence.micro_batches import ProbeMemoryError
from mates_hf.influence.own_probes import OWN_PROBES
from mates_hf.influence.passes import mean_loss_gradient
from mates_hf.training import memory
from mates_hf.training.checks.parallel import context_parallel_size
from mates_hf.training.run import Run

NUM_ROWS = 64


def require_whole_rows(run: Run) -> None:
    """Run the longest rows forward and backward where processes share rows; all processes must call it.

    Args:
        run: The state of the run; the model stays as it is. `row_memory` gets what a row took.

    Raises:
        ProbeMemoryError: a row does not fit; names it and its length.
        ProcessError: another process failed.
    """
    if context_parallel_size() == 1 or not isinstance(run.probe, OWN_PROBES):
        return
    ids = run.pool.candidate_ids[fixed_positions(len(run.pool), NUM_ROWS)]
    reading = run.pool.reading
    loss = run.probe.loss or (None if reading is None else reading.loss)
    rows, passages = run.pool.candidates(ids), run.reference.measured
    row, passage = _longest(rows), _longest(passages)
    taken = [
        _run_one(run, rows, row, loss, f"pool row {ids[row]}"),
        _run_one(run, passages, passage, run.probe.reference_loss, f"passage {passage} of the reference task"),
    ]
    run.row_memory = max(taken)


@contextlib.contextmanager
def named_where_memory_ends(pool: CandidatePool) -> Iterator[None]:
    """What runs out of memory inside, where processes share rows, is told as what it is: rows run whole.

    Args:
        pool: Some of its fixed rows are run inside.

    Raises:
        ProbeMemoryError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MatesError) or not is_out_of_memory(error) or context_parallel_size() == 1:
            raise
        ids = pool.candidate_ids[fixed_positions(len(pool), NUM_ROWS)]
        rows = pool.candidates(ids)
        row = _longest(rows)
        raise ProbeMemoryError(_refusal(f"pool row {ids[row]}", int(rows.lengths[row]))) from error


def _longest(rows: Candidates) -> int:
    """Place of the longest row that trains something."""
    return int(np.argmax(np.where(rows.num_targets > 0, rows.lengths, 0)))


def _run_one(run: Run, rows: Candidates, place: int, loss: LossFunction | None, name: str) -> int:
    """Bytes that a row took at its peak, beside what a probe holds; 0 where that cannot be told.

    Raises:
        ProbeMemoryError: it does not fit.
    """
    device = memory.only_device(run.model)
    before = None if device is None else memory.device_memory(device)
    try:
        with preserved(run.model), in_evaluation(run.model):
            one = rows.take(np.array([place]))
            mean_loss_gradient(run.model, one, tokens_per_batch=1, loss=loss, processes=run.processes)
    except ProbeMemoryError as error:
        raise ProbeMemoryError(_refusal(name, int(rows.lengths[place]))) from error
    if device is None or before is None:
        return 0
    after = memory.device_memory(device)
    memory.forget_peak(device)  # it is not that of training, which `memory` will ask for
    taken = 0 if after is None or after.peak <= before.peak else after.peak - before.allocated
    return max(0, taken - memory.copied_by_probe(run.model))


def _refusal(name: str, length: int) -> str:
    return (
        f"With `cp_size={context_parallel_size()}` training splits rows, but a probe runs them whole: "
        f"{name} of {length:,} tokens must fit into a device beside the model, forward and backward, and memory ran "
        "out. Turn on activation checkpointing (`gradient_checkpointing`), or shorten the rows."
    )
