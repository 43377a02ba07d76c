"""Choosing: Plackett-Luce by brute force, exact top-k, ties, seeds, and what a row is worth in a batch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mates_hf.errors import InfluenceError
from mates_hf.prediction import worth
from mates_hf.prediction.worth import row_worth
from mates_hf.records import InfluenceLabels
from mates_hf.selection import choose
from mates_hf.selection.choose import even_places, gumbel_top_k, top_k, uniform
from mates_hf.selection.select_stage import select_rows

NUM_SEEDS = 4_000
# Standard error of a share over NUM_SEEDS draws is at most 0.5 / sqrt(4000) = 0.0079; four of them.
SHARE_TOLERANCE = 4 * 0.5 / math.sqrt(NUM_SEEDS)

finite_arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64]),
    st.integers(0, 60),
    elements=st.integers(-4, 4),  # few values, so that ties are the rule
)


def plackett_luce(weights: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """Probability of each set of k, by going through all orders in which it can be drawn."""
    shares: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), k):
        share, left = 1.0, float(weights.sum())
        for i in order:
            share *= weights[i] / left
            left -= weights[i]
        key = tuple(sorted(order))
        shares[key] = shares.get(key, 0.0) + share
    return shares


@pytest.mark.parametrize(("temperature", "dtype"), [(0.5, np.float32), (2.0, np.float64)])
def test_sets_are_drawn_with_plackett_luce_probabilities(temperature, dtype):
    influence = np.array([0.4, -0.3, 1.1, 0.0], dtype)
    expected = plackett_luce(np.exp(influence.astype(float) / temperature), 2)
    counts = dict.fromkeys(expected, 0)
    for seed in range(NUM_SEEDS):
        counts[tuple(gumbel_top_k(influence, 2, temperature, seed).tolist())] += 1
    for chosen, probability in expected.items():
        assert counts[chosen] / NUM_SEEDS == pytest.approx(probability, abs=SHARE_TOLERANCE), chosen
    assert max(counts, key=counts.get) == (0, 2)  # the two that help most: the other tail would give (1, 3)


@pytest.mark.parametrize("offset", [2**17, -(2**17)])
def test_a_common_offset_changes_no_choice_in_float32(offset):
    influence = (np.arange(-500, 500) / 64).astype(np.float32)  # exact in float32, also with the offset
    for seed in range(20):
        expected = gumbel_top_k(influence, 200, 0.5, seed)
        np.testing.assert_array_equal(gumbel_top_k(influence + np.float32(offset), 200, 0.5, seed), expected)


@pytest.mark.parametrize("unit", [1e-9, 1e-3, 1e6])
def test_temperature_is_in_the_unit_of_influence(unit):
    influence = np.random.default_rng(0).normal(size=200)
    for seed in range(10):
        expected = gumbel_top_k(influence, 40, 0.7, seed)
        np.testing.assert_array_equal(gumbel_top_k(influence * unit, 40, 0.7 * unit, seed), expected)


@pytest.mark.parametrize("unit", [1e-3, 1.0])
def test_without_a_temperature_it_is_the_top_k_in_any_unit(unit):
    influence = np.random.default_rng(2).normal(2, 1, 10_000) * unit
    expected = np.sort(np.argsort(-influence)[:2_000])
    for chosen in (gumbel_top_k(influence, 2_000), gumbel_top_k(torch.tensor(influence, requires_grad=True), 2_000)):
        assert chosen.dtype == np.int64
        np.testing.assert_array_equal(chosen, expected)
    assert gumbel_top_k(torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], "1"), "`k` must be a whole number"),
        (([1.0, 2.0], 1.0), "`k` must be a whole number"),
        (([1.0, 2.0], 0.5), "share"),
        (([1.0, 2.0], True), "`k` must be a whole number"),
        (([1.0, 2.0], None), "`k` must be a whole number"),
        (([1.0, 2.0], 1, "0.5"), "`temperature` must be a number"),
        (([1.0, 2.0], 1, None), "`temperature` must be a number"),
        (([1.0, 2.0], 1, 0.0, 1.5), "`seed` must be a whole number"),
        (([1.0, 2.0], 1, 0.5, None), "`seed` must be a whole number"),
        (([1.0, 2.0], 1, 0.5, ()), "`seed` must be a whole number"),
        (([[1.0], [1.0, 2.0]], 1), "one number a candidate"),
        ((["a", "b"], 1), "real numbers"),
        (([1 + 2j], 1), "real numbers"),
        (([True, False], 1), "real numbers"),
        (([None, 1.0], 1), "real numbers"),
        ((None, 1), "one-dimensional"),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        gumbel_top_k(*arguments)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("seed", [-1, (1, -2)])
def test_a_negative_seed_is_refused_with_and_without_noise(temperature, seed):
    with pytest.raises(ValueError, match="`seed` must be at least 0"):
        gumbel_top_k([1.0, 2.0], 1, temperature, seed)
    with pytest.raises(ValueError, match="`seed` must be at least 0"):
        uniform(3, 1, seed)


def test_labels_instead_of_an_array_are_refused_with_both_ways_out():
    with pytest.raises(TypeError, match=r"got InfluenceLabels\. Pass `labels\.influence`"):
        gumbel_top_k(probed([1.0, 2.0], [3, 4]), 1)


def test_mean_influence_of_the_choice_falls_from_top_k_to_uniform_as_temperature_grows():
    influence = np.random.default_rng(1).normal(size=2_000).astype(np.float32)
    means = [influence[gumbel_top_k(influence, 400, t, 3)].mean() for t in (0.0, 0.3, 1.0, 3.0, 1e30)]
    assert all(high > low for high, low in itertools.pairwise(means))
    assert abs(means[-1]) < 4 / math.sqrt(400)  # four standard errors of a mean of 400 standard normals


@settings(max_examples=150, deadline=None)
@given(finite_arrays, st.data())
def test_choices_are_sorted_distinct_and_exact_at_temperature_0(influence, data):
    k = data.draw(st.integers(0, len(influence)))
    seed = data.draw(st.integers(0, 2**40))
    before = influence.copy()
    best = np.sort(influence)[len(influence) - k :]
    for chosen in (top_k(influence, k, seed), gumbel_top_k(influence, k, 0, seed)):
        np.testing.assert_array_equal(np.sort(influence[chosen]), best)
    for chosen in (top_k(influence, k, seed), gumbel_top_k(influence, k, 1.5, seed), uniform(len(influence), k, seed)):
        assert chosen.dtype == np.int64
        assert chosen.shape == (k,)
        assert np.all(np.diff(chosen) > 0)
        assert k == 0 or (chosen[0] >= 0 and chosen[-1] < len(influence))
    np.testing.assert_array_equal(influence, before)


def test_all_candidates_are_ranked_as_the_choices_of_each_size():
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=200).astype(np.float32), np.arange(50)):
        for temperature in (0.0, 0.5):
            order = choose.ranked(values, temperature, seed=3)
            assert sorted(order) == list(range(len(values)))
            for k in (0, 1, 17, len(values)):
                assert sorted(order[:k]) == gumbel_top_k(values, k, temperature, seed=3).tolist()
    assert choose.ranked(np.zeros(0)).tolist() == []
    firsts = {int(choose.ranked(np.zeros(8), seed=seed)[0]) for seed in range(100)}
    assert firsts == set(range(8))
    with pytest.raises(InfluenceError, match="must be finite"):
        choose.ranked([1.0, math.nan])


def test_ties_are_broken_at_random_and_not_by_position():
    influence = np.array([0.0, 1.0, 1.0, 1.0, 1.0, 2.0], np.float32)
    counts = np.zeros(6)
    for seed in range(NUM_SEEDS):
        counts[top_k(influence, 3, seed)] += 1
    assert counts[0] == 0
    assert counts[5] == NUM_SEEDS
    np.testing.assert_allclose(counts[1:5] / NUM_SEEDS, 0.5, atol=SHARE_TOLERANCE)


def test_uniform_includes_every_candidate_equally_often():
    counts = np.zeros(5)
    for seed in range(NUM_SEEDS):
        counts[uniform(5, 2, seed)] += 1
    np.testing.assert_allclose(counts / NUM_SEEDS, 0.4, atol=SHARE_TOLERANCE)


@pytest.mark.parametrize("pick", [lambda s: gumbel_top_k(np.zeros(500), 50, 1.0, s), lambda s: uniform(500, 50, s)])
def test_a_seed_repeats_its_choice_and_another_makes_another(pick):
    np.testing.assert_array_equal(pick(7), pick(7))
    seeds = [0, 7, 8, (7, 1), (7, 2), 2**40]
    assert len({tuple(pick(seed)) for seed in seeds}) == len(seeds)


def test_noise_is_not_drawn_from_the_global_generator():
    np.random.seed(0)  # noqa: NPY002  (the state of the caller's legacy generator is the subject)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    gumbel_top_k(np.zeros(100), 10, 1.0, 0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_noise_of_a_position_does_not_depend_on_the_candidates_after_it(monkeypatch):
    monkeypatch.setattr(choose, "BLOCK", 64)
    influence = np.zeros(1_000)
    longer = np.concatenate([influence, np.full(333, -1e6)])  # never chosen, so the choice shows the noise of the rest
    for seed in range(5):
        np.testing.assert_array_equal(gumbel_top_k(influence, 100, 1.0, seed), gumbel_top_k(longer, 100, 1.0, seed))
    # Blocks have noise of their own: with one noise for all, the choice would repeat from block to block.
    chosen = gumbel_top_k(influence[:128], 64, 1.0, 0)
    assert set(chosen[chosen < 64].tolist()) != set((chosen[chosen >= 64] - 64).tolist())


def test_no_candidates_and_none_chosen():
    empty = np.zeros(0, np.float32)
    for chosen in (gumbel_top_k(empty, 0), top_k(empty, 0), uniform(0, 0), gumbel_top_k([1.0, 2.0], 0)):
        assert chosen.shape == (0,)
        assert chosen.dtype == np.int64
    np.testing.assert_array_equal(gumbel_top_k([3.0, 1.0], 2), [0, 1])


@pytest.mark.parametrize("extreme", [1e38, -1e38])
@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 1.0, 1e300])
def test_extreme_values_and_temperatures_stay_ordered(extreme, temperature):
    influence = np.array([0.0, extreme, 0.0, extreme], np.float32)
    with np.errstate(all="raise", under="ignore", over="ignore"):
        chosen = gumbel_top_k(influence, 2, temperature, 0)
    if temperature < 1e300:  # there the noise is larger than any influence
        np.testing.assert_array_equal(chosen, [1, 3] if extreme > 0 else [0, 2])


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range_is_refused_with_both_numbers(k):
    for pick in (lambda: gumbel_top_k([1, 2, 3], k), lambda: top_k([1, 2, 3], k), lambda: uniform(3, k)):
        with pytest.raises(ValueError, match=rf"`k` must be from 0 to the number of candidates \(3\), got {k}"):
            pick()


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(ValueError, match="`temperature` must be a finite number of at least 0, got"):
        gumbel_top_k([1.0], 1, temperature)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pick", [gumbel_top_k, top_k])
def test_influence_that_is_not_finite_is_refused_by_position(monkeypatch, bad, pick):
    monkeypatch.setattr(choose, "BLOCK", 4)
    influence = np.arange(20, dtype=np.float32)
    influence[[3, 17]] = bad
    with pytest.raises(InfluenceError, match=rf"2 of 20 candidates are not, first at position 3 \({bad}\), 17"):
        pick(influence, 5)


def test_influence_of_another_shape_or_type_is_refused():
    with pytest.raises(ValueError, match=r"one-dimensional.*\(2, 2\)"):
        top_k(np.zeros((2, 2)), 1)
    with pytest.raises(TypeError, match="real numbers, got dtype bool"):
        top_k(np.zeros(2, bool), 1)


def test_row_worth_is_what_one_more_row_changes_in_a_token_weighted_batch():
    generator = np.random.default_rng(2)
    num_tokens = generator.integers(1, 129, 3_000)
    influence = generator.normal(0.3, 1.0, 3_000)
    total, mean = num_tokens.sum(), np.average(influence, weights=num_tokens)
    batch_with_row = np.array(
        [
            np.average(np.append(influence, d), weights=np.append(num_tokens, n))
            for d, n in zip(influence[:200], num_tokens[:200], strict=True)
        ]
    )
    worth = row_worth(influence, num_tokens)
    # One row of at most 128 tokens in a batch of 190,000: the dropped term is of relative size n / T < 1e-3.
    np.testing.assert_allclose(worth[:200] / total, batch_with_row - mean, rtol=1e-3)
    np.testing.assert_array_equal(np.argsort(worth[:200]), np.argsort(batch_with_row - mean))


def test_row_worth_sums_to_zero_and_ranks_like_influence_at_one_length():
    generator = np.random.default_rng(3)
    influence = generator.normal(2.0, 1.0, 500)
    assert row_worth(influence, generator.integers(0, 99, 500)).sum() == pytest.approx(0, abs=1e-9)
    np.testing.assert_array_equal(np.argsort(row_worth(influence, np.full(500, 64))), np.argsort(influence))


def test_row_worth_of_a_longer_row_is_further_from_zero_in_its_own_direction():
    worth = row_worth(np.array([1.0, 1.0, -1.0, -1.0, 0.5], np.float32), np.array([10, 20, 10, 20, 0]))
    assert worth.dtype == np.float32
    np.testing.assert_allclose(worth, [10, 20, -10, -20, 0])


def test_row_worth_without_tokens_or_rows_is_zero():
    np.testing.assert_array_equal(row_worth([1.0, 2.0], [0, 0]), [0, 0])
    assert row_worth(np.zeros(0, np.float32), np.zeros(0, int)).shape == (0,)
    assert np.isnan(row_worth([np.nan, 1.0], [1, 1])).all()  # kept, for the choice to refuse


def test_row_worth_refuses_what_does_not_belong_together():
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(3,\)"):
        row_worth([1.0, 2.0], [1, 2, 3])
    with pytest.raises(ValueError, match="at least 0, got -3 at position 1"):
        row_worth([1.0, 2.0], [1, -3])


def probed(influence_per_token, num_tokens, step_size=0.5) -> InfluenceLabels:
    per_token = np.asarray(influence_per_token, np.float32)
    return InfluenceLabels(
        candidate_id=np.arange(1_000, 1_000 + len(per_token)),
        influence=per_token * np.float32(step_size),
        influence_per_token=per_token,
        loss=np.ones(len(per_token), np.float32),
        num_tokens=np.asarray(num_tokens, np.int32),
        probe=np.array(["directional"] * len(per_token)),
        step_size=step_size,
    )


def select(influence, num_targets, k, labels, *, temperature=0.0, seed=0, number=1) -> np.ndarray:
    candidates = 100 + 7 * np.arange(len(influence))
    selected = select_rows(
        candidates,
        np.asarray(influence, np.float32),
        np.asarray(num_targets, np.int32),
        labels,
        k,
        temperature=temperature,
        selection_seed=seed,
        round_number=number,
    )
    assert (selected.num_repeated, selected.num_passed_over) == (0, 0)  # nothing is known of copies here
    return selected.rows


def test_selected_rows_are_those_a_batch_gains_most_from_and_rows_without_a_target_come_last():
    labels = probed([-1, 1, 2], [4, 4, 4])
    influence, num_targets = [1.0, 0.9, -3.0, 50.0, 0.0], [2, 30, 9, 0, 20]
    # In the labels' derivatives: 2, 1.8, -6 and 0, their mean over 61 tokens is 4/61; times tokens, row 1 gains most.
    assert select(influence, num_targets, 1, labels).tolist() == [107]
    assert set(select(influence, num_targets, 2, labels)) == {107, 100}
    assert set(select(influence, num_targets, 4, labels)) == {107, 100, 128, 114}
    assert set(select(influence, num_targets, 5, labels)) == {107, 100, 128, 114, 121}


def test_the_temperature_of_a_selection_is_in_standard_deviations_of_the_labels():
    rng = np.random.default_rng(0)
    influence, tokens, per_token = rng.normal(size=200), np.full(200, 8), rng.normal(size=50)
    plain = select(influence, tokens, 20, probed(per_token, [8] * 50, step_size=1.0), temperature=0.5)
    # Everything in another unit: nothing changes.
    scaled = select(influence * 0.25, tokens, 20, probed(per_token * 0.25, [8] * 50, step_size=1.0), temperature=0.5)
    assert plain.tolist() == scaled.tolist()
    # The step size turns influence into derivatives, the labels' own unit.
    halved = select(influence * 0.25, tokens, 20, probed(per_token, [8] * 50, step_size=0.25), temperature=0.5)
    assert plain.tolist() == halved.tolist()
    assert set(plain) != set(
        select(influence, tokens, 20, probed(per_token * 9, [8] * 50, step_size=1.0), temperature=1)
    )


def test_training_order_and_noise_depend_on_seed_and_round():
    influence, tokens = np.random.default_rng(0).normal(size=300), np.full(300, 8)
    labels = probed([-1, 1, 2], [4, 4, 4])
    first = select(influence, tokens, 30, labels)
    assert first.tolist() == select(influence, tokens, 30, labels).tolist()
    assert first.tolist() != sorted(first.tolist())
    for other in (select(influence, tokens, 30, labels, number=2), select(influence, tokens, 30, labels, seed=1)):
        assert set(other) == set(first)
        assert other.tolist() != first.tolist()
    noisy = [set(select(influence, tokens, 30, labels, temperature=2.0, number=number)) for number in (1, 2)]
    assert noisy[0] != noisy[1]


def test_a_selection_from_what_ranks_nothing_is_refused():
    labels = probed([-1, 1, 2], [4, 4, 4])
    with pytest.raises(InfluenceError, match=r"1 of 3 candidates is not, first candidate_id \[107\]"):
        select([1, np.nan, 2], [4, 4, 4], 1, labels)
    with pytest.raises(InfluenceError, match="must be a finite number above 0, got 0.0"):
        select([1, 2, 3], [4, 4, 4], 1, probed([2, 2, 2], [4, 4, 4]))
    with pytest.raises(ValueError, match="got 3, 3 and 2 for 1 rows"):
        select([1, 2, 3], [4, 4], 1, labels)
    with pytest.raises(ValueError, match="got 3, 3 and 3 for 4 rows"):
        select([1, 2, 3], [4, 4, 4], 4, labels)


@settings(max_examples=200, deadline=None)
@given(finite_arrays.filter(len), st.data())
def test_the_kth_largest_in_blocks_is_the_one_of_the_sorted_whole(values, data):
    k = data.draw(st.integers(1, len(values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "BLOCK", data.draw(st.integers(1, 8)))
        assert choose._kth_largest(values, k) == np.sort(values)[len(values) - k]


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.bool_, st.integers(0, 60)), st.data())
def test_numbers_of_true_entries_are_where_a_list_of_all_would_have_them(mask, data):
    where = np.flatnonzero(mask)
    which = np.array(data.draw(st.lists(st.integers(0, len(where) - 1)) if len(where) else st.just([])), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "BLOCK", data.draw(st.integers(1, 8)))
        assert np.array_equal(choose.nth_true(mask, which), where[which])


def test_worth_in_blocks_is_the_worth(monkeypatch):
    rng = np.random.default_rng(0)
    influence, num = rng.normal(size=1000).astype(np.float32), rng.integers(0, 50, 1000)
    whole = row_worth(influence, num)
    monkeypatch.setattr(worth, "BLOCK", 7)
    assert np.allclose(row_worth(influence, num), whole, rtol=1e-6, atol=0)


def test_each_group_has_its_share_and_each_row_its_chance():
    codes = np.random.default_rng(0).choice(4, 500, p=[0.7, 0.2, 0.09, 0.01])
    counts, rows = np.zeros(4), np.zeros(500)
    for seed in range(2_000):
        places = even_places(codes, 60, np.random.default_rng(seed))
        assert len(np.unique(places)) == 60
        found = np.bincount(codes[places], minlength=4)
        fair = 60 * np.bincount(codes) / 500
        assert (np.floor(fair - 1e-9) <= found).all()
        assert (found <= np.ceil(fair + 1e-9)).all()
        counts += found / 2_000
        rows[places] += 1 / 2_000
    assert counts == pytest.approx(fair, abs=0.05)
    assert rows == pytest.approx(np.full(500, 0.12), abs=0.04)  # five standard deviations
    assert even_places(codes[:7], 7, np.random.default_rng(0)).tolist() == list(range(7))
