"""Where passages stand among the rows of a run: against a list of positions, and the promises of the schedule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.data.mixing import PassageSchedule

schedules = st.builds(
    PassageSchedule,
    num_passages=st.integers(1, 30),
    passes=st.integers(1, 6),
    start=st.integers(0, 50),
    num_rows=st.integers(0, 300),
    seed=st.integers(0, 2**40),
)


def whole(schedule: PassageSchedule) -> tuple[list[int], list[int]]:
    where, which = schedule.standing(0, schedule.start + schedule.num_rows + 10)
    return where.tolist(), which.tolist()


@settings(max_examples=200, deadline=None)
@given(schedules)
def test_each_passage_stands_as_often_as_asked_and_never_more_often(schedule):
    where, which = whole(schedule)
    asked = schedule.num_passages * schedule.passes
    assert len(where) == schedule.num_slots == min(asked, schedule.num_rows // 2)
    counts = np.bincount(which, minlength=schedule.num_passages)
    assert counts.max() <= schedule.passes
    assert counts.max() - counts.min() <= 1  # a pass begins when the one before it is over
    if schedule.num_slots == asked:
        assert (counts == schedule.passes).all()
    for number in range(0, len(which), schedule.num_passages):
        one = which[number : number + schedule.num_passages]
        assert len(set(one)) == len(one)


@settings(max_examples=200, deadline=None)
@given(schedules, st.integers(1, 60))
def test_they_are_spread_evenly_and_at_most_half_of_any_stretch(schedule, length):
    where, _ = whole(schedule)
    end = schedule.start + schedule.num_rows
    assert all(schedule.start <= position < end for position in where)
    taken = np.zeros(end + length, np.int64)
    taken[where] = 1
    sums = np.convolve(taken, np.ones(length, np.int64), "valid")
    assert sums.max() <= -(-length // 2)
    if length <= schedule.num_rows:
        inside = sums[schedule.start : end - length + 1]  # stretches that lie in the run whole
        assert inside.max() - inside.min() <= 1
    assert all(b - a >= 2 for a, b in zip(where, where[1:], strict=False))  # never next to each other


@settings(max_examples=200, deadline=None)
@given(schedules)
def test_counts_are_those_of_a_list_of_positions(schedule):
    where, which = whole(schedule)
    end = schedule.start + schedule.num_rows + 10
    pool = [position for position in range(end) if position not in set(where)]
    for position in range(end):
        assert schedule.before(position) == sum(each < position for each in where)
        assert schedule.pool_rows(position) == position - schedule.before(position)
        assert schedule.next_pool_row(position) == position + (position in where)
    assert [schedule.position_of(row) for row in range(len(pool))] == pool
    middle = end // 2
    parts = [schedule.standing(0, middle), schedule.standing(middle, end)]
    assert np.concatenate([part[0] for part in parts]).tolist() == where
    assert np.concatenate([part[1] for part in parts]).tolist() == which


@settings(max_examples=200, deadline=None)
@given(schedules, st.data())
def test_merged_rows_keep_their_order_and_end_where_they_are_used_up(schedule, data):
    end = schedule.start + schedule.num_rows + 5
    start = data.draw(st.integers(0, end))
    stop = data.draw(st.integers(start, end))
    where, which = whole(schedule)
    at = dict(zip(where, which, strict=True))
    num = data.draw(st.integers(0, stop - start))
    rows, expected = np.arange(500, 500 + num), []
    left = rows.tolist()
    for position in range(start, stop):
        if position not in at and not left:
            break
        expected.append(1000 + at[position] if position in at else left.pop(0))
    assert schedule.merged(rows, start, stop, 1000).tolist() == expected


def test_a_long_run_takes_no_longer_and_overflows_nothing():
    schedule = PassageSchedule(num_passages=10**6, passes=4, start=3, num_rows=4 * 10**12, seed=1)
    position = schedule.position_of(3 * 10**12)
    assert schedule.pool_rows(position) == 3 * 10**12
    where, which = schedule.standing(position, position + 8_000_000)
    assert np.diff(where).tolist() == [10**6] * (len(where) - 1)
    assert which.max() < 10**6


def test_each_pass_has_an_order_of_its_own_and_each_seed_others():
    schedule = PassageSchedule(num_passages=50, passes=3, start=0, num_rows=1_000, seed=0)
    orders = np.reshape(whole(schedule)[1], (3, 50)).tolist()
    assert len({tuple(order) for order in orders}) == 3
    assert whole(dataclasses.replace(schedule, seed=1))[1][:50] not in orders


@pytest.mark.parametrize(("name", "value"), [("num_passages", 0), ("passes", True), ("num_rows", 1.5), ("seed", None)])
def test_what_is_no_schedule_is_refused(name, value):
    given_ = {"num_passages": 1, "passes": 1, "start": 0, "num_rows": 4, "seed": 0, name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must be a whole number of at least \d, got"):
        PassageSchedule(**given_)
