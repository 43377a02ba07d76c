"""How far a path goes: as far as the coming round will, by the learning rates that are scheduled for it.

Where it is used: the training loop asks `rate_steps` and puts the answer into `RunSettings`; `DirectionalProbe` asks
`steps_per_stride`. In a decay or a warm-up a round is worth more or fewer of the steps that the run takes now.

Trade-off: a schedule is read by a copy of the scheduler that steps on its own, which works for whatever depends on the
number of steps alone; of one that reacts to a metric, the present rate is taken for that of the whole round.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

MAX_STEPS = 32.0  # own steps of a path at the run's peak rate, however long its rounds are: the longest ablated
DEFAULT_STRIDE = 0.5  # own steps, where nothing is known of the run


def rate_steps(scheduler: Any, num_steps: int, learning_rates: Sequence[float]) -> float:
    """The coming optimizer steps, counted in steps at the present learning rates: by the sums of the rates.

    Args:
        scheduler: the run's learning rate scheduler as it is before the first of these steps, wrapped by accelerate
            or not; None is a constant rate. It is left as it is.
        num_steps: optimizer steps to come.
        learning_rates: the present ones, one a parameter group, not all 0.

    Returns:
        The sum over the steps of the rates of all groups, over the sum of the present ones; `num_steps` where the
        schedule cannot be told.
    """
    present = sum(abs(float(rate)) for rate in learning_rates)
    if scheduler is None or num_steps < 1 or not present:
        return float(num_steps)
    try:
        total = _sum_of_rates(scheduler, num_steps)
    except Exception as error:
        # Any code of the user's may be in a scheduler. What it cannot tell, a constant rate stands for.
        logger.debug("the schedule of learning rates cannot be read ahead (%s: %s)", type(error).__name__, error)
        return float(num_steps)
    return total / present


def steps_per_stride(
    num_points: int, rates_ahead: float | None, optimizer: torch.optim.Optimizer, learning_rates: Sequence[float]
) -> float:
    """Length of a stride in the run's own steps, so that all strides together are as long as the round.

    Args:
        num_points: Points of the path.
        rates_ahead: `rate_steps` of the coming round; None where there is no round.
        optimizer: the live one; a scheduler has left the peak rate in its groups.
        learning_rates: the present ones, one a parameter group.

    Returns:
        Own steps, at the present rates.
    """
    if rates_ahead is None:
        return DEFAULT_STRIDE
    present = sum(abs(rate) for rate in learning_rates)
    groups = zip(optimizer.param_groups, learning_rates, strict=True)
    peak = sum(max(abs(float(group.get("initial_lr", rate))), abs(rate)) for group, rate in groups)
    return min(rates_ahead, MAX_STEPS * peak / present) / num_points


def _sum_of_rates(scheduler: Any, num_steps: int) -> float:
    calls = 1
    if hasattr(scheduler, "split_batches"):  # accelerate's, which steps once for each process unless told otherwise
        if getattr(scheduler, "step_with_optimizer", True) and not scheduler.split_batches:
            from accelerate.state import AcceleratorState

            calls = AcceleratorState().num_processes
        scheduler = scheduler.scheduler
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("reacts to a metric")
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=0.0)
    stand_in.param_groups = [
        {**group, "params": [], "lr": float(group["lr"])} for group in scheduler.optimizer.param_groups
    ]
    # In the copy the stand-in is the optimizer, so that neither rates nor parameters of the run are touched.
    ahead = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    total = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a scheduler complains where its optimizer has not stepped
        for _ in range(num_steps):
            total += sum(abs(float(group["lr"])) for group in stand_in.param_groups)
            for _ in range(calls):
                ahead.step()
    return total
