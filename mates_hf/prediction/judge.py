"""Judging an influence model: the held-out split, the fit report, and how many labels a weak fit would need.

Where it is used: every influence model splits its labels here, fits on one part and reports on the other; the guard
in `training/` reads the report. Its arithmetic is `evaluation/agreement`'s, which the `evaluate` modules share.
Trade-off: the interval is a bootstrap of held-out documents only. It costs a fifth of the labels and assumes nothing
about the distribution of influence, whose tails are heavy.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.batches import Candidates
from mates_hf.data.pool import rows_of
from mates_hf.data.rows import TokenRows
from mates_hf.errors import UnrankableError
from mates_hf.evaluation.agreement import (
    bootstrap_interval,
    calibration_bins,
    check_pair,
    number_by_appearance,
    rank_correlation,
    slope_of,
    top_precision,
    within_group,
)
from mates_hf.prediction.worth import row_worth
from mates_hf.records import FitReport, InfluenceLabels

logger = logging.getLogger(__name__)

SLOPE_RANGE = (0.05, 5.0)  # never 0 or below: calibration may soften a ranking, not erase or turn it
FEW_LABELS = 20  # below this a fit is mostly its penalties
FEW_HELD_OUT = 8  # below this a rank correlation is mostly luck

_Z_95 = 1.959964
_Z_80 = 0.841621  # added to it, a measurement succeeds four times in five instead of every other time
_SPEARMAN_VARIANCE = 1.06  # of atanh(Spearman), times n - 3 (Fieller, Hartley and Pearson 1957)
_MOST_TIMES = 100.0  # an extrapolation beyond so many times the labels at hand says nothing


def split_held_out(
    num: int, fraction: float, seed: int, documents: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.bool_]:
    """Draw which candidates to keep out of the fit, whole documents at a time.

    Args:
        num: number of labelled candidates, at least 4.
        fraction: share to hold out, in (0, 1).
        seed: Random seed of the draw.
        documents: (num,) document of each candidate; None: each is its own.

    Returns:
        (num,) bool, True where held out; at least 2 on each side, as far as documents allow, and never none.

    Raises:
        ValueError: `fraction` is outside (0, 1), or there are fewer than 4 candidates.
        UnrankableError: all candidates are of one document, so that no prediction could be tested.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`held_out_fraction` must be in (0, 1), got {fraction!r}.")
    if num < 4:
        raise ValueError(f"A fit needs at least 4 labelled candidates, got {num}. Probe more candidates.")
    wanted = min(max(round(num * fraction), 2), num - 2)
    document = np.arange(num) if documents is None else number_by_appearance(documents)
    sizes = np.bincount(document)
    if len(sizes) < 2:
        raise UnrankableError(
            f"A fit must have candidates of at least 2 documents, to be tested on one it has not seen, got {num} "
            "copies of one. Look at what the pool holds, or at `document_column`."
        )
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    total = np.cumsum(sizes[drawn])
    num_documents = int(np.searchsorted(total, wanted)) + 1
    # A document too large to be held out as well goes to the fit, unless it would be all there is to test on.
    if num_documents > 1 and total[num_documents - 1] > num - 2:
        num_documents -= 1
    return np.isin(document, drawn[: min(num_documents, len(sizes) - 1)])


def require_spread(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean and standard deviation of labels to be fitted.

    Args:
        values: (N,) `influence_per_token`, > 0 helps.

    Returns:
        Both, in the unit of `values`; the second above 0.

    Raises:
        UnrankableError: all are equal.
    """
    centre, scale = float(values.mean()), float(values.std())
    if not scale > 0:
        raise UnrankableError("`labels.influence_per_token` must differ between candidates; all are equal.")
    return centre, scale


def tell_few(num_labels: int, num_held_out: int) -> None:
    """Warn of a fit whose report, and ranking, is mostly luck.

    Args:
        num_labels: fitted and held-out ones.
        num_held_out: How many of these are held out.
    """
    if num_labels < FEW_LABELS or num_held_out < FEW_HELD_OUT:
        logger.warning(
            "An influence model was fitted on %d labels, %d of them held out: too few to rank by, or to judge it. "
            "Probe at least %d candidates; 500 to 2,000 are usual.",
            num_labels, num_held_out, max(FEW_LABELS, 5 * FEW_HELD_OUT),
        )  # fmt: skip


def fit_report(
    predicted: npt.NDArray[Any],
    actual: npt.NDArray[Any],
    *,
    groups: npt.NDArray[Any] | None = None,
    num_labels: int,
    seed: int = 0,
    label_std: float | None = None,
    seconds: float = 0.0,
    num_tokens: npt.NDArray[Any] | None = None,
    documents: npt.NDArray[Any] | None = None,
    probe: str | None = None,
) -> FitReport:
    """Compare predictions with labels they were not fitted on.

    Args:
        predicted: (N,) predicted influence of the held-out candidates, > 0 helps.
        actual: (N,) their labels, same sign and unit.
        groups: (N,) group of each (a domain, a source), or None.
        num_labels: labels the model was fitted on.
        seed: Random seed of the bootstrap.
        label_std: standard deviation of the labels in their unit; None takes that of `actual`.
        seconds: wall-clock of the fit.
        num_tokens: (N,) trained tokens of each. Where they differ, rank correlations and overlap are of what rows are
            worth, because rounds rank by that; None, or equal: of influence.
        documents: (N,) document of each, for the bootstrap; None: each is its own.
        probe: What the labels are, `InfluenceLabels.kind`.

    Returns:
        The report, in the unit of `actual`.

    Raises:
        ValueError: lengths differ, there are fewer than 2 candidates, or a value is not finite.
    """
    predicted, actual = check_pair(predicted, actual)
    ranked, truth, ranking = predicted, actual, "influence"
    if num_tokens is not None and len(np.unique(num_tokens)) > 1:
        ranked, truth, ranking = row_worth(predicted, num_tokens), row_worth(actual, num_tokens), "worth"
    within = None if groups is None else within_group(ranked, truth, groups)
    return FitReport(
        num_labels=num_labels,
        num_held_out=len(actual),
        spearman=rank_correlation(ranked, truth),
        interval=bootstrap_interval(ranked, truth, seed, documents=documents),
        spearman_within_group=within,
        slope=slope_of(actual, predicted),
        top_fifth_overlap=top_precision(ranked, truth),
        calibration=calibration_bins(predicted, actual),
        label_std=float(actual.std()) if label_std is None else float(label_std),
        seconds=seconds,
        ranking="worth" if ranking == "worth" else "influence",
        probe=probe,
    )


def times_needed(report: FitReport, min_spearman: float) -> float | None:
    """Estimate how many times the labels at hand a weak fit would need to pass the guard four times in five.

    An interval that includes 0 narrows with the square root of the labels. Its width is taken as measured, as the
    distance of `spearman` from its lower end in Fisher's z, and by the formula, 1.96 sqrt(1.06 / (n - 3)) over n
    held-out labels, where there are too few for an interval. A correlation below one standard error of 0 is taken as
    that.

    A correlation below `min_spearman` must rise. Where labels are few for what is fitted, it rises with the square
    root of their number; nothing better is known of a single fit.

    Args:
        report: Report of the fit that did not pass.
        min_spearman: The guard's lowest Spearman.

    Returns:
        A factor of at least 2; None where no number of labels is known to do: the correlation is not above 0, or the
        factor is beyond what one fit tells.
    """
    rho = min(report.spearman, 0.99)
    if not rho > 0:
        return None
    least = math.sqrt(_SPEARMAN_VARIANCE / (max(report.num_held_out, 4) - 3))
    times = 1.0
    if rho < min_spearman:
        times = (min_spearman / rho) ** 2
    if report.interval[0] <= 0:
        z = math.atanh(rho)
        half = _Z_95 * least if report.interval[0] <= -0.999 else z - math.atanh(report.interval[0])
        times = max(times, (half * (1 + _Z_80 / _Z_95) / max(z, half / _Z_95)) ** 2)
    times = max(times, 2.0)
    return times if times <= _MOST_TIMES else None


def labels_needed(report: FitReport, min_spearman: float = 0.0) -> int | None:
    """How many labels, fitted and held out, `times_needed` comes to; None where no number is known to do.

    Args:
        report: Report of the weak fit.
        min_spearman: The guard's lowest Spearman.

    Returns:
        Number of labels, at least twice those of the report.
    """
    times = times_needed(report, min_spearman)
    return None if times is None else math.ceil(times * (report.num_labels + report.num_held_out))


def usable_labels(
    labels: InfluenceLabels,
    groups: npt.NDArray[Any] | None,
    documents: npt.NDArray[Any] | None,
    usable: npt.NDArray[np.bool_],
) -> tuple[InfluenceLabels, npt.NDArray[Any] | None, npt.NDArray[Any] | None]:
    """The labels that can be fitted on, their groups and their documents.

    Args:
        labels: Labels of M candidates.
        groups: (M,) group of each, or None.
        documents: (M,) document of each, or None.
        usable: (M,) bool.

    Returns:
        All three, of the usable ones in their order.

    Raises:
        ValueError: `groups` or `documents` has another length.
    """
    for name, values in (("groups", groups), ("documents", documents)):
        if values is not None and len(values) != len(labels):
            raise ValueError(f"`{name}` must have one entry a label ({len(labels)}), got {len(values)}.")
    groups, documents = (None if values is None else np.asarray(values)[usable] for values in (groups, documents))
    return (labels if usable.all() else labels.take(usable)), groups, documents


def fresh_report(
    per_token: Callable[[], npt.NDArray[np.float64]],
    labels: InfluenceLabels,
    fitted: FitReport,
    *,
    groups: npt.NDArray[Any] | None,
    documents: npt.NDArray[Any] | None = None,
    seed: int,
) -> FitReport:
    """Judge a fitted model on labels that it has not seen: what each influence model's `evaluate` does.

    Args:
        per_token: predicts `influence_per_token` of the labelled candidates; called once the labels are checked.
        labels: fresh labels of N candidates.
        fitted: the report of the fit.
        groups: (N,) group of each label, or None.
        documents: (N,) document of each label, for the bootstrap; None: each is its own.
        seed: Random seed of the bootstrap.

    Returns:
        The report, in the unit of `labels.influence`; `seconds` is the time this took.
    """
    started = time.perf_counter()
    labels.check()
    predicted = per_token() * labels.step_size
    num_labels = fitted.num_labels + fitted.num_held_out
    report = fit_report(
        predicted,
        labels.influence,
        groups=groups,
        num_labels=num_labels,
        seed=seed,
        num_tokens=labels.num_tokens,
        documents=documents,
        probe=labels.kind,
    )
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
    require_measured(rows, labels)
    return rows


def require_measured(rows: Candidates, labels: InfluenceLabels) -> None:
    """Refuse rows that labels were not measured on.

    Args:
        rows: One row a label, in their order.
        labels: measured influence.

    Raises:
        ValueError: their numbers of targets are not the labels'.
    """
    differ = np.flatnonzero(rows.num_targets != labels.num_tokens)
    if len(differ):
        first = differ[0]
        raise ValueError(
            f"`labels` must have been measured on these candidates: candidate_id {labels.candidate_id[first]} has "
            f"{rows.num_targets[first]} targets here and {labels.num_tokens[first]} in the labels ({len(differ)} "
            "candidates differ). Pass the pool that was probed, untouched."
        )
