from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, IterableDatasetDict

from mates_hf.prediction.worth import row_worth
from mates_hf.selection.selector import MatesSelector
from mates_hf.selection.streaming import StreamSelection
from tests.selection.selector_kit import MeanId, fit_model, make_lists

NUM = 300


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.from_dict({"input_ids": make_lists(NUM, seed=5), "id": list(range(NUM))})


@pytest.fixture(scope="module")
def selector(tiny_tokenizer: Any) -> MatesSelector:
    return MatesSelector(fit_model(), tiny_tokenizer)


@pytest.fixture
def stream(dataset: Dataset) -> IterableDataset:
    return dataset.to_iterable_dataset(num_shards=3)


def generated() -> Iterator[dict[str, Any]]:
    """A stream that does not say which columns it has."""
    for i, ids in enumerate(make_lists(NUM, seed=5)):
        yield {"text": " ".join(f"w{token}" for token in ids) if i % 9 else None, "id": i}


def test_a_stream_is_scored_like_its_dataset(
    selector: MatesSelector, dataset: Dataset, stream: IterableDataset
) -> None:
    expected = selector.map(dataset)["influence"][:]
    scored = selector.map(stream, batch_size=17)
    assert scored.features["influence"].dtype == "float32"
    rows = list(scored)
    assert [row["influence"] for row in rows] == expected
    assert [row["id"] for row in rows] == list(range(NUM))
    assert list(rows[0]) == ["input_ids", "id", "influence"]
    assert list(next(iter(selector.map(stream, remove_columns=["input_ids"])))) == ["id", "influence"]
    as_arrays = next(iter(selector.map(stream.with_format("numpy"))))
    assert isinstance(as_arrays["input_ids"], np.ndarray)
    both = selector.map(IterableDatasetDict(a=stream, b=stream.take(5)))
    assert [row["influence"] for row in both["b"]] == expected[:5]


def test_a_stream_of_unknown_columns(selector: MatesSelector, dataset: Dataset) -> None:
    scored = list(selector.map(IterableDataset.from_generator(generated)))
    expected = selector.score(Dataset.from_list(list(generated()))).influence
    assert np.array_equal(np.array([row["influence"] for row in scored], np.float32), expected)
    with pytest.raises(ValueError, match=r"column `body` to score, got the columns \['text', 'id'\]"):
        selector.map(IterableDataset.from_generator(generated), column="body")
    for wrong in ("labl", ["id", "labl"]):
        with pytest.raises(ValueError, match=r"columns of the dataset, \['text', 'id'\], got \['labl'\]"):
            selector.map(IterableDataset.from_generator(generated), remove_columns=wrong)
    without = selector.map(IterableDataset.from_generator(generated), remove_columns="id")
    assert list(next(iter(without))) == ["text", "influence"]


@pytest.mark.parametrize("position", [1, 40, 129, 299])
@pytest.mark.parametrize("how", ["map", "filter"])
def test_a_stream_goes_on_where_its_state_was_taken(
    how: str, position: int, selector: MatesSelector, stream: IterableDataset
) -> None:
    def make() -> Any:
        if how == "map":
            return selector.map(stream, batch_size=32)
        return selector.filter(stream, ratio=0.4, batch_size=32, temperature=0.5, calibration_rows=100)

    whole = [(row["id"], row.get("influence")) for row in make()]
    position = min(position, len(whole) - 1)
    first = make()
    rows = iter(first)
    seen = [(row["id"], row.get("influence")) for row in (next(rows) for _ in range(position))]
    state = first.state_dict()
    second = make()
    second.load_state_dict(state)
    assert seen + [(row["id"], row.get("influence")) for row in second] == whole


def test_the_ratio_of_a_stream_is_calibrated_and_reported(
    selector: MatesSelector, dataset: Dataset, stream: IterableDataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = selector.select(stream, ratio=0.2, calibration_rows=150)
    assert isinstance(found, StreamSelection)
    assert "from the first 150 rows of the stream, of which it keeps 0.2000 (asked for 0.2000)" in caplog.text
    assert math.isnan(found.ratio)
    kept = [row["id"] for row in found.selected]
    assert (found.num_seen, found.num_kept) == (NUM, len(kept))
    assert found.ratio == len(kept) / NUM == pytest.approx(0.2, abs=0.07)  # two standard deviations and a half
    assert (found.num_calibration_rows, found.calibration_ratio) == (150, 0.2)
    scored = selector.score(dataset.select(range(150)))
    worth = row_worth(scored.influence, scored.num_targets)
    assert [i for i in kept if i < 150] == np.flatnonzero(np.argsort(np.argsort(-worth)) < 30).tolist()
    assert found.ranked_by == "row_worth"
    whole = selector.select(stream, ratio=0.2)  # calibrated on all rows: the dataset's own choice
    assert [row["id"] for row in whole.selected] == selector.filter(dataset, ratio=0.2)["id"][:]


def test_a_threshold_needs_no_calibration(selector: MatesSelector, dataset: Dataset, stream: IterableDataset) -> None:
    found = selector.select(stream, threshold=0.002)
    assert found.num_calibration_rows == 0
    kept = [row["id"] for row in found.selected]
    assert kept == selector.filter(dataset, threshold=0.002)["id"][:]
    assert 0 < len(kept) < NUM


def test_noise_belongs_to_the_row_not_to_its_place(selector: MatesSelector, dataset: Dataset) -> None:
    def kept(order: Dataset, seed: int) -> set[int]:
        stream = order.to_iterable_dataset()
        return {row["id"] for row in selector.filter(stream, ratio=0.3, temperature=2.0, seed=seed)}

    assert kept(dataset, 0) == kept(dataset.shuffle(seed=1), 0) != kept(dataset, 1)
    cold = set(selector.filter(dataset, ratio=0.3)["id"][:])
    assert len(kept(dataset, 0) & cold) < len(cold)
    influence = selector.score(dataset).influence
    hot = np.array(sorted(kept(dataset, 0)))
    assert influence[hot].mean() > influence.mean()  # still more likely where influence is higher


def test_a_random_share_of_a_stream_is_of_the_rows_below_the_threshold(
    selector: MatesSelector, dataset: Dataset, stream: IterableDataset
) -> None:
    found = selector.select(stream, ratio=0.4, random_share=0.5)
    kept = [row["id"] for row in found.selected]
    assert set(selector.filter(dataset, ratio=0.2)["id"][:]) <= set(kept)
    assert len(kept) / NUM == pytest.approx(0.4, abs=0.1)
    assert found.calibration_ratio == len(kept) / NUM
    shuffled = dataset.shuffle(seed=1).to_iterable_dataset()
    assert {row["id"] for row in selector.filter(shuffled, ratio=0.4, random_share=0.5)} == set(kept)
    assert {row["id"] for row in selector.filter(stream, ratio=0.4, random_share=0.5, seed=1)} != set(kept)
    assert len(list(selector.filter(stream, ratio=1.0, random_share=0.5))) == NUM


def test_rows_without_targets_and_other_models(stream: IterableDataset) -> None:
    rows = Dataset.from_dict({"input_ids": [[], [4], [40, 41], [5, 6]]}).to_iterable_dataset()
    found = MatesSelector(MeanId()).select(rows, ratio=0.5)
    assert [row["input_ids"] for row in found.selected] == [[40, 41], [5, 6]]


def test_what_a_stream_cannot_do_is_refused(selector: MatesSelector, stream: IterableDataset) -> None:
    for budget in ({"k": 3}, {"num_tokens": 100}):
        with pytest.raises(ValueError, match=r"A stream must be filtered by `ratio` or `threshold`.*`\.take\(k\)`"):
            selector.filter(stream, **budget)
    with pytest.raises(TypeError, match="`num_proc` cannot be given: a stream is scored"):
        selector.map(stream, num_proc=2)
    with pytest.raises(TypeError, match="`num_proc`, `shards_dir` cannot be given"):
        selector.filter(stream, ratio=0.5, num_proc=2, shards_dir="x")
    with pytest.raises(TypeError, match="`score` takes one `Dataset`, got IterableDataset"):
        selector.score(stream)
    with pytest.raises(ValueError, match="`calibration_rows` must be a whole number of at least 1"):
        selector.filter(stream, ratio=0.5, calibration_rows=0)
    with pytest.raises(ValueError, match="The stream must have rows"):
        selector.filter(stream.take(0), ratio=0.5)
    with pytest.raises(ValueError, match="below 64"):
        list(selector.map(Dataset.from_dict({"input_ids": [[1, 64]]}).to_iterable_dataset()))
    with pytest.raises(TypeError, match="must hold texts .* or token ids"):
        selector.map(stream, column="id")
