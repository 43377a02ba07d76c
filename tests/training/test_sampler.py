"""The schedule of rows against one that looks each position up; the own order against its sampler; the clock."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from mates_hf.data.mixing import PassageSchedule
from mates_hf.engine.processes import Processes
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.training import own_order, sampler
from mates_hf.training.clock import RowClock
from mates_hf.training.own_order import (
    OrderHash,
    check_rows_once,
    draw_pass,
    find_sampler,
    install,
    warn_of_own_streams,
)
from mates_hf.training.sampler import ScheduledSampler

NUM = 40
LONG = 3 * own_order.BLOCK + 5  # so many rows that hash and checks go through several blocks


class Tailed(Sampler):
    """Draws once more behind its last row, as torch's RandomSampler does with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return NUM

    def __iter__(self):
        yield from torch.randperm(NUM, generator=self.generator).tolist()
        torch.rand(7, generator=self.generator)


class Short(Tailed):
    def __iter__(self):
        yield from range(NUM - 1)


def with_generator() -> RandomSampler:
    return RandomSampler(range(NUM), generator=torch.Generator().manual_seed(3))


KINDS = {
    "random": lambda: RandomSampler(range(NUM)),
    "random with a generator": with_generator,
    "a part at random": lambda: RandomSampler(range(NUM), num_samples=17),
    "seedable": lambda: SeedableRandomSampler(range(NUM), data_seed=7),
    "sequential": lambda: SequentialSampler(range(NUM)),
    "subset": lambda: SubsetRandomSampler(range(0, NUM, 2)),
    "grouped": lambda: LengthGroupedSampler(4, lengths=[i % 7 for i in range(NUM)]),
    "tailed": Tailed,
}


def streams(own) -> list[int]:
    """The states of the random streams that a sampler may draw from."""
    generator = None if hasattr(own, "set_epoch") else getattr(own, "generator", None)  # seeded anew at each pass
    states = [torch.get_rng_state()] + ([] if generator is None else [generator.get_state()])
    return [int(state.sum()) for state in states]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [True, False], ids=["installed", "another-version"])
def test_a_pass_is_what_its_sampler_yields_pass_after_pass(kind, known, monkeypatch):
    if not known:
        monkeypatch.setattr(own_order, "_is_drawn_by_randperm", lambda kind: False)
    torch.manual_seed(1)
    plain, expected = KINDS[kind](), []
    for epoch in (0, 1, 2):
        if hasattr(plain, "set_epoch"):
            plain.set_epoch(epoch)
        expected.append(([int(row) for row in plain], streams(plain)))
    torch.manual_seed(1)
    ours = KINDS[kind]()
    for epoch, (rows, states) in enumerate(expected):
        if hasattr(ours, "set_epoch"):
            ours.set_epoch(epoch)
        found = draw_pass(ours, NUM)
        if found.finish is not None:
            found.finish()
        assert found.rows.tolist() == rows
        assert found.rows.dtype == np.int32
        assert streams(ours) == states
        assert found.each_once == (known and ("random" in kind or kind == "seedable"))


def test_the_installed_versions_draw_as_randperm_does():
    # Where this fails, runs are still right, and a large pool takes 36 bytes a row at each epoch's beginning.
    assert own_order._is_drawn_by_randperm(RandomSampler)
    assert own_order._is_drawn_by_randperm(SeedableRandomSampler)


def test_samplers_that_do_not_keep_their_word_are_refused_by_name():
    with pytest.raises(UnsupportedSettingError, match=r"\(Short\) must yield as many .* \(40\)"):
        draw_pass(Short(), NUM)
    with pytest.raises(UnsupportedSettingError, match="rows of the pool, 0 to 29, got 0 to 39"):
        draw_pass(SequentialSampler(range(NUM)), 30)


def test_the_hash_is_that_of_int64_whatever_the_rows_are_and_however_long():
    for rows in (np.arange(9, dtype=np.int32), np.arange(LONG, dtype=np.int32)):
        assert OrderHash(rows).hexdigest() == hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def test_a_row_given_twice_is_found_within_a_block_and_over_blocks():
    rows = np.arange(LONG, dtype=np.int32)
    check_rows_once(rows)
    check_rows_once(rows[:0])
    for first, second in ((3, 4), (3, LONG - 1), (0, 1)):
        twice = rows.copy()
        twice[second] = twice[first]
        with pytest.raises(UnsupportedSettingError, match=rf"got 1 that it gave before, first rows \[{first}\]"):
            check_rows_once(twice)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["sequential", "subset", "grouped", "tailed", "seedable"])
def test_a_sampler_is_found_replaced_and_put_back_in_any_number_of_processes(kind, size):
    def loader():
        torch.manual_seed(4)  # by which accelerate seeds the generator that it gives to some
        plain = DataLoader(list(range(NUM)), batch_size=4, sampler=KINDS[kind]())
        return prepare_data_loader(
            plain, num_processes=size, process_index=size - 1, put_on_device=False,
            use_seedable_sampler=kind == "seedable",
        )  # fmt: skip

    def rows(loaded):
        torch.manual_seed(2)
        loaded.set_epoch(0)
        return [batch.tolist() for batch in loaded]

    untouched, ours = loader(), loader()
    before = [vars(holder).keys() for holder in own_order._holders(ours)]
    own = find_sampler(ours)
    assert type(own) is type(KINDS[kind]())
    restore = install(ours, SequentialSampler(range(8)))
    assert find_sampler(ours).__class__ is SequentialSampler
    assert rows(ours) == [[0, 1, 2, 3], [4, 5, 6, 7]][size - 1 :]
    restore()
    assert find_sampler(ours) is own
    assert [vars(holder).keys() for holder in own_order._holders(ours)] == before
    assert rows(ours) == rows(untouched)


def test_a_batch_sampler_given_as_the_sampler_is_reached_in_several_processes():
    batches = BatchSampler(SequentialSampler(range(NUM)), 4, False)
    plain = DataLoader(list(range(NUM)), batch_size=None, sampler=batches)
    loader = prepare_data_loader(plain, num_processes=2, process_index=0, put_on_device=False)
    own = find_sampler(loader)
    restore = install(loader, SequentialSampler(range(8)))
    assert batches.sampler is not own
    restore()
    assert batches.sampler is own


@pytest.mark.parametrize(
    ("kind", "size", "num_passes", "told"),
    [("grouped", 2, 2, True), ("subset", 2, 2, True), ("grouped", 1, 2, False), ("grouped", 2, 1, False),
     ("tailed", 2, 2, False), ("seedable", 2, 2, False), ("sequential", 2, 2, False)],
)  # fmt: skip
def test_a_sampler_that_may_differ_between_processes_in_a_later_epoch_is_told_of(kind, size, num_passes, told, caplog):
    warn_of_own_streams(Processes(0, size), KINDS[kind](), num_passes)
    assert ("need not be equal after the first epoch" in caplog.text) == told


# ---- the schedule


class Slow:
    """The schedule as one looks it up position by position, with the same Trainer's own order."""

    def __init__(self, own: list[int], clock: RowClock) -> None:
        self.own, self.clock, self.orders = own, clock, {}

    def row(self, position: int, start: int, epoch_start: int) -> int | None:
        before = [begin for begin in self.orders if begin <= position]
        if before:
            rows = self.orders[max(before)]
            index = position - max(before)
            return rows[index] if index < len(rows) else None
        index = position - start
        if start == epoch_start:
            return self.own[index] if index < len(self.own) else None
        return self.own[index % self.clock.rows_per_epoch % len(self.own)]


appends = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40), st.integers(1, 30)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(appends, st.integers(1, 9), st.integers(0, 30), st.integers(1, 5))
def test_rows_are_those_looked_up_one_by_one_also_with_orders_appended_while_iterating(
    given_, block, start_position, num_epochs
):
    """Orders come after some rows were handed out, for some rows later; blocks are short or long."""
    # As where a run resumes inside its first epoch: the rows before the start are asked for and thrown away.
    clock = RowClock(batches_per_epoch=40, accumulation=1, batch_rows=1, start_position=start_position,
                     start_step=start_position)  # fmt: skip
    own = np.random.default_rng(0).permutation(NUM).tolist()
    slow, ours = Slow(own, clock), ScheduledSampler(own, clock, num_rows=NUM)
    due = sorted((start_position + after, ahead, length) for after, ahead, length in given_)
    original, sampler.BLOCK = sampler.BLOCK, block
    try:
        own_start = 0
        for epoch in range(num_epochs):
            ours.set_epoch(epoch)
            begin = epoch * 40
            rows = iter(ours)
            if not (slow.orders and min(slow.orders) > begin):
                own_start = begin
            for position in range(begin, begin + 40):
                row = next(rows, None)
                if position < start_position:
                    assert row == 0
                    continue
                expected = slow.row(position, own_start, begin)
                assert row == expected, position
                if row is None:
                    break
                assert ours.drawn_position == position + 1
                while due and due[0][0] <= position:
                    _, ahead, length = due.pop(0)
                    order = np.arange(length) + 1000 * (len(slow.orders) + 1)
                    slow.orders[position + 1 + ahead] = order.tolist()
                    ours.append(position + 1 + ahead, order)
                    if ahead == 0:
                        with pytest.raises(MatesError, match="not yet fetched"):
                            ours.append(position, order)
            else:
                assert next(rows, None) is None
    finally:
        sampler.BLOCK = original


@settings(max_examples=150, deadline=None)
@given(appends, st.integers(1, 9), st.integers(2, 20), st.integers(1, 5), st.sampled_from([38, 40]))
def test_passages_stand_between_rows_that_are_those_looked_up_one_by_one(given_, block, num, num_epochs, num_own):
    """A pool that ends inside a batch as well: where passages stand among its rows, no batch is short."""
    schedule = PassageSchedule(num_passages=num, passes=3, start=0, num_rows=40 * num_epochs, seed=1)
    clock = RowClock(batches_per_epoch=10, accumulation=1, batch_rows=4, passages=schedule)
    at = dict(zip(*(part.tolist() for part in schedule.standing(0, 40 * num_epochs)), strict=True))
    own = np.random.default_rng(0).permutation(num_own).tolist()
    ours, orders, own_start = ScheduledSampler(own, clock, num_rows=1000), {}, 0
    due = sorted(given_)
    original, sampler.BLOCK = sampler.BLOCK, block
    try:
        for begin in range(0, 40 * num_epochs, 40):
            ours.set_epoch(begin // 40)
            rows = iter(ours)
            if not (orders and min(orders) > schedule.pool_rows(begin)):
                own_start = begin
            for position in range(begin, begin + 40):
                row, pool_row = next(rows, None), schedule.pool_rows(position)
                before = [first for first in orders if first <= pool_row]
                if position in at:
                    assert row == 1000 + at[position]
                elif before:
                    index = pool_row - max(before)
                    assert row == (orders[max(before)][index] if index < len(orders[max(before)]) else None)
                else:
                    lap = position - (position - own_start) % 40
                    assert row == own[(pool_row - schedule.pool_rows(lap)) % num_own]
                if row is None:
                    break
                assert ours.drawn_position == position + 1
                while due and due[0][0] <= position:
                    _, ahead, length = due.pop(0)
                    first = schedule.pool_rows(position + 1) + ahead
                    order = np.arange(length) + 100 * (len(orders) + 1)
                    orders[first] = order.tolist()
                    ours.append(first, order)
                    if position not in at:
                        with pytest.raises(MatesError, match="not yet fetched"):
                            ours.append(pool_row, order)
            else:
                assert next(rows, None) is None
    finally:
        sampler.BLOCK = original


def test_the_own_order_is_let_go_where_nobody_asks_for_it():
    clock = RowClock(batches_per_epoch=10, accumulation=1, batch_rows=4)
    ours = ScheduledSampler(with_generator(), clock, num_rows=NUM)
    ours.keeps_own_rows = False
    rows = list(itertools.islice(iter(ours), 5))
    ours.append(8, np.arange(8))
    ours.drop_finished(4)
    assert ours.own_rows[:5].tolist() == rows  # three rows of it are still to come
    ours.append(16, np.arange(24))
    ours.drop_finished(12)
    assert len(ours.own_rows) == 0
    state = ours.own_state
    ours.set_epoch(1)
    assert next(iter(ours), None) is None  # the last order ended with the epoch
    assert len(ours.own_rows) == 0
    assert ours.own_state["own_sha256"] != state["own_sha256"]  # drawn all the same: its streams go on


def test_a_generator_that_goes_on_from_pass_to_pass_resumes_in_the_pass_it_was_in():
    clock = RowClock(batches_per_epoch=10, accumulation=1, batch_rows=4)
    whole = ScheduledSampler(with_generator(), clock, num_rows=NUM)
    passes = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        passes.append(list(whole))
        if epoch == 1:
            saved = whole.own_state
    own = with_generator()
    assert passes == [list(own), list(own), list(own)]
    resumed = RowClock(batches_per_epoch=10, accumulation=1, batch_rows=4, start_step=13, start_position=52,
                       first_epoch=1, first_epoch_step=10)  # fmt: skip
    ours = ScheduledSampler(with_generator(), resumed, saved, num_rows=NUM)
    ours.set_epoch(1)
    assert list(ours) == [0] * 12 + passes[1][12:]
    ours.set_epoch(2)
    assert list(ours) == passes[2]


def test_a_resumed_loader_skips_and_goes_on_with_the_next_row():
    clock = RowClock(batches_per_epoch=5, accumulation=1, batch_rows=8, start_step=2, start_position=16)
    for rank in (0, 1):
        plain = DataLoader(list(range(NUM)), batch_size=4, sampler=SequentialSampler(range(NUM)))
        loader = prepare_data_loader(plain, num_processes=2, process_index=rank, put_on_device=False)
        install(loader, ScheduledSampler(find_sampler(loader), clock, num_rows=NUM))
        found = [batch.tolist() for batch in skip_first_batches(loader, 2)]
        assert found == [list(range(first, first + 4)) for first in range(16 + 4 * rank, NUM, 8)]


# ---- the clock


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_own_rows_used_are_those_counted_step_by_step(data):
    """A pass begins with each epoch up to the boundary; after it the last one goes round."""
    batches, accumulation, batch_rows = (data.draw(st.integers(1, most)) for most in (9, 4, 5))
    boundary, lead, first_epoch = (data.draw(st.integers(1, most)) for most in (40, 40, 3))
    clock = RowClock(batches_per_epoch=batches, accumulation=accumulation, batch_rows=batch_rows)
    first_step = first_epoch * clock.steps_per_epoch
    started = {"start_step": first_step, "start_position": clock.position(first_step), "first_epoch": first_epoch}
    clock = dataclasses.replace(clock, first_epoch_step=first_step, **started)
    used = 0
    for step in range(1, boundary + lead + 1):
        in_epoch = (step - 1) % clock.steps_per_epoch
        if in_epoch == 0 and step <= boundary:
            used = 0  # a fresh pass
        taken = min(accumulation, batches - in_epoch * accumulation) * batch_rows
        used = (used + taken) % clock.rows_per_epoch
    assert clock.own_rows_used(first_step + boundary, first_step + boundary + lead) == used
    end = clock.position(first_step + boundary + lead)
    passages = PassageSchedule(num_passages=3, passes=4, start=clock.start_position, num_rows=end, seed=0)
    mixed = dataclasses.replace(clock, passages=passages)
    began = end - used
    expected = used - sum(began <= position for position in passages.standing(0, end)[0].tolist())
    assert mixed.own_rows_used(first_step + boundary, first_step + boundary + lead) == expected
