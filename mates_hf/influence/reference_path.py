"""The direction in which the reference loss falls, over one step or along a path of many.

Place in the flow: the first half of `DirectionalProbe.measure`; `difference` is the second.

What lowers the reference loss in one step need not be what lowers it over a round, so the preconditioned gradient
Pᵀ ∇L_ref may be read at several points instead of at θ_null alone. They lie on the way that training on the reference
task itself would take: point i at i strides from θ_null, down the mean of what the points before it gave. The points
share the passages, so that the task is read once either way, and the direction u is the mean over them.

A stride is as long as the run's own steps are: the null step, which is all momentum, tells (0.95 of a real one where
it was measured). So a point that reads few passages cannot throw the path off, however noisy its gradient is.

Trade-off: P is the live one at every point, and momentum is left out: a path needs no copy of the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mates_hf.data.batches import Candidates
from mates_hf.influence.difference import Direction, norm_of
from mates_hf.influence.parameter_step import ParameterStep
from mates_hf.preserve import Snapshot, local_shard

MIN_PASSAGES = 4  # that a point of a path reads: fewer are mostly noise


def parts_of_path(rows: Candidates, path_steps: int, seed: int) -> list[Candidates]:
    """What each point of a path reads: all rows at a single one, else shares of about as many rows, drawn with `seed`.

    Args:
        rows: the reference task's.
        path_steps: points asked for; fewer where they would read less than four passages.
        seed: of who reads what.

    Returns:
        Parts that have all trained rows once.
    """
    trained = np.flatnonzero(rows.num_targets)
    num_points = min(path_steps, len(trained) // MIN_PASSAGES)
    if num_points <= 1:
        return [rows]
    order = np.random.default_rng(seed).permutation(trained)
    return [rows.take(np.sort(part)) for part in np.array_split(order, num_points)]


def descend(
    snapshot: Snapshot,
    steps: Sequence[ParameterStep],
    parts: Sequence[Candidates],
    gradient: Callable[[Candidates], float],
    *,
    path_rate: float,
    squares: Mapping[nn.Parameter, Tensor],
    left_out: Collection[int],
    flops: float,
) -> Direction:
    """Walk the path and take the mean of the preconditioned gradients; parameters are left as found.

    Args:
        snapshot: of the model, to go back to.
        steps: the optimizer's next step of each parameter.
        parts: rows that each point reads.
        gradient: leaves the gradient of the mean loss of some rows in `.grad`, and returns that loss.
        path_rate: length of a stride in the run's own steps.
        squares: E[g_B²] where the optimizer's state does not tell it.
        left_out: ids of parameters that do not move.
        flops: what all of it takes, to be noted.

    Returns:
        The mean over the path of (c_p / step_size) Pᵀ ∇L_ref, of each parameter that moves. Its norm is not finite
        where a gradient is not.
    """
    step_size = max(abs(step.coefficient) for step in steps)  # one scalar for all; the ratios go into u
    total: dict[nn.Parameter, Tensor] = {}
    losses: list[float] = []
    stride = norm = 0.0
    for number, part in enumerate(parts):
        with torch.no_grad():
            if number == 0:
                null_step = norm_of(_write_null(step) for step in steps)
            else:
                snapshot.rewind_parameters()
                for step in steps:
                    step.write_null()
                    if step.parameter in total:
                        length = path_rate * stride * number / norm
                        local_shard(step.parameter).sub_(local_shard(total[step.parameter]), alpha=length)
        snapshot.written()
        losses.append(gradient(part))
        for step in steps:
            found, parameter = step.parameter.grad, step.parameter
            if found is None or id(parameter) in left_out:
                continue
            with torch.no_grad():
                scale = step.coefficient / step_size / len(parts)
                step.precondition(local_shard(found), scale, squares.get(parameter))
                if parameter in total:
                    local_shard(total[parameter]).add_(local_shard(found))
                else:
                    total[parameter] = found
        norm = norm_of(total.values())
        if number == 0:
            # Without momentum a null step is weight decay at most; there a step on this share says how long one is.
            stride = null_step if any(step.momentum for step in steps) else step_size * norm * len(parts)
        if not np.isfinite(norm) or norm == 0:
            break
    with torch.no_grad():
        snapshot.rewind_parameters()  # ‖θ‖ is of where the run is
    weights = [int(part.num_targets.sum()) for part in parts[: len(losses)]]
    return Direction(
        by_parameter=total,
        step_size=step_size,
        norm=norm,
        parameter_norm=norm_of(total),
        reference_loss=float(np.average(losses, weights=weights)),
        flops=flops,
        path_losses=tuple(losses),
    )


def _write_null(step: ParameterStep) -> Tensor:
    """Take the null step of a parameter; by how much it moved."""
    before = step.parameter.detach().clone()
    step.write_null()
    return step.parameter.detach() - before
