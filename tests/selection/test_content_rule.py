"""A cut as a rule on what rows say: as many rows of each text as the cut keeps, wherever they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.selection.budget import Budget
from mates_hf.selection.content_rule import content_rule
from mates_hf.selection.cut import find_cut
from mates_hf.selection.prefix import PieceScores


class Elsewhere(list):
    """Pieces that functions are sent to, as a cluster has them; in two groups, of which the second comes first."""

    def each(self, function: Callable[[int, PieceScores], Any]) -> Iterator[Any]:
        half = len(self) // 2
        later = [function(i, self[i]()) for i in range(half, len(self))]
        return iter([*(function(i, self[i]()) for i in range(half)), *later])


def scores_of(texts: np.ndarray, seed: int) -> PieceScores:
    """Scores of rows that say one of 2**16 texts each; equal texts have equal scores."""
    rng = np.random.default_rng(seed)
    influence = rng.normal(size=2**16).astype(np.float32)
    num_targets = rng.integers(0, 6, 2**16).astype(np.int32)
    content = rng.permutation(2**16).astype(np.uint64) << np.uint64(40)
    return PieceScores(influence[texts], num_targets[texts], content[texts])


def division(scores: PieceScores, borders: list[int]) -> list[Callable[[], PieceScores]]:
    cuts = [0, *sorted(borders), len(scores.content)]
    parts = [PieceScores(*(column[a:b] for column in scores)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return [lambda part=part: part for part in parts]


BUDGETS = st.one_of(
    st.builds(dict, k=st.integers(0, 60)),
    st.builds(dict, num_tokens=st.integers(0, 200)),
    st.builds(dict, k=st.integers(0, 60), random_share=st.sampled_from([0.3, 0.7])),
    st.builds(dict, num_tokens=st.integers(0, 200), random_share=st.sampled_from([0.3, 0.7])),
    st.builds(dict, threshold=st.sampled_from([-0.5, 0.0, 0.7])),
)


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(st.integers(0, 12), min_size=60, max_size=90),
    borders=st.lists(st.integers(0, 60), max_size=4),
    budget=BUDGETS,
    seed=st.integers(0, 5),
)
def test_the_rule_keeps_of_each_text_what_the_cut_keeps(
    texts: list[int], borders: list[int], budget: dict[str, Any], seed: int
) -> None:
    scores = scores_of(np.array(texts), seed)
    pieces = division(scores, borders)
    cut = find_cut(pieces, Budget(**budget, seed=seed))
    rule = content_rule(cut, pieces)
    kept = np.concatenate([cut.mask(i, read()) for i, read in enumerate(pieces)])
    mask = rule.mask(scores)
    found = Counter(scores.content[mask].tolist()) + Counter(rule.some)
    assert found == Counter(scores.content[kept].tolist())
    assert not np.isin(scores.content[mask], np.array(list(rule.some), np.uint64)).any()
    elsewhere = Elsewhere(pieces)
    there = find_cut(elsewhere, Budget(**budget, seed=seed))
    assert repr(there) == repr(cut)
    again = content_rule(there, elsewhere)
    assert np.array_equal(again.mask(scores), mask)
    assert again.some == rule.some


def test_no_row_at_all_and_no_copy() -> None:
    nothing = division(scores_of(np.zeros(0, np.int64), 0), [])
    rule = content_rule(find_cut(nothing, Budget(ratio=0.5)), nothing)
    assert not rule.some
    scores = scores_of(np.arange(500), 0)
    pieces = division(scores, [100, 101, 400])
    rule = content_rule(find_cut(pieces, Budget(k=123)), pieces)
    assert not rule.some
    assert rule.mask(scores).sum() == 123


def test_a_text_with_more_copies_than_fit_is_kept_as_often_as_fits() -> None:
    scores = scores_of(np.repeat(np.arange(3), 50), 1)
    order = np.random.default_rng(0).permutation(150)
    pieces = division(PieceScores(*(column[order] for column in scores)), [40, 80])
    rule = content_rule(find_cut(pieces, Budget(k=70)), pieces)
    assert sorted(rule.some.values()) == [20]
    assert rule.mask(scores).sum() == 50


@pytest.mark.parametrize("num_tokens", [7, 61, 333])
def test_copies_that_fit_into_what_is_left_of_a_budget_of_tokens(num_tokens: int) -> None:
    scores = scores_of(np.repeat(np.arange(200), 3), 2)
    pieces = division(scores, [100, 300])
    cut = find_cut(pieces, Budget(num_tokens=num_tokens))
    rule = content_rule(cut, pieces)
    assert rule.mask(scores).sum() + sum(rule.some.values()) == cut.num_kept
