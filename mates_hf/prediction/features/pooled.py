"""One vector a candidate from the model that trains: its mean hidden state, or whatever a user's function returns.

Where it is used: `feature_model` with `features="hidden"` or a function; the ridge of `ridge` is fitted on them.

Trade-off: a mean over a candidate's targets, weighted by tokens where a packed candidate has several documents. What
a function returns is taken as it is.

Shapes: N candidates, B rows of a batch, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from mates_hf.data.batches import ModelBatch
from mates_hf.errors import InfluenceError
from mates_hf.prediction.features.gradient import MOST_CLASSES
from mates_hf.prediction.features.head import OutputHead
from mates_hf.prediction.features.rows import Passes
from mates_hf.records import IntArray

FeatureFunction = Callable[[Any, dict[str, Any]], Tensor]
"""`features(model, batch)`: (B, D) features of the B rows of a batch, which has what the run's collator makes of them,
labels included, on the model's device. It is called in eval mode, without gradient."""


def pooled_states(
    head: OutputHead, passes: Passes, num_targets: IntArray, *, progress: bool = False
) -> npt.NDArray[np.float32]:
    """(N, D) float32 mean of what the head reads at a candidate's targets; where a row has a class, its one-hot too.

    Args:
        head: The output head.
        passes: The candidates in batches, each of which has a target.
        num_targets: (N,) targets of each candidate.
        progress: Whether to show a progress bar.

    Returns:
        The features.
    """
    found = _Means(num_targets)

    def work(batch: ModelBatch, owners: IntArray, counts: IntArray) -> None:
        hidden, _, labels = head.read(batch)
        if batch.labels.dim() == 1 and head.num_classes <= MOST_CLASSES:
            hidden = torch.cat([hidden, functional.one_hot(labels, head.num_classes).float()], 1)
        sums = torch.stack([part.sum(0) for part in hidden.split(counts.tolist())])
        found.add(owners, sums.cpu().numpy())

    passes.run(work, progress=progress)
    return found.means()


def own_features(
    function: FeatureFunction, model: nn.Module, passes: Passes, num_targets: IntArray, *, progress: bool = False
) -> npt.NDArray[np.float32]:
    """(N, D) float32 what a user's function makes of each candidate.

    Args:
        function: The function.
        model: The live model, unwrapped.
        passes: The candidates in batches, each of which has a target.
        num_targets: (N,) targets of each candidate.
        progress: Whether to show a progress bar.

    Returns:
        The features.

    Raises:
        TypeError: the function returned no floating tensor of one row a candidate.
        InfluenceError: a feature is not finite.
    """
    found = _Means(num_targets)

    def work(batch: ModelBatch, owners: IntArray, counts: IntArray) -> None:
        values = function(model, batch.with_labels())
        if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != len(owners):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(
                f"`features` must return a tensor (B, D) of one row a candidate, B = {len(owners)}, got {got}. Pool "
                "each candidate's states to one vector."
            )
        if not bool(torch.isfinite(values).all()):
            raise InfluenceError("`features` must return finite numbers, got NaN or infinity. Look at the model.")
        weights = torch.from_numpy(counts).to(values.device)
        found.add(owners, (values.detach().float() * weights[:, None]).cpu().numpy())

    passes.run(work, progress=progress)
    return found.means()


class _Means:
    """Sums of N candidates, divided by their targets."""

    def __init__(self, num_targets: IntArray) -> None:
        self._num_targets = num_targets
        self._sums: npt.NDArray[np.float32] | None = None

    def add(self, owners: IntArray, sums: npt.NDArray[Any]) -> None:
        """Add what a batch gives: (B,) candidates and (B, D) sums over their targets."""
        if self._sums is None:
            self._sums = np.zeros((len(self._num_targets), sums.shape[1]), np.float32)
        np.add.at(self._sums, owners, sums)

    def means(self) -> npt.NDArray[np.float32]:
        """(N, D) float32; no column where there is no candidate."""
        if self._sums is None:
            return np.zeros((len(self._num_targets), 0), np.float32)
        return np.asarray(self._sums / self._num_targets[:, None], np.float32)
