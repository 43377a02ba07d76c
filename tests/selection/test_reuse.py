"""What is scored once is not scored again; and what is not this selector's, or no longer fits, is not used."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from mates_hf.data.columns import fixed_positions
from mates_hf.data.scored_column import OpenTexts
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.prediction.score import Scorer
from mates_hf.selection.selector import MatesSelector
from tests.selection.selector_kit import Counted, CountedMean, MeanId, fit_model, make_lists, with_template

LISTS = make_lists(80, seed=5)
TEXTS = [" ".join(f"w{i}" for i in ids) for ids in LISTS]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def fitted() -> NgramInfluenceModel:
    return fit_model()


@pytest.fixture
def counted(tiny_tokenizer: Any, fitted: NgramInfluenceModel) -> Counted:
    return Counted(tiny_tokenizer, fitted)


@pytest.fixture
def texts() -> Dataset:
    return Dataset.from_dict({"text": [*TEXTS, "", None], "id": list(range(82))})


def expected_rows(fitted: NgramInfluenceModel, tokenizer: Any, dataset: Dataset, **budget: Any) -> list[int]:
    """The choice of a selector that has scored nothing before."""
    fresh = MatesSelector(fitted, tokenizer)
    return list(
        fresh.filter(dataset.remove_columns([n for n in dataset.column_names if n == "influence"]), **budget)["id"]
    )


@pytest.mark.parametrize("first", ["map", "score", "filter", "map of splits"])
def test_other_budgets_tokenise_and_predict_nothing(
    first: str, counted: Counted, texts: Dataset, fitted: NgramInfluenceModel, tiny_tokenizer: Any
) -> None:
    selector = MatesSelector(counted.model, counted.tokenizer)
    sources = [texts]
    if first == "map":
        sources.append(selector.map(texts))
    elif first == "map of splits":
        sources.append(selector.map(DatasetDict(a=texts))["a"])
    elif first == "score":
        selector.score(texts)
    else:
        selector.filter(texts, ratio=0.9)
    assert counted.num_rows >= 82
    for source in sources:
        for budget in ({"ratio": 0.2}, {"k": 7}, {"threshold": 0.001}, {"num_tokens": 300}):
            counted.forget()
            kept = selector.filter(source, **budget)
            assert (counted.num_texts, counted.num_rows) == (0, 0)
            assert kept["id"][:] == expected_rows(fitted, tiny_tokenizer, source, **budget)
    counted.forget()
    selector.score(texts)
    assert counted.num_rows == 82  # asked to score, it does
    selector.filter(texts, k=3, column="text")
    assert counted.num_rows == 82
    changed = texts.map(lambda row: {"text": "w3 " + (row["text"] or "")})
    selector.filter(changed, k=3)
    assert counted.num_rows == 2 * 82
    MatesSelector(counted.model, counted.tokenizer, max_length=3).filter(texts, k=3)
    assert counted.num_rows == 3 * 82


def test_a_dataset_is_looked_at_once_a_call(counted: Counted, texts: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its rows' content and of what predicts; a key asked for three times read them three times."""
    asked: list[str] = []

    def note(owner: type, name: str) -> None:
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *args: (asked.append(name), call(self, *args))[1])

    note(OpenTexts, "content")
    note(Scorer, "digest")
    selector = MatesSelector(counted.model, counted.tokenizer)
    for call in (selector.score, lambda data: selector.select(data, k=3), lambda data: selector.filter(data, k=9)):
        asked.clear()
        call(texts)
        assert sorted(asked) == ["content", "digest"]
    asked.clear()
    mapped = selector.map(texts)
    assert sorted(asked) == ["content", "content", "digest"]  # of what was given, and of the new dataset
    assert mapped.num_rows == 82


def test_scores_are_held_as_long_as_their_dataset(counted: Counted, texts: Dataset) -> None:
    selector = MatesSelector(counted.model, counted.tokenizer)
    selector.filter(texts, k=3)
    other = Dataset.from_dict({"text": TEXTS[:9]})
    selector.filter(other, k=3)
    assert len(selector._scored._found) == 2
    del other
    gc.collect()
    assert len(selector._scored._found) == 1


@pytest.mark.parametrize("kind", ["texts", "tokens"])
def test_a_written_column_is_used_in_another_process(
    kind: str, counted: Counted, texts: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another selector of the same model stands for another process: nothing is shared but what is on disk."""
    dataset = texts if kind == "texts" else Dataset.from_dict({"input_ids": [*LISTS, [], [4]], "id": list(range(82))})
    MatesSelector(counted.model, counted.tokenizer).map(dataset).save_to_disk(tmp_path / "data")
    loaded = load_from_disk(str(tmp_path / "data"))
    expected = MatesSelector(counted.model, counted.tokenizer).select(dataset, ratio=0.3)
    order = np.random.default_rng(0).permutation(82)
    for source in (loaded, loaded.select(order), loaded.with_format("numpy").shuffle(seed=1)):
        counted.forget()
        selector = MatesSelector(counted.model, counted.tokenizer)
        found = selector.select(source, ratio=0.3)
        again = selector.select(source, ratio=0.5)
        assert counted.num_rows == 0
        ids = np.array(source["id"][:])
        assert sorted(ids[found.rows]) == expected.rows.tolist()
        assert np.array_equal(found.influence, expected.influence[ids])
        assert np.array_equal(again.num_targets, expected.num_targets[ids])
    assert "not known to be" not in caplog.text
    caplog.clear()
    stale = loaded.map(lambda row: {k: v for k, v in dataset[81 - row["id"]].items() if k != "id"})
    counted.forget()
    selector = MatesSelector(counted.model, counted.tokenizer)
    found = selector.select(stale, ratio=0.3)
    assert "no longer fits its rows" in caplog.text
    assert np.array_equal(found.influence, expected.influence[::-1])


NUM_MANY = 1400
CHANGED = int(np.setdiff1d(np.arange(NUM_MANY), fixed_positions(NUM_MANY, 1024))[90])  # a sample of 1,024 misses it


@pytest.fixture(scope="module")
def many() -> Dataset:
    lists = [[int(i) for i in ids] for ids in np.random.default_rng(0).integers(2, 60, (NUM_MANY, 6))]
    texts = [" ".join(f"w{i}" for i in ids) for ids in lists]
    talks = [[{"role": "user", "content": text}] for text in texts]
    columns = {"input_ids": lists, "labels": lists, "text": texts, "messages": talks, "id": list(range(NUM_MANY))}
    return Dataset.from_dict({**columns, "meta": [{"text": text} for text in texts]})


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    return with_template(tiny_tokenizer, "{% for m in messages %}{{ m['content'] }} {% endfor %}")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return said


BEST = {
    "text": "w63 w63 w63 w63 w63 w63", "meta.text": "w63 w63 w63 w63 w63 w63", "input_ids": [63] * 6,
    "messages": [{"role": "user", "content": "w63 w63 w63 w63 w63 w63"}], "labels": [-100] * 6,
}  # fmt: skip


@pytest.mark.parametrize("changed", BEST)
def test_one_changed_row_among_many_is_noticed(
    changed: str, many: Dataset, chat_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    column = "input_ids" if changed == "labels" else changed
    used = [column.partition(".")[0], "id", *(["labels"] if changed == "labels" else [])]
    dataset = many.select_columns(used)
    scored = MatesSelector(CountedMean(), chat_tokenizer).map(dataset, column=column)
    value = {"text": BEST[changed]} if changed == "meta.text" else BEST[changed]
    stale = scored.map(lambda row: {changed.partition(".")[0]: value} if row["id"] == CHANGED else {})
    for source in (stale, stale.shuffle(seed=1), stale.sort("id", reverse=True).flatten_indices()):
        selector = MatesSelector(CountedMean(), chat_tokenizer)
        with caplog.at_level(logging.INFO):
            found = selector.select(source, k=5, column=column)
        assert [text for text in warnings_of(caplog) if "no longer fits its rows, of which at least one" in text]
        fresh = MatesSelector(CountedMean(), chat_tokenizer).select(
            source.remove_columns("influence"), k=5, column=column
        )
        assert np.array_equal(found.rows, fresh.rows)
        assert (CHANGED in found.selected["id"][:]) == (changed != "labels")
        caplog.clear()


def test_what_was_scored_stays_known_through_every_order(
    many: Dataset, tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = many.select_columns(["text", "id"])
    shuffled = MatesSelector(CountedMean(), tiny_tokenizer).map(dataset.shuffle(seed=3))
    scored = MatesSelector(CountedMean(), tiny_tokenizer).map(dataset)
    shuffled.sort("influence").save_to_disk(tmp_path / "data")
    expected = MatesSelector(CountedMean(), tiny_tokenizer).score(dataset).influence
    splits = scored.train_test_split(0.3, seed=0)
    wider = (
        scored.add_column("more", list(range(NUM_MANY))).rename_column("id", "number").rename_column("number", "id")
    )
    known = [load_from_disk(str(tmp_path / "data")), scored.filter(lambda row: row["id"] % 3 == 0), splits["train"]]
    known += [splits["test"], scored.sort("influence").flatten_indices(), scored.select([5, *range(200)]), wider]
    for source in known:
        model = CountedMean()
        found = MatesSelector(model, tiny_tokenizer).select(source, ratio=0.5)
        assert model.num_calls == 0
        assert np.array_equal(found.influence, expected[np.array(source["id"][:])])
    assert not warnings_of(caplog)
    for source in (scored.select(range(700)), scored.filter(lambda row: row["id"] < 900).flatten_indices()):
        for changed in (source, source.map(lambda row: {"text": BEST["text"]} if row["id"] == 7 else {})):
            model = CountedMean()
            with caplog.at_level(logging.INFO):
                found = MatesSelector(model, tiny_tokenizer).select(changed, k=1)
            assert model.num_calls
            assert (
                "Rows were added or picked since the column `influence` was written (for 1400 rows, now" in caplog.text
            )
            assert (found.selected["id"][:] == [7]) == (changed is not source)
            assert not warnings_of(caplog)
    few = scored.select([9, 3])  # of a large table: scoring two rows is cheaper than reading it
    model = CountedMean()
    assert len(MatesSelector(model, tiny_tokenizer).select(few, k=1)) == 1
    assert model.num_calls
    moved = scored.map(lambda row: {"influence": 9.0 if row["id"] == CHANGED else row["influence"]})
    MatesSelector(CountedMean(), tiny_tokenizer).select(moved, k=1)
    assert "no longer fits" in warnings_of(caplog)[0]


def test_a_foreign_column_is_named_and_not_used(
    fitted: NgramInfluenceModel, tiny_tokenizer: Any, texts: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    selector = MatesSelector(fitted, tiny_tokenizer)
    expected = selector.filter(texts, ratio=0.2)["id"][:]
    foreign = texts.add_column("influence", np.arange(82.0))
    others = MatesSelector(MeanId(), tiny_tokenizer).map(texts)
    for source in (foreign, others, others.to_iterable_dataset(), foreign.to_iterable_dataset()):
        caplog.clear()
        kept = selector.filter(source, ratio=0.2)
        said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == 1
        assert "column `influence` is not" in said[0]
        assert [row["id"] for row in kept] == expected
        caplog.clear()
        mapped = selector.map(source)
        said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == 1
        assert "is replaced" in said[0]
        assert [row["influence"] for row in mapped] == selector.score(texts).influence.tolist()
    caplog.clear()
    again = selector.map(selector.map(texts))
    assert selector.filter(again, ratio=0.2)["id"][:] == expected
    assert not caplog.records


def test_a_model_without_a_digest_filters_and_keeps_nothing(texts: Dataset, tiny_tokenizer: Any) -> None:
    class Bare:
        report = None

        def predict(self, rows: Any) -> np.ndarray:
            return np.asarray(rows.num_targets, np.float32)

    selector = MatesSelector(Bare(), tiny_tokenizer)
    assert len(selector.filter(texts, k=3)) == 3
    assert selector._scored._found == {}
