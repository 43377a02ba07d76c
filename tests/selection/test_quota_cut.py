"""The cut with bounds on groups keeps what one machine keeps, and the best that the bounds allow, however divided."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.prediction.score import Predictions
from mates_hf.selection import quota_cut
from mates_hf.selection.budget import Budget, keep_rows, rank_values
from mates_hf.selection.prefix import PieceScores
from mates_hf.selection.quota import Bounds, Quota
from mates_hf.selection.quota_cut import GroupedScores, QuotaCut, find_quota_cut
from tests.selection.test_cut import scores_of
from tests.selection.test_quota import allowed


def divided(scores: PieceScores, codes: np.ndarray, at: list[int]) -> list[Callable[[], GroupedScores]]:
    bounds = [0, *sorted(at), len(codes)]
    spans = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    def read(span: slice) -> GroupedScores:
        return GroupedScores(PieceScores(*(array[span] for array in scores)), codes[span].astype(np.int32))

    return [lambda span=span: read(span) for span in spans]  # type: ignore[misc]


def kept_by(cut: QuotaCut, pieces: list[Callable[[], GroupedScores]]) -> np.ndarray:
    kept = np.flatnonzero(np.concatenate([cut.mask(number, read()) for number, read in enumerate(pieces)]))
    assert cut.num_kept == len(kept)
    return kept


BOUNDS = st.tuples(st.sampled_from([None, 1.0, 1.25, 1.5, 3.0]), st.sampled_from([0.0, 0.3, 0.5, 1.0]))


@settings(max_examples=200, deadline=None)
@given(
    bounds=BOUNDS,
    seed=st.integers(0, 50),
    at=st.lists(st.integers(0, 200), max_size=6),
    num_groups=st.sampled_from([1, 2, 5, 60]),
    budget=st.one_of(st.builds(lambda k: Budget(k=k), st.integers(0, 200)), st.just(Budget(ratio=0.2))),
    longest=st.sampled_from([2, 40]),
)
def test_a_cut_keeps_what_one_machine_keeps(
    bounds: tuple[float | None, float], seed: int, at: list[int], num_groups: int, budget: Budget, longest: int
) -> None:
    scores = scores_of(200, seed, longest=longest)  # with 2, half of the rows have no trained token
    codes = np.random.default_rng(seed + 1).integers(0, num_groups, 200)
    pieces = divided(scores, codes, at)
    kept = kept_by(find_quota_cut(pieces, budget, Bounds("group", *bounds), num_groups), pieces)
    quota = Quota(codes, *bounds)
    wanted = keep_rows(Predictions(scores.influence, scores.num_targets), budget, 1.0, quota)
    untrained = scores.num_targets == 0  # which of those fill a budget up is not the same, and nothing depends on it
    assert len(kept) == len(wanted)
    assert kept[~untrained[kept]].tolist() == wanted[~untrained[wanted]].tolist()


def test_a_thousand_cuts_are_the_best_that_the_bounds_allow() -> None:
    for seed in range(1_000):
        rng = np.random.default_rng(seed)
        num = int(rng.integers(1, 9))
        codes = rng.integers(0, int(rng.integers(1, 4)), num)
        influence = (rng.permutation(num) - num / 2 + (0 if seed % 2 else rng.random())).astype(np.float32)
        scores = PieceScores(influence, np.full(num, 3, np.int32), rng.integers(0, 2**63, num).astype(np.uint64))
        quota = Quota(codes, [None, 1.0, 1.25, 1.5, 2.0][rng.integers(5)], [0.0, 0.3, 0.5, 1.0][rng.integers(4)])
        k = int(rng.integers(0, num + 1))
        pieces = divided(scores, codes, [int(rng.integers(0, num + 1))])
        cut = find_quota_cut(pieces, Budget(k=k), Bounds("group", quota.most, quota.least), int(codes.max()) + 1)
        kept = kept_by(cut, pieces)
        sets = [rows for rows in itertools.combinations(range(num), k) if allowed(codes, rows, quota, k)]
        assert allowed(codes, tuple(kept.tolist()), quota, k), seed
        worth = rank_values(Predictions(influence, scores.num_targets), "row_worth").astype(np.float64)
        assert worth[kept].sum() == pytest.approx(max(worth[list(rows)].sum() for rows in sets), abs=1e-4), seed


@settings(max_examples=80, deadline=None)
@given(
    bounds=BOUNDS,
    seed=st.integers(0, 20),
    at=st.lists(st.integers(0, 300), max_size=5),
    copies=st.sampled_from([1, 3, 100, 300]),
    options=st.sampled_from([{}, {"random_share": 0.3}, {"temperature": 1.0}, {"random_share": 0.5, "seed": 3}]),
)
def test_every_division_keeps_the_same_and_the_bounds(
    bounds: tuple[float | None, float], seed: int, at: list[int], copies: int, options: dict[str, float]
) -> None:
    scores = scores_of(300, seed, copies=copies)
    scores.num_targets[scores.num_targets == 0] = 1
    codes = np.random.default_rng(seed).integers(0, 4, 300)  # copies of a text may be of several groups
    budget, asked = Budget(k=61, **options), Bounds("group", *bounds)  # type: ignore[arg-type]
    whole, parts = divided(scores, codes, []), divided(scores, codes, at)
    one, many = find_quota_cut(whole, budget, asked, 4, 1.0), find_quota_cut(parts, budget, asked, 4, 1.0)
    kept = kept_by(one, whole)
    assert kept.tolist() == kept_by(many, parts).tolist()
    assert (one.num_kept, one.num_tokens_kept) == (61, many.num_tokens_kept)
    assert allowed(codes, tuple(kept.tolist()), Quota(codes, *bounds), 61)


def test_another_order_of_rows_keeps_the_same_texts() -> None:
    scores = scores_of(500)
    scores.influence[:] = np.round(scores.influence)  # many rows of equal influence and length
    scores.num_targets[:] = 5
    codes = np.random.default_rng(0).integers(0, 3, 500)
    order = np.random.default_rng(1).permutation(500)
    for options in ({}, {"random_share": 0.4}, {"temperature": 0.5}):
        found = []
        for rows in (np.arange(500), order):
            pieces = divided(PieceScores(*(array[rows] for array in scores)), codes[rows], [100, 400])
            cut = find_quota_cut(pieces, Budget(k=123, **options), Bounds("group", 1.1, 0.9), 3, 1.0)  # type: ignore[arg-type]
            found.append(set(scores.content[rows][kept_by(cut, pieces)].tolist()))
        assert found[0] == found[1]


def test_random_rows_are_of_all_that_the_bounds_leave() -> None:
    scores = scores_of(4_000)
    scores.num_targets[:] = 5
    codes = (scores.influence > np.median(scores.influence)).astype(np.int64)  # group 1 is the better half
    pieces = divided(scores, codes, [1_000])
    kept = kept_by(find_quota_cut(pieces, Budget(ratio=0.25, random_share=0.4), Bounds("group", 1.0, 1.0), 2), pieces)
    counts = np.bincount(codes[kept])
    assert counts.tolist() == [500, 500]
    best = np.argsort(-scores.influence)[:500]
    assert set(best.tolist()) <= set(kept.tolist())  # 600 by worth, of which group 1 may have 500
    lower = kept[codes[kept] == 0]
    ranks = np.argsort(np.argsort(-scores.influence[codes == 0]))[np.searchsorted(np.flatnonzero(codes == 0), lower)]
    assert (ranks < 100).sum() >= 100
    assert 0.4 < np.mean(ranks[ranks >= 100]) / 2_000 < 0.65  # the other 400 from anywhere


@pytest.mark.parametrize("most", [2**22, 2**10, 2**6])
def test_how_many_bits_are_looked_at_makes_no_difference(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota_cut, "_MOST_COUNTS", most)
    scores = scores_of(400, 3)
    codes = np.random.default_rng(0).integers(0, 50, 400)
    pieces = divided(scores, codes, [7, 80])
    kept = kept_by(find_quota_cut(pieces, Budget(k=90, random_share=0.2), Bounds("group", 1.5, 0.5), 50), pieces)
    monkeypatch.undo()
    same = kept_by(find_quota_cut(pieces, Budget(k=90, random_share=0.2), Bounds("group", 1.5, 0.5), 50), pieces)
    assert kept.tolist() == same.tolist()


@pytest.mark.parametrize("budget", [Budget(num_tokens=99), Budget(threshold=0.0)])
def test_budgets_that_count_no_rows_are_refused(budget: Budget) -> None:
    pieces = divided(scores_of(5), np.zeros(5, np.int64), [])
    with pytest.raises(ValueError, match="`num_tokens` and `threshold` fix none. Use `ratio` or `k`"):
        find_quota_cut(pieces, budget, Bounds("group", 2.0), 1)
