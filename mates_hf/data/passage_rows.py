"""Passages of the reference task as rows of the pool, for a run that also trains on them (`reference_passes`).

Where it is used: before the first step. `lay_out` makes a row of each passage with the columns that pool rows have,
and proves with the run's own collator that pool rows and passages make a batch in which every target token is trained.
A `MixedDataset` then stands where the dataset stood: ids behind the pool's are passages.

Where every pool row has one length and the collator pads none, whole passages are laid one after another into blocks
of that length, the tokenizer's end token between them. What is left of a block has the label -100.

Trade-off: a collator is code that nobody can read beforehand, so it is tried. Its own labels win: one that makes
labels of all tokens trains all tokens of a passage, also those of a prompt that the reference task leaves out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.arrow import effective_labels
from mates_hf.data.collated import Collator, forked_rng, name_of
from mates_hf.data.columns import fixed_positions
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.data.token_columns import as_array
from mates_hf.errors import UnsupportedSettingError
from mates_hf.records import IntArray

_NUM_LOOKED_AT = 16  # pool rows whose columns say what a passage's are
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


def lay_out(reference: ReferenceTask, pool: CandidatePool, separator: int | None = None) -> PassageRows:
    """The passages as rows that the run can be trained on, between those of the pool.

    Args:
        reference: The passages, cut to the model's context.
        pool: Rows and collator of the run. Without a collator rows of one length are taken to be stacked, and others
            to be padded by the loop.
        separator: The token between two passages in a block; None lays them side by side.

    Returns:
        A row for each passage, or blocks of whole passages; a passage that is longer than a block is cut into several,
        each of which begins with the last token of the one before it.

    Raises:
        UnsupportedSettingError: pool rows and passages make no batch, or target tokens would not be trained in it.
    """
    with forked_rng(0):
        rows = [pool.dataset[i] for i in fixed_positions(len(pool), _NUM_LOOKED_AT).tolist()]
    columns, left_out = _columns(rows)
    lengths = {len(as_array(row["input_ids"], "input_ids", "the pool")) for row in rows} if columns else set()
    problem, collate_fn = "" if columns else "they have no `input_ids`", pool.collate_fn
    if columns and (collate_fn is not None or len(lengths) > 1):
        labels = effective_labels(reference.rows)
        found = PassageRows(
            dataclasses.replace(reference.rows, labels=labels), np.ones(len(labels), np.bool_), columns
        )
        problem = "" if collate_fn is None else _problem(found, pool.dataset, collate_fn)
        if not problem:
            return found
    if len(lengths) == 1 and min(lengths) > 1:
        found = PassageRows(*_blocks(reference.rows, min(lengths), separator), columns)
        if not any(column.kind == "labels" for column in columns):
            problem = "rows of one length without `labels` say of no token that it is not trained"
        else:
            problem = "" if collate_fn is None else _problem(found, pool.dataset, collate_fn)
        if not problem:
            return found
    by = "the rows of the pool" if collate_fn is None else f"the collator `{name_of(collate_fn)}`"
    without = f" Of columns that differ from row to row a passage has none: {left_out}." if left_out else ""
    raise UnsupportedSettingError(
        f"With `reference_passes` a batch must take pool rows and passages of the reference task together, but {by} "
        f"did not: {problem}.{without} Give the pool rows of token ids (`input_ids`), with `labels` where all have "
        "one length, or use a collator that pads (`DataCollatorForLanguageModeling`), or set `reference_passes=0`."
    )


def _columns(rows: Sequence[Any]) -> tuple[tuple[Column, ...], list[str]]:
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


def _blocks(rows: TokenRows, length: int, separator: int | None) -> tuple[TokenRows, npt.NDArray[np.bool_]]:
    """Whole passages laid into blocks, as many as fit into each, in their order."""
    filler = 0 if separator is None else separator
    blocks: list[list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = []
    room = 0
    between = 0 if separator is None else 1
    for ids, labels in _pieces(rows, length):
        if not blocks or len(ids) + between > room:
            blocks.append([])
            room = length
        elif between:
            blocks[-1].append((np.array([filler]), np.array([IGNORED])))
            room -= 1
        blocks[-1].append((ids, labels))
        room -= len(ids)
    values = np.full((len(blocks), length), filler, np.int64)
    targets = np.full((len(blocks), length), IGNORED, np.int64)
    here = np.zeros((len(blocks), length), np.bool_)
    for number, block in enumerate(blocks):
        ids = np.concatenate([part for part, _ in block])
        values[number, : len(ids)] = ids
        targets[number, : len(ids)] = np.concatenate([part for _, part in block])
        here[number, : len(ids)] = True
    offsets = np.arange(len(blocks) + 1, dtype=np.int64) * length
    return TokenRows(values=values.reshape(-1), offsets=offsets, labels=targets.reshape(-1)), here.reshape(-1)


def _pieces(rows: TokenRows, length: int) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Token ids and labels of each passage, cut where it is longer than a block, without pieces that train nothing."""
    found = []
    for i in range(len(rows)):
        ids, labels = rows.row(i)
        for start in range(0, max(len(ids) - 1, 1), length - 1):  # a block's first token is never a target
            piece = labels[start : start + length].copy()
            piece[:1] = IGNORED
            if (piece != IGNORED).any():
                found.append((ids[start : start + length], piece))
    return found


def _problem(rows: PassageRows, dataset: Any, collate_fn: Collator) -> str:
    """Why a pool row and a passage make no batch, tried with the longest and the shortest; empty where they do."""
    lengths = rows.tokens.lengths
    for i in sorted({0, int(lengths.argmin()), int(lengths.argmax())}):
        try:
            with forked_rng(0):
                usual = collate_fn([dataset[0], dataset[0]])
                batches = [(collate_fn([dataset[0], rows[i]]), 1), (collate_fn([rows[i], dataset[0]]), 0)]
                batches.append((collate_fn([rows[i]]), 0))
            for batch, place in batches:
                if set(batch) != set(usual):
                    return (
                        f"with a passage a batch has {sorted(map(str, batch))}, and without {sorted(map(str, usual))}"
                    )
                problem = _untrained(rows, i, batch, place)
                if problem:
                    return problem
        except Exception as error:  # what a collator raises is its own business
            return f"{type(error).__name__}: {error}".strip().rstrip(".")
    return ""


def _untrained(rows: PassageRows, i: int, batch: Mapping[str, Any], place: int) -> str:
    """Why a batch does not train a passage's target tokens; empty where it does, or where nothing says so."""
    span = slice(rows.tokens.offsets[i], rows.tokens.offsets[i + 1])
    here = rows.here[span]
    ids, labels = (part[here] for part in rows.tokens.row(i))
    found = as_array(batch["input_ids"], "input_ids", "the batch")[place]
    at = _find(found, ids)
    if at is None:
        return f"the tokens of passage {i} are not in the batch as they are"
    mask = batch.get("attention_mask")
    if (
        mask is not None
        and getattr(mask, "ndim", 0) == 2
        and not np.all(as_array(mask, "", "")[place][at : at + len(ids)])
    ):
        return f"tokens of passage {i} are masked"
    shifted = batch.get("shift_labels")
    given = batch.get("labels") if shifted is None else shifted
    targets = np.flatnonzero(labels != IGNORED)
    if given is None:
        return ""
    where = at + targets - (shifted is not None)
    trained = as_array(given, "labels", "the batch")[place][where]
    wrong = trained != ids[targets]
    # A collator that pads with a token of the text (the end token, say) trains it nowhere, in pool rows neither.
    is_padding = len(np.unique(ids[targets][wrong])) == 1 and (trained[wrong] == IGNORED).all() and not wrong.all()
    if wrong.any() and not is_padding:
        return f"of passage {i} it trains {np.count_nonzero(~wrong)} of {len(targets)} target tokens"
    return ""


def _find(row: npt.NDArray[Any], ids: IntArray) -> int | None:
    """Where in a row some ids stand one after another; None where they do not."""
    if row.ndim != 1:
        return None
    for at in np.flatnonzero(row[: len(row) - len(ids) + 1] == ids[0]).tolist() if len(row) >= len(ids) else ():
        if np.array_equal(row[at : at + len(ids)], ids):
            return int(at)
    return None
