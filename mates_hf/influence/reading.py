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
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mates_hf.data.batches import IGNORED, Feed, Likelihood, Reading
from mates_hf.data.feeds import model_batch
from mates_hf.data.pool import CandidatePool
from mates_hf.engine.fragments import whole_shape
from mates_hf.engine.model_traits import input_device, is_low_precision
from mates_hf.engine.preserve import local_shard, preserved, undisturbed
from mates_hf.errors import InfluenceError, UnsupportedSettingError
from mates_hf.influence.compared_rows import ComparedRows
from mates_hf.influence.passes import likelihood, likelihood_of, logits_of_batch, needs_labels, token_losses
from mates_hf.influence.run_loss import MODEL_LOSS, RunLoss, without_router_loss
from mates_hf.records import IntArray

logger = logging.getLogger(__name__)

FloatArray: TypeAlias = npt.NDArray[np.float64]

NUM_TOGETHER, MAX_BATCHES = 3, 4  # rows compared in one batch, and batches of them
_APART = 0.05  # nats: readings that part by less are compared at other weights, too
WAY_OUT = (
    "Pass the loss that the run trains with to the probe, as `MatesCallback(..., probe=DirectionalProbe(loss=...))`."
)
_NO_LOGITS = (AttributeError, IndexError, KeyError, TypeError, UnsupportedSettingError)
# What a model raises that cannot run a batch; out-of-memory is a RuntimeError, too, and passed on.
CANNOT_RUN = (AttributeError, AssertionError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


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
        comparison = _Comparison(model, pool, run_loss)
        return comparison.given() if is_given else comparison.find()


class _Comparison:
    """The rows looked at, and the run's loss of them."""

    def __init__(self, model: nn.Module, pool: CandidatePool, run_loss: RunLoss) -> None:
        self.model, self.pool, self.run_loss = model, pool, run_loss
        self.device = input_device(model)
        self.base = Reading(encoder_decoder=needs_labels(model))
        self.rows = ComparedRows(model, pool, self.base)
        has_shift_labels = self.rows.longest.get("shift_labels") is not None
        self.base = dataclasses.replace(
            self.base, num_virtual=self._count_virtual(), has_shift_labels=has_shift_labels
        )

    def find(self) -> Reading:
        """The reading, and how rows are to be fed."""
        own = self._losses(self.run_loss)
        if own is None:
            return self._uncompared()
        if not np.isfinite(own).all():
            raise InfluenceError(
                f"The run's loss must be finite, got {own.tolist()} of pool rows {self.rows.rows} before the first "
                "step. Look for NaN in the model."
            )
        compared: dict[str, Any] = {"loss": self.run_loss.name, "own_loss": float(own.mean()), "num_rows": len(own)}
        reading, error, read = self._nearest(self.run_loss, own)
        if error <= self._tolerance(own):
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
        if not self.rows.is_random():
            alike, found = self._check_batches(reading, own)
            compared.update(found)
            if feed == "collated" and (not alike or reading.loss is not None):
                reading = dataclasses.replace(reading, feed="row")
        elif feed == "collated":
            reading = dataclasses.replace(reading, feed="row")
        return dataclasses.replace(reading, compared=compared)

    def _count_virtual(self) -> int:
        """Positions that an adapter puts before each row's; 0 where logits have another shape for other reasons."""
        counts = set()
        for batch in self.rows.batches[:2] if hasattr(self.model, "peft_config") else ():
            given = model_batch(batch, self.base, self.device)
            try:
                logits = logits_of_batch(self.model, given)
                counts.add(
                    logits.shape[1] - given.labels.shape[1] if given.labels.dim() > 1 and given.labels.numel() else 0
                )
            except _NO_LOGITS:
                return 0
        return max(0, counts.pop()) if len(counts) == 1 else 0

    def given(self) -> Reading:
        """How to feed rows to a loss that is not compared."""
        near = self._of_model() or self.base
        reading = dataclasses.replace(near, mask_key=None, loss=self.run_loss.row_loss(), loss_name=self.run_loss.name)
        if reading.likelihood == "unshifted" and not reading.encoder_decoder:
            reading = dataclasses.replace(reading, looks_ahead=self._looks_ahead())
        constants = self.rows.constants()
        plain = (
            not self.rows.further_inputs(reads_all=True)
            and reading.likelihood == "shifted"
            and not self.rows.is_random()
        )
        return dataclasses.replace(reading, feed="plain" if plain else "row", constants=constants)

    def _of_model(self) -> Reading | None:
        """The likelihood nearest to the model's own loss; None where it has none."""
        models = self._losses(MODEL_LOSS)
        return self._nearest(MODEL_LOSS, models)[0] if models is not None and np.isfinite(models).all() else None

    def _losses(self, run_loss: RunLoss) -> FloatArray | None:
        """A loss of each chosen row alone, or None where there is none."""
        values = [self._loss(run_loss, batch) for batch in self.rows.batches]
        return None if any(value is None for value in values) else np.array(values, np.float64)

    def _loss(self, run_loss: RunLoss, batch: Mapping[str, Any]) -> float | None:
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

    def _read(self, batch: Mapping[str, Any], reading: Reading) -> FloatArray | None:
        """(T,) losses of a batch's trained tokens by a reading, or None where the model does not give them."""
        try:
            return likelihood(self.model, model_batch(batch, reading, self.device)).double().cpu().numpy()
        except _NO_LOGITS:
            return None

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
        read.sort(key=lambda pair: _gap(pair[1], own))
        best, values = read[0]
        if len(read) > 1 and _gap(read[1][1], own) < _APART:
            # A model that has learnt little says much the same of every token; at other weights the readings part.
            with preserved(self.model) as snapshot:
                self.model.eval()
                _disturb(snapshot.parameters)
                snapshot.written()
                there, apart = self._losses(run_loss), self._means()
            assert there is not None
            if not apart:
                return best, np.inf, values
            best, found = min(apart, key=lambda pair: _gap(pair[1], there))
            values = next(values for reading, values in read if reading == best)
            if not _gap(found, there) <= self._tolerance(there):
                return best, np.inf, values
        return best, _gap(values, own), values

    def _means(self) -> list[tuple[Reading, FloatArray]]:
        """Mean loss of each compared row by each reading that the model gives."""
        means: dict[int, list[float]] = {}
        readings = self._readings()
        for batch in self.rows.batches:
            try:
                logits = logits_of_batch(self.model, model_batch(batch, self.base, self.device))
            except _NO_LOGITS:
                return []
            for number, reading in enumerate(readings):
                try:
                    value = likelihood_of(logits, model_batch(batch, reading, self.device)).double().cpu().numpy()
                except _NO_LOGITS:
                    continue
                if len(value) or reading.mask_key:
                    means.setdefault(number, []).append(float(value.mean()) if len(value) else 0.0)
        whole = len(self.rows.batches)
        return [(readings[number], np.array(values)) for number, values in means.items() if len(values) == whole]

    def _tolerance(self, own: FloatArray) -> float:
        """Rounding of a mean loss."""
        return (5e-3 if is_low_precision(self.model) else 1e-5) * max(1.0, float(np.abs(own).max()))

    def _looks_ahead(self) -> bool:
        """True where other tokens behind the first position change what the model says there."""
        if self._sees_later():
            return True
        # A model that has learnt little attends to everything a little: at other weights it shows.
        with preserved(self.model) as snapshot:
            self.model.eval()
            _disturb(snapshot.parameters, until_it_passes_on=True)
            snapshot.written()
            return self._sees_later()

    def _sees_later(self) -> bool:
        """Whether it does at these weights, by more than rounding."""
        batch = self.rows.longest
        ids = torch.as_tensor(batch["input_ids"])
        labels = torch.full_like(ids, IGNORED)
        labels[:, 0] = 0  # a label that every table has: there may be few classes
        values = []
        for token in ids[0, :3]:
            changed = ids.clone()
            changed[:, 1:] = token
            given = {**batch, "input_ids": changed, "labels": labels, "shift_labels": None}
            read = self._read(given, dataclasses.replace(self.base, likelihood="unshifted"))
            values.append(0.0 if read is None else float(read.sum()))
        return max(values) - min(values) > self._tolerance(np.array(values))

    def _feed(self, reading: Reading, own: FloatArray) -> tuple[Feed, dict[str, int]]:
        """How rows reach the model as the collator makes them, the fastest way first; and inputs that are constant."""
        extras = self.rows.further_inputs(reads_all=reading.loss is not None and self.run_loss.reads_all)
        constants = self.rows.constants()
        without_labels = reading.loss is not None and self.base.labels_of(self.rows.longest) is None
        if not reading.is_plain_text or extras or without_labels:
            return "collated", constants
        return ("plain" if self._feeds_the_same(reading, own) else "collated"), constants

    def _feeds_the_same(self, reading: Reading, own: FloatArray) -> bool:
        """True where rows that this library pads have the run's loss, beside longer ones."""
        pool = self.pool.select(self.rows.rows)
        pool.reading = reading
        rows = pool.candidates()
        if (rows.num_targets == 0).any() or len(self.rows.batches) > len(rows):
            return False
        parts = np.split(token_losses(self.model, rows, loss=reading.loss), np.cumsum(rows.num_targets)[:-1])
        return _gap(np.array([part.mean() for part in parts]), own) <= 2 * self._tolerance(own)

    def _check_batches(self, reading: Reading, own: FloatArray) -> tuple[bool, dict[str, Any]]:
        """Whether rows in one batch have the losses that they have alone, and what was found of the first batch.

        Raises:
            UnsupportedSettingError: the run's loss of a batch does not follow from its rows.
        """
        firsts = range(0, min(len(self.rows.rows), MAX_BATCHES * NUM_TOGETHER), NUM_TOGETHER)
        found: dict[str, Any] = {}
        possible = {"tokens", "rows"}
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
            found["weighs"] = "tokens" if "tokens" in possible else "rows"
        return True, found

    def _check_batch(
        self, reading: Reading, own: FloatArray, chosen: IntArray, possible: set[str]
    ) -> dict[str, float] | None:
        """Which of the possible weights make the loss of one batch of its rows'; None where rows must run alone."""
        rows = [self.rows.rows[i] for i in chosen]
        try:
            batch = self.rows.together(rows)
        except Exception as error:  # a collator of single rows, or of rows of one length
            logger.debug("The collator makes no batch of pool rows %s: %s", rows, error)
            return None
        if len(batch.get("input_ids", rows)) != len(rows):
            return None
        together = self._loss(self.run_loss, batch)
        counts = self.pool.collated(np.array(rows), reading).num_targets
        if together is None or not counts.sum():
            return None
        if reading.loss is None and len(model_batch(batch, reading).targets()[0]) != counts.sum():
            return None  # padding on the left: a row's first token is trained behind it
        means = {"tokens": float(np.average(own[chosen], weights=counts)), "rows": float(own[chosen].mean())}
        tolerance = 2 * self._tolerance(own)
        weighs = {name: means[name] for name in possible if abs(means[name] - together) <= tolerance}
        if weighs:
            return {**weighs, "batch_loss": together}
        if self._padding_moves(batch, reading, chosen, counts, together if reading.loss is None else None):
            return None
        with without_router_loss(self.model) as has_router_loss:  # which is a batch's, and part of an own loss
            if has_router_loss:
                return None
        raise UnsupportedSettingError(
            "The loss of a batch must be a mean over its rows, so that a row has a loss of its own; "
            f"{self.run_loss.name} of pool rows {rows} together is {together:.6f}, and of the same rows one by one "
            f"{means['tokens']:.6f} (weighed by tokens) or {means['rows']:.6f} (by rows). {WAY_OUT}"
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
        read = self._read(batch, plain)
        singles = [self._read(self.rows.batches[i], plain) for i in chosen]
        if read is None or any(single is None for single in singles):
            return False
        alone = np.array([single.mean() for single in singles if single is not None])
        tolerance = 2 * self._tolerance(alone)
        if together is not None and abs(float(read.mean()) - together) > tolerance:
            return False
        return abs(float(read.mean()) - float(np.average(alone, weights=counts))) > tolerance

    def _uncompared(self) -> Reading:
        """No loss to compare with: the likelihood of the next token, if the model gives logits for it."""
        batch = model_batch(self.rows.batches[0], self.base, self.device)
        if not batch.labels.numel():
            batch = batch._replace(labels=batch.inputs["input_ids"])
        values = likelihood(self.model, batch)
        read = [means for reading, means in self._means() if reading.likelihood == "shifted"]
        feed, constants = self._feed(self.base, read[0] if read else np.zeros(len(self.rows.rows)))
        return dataclasses.replace(
            self.base,
            feed="row" if feed == "collated" else feed,
            constants=constants,
            compared={"loss": None, "read_loss": float(values.double().mean())},
        )


def _gap(a: FloatArray, b: FloatArray) -> float:
    """The largest difference; infinite where one is not finite."""
    gap = float(np.abs(a - b).max())
    return gap if np.isfinite(gap) else np.inf


def _disturb(parameters: list[nn.Parameter], *, until_it_passes_on: bool = False) -> None:
    """Add a little noise to parameters, the same in every process; to narrow ones enough to pass on what comes in."""
    for number, parameter in enumerate(parameters):
        local, shape = local_shard(parameter), whole_shape(parameter)
        if local.dtype.is_floating_point:
            generator = torch.Generator(device="cpu").manual_seed(number)
            noise = torch.randn(local.shape, generator=generator, dtype=torch.float32)
            passes_on = shape[-1] ** -0.5 if until_it_passes_on and len(shape) > 1 else 0.0
            local.add_(noise.to(local.device, local.dtype), alpha=max(0.05, passes_on))
