from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mates_hf.evaluation.agreement import rank_correlation, slope_of
from mates_hf.influence.fit import fit_report, labels_needed, split_held_out
from mates_hf.records import FitReport

ROUNDING = 1e-9


def correlated(num: int, rho: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=num)
    return x, rho * x + math.sqrt(1 - rho**2) * rng.normal(size=num)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_scipys_with_average_ranks(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, float).T
    if x.std() == 0 or y.std() == 0:
        assert rank_correlation(x, y) == 0
    else:
        assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=ROUNDING)


def test_bootstrap_resamples_whole_candidates() -> None:
    x, y = correlated(40, 0.6)
    report = fit_report(x, y, num_labels=1, seed=3)
    rng = np.random.default_rng(11)
    resampled = []
    for _ in range(2000):
        drawn = rng.integers(40, size=40)
        resampled.append(stats.spearmanr(x[drawn], y[drawn]).statistic)
    # Two independent bootstraps of 2,000 resamples differ by the Monte Carlo error of a percentile.
    np.testing.assert_allclose(report.interval, np.percentile(resampled, [2.5, 97.5]), atol=0.04)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = 6 / math.pi * math.asin(0.4 / 2)
    hits = sum(
        low <= truth <= high
        for low, high in (
            fit_report(*correlated(100, 0.4, seed), num_labels=1, seed=seed).interval for seed in range(60)
        )
    )
    assert hits >= 51  # 57 expected; fewer than 51 has a probability of about 0.3 %


def test_sign_and_shuffled_labels() -> None:
    x, y = correlated(300, 0.7)
    good, bad = (fit_report(p, y, num_labels=1) for p in (x, -x))
    assert good.passes(0.1)
    assert good.slope > 0.5
    assert not bad.passes(-1.0)
    assert bad.spearman == pytest.approx(-good.spearman, abs=ROUNDING)
    shuffled = fit_report(x, np.random.default_rng(1).permutation(y), num_labels=1)
    assert shuffled.interval[0] < 0 < shuffled.interval[1]
    assert not shuffled.passes(0.0)


def test_constant_prediction_orders_nothing() -> None:
    report = fit_report(np.ones(50), np.arange(50.0), num_labels=1)
    assert report.spearman == 0
    assert not report.passes(0.0)


def test_too_few_held_out_candidates_never_pass() -> None:
    report = fit_report(np.arange(4.0), np.arange(4.0), num_labels=16)
    assert report.spearman == pytest.approx(1)
    assert not report.passes(0.0)


def test_within_group_is_the_weighted_mean_of_large_groups() -> None:
    rng = np.random.default_rng(0)
    groups = np.array(["a"] * 20 + ["b"] * 10 + ["c"] * 5)
    x = rng.normal(size=35)
    y = np.concatenate([x[:20], -x[20:30], rng.normal(size=5)]) + 100 * (groups == "b")
    x = x + 100 * (groups == "b")
    report = fit_report(x, y, groups=groups, num_labels=1)
    assert report.spearman_within_group == pytest.approx((20 * 1 + 10 * -1) / 30)
    assert fit_report(x[30:], y[30:], groups=groups[30:], num_labels=1).spearman_within_group is None
    assert fit_report(x, y, num_labels=1).spearman_within_group is None


def test_overlap_calibration_and_slope_are_in_the_labels_unit() -> None:
    predicted = np.arange(100.0)
    actual = 3 * predicted + 7
    report = fit_report(predicted, actual, num_labels=1)
    assert report.top_fifth_overlap == 1
    assert report.slope == pytest.approx(3)
    assert report.label_std == pytest.approx(actual.std())
    assert report.calibration[0] == pytest.approx((4.5, 3 * 4.5 + 7))
    assert report.calibration[-1] == pytest.approx((94.5, 3 * 94.5 + 7))
    assert fit_report(predicted, -actual, num_labels=1).top_fifth_overlap == 0
    assert slope_of(actual, np.zeros(100)) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_is_an_error_on_either_side(value: float) -> None:
    broken = np.arange(10.0)
    broken[3] = value
    for predicted, actual in ((broken, np.arange(10.0)), (np.arange(10.0), broken)):
        with pytest.raises(ValueError, match="must be finite, got 1"):
            fit_report(predicted, actual, num_labels=1)


def test_report_survives_json() -> None:
    report = fit_report(*correlated(50, 0.5), num_labels=200, groups=np.zeros(50), seconds=1.5)
    assert FitReport.from_dict(report.to_dict()) == report


def test_split_is_seeded_and_keeps_two_on_each_side() -> None:
    split = split_held_out(100, 0.2, 0)
    assert split.sum() == 20
    assert np.array_equal(split, split_held_out(100, 0.2, 0))
    assert not np.array_equal(split, split_held_out(100, 0.2, 1))
    assert split_held_out(10, 0.01, 0).sum() == 2
    assert split_held_out(10, 0.99, 0).sum() == 8
    with pytest.raises(ValueError, match=r"`held_out_fraction` must be in \(0, 1\), got 1"):
        split_held_out(10, 1.0, 0)
    with pytest.raises(ValueError, match="at least 4 labelled candidates, got 3"):
        split_held_out(3, 0.5, 0)


def weak(spearman: float, num_labels: int = 200, num_held_out: int = 50) -> FitReport:
    return FitReport(
        num_labels=num_labels,
        num_held_out=num_held_out,
        spearman=spearman,
        interval=(spearman - 0.28, spearman + 0.28),
    )


def test_labels_needed_gives_an_interval_that_excludes_zero() -> None:
    needed = labels_needed(weak(0.2))
    share = 50 / 250
    half_width = 1.96 * math.sqrt(1.06 / (needed * share - 3))
    assert math.atanh(0.2) >= half_width * 0.999
    assert math.atanh(0.2) < 1.96 * math.sqrt(1.06 / ((needed - 10) * share - 3))


def test_labels_needed_falls_with_the_correlation_and_exceeds_what_failed() -> None:
    needed = [labels_needed(weak(rho)) for rho in (0.25, 0.2, 0.15, 0.0, -0.3)]
    assert needed == sorted(needed)
    assert needed[-1] == needed[-2]  # no correlation to extrapolate from
    assert needed[-1] < 6 * 250
    assert labels_needed(dataclasses.replace(weak(0.6), interval=(-0.01, 0.8))) == 251
