from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.data.scored_column import SPAN_TARGETS
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.prediction.score import Predictions
from mates_hf.prediction.worth import row_worth
from mates_hf.selection.budget import Budget, keep_rows, temperature_unit
from mates_hf.selection.result import Selection
from mates_hf.selection.selector import MatesSelector
from tests.selection.selector_kit import BAD, GOOD, MeanId, fit_model, make_lists

FLOAT32 = 1e-5  # means of some dozen float32 effects


@pytest.fixture(scope="module")
def fitted() -> NgramInfluenceModel:
    return fit_model()


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    lists = make_lists(60, seed=5, longest=90)
    return Dataset.from_dict({"input_ids": [*lists, [], [4]], "id": list(range(62))})


@pytest.fixture(scope="module")
def selection(fitted: NgramInfluenceModel, dataset: Dataset) -> Selection:
    found = MatesSelector(fitted).select(dataset, ratio=0.25)
    assert isinstance(found, Selection)
    return found


# --- budgets against brute force ---


def made(influence: list[float], num_targets: list[int]) -> Predictions:
    return Predictions(np.array(influence, np.float32), np.array(num_targets, np.int32))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_budgets_keep_the_best(data: st.DataObject) -> None:
    """Every set of the allowed size, by brute force: none is worth more."""
    num = data.draw(st.integers(1, 7))
    influence = data.draw(st.lists(st.integers(-20, 20), min_size=num, max_size=num, unique=True))
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=num, max_size=num))
    scored = made([float(x) for x in influence], lengths)
    k = data.draw(st.integers(0, num))
    trained = [i for i in range(num) if lengths[i]]
    kept = keep_rows(scored, Budget(k=k), math.nan).tolist()
    assert len(kept) == k
    assert kept == sorted(set(kept))
    worth = row_worth(scored.influence, scored.num_targets).astype(np.float64)
    size = min(k, len(trained))
    best = max(sum(worth[list(rows)]) for rows in itertools.combinations(trained, size))
    assert sum(worth[[i for i in kept if lengths[i]]]) == pytest.approx(best, abs=1e-3)
    assert sum(1 for i in kept if lengths[i]) == size  # rows without targets come last

    budget = data.draw(st.integers(0, 20))
    kept = keep_rows(scored, Budget(num_tokens=budget), math.nan).tolist()
    order = sorted(trained, key=lambda i: -influence[i])
    left, expected = budget, []
    for i in order:  # a row that does not fit is skipped
        if lengths[i] <= left:
            left -= lengths[i]
            expected.append(i)
    assert kept == sorted(expected)

    threshold = data.draw(st.integers(-20, 20))
    kept = keep_rows(scored, Budget(threshold=threshold), math.nan).tolist()
    assert kept == [i for i in range(num) if influence[i] >= threshold]


def test_a_long_row_counts_more_where_rows_are_counted() -> None:
    scored = made([2.0, 1.5, 0.0, -1.0], [2, 40, 10, 30])
    assert keep_rows(scored, Budget(k=1), math.nan).tolist() == [1]
    assert keep_rows(scored, Budget(num_tokens=2), math.nan).tolist() == [0]


def test_a_row_too_long_for_a_token_budget_does_not_end_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    giant = Dataset.from_dict({"input_ids": [[9] * 5000, [8, 8, 8], [7, 7, 7]], "id": [0, 1, 2]})
    selector = MatesSelector(MeanId())
    assert selector.filter(giant, num_tokens=4)["id"][:] == [1, 2]
    assert not caplog.records  # the budget is used
    assert selector.filter(giant, num_tokens=100)["id"][:] == [1, 2]
    assert len(caplog.records) == 1
    said = "`num_tokens=100` keeps 4 tokens in 2 rows, 4 % of the budget.*row 0, with 4999 trained tokens"
    assert re.search(said, caplog.text)
    caplog.clear()
    assert len(selector.filter(giant, num_tokens=1)) == 0
    assert "keeps 0 tokens in 0 rows" in caplog.text
    caplog.clear()
    assert len(selector.filter(giant, num_tokens=10_000)) == 3  # less than is asked for is there: nothing was skipped
    assert len(selector.filter(giant, num_tokens=0)) == 0
    assert not caplog.records


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_ties_fill_a_token_budget_and_stand_in_one_order(temperature: float) -> None:
    targets = np.random.default_rng(0).integers(2, 50, 1000).astype(np.int32)
    targets[:5] = 5000
    tied = Predictions(np.zeros(1000, np.float32), targets)
    chosen = [keep_rows(tied, Budget(num_tokens=12_000, temperature=temperature, seed=s), 1.0) for s in range(5)]
    assert all(11_000 < targets[rows].sum() <= 12_000 for rows in chosen)
    assert len({tuple(rows.tolist()) for rows in chosen}) == 5

    values = np.random.default_rng(1).integers(0, 4, 300).astype(np.float32)
    few = Predictions(values, np.full(300, 8, np.int32))
    for name, unit in (("k", 1), ("num_tokens", 8)):
        smaller: set[int] = set()
        for k in range(0, 301, 7):
            budget = Budget(**{name: k * unit}, temperature=temperature, seed=3)
            larger = set(keep_rows(few, budget, 1.0).tolist())
            assert len(larger) == k
            assert smaller <= larger
            assert min(values[list(larger)], default=9) >= max(values[sorted(set(range(300)) - larger)], default=-9)
            smaller = larger


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 10), (0.2, 2), (0.01, 1), (0.25, 2), (0.35, 4)])
def test_a_ratio_is_rounded_to_rows(ratio: float, expected: int) -> None:
    scored = made(list(range(10)), [5] * 10)
    kept = keep_rows(scored, Budget(ratio=ratio), math.nan)
    assert kept.tolist() == list(range(10 - expected, 10))


@pytest.mark.parametrize("budget", [{"k": 100}, {"ratio": 0.2}, {"num_tokens": 1_000}])
def test_a_random_share_is_of_the_rest_and_others_by_another_seed(budget: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    scored = made(rng.normal(size=500).tolist(), [0] * 20 + [10] * 480)
    (name, value), *_ = budget.items()
    best = keep_rows(scored, Budget(**{name: type(value)(value * 0.7)}), math.nan)
    kept = [keep_rows(scored, Budget(**budget, random_share=0.3, seed=seed), math.nan) for seed in range(40)]
    for rows in kept:
        assert len(rows) == len(set(rows.tolist())) == 100
        assert set(best.tolist()) <= set(rows.tolist())
        assert rows.min() >= 20  # none without a trained token
    assert np.array_equal(rows, np.sort(rows))
    assert np.array_equal(kept[3], keep_rows(scored, Budget(**budget, random_share=0.3, seed=3), math.nan))
    drawn = np.bincount(np.concatenate(kept), minlength=500)[np.setdiff1d(np.arange(20, 500), best)]
    assert drawn.sum() == 40 * 30
    assert drawn.max() < 14  # of 2.9 each
    plain = keep_rows(scored, Budget(**budget, seed=1), math.nan)
    assert np.array_equal(plain, keep_rows(scored, Budget(**budget, random_share=1e-4, seed=1), math.nan))


def test_a_token_budget_with_a_random_share_is_warned_of_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    # Of 100 tokens 70 are for the best, whose first row takes 60; what is random fills the rest: nothing is missing.
    keep_rows(made([3.0] + [1.0] * 9, [60] + [20] * 9), Budget(num_tokens=100, random_share=0.3), math.nan)
    assert not caplog.records
    keep_rows(made([3.0, 2.0, 1.0], [60, 90, 80]), Budget(num_tokens=100, random_share=0.3), math.nan)
    (record,) = caplog.records
    assert "`num_tokens=100` keeps 60 tokens in 1 rows, 60 % of the budget" in record.getMessage()
    assert "The first that does not fit is row 1, with 90 trained tokens" in record.getMessage()


def test_a_random_share_of_few_rows() -> None:
    scored = made([3.0, 2.0, 1.0], [5, 5, 0])
    assert keep_rows(scored, Budget(k=3, random_share=0.5), math.nan).tolist() == [0, 1, 2]
    assert keep_rows(scored, Budget(k=0, random_share=0.5), math.nan).tolist() == []
    assert len(keep_rows(scored, Budget(num_tokens=7, random_share=0.9), math.nan)) == 1


def test_temperature_is_in_standard_deviations_of_the_labels() -> None:
    """Two rows of equal length: the better is drawn with probability 1 / (1 + exp(-difference / temperature))."""
    num_seeds, label_std, temperature = 4000, 0.5, 2.0
    tolerance = 4 * 0.5 / math.sqrt(num_seeds)  # four standard deviations of a share
    scored = made([1.0, 0.0], [8, 8])
    first = [
        keep_rows(scored, Budget(k=1, temperature=temperature, seed=seed), label_std)[0] for seed in range(num_seeds)
    ]
    expected = 1 / (1 + math.exp(-1.0 / (temperature * label_std)))
    assert np.mean(np.array(first) == 0) == pytest.approx(expected, abs=tolerance)
    tokens = [
        keep_rows(scored, Budget(num_tokens=8, temperature=temperature, seed=seed), label_std)[0]
        for seed in range(num_seeds)
    ]
    assert np.mean(np.array(tokens) == 0) == pytest.approx(expected, abs=tolerance)


def test_the_unit_of_a_temperature_is_that_of_what_is_ranked() -> None:
    rng = np.random.default_rng(0)
    num_targets = rng.integers(1, 100, 200_000).astype(np.int32)
    influence = rng.normal(3.0, 0.25, len(num_targets)).astype(np.float32)
    worth = row_worth(influence, num_targets)
    assert temperature_unit(num_targets, "row_worth", 0.25) == pytest.approx(worth.std(), rel=0.01)
    assert temperature_unit(num_targets, "influence", 0.25) == 0.25
    for wrong in (math.nan, 0.0):
        with pytest.raises(ValueError, match="Use `temperature=0`"):
            temperature_unit(num_targets, "influence", wrong)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "Exactly one of .* got none"),
        ({"k": 3, "ratio": 0.5}, "Exactly one of .* got ratio=0.5, k=3"),
        ({"ratio": 0.0}, r"`ratio` must be in \(0, 1\], got 0.0"),
        ({"ratio": 1.1}, "`ratio` must be in"),
        ({"k": -1}, "`k` must be a whole number"),
        ({"k": 1.5}, "`k` must be a whole number"),
        ({"num_tokens": -1}, "`num_tokens` must be"),
        ({"threshold": math.nan}, "`threshold` must be a number"),
        ({"k": 1, "temperature": -1}, "`temperature` must be a finite number"),
        *(({"k": 1, "seed": seed}, "`seed` must be a whole number from 0") for seed in (-1, 2**64, 0.5, None, True)),
        ({"threshold": 0.0, "temperature": 1.0}, "`temperature` must be 0 with `threshold`"),
        ({"threshold": 0.0, "random_share": 0.3}, "`random_share` must be 0 with `threshold`"),
        *(({"k": 1, "random_share": share}, r"`random_share` must be in \[0, 1\)") for share in (-0.1, 1.0, math.nan)),
    ],
)
def test_impossible_budgets_are_refused(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**budget)


# --- a selection ---


def test_selected_and_rejected_are_the_dataset(selection: Selection, dataset: Dataset) -> None:
    assert len(selection) == 16 == len(selection.selected)
    assert selection.ratio == pytest.approx(16 / 62)
    kept, rest = selection.selected["id"][:], selection.rejected["id"][:]
    assert kept == sorted(kept)
    assert sorted(kept + rest) == list(range(62))
    worth = row_worth(selection.influence, selection.num_targets)
    assert worth[kept].min() == pytest.approx(selection.threshold)
    assert worth[[i for i in rest if i < 60]].max() < selection.threshold
    good, bad = (
        np.mean([np.isin(ids, token).mean() for ids in selection.selected["input_ids"][:]]) for token in (GOOD, BAD)
    )
    assert good > 2 * bad  # what helps was planted


def test_thresholds_change_without_scoring(dataset: Dataset) -> None:
    model = MeanId()
    selector = MatesSelector(model)
    first = selector.select(dataset, ratio=0.25)
    asked = model.num_calls
    assert asked > 0
    for budget in ({"k": 3}, {"threshold": 30.0}, {"num_tokens": 100}, {"ratio": 0.5}):
        again = first.rethreshold(**budget)
        assert again.rows.tolist() == selector.select(dataset, **budget).rows.tolist()
        assert again.rows.tolist() != first.rows.tolist()
        model.num_calls = asked
        again.rethreshold(ratio=0.1)
        assert model.num_calls == asked
    assert first.rethreshold(threshold=30.0).threshold == 30.0
    assert first.rethreshold(k=0).threshold == math.inf
    assert first.ranked_by == "row_worth"
    assert first.rethreshold(threshold=30.0).ranked_by == "influence"


@pytest.mark.parametrize(("unit", "warned"), [("order", True), ("step", False), (None, False)])
def test_a_threshold_of_labels_that_give_an_order_is_warned_of(
    fitted: NgramInfluenceModel, dataset: Dataset, unit: str | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    selector = MatesSelector(fitted, origin={} if unit is None else {"label_unit": unit})
    for choose in (
        lambda: selector.select(dataset, threshold=0.0),
        lambda: selector.filter(DatasetDict(train=dataset), threshold=0.0),
        lambda: selector.filter(dataset.to_iterable_dataset(), threshold=0.0),
        lambda: selector.select(dataset, ratio=0.25).rethreshold(k=3).rethreshold(threshold=0.0),
    ):
        caplog.clear()
        choose()
        said = [record.message for record in caplog.records if "`threshold` has no meaning" in record.message]
        assert len(said) == warned
    caplog.clear()
    selector.select(dataset, num_tokens=100)
    assert "`threshold`" not in caplog.text


def test_a_row_is_explained_by_its_stretches(selection: Selection, dataset: Dataset, tiny_tokenizer: Any) -> None:
    longest = int(np.argmax(selection.num_targets))
    found = selection.explain(longest)
    spans = found["spans"]
    weights = [span["num_targets"] for span in spans]
    assert len(spans) > 1
    assert max(weights) == SPAN_TARGETS
    assert sum(weights) == found["num_targets"] == len(dataset[longest]["input_ids"]) - 1
    mean = np.average([span["influence"] for span in spans], weights=weights)
    assert mean == pytest.approx(found["influence"], rel=FLOAT32)
    best = int(selection.rows[np.argmax(row_worth(selection.influence, selection.num_targets)[selection.rows])])
    assert (selection.explain(best)["rank"], selection.explain(best)["selected"]) == (1, True)
    for i in selection.rejected["id"][:3]:
        why = selection.explain(i)
        assert not why["selected"]
        assert why["value"] < why["threshold"]
        assert why["rank"] > len(selection)
    assert selection.explain(60)["spans"] == selection.explain(61)["spans"] == []
    with pytest.raises(ValueError, match="0 to 61, got 62"):
        selection.explain(62)
    texts = Dataset.from_dict({"text": ["w3 w7 w9", "w5 w6"]}).select([1, 0])
    told = MatesSelector(fit_model(), tiny_tokenizer).select(texts, k=1).explain(1)
    assert [span["text"] for span in told["spans"]] == ["w3 w7 w9"]


def test_filter_is_the_selected_rows_of_each_split(fitted: NgramInfluenceModel, dataset: Dataset) -> None:
    selector = MatesSelector(fitted)
    both = DatasetDict(a=dataset, b=dataset.shuffle(seed=1).select(range(20)))
    kept = selector.filter(both, ratio=0.25)
    assert isinstance(kept, DatasetDict)
    assert kept["a"]["id"][:] == selector.filter(dataset, ratio=0.25)["id"][:]
    assert len(kept["b"]) == 5
    assert kept["b"].column_names == dataset.column_names
    hot = {"k": 10, "temperature": 1.0}
    seeds = [selector.filter(dataset, seed=seed, **hot)["id"][:] for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    with pytest.raises(ValueError, match=r"`k` must be at most the number of rows \(62\), got 63"):
        selector.filter(dataset, k=63)
