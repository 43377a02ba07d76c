"""Candidates read by the model that trains: fitted on, predicted, and timed.

Where it is used: `feature_model` makes a `LiveReader` for each call. It puts the parts of this room together: `rows`,
`head`, and `gradient` or `pooled`.

Trade-off: the model is run in one process as it is, so its weights must be whole there.

Shape suffix: N candidates.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import nn

from mates_hf.data.batches import Candidates
from mates_hf.engine.digest import live_digest
from mates_hf.prediction.features.gradient import NUM_ERRORS, Errors, HeadLine, fit_and_hold_out
from mates_hf.prediction.features.head import OutputHead
from mates_hf.prediction.features.pooled import own_features, pooled_states
from mates_hf.prediction.features.rows import Passes, sample_of, seconds_of_second
from mates_hf.prediction.pooling import left_as_found
from mates_hf.prediction.ridge import FitTarget, FloatVector, StateLine, fit_ridge, require_same_width
from mates_hf.records import IntArray


@dataclasses.dataclass(frozen=True)
class LiveReader:
    """The model that trains, and what is read of it.

    Attributes:
        model: The live model, unwrapped; it is left as found, bit for bit.
        features: `"head_gradient"`, `"hidden"` or a function.
        head: Name of the output head, or None.
        num_errors: Dimensions of an error, or None.
        tokens_per_batch: Padded tokens in one pass at most.
        seed: Random seed of the streams that the model draws from.
        progress: Whether to show progress bars.
    """

    model: nn.Module
    features: Any
    head: str | None
    num_errors: int | None
    tokens_per_batch: int
    seed: int
    progress: bool

    def digest(self) -> str:
        """Digest of the model's weights."""
        return live_digest(self.model)

    def fit(
        self, rows: Candidates, target: FitTarget, earlier: StateLine | HeadLine | None
    ) -> tuple[FloatVector, StateLine | HeadLine, float]:
        """Run candidates, fit without those held out and predict these, then fit on all.

        Args:
            rows: N candidates, each of which has a target.
            target: Their labels.
            earlier: An earlier round's line to build on, or None.

        Returns:
            z-scored predictions of the held-out candidates, the line in the labels' unit, and FLOPs.
        """
        num_targets = _counts(rows)
        with left_as_found(self.model, self.seed):
            passes = Passes(self.model, rows, self.tokens_per_batch)
            if self.features == "head_gradient":
                held_out, line = fit_and_hold_out(
                    self._head(passes), passes, target, num_targets, earlier, num_errors=self.num_errors,
                    progress=self.progress,
                )  # fmt: skip
                return held_out, line, passes.flops()
            states = self._states(passes, num_targets)
            known = require_same_width(earlier, states.shape[1]) if isinstance(earlier, StateLine) else None
            part = fit_ridge(states[~target.held_out], target.values[~target.held_out], known)
            held_out = part.z_scores(states[target.held_out])
            return held_out, fit_ridge(states, target.values, known).in_units_of(target), passes.flops()

    def z_scores(self, rows: Candidates, line: StateLine | HeadLine) -> FloatVector:
        """(N,) float64 z-scored predictions of candidates that all have a target; `ValueError` for another head."""
        num_targets = _counts(rows)
        with left_as_found(self.model, self.seed):
            passes = Passes(self.model, rows, self.tokens_per_batch)
            if isinstance(line, HeadLine):
                head = self._head(passes)
                line.require_fits(head)
                return line.z_scores(head, passes, num_targets, progress=self.progress)
            states = self._states(passes, num_targets)
            return require_same_width(line, states.shape[1]).z_scores(states)

    def seconds(self, rows: Candidates, num: int) -> float:
        """Estimate how long `num` candidates take, by running a few of them twice, first to warm up."""
        some = sample_of(rows)
        num_targets = _counts(some)
        with left_as_found(self.model, self.seed):
            passes = Passes(self.model, some, self.tokens_per_batch)

            def work() -> None:
                if self.features == "head_gradient":
                    head = self._head(passes)
                    errors = Errors(head.num_classes, NUM_ERRORS)
                    passes.run(lambda batch, *_, head=head, errors=errors: errors.of(*head.read(batch)[1:]))
                else:
                    self._states(passes, num_targets)

            return seconds_of_second(work) * num / max(1, len(some))

    def _head(self, passes: Passes) -> OutputHead:
        return OutputHead(self.model, passes.first(), self.head)

    def _states(self, passes: Passes, num_targets: IntArray) -> Any:
        """(N, D) float32 features that are one vector a candidate."""
        if callable(self.features):
            return own_features(self.features, self.model, passes, num_targets, progress=self.progress)
        return pooled_states(self._head(passes), passes, num_targets, progress=self.progress)


def _counts(rows: Candidates) -> IntArray:
    return np.asarray(rows.num_targets, np.int64)
