"""How well predicted influence agrees with measured influence: rank, best fraction, calibration.

Where it is used: the arithmetic of every fit report, and of the `evaluate` modules in `metrics/`, so that a figure of
the guard and one that a user computes are the same. Sign and unit: influence > 0 helps, nats/token; nothing here needs
either, but predictions and labels must have the same.

Trade-off: intervals are bootstraps over candidates. That assumes nothing about the distribution of influence, whose
tails are heavy, and takes a few milliseconds for some hundred candidates.

Shape suffixes: N candidates, R bootstrap resamples, U distinct values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 2_000
MIN_GROUP_SIZE = 8
MIN_FOR_INTERVAL = 5  # four labels fall in perfect order once in 24 by chance: that is no 95 % interval
_RESAMPLE_BLOCK = 2_000_000  # counts held at once, 16 MB
_ROUNDING = 1e-9  # 0.29 * 100 is below 29 in floating point, and means 29


def check_pair(
    predicted: npt.ArrayLike, actual: npt.ArrayLike, names: tuple[str, str] = ("predicted", "actual")
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Predictions and labels as arrays that can be compared.

    Args:
        predicted: (N,) predicted influence, > 0 helps.
        actual: (N,) labels, same sign and unit.
        names: what the caller's arguments are called, for the errors.

    Returns:
        Both as (N,) float64.

    Raises:
        ValueError: lengths differ, there are fewer than 2 candidates, or a value is not finite.
    """
    predicted = np.asarray(predicted, np.float64)
    actual = np.asarray(actual, np.float64)
    if predicted.shape != actual.shape or actual.ndim != 1 or len(actual) < 2:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must both be (N,) with N of at least 2, got {predicted.shape} and "
            f"{actual.shape}."
        )
    for name, values in zip(names, (predicted, actual), strict=True):
        if not np.isfinite(values).all():
            raise ValueError(
                f"`{name}` must be finite, got {int((~np.isfinite(values)).sum())} non-finite values of "
                f"{len(values)}. Look for NaN in the probed losses."
            )
    return predicted, actual


def check_varies(values: npt.NDArray[Any], name: str, what: str) -> None:
    """Raise where all values are equal, which leaves `what` without a value."""
    if np.all(values == values[0]):
        raise ValueError(
            f"`{name}` must not be all equal, got {len(values)} times {values[0]:.6g}: {what} has no value then. Look "
            "for candidates that are all alike, or a model that was not fitted."
        )


def rank_correlation(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """Spearman correlation of two (N,) arrays with average ranks; 0 where one is constant, for it orders nothing."""
    return float(_weighted_spearman(x, y, np.ones((1, len(x))))[0])


def _weighted_spearman(
    x: npt.NDArray[Any], y: npt.NDArray[Any], weights_RN: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """(R,) Spearman correlations of resamples in which candidate j occurs `weights_RN[:, j]` times."""
    a, b = (_centred_ranks(values, weights_RN) for values in (x, y))
    covariance = np.einsum("rn,rn,rn->r", weights_RN, a, b)
    variance = np.einsum("rn,rn,rn->r", weights_RN, a, a) * np.einsum("rn,rn,rn->r", weights_RN, b, b)
    defined = variance > 1e-9
    return np.where(defined, covariance / np.sqrt(np.where(defined, variance, 1.0)), 0.0)


def _centred_ranks(values: npt.NDArray[Any], weights_RN: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(R, N) average rank of each candidate within each resample, minus the mean rank."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    weight_RU = np.add.reduceat(weights_RN[:, order], starts, axis=1)
    rank_RU = np.cumsum(weight_RU, axis=1) - weight_RU / 2
    rank_RU -= weights_RN.sum(axis=1, keepdims=True) / 2
    return np.asarray(rank_RU[:, group], np.float64)


# `scipy.stats.bootstrap` draws the same candidates and returns the same interval (a test holds the two together to
# 1e-12), and is not called. Given the two arrays, it ranks each resample anew (400 candidates: 0.30 s against 0.06 s;
# 16: 9 ms against 2 ms) and cannot draw whole documents. Given row numbers and the weights below, it is as fast and
# saves no line, for 1 s and 70 MB of import, and its argument for the seed has two names in the versions we support.
def bootstrap_interval(
    predicted: npt.NDArray[Any],
    actual: npt.NDArray[Any],
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    documents: npt.NDArray[Any] | None = None,
) -> tuple[float, float]:
    """95 % percentile interval of the Spearman correlation over resampled candidates, or documents.

    Args:
        predicted: (N,) predicted influence.
        actual: (N,) labels.
        seed: Random seed of the resampling; the caller's random streams are left alone.
        num_resamples: draws of N candidates with replacement; one in which a side is constant counts as 0.
        documents: (N,) document of each candidate, whose candidates are drawn together; None: each is its own.

    Returns:
        Both ends; (-1, 1) below `MIN_FOR_INTERVAL` candidates, or documents.

    Raises:
        ValueError: `num_resamples` is below 1.
    """
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1, got {num_resamples}.")
    document = None if documents is None else number_by_appearance(documents)
    num = len(actual) if document is None else int(document.max(initial=-1)) + 1
    if num < MIN_FOR_INTERVAL:
        return (-1.0, 1.0)
    rng = np.random.default_rng(seed)
    block = max(1, _RESAMPLE_BLOCK // len(actual))
    values = []
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        drawn = rng.integers(num, size=(rows, num)) + num * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num).astype(np.float64)
        values.append(_weighted_spearman(predicted, actual, weights if document is None else weights[:, document]))
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return (float(low), float(high))


def number_by_appearance(groups: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """(N,) int64 numbers of groups from 0, in the order in which they appear: 0 to N - 1 where all differ."""
    _, first, group = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first)), np.int64)[group]


def within_group(predicted: npt.NDArray[Any], actual: npt.NDArray[Any], groups: npt.ArrayLike) -> float | None:
    """Mean Spearman correlation inside groups of at least `MIN_GROUP_SIZE`, weighted by size.

    Args:
        predicted: (N,) predicted influence.
        actual: (N,) labels.
        groups: (N,) group of each candidate (a domain, a source).

    Returns:
        The mean; None where no group is that large. A group in which a side is constant counts as 0.

    Raises:
        ValueError: `groups` has another length.
    """
    groups = np.asarray(groups)
    if groups.shape != actual.shape:
        raise ValueError(f"`groups` must have one entry a candidate ({len(actual)}), got {groups.shape}.")
    total = 0.0
    num = 0
    for group in np.unique(groups):
        members = groups == group
        size = int(members.sum())
        if size >= MIN_GROUP_SIZE:
            total += size * rank_correlation(predicted[members], actual[members])
            num += size
    return total / num if num else None


def slope_of(actual: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> float:
    """Least-squares slope of label on prediction, both (N,); 0 where the prediction is constant."""
    centred = np.asarray(predicted, np.float64) - np.mean(predicted, dtype=np.float64)
    variance = float(centred @ centred)
    return float(centred @ np.asarray(actual, np.float64)) / variance if variance > 0 else 0.0


def calibration_bins(
    predicted: npt.NDArray[Any], actual: npt.NDArray[Any], num_bins: int = 10
) -> tuple[tuple[float, float], ...]:
    """Mean prediction and mean label of each tenth of the predictions, lowest first.

    Args:
        predicted: (N,) predicted influence.
        actual: (N,) labels, same unit.
        num_bins: parts of equal size, to one candidate; those left empty are left out.

    Returns:
        (mean predicted, mean label) a part, in the unit of the labels. Equal predictions may fall into two parts; who
        goes where follows from their order.

    Raises:
        ValueError: `num_bins` is below 1.
    """
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins}.")
    ascending = np.argsort(-predicted, kind="stable")[::-1]
    parts = [part for part in np.array_split(ascending, num_bins) if len(part)]
    return tuple((float(predicted[part].mean()), float(actual[part].mean())) for part in parts)


def top_precision(predicted: npt.NDArray[Any], actual: npt.NDArray[Any], fraction: float = 0.2) -> float:
    """Share of the predicted best fraction that is truly in the best fraction.

    Where candidates tie at the border of a fraction, it is the expected value over all ways to break the ties (those
    of the predictions and those of the labels apart), in closed form: a candidate tied for the last places counts with
    the chance it has of one. So a constant prediction gets the base rate, whatever order the candidates come in.

    Args:
        predicted: (N,) predicted influence, higher is better.
        actual: (N,) labels, higher is better.
        fraction: Share of the candidates, in (0, 1]; k = max(1, floor(fraction * N)) of each side are compared.

    Returns:
        Expected share in [0, 1]; k / N is chance.

    Raises:
        ValueError: `fraction` is outside (0, 1].
    """
    num = num_best(len(actual), fraction)
    return float(_chance_among_best(predicted, num) @ _chance_among_best(actual, num)) / num


def num_best(num: int, fraction: float) -> int:
    """How many of `num` candidates are its best fraction, at least 1; a fraction outside (0, 1] is a `ValueError`."""
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be in (0, 1], got {fraction!r}.")
    return max(1, int(fraction * num + _ROUNDING))


def _chance_among_best(values: npt.NDArray[Any], num: int) -> npt.NDArray[np.float64]:
    """(N,) chance of each value to be one of the `num` largest, ties broken at random."""
    border = np.partition(values, len(values) - num)[len(values) - num]
    above, tied = values > border, values == border
    return np.where(above, 1.0, np.where(tied, (num - above.sum()) / tied.sum(), 0.0))
