"""Ridge on pooled hidden states, and what every influence model that reads hidden states does with labels.

Where it is used: `encoder_model` and `hidden_states` turn candidates into states of one width; here labels are split
and z-scored, the ridge is fitted, and what it predicts is judged in the labels' unit. Trade-off: a line through the
states is all that is fitted, in closed form and in seconds; what is not linear in them is the fine-tuned encoder's to
find.

The penalty is the one with the least squared error of leave-one-out predictions, which the closed form gives without
refitting. Predictions then carry their shrinkage: where labels are noise, they hardly differ.

Shape suffixes: N candidates, D width of a state, R rank.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates_hf.prediction.judge import fit_report, require_spread, split_held_out, tell_few, usable_labels
from mates_hf.records import FitReport, InfluenceLabels

if TYPE_CHECKING:
    from typing_extensions import Self

FloatVector = npt.NDArray[np.float64]

# In units of the mean squared length of the centred and scaled states; the last leaves next to nothing of a signal.
PENALTIES = tuple(float(10.0**power) for power in np.arange(-3, 4.5, 0.5))


@dataclasses.dataclass(frozen=True)
class FitTarget:
    """Labels made ready for a fit: without those that cannot be fitted, split by document, then z-scored.

    Attributes:
        labels: Labels of N candidates.
        groups: (N,) group of each, or None.
        documents: (N,) document of each, or None.
        held_out: (N,) bool, True where the fit must not look.
        values: (N,) float64 `influence_per_token`, minus `centre`, divided by `scale`; > 0 helps more than most.
        centre: mean `influence_per_token` of the candidates not held out.
        scale: their standard deviation.
    """

    labels: InfluenceLabels
    groups: npt.NDArray[Any] | None
    documents: npt.NDArray[Any] | None
    held_out: npt.NDArray[np.bool_]
    values: FloatVector
    centre: float
    scale: float

    @classmethod
    def of(
        cls,
        labels: InfluenceLabels,
        usable: npt.NDArray[np.bool_],
        *,
        groups: npt.NDArray[Any] | None,
        documents: npt.NDArray[Any] | None = None,
        held_out_fraction: float,
        seed: int,
    ) -> FitTarget:
        """Split and z-score labels.

        Args:
            labels: measured influence, > 0 helps.
            usable: (M,) bool, the candidates that can be fitted on.
            groups: (M,) group of each label, or None.
            documents: (M,) document of each label, none of which is on both sides; None: each label is its own.
            held_out_fraction: share of the usable candidates to hold out, in (0, 1).
            seed: Random seed of the split.

        Returns:
            The target of the usable candidates, in their order.

        Raises:
            ValueError: `groups` or `documents` has another length, or too few candidates are usable.
            UnrankableError: the candidates fitted on are all equal, or all of one document.
        """
        labels, groups, documents = usable_labels(labels, groups, documents, usable)
        held_out = split_held_out(len(labels), held_out_fraction, seed, documents)
        tell_few(len(labels), int(held_out.sum()))
        per_token = labels.influence_per_token.astype(np.float64)
        centre, scale = require_spread(per_token[~held_out])
        return cls(labels, groups, documents, held_out, (per_token - centre) / scale, centre, scale)

    def report(self, predicted: FloatVector, *, num_labels: int, seed: int, seconds: float = 0.0) -> FitReport:
        """Judge predictions of the held-out candidates.

        Args:
            predicted: (H,) float64 in the unit of `values`.
            num_labels: labels that the fit has looked at.
            seed: Random seed of the bootstrap.
            seconds: wall-clock of the fit.

        Returns:
            The report, in the unit of `influence`.
        """
        return fit_report(
            (self.centre + self.scale * predicted) * self.labels.step_size,
            self.labels.influence[self.held_out],
            groups=None if self.groups is None else self.groups[self.held_out],
            num_labels=num_labels,
            seed=seed,
            label_std=float(self.labels.influence.std(dtype=np.float64)),
            seconds=seconds,
            num_tokens=self.labels.num_tokens[self.held_out],
            documents=None if self.documents is None else self.documents[self.held_out],
            probe=self.labels.kind,
        )


@dataclasses.dataclass(frozen=True)
class StateLine:
    """What predicts influence from a pooled state: a line, in z-scored units and in the labels'.

    Attributes:
        coefficient: (D,) float64, z-scored `influence_per_token` for each unit of the state.
        intercept: z-scored prediction of a state of zeros.
        centre: `influence_per_token` that a z-scored prediction of 0 stands for; what candidates without a state get.
        scale: `influence_per_token` for each z-scored unit.
        step_size: `influence` is `influence_per_token` times this.
    """

    coefficient: FloatVector
    intercept: float
    centre: float = 0.0
    scale: float = 1.0
    step_size: float = 1.0

    def z_scores(self, states_ND: npt.NDArray[Any]) -> FloatVector:
        """(N,) float64 z-scored predictions."""
        return np.asarray(states_ND.astype(np.float64) @ self.coefficient + self.intercept)

    def per_token(self, z_scores: FloatVector, found: npt.NDArray[np.bool_]) -> FloatVector:
        """(M,) float64 predicted `influence_per_token`, > 0 helps.

        Args:
            z_scores: (N,) z-scored predictions of the candidates that have a state.
            found: (M,) bool, which of all candidates those are; the others get the centre.

        Returns:
            The predictions, in the order of all candidates.
        """
        predicted = np.full(len(found), self.centre)
        predicted[found] += self.scale * z_scores
        return predicted

    def in_units_of(self, target: FitTarget) -> StateLine:
        """The line with the units of the labels it was fitted on."""
        return dataclasses.replace(
            self, centre=target.centre, scale=target.scale, step_size=float(target.labels.step_size)
        )

    def settings(self) -> dict[str, float]:
        """All but the coefficients, as `read` takes them."""
        return {name: getattr(self, name) for name in SETTINGS}

    @classmethod
    def read(cls, settings: dict[str, Any], coefficient: npt.NDArray[Any] | None) -> StateLine:
        """A saved line, checked.

        Args:
            settings: among others those of `settings()`.
            coefficient: saved array, or None where it is missing.

        Returns:
            The line.

        Raises:
            ValueError: the array is missing or of another type or shape, or a number is not finite.
        """
        if coefficient is None or coefficient.ndim != 1 or coefficient.dtype != np.float64 or not len(coefficient):
            raise ValueError("`coefficient` must be a float64 array of one dimension, and is not")
        line = cls(coefficient, **{name: float(settings[name]) for name in SETTINGS})
        if not np.isfinite([*line.settings().values()]).all() or not np.isfinite(coefficient).all():
            raise ValueError("`coefficient`, `intercept`, `centre`, `scale` and `step_size` must be finite")
        return line


@dataclasses.dataclass(frozen=True)
class MatrixLine:
    """A line in products of two things: a matrix between them. Kinds of it add what else they need.

    Attributes:
        line: The matrix (D + 1, E), flat, in the units that `StateLine` has; its last row is for a 1.
        mean: (D,) float64 what is taken off the first side.
    """

    line: StateLine
    mean: FloatVector

    @property
    def matrix(self) -> FloatVector:
        """(D + 1, E) float64."""
        return self.line.coefficient.reshape(len(self.mean) + 1, -1)

    def in_units_of(self, target: FitTarget) -> Self:
        """The line with the units of the labels it was fitted on."""
        return dataclasses.replace(self, line=self.line.in_units_of(target))


SETTINGS = ("intercept", "centre", "scale", "step_size")


def fit_ridge(states_ND: npt.NDArray[Any], target: FloatVector, previous: StateLine | None = None) -> StateLine:
    """Fit a line by ridge, its penalty chosen by leaving one candidate out at a time.

    Cost: one eigendecomposition of min(N, D) rows, and a float64 copy of the states.

    Args:
        states_ND: float32 states of N candidates.
        target: (N,) float64 z-scored labels.
        previous: an earlier round's line to build on; its weight is the least-squares slope of the target on its
            predictions, held to [0, 1].

    Returns:
        The line, in z-scored units.
    """
    states = states_ND.astype(np.float64)
    mean, spread = states.mean(0), states.std(0)
    # A state's few huge coordinates would decide alone, and one that never moves must not be blown up.
    spread = np.where(spread > 1e-6 * spread.max(), spread, np.inf)
    base, left_over = np.zeros(states.shape[1]), target
    if previous is not None:
        score = (states - mean) @ previous.coefficient
        variance = float(score @ score)
        weight = float(np.clip(score @ target / variance, 0.0, 1.0)) if variance > 0 else 0.0
        base, left_over = weight * previous.coefficient, target - weight * score
    states -= mean
    states /= spread
    penalty = min(zip(leave_one_out_errors(states, left_over, PENALTIES), PENALTIES, strict=True))[1]
    coefficient = base + ridge_coefficients(states, left_over, penalty) / spread
    return StateLine(coefficient, float(target.mean() - mean @ coefficient))


# `sklearn.linear_model.RidgeCV` finds the same penalty and the same coefficients (a test holds the two together to
# 1e-9), and is not called for what it costs. A fit would call it twice. One call on one thread, ours first:
# 1,600 x 768 states 0.2 and 1.3 s, 30 and 48 MB; 16,000 x 768 states 1.6 and 7.9 s, 226 and 330 MB;
# 1,600 x 4,096 states 1.2 and 1.0 s, 104 and 155 MB. Its import takes another 1.3 s and 160 MB, and nothing else here
# needs the package.
def _decomposed(states: FloatVector) -> tuple[FloatVector, FloatVector]:
    """Left singular vectors (N, R) and squared singular values (R,) of (N, D) states, from the smaller side."""
    num, width = states.shape
    square, vectors = np.linalg.eigh(states @ states.T if num <= width else states.T @ states)
    kept = square > 1e-12 * max(square[-1], 0.0)
    square, vectors = square[kept], vectors[:, kept]
    return (vectors if num <= width else states @ vectors / np.sqrt(square)), square


def leave_one_out_errors(states: FloatVector, target: FloatVector, penalties: tuple[float, ...]) -> list[float]:
    """Mean squared error of predicting each candidate by a ridge on the others.

    Args:
        states: (N, D) float64, centred over the N.
        target: (N,) float64.
        penalties: in units of the states' mean squared length; the intercept is not penalised.

    Returns:
        One error a penalty.
    """
    return errors_without_each(*_decomposed(states), target, penalties)


def errors_without_each(
    vectors: FloatVector, square: FloatVector, target: FloatVector, penalties: tuple[float, ...]
) -> list[float]:
    """`leave_one_out_errors` of states that are decomposed already.

    Args:
        vectors: (N, R) left singular vectors of the centred states.
        square: (R,) squared singular values.
        target: (N,) float64.
        penalties: in units of the states' mean squared length.

    Returns:
        One error a penalty.
    """
    unit = square.sum() / len(target)
    centred = target - target.mean()
    along = vectors.T @ centred
    errors = []
    for penalty in penalties:
        kept = square / (square + penalty * unit) if unit > 0 else square
        leverage = np.einsum("nr,nr,r->n", vectors, vectors, kept) + 1 / len(target)
        residual = (centred - vectors @ (kept * along)) / np.maximum(1 - leverage, 1e-9)
        errors.append(float(np.mean(residual**2)))
    return errors


def ridge_coefficients(states: FloatVector, target: FloatVector, penalty: float) -> FloatVector:
    """(D,) coefficients on centred (N, D) states, the intercept not penalised; `penalty` as in the errors."""
    num, width = states.shape
    ridge = penalty * float(np.einsum("nd,nd->", states, states)) / num
    centred = target - target.mean()
    if not ridge > 0:  # all states are equal
        return np.zeros(width)
    if num <= width:
        return np.asarray(states.T @ np.linalg.solve(states @ states.T + ridge * np.eye(num), centred))
    return np.asarray(np.linalg.solve(states.T @ states + ridge * np.eye(width), states.T @ centred))


def require_same_width(previous: StateLine, width: int) -> StateLine:
    """The line, or an error where an earlier round's states had another width."""
    if len(previous.coefficient) != width:
        raise ValueError(
            f"`previous` must be fitted on states of the same width ({width}), got {len(previous.coefficient)}. Leave "
            "it out after a change of model."
        )
    return previous
