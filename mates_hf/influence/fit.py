"""Judging an influence model: the held-out split, the fit report, and how many labels a weak fit would need.

Place in the flow: every influence model splits its labels here, fits on one part and reports on the other; the guard
in `training/` reads the report. Trade-off: the interval is a bootstrap of held-out candidates only. It costs a fifth
of the labels and assumes nothing about the distribution of influence, whose tails are heavy.

Shape suffixes: N candidates, R bootstrap resamples, U distinct values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.records import FitReport

NUM_RESAMPLES = 2_000
MIN_GROUP_SIZE = 8
_MIN_FOR_INTERVAL = 5  # four labels fall in perfect order once in 24 by chance: that is no 95 % interval
_RESAMPLE_BLOCK = 2_000_000  # counts held at once, 16 MB
_Z_95 = 1.959964
_SPEARMAN_VARIANCE = 1.06  # of atanh(Spearman), times n - 3 (Fieller, Hartley and Pearson 1957)


def split_held_out(num: int, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Draw which candidates to keep out of the fit.

    Args:
        num: number of labelled candidates, at least 4.
        fraction: share to hold out, in (0, 1).
        seed: of the draw.

    Returns:
        (num,) bool, True where held out; at least 2 on each side.

    Raises:
        ValueError: `fraction` is outside (0, 1) or there are fewer than 4 candidates.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`held_out_fraction` must be in (0, 1), got {fraction!r}.")
    if num < 4:
        raise ValueError(f"A fit needs at least 4 labelled candidates, got {num}. Probe more candidates.")
    num_held_out = min(max(round(num * fraction), 2), num - 2)
    held_out = np.zeros(num, bool)
    held_out[np.random.default_rng(seed).permutation(num)[:num_held_out]] = True
    return held_out


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


def _bootstrap_interval(predicted: npt.NDArray[Any], actual: npt.NDArray[Any], seed: int) -> tuple[float, float]:
    """95 % percentile interval of the Spearman correlation over resampled candidates."""
    num = len(actual)
    if num < _MIN_FOR_INTERVAL:
        return (-1.0, 1.0)
    rng = np.random.default_rng(seed)
    block = max(1, _RESAMPLE_BLOCK // num)
    values = []
    for start in range(0, NUM_RESAMPLES, block):
        rows = min(block, NUM_RESAMPLES - start)
        drawn = rng.integers(num, size=(rows, num)) + num * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num).astype(np.float64)
        values.append(_weighted_spearman(predicted, actual, weights))
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return (float(low), float(high))


def _within_group(predicted: npt.NDArray[Any], actual: npt.NDArray[Any], groups: npt.NDArray[Any]) -> float | None:
    """Mean Spearman inside groups of at least `MIN_GROUP_SIZE`, weighted by size; None where none is that large."""
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


def fit_report(
    predicted: npt.NDArray[Any],
    actual: npt.NDArray[Any],
    *,
    groups: npt.NDArray[Any] | None = None,
    num_labels: int,
    seed: int = 0,
    label_std: float | None = None,
    seconds: float = 0.0,
) -> FitReport:
    """Compare predictions with labels they were not fitted on.

    Args:
        predicted: (N,) predicted influence of the held-out candidates, > 0 helps.
        actual: (N,) their labels, same sign and unit.
        groups: (N,) group of each (a domain, a source), or None.
        num_labels: labels the model was fitted on.
        seed: of the bootstrap.
        label_std: standard deviation of the labels in their unit; None takes that of `actual`.
        seconds: wall-clock of the fit.

    Returns:
        The report, in the unit of `actual`.

    Raises:
        ValueError: lengths differ, there are fewer than 2 candidates, or a value is not finite.
    """
    predicted = np.asarray(predicted, np.float64)
    actual = np.asarray(actual, np.float64)
    if predicted.shape != actual.shape or actual.ndim != 1 or len(actual) < 2:
        raise ValueError(
            f"`predicted` and `actual` must both be (N,) with N of at least 2, got {predicted.shape} and "
            f"{actual.shape}."
        )
    for name, values in (("predicted", predicted), ("actual", actual)):
        if not np.isfinite(values).all():
            raise ValueError(
                f"`{name}` must be finite, got {int((~np.isfinite(values)).sum())} non-finite values of "
                f"{len(values)}. Look for NaN in the probed losses."
            )
    within = None
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != actual.shape:
            raise ValueError(f"`groups` must have one entry a candidate ({len(actual)}), got {groups.shape}.")
        within = _within_group(predicted, actual, groups)
    num_best = max(1, len(actual) // 5)
    order = np.argsort(-predicted, kind="stable")
    best = np.argsort(-actual, kind="stable")[:num_best]
    tenths = [part for part in np.array_split(order[::-1], 10) if len(part)]
    return FitReport(
        num_labels=num_labels,
        num_held_out=len(actual),
        spearman=rank_correlation(predicted, actual),
        interval=_bootstrap_interval(predicted, actual, seed),
        spearman_within_group=within,
        slope=slope_of(actual, predicted),
        top_fifth_overlap=len(np.intersect1d(order[:num_best], best)) / num_best,
        calibration=tuple((float(predicted[part].mean()), float(actual[part].mean())) for part in tenths),
        label_std=float(actual.std()) if label_std is None else float(label_std),
        seconds=seconds,
    )


def labels_needed(report: FitReport) -> int:
    """Estimate how many labels (fitted and held out) would put the interval of the rank correlation above 0.

    The width of a rank correlation's interval follows Fisher's z: 1.96 * sqrt(1.06 / (n - 3)) over n held-out labels.
    The correlation is taken as measured; where it is below one standard error of 0, as that standard error, which
    gives about four times the labels at hand. A larger fit also ranks better, so the estimate errs on the high side.

    Args:
        report: of the weak fit.

    Returns:
        Number of labels; more than the report's own where its interval still includes 0.
    """
    total = report.num_labels + report.num_held_out
    least = 1 / math.sqrt(max(report.num_held_out, 4))
    rho = min(max(report.spearman, least), 0.99)
    num_held_out = 3 + _SPEARMAN_VARIANCE * (_Z_95 / math.atanh(rho)) ** 2
    needed = math.ceil(num_held_out * total / report.num_held_out)
    return max(needed, total + 1) if report.interval[0] <= 0 else needed
