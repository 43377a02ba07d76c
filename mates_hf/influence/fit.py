"""Judging an influence model: the held-out split, the fit report, and how many labels a weak fit would need.

Place in the flow: every influence model splits its labels here, fits on one part and reports on the other; the guard
in `training/` reads the report. Its arithmetic is `evaluation/agreement`'s, which the `evaluate` modules share.
Trade-off: the interval is a bootstrap of held-out candidates only. It costs a fifth of the labels and assumes nothing
about the distribution of influence, whose tails are heavy.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.pool import rows_of
from mates_hf.data.rows import TokenRows
from mates_hf.evaluation.agreement import (
    bootstrap_interval,
    calibration_bins,
    check_pair,
    rank_correlation,
    slope_of,
    top_precision,
    within_group,
)
from mates_hf.records import FitReport, InfluenceLabels

SLOPE_RANGE = (0.05, 5.0)  # never 0 or below: calibration may soften a ranking, not erase or turn it

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
    predicted, actual = check_pair(predicted, actual)
    within = None if groups is None else within_group(predicted, actual, groups)
    return FitReport(
        num_labels=num_labels,
        num_held_out=len(actual),
        spearman=rank_correlation(predicted, actual),
        interval=bootstrap_interval(predicted, actual, seed),
        spearman_within_group=within,
        slope=slope_of(actual, predicted),
        top_fifth_overlap=top_precision(predicted, actual),
        calibration=calibration_bins(predicted, actual),
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


def usable_labels(
    labels: InfluenceLabels, groups: npt.NDArray[Any] | None, usable: npt.NDArray[np.bool_]
) -> tuple[InfluenceLabels, npt.NDArray[Any] | None]:
    """The labels that can be fitted on, and their groups.

    Args:
        labels: of M candidates.
        groups: (M,) group of each, or None.
        usable: (M,) bool.

    Returns:
        Both, of the usable ones in their order.

    Raises:
        ValueError: `groups` has another length.
    """
    if groups is not None and len(groups) != len(labels):
        raise ValueError(f"`groups` must have one entry a label ({len(labels)}), got {len(groups)}.")
    groups = None if groups is None else np.asarray(groups)[usable]
    return (labels if usable.all() else labels.take(usable)), groups


def fresh_report(
    per_token: Callable[[], npt.NDArray[np.float64]],
    labels: InfluenceLabels,
    fitted: FitReport,
    *,
    groups: npt.NDArray[Any] | None,
    seed: int,
) -> FitReport:
    """Judge a fitted model on labels that it has not seen: what each influence model's `evaluate` does.

    Args:
        per_token: predicts `influence_per_token` of the labelled candidates; called once the labels are checked.
        labels: fresh labels of N candidates.
        fitted: the report of the fit.
        groups: (N,) group of each label, or None.
        seed: of the bootstrap.

    Returns:
        The report, in the unit of `labels.influence`; `seconds` is the time this took.
    """
    started = time.perf_counter()
    labels.check()
    predicted = per_token() * labels.step_size
    num_labels = fitted.num_labels + fitted.num_held_out
    report = fit_report(predicted, labels.influence, groups=groups, num_labels=num_labels, seed=seed)
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def measured_rows(candidates: Any, labels: InfluenceLabels) -> TokenRows:
    """The rows that labels were measured on, in their order.

    Args:
        candidates: the candidate pool, or the rows the labels' `candidate_id` point into.
        labels: measured influence.

    Returns:
        One row a label.

    Raises:
        ValueError: their numbers of targets are not the labels'.
    """
    rows = rows_of(candidates, labels.candidate_id)
    differ = np.flatnonzero(rows.num_targets != labels.num_tokens)
    if len(differ):
        first = differ[0]
        raise ValueError(
            f"`labels` must have been measured on these candidates: candidate_id {labels.candidate_id[first]} has "
            f"{rows.num_targets[first]} targets here and {labels.num_tokens[first]} in the labels ({len(differ)} "
            "candidates differ). Pass the pool that was probed, untouched."
        )
    return rows
