"""How the run's loss follows from a batch: what a probe would read is compared with what the run computes.

Where it is used: `MatesCallback` asks once, before the first step; the stages alone ask in each `measure`. A few rows
of the pool are collated, one by one and together. Of the readings that a probe can measure (`Reading`) the one is
taken that equals the run's own loss on them. Where none does, the own loss is measured row by row; where the rows'
own losses do not make up the batch's, the run is refused with both numbers.

Trade-off: some forward passes of a few rows at the start of a run, of up to 64 where the model takes further inputs,
so that a label of another loss than the one that is trained has nowhere to come from.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mates_hf.data.batches import IGNORED, Feed, Likelihood, Reading
from mates_hf.data.feeds import model_batch
from mates_hf.data.pool import CandidatePool
from mates_hf.engine.preserve import undisturbed
from mates_hf.errors import InfluenceError, UnsupportedSettingError
from mates_hf.influence.compared_batches import BatchComparison
from mates_hf.influence.compared_rows import NO_LOGITS
from mates_hf.influence.comparison import CANNOT_RUN as CANNOT_RUN
from mates_hf.influence.comparison import WAY_OUT as WAY_OUT
from mates_hf.influence.comparison import FloatArray, gap
from mates_hf.influence.other_weights import at_other_weights
from mates_hf.influence.packed_rows import documents
from mates_hf.influence.passes import likelihood, likelihood_of, logits_of_batch, token_losses
from mates_hf.influence.run_loss import MODEL_LOSS, RunLoss

logger = logging.getLogger(__name__)

_APART = 0.05  # nats: readings that part by less are compared at other weights, too


def find_reading(
    model: nn.Module, pool: CandidatePool, run_loss: RunLoss = MODEL_LOSS, *, is_given: bool = False
) -> Reading:
    """Compare the run's loss on a few collated rows with what a probe would read of them.

    Args:
        model: the live model, unwrapped; it stays as it is.
        pool: rows and their collator.
        run_loss: what the run trains with.
        is_given: the loss was given to the probe, which measures it whatever it is; what is found is how rows are fed,
            and the likelihood that the reference task is measured by.

    Returns:
        The reading that equals it, else that loss row by row. Without any loss to compare with (a plain module that
        returns logits) the shifted likelihood, marked as not compared.

    Raises:
        UnsupportedSettingError: the loss of a batch is no mean over its rows, or nothing can be measured.
        InfluenceError: the run's loss is not finite.
    """
    with undisturbed(model), torch.no_grad():
        model.eval()
        comparison = _Finder(model, pool, run_loss)
        return comparison.given() if is_given else comparison.find()


class _Finder(BatchComparison):
    """Which reading of the rows looked at is the run's loss of them."""

    def find(self) -> Reading:
        """The reading, and how rows are to be fed."""
        own = self.losses(self.run_loss)
        if own is None:
            self.require_labels()
            return self._uncompared()
        if not np.isfinite(own).all():
            raise InfluenceError(
                f"The run's loss must be finite, got {own.tolist()} of pool rows {self.rows.rows} before the first "
                "step. Look for NaN in the model."
            )
        self.require_fixed(self.run_loss, own)
        self._look_at_documents(self.run_loss, own)
        compared: dict[str, Any] = {"loss": self.run_loss.name, "own_loss": float(own.mean()), "num_rows": len(own)}
        reading, error, read = self._nearest(self.run_loss, own)
        if error <= self.tolerance(own):
            compared["read_loss"] = float(read.mean())
        else:
            near = self._of_model() if self.run_loss is not MODEL_LOSS else None
            reading = dataclasses.replace(
                near or reading, mask_key=None, loss=self.run_loss.row_loss(), loss_name=self.run_loss.name
            )
        if reading.likelihood == "unshifted" and not reading.encoder_decoder:
            reading = dataclasses.replace(reading, looks_ahead=self._looks_ahead())
        feed, constants = self._feed(reading, own)
        if reading.mask_key:
            constants[reading.mask_key] = 1  # every target of a passage counts
        reading = dataclasses.replace(reading, feed=feed, constants=constants)
        compared.update(self.told_drawn())
        if not self.collator_draws or self.rows.beyond_text:
            alike, found = self.check_batches(reading, own)
            compared.update(found)
            if feed == "collated" and (self.collator_draws or not alike or reading.loss is not None):
                reading = dataclasses.replace(reading, feed="row")
        elif feed == "collated":
            reading = dataclasses.replace(reading, feed="row")
        return dataclasses.replace(reading, compared=compared)

    def _look_at_documents(self, run_loss: RunLoss, own: FloatArray) -> None:
        """Find out how documents that share a row are trained, for all readings."""

        def loss(batch: Mapping[str, Any]) -> float | None:
            value = self.loss(run_loss, batch)
            read = self.read(batch, self.base) if value is None else None
            return float(read.mean()) if read is not None and len(read) else value

        packed = documents(self.model, self.pool, self.rows, loss, self.tolerance(own))
        self.base = dataclasses.replace(self.base, packed=packed)

    def given(self) -> Reading:
        """How to feed rows to a loss that is not compared."""
        self._look_at_documents(MODEL_LOSS, np.ones(1))
        if self.rows.beyond_text:
            first = self.loss(self.run_loss, self.rows.batches[0])
            self.require_fixed(self.run_loss, np.array([np.nan if first is None else first]))
        near = self._of_model() or self.base
        reading = dataclasses.replace(near, mask_key=None, loss=self.run_loss.row_loss(), loss_name=self.run_loss.name)
        if reading.likelihood == "unshifted" and not reading.encoder_decoder:
            reading = dataclasses.replace(reading, looks_ahead=self._looks_ahead())
        constants = self.rows.constants()
        plain = (
            not self.rows.further_inputs(reads_all=True)
            and reading.likelihood == "shifted"
            and not (self.dataset_draws or self.collator_draws)
            and not self.base.packed
        )
        told = self.told_drawn()
        return dataclasses.replace(reading, feed="plain" if plain else "row", constants=constants, compared=told)

    def _of_model(self) -> Reading | None:
        """The likelihood nearest to the model's own loss; None where it has none."""
        models = self.losses(MODEL_LOSS)
        return self._nearest(MODEL_LOSS, models)[0] if models is not None and np.isfinite(models).all() else None

    def _readings(self) -> list[Reading]:
        """The likelihoods to try, by the shape of the labels; each also with the labels masked by a further input."""
        batch = self.rows.batches[0]
        labels = self.base.labels_of(batch)
        if labels is None:
            return []
        kinds: tuple[Likelihood, ...] = ("shifted", "unshifted")
        if torch.as_tensor(labels).dim() == 1:
            kinds = ("classes",)
        elif self.base.encoder_decoder or self.base.has_shift_labels:
            kinds = ("unshifted",)
        masks = [None, *(key for key in sorted(self.rows.extras) if self.rows.is_mask(key))]
        return [dataclasses.replace(self.base, likelihood=kind, mask_key=mask) for mask in masks for kind in kinds]

    def _nearest(self, run_loss: RunLoss, own: FloatArray) -> tuple[Reading, float, FloatArray]:
        """The likelihood nearest to a loss, by how much it is off at most, and its value of each row."""
        read = self._means()
        if not read:
            return self.base, np.inf, own
        read.sort(key=lambda pair: gap(pair[1], own))
        best, values = read[0]
        if len(read) > 1 and gap(read[1][1], own) < _APART:
            # A model that has learnt little says much the same of every token; at other weights the readings part.
            with at_other_weights(self.model):
                there, apart = self.losses(run_loss), self._means()
            assert there is not None
            if not apart:
                return best, np.inf, values
            best, found = min(apart, key=lambda pair: gap(pair[1], there))
            values = next(values for reading, values in read if reading == best)
            if not gap(found, there) <= self.tolerance(there):
                return best, np.inf, values
        return best, gap(values, own), values

    def _means(self) -> list[tuple[Reading, FloatArray]]:
        """Mean loss of each compared row by each reading that the model gives."""
        means: dict[int, list[float]] = {}
        readings = self._readings()
        for batch in self.rows.batches:
            try:
                logits = logits_of_batch(self.model, model_batch(batch, self.base, self.device))
            except NO_LOGITS:
                return []
            for number, reading in enumerate(readings):
                try:
                    value = likelihood_of(logits, model_batch(batch, reading, self.device)).double().cpu().numpy()
                except NO_LOGITS:
                    continue
                if len(value) or reading.mask_key:
                    means.setdefault(number, []).append(float(value.mean()) if len(value) else 0.0)
        whole = len(self.rows.batches)
        return [(readings[number], np.array(values)) for number, values in means.items() if len(values) == whole]

    def _looks_ahead(self) -> bool:
        """True where other tokens behind the first position change what the model says there."""
        if self._sees_later():
            return True
        # A model that has learnt little attends to everything a little: at other weights it shows.
        with at_other_weights(self.model, until_it_passes_on=True):
            return self._sees_later()

    def _sees_later(self) -> bool:
        """Whether it does at these weights, by more than rounding."""
        batch = self.rows.longest
        if batch.get("input_ids") is None:
            return True  # of a row without tokens every position may see all of it
        ids = torch.as_tensor(batch["input_ids"])
        labels = torch.full_like(ids, IGNORED)
        labels[:, 0] = 0  # a label that every table has: there may be few classes
        values = []
        for token in ids[0, :3]:
            changed = ids.clone()
            changed[:, 1:] = token
            given = {**batch, "input_ids": changed, "labels": labels, "shift_labels": None}
            read = self.read(given, dataclasses.replace(self.base, likelihood="unshifted"))
            values.append(0.0 if read is None else float(read.sum()))
        return max(values) - min(values) > self.tolerance(np.array(values))

    def _feed(self, reading: Reading, own: FloatArray) -> tuple[Feed, dict[str, int]]:
        """How rows reach the model as the collator makes them, the fastest way first; and inputs that are constant."""
        extras = self.rows.further_inputs(reads_all=reading.loss is not None and self.run_loss.reads_all)
        constants = self.rows.constants()
        if reading.packed == "together" or (reading.packed and (reading.loss is not None or extras)):
            return "row", constants
        without_labels = reading.loss is not None and self.base.labels_of(self.rows.longest) is None
        is_plain = reading.is_plain_text and not extras and not without_labels
        if is_plain and self._feeds_the_same(reading, own):
            return "plain", constants
        return ("row" if reading.packed else "collated"), constants

    def _feeds_the_same(self, reading: Reading, own: FloatArray) -> bool:
        """True where rows that this library pads have the run's loss, beside longer ones."""
        pool = self.pool.select(self.rows.rows)
        pool.reading = reading
        rows = pool.candidates()
        if (rows.num_targets == 0).any() or len(self.rows.batches) > len(rows):
            return False
        parts = np.split(token_losses(self.model, rows, loss=reading.loss), np.cumsum(rows.num_targets)[:-1])
        return gap(np.array([part.mean() for part in parts]), own) <= 2 * self.tolerance(own)

    def _uncompared(self) -> Reading:
        """No loss to compare with: the likelihood of the next token, if the model gives logits for it."""
        batch = model_batch(self.rows.batches[0], self.base, self.device)
        if not batch.labels.numel() and "input_ids" in batch.inputs:
            batch = batch._replace(labels=batch.inputs["input_ids"])
        try:
            values = likelihood(self.model, batch)
        except NO_LOGITS as error:
            if not self.rows.beyond_text:
                raise
            raise UnsupportedSettingError(
                f"{type(self.model).__name__} must give a loss or logits of each row, got neither for the inputs "
                f"{sorted(map(str, batch.with_labels()))} ({type(error).__name__}: {error}). {WAY_OUT}"
            ) from error
        read = [means for reading, means in self._means() if reading.likelihood == "shifted"]
        self._look_at_documents(self.run_loss, np.ones(1))
        feed, constants = self._feed(self.base, read[0] if read else np.zeros(len(self.rows.rows)))
        return dataclasses.replace(
            self.base,
            feed="row" if feed == "collated" else feed,
            constants=constants,
            compared={"loss": None, "read_loss": float(values.double().mean())},
        )
