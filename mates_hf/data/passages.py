"""Rows of a reference dataset as token rows: texts, prompts with completions, or token ids.

Where it is used: `reference` builds its tasks with it. Trade-off: a prompt and its completion are tokenised as one
text, the way a model would meet them, so the border is found afterwards and a token may span it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.collated import read_row, stack_rows
from mates_hf.data.rows import IGNORED, TokenRows

LossOn = Literal["all", "completion", "both"]


class Passage(NamedTuple):
    """A prompt and what should follow it, joined already; the prompt is empty where the whole text is one."""

    prompt: str
    completion: str


def tokenise(passages: Iterable[Passage], tokenizer: Any, loss_on: LossOn) -> TokenRows:
    """Each passage as the tokenizer sees its whole text; labels where the completion counts more, or alone."""
    if loss_on == "all":
        return TokenRows.from_lists([tokenizer(prompt + completion)["input_ids"] for prompt, completion in passages])
    ids, labels = [], []
    for passage in passages:
        row, is_target = _completion_targets(passage, tokenizer)
        ids.append(row)
        labels.append(np.where(is_target, row, IGNORED).tolist())
    return TokenRows.from_lists(ids, labels)


def both_weights(rows: TokenRows) -> npt.NDArray[np.float32]:
    """(T,) weights with which the targets together count as much as all tokens together."""
    everything = dataclasses.replace(rows, labels=None).target_mask
    found = everything / max(everything.sum(), 1) + rows.target_mask / max(rows.target_mask.sum(), 1)
    return np.asarray(found, np.float32)


def _completion_targets(passage: Passage, tokenizer: Any) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """Ids of the whole text, and (length,) bool: True where a token holds some of the completion."""
    text = passage.prompt + passage.completion
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True)
        # Special tokens span nothing and stand at (0, 0), so they are never targets.
        ends = np.array([end for _, end in encoded["offset_mapping"]], np.int64)
        return list(encoded["input_ids"]), ends > len(passage.prompt)
    ids = list(tokenizer(text)["input_ids"])
    alone = tokenizer(passage.prompt)["input_ids"]
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, alone, strict=False)))
    # Special tokens that the tokenizer puts behind a text are no part of the completion.
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), 0)
    where = np.arange(len(ids))
    return ids, (where >= max(shared, start)) & (where < start + len(bare))


def join(row: Mapping[str, Any], text: str | None, prompt: str | None, completion: str | None, i: int) -> Passage:
    """One row's texts, the completion with the white space that joins it to its prompt."""

    def read(column: str) -> str:
        if not isinstance(row[column], str):
            raise ValueError(f"Column `{column}` must hold texts, got {type(row[column]).__name__} in row {i}.")
        return str(row[column])

    if text is not None:
        return Passage("", read(text))
    assert prompt is not None
    assert completion is not None
    before, after = read(prompt), read(completion)
    apart = not before or not after or before[-1].isspace() or after[0].isspace()
    return Passage(before, after if apart else f" {after}")


def id_rows(rows: Sequence[Mapping[str, Any]], ids: str, labels: str | None) -> TokenRows:
    """Rows that hold token ids, read as a candidate pool's would be: without padding, a null row as an empty one."""
    parsed = []
    for i, row in enumerate(rows):
        named = {"input_ids": row[ids], "attention_mask": row.get("attention_mask")}
        if labels is not None:
            named["labels"] = row[labels]
        parsed.append(read_row(named, None, f"reference row {i}"))
    return stack_rows(parsed)


def first_rows(dataset: Any, limit: int | None) -> Iterator[Any]:
    """The first `limit` rows, by number where there are numbers."""
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1 row or None, got {limit}.")
    if isinstance(dataset, (Mapping, str)):
        raise TypeError(
            f"`dataset` must be rows that are dicts, got {type(dataset).__name__}: pass one of its splits."
        )
    try:
        num = len(dataset)
    except TypeError:
        if limit is None:
            raise ValueError("`limit` must be given for a stream, which may have no end; got None.") from None
        return itertools.islice(iter(dataset), limit)
    return (dataset[i] for i in range(num if limit is None else min(num, limit)))


def check_columns(rows: Sequence[Any], given: Mapping[str, str], dataset: Any) -> None:
    """Raise where a row is no dict or lacks one of the columns that arguments name."""
    if not rows:
        raise ValueError("`dataset` must have rows, got none.")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"`dataset` must have rows that are dicts, got {type(row).__name__} in row {i}.")
        for argument, column in given.items():
            if column not in row:
                there = columns_there(dataset) or f" It has {sorted(map(str, row))}."
                raise ValueError(f"`{argument}` must be a column of the dataset, got {column!r} (row {i}).{there}")


def columns_there(dataset: Any) -> str:
    """A sentence that names the dataset's columns, or nothing where it does not know them."""
    names = getattr(dataset, "column_names", None)
    return f" The dataset has the columns {names}." if names else ""


def check_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, or an error where there is none for texts."""
    if not callable(tokenizer):
        raise ValueError(f"`tokenizer` must be the model's tokenizer where passages are texts, got {tokenizer!r}.")
    return tokenizer
