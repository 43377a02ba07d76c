"""Rows that must not be used: what the own order has in their place, and that the ledger draws none of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.errors import MatesError
from mates_hf.selection.ledger import Ledger
from mates_hf.training.blocked import Blocked, own_order_without, read_removed


def blocked(num: int, removed: list[int], allowed: np.ndarray | None = None) -> Blocked:
    return Blocked(num, allowed, np.array(removed, np.int64))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.floats(0, 0.9))
def test_a_later_removal_moves_no_row_that_an_earlier_one_put_somewhere(seed, num, share):
    rng = np.random.default_rng(seed)
    rows = rng.permutation(num).astype(np.int32)
    removed = rng.permutation(num)[: int(share * num)].tolist()
    few = removed[: len(removed) // 2]
    before, after = (own_order_without(rows, blocked(num, each)) for each in (few, removed))
    assert len(after) == num
    assert after.dtype == rows.dtype
    assert not set(after.tolist()) & set(removed)
    stays = ~np.isin(before, removed)
    assert (after[stays] == before[stays]).all()
    assert (before[~np.isin(rows, few)] == rows[~np.isin(rows, few)]).all()
    for found, gone in ((before, few), (after, removed)):  # none is twice in as many rows as are left
        left = found[: num - len(gone)]
        assert len(set(left.tolist())) == len(left)


def test_what_is_not_allowed_is_skipped_and_a_short_pass_begins_again():
    rows, allowed = np.array([4, 0, 3, 1, 2]), np.array([True, False, True, True, False])
    found = own_order_without(rows, blocked(5, [], allowed))
    assert found.tolist() == [0, 3, 2, 0, 3]
    found = own_order_without(rows, blocked(5, [3], allowed))
    assert found.tolist() == [0, 2, 2, 0, 0]


def test_a_row_that_took_a_place_and_the_last_rows_are_removed_too():
    assert own_order_without(np.arange(6), blocked(6, [1])).tolist() == [0, 5, 2, 3, 4, 5]
    assert own_order_without(np.arange(6), blocked(6, [1, 5])).tolist() == [0, 4, 2, 3, 4, 4]
    assert own_order_without(np.arange(6), blocked(6, [5])).tolist() == [0, 1, 2, 3, 4, 0]


def test_nothing_that_is_left_is_an_error():
    with pytest.raises(MatesError, match="rows that were not removed"):
        own_order_without(np.arange(3), blocked(3, [0, 1, 2]))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(["slice", "pool"]), st.booleans())
def test_a_ledger_draws_none_of_them(seed, scope, later_pass):
    rng = np.random.default_rng(seed)
    ledger, num = Ledger(200, seed % 7), 0
    ledger.blocked = rng.random(200) < 0.4
    free = set(np.flatnonzero(~ledger.blocked).tolist())
    for number in range(1, 4):
        if later_pass and number == 2:
            ledger.start_new_pass()
            num = 0
        assert ledger.num_unused == len(free) - num
        draw = ledger.draw(
            round_number=number, num_selected=5, selection_ratio=0.5, candidate_scope=scope, num_probes=8
        )
        assert set(draw.candidates.tolist()) | set(draw.probes.tolist()) <= free
        if scope == "pool":
            assert len(draw.candidates) + 8 == len(free) - num
        ledger.mark_trained(draw.candidates[:5])
        ledger.mark_probed(draw.probes)
        ledger.cursor = draw.cursor_after
        num += 5
        own = ledger.own_order(rng.permutation(200), 7, exclude=draw.probes)
        more = ledger.rows_after(draw.candidates[:5], 7, exclude=draw.probes)
        assert set(own.tolist()) | set(more.tolist()) <= free


def test_a_damaged_list_of_removed_rows_is_an_error(tmp_path):
    for wrong in ([1, 1], [-1], [10]):
        np.save(tmp_path / "removed.npy", np.array(wrong))
        with pytest.raises(MatesError, match="must hold rows of the pool, each once"):
            read_removed(tmp_path, 10)
