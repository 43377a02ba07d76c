"""What a candidate is worth in a real batch, by brute force: the truth that labels are compared with.

Trade-off: an optimizer step and a pass over the reference passages for each candidate and batch, so there are a
hundred candidates and not thousands.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.lab.models import TOKENS_PER_BATCH
from benchmarks.lab.statistics import FloatArray
from mates_hf.data.rows import TokenRows
from mates_hf.influence.passes import mean_loss_gradient


def worth_in_batch(
    model: nn.Module,
    optimizer: Any,
    losses: Callable[[nn.Module], Sequence[float]],
    candidates: TokenRows,
    batches: Sequence[TokenRows],
    *,
    clip: float | None = None,
    joins: bool = False,
) -> FloatArray:
    """Reference losses after a real step without each candidate, minus those after the step with it; > 0 helps.

    A candidate takes the place of the first row of each batch; where it `joins` the batch, that has a row more. Model
    and optimizer are copied, and stay as they are. (B, L, N), by batch, one of the `losses`, and candidate.
    """

    def gradient(rows: TokenRows) -> tuple[list[torch.Tensor], int]:
        """Summed over tokens, and how many there are."""
        num = int(rows.num_targets.sum())
        if not num:
            return [torch.zeros_like(p) for p in model.parameters()], 0
        mean_loss_gradient(model, rows, tokens_per_batch=TOKENS_PER_BATCH)
        return [num * p.grad for p in model.parameters() if p.grad is not None], num

    def after(rest: tuple[list[torch.Tensor], int], own: tuple[list[torch.Tensor], int]) -> FloatArray:
        copied, stepper = copy.deepcopy((model, optimizer))
        for parameter, a, b in zip(copied.parameters(), rest[0], own[0], strict=True):
            parameter.grad = (a + b) / (rest[1] + own[1])
        if clip:
            nn.utils.clip_grad_norm_(copied.parameters(), clip)
        stepper.step()
        return np.array(losses(copied))

    singles = [gradient(candidates.take(np.array([i]))) for i in range(len(candidates))]
    worth = []
    for batch in batches:
        first = batch.take(np.arange(0 if joins else 1))
        rest, replaced = gradient(batch.take(np.arange(len(first), len(batch)))), gradient(first)
        without = after(rest, replaced)
        worth.append(np.stack([without - after(rest, own) for own in singles], axis=1))
    model.zero_grad(set_to_none=True)
    return np.array(worth)
