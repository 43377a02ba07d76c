"""A ridge on what a candidate shows times what it is told, read off the collated batch: no model is run.

Where it is used: `feature_model` with `features="inputs"`. A forward pass for each candidate is a third of a training
step on it, and a round scores several candidates for each that it trains on. Here a candidate costs its small copy:
every input that is made of numbers is averaged down to some hundreds of them. A label is a code, and so is each of
several, once for itself and once with its place; one more code is that of every candidate. The feature is the outer
product of numbers (and a 1) and codes. So a label has a value of its own, numbers have one, and numbers have another
one under that label, which is what tells a right label from a wrong one.

How it is factored: as in `gradient`, the Gram matrix is that of the numbers times that of the codes, entry by entry,
and what comes out of the fit is one matrix between them.

Trade-off: what a small copy does not show is not seen, and what the model makes of a candidate now is not asked. In
return the features of a candidate never change, so the newest labels of earlier rounds are fitted along. Without them,
what is chosen swings with each round's few labels.

Shapes: N candidates, B rows of a batch, D numbers, K codes of all of these rows, V buckets of codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from mates_hf.data.batches import Candidates, ModelBatch
from mates_hf.errors import InfluenceError, UnsupportedSettingError
from mates_hf.prediction.features.gradient import dual_ridge
from mates_hf.prediction.features.rows import sample_of, seconds_of_second
from mates_hf.prediction.ridge import FitTarget, FloatVector, MatrixLine, StateLine
from mates_hf.records import IntArray

Array = npt.NDArray[Any]

NUM_CODES = 2_048  # buckets of labels; the last is the code that every candidate has
_ANY, _ANY_SHARE = NUM_CODES - 1, 0.5
_PLANES, _SIDE, _LONE_SIDE = 4, 8, 16  # of a small copy: planes of 8 by 8, or one of 16 by 16
_PLAIN_NUMBERS = 1_024  # up to so many in a row are kept as they are; more are a wave
_WAVE_PARTS = 64  # of a wave, whose loudness is kept
_PLACES = 32  # from which on labels have no code with their place
_ROWS_AT_ONCE = 64
MOST_LABELS = 2_048  # of all rounds that a fit is made of; the newest are kept
_CODES_AT_ONCE = 1 << 14
_ARRAYS = ("numbers", "owners", "codes", "shares")
_TOKEN, _PLACE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd multipliers of a hash


def small_copy(values: Tensor) -> Tensor:
    """(B, d) float32 averages of an input of shape (B, ...), d at most 1,024."""
    values = values.float()
    if values.dim() < 3:
        values = values.reshape(len(values), -1)
        if values.shape[1] <= _PLAIN_NUMBERS:
            return values
        return functional.adaptive_avg_pool1d(values.abs()[:, None], _WAVE_PARTS).flatten(1)
    planes = math.prod(values.shape[1:-2])
    side = _LONE_SIDE if planes == 1 else _SIDE
    high, wide = (min(side, size) for size in values.shape[-2:])
    stacked = values.reshape(len(values), 1, planes, *values.shape[-2:])
    return functional.adaptive_avg_pool3d(stacked, (min(_PLANES, planes), high, wide)).flatten(1)


def _is_numbers(value: Any, num_rows: int) -> bool:
    """Whether an input is pictures, sounds or measurements, a row each; tokens and masks are not."""
    if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != num_rows or value.dtype == torch.bool:
        return False
    return value.dtype.is_floating_point or value.dim() > 2


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is read of N candidates.

    Attributes:
        numbers: (N, D) float32.
        widths: how many of the D each input has.
        owners: (K,) int64 candidate of each code, in order.
        codes: (K,) int64 bucket.
        shares: (K,) float32 weight of a code; those of a candidate's labels add up to 1.
        flops: FLOPs of reading all of them.
    """

    numbers: npt.NDArray[np.float32]
    widths: tuple[int, ...]
    owners: IntArray
    codes: IntArray
    shares: npt.NDArray[np.float32]
    flops: float

    @classmethod
    def read(cls, rows: Candidates, *, progress: bool = False) -> Inputs:
        """Collate candidates, each of which has a target.

        Args:
            rows: N candidates.
            progress: Whether to show a progress bar.

        Returns:
            What they show and are told.

        Raises:
            UnsupportedSettingError: no input is made of numbers, or candidates have several shapes of them.
            InfluenceError: a number is not finite.
        """
        parts: list[Inputs] = []
        size = 1 if rows.one_by_one else _ROWS_AT_ONCE
        for start in tqdm(range(0, len(rows), size), desc="inputs", unit="batch", disable=not progress):
            found = cls.of(rows.batch(np.arange(start, min(start + size, len(rows))), "cpu"))
            if parts and found.widths != parts[0].widths:
                raise UnsupportedSettingError(
                    f"Inputs must have as many numbers in each candidate, got {parts[0].widths} and {found.widths}. "
                    "Use `features='head_gradient'`, which runs the model, or bring the inputs to one size."
                )
            parts.append(dataclasses.replace(found, owners=found.owners + start))
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return cls(**joined, widths=parts[0].widths, flops=sum(part.flops for part in parts))

    @classmethod
    def of(cls, batch: ModelBatch) -> Inputs:
        """What is read of the B rows of one batch, on the CPU; errors as in `read`."""
        labels: Tensor = batch.labels if batch.labels.numel() else batch.inputs.get("input_ids", torch.zeros(0))
        num_rows = len(labels) if len(labels) else len(next(iter(batch.inputs.values())))
        given = {name: batch.inputs[name] for name in sorted(batch.inputs) if name != "input_ids"}
        if labels.dtype.is_floating_point and labels.numel():  # measurements that the model is told
            given["labels"] = labels
        given = {name: value for name, value in given.items() if _is_numbers(value, num_rows)}
        if not given:
            raise UnsupportedSettingError(
                "`features='inputs'` reads pictures, sounds or measurements, a row each, and the rows have none, but "
                f"{sorted(batch.inputs)}. For text use `NgramInfluenceModel`, else `features='head_gradient'`."
            )
        copies = [small_copy(value) for value in given.values()]
        numbers = torch.cat(copies, 1).numpy()
        if not np.isfinite(numbers).all():
            raise InfluenceError("Inputs must be finite numbers, got NaN or infinity. Look at the rows of the pool.")
        owners, codes, shares = _codes(batch, labels, num_rows)
        # Each number is read once, and multiplied and added once for each code.
        flops = float(sum(value.numel() for value in given.values()) + 2 * numbers.shape[1] * len(codes))
        return cls(numbers, tuple(copy.shape[1] for copy in copies), owners, codes, shares, flops)

    def take(self, index: Array) -> Inputs:
        """Some candidates: `index` is an (N,) bool mask."""
        kept = index[self.owners]
        owners = (np.cumsum(index) - 1)[self.owners[kept]]
        return dataclasses.replace(
            self, numbers=self.numbers[index], owners=owners, codes=self.codes[kept], shares=self.shares[kept]
        )

    def joined(self, later: Inputs) -> Inputs:
        """These candidates, and others behind them; a `ValueError` where they have other numbers."""
        if later.widths != self.widths:
            raise ValueError(
                f"`previous` must have been fitted on candidates like these, of {later.widths} numbers, got "
                f"{self.widths}. Start without it after a change of the collator."
            )
        later = dataclasses.replace(later, owners=later.owners + len(self.numbers))
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(later, name)]) for name in _ARRAYS
        }
        return dataclasses.replace(later, **arrays)

    def scaling(self) -> tuple[FloatVector, FloatVector]:
        """(D,) mean and divisor of each number, so that a candidate's numbers have a mean squared length of 1.

        Inputs count alike, and the numbers of one keep their relation: a pixel that hardly moves is not blown up.
        """
        mean = self.numbers.mean(0, dtype=np.float64)
        variance = ((self.numbers - mean) ** 2).mean(0)
        parts = np.split(variance, np.cumsum(self.widths)[:-1])
        lengths = [math.sqrt(float(part.sum()) * len(parts)) for part in parts]
        divisor = np.repeat([length if length > 0 else np.inf for length in lengths], self.widths)
        return mean, divisor

    def bags(self) -> npt.NDArray[np.float64]:
        """(N, V) float64 shares of codes."""
        found = np.zeros((len(self.numbers), NUM_CODES))
        np.add.at(found, (self.owners, self.codes), self.shares)
        return found


def _codes(batch: ModelBatch, labels: Tensor, num_rows: int) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
    """What a batch's rows are told: (K,) rows, (K,) buckets and (K,) shares."""
    owners, codes = _label_codes(batch, labels)
    counts = np.bincount(owners, minlength=num_rows)
    shares = np.concatenate([1 / counts[owners], np.full(num_rows, _ANY_SHARE)]).astype(np.float32)
    owners = np.concatenate([owners, np.arange(num_rows)])
    order = np.argsort(owners, kind="stable")
    return owners[order], np.concatenate([codes, np.full(num_rows, _ANY)])[order], shares[order]


def _label_codes(batch: ModelBatch, labels: Tensor) -> tuple[IntArray, IntArray]:
    """Rows and buckets of all labels of a batch, and again of those that stand early, with their places."""
    if not labels.numel() or labels.dtype.is_floating_point:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if labels.dim() == 1:
        kept = np.flatnonzero(labels.numpy() >= 0)
        return kept, labels.numpy()[kept] % _ANY
    if batch.labels.numel():
        positions, tokens, _, _ = batch.targets()
        owners, said = positions.numpy() // (labels.shape[1] + batch.num_virtual), tokens.numpy()
    else:
        mask = batch.inputs.get("attention_mask")
        owners, columns = np.nonzero(np.ones(labels.shape, bool) if mask is None else mask.numpy() > 0)
        said = labels.numpy()[owners, columns]
    places = np.arange(len(owners)) - np.searchsorted(owners, owners)
    early = places < _PLACES
    hashed = [said.astype(np.uint64) * _TOKEN, said[early].astype(np.uint64) * _TOKEN]
    hashed[1] += (places[early].astype(np.uint64) + np.uint64(1)) * _PLACE
    codes = (np.concatenate(hashed) >> np.uint64(40)).astype(np.int64) % _ANY
    return np.concatenate([owners, owners[early]]), codes


@dataclasses.dataclass(frozen=True)
class InputLine(MatrixLine):
    """What predicts influence from numbers and codes: a matrix between them.

    Attributes:
        divisor: (D,) float64 what numbers are divided by once their mean is off.
        seen: What the M candidates that it was fitted on show and are told; the newest come last.
        values: (M,) float64 their labels, z-scored by round.
    """

    divisor: FloatVector
    seen: Inputs
    values: FloatVector

    def require_fits(self, found: Inputs) -> InputLine:
        """The line itself; a `ValueError` where candidates have other numbers than those of the fit."""
        if found.widths != self.seen.widths:
            raise ValueError(
                f"The influence model must read candidates like those of its fit, of {self.seen.widths} numbers, got "
                f"{found.widths}. Fit it again after a change of the collator."
            )
        return self

    def z_scores(self, found: Inputs) -> FloatVector:
        """(N,) float64 z-scored predictions."""
        predicted = np.full(len(found.numbers), self.line.intercept)
        by_code = np.ascontiguousarray(self.matrix.T)
        for start in range(0, len(found.owners), _CODES_AT_ONCE):
            part = slice(start, start + _CODES_AT_ONCE)
            owners, values = found.owners[part], by_code[found.codes[part]]
            numbers = (found.numbers[owners] - self.mean) / self.divisor
            worth = ((numbers * values[:, :-1]).sum(1) + values[:, -1]) * found.shares[part]
            predicted += np.bincount(owners, worth, len(predicted))
        return predicted

    def tensors(self) -> dict[str, Array]:
        """All but the line, as `read` takes them."""
        seen = {f"seen.{name}": getattr(self.seen, name) for name in _ARRAYS}
        widths = np.array(self.seen.widths, np.int64)
        return {"mean": self.mean, "divisor": self.divisor, "values": self.values, "seen.widths": widths, **seen}

    @classmethod
    def read(cls, line: StateLine, tensors: Mapping[str, Array]) -> InputLine:
        """A saved line, checked.

        Args:
            line: The saved matrix.
            tensors: Among others those of `tensors()`.

        Returns:
            The line.

        Raises:
            ValueError: an array is missing, or arrays do not belong together.
        """
        try:
            mean, divisor, values, widths = (tensors[name] for name in ("mean", "divisor", "values", "seen.widths"))
            parts = {name: tensors[f"seen.{name}"] for name in _ARRAYS}
        except KeyError as error:
            raise ValueError(f"{error} must be saved with the matrix, and is not") from error
        found = cls(line, mean, divisor, Inputs(**parts, widths=tuple(map(int, widths)), flops=0.0), values)
        seen, width = found.seen, sum(found.seen.widths)
        sound = (
            mean.shape == divisor.shape == (width,)
            and seen.numbers.shape == (len(values), width)
            and seen.owners.shape == seen.codes.shape == seen.shares.shape
            and len(line.coefficient) == (width + 1) * NUM_CODES
            and np.isfinite(mean).all()
            and bool((divisor > 0).all())
            and all(np.isfinite(part).all() for part in (values, seen.numbers, seen.shares))
            and all(((part >= 0) & (part < most)).all() for part, most in (
                (seen.owners, len(values)), (seen.codes, NUM_CODES)
            ))
        )  # fmt: skip
        if not sound:
            raise ValueError("The matrix, and what it was fitted on, must belong together, and do not")
        return found


def fit_inputs(found: Inputs, target: FloatVector, previous: InputLine | None = None) -> InputLine:
    """Fit the matrix by ridge, its penalty chosen by leaving one candidate out at a time.

    Cost: one eigendecomposition of M rows, N and those of earlier rounds.

    Args:
        found: What N candidates show and are told.
        target: (N,) float64 z-scored labels.
        previous: An earlier round's line, whose candidates are fitted along.

    Returns:
        The line, in z-scored units.
    """
    seen, values = found, target
    if previous is not None and len(target) < MOST_LABELS:
        newest = np.arange(len(previous.values)) >= len(previous.values) - (MOST_LABELS - len(target))
        seen, values = previous.seen.take(newest).joined(found), np.concatenate([previous.values[newest], target])
    mean, divisor = seen.scaling()
    numbers, bags = (seen.numbers - mean) / divisor, seen.bags()
    weights = dual_ridge((numbers @ numbers.T + 1) * (bags @ bags.T), values)
    matrix = np.concatenate([(numbers * weights[:, None]).T @ bags, (weights @ bags)[None]])
    line = InputLine(StateLine(matrix.reshape(-1), 0.0), mean, divisor, seen, values)
    intercept = float(values.mean() - line.z_scores(seen).mean())
    return dataclasses.replace(line, line=StateLine(line.line.coefficient, intercept))


@dataclasses.dataclass(frozen=True)
class InputReader:
    """Candidates read off their batches: fitted on, predicted, and timed.

    Attributes:
        progress: Whether to show progress bars.
    """

    progress: bool

    def digest(self) -> None:
        """No weights are read."""

    def fit(self, rows: Candidates, target: FitTarget, earlier: Any) -> tuple[FloatVector, InputLine, float]:
        """Read candidates, fit without those held out and predict these, then fit on all.

        Args:
            rows: N candidates, each of which has a target.
            target: Their labels.
            earlier: An earlier round's line to build on, or None.

        Returns:
            z-scored predictions of the held-out candidates, the line in the labels' unit, and FLOPs of reading.
        """
        found = Inputs.read(rows, progress=self.progress)
        part = fit_inputs(found.take(~target.held_out), target.values[~target.held_out], earlier)
        held_out, line = part.z_scores(found.take(target.held_out)), fit_inputs(found, target.values, earlier)
        return held_out, line.in_units_of(target), found.flops

    def z_scores(self, rows: Candidates, line: InputLine) -> FloatVector:
        """(N,) float64 z-scored predictions; a `ValueError` where candidates have other numbers."""
        found = Inputs.read(rows, progress=self.progress)
        return line.require_fits(found).z_scores(found)

    def seconds(self, rows: Candidates, num: int) -> float:
        """Estimate how long `num` candidates take, by reading a few twice, first to warm up."""
        some = sample_of(rows)
        return seconds_of_second(lambda: Inputs.read(some)) * num / max(1, len(some))
