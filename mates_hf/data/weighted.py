"""Rows whose trained tokens count unequally: what a reference of several tasks, or of questions with answers, is.

Where it is used: `ReferenceTask.measured` makes them, and `influence/passes` multiplies each token's loss by its
weight. What takes a mean over tokens then takes a weighted one, because weights have mean 1.

Trade-off: a share of the rows has a mean weight near 1 and not at it, as a mean over few tokens is not that over all.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.batches import Candidates, ModelBatch, RowsAround
from mates_hf.data.rows import flat_index
from mates_hf.records import IntArray

if TYPE_CHECKING:
    import torch

Weights = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class WeightedRows(RowsAround):
    """Rows that a probe can run, with a weight for each trained token.

    Attributes:
        rows: the N rows themselves.
        weights: (T,) float32 of the trained tokens, row after row; the mean is 1.
    """

    rows: Candidates
    weights: Weights

    def take(self, index: npt.NDArray[Any]) -> WeightedRows:
        """Some rows: `index` is (M,) int row numbers or an (N,) bool mask; order and repeats are kept."""
        return WeightedRows(self.rows.take(index), self.weights_of(index))

    def batch(self, index: IntArray, device: torch.device | str) -> ModelBatch:
        """The rows `index` in one batch on a device."""
        return self.rows.batch(index, device)

    def weights_of(self, index: npt.NDArray[Any]) -> Weights:
        """Weights of the trained tokens of some rows, row after row."""
        rows = np.flatnonzero(index) if index.dtype == bool else np.asarray(index, np.int64)
        starts = np.concatenate([[0], np.cumsum(self.num_targets, dtype=np.int64)])[:-1]
        return self.weights[flat_index(starts[rows], self.num_targets[rows])]


def plain(rows: Candidates) -> Candidates:
    """The rows without their weights."""
    return rows.rows if isinstance(rows, WeightedRows) else rows


def checked_weights(weights: Any, num_tokens: int, is_target: npt.NDArray[np.bool_], name: str) -> Weights:
    """Weights of a reference task's tokens with a mean of 1 over its targets.

    Args:
        weights: (T,) finite and at least 0; above 0 for some target.
        num_tokens: T.
        is_target: (T,) whether the token counts.
        name: what messages call the task.

    Returns:
        (T,) float32, 0 for what is no target.

    Raises:
        ValueError: another shape, a value that is no weight, or no target with one.
    """
    given = np.asarray(weights, np.float64)
    if given.shape != (num_tokens,):
        raise ValueError(
            f"`weights` of the reference task `{name}` must have one value a token, shape ({num_tokens},), got "
            f"{given.shape}."
        )
    kept = np.where(is_target, given, 0.0)
    if not (np.isfinite(kept).all() and (kept >= 0).all()):
        raise ValueError(
            f"`weights` of the reference task `{name}` must be finite and at least 0, got {kept.min()} to "
            f"{kept.max()}."
        )
    if not kept.any():
        raise ValueError(f"`weights` of the reference task `{name}` must be above 0 for a target token, got none.")
    return np.asarray(kept * (is_target.sum() / kept.sum()), np.float32)
