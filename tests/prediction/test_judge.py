from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mates_hf.data.documents import document_codes
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.errors import UnrankableError
from mates_hf.evaluation.agreement import number_by_appearance, rank_correlation, slope_of
from mates_hf.prediction.judge import fit_report, labels_needed, split_held_out, times_needed
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import FitReport, InfluenceLabels
from mates_hf.selection.choose import row_worth

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


def test_labels_needed_gives_an_interval_that_excludes_zero_four_times_in_five() -> None:
    needed = labels_needed(weak(0.2))
    share = 50 / 250
    hits = 0
    for seed in range(100):
        low = fit_report(*correlated(round(needed * share), 0.21, seed), num_labels=1, seed=seed).interval[0]
        hits += low > 0
    assert hits >= 70  # 80 expected; fewer than 70 has a probability of about 1 %


def test_labels_needed_falls_with_the_correlation_and_is_never_about_what_failed() -> None:
    needed = [labels_needed(weak(rho)) for rho in (0.25, 0.2, 0.15, 0.05)]
    assert needed == sorted(needed)
    assert labels_needed(dataclasses.replace(weak(0.6), interval=(-0.01, 0.8))) >= 1.5 * 250
    # As a user met it: 0.762 with an interval from -0.111 to 1 on 8 held-out labels of 40.
    report = FitReport(num_labels=32, num_held_out=8, spearman=0.762, interval=(-0.111, 1.0))
    assert 60 <= labels_needed(report) <= 160
    # Too few for an interval at all: the formula's width counts, which is the wider the fewer there are.
    few = [FitReport(num_labels=36, num_held_out=num, spearman=0.5, interval=(-1.0, 1.0)) for num in (4, 30)]
    assert times_needed(few[0], 0.1) > times_needed(few[1], 0.1) >= 2


def test_where_no_number_of_labels_is_known_to_do_none_is_named() -> None:
    for rho in (0.0, -0.3):
        assert labels_needed(weak(rho)) is None
    sure = dataclasses.replace(weak(0.3), interval=(0.2, 0.4))
    assert labels_needed(sure, min_spearman=0.6) == 4 * 250  # twice the correlation: at most with the square root
    assert labels_needed(dataclasses.replace(sure, spearman=0.02, interval=(0.01, 0.03)), min_spearman=0.9) is None


def test_copies_of_a_document_are_never_on_both_sides() -> None:
    documents = np.random.default_rng(0).integers(0, 30, 200)
    for seed in range(20):
        held_out = split_held_out(200, 0.2, seed, documents)
        assert not set(documents[held_out]) & set(documents[~held_out])
        assert 30 <= held_out.sum() <= 60
    alone = split_held_out(50, 0.2, 3, np.random.default_rng(1).permutation(50) * 7)
    assert np.array_equal(alone, split_held_out(50, 0.2, 3))  # documents of one candidate change nothing


def test_one_large_document_is_fitted_and_one_alone_is_refused() -> None:
    documents = np.array([0] * 40 + [1, 2, 3])
    for seed in range(10):
        held_out = split_held_out(43, 0.5, seed, documents)
        assert 0 < held_out.sum() < 43
        assert not set(documents[held_out]) & set(documents[~held_out])
    with pytest.raises(UnrankableError, match="of at least 2 documents.*got 40 copies"):
        split_held_out(40, 0.2, 0, np.zeros(40))


def test_the_bootstrap_draws_whole_documents() -> None:
    x, y = correlated(20, 0.5, 4)
    once = fit_report(x, y, num_labels=1)
    copied = [np.repeat(values, 10) for values in (x, y)]
    by_document = fit_report(*copied, num_labels=1, documents=np.repeat(np.arange(20), 10))
    assert by_document.spearman == pytest.approx(once.spearman)
    np.testing.assert_allclose(by_document.interval, once.interval, atol=ROUNDING)
    assert fit_report(*copied, num_labels=1).interval[0] > once.interval[0] + 0.1  # as if they were independent
    assert fit_report(*copied, num_labels=1, documents=np.repeat(np.arange(4), 50)).interval == (-1, 1)


def test_where_lengths_differ_the_ranking_that_selects_is_judged() -> None:
    rng = np.random.default_rng(0)
    num_tokens = np.where(rng.random(400) < 0.5, 2, 200)
    truth = rng.normal(size=400)
    noise = rng.normal(size=400)
    predicted = np.where(num_tokens == 2, noise, truth)  # short rows are noise, which hardly matters to a batch
    report = fit_report(predicted, truth, num_labels=1, num_tokens=num_tokens)
    assert report.ranking == "worth"
    expected = stats.spearmanr(row_worth(predicted, num_tokens), row_worth(truth, num_tokens)).statistic
    assert report.spearman == pytest.approx(expected, abs=ROUNDING)
    assert report.spearman > fit_report(predicted, truth, num_labels=1).spearman + 0.1
    assert report.interval[0] < report.spearman < report.interval[1]
    assert FitReport.from_dict(report.to_dict()) == report
    same = fit_report(predicted, truth, num_labels=1, num_tokens=np.full(400, 7))
    assert same == fit_report(predicted, truth, num_labels=1)
    assert same.ranking == "influence"


def test_a_fit_on_a_handful_of_rows_warns(caplog: pytest.LogCaptureFixture) -> None:
    rows = TokenRows.from_lists(np.random.default_rng(0).integers(0, 9, (40, 6)).tolist())

    def fit(num: int, fraction: float = 0.2) -> None:
        influence = np.linspace(-1, 1, num, dtype=np.float32)
        labels = InfluenceLabels(
            candidate_id=np.arange(num),
            influence=influence,
            influence_per_token=influence,
            loss=influence,
            num_tokens=np.full(num, 5, np.int32),
            probe=np.array(["p"] * num),
        )
        caplog.clear()
        NgramInfluenceModel(num_buckets=16).fit(rows, labels, held_out_fraction=fraction)

    fit(40)
    assert not caplog.records
    for num, fraction in ((5, 0.2), (19, 0.5), (39, 0.1)):
        fit(num, fraction)
        assert "fitted on" in caplog.text
        assert "too few to rank by, or to judge it. Probe at least 40" in caplog.text


def test_documents_are_told_by_tokens_or_by_a_column() -> None:
    texts = [[1, 2, 3], [4, 5], [1, 2, 3], [1, 2], [4, 5]]
    rows = TokenRows.from_lists(texts)

    def same(codes: np.ndarray) -> list[int]:
        return number_by_appearance(codes).tolist()

    assert same(document_codes(rows)) == [0, 1, 0, 2, 1]
    assert same(document_codes(TokenRows(values=rows.values.astype(np.uint16), offsets=rows.offsets))) == [
        0,
        1,
        0,
        2,
        1,
    ]
    columns = {"url": ["a", "b", None, "a", None], "number": [3, 3, 4, 4, 4], "tags": [["x"]] * 5}
    pool = CandidatePool(Dataset.from_dict({"input_ids": texts, **columns}))
    ids = np.arange(5)
    assert same(document_codes(rows, pool, ids, "url")) == [0, 1, 2, 0, 3]
    assert same(document_codes(rows, pool, ids, "number")) == [0, 0, 1, 1, 1]
    few = np.array([3, 1])
    assert same(document_codes(rows.take(few), pool, few, "url")) == [0, 1]
    listed = CandidatePool([{"input_ids": text, "url": url} for text, url in zip(texts, "ababa", strict=True)])
    assert same(document_codes(rows, listed, ids, "url")) == [0, 1, 0, 1, 0]
    with pytest.raises(
        ValueError, match=r"must be a column of the pool, got 'uri'; it has .*remove_unused_columns=False"
    ):
        document_codes(rows, pool, ids, "uri")
    with pytest.raises(ValueError, match="must hold text or numbers, got list in `tags` of pool row 0"):
        document_codes(rows, pool, ids, "tags")
