"""Passages of the reference task as rows of the pool, for a run that also trains on them (`reference_passes`).

Where it is used: `passage_layout` makes `PassageRows`, with the columns that pool rows have. A `MixedDataset` of them
stands where the dataloader's dataset stood: ids behind the pool's are passages.

Trade-off: a column that does not follow from a row's tokens is left out, and the run's own collator then says whether
it can do without.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.arrow import effective_labels
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.data.token_columns import as_array

_TARGET_MASKS = ("completion_mask", "assistant_masks")  # columns of TRL, 1 where a token is trained


class Column(NamedTuple):
    """How a column of a passage is filled.

    Attributes:
        name: Name of the column.
        kind: `ids`, `labels`, `mask` (1 where there is a token), `targets` (1 where it is trained), `positions`,
            `each` (one value at each token), `length`, `lengths` (a list of it) or `copy`.
        like: a pool row's value, whose type the passage's has.
    """

    name: str
    kind: str
    like: Any


@dataclasses.dataclass(frozen=True)
class PassageRows:
    """Passages as rows for the run's collator; plain data, so that worker processes may be given it.

    Attributes:
        tokens: The rows; labels are -100 where nothing is trained.
        here: (T,) bool, False where a block is filled up.
        columns: the columns of a row.
    """

    tokens: TokenRows
    here: npt.NDArray[np.bool_]
    columns: tuple[Column, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"A passage's number must be from 0 to {len(self) - 1}, got {i}.")
        ids, labels = self.tokens.row(i)
        here = self.here[self.tokens.offsets[i] : self.tokens.offsets[i + 1]]
        made = {
            "ids": ids,
            "labels": labels,
            "mask": here,
            "targets": labels != IGNORED,
            "positions": np.arange(len(ids)),
            "length": len(ids),
            "lengths": np.array([len(ids)]),
        }
        return {name: _filled(kind, made, like) for name, kind, like in self.columns}

    def digest(self) -> str:
        """SHA-256 of all rows: tokens, labels and columns."""
        digest = hashlib.sha256(repr([(name, kind) for name, kind, _ in self.columns]).encode())
        for part in (self.tokens.offsets, self.tokens.values, effective_labels(self.tokens), self.here):
            digest.update(np.ascontiguousarray(part, "<i8").tobytes())
        return digest.hexdigest()


class MixedDataset:
    """The pool with the passages behind it: row i of the pool is `dataset[i]`, passage j is `dataset[len(pool) + j]`.

    Its length is the pool's, and what else is asked of it, the pool answers.

    Args:
        pool: The map-style dataset of everything that may be trained on.
        passages: The rows that the passages make.
    """

    def __init__(self, pool: Any, passages: PassageRows) -> None:
        self._pool, self._passages, self._num_rows = pool, passages, len(pool)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, np.integer)) and key >= self._num_rows:
            return self._passages[int(key) - self._num_rows]
        return self._pool[key]

    def __getitems__(self, keys: Sequence[int]) -> list[Any]:
        """The rows of a batch; those of the pool as its own `__getitems__` reads them, if it has one."""
        read = getattr(self._pool, "__getitems__", None)
        if not read:
            return [self[key] for key in keys]
        inside = [key for key in keys if key < self._num_rows]
        rows = iter(read(inside) if inside else ())
        return [next(rows) if key < self._num_rows else self[key] for key in keys]

    def __getattr__(self, name: str) -> Any:
        if name in ("_pool", "_passages", "_num_rows") or name.startswith("__"):  # not there while it is unpickled
            raise AttributeError(name)
        return getattr(self._pool, name)


def columns_of(rows: Sequence[Any]) -> tuple[tuple[Column, ...], list[str]]:
    """How to fill each column of a passage, and the names of those that it cannot have; nothing without token ids."""
    if not all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        return (), []
    found, left_out = [], []
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        kind = _kind(str(name), values, [len(row["input_ids"]) for row in rows])
        if kind is None:
            left_out.append(str(name))
        else:
            found.append(Column(name, kind, values[0]))
    return tuple(found), left_out


def _kind(name: str, values: Sequence[Any], lengths: Sequence[int]) -> str | None:
    """How a column follows from a row's tokens; None where it does not."""
    arrays = [_plain_array(value) for value in values]
    if all(array.shape == (num,) and array.dtype.kind in "iubf" for array, num in zip(arrays, lengths, strict=True)):
        known = {"input_ids": "ids", "labels": "labels", "attention_mask": "mask"}.get(name)
        if known is not None:
            return known
        each = np.concatenate(arrays)
        if len(each) and (each == each[0]).all():
            return "each"
        if all(np.array_equal(array, np.arange(len(array))) for array in arrays):
            return "positions"
        return "targets" if name in _TARGET_MASKS else None
    if name in ("input_ids", "labels") and values[0] is not None:
        return None
    pairs = list(zip(arrays, lengths, strict=True))
    if all(array.dtype.kind in "iu" and array.ndim <= 1 and array.sum() == num for array, num in pairs):
        return "length" if arrays[0].ndim == 0 else "lengths"
    same = all(array.dtype == arrays[0].dtype and np.array_equal(array, arrays[0]) for array in arrays)
    return "copy" if same else None


def _plain_array(value: Any) -> npt.NDArray[Any]:
    """A value as an array; one of objects where it is none."""
    try:
        return as_array(value, "a column", "the pool")
    except Exception:  # ragged lists, and types that numpy refuses
        found = np.empty((), object)
        found[()] = repr(value)
        return found


def _filled(kind: str, made: Mapping[str, Any], like: Any) -> Any:
    """A passage's value of a column, of the type of a pool row's."""
    if kind == "copy":
        return like
    example = _plain_array(like)
    if kind == "each":
        array = np.full(len(made["ids"]), example[0])
    else:
        array = np.asarray(made[kind])
    array = array.astype(example.dtype) if example.size and example.dtype.kind in "iubf" else array.astype(np.int64)
    if hasattr(like, "detach"):
        import torch

        return torch.as_tensor(array).to(like.dtype)
    if isinstance(like, (np.ndarray, np.generic)):
        return array.astype(like.dtype) if array.ndim else like.dtype.type(array)
    return tuple(array.tolist()) if isinstance(like, tuple) else array.tolist()
