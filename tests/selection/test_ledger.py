"""The ledger and the run plan against brute force: consume once, slices, wrap-around, tiling, what fits."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.config import MatesConfig
from mates_hf.errors import MatesError
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.plan import RunPlan, num_candidates

RATIOS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
scopes = st.sampled_from(["slice", "pool"])


def reference_slice(order: list[int], cursor: int, num: int, used: set[int]) -> tuple[list[int], int]:
    """The slice, one row at a time."""
    taken: list[int] = []
    while len(taken) < num:
        if order[cursor] not in used:
            taken.append(order[cursor])
        cursor = (cursor + 1) % len(order)
    return taken, cursor


def draw(ledger: Ledger, number: int, k: int, ratio: float, scope: str = "slice", num_probes: int = 3):
    return ledger.draw(
        round_number=number, num_selected=k, selection_ratio=ratio, candidate_scope=scope, num_probes=num_probes
    )


rounds = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from(RATIOS), st.integers(1, 15), st.booleans()), min_size=1, max_size=12
)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 200), st.integers(0, 2**33), scopes, rounds, st.integers(0, 40), st.randoms(use_true_random=False)
)
def test_no_row_is_trained_on_twice_and_probes_are_apart_over_any_rounds(
    num_rows, seed, scope, rounds, num_own, random
):
    ledger = Ledger(num_rows, seed)
    order = ledger.shuffled.tolist()
    assert sorted(order) == list(range(num_rows))
    own = np.array(random.sample(range(num_rows), num_rows))
    ledger.mark_trained(own[:num_own])
    used = set(own[:num_own].tolist())
    probed: set[int] = set()
    cursor = 0
    for number, (k, ratio, num_probes, select) in enumerate(rounds, 1):
        num_slice = math.ceil(Fraction(k) / Fraction(str(ratio)))
        if num_slice + num_probes > num_rows - len(used):
            with pytest.raises(MatesError, match=rf"{num_slice} unused rows.*got {num_rows - len(used)} unused"):
                draw(ledger, number, k, ratio, scope, num_probes)
            return
        drawn = draw(ledger, number, k, ratio, scope, num_probes)
        candidates, probes = drawn.candidates.tolist(), drawn.probes.tolist()
        assert drawn.candidates.dtype == drawn.probes.dtype == np.int64
        assert ledger.cursor == cursor  # kept by the resume; drawing changes nothing
        assert set(np.flatnonzero(ledger.consumed).tolist()) == used
        assert len(set(probes)) == num_probes
        assert not set(probes) & (set(candidates) | used)
        fresh = set(range(num_rows)) - used - probed - (set(candidates) if scope == "slice" else set())
        assert len(set(probes) & probed) == max(num_probes - len(fresh), 0)  # earlier ones where others are too few
        if scope == "slice":
            expected, cursor_after = reference_slice(order, cursor, num_slice, used)
        else:
            cursor_after = cursor
            expected = [row for row in order if row not in used and row not in set(probes)]
        assert candidates == expected
        assert drawn.cursor_after == cursor_after
        if select:
            chosen = np.array(random.sample(candidates, k))
            ledger.cursor = cursor = cursor_after
        else:
            chosen = ledger.own_order(own, k, drawn.probes)
            assert chosen.tolist() == [r for r in own.tolist() if r not in used and r not in set(probes)][:k]
        assert not set(chosen.tolist()) & (used | set(probes))
        ledger.mark_trained(chosen)
        used |= set(chosen.tolist())
        assert ledger.num_unused == num_rows - len(used)
        ledger.mark_probed(drawn.probes)
        probed |= set(probes)
        bits = ledger.to_bits(), ledger.probed_to_bits()
        ledger = Ledger.from_bits(bits[0], num_rows, seed, ledger.cursor, bits[1])  # a resume after every round


def test_rows_passed_over_come_back_only_after_the_pool_was_gone_through():
    ledger = Ledger(100, 5)
    order = ledger.shuffled.tolist()
    passed: list[int] = []
    for number in range(1, 5):  # four slices of 25, of which the first 5 are trained on
        drawn = draw(ledger, number, 5, 0.2)
        assert drawn.candidates.tolist() == order[25 * (number - 1) : 25 * number]
        ledger.mark_trained(drawn.candidates[:5])
        passed += drawn.candidates[5:].tolist()
        ledger.cursor = drawn.cursor_after
    assert ledger.cursor == 0
    assert draw(ledger, 5, 5, 0.2).candidates.tolist() == passed[:25]


def test_a_slice_that_reaches_the_end_goes_on_at_the_start():
    ledger = Ledger(50, 5)
    order = ledger.shuffled.tolist()
    ledger.mark_trained(np.array([order[1], order[48]]))
    ledger.cursor = 45
    drawn = draw(ledger, 1, 3, 0.3)
    assert drawn.candidates.tolist() == [order[i] for i in (45, 46, 47, 49, 0, 2, 3, 4, 5, 6)]
    assert drawn.cursor_after == 7


def test_scanning_in_blocks_changes_nothing(monkeypatch):
    expected = Ledger(500, 3)
    expected.mark_trained(np.arange(0, 500, 3))
    expected.cursor = 400
    slice_ = draw(expected, 2, 50, 0.25)
    own = expected.own_order(np.arange(500), 60, slice_.probes)
    monkeypatch.setattr("mates_hf.selection.turns.BLOCK", 7)
    again = draw(expected, 2, 50, 0.25)
    np.testing.assert_array_equal(again.candidates, slice_.candidates)
    assert again.cursor_after == slice_.cursor_after
    np.testing.assert_array_equal(expected.own_order(np.arange(500), 60, slice_.probes), own)


@pytest.mark.parametrize("scope", ["slice", "pool"])
def test_probes_are_uniform_over_the_rows_outside_and_change_with_round_and_seed(scope):
    num_rows, num_probes, num_rounds = 40, 10, 2_000
    ledger = Ledger(num_rows, 1)
    ledger.mark_trained(np.arange(8))
    drawn = [draw(ledger, number, 2, 0.25, scope, num_probes) for number in range(num_rounds)]
    outside = np.ones(num_rows, bool)
    outside[:8] = False
    if scope == "slice":
        outside[drawn[0].candidates] = False
    share = np.bincount(np.concatenate([d.probes for d in drawn]), minlength=num_rows) / num_rounds
    # Four standard errors of a share over 2,000 rounds.
    np.testing.assert_allclose(share, outside * num_probes / outside.sum(), atol=4 * 0.5 / math.sqrt(num_rounds))
    np.testing.assert_array_equal(drawn[3].probes, draw(ledger, 3, 2, 0.25, scope, num_probes).probes)
    other = Ledger(num_rows, 2)
    other.mark_trained(np.arange(8))
    assert set(draw(other, 3, 2, 0.25, scope, num_probes).probes.tolist()) != set(drawn[3].probes.tolist())


def test_probes_come_from_behind_the_slice_then_from_what_was_passed_over_then_from_earlier_ones():
    ledger = Ledger(60, 3)
    order = ledger.shuffled.tolist()
    ledger.cursor = 20
    ahead, passed = set(order[30:]), set(order[:20])
    few = draw(ledger, 1, 5, 0.5, num_probes=30)
    assert few.candidates.tolist() == order[20:30]
    assert set(few.probes.tolist()) == ahead
    assert set(draw(ledger, 1, 5, 0.5, num_probes=12).probes.tolist()) < ahead
    more = set(draw(ledger, 1, 5, 0.5, num_probes=40).probes.tolist())
    assert ahead < more
    assert len(more & passed) == 10
    ledger.mark_probed(np.array(order[30:55]))
    assert set(draw(ledger, 1, 5, 0.5, num_probes=25).probes.tolist()) == set(order[55:]) | passed
    again = set(draw(ledger, 1, 5, 0.5, num_probes=26).probes.tolist())
    assert len(again & set(order[30:55])) == 1
    pool = draw(ledger, 1, 5, 0.5, "pool", num_probes=35)
    assert set(pool.probes.tolist()) == set(order[:30]) | set(order[55:])
    assert set(order[30:55]) <= set(pool.candidates.tolist())  # probed earlier, and free to be chosen


def test_another_seed_shuffles_another_way_and_the_same_seed_the_same():
    np.testing.assert_array_equal(Ledger(1_000, 4).shuffled, Ledger(1_000, 4).shuffled)
    assert (Ledger(1_000, 4).shuffled != Ledger(1_000, 5).shuffled).mean() > 0.9


@pytest.mark.parametrize(("rows", "named"), [([4, 9, 2], [9]), ([4, 6, 5, 6], [6]), ([9, 6, 6], [6, 9])])
def test_training_on_a_row_again_is_refused_by_name_and_records_nothing(rows, named):
    ledger = Ledger(20, 0)
    ledger.mark_trained(np.array([9, 1]))
    with pytest.raises(MatesError, match=rf"at most once.*first \[{', '.join(map(str, named))}\]"):
        ledger.mark_trained(np.array(rows))
    assert np.flatnonzero(ledger.consumed).tolist() == [1, 9]
    ledger.start_new_pass()
    ledger.mark_trained(np.array([9]))


@pytest.mark.parametrize("row", [-1, 20])
def test_rows_outside_the_pool_are_refused(row):
    with pytest.raises(ValueError, match="`rows` must be from 0 to 19"):
        Ledger(20, 0).mark_trained(np.array([3, row]))


def test_own_order_that_runs_out_is_refused_with_the_numbers():
    ledger = Ledger(10, 0)
    ledger.mark_trained(np.arange(4))
    assert ledger.own_order(np.arange(10), 4, np.array([4, 5])).tolist() == [6, 7, 8, 9]
    with pytest.raises(MatesError, match="must have 5 unused rows.*got 4 in an order of 10"):
        ledger.own_order(np.arange(10), 5, np.array([4, 5]))


def test_bits_of_another_pool_are_refused():
    ledger = Ledger(13, 0)
    ledger.mark_trained(np.arange(13))
    assert ledger.to_bits().tolist() == [255, 0b11111000]
    for num_rows in (12, 17):
        with pytest.raises(ValueError, match=f"`bits` must hold {num_rows} rows"):
            Ledger.from_bits(ledger.to_bits(), num_rows, 0, 0)
    with pytest.raises(ValueError, match="`probed` must hold 13 rows"):
        Ledger.from_bits(ledger.to_bits(), 13, 0, 0, np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="`cursor` must be from 0 to 12, got 13"):
        Ledger.from_bits(ledger.to_bits(), 13, 0, 13)
    with pytest.raises(ValueError, match="`num_rows` must be at least 1, got 0"):
        Ledger(0, 0)


@given(st.integers(1, 10**9), st.integers(1, 1_000))
def test_candidates_are_the_exact_quotient_of_the_decimal(k, thousandths):
    expected = -(-k * 1_000 // thousandths)
    assert num_candidates(k, thousandths / 1_000) == expected


plans = st.builds(
    lambda num_rows, batch_rows, max_steps, length, lead, random_rounds, ratio, num_probes: RunPlan(
        num_rows=num_rows,
        batch_rows=batch_rows,
        max_steps=max_steps,
        config=MatesConfig(
            update_steps=length,
            switch_lead_steps=min(lead, length),
            random_rounds=random_rounds,
            selection_ratio=ratio,
            num_probes=num_probes,
            max_passes=1,
        ),
    ),
    st.integers(1, 600),
    st.integers(1, 8),
    st.integers(1, 80),
    st.integers(1, 15),
    st.integers(1, 15),
    st.integers(1, 6),
    st.sampled_from(RATIOS),
    st.integers(10, 40),
)


def fits(plan: RunPlan) -> bool:
    try:
        plan.check()
    except ValueError:
        return False
    return True


def with_steps(plan: RunPlan, max_steps: int) -> RunPlan:
    return RunPlan(num_rows=plan.num_rows, batch_rows=plan.batch_rows, max_steps=max_steps, config=plan.config)


@settings(max_examples=200, deadline=None)
@given(plans)
def test_planned_rounds_tile_the_steps_from_the_first_selection_to_the_last_step(plan):
    config = plan.config
    steps = [step for planned in plan.rounds for step in range(planned.from_step, planned.to_step)]
    first = config.random_rounds * config.update_steps + config.lead_steps
    assert steps == list(range(first, plan.max_steps))
    for index, planned in enumerate(plan.rounds):
        assert planned.number == config.random_rounds + index
        assert planned.boundary_step == planned.number * config.update_steps
        assert planned.from_step == planned.boundary_step + config.lead_steps < plan.max_steps
        assert planned.num_rows == (planned.to_step - planned.from_step) * plan.batch_rows
        assert planned.to_step - planned.from_step == config.update_steps or planned is plan.rounds[-1]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(plans)
def test_what_fits_is_what_step_by_step_search_finds(plan):
    most = plan.max_steps_that_fit
    found = [steps for steps in range(1, most + 15) if fits(with_steps(plan, steps))]
    assert found == list(range(1, most + 1))
    assert most >= plan.first_from_step


@settings(max_examples=100, deadline=None)
@given(plans, scopes, st.randoms(use_true_random=False))
def test_a_run_whose_plan_fits_never_runs_out_of_rows(plan, scope, random):
    plan = with_steps(plan, min(plan.max_steps, plan.max_steps_that_fit))
    plan.check()
    ledger = Ledger(plan.num_rows, 0)
    own = np.array(random.sample(range(plan.num_rows), plan.num_rows))
    ledger.mark_trained(own[: plan.rows_before])
    for planned in plan.rounds:
        ratio, num_probes = plan.config.selection_ratio, plan.config.num_probes
        drawn = draw(ledger, planned.number, planned.num_rows, ratio, scope, num_probes)
        if random.random() < 0.7:
            chosen = np.array(random.sample(drawn.candidates.tolist(), planned.num_rows))
            ledger.cursor = drawn.cursor_after
        else:
            chosen = ledger.own_order(own, planned.num_rows, drawn.probes)
        ledger.mark_trained(chosen)
    trained = max(0, plan.max_steps - plan.first_from_step) * plan.batch_rows
    assert ledger.num_unused == plan.num_rows - plan.rows_before - trained


@settings(max_examples=100, deadline=None)
@given(plans)
def test_a_run_through_the_whole_pool_that_selects_is_refused(plan):
    if plan.first_from_step * plan.batch_rows >= plan.num_rows:
        return  # the Trainer's own order goes through whole epochs first; a fresh pass may then suffice
    whole = with_steps(plan, -(-plan.num_rows // plan.batch_rows))
    if whole.rounds:
        with pytest.raises(ValueError, match="rows enough that none is trained on twice"):
            whole.check()


def test_the_refusal_names_the_round_its_needs_and_the_way_out():
    config = MatesConfig(update_steps=10, switch_lead_steps=2, selection_ratio=0.2, num_probes=20, max_passes=1)
    # 12 steps in own order (48 rows), then rounds of 40 rows from 200: 452 unused, 412, 372, 332, 292, 252, 212.
    plan = RunPlan(num_rows=500, batch_rows=4, max_steps=100, config=config)
    with pytest.raises(ValueError, match="rows enough") as caught:
        plan.check()
    message = str(caught.value)
    assert "Round 7 (steps 72 to 82) must choose 40 rows from 200" in message
    assert "220 in all; of the 500 rows in the pool 212 are unused" in message
    assert "The largest `max_steps` that fits is 81 (got 100)" in message  # 36 rows from 180, and 20 probes
    with_steps(plan, 81).check()
    with pytest.raises(ValueError, match="Round 7"):
        with_steps(plan, 82).check()


def test_a_pool_too_small_for_one_selection_says_so():
    config = MatesConfig(update_steps=10, switch_lead_steps=2, selection_ratio=0.2, num_probes=100, max_passes=1)
    plan = RunPlan(num_rows=120, batch_rows=4, max_steps=30, config=config)
    with pytest.raises(ValueError, match="No selection of this config fits this pool; up to `max_steps` 12 nothing"):
        plan.check()
    never = RunPlan(num_rows=120, batch_rows=4, max_steps=12, config=config)
    assert never.rounds == []
    never.check()


def test_only_the_current_pass_of_the_own_order_counts_as_used():
    config = MatesConfig(update_steps=10, switch_lead_steps=2, selection_ratio=0.5, num_probes=10, max_passes=1)
    for num_rows, before in ((100, 48), (48, 0), (40, 8), (24, 0)):
        assert RunPlan(num_rows=num_rows, batch_rows=4, max_steps=20, config=config).rows_before == before


@pytest.mark.parametrize("name", ["num_rows", "batch_rows", "max_steps"])
def test_plan_refuses_counts_below_one(name):
    counts = {"num_rows": 10, "batch_rows": 2, "max_steps": 3, name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        RunPlan(**counts, config=MatesConfig())
