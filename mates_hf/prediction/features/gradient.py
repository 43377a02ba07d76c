"""A ridge on hidden state times label error, the gradient of the output head, which is never built.

Where it is used: `feature_model` with `features="head_gradient"`. A candidate's feature is the mean over its trained
targets of the outer product of what the head read (and a 1, for its bias) with the error of what it said: the
probabilities minus the label. Influence is close to a line in it.

How it is factored: of candidates with one target each, the Gram matrix of these products is the product, entry by
entry, of the Gram matrices of states and of errors. What comes out of the fit is one matrix W, and a prediction is
`state @ W @ error`. Of candidates with several targets the mean of the products is kept, block by block of the errors.

Trade-off: with many classes the errors are projected to a few dimensions by random signs. Inner products of errors are
then right on average, and off by about their length over the square root of the number of dimensions.

Shapes: N candidates, T targets of a batch, D width of a state, V classes, E dimensions of an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mates_hf.data.batches import ModelBatch
from mates_hf.prediction.features.head import OutputHead
from mates_hf.prediction.features.rows import Passes
from mates_hf.prediction.ridge import PENALTIES, FitTarget, FloatVector, MatrixLine, StateLine, errors_without_each
from mates_hf.records import IntArray

Array = npt.NDArray[Any]

MOST_CLASSES = 1_024  # errors of so many classes are kept whole where each candidate has one target
NUM_ERRORS = 64  # dimensions of an error where candidates have several targets: a product each is kept
_SIGNS_SEED = 0x6D61  # of the projection: the same in every fit, so that rounds build on each other
_ROWS_AT_ONCE = 64  # whose products are in memory as float64


class Errors:
    """Label errors, whole or projected.

    Args:
        num_classes: V.
        num_errors: E; of so many classes or fewer, errors are whole.
    """

    def __init__(self, num_classes: int, num_errors: int) -> None:
        self.num_classes, self.width = num_classes, min(num_classes, num_errors)
        self._signs: Tensor | None = None
        if num_errors < num_classes:
            count = num_classes * num_errors
            raw = np.random.PCG64(_SIGNS_SEED).random_raw(-(-count // 64)).astype("<u8")
            bits = np.unpackbits(raw.view(np.uint8))[:count].reshape(num_classes, num_errors)
            self._signs = torch.from_numpy((bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(num_errors)))

    def of(self, said_TV: Tensor, labels_T: Tensor) -> Tensor:
        """(T, E) float32 errors of probabilities; `said_TV` is overwritten."""
        rows = torch.arange(len(labels_T), device=said_TV.device)
        if self._signs is None:
            said_TV[rows, labels_T] -= 1
            return said_TV
        self._signs = self._signs.to(said_TV.device)
        return said_TV @ self._signs - self._signs[labels_T]


@dataclasses.dataclass(frozen=True)
class HeadFeatures:
    """What a fit needs of N candidates.

    Attributes:
        states: (N, D) float32 mean state of each candidate's targets.
        squares: (N, D) float32 mean squared state.
        errors: (N, E) float32 mean error, or the error of the only target.
        products: (N, D, E) float32 mean product of state and error; None where each candidate has one target.
    """

    states: Array
    squares: Array
    errors: Array
    products: Array | None

    @classmethod
    def read(
        cls, head: OutputHead, passes: Passes, errors: Errors, num_targets: IntArray, *, progress: bool = False
    ) -> HeadFeatures:
        """Run candidates, each of which has a target.

        Args:
            head: The output head.
            passes: The candidates in batches.
            errors: How errors are kept.
            num_targets: (N,) targets of each candidate.
            progress: Whether to show a progress bar.

        Returns:
            Their features.
        """
        num, one = len(num_targets), bool((num_targets == 1).all())
        states, squares = (np.zeros((num, head.width), np.float32) for _ in range(2))
        wrong = np.zeros((num, errors.width), np.float32)
        products = None if one else np.zeros((num, head.width, errors.width), np.float32)

        def work(batch: ModelBatch, owners: IntArray, counts: IntArray) -> None:
            hidden, said, labels = head.read(batch)
            found = errors.of(said, labels)
            if products is None:
                states[owners], wrong[owners] = hidden.cpu().numpy(), found.cpu().numpy()
                squares[owners] = states[owners] ** 2
                return
            parts = zip(hidden.split(counts.tolist()), found.split(counts.tolist()), strict=True)
            # All of them before any is added: a batch whose memory runs out is run again.
            sums = [(state.sum(0), (state**2).sum(0), error.sum(0), state.T @ error) for state, error in parts]
            for owner, each in zip(
                owners.tolist(), [[part.cpu().numpy() for part in row] for row in sums], strict=True
            ):
                for kept, part in zip((states, squares, wrong, products), each, strict=True):
                    kept[owner] += part / np.float32(num_targets[owner])

        passes.run(work, progress=progress)
        return cls(states, squares, wrong, products)

    def take(self, index: Array) -> HeadFeatures:
        """Some candidates: `index` is (M,) int numbers or an (N,) bool mask."""
        products = None if self.products is None else self.products[index]
        return HeadFeatures(self.states[index], self.squares[index], self.errors[index], products)

    def scaling(self) -> tuple[FloatVector, FloatVector]:
        """(D,) mean and spread of the states of all targets; a state that never moves has an infinite spread."""
        mean = self.states.mean(0, dtype=np.float64)
        spread = np.sqrt(np.maximum(self.squares.mean(0, dtype=np.float64) - mean**2, 0.0))
        return mean, np.where(spread > 1e-6 * max(float(spread.max()), 1e-30), spread, np.inf)

    def gram(self, mean: FloatVector, spread: FloatVector) -> FloatVector:
        """(N, N) float64 inner products of the products of scaled states, and a 1, with errors."""
        errors = self.errors.astype(np.float64)
        if self.products is None:
            states = (self.states - mean) / spread
            return np.asarray((states @ states.T + 1) * (errors @ errors.T))
        found = errors @ errors.T
        for column in range(errors.shape[1]):
            part = (self.products[:, :, column] - np.outer(errors[:, column], mean)) / spread
            found += part @ part.T
        return np.asarray(found)

    def weighted_sum(self, weights: FloatVector, mean: FloatVector) -> FloatVector:
        """(D + 1, E) float64 sum over candidates of weight times product; states are centred, the 1 comes last."""
        last = weights @ self.errors.astype(np.float64)
        if self.products is None:
            rest = ((self.states - mean) * weights[:, None]).T @ self.errors.astype(np.float64)
        else:
            rest = -np.outer(mean, last)
            for rows, block in self._blocks():
                rest += np.tensordot(weights[rows], block, 1)
        return np.concatenate([rest, last[None]])

    def scores(self, matrix: FloatVector, mean: FloatVector) -> FloatVector:
        """(N,) float64 what a (D + 1, E) matrix makes of each candidate, states centred."""
        errors = self.errors.astype(np.float64)
        if self.products is None:
            return np.asarray(np.einsum("ne,ne->n", (self.states - mean) @ matrix[:-1] + matrix[-1], errors))
        found: FloatVector = errors @ (matrix[-1] - mean @ matrix[:-1])
        for rows, block in self._blocks():
            found[rows] += block.reshape(len(block), -1) @ matrix[:-1].reshape(-1)
        return found

    def _blocks(self) -> Iterator[tuple[slice, FloatVector]]:
        assert self.products is not None
        for start in range(0, len(self.products), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            yield rows, self.products[rows].astype(np.float64)


@dataclasses.dataclass(frozen=True)
class HeadLine(MatrixLine):
    """What predicts influence from states and errors: a matrix between them.

    Attributes:
        num_classes: V of the model that was fitted on.
    """

    num_classes: int

    def errors(self) -> Errors:
        """How errors were kept when this was fitted."""
        return Errors(self.num_classes, self.matrix.shape[1])

    def require_fits(self, head: OutputHead) -> None:
        """Raise a `ValueError` where a model's head has another shape than the one that was fitted on."""
        if (head.width, head.num_classes) != (len(self.mean), self.num_classes):
            raise ValueError(
                f"The influence model must read a model like the one it was fitted on, with states of width "
                f"{len(self.mean)} and {self.num_classes} classes, got {head.width} and {head.num_classes}. Fit it "
                "again after a change of model."
            )

    def z_scores(
        self, head: OutputHead, passes: Passes, num_targets: IntArray, *, progress: bool = False
    ) -> FloatVector:
        """Run candidates, each of which has a target, and predict.

        Args:
            head: The output head.
            passes: The candidates in batches.
            num_targets: (N,) targets of each candidate.
            progress: Whether to show a progress bar.

        Returns:
            (N,) float64 z-scored predictions.
        """
        errors, found = self.errors(), np.full(len(num_targets), self.line.intercept)
        device = next(head.module.parameters()).device
        matrix, mean = (torch.from_numpy(part.astype(np.float32)).to(device) for part in (self.matrix, self.mean))

        def work(batch: ModelBatch, owners: IntArray, counts: IntArray) -> None:
            hidden, said, labels = head.read(batch)
            each = (((hidden - mean) @ matrix[:-1] + matrix[-1]) * errors.of(said, labels)).sum(1)
            values = each.cpu().numpy().astype(np.float64)
            owner = np.repeat(owners, counts)
            np.add.at(found, owner, values / num_targets[owner])

        passes.run(work, progress=progress)
        return found

    @classmethod
    def read(cls, line: StateLine, mean: Array | None, num_classes: Any) -> HeadLine:
        """A saved line, checked.

        Args:
            line: The saved matrix.
            mean: Saved array, or None where it is missing.
            num_classes: V as it was saved.

        Returns:
            The line.

        Raises:
            ValueError: the array is missing, or shapes do not belong together.
        """
        if mean is None or mean.ndim != 1 or mean.dtype != np.float64 or not np.isfinite(mean).all():
            raise ValueError("`mean` must be a finite float64 array of one dimension, and is not")
        if not isinstance(num_classes, int) or num_classes < 1 or len(line.coefficient) % (len(mean) + 1):
            raise ValueError("`coefficient` must be a matrix between states and errors, and is not")
        return cls(line, mean, num_classes)


def fit_head(
    features: HeadFeatures, target: FloatVector, num_classes: int, previous: HeadLine | None = None
) -> HeadLine:
    """Fit the matrix by ridge, its penalty chosen by leaving one candidate out at a time.

    Cost: one eigendecomposition of N rows.

    Args:
        features: Features of N candidates.
        target: (N,) float64 z-scored labels.
        num_classes: V.
        previous: An earlier round's line to build on, as in `ridge.fit_ridge`.

    Returns:
        The line, in z-scored units.
    """
    mean, spread = features.scaling()
    base, left_over = np.zeros((len(mean) + 1, features.errors.shape[1])), target
    if previous is not None:
        score = features.scores(previous.matrix, previous.mean)
        score -= score.mean()
        variance = float(score @ score)
        weight = float(np.clip(score @ target / variance, 0.0, 1.0)) if variance > 0 else 0.0
        base = weight * previous.matrix
        base[-1] += (mean - previous.mean) @ base[:-1]  # the same scores, of states that are centred anew
        left_over = target - weight * score
    weights = dual_ridge(features.gram(mean, spread), left_over)
    matrix = features.weighted_sum(weights, mean)
    matrix[:-1] /= spread[:, None] ** 2
    matrix += base
    intercept = float(target.mean() - features.scores(matrix, mean).mean())
    return HeadLine(StateLine(matrix.reshape(-1), intercept), mean, num_classes)


def fit_and_hold_out(
    head: OutputHead,
    passes: Passes,
    target: FitTarget,
    num_targets: IntArray,
    earlier: Any,
    *,
    num_errors: int | None,
    progress: bool,
) -> tuple[FloatVector, HeadLine]:
    """Run candidates, fit without those held out and predict these, then fit on all.

    Args:
        head: The output head.
        passes: The candidates in batches, each of which has a target.
        target: Their labels.
        num_targets: (N,) targets of each candidate.
        earlier: The `HeadLine` of an earlier round to build on, or None.
        num_errors: Dimensions of an error, or None.
        progress: Whether to show a progress bar.

    Returns:
        Predictions of the held-out candidates, z-scored, and the line in the labels' unit.

    Raises:
        ValueError: the earlier line is of a model with another head.
    """
    if num_errors is None:
        num_errors = MOST_CLASSES if bool((num_targets == 1).all()) else NUM_ERRORS
    errors = Errors(head.num_classes, num_errors)
    if earlier is not None:
        earlier.require_fits(head)
        errors = earlier.errors()
    found, inside = HeadFeatures.read(head, passes, errors, num_targets, progress=progress), ~target.held_out
    part = fit_head(found.take(inside), target.values[inside], head.num_classes, earlier)
    held_out = found.take(target.held_out).scores(part.matrix, part.mean) + part.line.intercept
    return held_out, fit_head(found, target.values, head.num_classes, earlier).in_units_of(target)


def dual_ridge(gram: FloatVector, target: FloatVector) -> FloatVector:
    """Weights of N candidates whose sum of products is the ridge, the intercept not penalised.

    Args:
        gram: (N, N) float64 inner products of the features; overwritten.
        target: (N,) float64.

    Returns:
        (N,) float64, which add up to 0.
    """
    gram -= gram.mean(0)
    gram -= gram.mean(1)[:, None]
    square, vectors = np.linalg.eigh(gram)
    kept = square > 1e-12 * max(float(square[-1]), 0.0)
    square, vectors = square[kept], vectors[:, kept]
    if not len(square):  # all features are equal
        return np.zeros(len(target))
    penalty = min(zip(errors_without_each(vectors, square, target, PENALTIES), PENALTIES, strict=True))[1]
    along = vectors.T @ (target - target.mean())
    return np.asarray(vectors @ (along / (square + penalty * square.sum() / len(target))))
