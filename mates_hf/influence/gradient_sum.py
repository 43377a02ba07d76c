"""The gradient of a sum of losses, added to what `.grad` holds: how a path keeps one buffer for all of its points.

Where it is used: `reference_path` reads the reference task share by share through here. P is the same at every point,
so the sum of P g is P times the sum of g, and neither a second gradient nor a mean over shares is needed.

Trade-off: where memory runs out in the middle, what the earlier shares left is lost with the rest, and the path starts
again with smaller micro-batches. `mean_loss_gradient` starts only its own share again, at the price of the buffer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mates_hf.data.batches import Candidates
from mates_hf.engine.processes import Processes
from mates_hf.engine.weight_store import weight_store
from mates_hf.influence import passes as passes
from mates_hf.influence.micro_batches import run_batches
from mates_hf.influence.passes import LossFunction


class _MemoryRanOutError(Exception):
    """Leaves the loop over micro-batches before it tries smaller ones."""


def add_gradient_of_sum(
    model: nn.Module,
    rows: Candidates,
    *,
    tokens_per_batch: int,
    loss: LossFunction | None,
    processes: Processes,
) -> float | None:
    """Add the gradient of the sum of the losses of all trained tokens to `.grad`.

    Args:
        model: a language model with trainable parameters.
        rows: with T > 0 trained tokens, the same in every process.
        tokens_per_batch: padded tokens in one micro-batch of a process at most.
        loss: the run's own loss in place of the likelihood.
        processes: those that share the rows and call this together.

    Returns:
        Mean loss, nats/token; like the gradient, that of all rows in every process. None where memory ran out in a
        process: `.grad` is then of no use in any.

    Raises:
        ProbeMemoryError: one row alone does not fit into memory.
        ProcessError: another process failed.
    """
    kept = passes.LossesOnDevice()
    rows = passes.measured_apart(rows)
    store = weight_store(model)

    def accumulate(batch: npt.NDArray[np.int64], counts: bool) -> None:
        values = passes.batch_losses(model, rows, batch, loss)
        store.backward(values, torch.full_like(values, 1.0 if counts else 0.0))
        if counts:
            kept.add(batch, values.detach())

    def give_up() -> None:
        raise _MemoryRanOutError

    _leave_to_one(model, processes)
    lost = False
    try:
        with torch.enable_grad():
            run_batches(
                model,
                rows,
                accumulate,
                tokens_per_batch=tokens_per_batch,
                one_row=loss is not None or rows.one_by_one,
                restart=give_up,
                processes=processes,
            )
    except _MemoryRanOutError:
        lost = True
    mine = sum(float(values.sum(dtype=torch.float64).numpy()) for _, values in kept.on_host())
    total, num_lost = processes.sum(np.array([mine, float(lost)]))
    if num_lost:
        return None
    processes.sum_gradients(store.parameters().values())
    return float(total) / int(rows.num_targets.sum())


@torch.no_grad()
def _leave_to_one(model: nn.Module, processes: Processes) -> None:
    """What every process holds so far, in a form that adding up over processes counts once."""
    for parameter in weight_store(model).parameters().values():
        if parameter.grad is None or processes.size == 1:
            continue
        if hasattr(parameter, "to_local"):
            parameter.grad.div_(processes.size)  # multiplied again with the mean that sharding made of the new one
        elif not processes.is_main:
            parameter.grad.zero_()
