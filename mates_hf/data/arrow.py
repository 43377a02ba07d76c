"""List columns of an Arrow table as flat numpy arrays, and the last step that makes them `TokenRows`.

Place in the flow: `columns` reads a `datasets.Dataset` through this instead of row by row. Trade-off: pyarrow's own
`take` on list columns copies or overflows (ARROW-9773) and the row API of `datasets` builds Python objects, so rows
are located here by chunk with numpy. Work is per touched chunk, never per row: the more rows a call reads, the better.

Shape suffixes: N rows, T tokens over all rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import IGNORED, Piece, TokenRows, TokenSpans
from mates_hf.records import IntArray, UnsupportedSettingError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

# A chunk's flat values, the border of each row within them (None: fixed-size rows), and which rows are not null (None:
# all). All are views of Arrow memory, so that a memory-mapped corpus stays on disk.
Chunk = tuple[npt.NDArray[Any], npt.NDArray[Any] | None, npt.NDArray[np.bool_] | None]


def is_integer_list(column_type: pa.DataType) -> bool:
    """True for list, large_list and fixed_size_list columns of integers: the types `ListColumn` reads."""
    import pyarrow as pa

    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    is_list = is_list or pa.types.is_fixed_size_list(column_type)
    return bool(is_list and pa.types.is_integer(column_type.value_type))


class ListColumn:
    """Rows of one list column of integers, by row number. A null row reads as an empty row.

    Args:
        column: the column, of a type that `is_integer_list` accepts, in any number of chunks.
        name: the column's name, for errors.
        indices: (R,) int64 physical row of each visible row (what `shuffle` and `select` leave), or None where they
            are the same.
    """

    def __init__(self, column: pa.ChunkedArray, name: str, indices: IntArray | None = None) -> None:
        self.name = name
        self._chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._first_rows = np.cumsum([0, *map(len, self._chunks)], dtype=np.int64)
        self._indices = indices
        self._opened: dict[int, Chunk] = {}

    def lengths(self, ids: IntArray) -> IntArray:
        """(N,) int64 tokens of the rows `ids`."""
        lengths = np.zeros(len(ids), np.int64)
        for chunk, where, local in self._by_chunk(ids):
            lengths[where] = self._spans(chunk, local)[1]
        return lengths

    def read(self, ids: IntArray) -> tuple[npt.NDArray[Any], IntArray]:
        """Values (T,) int32 or int64 and offsets (N + 1,) int64 of the rows `ids`, in that order."""
        groups = list(self._by_chunk(ids))
        starts, lengths = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        for chunk, where, local in groups:
            starts[where], lengths[where] = self._spans(chunk, local)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        out = np.zeros(offsets[-1], np.int32 if all(self._is_small(chunk) for chunk, _, _ in groups) else np.int64)
        for chunk, where, _ in groups:
            values = self._open(chunk)[0]
            begin, sizes, targets = starts[where], lengths[where], offsets[where]
            in_order = np.array_equal(targets[1:], targets[:-1] + sizes[:-1])
            to = slice(int(targets[0]), int(targets[-1] + sizes[-1])) if in_order else _flat_index(targets, sizes)
            if np.array_equal(begin[1:], begin[:-1] + sizes[:-1]):
                out[to] = values[begin[0] : begin[-1] + sizes[-1]]
            else:
                out[to] = values[_flat_index(begin, sizes)]
        return out, offsets

    def spans(self, ids: IntArray) -> TokenSpans:
        """The rows `ids`, in that order, where they lie: no token is copied or looked at.

        Args:
            ids: (N,) int64 row numbers; repeats are allowed.

        Returns:
            N rows, views of Arrow memory.
        """
        pieces = (Piece(self._open(n)[0], *self._spans(n, local), where) for n, where, local in self._by_chunk(ids))
        return TokenSpans(pieces=tuple(pieces), num_rows=len(ids))

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

    def _is_small(self, chunk: int) -> bool:
        """True where the chunk's integers fit an int32."""
        return bool(np.can_cast(self._open(chunk)[0].dtype, np.int32))

    def _spans(self, number: int, local: IntArray) -> tuple[IntArray, IntArray]:
        """Start (M,) and length (M,), both int64, of a chunk's rows `local` within its values."""
        _, edges, valid = self._open(number)
        if edges is None:
            size = self._chunks[number].type.list_size
            starts, lengths = (local + self._chunks[number].offset) * size, np.full(len(local), size, np.int64)
        else:
            starts = edges[local].astype(np.int64)
            lengths = edges[local + 1].astype(np.int64) - starts
        return starts, lengths if valid is None else np.where(valid[local], lengths, 0)

    def _open(self, number: int) -> Chunk:
        """A chunk's views, made on first use and kept."""
        found = self._opened.get(number)  # several threads may read one column
        if found is not None:
            return found
        import pyarrow as pa

        chunk = self._chunks[number]
        values = chunk.values
        edges = None if pa.types.is_fixed_size_list(chunk.type) else chunk.offsets.to_numpy()
        valid = chunk.is_valid().to_numpy(zero_copy_only=False) if chunk.null_count else None
        missing = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
        if missing is not None:
            values = values.fill_null(0)
        found = self._opened[number] = (values.to_numpy(), edges, valid)
        if missing is not None:
            self._refuse_null_tokens(number, missing)
        return found

    def _refuse_null_tokens(self, number: int, missing: npt.NDArray[np.bool_]) -> None:
        """Raise where a row that is there holds a null; the slots of a null row may."""
        starts, lengths = self._spans(number, np.arange(len(self._chunks[number])))
        total = np.concatenate([[0], np.cumsum(missing)])
        bad = np.flatnonzero(total[starts + lengths] > total[starts])
        if len(bad):
            self._opened.pop(number, None)
            raise ValueError(
                f"The tokens in column `{self.name}` must not be null; {len(bad)} rows hold nulls, the first is row "
                f"{int(self._first_rows[number] + bad[0])} of the table. Remove those rows or tokens."
            )


def _flat_index(starts: IntArray, lengths: IntArray) -> IntArray:
    """(T,) int64 positions of all tokens of rows that begin at `starts`, row after row."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def assemble(
    values: npt.NDArray[Any],
    offsets: IntArray,
    labels: npt.NDArray[Any] | None = None,
    attention_mask: npt.NDArray[Any] | None = None,
) -> TokenRows:
    """Strip padding and drop labels that say nothing.

    Args:
        values: (T,) integer token ids, row after row.
        offsets: (N + 1,) int64 row borders.
        labels: (T,) integer, -100 where not trained, or None for all tokens but the first of a row.
        attention_mask: (T,) 0 at padding, which may stand left or right of a row's tokens, or None without padding.

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
    rows = TokenRows(values=values, offsets=offsets, labels=labels)
    plain = TokenRows(values=values, offsets=offsets)
    return plain if labels is None or np.array_equal(effective_labels(rows), effective_labels(plain)) else rows


def effective_labels(rows: TokenRows) -> npt.NDArray[Any]:
    """(T,) the label at each position, -100 where it is no target (each row's first position is never one)."""
    labels = rows.values if rows.labels is None else rows.labels
    return np.where(rows.target_mask, labels, IGNORED)
