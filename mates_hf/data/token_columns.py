"""Rows of token ids, labels and attention masks, read one way wherever they come from.

Where it is used: `columns` (a pool's Arrow columns), `collated` (one row, also a collated one) and `scored_column`
(tables, datasets, batches of streams) all read through this; `column_types` has decided what each column is.

What counts: lists of whole numbers; for a mask also booleans and floats that are exactly 0 or 1. A row that is null
in `input_ids` is empty, one that is null in `labels` trains every token but its first, one that is null in
`attention_mask` has no padding. A null inside a row is refused.

Shape suffixes: N rows, T tokens over all rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.arrow import ListColumn, Ragged, assemble
from mates_hf.data.column_types import LABELS, MASK, check_types, names_beside, one_value, refusal
from mates_hf.data.rows import TokenRows, TokenSpans, stretches
from mates_hf.records import IntArray

_TOKENS_AT_ONCE = 1 << 22  # 9 to 23 bytes each

RowName = Callable[[int], str]
"""What errors call the row at a position."""


def one_value_refusal(name: str, value: npt.NDArray[Any], where: str) -> ValueError:
    """The refusal of a row that has one value and not a list of them."""
    return refusal(name, one_value(_array_word(value)), where)


def length_refusal(name: str, length: int, num_tokens: int, where: str) -> ValueError:
    """The error for labels or a mask that are not as many as the ids of their row."""
    return ValueError(
        f"`{name}` must be as long as `input_ids` in every row; {where} has {length} and {num_tokens}. Give one for "
        f"each token, or remove the column (`dataset.remove_columns('{name}')`)."
    )


def _null_refusal(name: str, where: str) -> ValueError:
    return ValueError(f"`{name}` must not be null at a token, got a null ({where}). Remove those rows or tokens.")


def _array_word(array: npt.NDArray[Any]) -> str:
    """The plural of what the values of one row are."""
    if array.ndim > 1:
        return "lists"
    word = {"i": "integers", "u": "integers", "b": "booleans", "f": "floats", "U": "texts"}.get(array.dtype.kind)
    if word is None and array.dtype.kind == "O" and array.size:
        first = array.reshape(-1)[0]
        word = "dicts" if isinstance(first, Mapping) else f"{type(first).__name__} objects"
    return word or str(array.dtype)


# --- one row, and rows as streams hand them out ---


def as_array(value: Any, name: str, where: str) -> npt.NDArray[Any]:
    """A row's list, array or tensor as an array, or the refusal of a ragged list."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # numpy has no bfloat16
    try:
        return np.asarray(value)
    except ValueError as error:
        raise refusal(name, "lists of lists", where) from error


def whole_numbers(value: Any, name: str, where: str) -> npt.NDArray[np.int64]:
    """One row's ids, labels or mask.

    Args:
        value: A list, array or tensor.
        name: Name of the column, which decides what may count.
        where: Which row it is, for errors.

    Returns:
        (length,) int64.

    Raises:
        ValueError: it cannot count as what it is called, or holds a null.
    """
    array = as_array(value, name, where)
    if array.ndim != 1:
        raise refusal(name, "lists of lists", where) if array.ndim else one_value_refusal(name, array, where)
    if not array.size:  # an empty list has no integer type
        return np.zeros(0, np.int64)
    if array.dtype.kind == "O" and any(item is None for item in array):
        raise _null_refusal(name, where)
    if name == MASK and array.dtype.kind == "f":
        bad = array[(array != 0) & (array != 1)]
        if bad.size:
            raise refusal(name, f"{float(bad[0]):g}", where)
    elif array.dtype.kind not in ("iub" if name == MASK else "iu"):
        raise refusal(name, f"lists of {_array_word(array)}", where)
    return array.astype(np.int64)


def read_lists(lists: Iterable[Any], name: str, row_name: RowName) -> Ragged:
    """Rows without Arrow types; None is a row that has no value."""
    rows = list(lists)
    valid = np.array([row is not None for row in rows], bool)
    arrays = [
        np.zeros(0, np.int64) if row is None else whole_numbers(row, name, row_name(i)) for i, row in enumerate(rows)
    ]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    values = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    return Ragged(values, offsets, None if valid.all() else valid)


def read_batch(batch: Mapping[str, Any], column: str) -> TokenRows:
    """Rows of a stream, lists by column, as they are trained on.

    Args:
        batch: The column of token ids and, next to `input_ids`, `labels` and `attention_mask` where they are given.
        column: Column of token ids.

    Returns:
        The rows, without padding.

    Raises:
        ValueError: a row cannot count as what its column is called, or lengths differ.
    """

    def row_name(i: int) -> str:
        return f"row {i} of a batch"

    names = [column, *names_beside(batch, column)]
    found = {name: read_lists(batch[name], name, row_name) for name in names}
    return join(found[column], {name: found[name] for name in names[1:]}, row_name)


# --- rows of tables ---


def read_column(column: ListColumn, ids: IntArray, row_name: RowName) -> Ragged:
    """The rows `ids` of a column whose type counts, or the refusal of a value in them that cannot."""
    found = column.read(ids)
    refuse_unfit(column, ids, row_name)
    return found


def refuse_unfit(column: ListColumn, ids: IntArray, row_name: RowName) -> None:
    """Raise where the rows `ids`, which were read or located, hold a null or a fraction that is no mask."""
    unfit = column.first_unfit(ids) if column.may_be_unfit else None
    if unfit is not None:
        position, value = unfit
        where = row_name(position)
        raise _null_refusal(column.name, where) if value is None else refusal(column.name, f"{value:g}", where)


def aligned(name: str, tokens: Ragged, other: Ragged, row_name: RowName) -> npt.NDArray[Any]:
    """(T,) what the column `name` says of each token; a null row says what its absence would.

    Args:
        name: `labels` or `attention_mask`.
        tokens: The token ids.
        other: The column of that name.
        row_name: Function that names a row for errors.

    Returns:
        One number for each of the ids.

    Raises:
        ValueError: a row has another length than its ids.
    """
    lengths, wanted = np.diff(other.offsets), np.diff(tokens.offsets)
    wrong = lengths != wanted
    bad = np.flatnonzero(wrong if other.valid is None else wrong & other.valid)
    if len(bad):
        raise length_refusal(name, int(lengths[bad[0]]), int(wanted[bad[0]]), row_name(int(bad[0])))
    if other.valid is None or not wrong.any():
        return other.values
    kind = np.result_type(tokens.values, other.values)
    filled = tokens.values.astype(kind) if name == LABELS else np.ones(len(tokens.values), kind)
    filled[np.repeat(other.valid, wanted)] = other.values
    return filled


def join(tokens: Ragged, beside: Mapping[str, Ragged], row_name: RowName) -> TokenRows:
    """Rows of tokens without padding, with what their other columns say."""
    found = {name: aligned(name, tokens, other, row_name) for name, other in beside.items()}
    return assemble(tokens.values, tokens.offsets, found.get(LABELS), found.get(MASK))


class TokenColumns:
    """A column of token ids with the labels and mask of the same table, opened once.

    Args:
        table: `pyarrow.Table` or that of a `datasets.Dataset`.
        column: Column of token ids. Next to `input_ids`, `labels` and `attention_mask` count as in training.
        indices: (R,) physical row of each visible row, or None where they are the same.
        first_row: Number of the first row, for errors.
        vocab_size: Size of the vocabulary; reading rows in place raises an error for ids of this and above. None
            allows any.

    Raises:
        ValueError: a column cannot count as what it is called.
    """

    def __init__(
        self,
        table: Any,
        column: str,
        indices: IntArray | None = None,
        first_row: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        names = names_beside(table.column_names, column)
        check_types(table.schema, [column, *names])
        self._tokens = ListColumn(table.column(column), column, indices)
        self._beside = {name: ListColumn(table.column(name), name, indices) for name in names}
        self._first_row, self._vocab_size = first_row, vocab_size

    def lengths(self, ids: IntArray) -> IntArray:
        """(N,) int64 tokens of the rows `ids`, padding included."""
        return self._tokens.lengths(ids)

    def parts(self, begin: int, end: int, *, in_place: bool) -> Iterator[tuple[int, TokenRows | TokenSpans]]:
        """The rows from `begin` to before `end`, so many tokens at a time that any row length fits in memory.

        Args:
            begin: Number of the first row.
            end: Number of the row after the last.
            in_place: Whether to give rows where they lie, where no other column says otherwise; several threads may
                do so.

        Yields:
            What errors call the part's first row, and the part.
        """
        ids = np.arange(begin, end)
        for span in stretches(self.lengths(ids), _TOKENS_AT_ONCE):
            part, first_row = ids[span], self._first_row + begin + span.start
            spans = self.spans(part, first_row) if in_place else None
            yield first_row, self.rows(part, first_row) if spans is None else spans

    def spans(self, ids: IntArray, first_row: int = 0) -> TokenSpans | None:
        """The rows where they lie; None where labels or padding say that not every token counts.

        Args:
            ids: (N,) int64 row numbers.
            first_row: Number of the first of them, for errors.

        Returns:
            N rows, views of Arrow memory, or None.

        Raises:
            ValueError: a token is null, or a mask is none.
        """
        if LABELS in self._beside:
            return None
        row_name = _counted_from(first_row)
        if MASK in self._beside:
            mask = read_column(self._beside[MASK], ids, row_name)
            if mask.valid is not None or not mask.values.all():
                return None
            if not np.array_equal(np.diff(mask.offsets), self._tokens.lengths(ids)):
                return None
        spans = self._tokens.spans(ids)
        refuse_unfit(self._tokens, ids, row_name)
        return dataclasses.replace(spans, first_row=first_row, vocab_size=self._vocab_size)

    def rows(self, ids: IntArray, first_row: int = 0) -> TokenRows:
        """The rows copied, without padding and with their labels; errors call the first one `first_row`."""
        row_name = _counted_from(first_row)
        found = {name: read_column(column, ids, row_name) for name, column in self._beside.items()}
        return join(read_column(self._tokens, ids, row_name), found, row_name)

    def content(self, ids: IntArray) -> bytes:
        """What the rows hold."""
        parts: list[bytes] = []
        for column in (self._tokens, *self._beside.values()):
            found = read_column(column, ids, lambda i: f"row {int(ids[i])}")
            arrays = [found.values, found.offsets] if found.valid is None else [*found]
            parts += [array.astype("<i8").tobytes() for array in arrays if array is not None]
        return b"".join(parts)

    def row_bytes(self, begin: int, end: int) -> list[bytes]:
        """What each row from `begin` to before `end` holds as it is trained on, whatever integers its column has."""
        rows = self.rows(np.arange(begin, end))
        columns = [rows.values] if rows.labels is None else [rows.values, rows.labels]
        is_short = all(-(2**31) <= column.min(initial=0) and column.max(initial=0) < 2**31 for column in columns)
        kind = np.dtype("<i4" if is_short else "<i8")  # not the column's own, which a cast changes
        flat = [column.astype(kind).tobytes() for column in columns]
        ends = (rows.offsets * kind.itemsize).tolist()
        return [b"".join(column[begin:end] for column in flat) for begin, end in zip(ends[:-1], ends[1:], strict=True)]


def _counted_from(first_row: int) -> RowName:
    return lambda i: f"row {i + first_row}"
