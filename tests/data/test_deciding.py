"""Columns that a collator reads are found by trying, however rare the rows are on which they decide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from mates_hf.data import rare_rows
from mates_hf.data.columns import physical_rows
from mates_hf.data.deciding import deciding_column, has_gap, made_up_of
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rare_rows import MAX_FOUND, WatchedRow, find_rare_rows

NUM_ROWS = 2_000


def batch(ids: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


def by_completion_mask(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return batch(
        row["input_ids"], [i if m else -100 for i, m in zip(row["input_ids"], row["completion_mask"], strict=True)]
    )


def by_prompt_length(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    n = row["prompt_len"]
    return batch(row["input_ids"], [-100] * n + row["input_ids"][n:])


def by_source(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = row["input_ids"]
    return batch(ids, [-100, -100, -100, *ids[3:]] if row["source"] == "instructions" else ids)


def by_two_columns(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    n = row["prompt_len"] if row["is_chat"] else 0
    return batch(row["input_ids"], [-100] * n + row["input_ids"][n:])


def by_nested(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = row["input_ids"]
    return batch(ids, [-100, -100, -100, *ids[3:]] if row["meta"]["chat"] else ids)


def by_weight(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = row["input_ids"]
    return batch(ids, [-100] * len(ids) if row["weight"] == 0.0 else ids)


def by_text_columns(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    n = len(row["prompt"])
    return batch(row["input_ids"], [-100] * n + row["input_ids"][n:])


def by_spans(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    labels = list(row["input_ids"])
    for span in row["spans"] or ():
        labels[span["start"] : span["end"]] = [-100] * (span["end"] - span["start"])
    return batch(row["input_ids"], labels)


def by_mask_if_any(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids, mask = row["input_ids"], row["completion_mask"]
    return batch(ids, ids if not mask else [i if m else -100 for i, m in zip(ids, mask, strict=True)])


def by_sign(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = row["input_ids"]
    return batch(ids, [-100] * len(ids) if (row["weight"] or 0) < 0 else ids)


def by_kind_if_any(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = row["input_ids"]
    return batch(ids, [-100, -100, -100, *ids[3:]] if row["meta"] and row["meta"]["kind"] == "instruct" else ids)


def by_start_of_source(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = row["input_ids"]
    return batch(ids, [-100, -100, -100, *ids[3:]] if row["source"].startswith("instruct") else ids)


# What a collator reads, and the column in a row, given whether it is a rare one, its length and its number.
COLUMNS: dict[str, tuple[Callable[..., Any], Callable[[bool, int, int], dict[str, Any]]]] = {
    "mask": (by_completion_mask, lambda rare, n, i: {"completion_mask": [0, 0, 0] * rare + [1] * (n - 3 * rare)}),
    "prompt length": (by_prompt_length, lambda rare, n, i: {"prompt_len": 3 * rare}),
    "source": (by_source, lambda rare, n, i: {"source": "instructions" if rare else "web"}),
    "two columns": (by_two_columns, lambda rare, n, i: {"is_chat": rare, "prompt_len": 3 * rare}),
    "nested": (by_nested, lambda rare, n, i: {"meta": {"chat": rare, "name": "x"}}),
    "weight": (by_weight, lambda rare, n, i: {"weight": 0.0 if rare else 1.0}),
    "texts": (by_text_columns, lambda rare, n, i: {"prompt": "abc" * rare}),
    "mask or null": (
        by_mask_if_any,
        lambda rare, n, i: {"completion_mask": [0, 0, 0] + [1] * (n - 3) if rare else None},
    ),
    "mask or empty": (
        by_mask_if_any,
        lambda rare, n, i: {"completion_mask": [False] * 3 + [True] * (n - 3) if rare else []},
    ),
    "spans or empty": (by_spans, lambda rare, n, i: {"spans": [{"start": 0, "end": 3}] if rare else []}),
    "spans or null": (by_spans, lambda rare, n, i: {"spans": [{"start": 0, "end": 3}] if rare else None}),
    "negative": (by_sign, lambda rare, n, i: {"weight": -1.0 if rare else 1.0}),
    "negative or null": (by_sign, lambda rare, n, i: {"weight": -0.5 if rare else None}),
    "kind": (by_kind_if_any, lambda rare, n, i: {"meta": {"kind": "instruct" if rare else "web", "n": i}}),
    "kind or null": (by_kind_if_any, lambda rare, n, i: {"meta": {"kind": "instruct", "n": i} if rare else None}),
    "numbered source": (by_start_of_source, lambda rare, n, i: {"source": f"{'instruct' if rare else 'web'}-{i}"}),
    "source of any words": (
        by_start_of_source,
        lambda rare, n, i: {"source": f"{'instruct' if rare else chr(97 + i % 26) + chr(97 + i % 25)}-{i}"},
    ),
}


def make_pool(
    column: Callable[[bool, int, int], dict[str, Any]], share: float, seed: int
) -> tuple[datasets.Dataset, list[int]]:
    """A dataset and its rare rows."""
    rng = np.random.default_rng(seed)
    rare = rng.random(NUM_ROWS) < share
    rows = [rng.integers(3, 60, rng.integers(6, 12)).tolist() for _ in range(NUM_ROWS)]
    made = [
        {"input_ids": row, **column(bool(r), len(row), i)} for i, (row, r) in enumerate(zip(rows, rare, strict=True))
    ]
    return datasets.Dataset.from_list(made), np.flatnonzero(rare).tolist()


def labels_of(pool: CandidatePool, ids: list[int]) -> list[list[int]]:
    rows = pool.token_rows(ids)
    return [rows.row(i)[1].tolist() for i in range(len(rows))]


@pytest.mark.parametrize("share", [0.01, 0.001])
@pytest.mark.parametrize("case", list(COLUMNS))
def test_rare_rows_are_read_as_they_are_collated(case: str, share: float) -> None:
    collator, column = COLUMNS[case]
    for seed in range(3):
        dataset, rare = make_pool(column, share, seed)
        pool = CandidatePool(dataset, lambda rows: collator(rows[0]))
        for i in rare:
            expected = collator(dataset[i])["labels"][0].tolist()
            assert labels_of(pool, [i]) == [[-100, *expected[1:]]]
        assert pool._columns.find_rule(pool.collate_fn) is None or not rare


@pytest.mark.parametrize("case", ["mask or null", "numbered source", "spans or empty"])
def test_rare_rows_of_a_shuffled_part(case: str) -> None:
    collator, column = COLUMNS[case]
    whole, rare = make_pool(column, 0.002, 3)
    dataset = whole.select([rare[0], *range(100, NUM_ROWS)]).shuffle(seed=0)
    pool = CandidatePool(dataset, lambda rows: collator(rows[0]))
    assert pool._columns.find_rule(pool.collate_fn) is None
    dataset = whole.select([i for i in range(NUM_ROWS) if i not in rare]).shuffle(seed=0)
    texts = find_rare_rows({"c": dataset.data.column(list(column(True, 9, 0))[0])}, physical_rows(dataset),
                           len(dataset), np.arange(64))  # fmt: skip
    for i in [*texts.rows.tolist(), *texts.by_column["c"]]:
        assert collator(dataset[i])["labels"][0].tolist() == dataset[i]["input_ids"]  # none of the rows left out


def test_columns_that_decide_nothing_keep_the_fast_way() -> None:
    words = [f"{chr(97 + i % 26)}{chr(97 + i % 25)} {i}" for i in range(NUM_ROWS)]
    rows = {"input_ids": [[3, 4, 5, 6, 7]] * NUM_ROWS, "id": list(range(NUM_ROWS)), "text": words,
            "score": [0.5, None] * (NUM_ROWS // 2), "mask": [[1, 1, 1, 1, 1], []] * (NUM_ROWS // 2),
            "meta": [{"a": i, "url": word} for i, word in enumerate(words)], "null": [None] * NUM_ROWS,
            "messages": [[{"role": "user", "content": word}] for word in words]}  # fmt: skip
    dataset = datasets.Dataset.from_dict(rows)

    def by_name(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return batch(rows[0]["input_ids"], rows[0]["input_ids"])

    def by_a_walk(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return by_name([{name: value for name, value in row.items() if name == "input_ids"} for row in rows])

    for collator in (by_name, by_a_walk):
        assert CandidatePool(dataset, collator)._columns.find_rule(collator) == "all"


@pytest.mark.parametrize(
    "ask",
    [
        lambda row: row["text"],
        lambda row: row.get("text"),
        lambda row: "text" in row,
        lambda row: row.pop("text"),
        lambda row: dict(row),
        lambda row: {**row},
        lambda row: row.copy()["text"],
        lambda row: copy.copy(row)["text"],
        lambda row: copy.deepcopy(row)["text"],
        lambda row: row | {"a": 1},
    ],
)
def test_a_watched_row_notes_what_is_asked_for(ask: Callable[[Any], Any]) -> None:
    asked_for: set[str] = set()
    row = WatchedRow({"text": "a", "ids": [1]}.items(), asked_for)
    assert dict(row.items()) == {"text": "a", "ids": [1]}
    assert list(row) == ["text", "ids"]
    assert not asked_for
    assert ask(row)
    assert "text" in asked_for


def test_as_many_rows_are_added_as_is_said() -> None:
    table = datasets.Dataset.from_dict({f"c{j}": [str(i % 15) * (j + 1) for i in range(NUM_ROWS)] for j in range(9)})
    columns = {name: table.data.column(name) for name in table.column_names}
    found = find_rare_rows(columns, None, NUM_ROWS, np.zeros(1, np.int64))
    assert len(found.rows) <= MAX_FOUND
    assert not found.unproven  # the same 15 rows show all
    table = datasets.Dataset.from_dict(
        {f"c{j}": [chr(97 + i - 100 * j) if 0 <= i - 100 * j < 10 else "-" for i in range(NUM_ROWS)] for j in range(9)}
    )
    columns = {name: table.data.column(name) for name in table.column_names}
    found = find_rare_rows(columns, None, NUM_ROWS, np.full(1, 1_900))
    assert len(found.rows) == MAX_FOUND
    assert found.unproven


def test_the_column_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dataset, _ = make_pool(COLUMNS["mask"][1], 0.0, 0)
    CandidatePool(dataset, lambda rows: by_completion_mask(rows[0])).token_rows([0])
    assert "the collator reads the column `completion_mask`" in caplog.text


@pytest.mark.parametrize(
    ("value", "reads"),
    [
        (True, lambda v: v),
        (0, lambda v: v == 1),
        (7, lambda v: v > 7),
        (0.5, lambda v: v > 0.9),
        ("a", lambda v: len(v)),
        ([1, 1, 1, 1], lambda v: v[2]),
        ([5, 6, 7], lambda v: sum(v)),
        ([True, True], lambda v: all(v)),
        ({"a": {"b": 0}}, lambda v: v["a"]["b"]),
        ([[1, 2], [3, 4]], lambda v: v[1]),
        (None, lambda v: v),
    ],
)
def test_every_kind_of_value(value: Any, reads: Callable[[Any], Any]) -> None:
    row = {"input_ids": [1, 2, 3], "column": value}
    others = {"column": [3] if value is None else []}
    assert deciding_column(row, others, 3, lambda row: reads(row["column"])) == "column"
    assert deciding_column(row, others, 3, lambda row: row["input_ids"]) is None


@pytest.mark.parametrize(
    ("kind", "usual", "rare"),
    [
        (pa.float16(), np.float16(1.0), np.float16(-1.0)),
        (pa.float64(), 1.0, float("nan")),
        (pa.uint64(), 1, 2**64 - 1),
        (pa.large_string(), "web", "instruct"),
        (pa.dictionary(pa.int8(), pa.string()), "web", "instruct"),
        (pa.list_(pa.int8(), 3), [1, 1, 1], [1, 0, 1]),
        (pa.list_(pa.int8(), 3), [1, 0, 1], None),
        (pa.large_list(pa.list_(pa.float32())), [[1.0], []], [[1.0], [-2.0]]),
        (pa.list_(pa.struct({"role": pa.string()})), [{"role": "user"}] * 2, [{"role": "user"}, {"role": "tool"}]),
        (pa.list_(pa.string()), ["a"], ["a", None]),
        (pa.list_(pa.bool_()), [True, False], []),
        (pa.struct({"a": pa.struct({"b": pa.int64()})}), {"a": {"b": 1}}, {"a": None}),
        (pa.timestamp("s"), 1, None),
        (pa.binary(), b"a", None),
        (pa.map_(pa.string(), pa.int64()), [("a", 1)], None),
    ],
)
def test_a_rare_value_of_any_type_is_found_where_it_is(kind: pa.DataType, usual: Any, rare: Any) -> None:
    values = [usual] * 500
    values[321] = rare
    array = pa.array([None, *values], kind)
    pieces = [array.slice(1, 300), array.slice(301)]  # slices that begin within an array
    indices = np.random.default_rng(0).permutation(500)
    for shuffled in (None, indices):
        looked_at = np.array([i for i in range(64) if shuffled is None or shuffled[i] != 321])
        found = find_rare_rows({"c": pa.chunked_array(pieces)}, shuffled, 500, looked_at)
        at = 321 if shuffled is None else int(np.flatnonzero(shuffled == 321)[0])
        assert found.rows.tolist() == [at]
        assert at in found.by_column["c"]
        assert not found.unproven
    for empty in (pa.array([None] * 500), pa.array([[None]] * 500), pa.array([[]] * 500)):
        assert not len(find_rare_rows({"c": pa.chunked_array([empty])}, None, 500, np.arange(9)).rows)


@pytest.mark.parametrize("reads", [lambda v: v["mask"], lambda v: v["spans"], lambda v: v["start"] and v["end"]])
def test_values_made_up_of_a_type(reads: Callable[[Any], Any]) -> None:
    span = pa.struct({"end": pa.int64(), "start": pa.int64()})
    kind = pa.struct({"mask": pa.list_(pa.bool_()), "spans": pa.list_(span), "start": pa.int32(), "end": pa.int32()})
    made = made_up_of(kind, 10)
    assert pa.array(made, kind).to_pylist() == made
    assert any(map(reads, made))
    assert any(value[0]["start"] < value[0]["end"] for value in made_up_of(pa.list_(span), 10))
    assert [0] * 5 + [1] * 5 in made_up_of(pa.list_(pa.int8()), 10)
    assert has_gap({"a": {"b": []}})
    assert not has_gap({"a": {"b": ""}})


def test_a_long_dataset_is_scanned_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BLOCK", 10), ("MAX_ROWS", 100), ("MAX_ELEMENTS", 300), ("BLOCK_BYTES", 200)):
        monkeypatch.setattr(rare_rows, name, value)
    values = [[1, 1, 1]] * 1_000
    values[5] = values[500] = values[995] = [1, 0, 1]
    column = pa.chunked_array([pa.array(values[i : i + 7], pa.list_(pa.int64())) for i in range(0, 1_000, 7)])
    assert find_rare_rows({"c": column}, None, 1_000, np.arange(20, 30)).rows.tolist() == [5]
    values[5], values[500] = [1, 1, 1], [1, 1, 1]
    column = pa.chunked_array([pa.array(values[i : i + 7], pa.list_(pa.int64())) for i in range(0, 1_000, 7)])
    assert find_rare_rows({"c": column}, None, 1_000, np.arange(20, 30)).rows.tolist() == [995]
    backwards = np.arange(1_000)[::-1].astype(np.int64)
    assert find_rare_rows({"c": column}, backwards, 1_000, np.arange(20, 30)).rows.tolist() == [4]
