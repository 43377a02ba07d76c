"""The cut through scores in parts keeps what `keep_rows` keeps of all, whatever the division."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.errors import InfluenceError
from mates_hf.prediction.score import Predictions
from mates_hf.selection import cut as cut_module
from mates_hf.selection.budget import Budget, keep_rows
from mates_hf.selection.cut import Cut, find_cut
from mates_hf.selection.prefix import SCALE, PieceScores, exact_sum, mixed


def scores_of(num: int, seed: int = 0, *, longest: int = 40, copies: int = 1) -> PieceScores:
    rng = np.random.default_rng(seed)
    influence = rng.standard_t(3, num).astype(np.float32)
    num_targets = rng.integers(0, longest, num).astype(np.int32)
    content = rng.integers(0, 2**63, num).astype(np.uint64)
    which = np.arange(num) // copies * copies
    return PieceScores(influence[which], num_targets[which], content[which])


def divided(scores: PieceScores, at: list[int]) -> list[Callable[[], PieceScores]]:
    bounds = [0, *sorted(at), len(scores.influence)]
    spans = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return [lambda span=span: PieceScores(*(array[span] for array in scores)) for span in spans]  # type: ignore[misc]


def kept_by(cut: Cut, pieces: list[Callable[[], PieceScores]]) -> np.ndarray:
    masks = [cut.mask(number, read()) for number, read in enumerate(pieces)]
    kept = np.flatnonzero(np.concatenate(masks))
    assert cut.num_kept == len(kept)
    return kept


BUDGETS = st.one_of(
    st.builds(lambda ratio: Budget(ratio=ratio), st.floats(0.01, 1)),
    st.builds(lambda k: Budget(k=k), st.integers(0, 200)),
    st.builds(lambda num: Budget(num_tokens=num), st.integers(0, 5000)),
    st.builds(lambda least: Budget(threshold=least), st.floats(-3, 3)),
)


@settings(max_examples=150, deadline=None)
@given(budget=BUDGETS, seed=st.integers(0, 50), at=st.lists(st.integers(0, 200), max_size=6))
def test_a_cut_keeps_what_one_machine_keeps(budget: Budget, seed: int, at: list[int]) -> None:
    scores = scores_of(200, seed)
    pieces = divided(scores, at)
    kept = kept_by(find_cut(pieces, budget), pieces)
    wanted = keep_rows(Predictions(scores.influence, scores.num_targets), budget, 1.0)
    untrained = scores.num_targets == 0  # which of those fill a budget up is not the same, and nothing depends on it
    assert len(kept) == len(wanted)
    assert kept[~untrained[kept]].tolist() == wanted[~untrained[wanted]].tolist()


def test_the_best_are_kept_and_not_the_worst() -> None:
    scores = PieceScores(np.array([-1, 3, 2, -5], np.float32), np.full(4, 7, np.int32), np.arange(4, dtype=np.uint64))
    for budget in (Budget(k=2), Budget(num_tokens=14), Budget(threshold=2)):
        assert kept_by(find_cut([lambda: scores], budget), [lambda: scores]).tolist() == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 20),
    at=st.lists(st.integers(0, 300), max_size=5),
    copies=st.sampled_from([1, 3, 100, 300]),
    budget=st.sampled_from([{"k": 61}, {"ratio": 0.2}, {"num_tokens": 900}]),
    options=st.sampled_from([{}, {"random_share": 0.3}, {"temperature": 1.0}, {"random_share": 0.5, "seed": 3}]),
)
def test_equals_are_kept_alike_by_every_division(
    seed: int, at: list[int], copies: int, budget: dict[str, float], options: dict[str, float]
) -> None:
    scores = scores_of(300, seed, copies=copies)
    asked = Budget(**budget, **options)  # type: ignore[arg-type]
    whole, parts = divided(scores, []), divided(scores, at)
    one, many = find_cut(whole, asked, 1.0), find_cut(parts, asked, 1.0)
    assert kept_by(one, whole).tolist() == kept_by(many, parts).tolist()
    assert (one.num_kept, one.num_tokens_kept, one.threshold) == (many.num_kept, many.num_tokens_kept, many.threshold)
    if "num_tokens" in budget:
        assert many.num_tokens_kept <= 900
    else:
        assert many.num_kept == (61 if "k" in budget else 60)


def test_another_order_of_rows_keeps_the_same_texts() -> None:
    scores = scores_of(500, copies=1)
    scores.influence[:] = np.round(scores.influence)  # many rows of equal influence and length
    scores.num_targets[:] = 5
    order = np.random.default_rng(1).permutation(500)
    moved = PieceScores(*(array[order] for array in scores))
    for options in ({}, {"random_share": 0.4}, {"temperature": 0.5}):
        found = []
        for one in (scores, moved):
            pieces = divided(one, [100, 400])
            found.append(set(one.content[kept_by(find_cut(pieces, Budget(k=123, **options), 1.0), pieces)].tolist()))
        assert found[0] == found[1]
        assert len(found[0]) == 123


def test_random_share_is_random_and_the_rest_is_the_best() -> None:
    scores = scores_of(4000)
    scores.num_targets[:] = 5
    pieces = divided(scores, [1000, 2000])
    kept = kept_by(find_cut(pieces, Budget(ratio=0.25, random_share=0.3)), pieces)
    best = np.argsort(-scores.influence)[:700]
    assert set(best.tolist()) <= set(kept.tolist())
    others = np.setdiff1d(kept, best)
    rest = np.setdiff1d(np.arange(4000), best)
    assert len(others) == 300
    assert abs(scores.influence[others].mean() - scores.influence[rest].mean()) < 0.15
    other_seed = kept_by(find_cut(pieces, Budget(ratio=0.25, random_share=0.3, seed=1)), pieces)
    assert set(other_seed.tolist()) != set(kept.tolist())


def test_temperature_moves_choices_as_far_as_labels_spread() -> None:
    scores = scores_of(4000)
    scores.num_targets[:] = 5
    pieces = divided(scores, [1500])
    sizes = []
    for temperature in (0.01, 1.0, 100.0):
        kept = kept_by(find_cut(pieces, Budget(k=400, temperature=temperature), 1.0), pieces)
        sizes.append(len(np.intersect1d(kept, np.argsort(-scores.influence)[:400])))
    assert sizes[0] > 380
    assert 100 < sizes[1] < sizes[0]
    assert sizes[2] < 80  # a tenth, by chance


@pytest.mark.parametrize("looked_at", [3, 2**20])
def test_what_is_left_of_tokens_is_filled_as_one_machine_fills_it(
    monkeypatch: pytest.MonkeyPatch, looked_at: int
) -> None:
    monkeypatch.setattr(cut_module, "_LOOKED_AT", looked_at)
    scores = scores_of(200, 5, longest=900)
    pieces = divided(scores, [20, 90])
    for num_tokens in (0, 1, 10, 700, 5000, 40_000, 10**6):
        budget = Budget(num_tokens=num_tokens)
        kept = kept_by(find_cut(pieces, budget), pieces)
        assert kept.tolist() == keep_rows(Predictions(*scores[:2]), budget, 1.0).tolist()


def test_random_tokens_are_drawn_even_where_one_text_is_longer_than_they_are() -> None:
    scores = scores_of(2000, longest=50)
    scores.num_targets[::7] = 100_000
    pieces = divided(scores, [900])
    cut = find_cut(pieces, Budget(num_tokens=10_000, random_share=0.5))
    assert 9_950 <= cut.num_tokens_kept <= 10_000
    kept = kept_by(cut, pieces)
    assert scores.num_targets[kept].sum() == cut.num_tokens_kept


def test_nothing_in_and_more_asked_than_there_is() -> None:
    none: list[Callable[[], PieceScores]] = []
    assert find_cut(none, Budget(ratio=0.5)).num_kept == 0
    assert find_cut(divided(scores_of(0), []), Budget(num_tokens=5)).num_kept == 0
    with pytest.raises(ValueError, match=r"`k` must be at most the number of rows \(9\), got 10"):
        find_cut(divided(scores_of(9), [4]), Budget(k=10))
    with pytest.raises(ValueError, match=r"Use `temperature=0`"):
        find_cut(divided(scores_of(9), [4]), Budget(k=3, temperature=1.0))
    broken = scores_of(9)
    broken.influence[3] = math.nan
    with pytest.raises(InfluenceError, match="that of piece 1 is not"):
        find_cut(divided(broken, [2]), Budget(k=3))


def test_all_untrained_rows_fill_a_row_budget_only() -> None:
    scores = scores_of(50)
    scores.num_targets[5:] = 0
    pieces = divided(scores, [25])
    trained = np.flatnonzero(scores.num_targets).tolist()
    kept = kept_by(find_cut(pieces, Budget(k=20, random_share=0.2)), pieces).tolist()
    assert len(kept) == 20
    assert set(trained) <= set(kept)
    assert kept_by(find_cut(pieces, Budget(num_tokens=10**6)), pieces).tolist() == trained


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30),
    factor=st.integers(0, 2**28),
)
def test_exact_sums_are_exact(values: list[float], factor: int) -> None:
    array = np.array(values, np.float64) * factor
    assert Fraction(exact_sum(array), 2**SCALE) == sum(map(Fraction, array.tolist()), Fraction(0))


def test_mixed_numbers_are_uniform_and_apart() -> None:
    content = np.arange(100_000, dtype=np.uint64)
    one, two = mixed(content, 0), mixed(content, 1)
    uniform = one / 2.0**64
    assert abs(uniform.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(uniform, two / 2.0**64)[0, 1]) < 0.01
    assert abs(np.corrcoef(uniform, mixed(content, 0, 7) / 2.0**64)[0, 1]) < 0.01
