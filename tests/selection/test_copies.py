"""Copies: what counts as one text, and that a selection takes it no more often than it may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.data.arrow import assemble
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.prediction.worth import row_worth
from mates_hf.selection import copies
from mates_hf.selection.choose import noisy, stage_seed
from mates_hf.selection.copies import end_tokens, find_copies, other_inputs, own_hashes, row_hashes
from mates_hf.selection.select_stage import SelectedRows, select_rows
from tests.selection.test_choose import probed

BOS, EOS, PAD = 1, 2, 0
TEXT = [5, 6, 7, 8, 6]


def hashes_of(lists: Any, labels: Any = None, ends: tuple[int, ...] = (BOS, EOS, PAD)) -> np.ndarray:
    rows = TokenRows.from_lists(lists, labels)
    return row_hashes(rows, 10 + np.arange(len(rows)), ends)


def untrained(num: int) -> list[int]:
    return [IGNORED] * num


def test_what_is_one_text():
    same = [TEXT, [*TEXT, EOS], [BOS, *TEXT], [BOS, *TEXT, EOS, EOS], [*TEXT, EOS, *[PAD] * 9], [PAD, PAD, *TEXT]]
    assert len(set(hashes_of(same).tolist())) == 1
    # Labels make no difference, and neither does a tail of one token that is not trained, whatever its id.
    completion = [*untrained(3), 8, 6]
    padded = [*TEXT, 9, 9, 9], [*completion, *untrained(3)]
    others = hashes_of([TEXT, TEXT, padded[0]], [TEXT, completion, padded[1]])
    assert set(others.tolist()) == set(hashes_of([TEXT]).tolist())
    # A mask's padding, on either side; and the type of the ids.
    values, mask = np.array([9, 9, *TEXT, *TEXT, 9, 9]), np.array([0, 0, *[1] * 10, 0, 0])
    masked = assemble(values, np.array([0, 7, 14]), values.copy(), mask)
    assert set(row_hashes(masked, np.arange(2)).tolist()) == set(hashes_of([TEXT]).tolist())
    small = TokenRows(values=np.array(TEXT, np.int32), offsets=np.array([0, 5]))
    assert row_hashes(small, np.arange(1)) == hashes_of([TEXT])


def test_what_is_another_text():
    others = [
        TEXT, TEXT[::-1], TEXT[:-1], TEXT[1:], [*TEXT, *TEXT], [6, 5, 7, 8, 6], [5, 6, 7, 8, 9], [5, 6, EOS, 7, 8, 6],
        [EOS], [EOS, EOS], [*TEXT, 6], [4, *TEXT], [],
    ]  # fmt: skip
    assert len(set(hashes_of(others).tolist())) == len(others)  # [*TEXT, 6] ends in a token twice that is trained
    assert len(set(hashes_of([TEXT, [*TEXT, EOS]], ends=()).tolist())) == 2
    empty = hashes_of([[], [], [EOS], [EOS]])
    assert len(set(empty.tolist())) == 3  # rows without tokens are their own; one of end tokens is a text
    assert len(set(own_hashes(np.arange(50)).tolist())) == 50
    pairs = np.array(np.meshgrid(np.arange(300), np.arange(300))).reshape(2, -1).T
    rows = TokenRows(values=pairs.reshape(-1), offsets=2 * np.arange(len(pairs) + 1))
    assert len(np.unique(row_hashes(rows, np.arange(len(rows))))) == len(pairs)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=20))
def test_a_hash_depends_on_its_row_alone(lists):
    found = hashes_of(lists)
    for i, row in enumerate(lists):
        rows = TokenRows.from_lists([row])
        assert row_hashes(rows, np.array([10 + i]), (BOS, EOS, PAD)) == found[i]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-5, 2**31), min_size=1, max_size=8), st.sampled_from([np.int32, np.int64, np.uint16]))
def test_a_hash_is_the_sum_of_its_mixed_tokens(tokens, dtype):
    def mix(value: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = ((value ^ (value >> shift)) * factor) % 2**64
        return value ^ (value >> 31)

    values, step = np.array(tokens).astype(dtype), 0x9E3779B97F4A7C15
    rows = TokenRows(values=values, offsets=np.array([0, len(values)]))
    total = sum(mix((place * step + int(token)) % 2**64) for place, token in enumerate(values.tolist()))
    assert row_hashes(rows, np.array([3]))[0] == mix((total + len(values) * step) % 2**64)


def test_which_tokens_are_ends_and_which_rows_are_more_than_tokens():
    class Config:
        eos_token_id, bos_token_id, pad_token_id = [2, 7], None, -1

    assert end_tokens(None, Config(), {"bos_token_id": 3}) == (-1, 2, 3, 7)

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": 1, "labels": 1, "attention_mask": 1, **({"pixel_values": 0} if "p" in rows[0] else {})}

    assert other_inputs([{"a": 1}], collator) == []
    assert other_inputs([{"p": 1}], collator) == ["pixel_values"]
    assert other_inputs([{"p": 1}], None) == []


# --- how many are chosen ---

spread = np.random.default_rng(0).integers(0, 2**64, 12, np.uint64)
groups = st.lists(st.integers(0, 11), max_size=60)


def left_out(hashes: np.ndarray, values: np.ndarray, most: int) -> list[int]:
    """By the definition: from the best down, the first ones among equals."""
    seen: dict[int, int] = {}
    found = []
    for i in sorted(range(len(values)), key=lambda i: (-values[i], i)):
        seen[int(hashes[i])] = seen.get(int(hashes[i]), 0) + 1
        found += [i] if seen[int(hashes[i])] > most else []
    return sorted(found)


@settings(max_examples=80, deadline=None)
@given(groups, st.integers(0, 2**32), st.integers(1, 3), st.sampled_from([2, 8, 1 << 24]))
def test_the_best_copies_are_kept(numbers, seed, most, part):
    hashes = spread[np.array(numbers, int)]
    values = np.random.default_rng(seed).integers(0, 3, len(hashes)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "PART", part)
        assert find_copies(hashes, values, most).tolist() == left_out(hashes, values, most)
        assert len(find_copies(hashes)) == len(hashes) - len(set(numbers))


def select(
    influence: Any, k: int, hashes: Any, most: int | None, num_targets: Any = None, **more: Any
) -> SelectedRows:
    num = len(influence)
    return select_rows(
        np.arange(num),
        np.asarray(influence, np.float32),
        np.full(num, 8, np.int32) if num_targets is None else np.asarray(num_targets, np.int32),
        probed([-1, 1, 2], [4, 4, 4]),
        k,
        hashes=None if hashes is None else np.asarray(hashes, np.uint64),
        max_copies=most,
        **{"temperature": 0.0, "selection_seed": 3, "round_number": 1, **more},
    )


@settings(max_examples=80, deadline=None)
@given(groups, st.integers(0, 2**32), st.integers(1, 2), st.sampled_from([0.0, 0.7]), st.floats(0, 1))
def test_a_selection_is_the_best_of_what_the_limit_leaves(numbers, seed, most, temperature, share):
    hashes, k = spread[np.array(numbers, int)], round(share * len(numbers))
    influence = np.random.default_rng(seed).normal(size=len(hashes)).astype(np.float32)
    values = row_worth(influence, np.full(len(hashes), 8))
    values /= float(np.std(row_worth(np.float32([-1, 1, 2]), [4, 4, 4]))) * 0.5
    if temperature and len(values):
        values = noisy(values, temperature, stage_seed(3, 1, "select"))
    beyond = left_out(hashes, values, most)
    best_first = sorted(range(len(values)), key=lambda i: (i in beyond, -values[i]))
    found = select(influence, k, hashes, most, temperature=temperature)
    assert sorted(found.rows.tolist()) == sorted(best_first[:k])  # exactly k: copies where texts do not suffice
    assert found.num_repeated == len(hashes) - len(set(numbers))
    worst = min((values[i] for i in best_first[:k] if i not in beyond), default=np.inf)
    assert found.num_passed_over == sum(values[i] > worst for i in beyond if i not in best_first[:k])


def test_without_a_limit_or_without_copies_a_selection_is_what_it_was():
    influence = np.random.default_rng(0).normal(size=200)
    few, many = np.arange(200) % 20, np.arange(200)
    for temperature in (0.0, 1.0):
        plain = select(influence, 40, None, None, temperature=temperature).rows.tolist()  # also their order
        assert select(influence, 40, few, None, temperature=temperature).rows.tolist() == plain
        assert select(influence, 40, many, 1, temperature=temperature).rows.tolist() == plain
    assert select(influence, 40, few, None).num_repeated == 180
    assert len(set(few[select(influence, 20, few, 1).rows])) == 20


def test_further_copies_come_before_rows_without_a_target():
    found = select([3, 2, 1, 9], 3, [7, 7, 7, 8], 1, [8, 8, 8, 0])
    assert sorted(found.rows.tolist()) == [0, 1, 2]
    assert sorted(select([3, 2, 1, 9], 4, [7, 7, 7, 8], 1, [8, 8, 8, 0]).rows.tolist()) == [0, 1, 2, 3]
    assert sorted(select([3, 2, 1, 9], 3, [7, 7, 8, 8], 1, [8, 8, 8, 0]).rows.tolist()) == [0, 1, 2]


@settings(max_examples=80, deadline=None)
@given(groups, st.integers(0, 2**32), st.sampled_from([None, 1, 2]), st.floats(0, 1), st.floats(0, 1))
def test_a_random_share_is_of_what_worth_did_not_choose(numbers, seed, most, part, share):
    hashes, k = spread[np.array(numbers, int)], round(part * len(numbers))
    influence = np.random.default_rng(seed).normal(size=len(hashes)).astype(np.float32)
    found = select(influence, k, hashes, most, random_share=share)
    assert found.num_random == round(share * k)
    assert len(found.rows) == len(set(found.rows.tolist())) == k
    by_worth = select(influence, k - found.num_random, hashes, most).rows.tolist()
    assert set(by_worth) <= set(found.rows.tolist())
    beyond = set() if most is None else set(left_out(hashes, influence, most))
    if k <= len(numbers) - len(beyond):
        assert not beyond & set(found.rows.tolist())  # a text is not chosen once more by chance


def test_random_rows_are_others_each_round_uniform_and_of_the_rest():
    influence = np.arange(200, dtype=np.float32)
    drawn = np.zeros(200)
    for number in range(300):
        rows = select(influence, 40, None, None, random_share=0.25, round_number=number).rows
        assert set(range(170, 200)) <= set(rows.tolist())
        drawn[rows] += 1
    assert not drawn[170:].std()
    assert drawn[:170].sum() == 3_000
    assert drawn[:170].min() > 2  # of 17.6 each
    assert drawn[:170].max() < 40
    plain = select(influence, 40, None, None)
    assert plain.num_random == 0
    assert select(influence, 40, None, None, random_share=0.01).rows.tolist() == plain.rows.tolist()  # rounds to none
    with pytest.raises(ValueError, match=r"`random_share` must be in \[0, 1\], got 1.5"):
        select(influence, 40, None, None, random_share=1.5)


def test_a_limit_needs_a_hash_of_each_candidate():
    with pytest.raises(ValueError, match=r"`hashes` must have one entry a candidate \(2\).*got none"):
        select([1, 2], 1, None, 1)
    with pytest.raises(ValueError, match="got 3"):
        select([1, 2], 1, [1, 2, 3], None)
