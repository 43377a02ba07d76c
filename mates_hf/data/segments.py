"""Where documents begin inside a packed row, as the run's own batches say it.

Where it is used: `collated` asks it of every row, and `influence/packed_rows` of the batches that it compares. Packers
say it in several ways: positions that begin anew (`DataCollatorWithFlattening`, TRL), borders for attention kernels
(`cu_seq_lens_q`), a number for each document (`seq_idx`), or lengths (the column `seq_lengths` of TRL).

Trade-off: whatever a batch has of these must say the same. A row whose positions neither begin anew nor count up is
refused, because nobody could say what of it is trained together.

Shapes: L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.errors import UnsupportedSettingError

# Inputs by which several texts may share a row; the longest ones say nothing that the others do not.
LENGTHS = "seq_lengths"
_AT_TOKENS, _BORDERS, _LONGEST = ("position_ids", "seq_idx"), "cu_seq", "max_length_"
ONE_DOCUMENT_A_ROW = (
    'With TRL\'s SFTTrainer set `packing=True, packing_strategy="wrapped", padding_free=False` to keep packing (texts '
    "are cut into blocks), or `packing=False, padding_free=False` to train one text a row."
)

Starts = npt.NDArray[np.bool_]


def is_packing_key(key: Any) -> bool:
    """True for an input that may say where the documents of a row begin."""
    name = str(key)
    return name in (*_AT_TOKENS, LENGTHS) or name.startswith((_BORDERS, _LONGEST))


def document_starts(batch: Mapping[str, Any], source: str) -> Starts | None:
    """Where documents begin in the one row of a batch.

    Args:
        batch: A row of the dataset, or a batch of one row.
        source: What made it, for errors.

    Returns:
        (L,) bool, padding included; None where nothing says that the row has several documents.

    Raises:
        UnsupportedSettingError: positions do not count up by 1 in a document, or two inputs mark other documents.
    """
    ids = _array(batch.get("input_ids"))
    if ids is None or not any(is_packing_key(key) for key in batch):
        return None
    length = ids.size
    kept = _array(batch.get("attention_mask"))
    there = kept.reshape(-1) != 0 if kept is not None and kept.size == length else np.ones(length, np.bool_)
    found: dict[str, Starts] = {}
    for key, value in batch.items():
        array = _array(value)
        if array is None or array.dtype.kind not in "iu" or array.ndim > 2 or not array.size:
            continue  # positions of several axes, as vision models have them
        starts = _starts_of(str(key), array.reshape(-1), there, source)
        if starts is not None:
            found[str(key)] = starts
    if not found:
        return None
    first = min(found)
    for key, starts in found.items():
        if not np.array_equal(starts, found[first]):
            raise UnsupportedSettingError(
                f"`{first}` and `{key}` must mark the same documents in a row, got documents that begin at "
                f"{_listed(found[first])} and at {_listed(starts)} from {source}. Make both of the same lengths, or "
                "leave the wrong one out."
            )
    starts = found[first]
    return starts if starts.sum() > 1 else None


def _starts_of(key: str, array: npt.NDArray[Any], there: Starts, source: str) -> Starts | None:
    """What one input of a row says; None where it says nothing."""
    starts = np.zeros(len(there), np.bool_)
    if key in _AT_TOKENS and len(array) == len(there):
        kept = array[there].astype(np.int64)
        if not len(kept):
            return None
        anew = np.concatenate([[True], np.diff(kept) != (1 if key == "position_ids" else 0)])
        odd = anew & (kept != 0) & (kept != kept[0])
        if key == "position_ids" and odd.any():
            at = int(np.flatnonzero(odd)[0])
            raise UnsupportedSettingError(
                f"`position_ids` must count up by 1 inside a document and begin anew at 0 with the next one, got "
                f"{kept[at - 1]}, {kept[at]} from {source}. Number the tokens of each document from 0 (as "
                "`DataCollatorWithFlattening` does), or leave `position_ids` out of the batch: the model then counts."
            )
        starts[np.flatnonzero(there)[anew]] = True
        return starts
    if key == LENGTHS:
        return lengths_to_starts(array, len(there), source)
    if not key.startswith(_BORDERS):
        return None
    return _borders_to_starts(key, array.astype(np.int64), len(there), source)


def lengths_to_starts(lengths: Any, num_tokens: int, source: str) -> Starts:
    """Where documents of these lengths begin in a row.

    Args:
        lengths: Tokens of each document.
        num_tokens: Tokens of the row.
        source: What made it, for errors.

    Returns:
        (num_tokens,) bool.

    Raises:
        UnsupportedSettingError: The lengths are not those of the row.
    """
    borders = np.concatenate([[0], np.cumsum(np.asarray(lengths), dtype=np.int64)])
    return _borders_to_starts(LENGTHS, borders, num_tokens, source)


def _borders_to_starts(key: str, borders: npt.NDArray[np.int64], num_tokens: int, source: str) -> Starts:
    starts = np.zeros(num_tokens, np.bool_)
    if borders[0] != 0 or borders[-1] != num_tokens or (np.diff(borders) < 0).any():
        raise UnsupportedSettingError(
            f"`{key}` must cover the {num_tokens} tokens of a row from its first to its last, got borders from "
            f"{borders[0]} to {borders[-1]} from {source}. Make it of the lengths of the row's documents, or leave it "
            "out."
        )
    starts[borders[:-1][np.diff(borders) > 0]] = True
    return starts


def positions(length: int, starts: Starts | None) -> npt.NDArray[np.int64]:
    """(L,) int64 positions that count up from 0 in each document; `starts` None: in the whole row."""
    where = np.arange(length)
    if starts is None:
        return where
    found: npt.NDArray[np.int64] = where - np.maximum.accumulate(np.where(starts, where, 0))
    return found


def trailing_fill(starts: Starts, labels: npt.NDArray[Any] | None, row: Any) -> int:
    """Tokens that a collator without a mask fills a row up with, each as a document of its own without a label.

    Args:
        starts: (L,) bool, where documents begin.
        labels: (L,) labels, -100 where not trained; None where every token is its own.
        row: The row of the dataset that was collated, whose length tells.

    Returns:
        How many; 0 where nothing tells.
    """
    given = _array(row.get("input_ids")) if isinstance(row, Mapping) else None
    num_more = 0 if given is None else len(starts) - given.size
    if labels is None or len(labels) != len(starts) or not 0 < num_more < len(starts):
        return 0
    return num_more if bool((starts & (labels == -100))[-num_more:].all()) else 0


def _array(value: Any) -> npt.NDArray[Any] | None:
    """A value as an array; None where there is none."""
    if value is None or isinstance(value, (str, bytes, Mapping)):
        return None
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, and types that numpy does not have
        return None


def _listed(starts: Starts) -> str:
    where = np.flatnonzero(starts).tolist()
    return f"{where}" if len(where) <= 6 else f"{where[:6]} and so on ({len(where)})"
