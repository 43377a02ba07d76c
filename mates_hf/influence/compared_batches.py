"""Whether rows in one batch have the losses that they have alone, so that a row has a loss of its own.

Where it is used: `reading`, once it knows how a row's loss is read. Trade-off: four batches of three rows are
compared. A loss that couples rows more rarely than that is not found.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.batches import Reading
from mates_hf.data.feeds import model_batch
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.comparison import WAY_OUT, Comparison, FloatArray
from mates_hf.influence.packed_rows import require_own_targets
from mates_hf.influence.run_loss import without_router_loss
from mates_hf.records import IntArray

logger = logging.getLogger(__name__)

NUM_TOGETHER, MAX_BATCHES = 3, 4  # rows compared in one batch, and batches of them


class BatchComparison(Comparison):
    """What is asked of batches of the rows that are compared."""

    def check_batches(self, reading: Reading, own: FloatArray) -> tuple[bool, dict[str, Any]]:
        """Whether rows in one batch have the losses that they have alone, and what was found of the first batch.

        Raises:
            UnsupportedSettingError: the run's loss of a batch does not follow from its rows.
        """
        firsts = range(0, min(len(self.rows.rows), MAX_BATCHES * NUM_TOGETHER), NUM_TOGETHER)
        found: dict[str, Any] = {}
        possible = {"tokens", "rows", "sums"}
        for number, first in enumerate(firsts):
            ids = np.arange(first, min(first + NUM_TOGETHER, len(self.rows.rows)))
            if len(ids) < 2:
                break
            weighs = self._check_batch(reading, own, ids, possible)
            if weighs is None:
                return False, found
            possible = set(weighs) - {"batch_loss"}
            if number == 0:
                found["batch_loss"] = weighs["batch_loss"]
            found["weighs"] = next(name for name in ("tokens", "rows", "sums") if name in possible)
        return True, found

    def _check_batch(
        self, reading: Reading, own: FloatArray, chosen: IntArray, possible: set[str]
    ) -> dict[str, float] | None:
        """Which of the possible weights make the loss of one batch of its rows'; None where rows must run alone."""
        rows = [self.rows.rows[i] for i in chosen]
        try:
            batch = self.rows.joined(rows) if self.collator_draws else self.rows.together(rows)
            if batch is None:
                return None
        except Exception as error:  # a collator of single rows, or of rows of one length
            logger.debug("The collator makes no batch of pool rows %s: %s", rows, error)
            return None
        if len(batch.get("input_ids", rows)) != len(rows) and not self.rows.flattens:
            return None
        together = self.loss(self.run_loss, batch)
        counts = self.pool.collated(np.array(rows), reading).num_targets
        if together is None or not counts.sum():
            return None
        found = len(model_batch(batch, reading).targets()[0])
        if self.rows.flattens:
            require_own_targets(self.pool, rows, found, int(counts.sum()))
        if reading.loss is None and found != counts.sum():
            return None  # padding on the left: a row's first token is trained behind it
        means = {
            "tokens": float(np.average(own[chosen], weights=counts)),
            "rows": float(own[chosen].mean()),
            "sums": float(own[chosen].sum()),
        }
        tolerance = 2 * self.tolerance(own)
        weighs = {name: means[name] for name in possible if abs(means[name] - together) <= tolerance}
        if weighs:
            return {**weighs, "batch_loss": together}
        if not self.rows.flattens and self._padding_moves(
            batch, reading, chosen, counts, together if reading.loss is None else None
        ):
            return None
        with without_router_loss(self.model) as has_router_loss:  # which is a batch's, and part of an own loss
            if has_router_loss:
                return None
        raise UnsupportedSettingError(
            "The loss of a batch must be a mean over its rows, so that a row has a loss of its own; "
            f"{self.run_loss.name} of pool rows {rows} together is {together:.6f}, and of the same rows one by one "
            f"{means['tokens']:.6f} (weighed by tokens) or {means['rows']:.6f} (by rows). {WAY_OUT}{self._coupled()}"
        )

    def _coupled(self) -> str:
        """What to do about a loss that compares the rows of a batch, which has none of a row alone."""
        if not self.rows.beyond_text:
            return ""
        return (
            " A loss that compares rows with one another (contrastive) needs fixed rows to compare with: "
            "`contrastive_loss(bank)` of `mates_hf.influence.example_losses`."
        )

    def _padding_moves(
        self,
        batch: Mapping[str, Any],
        reading: Reading,
        chosen: IntArray,
        counts: npt.NDArray[Any],
        together: float | None,
    ) -> bool:
        """True where a row's likelihood is another one beside longer rows (padding on the left moves positions, say).

        That is the collator's doing, and no part of the loss: such a row is measured alone.
        """
        plain = dataclasses.replace(reading, loss=None)
        read = self.read(batch, plain)
        singles = [self.read(self.rows.batches[i], plain) for i in chosen]
        if read is None or any(single is None for single in singles):
            return False
        alone = np.array([single.mean() for single in singles if single is not None])
        tolerance = 2 * self.tolerance(alone)
        if together is not None and abs(float(read.mean()) - together) > tolerance:
            return False
        return abs(float(read.mean()) - float(np.average(alone, weights=counts))) > tolerance
