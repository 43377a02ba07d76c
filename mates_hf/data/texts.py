"""Whatever holds text, read as texts: strings, rows of a dataset, token rows, a reference task, an lm-eval task.

Where it is used: by what reads words and not ids: influence models with a tokenizer of their own, and the comparison
of texts (`evaluation/contamination`). Trade-off: token ids are decoded, which is slower than reading text and not
always the inverse of tokenising (lower case and spaces may be lost), so a text column is preferred; truncation is
kept, as it is what the model is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mates_hf.data.columns import visible_columns
from mates_hf.data.harness import evaluated_texts
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.records import IntArray

# --- candidates ---


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
        candidates: A dataset, or a sequence of dicts, with the column.
        column: Name of the column; a missing text (None) is an empty one.
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
        tokenizer: The training tokenizer.

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


# --- any source ---


def texts_of(source: Any, argument: str, *, tokenizer: Any = None, text_column: str = "text") -> Iterator[str]:
    """The texts of a source, in their order, read as they are asked for.

    Args:
        source: Strings, or rows (dicts) with `text_column`, or else with `input_ids`: a `datasets.Dataset`, a list, a
            stream; a reference task; or an lm-eval task, whose evaluated documents are read as context and gold
            target.
        argument: Name of the caller's argument, for the errors.
        tokenizer: Tokenizer that decodes token ids; special tokens are left out.
        text_column: Column of the rows that holds the text.

    Returns:
        An iterator over the texts; a row that is wrong raises when it is reached.

    Raises:
        TypeError: the source or a row is of the wrong kind, such as a dict of splits.
        ValueError: a row has neither column, its text is none, or there is no tokenizer for its ids.
        UnsupportedSettingError: the source is a reference task of examples.
    """
    if isinstance(source, ReferenceTask):
        passages = source.text(f"`{argument}`", "Compare the bytes of examples instead.")
        return (_decode(passages.row(i)[0], tokenizer, f"`{argument}`") for i in range(len(passages)))
    if is_lm_eval_task(source):
        return iter(evaluated_texts(source))
    rows = source
    if not hasattr(source, "__iter__") and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        rows = (source[i] for i in range(len(source)))  # a plain torch dataset
    if isinstance(source, (str, bytes, Mapping)) or not hasattr(rows, "__iter__"):
        raise TypeError(
            f"`{argument}` must be texts or rows that are dicts, got {type(source).__name__}: pass a list of texts, "
            "or one split of a dataset."
        )
    return (_text_of(row, f"row {i} of `{argument}`", tokenizer, text_column) for i, row in enumerate(rows))


def is_lm_eval_task(source: Any) -> bool:
    """True for a task object of lm-eval."""
    # `eval_docs` is what is read, but to ask for it would load the documents.
    return hasattr(source, "doc_to_text") and hasattr(source, "has_test_docs")


def _text_of(row: Any, where: str, tokenizer: Any, text_column: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise TypeError(f"A text or a dict must be in {where}, got {type(row).__name__}.")
    if text_column in row:
        text = row[text_column]
        if not isinstance(text, str):
            raise ValueError(f"Column `{text_column}` must hold texts, got {type(text).__name__} in {where}.")
        return text
    if "input_ids" in row:
        return _decode(row["input_ids"], tokenizer, where)
    raise ValueError(
        f"`text_column` must be a column, or `input_ids` must be there, got {text_column!r} and the columns "
        f"{sorted(map(str, row))} in {where}. Pass the name of the column that holds the texts."
    )


def _decode(ids: Any, tokenizer: Any, where: str) -> str:
    if not hasattr(tokenizer, "decode"):
        raise ValueError(
            f"`tokenizer` must be the tokenizer that made the token ids of {where}, got {type(tokenizer).__name__}."
        )
    return decode_ids(ids, tokenizer)
