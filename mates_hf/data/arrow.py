"""List columns of an Arrow table as flat numpy arrays, and the last step that makes them `TokenRows`.

Where it is used: `token_columns` reads tables through this instead of row by row.
Trade-off: pyarrow's own `take` on list columns copies or overflows (ARROW-9773) and the row API of `datasets` builds
Python objects, so rows are located here by chunk with numpy. Work is per touched chunk, never per row: the more rows a
call reads, the better.

Shape suffixes: N rows, T tokens over all rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.column_types import is_list_view
from mates_hf.data.rows import IGNORED, Piece, TokenRows, TokenSpans, flat_index
from mates_hf.errors import UnsupportedSettingError
from mates_hf.records import IntArray

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

# Chunks whose values are converted (booleans, fractions, nulls filled in) and not views of Arrow memory: only so many
# are kept open, so that reading a large corpus in its order does not gather it in memory.
_NUM_CONVERTED = 8


class Ragged(NamedTuple):
    """One column's rows.

    Attributes:
        values: (T,) whole numbers, row after row.
        offsets: (N + 1,) int64 row borders.
        valid: (N,) bool, False where the column says nothing of a row; None where every row is there.
    """

    values: npt.NDArray[Any]
    offsets: IntArray
    valid: npt.NDArray[np.bool_] | None = None


class _Chunk(NamedTuple):
    """A chunk's flat values and where its rows lie in them; views of Arrow memory where nothing is converted.

    Attributes:
        values: (B,) whole numbers.
        begins: (R,) first position of each row; None for rows of a fixed size.
        ends: (R,) position after each row's last, or None.
        valid: (R,) bool, False at null rows; None where there are none.
        num_unfit: (B + 1,) how many values before each position are null or no mask; None where none is.
        base: position of `values[0]` in the chunk's own values, in which `begins` and `ends` are counted; None where
            `values` are those.
    """

    values: npt.NDArray[Any]
    begins: npt.NDArray[Any] | None
    ends: npt.NDArray[Any] | None
    valid: npt.NDArray[np.bool_] | None
    num_unfit: IntArray | None
    base: int | None = None


class ListColumn:
    """Rows of one list column, by row number. A null row reads as an empty row.

    Args:
        column: the column in any number of chunks: lists of whole numbers, of booleans or, for a mask, of fractions;
            or nulls alone.
        name: the column's name, for those who hold several.
        indices: (R,) int64 physical row of each visible row (what `shuffle` and `select` leave), or None where they
            are the same.
    """

    def __init__(self, column: pa.ChunkedArray, name: str, indices: IntArray | None = None) -> None:
        self.name = name
        self._chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._first_rows = np.cumsum([0, *map(len, self._chunks)], dtype=np.int64)
        self._indices = indices
        self._opened: dict[int, _Chunk] = {}
        self._converted: dict[int, _Chunk] = {}
        self.may_be_unfit = False  # whether a chunk that was opened holds what `first_unfit` looks for

    def lengths(self, ids: IntArray) -> IntArray:
        """(N,) int64 tokens of the rows `ids`."""
        lengths = np.zeros(len(ids), np.int64)
        for number, where, local in self._by_chunk(ids):
            lengths[where] = self._spans(self._open(number), number, local)[1]
        return lengths

    def read(self, ids: IntArray) -> Ragged:
        """The rows `ids`, in that order, copied as int32 or int64; values that `first_unfit` finds read as 0."""
        groups = [(self._open(number), number, where, local) for number, where, local in self._by_chunk(ids)]
        starts, lengths = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        valid = np.ones(len(ids), bool) if any(chunk.valid is not None for chunk, *_ in groups) else None
        for chunk, number, where, local in groups:
            starts[where], lengths[where] = self._spans(chunk, number, local)
            if valid is not None and chunk.valid is not None:
                valid[where] = chunk.valid[local]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        small = all(np.can_cast(chunk.values.dtype, np.int32) for chunk, *_ in groups)
        out = np.zeros(offsets[-1], np.int32 if small else np.int64)
        for chunk, _, where, _ in groups:
            begin, sizes, targets = starts[where], lengths[where], offsets[where]
            in_order = np.array_equal(targets[1:], targets[:-1] + sizes[:-1])
            to = slice(int(targets[0]), int(targets[-1] + sizes[-1])) if in_order else flat_index(targets, sizes)
            if np.array_equal(begin[1:], begin[:-1] + sizes[:-1]):
                out[to] = chunk.values[begin[0] : begin[-1] + sizes[-1]]
            else:
                out[to] = chunk.values[flat_index(begin, sizes)]
        return Ragged(out, offsets, valid)

    def spans(self, ids: IntArray) -> TokenSpans:
        """The rows `ids`, in that order, where they lie: no token is copied or looked at.

        Args:
            ids: (N,) int64 row numbers; repeats are allowed.

        Returns:
            N rows, views of Arrow memory.
        """
        pieces = []
        for number, where, local in self._by_chunk(ids):
            chunk = self._open(number)
            pieces.append(Piece(chunk.values, *self._spans(chunk, number, local), where))
        return TokenSpans(pieces=tuple(pieces), num_rows=len(ids))

    def first_unfit(self, ids: IntArray) -> tuple[int, float | None] | None:
        """The first of the rows `ids` that holds a null, or a fraction other than 0 and 1.

        Args:
            ids: (N,) int64 row numbers.

        Returns:
            Its position in `ids` and the fraction, None for a null; None where there is no such row.
        """
        found: tuple[int, float | None] | None = None
        for number, where, local in self._by_chunk(ids):
            chunk = self._open(number)
            if chunk.num_unfit is None:
                continue
            starts, lengths = self._spans(chunk, number, local)
            bad = np.flatnonzero(chunk.num_unfit[starts + lengths] > chunk.num_unfit[starts])
            if len(bad) and (found is None or where[bad[0]] < found[0]):
                at = int(starts[bad[0]])
                at = int(np.searchsorted(chunk.num_unfit, chunk.num_unfit[at], side="right")) - 1
                value = self._chunks[number].values[at + (chunk.base or 0)].as_py()
                found = int(where[bad[0]]), None if value is None else float(value)
        return found

    def _by_chunk(self, ids: IntArray) -> Iterator[tuple[int, IntArray, IntArray]]:
        """For each touched chunk: its number, the positions in `ids` that fall into it, and their rows inside it."""
        if not len(ids):
            return
        physical = ids if self._indices is None else self._indices[ids]
        chunk_of = np.searchsorted(self._first_rows, physical, side="right") - 1
        order = np.argsort(chunk_of, kind="stable")
        cuts = np.flatnonzero(np.diff(chunk_of[order])) + 1
        for where in np.split(order, cuts):
            chunk = int(chunk_of[where[0]])
            yield chunk, where, physical[where] - self._first_rows[chunk]

    def _spans(self, chunk: _Chunk, number: int, local: IntArray) -> tuple[IntArray, IntArray]:
        """Start (M,) and length (M,), both int64, of a chunk's rows `local` within its values."""
        if chunk.begins is None or chunk.ends is None:
            size = self._chunks[number].type.list_size
            starts, lengths = (local + self._chunks[number].offset) * size, np.full(len(local), size, np.int64)
        else:
            starts = chunk.begins[local].astype(np.int64)
            lengths = chunk.ends[local].astype(np.int64) - starts
        if chunk.base is not None:  # rows of no length may begin anywhere
            starts = np.clip(starts - chunk.base, 0, len(chunk.values))
        return starts, lengths if chunk.valid is None else np.where(chunk.valid[local], lengths, 0)

    def _open(self, number: int) -> _Chunk:
        """A chunk's arrays, made on first use and kept."""
        found = self._opened.get(number) or self._converted.get(number)  # several threads may read one column
        if found is not None:
            return found
        found, is_view = _open_chunk(self._chunks[number])
        self.may_be_unfit |= found.num_unfit is not None
        if is_view:
            self._opened[number] = found
            return found
        for old in list(self._converted)[: max(0, len(self._converted) - _NUM_CONVERTED + 1)]:
            self._converted.pop(old, None)
        self._converted[number] = found
        return found


def physical_rows(dataset: Any) -> IntArray | None:
    """(N,) signed table row of each row of a shuffled or selected `datasets.Dataset`; None where they are the same.

    A view of what the dataset holds, where that lies in one piece. `shuffle` writes it in many: a copy then, of four
    bytes a row where that is enough.
    """
    indices = getattr(dataset, "_indices", None)
    if indices is None:
        return None
    chunks = indices.column(0).chunks
    if len(chunks) == 1 and chunks[0].type.bit_width == 64:
        return np.asarray(chunks[0].to_numpy()).view(np.int64)
    is_short = len(dataset.data) <= 2**31
    rows: IntArray = np.empty(len(indices), np.int32 if is_short else np.int64)
    done = 0
    for chunk in chunks:
        rows[done : done + len(chunk)] = chunk.to_numpy()
        done += len(chunk)
    return rows


def _open_chunk(chunk: Any) -> tuple[_Chunk, bool]:
    """A chunk's arrays, and whether they are views of its memory."""
    import pyarrow as pa

    if pa.types.is_null(chunk.type):
        none = np.zeros(len(chunk), np.int64)
        return _Chunk(none[:0], none, none, np.zeros(len(chunk), bool), None), False
    begins = ends = None
    if is_list_view(chunk.type):
        begins = chunk.offsets.to_numpy()
        ends = begins.astype(np.int64) + chunk.sizes.to_numpy()
    elif not pa.types.is_fixed_size_list(chunk.type):
        edges = chunk.offsets.to_numpy()
        begins, ends = edges[:-1], edges[1:]
    valid = chunk.is_valid().to_numpy(zero_copy_only=False) if chunk.null_count else None
    flat = chunk.values
    if pa.types.is_integer(flat.type) and not flat.null_count:
        return _Chunk(flat.to_numpy(), begins, ends, valid, None), True
    base, stop = _stretch(chunk, begins, ends, valid)
    flat = flat.slice(base, stop - base)  # a slice of a table shares the values of all of it
    unfit = flat.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_null(flat.type):
        values = np.zeros(len(flat), np.int64)
    else:
        if not pa.types.is_floating(flat.type):
            flat = flat.fill_null(False if pa.types.is_boolean(flat.type) else 0)
        values = flat.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f":
        unfit = unfit | ((values != 0) & (values != 1))
        values = values == 1
    values = values.astype(np.int8) if values.dtype.kind == "b" else values
    num_unfit = np.concatenate([[0], np.cumsum(unfit, dtype=np.int64)]) if unfit.any() else None
    return _Chunk(values, begins, ends, valid, num_unfit, base), False


def _stretch(
    chunk: Any,
    begins: npt.NDArray[Any] | None,
    ends: npt.NDArray[Any] | None,
    valid: npt.NDArray[np.bool_] | None,
) -> tuple[int, int]:
    """The first position of a chunk's values that a row of it has, and the one after the last."""
    if begins is None or ends is None:
        size = chunk.type.list_size
        return chunk.offset * size, (chunk.offset + len(chunk)) * size
    there = (ends > begins) if valid is None else (ends > begins) & valid
    return (int(begins[there].min()), int(ends[there].max())) if there.any() else (0, 0)


def assemble(
    values: npt.NDArray[Any],
    offsets: IntArray,
    labels: npt.NDArray[Any] | None = None,
    attention_mask: npt.NDArray[Any] | None = None,
    starts: npt.NDArray[np.bool_] | None = None,
) -> TokenRows:
    """Strip padding and drop labels that say nothing.

    Args:
        values: (T,) integer token ids, row after row.
        offsets: (N + 1,) int64 row borders.
        labels: (T,) integer, -100 where not trained, or None for all tokens but the first of a row.
        attention_mask: (T,) 0 at padding, which may stand left or right of a row's tokens, or None without padding.
        starts: (T,) bool, True where a document of a packed row begins, or None where every row is one document.

    Returns:
        The rows without padding; `labels` is None where each row's labels are its ids from the second on.

    Raises:
        UnsupportedSettingError: a row's mask has a hole, so what it hides cannot be left out.
    """
    if attention_mask is not None and not (kept := attention_mask != 0).all():
        total = np.concatenate([[0], np.cumsum(kept)])
        starts_run = kept.copy()
        starts_run[1:] &= ~kept[:-1]
        heads = offsets[:-1][np.diff(offsets) > 0]
        starts_run[heads] = kept[heads]
        runs = np.concatenate([[0], np.cumsum(starts_run)])
        holes = np.flatnonzero(runs[offsets[1:]] - runs[offsets[:-1]] > 1)
        if len(holes):
            raise UnsupportedSettingError(
                f"`attention_mask` must be 1 on one unbroken stretch of each row; {len(holes)} rows have a 0 between "
                "their tokens. Give masks that only mark padding, or leave the masked tokens out of the rows."
            )
        if labels is not None and (labels[~kept] != IGNORED).any():
            logger.warning(
                "%d padding tokens (`attention_mask` 0) carry a label: the loss trains on them, influence leaves them "
                "out. Set their labels to -100.",
                int((labels[~kept] != IGNORED).sum()),
            )
        values, offsets = values[kept], total[offsets]
        labels = None if labels is None else labels[kept]
        starts = None if starts is None else starts[kept]
    segments = None
    if starts is not None:
        borders = np.unique(np.concatenate([np.flatnonzero(starts), offsets]))
        segments = borders if len(borders) > len(np.unique(offsets)) else None
    rows = TokenRows(values=values, offsets=offsets, labels=labels, segments=segments)
    plain = TokenRows(values=values, offsets=offsets, segments=segments)
    return plain if labels is None or np.array_equal(effective_labels(rows), effective_labels(plain)) else rows


def effective_labels(rows: TokenRows) -> npt.NDArray[Any]:
    """(T,) the label at each position, -100 where it is no target (each row's first position is never one)."""
    labels = rows.values if rows.labels is None else rows.labels
    return np.where(rows.target_mask, labels, IGNORED)


def joined_rows(parts: Sequence[TokenRows]) -> TokenRows:
    """Rows of all parts, of which there is one or more, one after the other; none of them is packed."""
    lengths = np.concatenate([rows.lengths for rows in parts])
    plain = all(rows.labels is None for rows in parts)
    return TokenRows(
        values=np.concatenate([rows.values for rows in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=None if plain else np.concatenate([effective_labels(rows) for rows in parts]),
    )
