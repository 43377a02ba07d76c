"""Candidates read as texts: columns found, rows picked, tokens decoded without special ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.data.texts import decode_rows, has_column, read_texts


def test_a_text_column_is_found_in_datasets_and_lists_and_not_in_a_pool() -> None:
    rows = [{"text": "a", "input_ids": [3]}, {"text": None, "input_ids": [4]}]
    table = Dataset.from_list(rows)
    assert has_column(rows, "text")
    assert has_column(table, "text")
    assert has_column(table.with_transform(lambda batch: {"other": batch["text"]}), "other")
    assert not has_column(table.select_columns(["input_ids"]), "text")
    assert not has_column(table, "body")
    assert not has_column(CandidatePool(table), "text")
    assert not any(has_column(value, "text") for value in (TokenRows.from_lists([[1]]), {"text": ["a"]}, [], 3))


@pytest.mark.parametrize("kind", [Dataset.from_list, list])
def test_texts_come_in_the_order_of_the_ids(kind: Any) -> None:
    candidates = kind([{"text": text} for text in ("a", None, "c", "d")])
    assert read_texts(candidates, "text") == ["a", "", "c", "d"]
    assert read_texts(candidates, "text", np.array([3, 0, 3, 1])) == ["d", "a", "d", ""]
    for ids in ([4], [-1]):
        with pytest.raises(ValueError, match="`candidate_id` must be rows 0 to 3"):
            read_texts(candidates, "text", ids)


def test_tokens_are_decoded_without_special_ones(tiny_tokenizer: Any) -> None:
    rows = TokenRows.from_lists([[4, 5, 2], [], [0, 2], [63]])
    assert decode_rows(rows, tiny_tokenizer) == ["w4 w5", "", "", "w63"]
    for bad in (64, -1):
        with pytest.raises(ValueError, match=f"0 to 63; row 2 holds {bad}"):
            decode_rows(TokenRows.from_lists([[4, 5], [], [6, bad]]), tiny_tokenizer)
