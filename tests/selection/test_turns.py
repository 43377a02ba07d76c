"""Several passes over a pool: no row has its turn again before each row had one, however rounds and passes fall."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.config import MatesConfig
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.turns import waiting_after

rounds = st.lists(st.tuples(st.integers(1, 8), st.booleans(), st.booleans()), min_size=1, max_size=25)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(12, 90), st.integers(0, 2**33), st.sampled_from([0.2, 0.5, 1.0]), st.integers(0, 90), rounds,
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_row_comes_back_only_when_all_had_their_turn(num_rows, seed, ratio, num_own, rounds, random):
    """Against sets of rows: where some rows of a round had their turn before, every other row had one, too."""
    config = MatesConfig(num_probes=10, selection_ratio=ratio)
    ledger = Ledger(num_rows, seed)
    own = np.array(random.sample(range(num_rows), num_rows))
    ledger.mark_trained(own[: min(num_own, num_rows)])
    everyone, had = set(range(num_rows)), set(own[:num_own].tolist())
    trained = np.zeros(num_rows, np.int64)  # how often, in how many passes at most
    trained[own[:num_own]] += 1
    for number, (k, select, cut) in enumerate(rounds, 1):
        needed = -(-round(10 * k / ratio) // 10) + 10
        if needed > num_rows:
            continue
        used, before = set(np.flatnonzero(ledger.consumed).tolist()), ledger.pass_number
        ledger.make_room(k, config)
        if ledger.pass_number > before:
            assert needed > num_rows - len(used)
            had |= used
            used = set()
        drawn = ledger.draw(
            round_number=number, num_selected=k, selection_ratio=ratio, candidate_scope="slice", num_probes=10
        )
        if cut:  # the labels make the round shorter
            k = max(k // 2, 1)
            drawn = ledger.narrowed(drawn, k, config)
        own = np.array(random.sample(range(num_rows), num_rows))
        if select:
            rows, offered = np.array(random.sample(drawn.candidates.tolist(), k)), drawn.candidates
            left_out: set[int] = set()
            ledger.cursor = drawn.cursor_after
        else:
            rows = offered = ledger.own_order(own, k, drawn.probes)
            left_out = set(drawn.probes.tolist())
        now = set(offered.tolist())
        if now & had and (select or ledger.pass_number > 1):  # in the first pass the own order asks nobody
            assert everyone == had | now | used | left_out
            had = now & had
        else:
            had |= now
        assert not set(rows.tolist()) & used
        ledger.mark_offered(offered)
        ledger.mark_trained(rows)
        ledger.mark_probed(drawn.probes)
        trained[rows] += 1
        assert trained.max() <= ledger.pass_number
        if ledger.waiting is not None:
            bits = ledger.waiting_to_bits()
            again = Ledger.from_bits(ledger.to_bits(), num_rows, seed, ledger.cursor, ledger.probed_to_bits(), bits)
            again.pass_number, ledger = ledger.pass_number, again  # a resume after every round


def test_what_the_first_pass_left_is_chosen_from_before_anything_comes_back():
    ledger, config = Ledger(100, 3), MatesConfig(num_probes=10, selection_ratio=0.2)
    order = ledger.shuffled.tolist()
    own = np.array(order[5:])  # the Trainer's own order took all but the first five
    ledger.mark_trained(own)
    ledger.make_room(4, config)
    assert (ledger.pass_number, ledger.num_unused) == (2, 100)
    drawn = ledger.draw(round_number=1, num_selected=4, selection_ratio=0.2, candidate_scope="slice", num_probes=10)
    assert drawn.candidates.tolist() == order[:20]
    assert ledger.own_order(own, 7, drawn.probes).tolist() == [row for row in own if row not in drawn.probes][:7]
    # Had it taken others, those would be chosen from first, wherever they are.
    ledger = Ledger(100, 3)
    ledger.mark_trained(np.array(order[:95]))
    ledger.make_room(4, config)
    drawn = ledger.draw(round_number=1, num_selected=4, selection_ratio=0.2, candidate_scope="slice", num_probes=10)
    assert drawn.candidates.tolist() == order[95:] + order[:15]
    assert drawn.cursor_after == 15
    own = np.array(order)
    taken = ledger.own_order(own, 4, np.array(order[96:97]))
    assert taken.tolist() == [order[95], *order[97:]]  # the probed one is left out
    assert ledger.narrowed(drawn, 2, config).candidates.tolist() == order[95:] + order[:5]


def test_rows_that_the_cursor_went_by_have_had_their_turn_when_a_pass_begins():
    ledger, config = Ledger(40, 1), MatesConfig(num_probes=10, selection_ratio=0.5)
    order = ledger.shuffled.tolist()
    drawn = ledger.draw(round_number=1, num_selected=8, selection_ratio=0.5, candidate_scope="slice", num_probes=10)
    ledger.mark_trained(drawn.candidates[:8])
    ledger.cursor = drawn.cursor_after
    ledger.make_room(12, config)  # 24 candidates and 10 probes, of 32 unused rows
    assert ledger.pass_number == 2
    assert ledger.waiting is not None
    assert np.flatnonzero(ledger.waiting).tolist() == sorted(order[16:])
    drawn = ledger.draw(round_number=2, num_selected=12, selection_ratio=0.5, candidate_scope="slice", num_probes=10)
    assert drawn.candidates.tolist() == order[16:]
    ledger.mark_offered(drawn.candidates)
    assert not ledger.waiting.any()
    ledger.mark_offered(np.array(order[:3]))
    assert np.flatnonzero(~ledger.waiting).tolist() == sorted(order[:3])  # turns begin anew


@pytest.mark.parametrize(
    ("offered", "after"), [([0], [False, True, False]), ([0, 1], [False] * 3), ([0, 1, 2], [True, True, False])]
)
def test_turns_begin_anew_where_a_row_had_its_turn_already(offered, after):
    waiting = np.array([True, True, False])
    assert waiting_after(waiting, np.array(offered)).tolist() == after
    assert waiting.tolist() == [True, True, False]
