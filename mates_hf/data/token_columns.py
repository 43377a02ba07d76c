"""What counts as token ids, labels and attention mask, and how rows of them are read: one answer for every way in.

Place in the flow: `columns` (a pool's Arrow columns), `collated` (one row, also a collated one) and
`influence/scoring` (tables, batches inside `map`, streams) all ask here. A column called `labels` or `attention_mask`
beside `input_ids` counts as it does in training; one that cannot count is refused by its name with one sentence,
wherever it is met.

What counts: lists of whole numbers; for a mask also booleans and floats that are exactly 0 or 1. A row that is null
in `input_ids` is empty, one that is null in `labels` trains every token but its first, one that is null in
`attention_mask` has no padding. A null inside a row is refused.

Shape suffixes: N rows, T tokens over all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.arrow import ListColumn, Ragged, assemble, is_list_view
from mates_hf.data.rows import TokenRows, TokenSpans
from mates_hf.records import IntArray

if TYPE_CHECKING:
    import pyarrow as pa

TOKENS = "input_ids"
LABELS = "labels"
MASK = "attention_mask"
BESIDE = (LABELS, MASK)  # columns that say more about `TOKENS`

RowName = Callable[[int], str]
"""What errors call the row at a position."""


def names_beside(names: Collection[str], column: str) -> list[str]:
    """Those of the columns `names` that count beside the column of token ids `column`."""
    return [name for name in BESIDE if column == TOKENS and name in names]


# --- what counts ---


def holds_tokens(column_type: pa.DataType) -> bool:
    """True for an Arrow type that can be a column of token ids: lists of whole numbers, of any kind of list."""
    word = _value_word(column_type.value_type) if _is_list(column_type) else ""
    return word in ("integers", "nulls")


def holds_texts(column_type: pa.DataType) -> bool:
    """True for every Arrow type of strings, dictionary-encoded ones included."""
    import pyarrow as pa

    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    return _value_word(column_type) == "texts"


def counts(name: str, column_type: pa.DataType) -> bool:
    """True where a column of this name and Arrow type can be read as what its name says."""
    import pyarrow as pa

    if pa.types.is_null(column_type) or holds_tokens(column_type):
        return True
    is_mask = name == MASK and _is_list(column_type)
    return is_mask and _value_word(column_type.value_type) in ("booleans", "floats")


def check_types(schema: pa.Schema, names: Iterable[str]) -> None:
    """Raise a `ValueError` for the first of the columns `names` that cannot count as what it is called."""
    for name in names:
        kind = schema.field(name).type
        if not counts(name, kind):
            inner = f"lists of {_value_word(kind.value_type)}" if _is_list(kind) else _single(_value_word(kind))
            raise refusal(name, inner)


def refusal(name: str, got: str, where: str = "") -> ValueError:
    """The error for what is called like a column that counts, and cannot count.

    Args:
        name: `input_ids`, `labels` or `attention_mask`, or what the column of token ids is called.
        got: what it holds.
        where: which row; empty where all are so.

    Returns:
        The error, to be raised.
    """
    must = "0 or 1 a token" if name == MASK else "one whole number a token"
    fix = "Tokenise the texts, or name the column that holds the token ids."
    if name in BESIDE:
        fix = (
            "Beside `input_ids` it counts as it does in training: give it that form, or remove or rename the column "
            f"(`dataset.remove_columns('{name}')`) where it is something else."
        )
    return ValueError(f"`{name}` must be {must}, got {got}{f' ({where})' if where else ''}. {fix}")


def one_value_refusal(name: str, value: npt.NDArray[Any], where: str) -> ValueError:
    """The refusal of a row that has one value and not a list of them."""
    return refusal(name, _single(_array_word(value)), where)


def length_refusal(name: str, length: int, num_tokens: int, where: str) -> ValueError:
    """The error for labels or a mask that are not as many as the ids of their row."""
    return ValueError(
        f"`{name}` must be as long as `input_ids` in every row; {where} has {length} and {num_tokens}. Give one for "
        f"each token, or remove the column (`dataset.remove_columns('{name}')`)."
    )


def _null_refusal(name: str, where: str) -> ValueError:
    return ValueError(f"`{name}` must not be null at a token, got a null ({where}). Remove those rows or tokens.")


def _single(word: str) -> str:
    return f"one value a row ({word})"


def _is_list(column_type: pa.DataType) -> bool:
    import pyarrow as pa

    is_kind = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, is_list_view)
    return any(is_one(column_type) for is_one in is_kind)


def _value_word(value_type: pa.DataType) -> str:
    """The plural of what values of an Arrow type are, the same word as `_array_word` has for them."""
    import pyarrow as pa

    types = pa.types
    known = {
        "integers": (types.is_integer,),
        "booleans": (types.is_boolean,),
        "floats": (types.is_floating,),
        "texts": (types.is_string, types.is_large_string, getattr(types, "is_string_view", types.is_string)),
        "nulls": (types.is_null,),
        "lists": (_is_list,),
        "dicts": (types.is_struct,),
    }
    found = (word for word, kinds in known.items() if any(is_kind(value_type) for is_kind in kinds))
    return next(found, str(value_type))


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
        value: a list, array or tensor.
        name: what it is called, which says what may count.
        where: which row it is, for errors.

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
    """Rows that say nothing of their types; None is a row of which nothing is said."""
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
        batch: the column of token ids and, beside `input_ids`, `labels` and `attention_mask` where they are given.
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
        tokens: the ids.
        other: the column.
        row_name: what errors call a row.

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
    """Rows of tokens without padding, with what the columns beside them say."""
    found = {name: aligned(name, tokens, other, row_name) for name, other in beside.items()}
    return assemble(tokens.values, tokens.offsets, found.get(LABELS), found.get(MASK))


class TokenColumns:
    """A column of token ids with what stands beside it in a table, opened once.

    Args:
        table: `pyarrow.Table` or that of a `datasets.Dataset`.
        column: Column of token ids. Next to `input_ids`, `labels` and `attention_mask` count as in training.
        indices: (R,) physical row of each visible row, or None where they are the same.

    Raises:
        ValueError: a column cannot count as what it is called.
    """

    def __init__(self, table: Any, column: str, indices: IntArray | None = None) -> None:
        names = names_beside(table.column_names, column)
        check_types(table.schema, [column, *names])
        self._tokens = ListColumn(table.column(column), column, indices)
        self._beside = {name: ListColumn(table.column(name), name, indices) for name in names}

    def lengths(self, ids: IntArray) -> IntArray:
        """(N,) int64 tokens of the rows `ids`, padding included."""
        return self._tokens.lengths(ids)

    def spans(self, ids: IntArray, first_row: int = 0) -> TokenSpans | None:
        """The rows where they lie; None where labels or padding beside them say that not every token counts.

        Args:
            ids: (N,) int64 row numbers.
            first_row: what errors call the first of them.

        Returns:
            N rows, views of Arrow memory, or None.

        Raises:
            ValueError: a token is null, or a mask is none.
        """
        if LABELS in self._beside:
            return None

        def row_name(i: int) -> str:
            return f"row {i + first_row}"

        if MASK in self._beside:
            mask = read_column(self._beside[MASK], ids, row_name)
            if mask.valid is not None or not mask.values.all():
                return None
            if not np.array_equal(np.diff(mask.offsets), self._tokens.lengths(ids)):
                return None
        spans = self._tokens.spans(ids)
        refuse_unfit(self._tokens, ids, row_name)
        return spans

    def rows(self, ids: IntArray, first_row: int = 0) -> TokenRows:
        """The rows copied, without padding and with their labels; errors call the first one `first_row`."""

        def row_name(i: int) -> str:
            return f"row {i + first_row}"

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
