"""The plan counts rows as the run's clock does: ragged epochs, another batch after a stop, several passes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mates_hf.config import MatesConfig
from mates_hf.data.mixing import PassageSchedule
from mates_hf.errors import MatesError
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.plan import PlannedRound, Rest, RunPlan
from mates_hf.training.clock import RowClock


def plan_of(clock: RowClock, num_rows: int, max_steps: int, **config) -> RunPlan:
    return RunPlan(
        num_rows=num_rows,
        batch_rows=clock.batch_rows * clock.accumulation,
        max_steps=max_steps,
        config=MatesConfig(**config),
        clock=clock,
    )


def test_the_ragged_last_step_of_an_epoch_counts_as_what_it_is():
    # 11 batches, accumulation 2: an epoch is 6 steps and 44 rows. After 11 steps 40 rows of the second are trained on.
    clock = RowClock(batches_per_epoch=11, accumulation=2, batch_rows=4)
    plan = plan_of(
        clock, 44, 13, update_steps=10, switch_lead_steps=1, selection_ratio=1.0, num_probes=10, max_passes=1
    )
    assert (plan.first_from_step, plan.rows_before) == (11, 40)
    with pytest.raises(ValueError, match="of the 44 rows in the pool 4 are unused by then"):
        plan.check()
    long = RowClock(batches_per_epoch=1001, accumulation=16, batch_rows=4)  # 63 steps an epoch, the last of 9 batches
    config = {"update_steps": 63 * 32, "first_round_steps": None, "switch_lead_steps": 1, "num_probes": 10}
    assert plan_of(long, 4004, 10_000, **config).rows_before == 64  # one step of the 33rd
    assert plan_of(long, 4004, 10_000, **config).rounds[0].num_rows == 32 * 4004  # whole epochs, shifted by a step


def test_after_a_stop_only_what_is_ahead_counts_with_the_batch_of_now():
    # 900 of 1,000 steps done at batch 8, rounds of 200: 7,200 rows trained on, and 100 steps of 16 rows ahead.
    config = {"update_steps": 200, "switch_lead_steps": 1, "selection_ratio": 1.0, "num_probes": 10, "max_passes": 1}
    now = RowClock(batches_per_epoch=875, accumulation=1, batch_rows=16, start_step=900, start_position=7200,
                   first_epoch=1, first_epoch_step=875)  # fmt: skip
    plan = plan_of(now, 14_000, 1_000, **config)
    rest = Rest(plan.round_at(5, 1_000), 14_000 - 200 * 8 - 1_600, 0, 900)  # none is left: the last round is running
    plan.check(rest)
    assert rest.first is None
    longer = plan_of(now, 14_000, 1_201, **config)
    ahead = longer.round_at(5, 1_000)
    assert ahead == PlannedRound(5, 1_000, 1_001, 1_201, 3_200)
    longer.check(Rest(ahead, 3_210, 0, 900))
    with pytest.raises(ValueError, match=r"Round 5 .* 3209 are unused by then.*fits is 1200 \(got 1201\)"):
        longer.check(Rest(ahead, 3_209, 0, 900))
    longer.check(Rest(ahead, 0, 1, 900))  # a pass may begin


configs = st.builds(
    lambda length, lead, **values: {"update_steps": length, "switch_lead_steps": min(lead, length), **values},
    st.integers(1, 12),
    st.integers(1, 12),
    random_rounds=st.integers(1, 4),
    selection_ratio=st.sampled_from([0.3, 0.5, 1.0]),
    num_probes=st.integers(10, 20),
    max_passes=st.integers(1, 3),
)
clocks = st.builds(
    lambda **values: RowClock(**values),
    batches_per_epoch=st.integers(1, 25),
    accumulation=st.integers(1, 4),
    batch_rows=st.integers(1, 5),
)


def with_passages(clock: RowClock, num_passages: int, max_steps: int) -> RowClock:
    """The clock of a run that also trains on so many passages, twice each."""
    if not num_passages or clock.batch_rows < 2:
        return clock
    given_ = {"num_passages": num_passages, "passes": 2, "start": 0, "seed": 0}
    return dataclasses.replace(clock, passages=PassageSchedule(num_rows=clock.position(max_steps), **given_))


def ending_at(plan: RunPlan, max_steps: int) -> RunPlan:
    """The plan of a run of another length, whose passages are spread over that."""
    return dataclasses.replace(plan, max_steps=max_steps, clock=plan.clock.ending_at(max_steps))


@settings(max_examples=100, deadline=None)
@given(
    clocks, configs, st.integers(1, 70), st.integers(0, 20), st.sampled_from([0, 0, 3, 30]),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_plan_and_clock_agree_and_what_fits_never_runs_out(clock, config, max_steps, more_rows, passages, random):
    num_rows = max(1, clock.rows_per_epoch - clock.batch_rows + 1 + more_rows)
    plan = plan_of(with_passages(clock, passages, max_steps), num_rows, max_steps, **config)
    plan = ending_at(plan, min(max_steps, plan.max_steps_that_fit))
    plan.check()
    assume(plan.rounds)
    rows = [planned.num_rows for planned in plan.rounds]
    assert sum(rows) == plan.clock.pool_position(plan.max_steps) - plan.clock.pool_position(plan.first_from_step)
    own = np.array(random.sample(range(num_rows), num_rows))
    ledger = Ledger(num_rows, 0)
    ledger.mark_trained(own[: plan.rows_before])
    unused = [(left, planned.num_rows) for planned, left in plan._with_unused(plan.whole)]
    for planned, (left, k) in zip(plan.rounds, unused, strict=True):
        ledger.make_room(planned.num_rows, plan.config)
        assert (ledger.num_unused, planned.num_rows) == (left, k)
        drawn = ledger.draw(
            round_number=planned.number, num_selected=k, selection_ratio=plan.config.selection_ratio,
            candidate_scope="slice", num_probes=plan.config.num_probes,
        )  # fmt: skip
        ledger.mark_trained(drawn.candidates[:k])
        ledger.cursor = drawn.cursor_after
    assert ledger.pass_number <= plan.config.max_passes
    too_long = ending_at(plan, plan.max_steps_that_fit + 1)
    with pytest.raises(ValueError, match="rows enough"):
        too_long.check()


def test_a_new_pass_begins_where_rows_are_too_few_and_only_where_it_may():
    ledger = Ledger(40, 0)
    once, twice = (MatesConfig(num_probes=10, selection_ratio=0.5, max_passes=passes) for passes in (1, 2))
    ledger.mark_trained(np.arange(10))
    ledger.make_room(10, twice)  # 20 candidates, 10 probes: just enough
    assert (ledger.pass_number, ledger.num_unused) == (1, 30)
    ledger.make_room(11, once)
    assert (ledger.pass_number, ledger.num_unused) == (1, 30)
    ledger.cursor = 7
    ledger.make_room(11, twice)
    assert (ledger.pass_number, ledger.num_unused, ledger.cursor) == (2, 40, 7)
    ledger.mark_trained(np.arange(40))
    ledger.make_room(11, twice)
    with pytest.raises(MatesError, match="got 0 unused"):
        ledger.draw(round_number=1, num_selected=11, selection_ratio=0.5, candidate_scope="slice", num_probes=10)


def test_the_shuffle_made_ahead_is_the_shuffle():
    ahead = Ledger(1000, 3)
    ahead.prepare()
    ahead.prepare()
    np.testing.assert_array_equal(ahead.shuffled, Ledger(1000, 3).shuffled)
    assert ahead.shuffled is ahead.shuffled
