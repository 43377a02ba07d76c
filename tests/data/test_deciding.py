"""Columns that a collator reads are found by trying, however rare the rows are on which they decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from mates_hf.data.deciding import deciding_column
from mates_hf.data.pool import CandidatePool

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


COLUMNS: dict[Callable[..., Any], Callable[[bool, int], dict[str, Any]]] = {
    by_completion_mask: lambda rare, n: {"completion_mask": [0, 0, 0] * rare + [1] * (n - 3 * rare)},
    by_prompt_length: lambda rare, n: {"prompt_len": 3 * rare},
    by_source: lambda rare, n: {"source": "instructions" if rare else "web"},
    by_two_columns: lambda rare, n: {"is_chat": rare, "prompt_len": 3 * rare},
    by_nested: lambda rare, n: {"meta": {"chat": rare, "name": "x"}},
    by_weight: lambda rare, n: {"weight": 0.0 if rare else 1.0},
    by_text_columns: lambda rare, n: {"prompt": "abc" * rare},
}


def make_pool(column: Callable[[bool, int], dict[str, Any]], share: float, seed: int) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    rare = rng.random(NUM_ROWS) < share
    rows = [rng.integers(3, 60, rng.integers(6, 12)).tolist() for _ in range(NUM_ROWS)]
    return datasets.Dataset.from_list(
        [{"input_ids": row, **column(bool(r), len(row))} for row, r in zip(rows, rare, strict=True)]
    )


def labels_of(pool: CandidatePool, ids: list[int]) -> list[list[int]]:
    rows = pool.token_rows(ids)
    return [rows.row(i)[1].tolist() for i in range(len(rows))]


@pytest.mark.parametrize("share", [0.01, 0.001])
@pytest.mark.parametrize("collator", list(COLUMNS), ids=lambda c: c.__name__)
def test_rare_rows_are_read_as_they_are_collated(collator: Callable[..., Any], share: float) -> None:
    for seed in range(3):
        dataset = make_pool(COLUMNS[collator], share, seed)
        pool = CandidatePool(dataset, lambda rows: collator(rows[0]))
        rare = [i for i in range(NUM_ROWS) if COLUMNS[collator](True, len(dataset[i]["input_ids"])).items()
                <= dataset[i].items()]  # fmt: skip
        for i in rare:
            expected = collator(dataset[i])["labels"][0].tolist()
            assert labels_of(pool, [i]) == [[-100, *expected[1:]]]
        assert pool._columns.find_rule(pool.collate_fn) is None or not rare


def test_columns_that_decide_nothing_keep_the_fast_way(caplog: pytest.LogCaptureFixture) -> None:
    rows = {"input_ids": [[3, 4, 5, 6, 7]] * 50, "id": list(range(50)), "text": ["a"] * 50, "score": [0.5] * 50,
            "mask": [[1, 1, 1, 1, 1]] * 50, "meta": [{"a": 1}] * 50}  # fmt: skip
    pool = CandidatePool(
        datasets.Dataset.from_dict(rows), lambda rows: batch(rows[0]["input_ids"], rows[0]["input_ids"])
    )
    assert pool._columns.find_rule(pool.collate_fn) == "all"


def test_the_column_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dataset = make_pool(COLUMNS[by_completion_mask], 0.0, 0)
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
