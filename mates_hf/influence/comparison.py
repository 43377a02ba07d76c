"""The rows that are compared, and the run's loss of them: what is asked before any reading of it is looked for.

Where it is used: `reading` builds on it, and `compared_batches` asks whether rows in one batch have the losses that
they have alone. Trade-off: what no row could have a loss by (missing labels, random numbers in the forward pass) is
refused here, at the price of one forward pass more.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mates_hf.data.batches import Reading
from mates_hf.data.feeds import model_batch
from mates_hf.data.pool import CandidatePool
from mates_hf.engine.model_traits import input_device, is_low_precision
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.compared_rows import NO_LOGITS, ComparedRows
from mates_hf.influence.input_cost import values_per_position
from mates_hf.influence.passes import likelihood, needs_labels
from mates_hf.influence.run_loss import RunLoss

logger = logging.getLogger(__name__)

FloatArray: TypeAlias = npt.NDArray[np.float64]

WAY_OUT = (
    "Pass the loss that the run trains with to the probe, as `MatesCallback(..., probe=DirectionalProbe(loss=...))`."
)
# What a model raises that cannot run a batch; out-of-memory is a RuntimeError, too, and passed on.
CANNOT_RUN = (AttributeError, AssertionError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


class Comparison:
    """The rows looked at, and the run's loss of them.

    Args:
        model: The live model, in eval mode, without gradients.
        pool: Rows and their collator.
        run_loss: What the run trains with.

    Attributes:
        rows: the rows that are compared.
        base: where labels are, and what else is known before readings are compared.
        dataset_draws: whether reading a row draws from the random streams.
        collator_draws: whether collating it does.
    """

    def __init__(self, model: nn.Module, pool: CandidatePool, run_loss: RunLoss) -> None:
        self.model, self.pool, self.run_loss = model, pool, run_loss
        self.device = input_device(model)
        self.base = Reading(encoder_decoder=needs_labels(model))
        self.rows = ComparedRows(model, pool, self.base)
        has_shift_labels = self.rows.longest.get("shift_labels") is not None
        num_virtual = self.rows.count_virtual()
        self.dataset_draws, self.collator_draws = self.rows.draws()
        self.base = dataclasses.replace(
            self.base,
            num_virtual=num_virtual,
            has_shift_labels=has_shift_labels,
            values_per_position=values_per_position(model, self.rows.longest, self.device),
        )

    def losses(self, run_loss: RunLoss) -> FloatArray | None:
        """A loss of each chosen row alone, or None where there is none."""
        values = [self.loss(run_loss, batch) for batch in self.rows.batches]
        return None if any(value is None for value in values) else np.array(values, np.float64)

    def loss(self, run_loss: RunLoss, batch: Mapping[str, Any]) -> float | None:
        """A loss of a batch; None where there is none. The run's own is refused where the model cannot be run."""
        try:
            value = run_loss.compute(self.model, model_batch(batch, self.base, self.device).with_labels())
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as error:
            if run_loss is not self.run_loss:
                return None
            raise UnsupportedSettingError(
                f"A collated row must have a loss in eval mode; {self.run_loss.name} of {type(self.model).__name__} "
                f"ended in {type(error).__name__}: {error}. {WAY_OUT}"
            ) from error
        return None if value is None else float(value)

    def read(self, batch: Mapping[str, Any], reading: Reading) -> FloatArray | None:
        """(T,) losses of a batch's trained tokens by a reading, or None where the model does not give them."""
        try:
            return likelihood(self.model, model_batch(batch, reading, self.device)).double().cpu().numpy()
        except NO_LOGITS:
            return None

    def tolerance(self, own: FloatArray) -> float:
        """Rounding of a mean loss."""
        return (5e-3 if is_low_precision(self.model) else 1e-5) * max(1.0, float(np.abs(own).max()))

    def require_labels(self) -> None:
        """Refuse rows that are no text and have no labels, of which nothing could be the loss."""
        if self.rows.beyond_text and self.base.labels_of(self.rows.longest) is None:
            raise UnsupportedSettingError(
                f"Pool rows must have `labels` for {type(self.model).__name__} to have a loss, got the inputs "
                f"{sorted(map(str, self.rows.longest))}. Add the column, keep it (`remove_unused_columns=False` where "
                f"rows are made in `set_transform`), or look at what the collator leaves out. {WAY_OUT}"
            )

    def require_fixed(self, run_loss: RunLoss, own: FloatArray) -> None:
        """Refuse a model whose forward pass draws random numbers in eval mode, as diffusion does for its noise."""
        again = self.loss(run_loss, self.rows.batches[0])
        if again is None or abs(again - own[0]) <= self.tolerance(own):
            return
        raise UnsupportedSettingError(
            f"The loss of a row must be the same whenever it is computed, but {run_loss.name} of pool row "
            f"{self.rows.rows[0]} is {own[0]:.6f} and then {again:.6f} in eval mode: {type(self.model).__name__} "
            "draws random numbers in its forward pass (noise of a diffusion model, masks). Let them follow from the "
            "row: `DirectionalProbe(loss=seeded_loss())`, with `from mates_hf.influence.example_losses import "
            "seeded_loss`."
        )

    def told_drawn(self) -> dict[str, Any]:
        """What the record says of rows that are drawn at random, which is told where they are no text."""
        if not (self.dataset_draws or self.collator_draws):
            return {}
        by = " and ".join(name for name, is_so in self._drawers() if is_so)
        if self.rows.beyond_text:
            logger.warning(
                "Rows are augmented at random by %s: a candidate is measured as random streams seeded by its row "
                "number make it, and trained on as the run's own streams do.",
                by,
            )
        return {"drawn": f"by {by}, on streams of the row's own number"}

    def _drawers(self) -> tuple[tuple[str, bool], ...]:
        return ("the dataset", self.dataset_draws), ("the collator", self.collator_draws)


def gap(a: FloatArray, b: FloatArray) -> float:
    """The largest difference; infinite where one is not finite."""
    found = float(np.abs(a - b).max())
    return found if np.isfinite(found) else np.inf
