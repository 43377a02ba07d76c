"""Quotas against brute force: the best rows that the bounds allow, whatever groups, copies and random shares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mates_hf.records import InfluenceLabels
from mates_hf.selection.quota import Quota, best_within, first_allowed
from mates_hf.selection.select_stage import SelectedRows, select_rows

LABELS = InfluenceLabels(
    candidate_id=np.arange(4), influence=np.array([-1, 1, 2, -2], np.float32),
    influence_per_token=np.array([-1, 1, 2, -2], np.float32), loss=np.ones(4, np.float32),
    num_tokens=np.full(4, 5, np.int32), probe=np.array(["directional"] * 4),
)  # fmt: skip


def allowed(codes: np.ndarray, rows: tuple[int, ...], quota: Quota, num: int) -> bool:
    """Whether a set keeps the bounds, by their definition."""
    for group in np.unique(codes):
        size = int((codes == group).sum())
        fair = size * num / len(codes)
        got = sum(codes[row] == group for row in rows)
        if quota.most is not None and got > np.ceil(quota.most * fair - 1e-9):
            return False
        if got < min(size, np.floor(quota.least * fair + 1e-9)):
            return False
    return True


def instance(seed: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray, int, Quota]:
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 9))
    codes = rng.integers(0, int(rng.integers(1, 4)), num)
    values = rng.permutation(num).astype(np.float64) - num / 2
    most = [None, 1.0, 1.25, 1.5, 2.0][rng.integers(5)]
    least = [0.0, 0.0, 0.3, 0.5, 1.0][rng.integers(5)]
    return rng, codes, values, int(rng.integers(0, num + 1)), Quota(codes, most, least)


def test_a_thousand_choices_are_the_best_that_the_bounds_allow() -> None:
    for seed in range(1_000):
        _, codes, values, num, quota = instance(seed)
        chosen = best_within(values, codes, quota.limits(num, np.ones(len(codes), bool)), (num, num), (seed, seed))
        sets = [rows for rows in itertools.combinations(range(len(codes)), num) if allowed(codes, rows, quota, num)]
        assert sets, seed  # there is always a choice
        assert allowed(codes, tuple(chosen.tolist()), quota, num), seed
        best = max(values[list(rows)].sum() for rows in sets)
        assert values[chosen].sum() == pytest.approx(best), seed


def test_a_thousand_choices_with_random_rows_keep_the_bounds() -> None:
    for seed in range(1_000):
        rng, codes, values, num, quota = instance(seed)
        k = int(rng.integers(0, num + 1))
        limits = quota.limits(num, np.ones(len(codes), bool))
        chosen = best_within(values, codes, limits, (k, num), (seed, seed))
        assert len(np.unique(chosen)) == num
        assert allowed(codes, tuple(chosen.tolist()), quota, num), seed
        by_worth = first_allowed(np.argsort(-values), codes, k, *limits, num)
        assert set(by_worth.tolist()) <= set(chosen.tolist())


def chosen_from(codes: np.ndarray, influence: np.ndarray, num: int, **options: object) -> SelectedRows:
    num_targets = options.pop("num_targets", np.full(len(codes), 5, np.int32))
    return select_rows(
        np.arange(len(codes)) * 3, influence.astype(np.float32), num_targets, LABELS, num,  # type: ignore[arg-type]
        **{"temperature": 0.0, "selection_seed": 0, "round_number": 1, **options},  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_round_keeps_its_quota_with_noise_random_rows_copies_and_untrained_rows() -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice(4, 2_000, p=[0.6, 0.25, 0.1, 0.05])
    influence = rng.normal(size=2_000) + 2.0 * (codes == 3) - 2.0 * (codes == 0)  # the rare group is the best
    num_targets = np.full(2_000, 5, np.int32)
    num_targets[::50] = 0
    hashes = rng.integers(0, 2**63, 2_000).astype(np.uint64)
    hashes[1::4] = hashes[::4]
    quota = Quota(codes, 1.5, 0.5)
    fair = np.bincount(codes) * 400 / 2_000
    plain = chosen_from(codes, influence, 400)
    assert np.bincount(codes[plain.rows // 3])[3] > 1.5 * fair[3]
    for options in (
        {},
        {"temperature": 1.0},
        {"random_share": 0.3},
        {"hashes": hashes, "max_copies": 1},
        {"temperature": 0.5, "random_share": 0.3, "hashes": hashes, "max_copies": 1, "num_targets": num_targets},
    ):
        found = chosen_from(codes, influence, 400, quota=quota, **options)
        rows = found.rows // 3
        counts = np.bincount(codes[rows], minlength=4)
        assert len(np.unique(rows)) == 400
        assert (counts <= np.ceil(1.5 * fair)).all(), options
        assert (counts >= np.floor(0.5 * fair)).all(), options
        if "max_copies" in options:
            assert len(np.unique(hashes[rows])) == 400
        if "num_targets" in options:
            assert (num_targets[rows] > 0).all()
        again = chosen_from(codes, influence, 400, quota=quota, **options)
        assert again.rows.tolist() == found.rows.tolist()


def test_bounds_that_bind_nowhere_change_no_row() -> None:
    rng = np.random.default_rng(1)
    codes, influence = np.zeros(500, np.int64), rng.normal(size=500)
    plain = chosen_from(codes, influence, 100)
    assert chosen_from(codes, influence, 100, quota=Quota(codes, 1.0, 1.0)).rows.tolist() == plain.rows.tolist()
    two = rng.integers(0, 2, 500)
    loose = chosen_from(two, influence, 100, quota=Quota(two, None, 0.0))
    assert loose.rows.tolist() == plain.rows.tolist()


def test_a_group_of_copies_gets_no_second_copy_to_fill_its_floor() -> None:
    codes = np.repeat([0, 1], 50)
    hashes = np.arange(100).astype(np.uint64)
    hashes[50:] = 1_000  # one text
    found = chosen_from(
        codes, np.linspace(1, 0, 100), 20, quota=Quota(codes, 2.0, 1.0), hashes=hashes, max_copies=1
    )  # fmt: skip
    counts = np.bincount(codes[found.rows // 3], minlength=2)
    assert counts.tolist() == [19, 1]


@pytest.mark.parametrize(("most", "least", "match"), [
    (0.9, 0.0, "`max_group_boost` must be None or a number of at least 1, got 0.9"),
    (float("inf"), 0.0, "`max_group_boost`"),
    (None, -0.1, r"`min_group_boost` must be in \[0, 1\], got -0.1"),
    (None, 1.1, "`min_group_boost`"),
])  # fmt: skip
def test_bounds_without_a_choice_are_refused(most: float | None, least: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Quota(np.zeros(3, np.int64), most, least)
