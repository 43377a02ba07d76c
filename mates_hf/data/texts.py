"""Candidates as texts, for influence models that read with a tokenizer of their own.

Place in the flow: beside `pool`; where candidates are token ids, they are decoded. Trade-off: decoding is not always
the inverse of tokenising (lower case and spaces may be lost), but it is what the model is trained on, truncation
included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mates_hf.data.columns import visible_columns
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.records import IntArray


def has_column(candidates: Any, column: str) -> bool:
    """True where the rows of a dataset, or of a sequence of dicts, have this column; a pool is read as tokens."""
    if isinstance(candidates, (TokenRows, CandidatePool)):
        return False
    names = visible_columns(candidates)
    if names is not None:
        return column in names
    if not (hasattr(candidates, "__len__") and hasattr(candidates, "__getitem__")) or isinstance(candidates, Mapping):
        return False  # `read_candidates` says what it must be
    first = candidates[0] if len(candidates) else None
    return isinstance(first, Mapping) and column in first


def read_texts(candidates: Any, column: str, ids: Sequence[int] | IntArray | None = None) -> list[str]:
    """Texts of a dataset that has them.

    Args:
        candidates: a dataset, or a sequence of dicts, with the column.
        column: its name; a missing text (None) is an empty one.
        ids: (N,) row numbers, None for all.

    Returns:
        N texts.

    Raises:
        ValueError: an id is not a row, or a value is no text.
    """
    num = len(candidates)
    rows = np.arange(num) if ids is None else np.asarray(ids, np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= num):
        raise ValueError(
            f"`candidate_id` must be rows 0 to {num - 1} of the candidates, got {rows.min()} to {rows.max()}. Pass "
            "the candidates that were measured."
        )
    if visible_columns(candidates) is None:
        values = [candidates[int(i)][column] for i in rows]
    else:
        values = [row[column] for row in candidates.select_columns([column]).select(rows)]
    for i, value in zip(rows, values, strict=True):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"`{column}` must hold texts, got {type(value).__name__} in row {i}.")
    return [value or "" for value in values]


def decode_rows(rows: TokenRows, tokenizer: Any) -> list[str]:
    """Texts of token rows, without special tokens.

    Args:
        rows: N rows of the tokenizer's ids.
        tokenizer: the training tokenizer.

    Returns:
        N texts; empty where a row has no other tokens.

    Raises:
        ValueError: an id is outside the tokenizer's vocabulary.
    """
    known = len(tokenizer)
    outside = np.flatnonzero((rows.values < 0) | (rows.values >= known))
    if len(outside):
        row = int(np.searchsorted(rows.offsets, outside[0], side="right")) - 1
        raise ValueError(
            f"Candidates must hold token ids of the training tokenizer, 0 to {known - 1}; row {row} holds "
            f"{rows.values[outside[0]]}. Pass the tokenizer that made them."
        )
    return [
        decode_ids(rows.values[start:end].tolist(), tokenizer)
        for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)
    ]


def decode_ids(ids: Sequence[int], tokenizer: Any) -> str:
    """Text of one row's ids, without special tokens."""
    # Cleaned up, "do n't" would be one word fewer, and no longer what a text column holds.
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
