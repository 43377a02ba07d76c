"""The scored column: decided once, and read the same from a dataset, a table and a batch of a stream."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import numpy as np
import pytest

from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.data.scored_column import Conversations, Texts, TokenIds, find_column

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
IDS: list[Any] = [[3, 7, 9], [], [4, 4, 5, 6, 8], None, [60]]
TEXTS = [None if ids is None else " ".join(f"w{i}" for i in ids) for ids in IDS]
CHATS = [None if text is None else [{"role": "w1", "content": text}] for text in TEXTS]
LABELS = [None if ids is None else [IGNORED if i % 2 else i for i in ids] for ids in IDS]

CASES = {
    "tokens": ({"input_ids": IDS, "id": list(range(5))}, None, TokenIds, ["input_ids"]),
    "labels": ({"input_ids": IDS, "labels": LABELS}, None, TokenIds, ["input_ids", "labels"]),
    "texts": ({"text": TEXTS, "labels": LABELS}, None, Texts, ["text"]),
    "conversations": ({"messages": CHATS}, None, Conversations, ["messages"]),
    "nested tokens": ({"meta": [{"ids": ids} for ids in IDS]}, "meta.ids", TokenIds, ["meta"]),
    "nested texts": ({"meta": [{"text": text} for text in TEXTS]}, "meta.text", Texts, ["meta"]),
}


def joined(parts: Any) -> tuple[list[Any], list[int]]:
    """Tokens and labels of every row, and what errors call the first row of each part."""
    found, names = [], []
    for first_row, rows in parts:
        assert isinstance(rows, TokenRows)
        found += [[part.tolist() for part in rows.row(i)] for i in range(len(rows))]
        names.append(first_row)
    return found, names


@pytest.mark.parametrize("case", CASES)
def test_a_dataset_a_table_and_a_batch_are_read_alike(case: str, tiny_tokenizer: Any) -> None:
    columns, name, kind, read = CASES[case]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    dataset = datasets.Dataset.from_dict(columns)
    column = find_column(dataset.data.schema, name, tokenizer, 4)
    assert type(column) is kind
    assert column.names_among(dataset.column_names) == read
    expected = joined([(0, column.read_batch(dataset.to_dict()))])[0]
    if kind is Texts:
        assert [ids for ids, _ in expected] == [(ids or [])[:4] for ids in IDS]
    elif kind is Conversations:
        assert [ids for ids, _ in expected] == [[] if ids is None else [1, *ids][:4] for ids in IDS]
    else:
        assert [ids for ids, _ in expected] == [ids or [] for ids in IDS]
    assert joined(column.open(dataset).parts(0, 5, in_place=False))[0] == expected
    assert joined(column.open_table(dataset.data.table, 20).parts(0, 5, in_place=False)) == (expected, [20])
    order = [4, 2, 0, 3]
    moved = column.open(dataset.with_format("numpy").select(order), 3)
    moved_rows, names = joined(moved.parts(1, 4, in_place=False))
    assert (moved_rows, names) == ([expected[i] for i in order[1:]], [1])
    assert joined([(0, moved.rows(np.array([2, 0])))])[0] == [expected[0], expected[4]]


@pytest.mark.parametrize("case", CASES)
def test_what_a_row_holds_is_known_by_its_bytes(case: str, tiny_tokenizer: Any) -> None:
    columns, name, _, _ = CASES[case]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    dataset = datasets.Dataset.from_dict(columns)
    column = find_column(dataset.data.schema, name, tokenizer)
    opened, turned = column.open(dataset), dataset.select(range(4, -1, -1))
    assert column.identities(dataset.to_dict()) == column.identities(turned.to_dict())[::-1]
    assert len(set(column.identities(dataset.to_dict()))) >= 4  # nothing and an empty row may be one
    contents = {opened.content(np.array(rows)) for rows in ([0, 1], [1, 0], [0, 2], [0])}
    assert len(contents) == 4
    assert opened.content(np.array([0, 2])) == column.open(turned).content(np.array([4, 2]))
    known = column.open_table(dataset.data.table).row_bytes(0, 5)
    assert known[1:4] == column.open_table(dataset.data.table).row_bytes(1, 4)
    assert len(set(known)) >= 4
