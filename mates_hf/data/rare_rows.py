"""Rows of a dataset that differ in kind from the rest in a further column, found by a scan of its Arrow columns.

Where it is used: `columns` collates a fixed set of rows, and a collator may decide by what only rare rows have: a
mask that is null for texts, a negative weight, another source. The rows found here are collated too. Kinds of values
are nulls, empty and long lists and texts, the smallest and largest numbers, mixed flags, and each of a few distinct
values; texts that differ in every row are grouped by their shape (whatever their digits), then by their first word.

Trade-off: at most `MAX_ROWS` rows and `MAX_ELEMENTS` list elements of a column are read, in stretches spread over the
dataset. Texts of more kinds than `MAX_KINDS` prove nothing, so their columns are named in `RareRows.unproven`, and a
collator that reads one as `row[name]` is not trusted (`WatchedRow`); picking it from a walk over `items()` is not
seen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.records import IntArray

if TYPE_CHECKING:
    import pyarrow as pa

MAX_FOUND = 48  # rows that are added to those looked at
MAX_KINDS = 16  # distinct values, shapes or first words of one column that are told apart
MAX_ROWS, MAX_ELEMENTS = 1 << 21, 1 << 23  # of one column that are read
BLOCK, BLOCK_BYTES = 1 << 17, 1 << 25  # rows, and bytes of small chunks, that are read at once
MAX_TEXT = 32  # characters of a text that are read

VALUE, SHAPE, WORD = "value", "shape", "word"


class RareRows(NamedTuple):
    """Rows to collate, none of which is among those looked at, and the columns where that is not enough."""

    rows: IntArray
    by_column: dict[str, list[int]]
    unproven: set[str]


def find_rare_rows(
    columns: dict[str, pa.ChunkedArray], indices: IntArray | None, num: int, looked_at: IntArray
) -> RareRows:
    """Up to `MAX_FOUND` rows of kinds that the rows looked at do not show.

    Args:
        columns: The columns of the table to scan, as a mapping from their names.
        indices: The table row of each dataset row; None where they are the same.
        num: Number of rows of the dataset.
        looked_at: Dataset rows that are collated anyway.

    Returns:
        The dataset rows; for each column those that show one of its kinds, looked at or not; and the columns of which
        some kinds are shown by no row.
    """
    kinds = {name: _Kinds() for name in columns}
    for some in (np.sort(looked_at), _spread(num)):
        rows = physical = some
        if indices is not None:
            order = np.argsort(indices[some], kind="stable")
            rows, physical = some[order], indices[some][order]
        for name, column in columns.items():
            for piece, its_rows in _pieces(column, physical, rows):
                kinds[name].look(piece, its_rows, MAX_ELEMENTS * len(piece) // max(1, len(rows)))
    known, found = set(looked_at.tolist()), dict[int, None]()
    unproven = {name for name, of_column in kinds.items() if of_column.has_too_many_texts}
    by_rank = ((name, row, rank) for name, of_column in kinds.items() for row, rank in of_column.ranked())
    for name, row, _ in sorted(by_rank, key=lambda each: each[2]):
        if row in known or row in found:
            continue
        if len(found) < MAX_FOUND:
            found[row] = None
        else:
            unproven.add(name)
    shown = {name: list(dict.fromkeys(row for row, _ in of_column.ranked())) for name, of_column in kinds.items()}
    return RareRows(np.array(list(found), np.int64), shown, unproven)


class _Kinds:
    """The first row of each kind that a column has."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], dict[Any, int]] = {}  # by place in a nested value and by what is told apart
        self._extremes: dict[tuple[str, str], tuple[Any, int]] = {}
        self._full: set[tuple[str, str]] = set()

    @property
    def has_too_many_texts(self) -> bool:
        return any(what == SHAPE for _, what in self._full)

    def ranked(self) -> Iterator[tuple[int, int]]:
        """Each row that shows a kind, and how much it shows: 0 is the most."""
        yield from ((row, 0) for (_, what), rows in self._first.items() if what == "is" for row in rows.values())
        yield from ((row, 1) for _, row in self._extremes.values())
        for (_, what), rows in self._first.items():
            yield from ((row, 2 if what != VALUE else 3) for row in rows.values() if what != "is")

    def look(self, array: pa.Array, rows: IntArray, elements: int, place: str = "") -> None:
        """Note the kinds in an array.

        Args:
            array: values of the column, or of what is within them.
            rows: the dataset row of each.
            elements: how many elements of lists may be read.
            place: where the values lie in those of the column.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if array.null_count:
            valid = pc.is_valid(array)
            self._note_where(place, "null", ~_numpy(valid), rows)
            array, rows = array.filter(valid), rows[_numpy(valid)]
        if not len(array):
            return
        self._note_where(place, "there", np.ones(1, bool), rows)
        kind = array.type
        if pa.types.is_struct(kind):
            for i, inner in enumerate(array.flatten()):
                self.look(inner, rows, elements, f"{place}.{kind.field(i).name}")
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            self._look_in_lists(array, rows, elements, place)
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            self._look_at_texts(array, rows, place)
        elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
            self._look_at_numbers(array, rows, place)

    def _look_in_lists(self, array: pa.Array, rows: IntArray, elements: int, place: str) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        lengths = _numpy(pc.list_value_length(array)).astype(np.int64)
        self._note_where(place, "empty", lengths == 0, rows)
        self._note_extremes(place, "length", lengths, rows)
        read = max(1, int(np.searchsorted(np.cumsum(lengths), elements, "right")))
        array, owners = array.slice(0, read), np.repeat(rows[:read], lengths[:read])
        inner = pc.list_flatten(array)
        kind = inner.type
        if (pa.types.is_boolean(kind) or pa.types.is_integer(kind)) and not inner.null_count and len(inner) > 1:
            values, starts = _numpy(inner), np.cumsum(lengths[:read])[:-1]
            differs = values[1:] != values[:-1]
            differs[starts[(starts > 0) & (starts < len(values))] - 1] = False  # the next list starts here
            self._note_where(place, "mixed", differs, owners[1:])
        self.look(inner, owners, elements, f"{place}[]")

    def _look_at_numbers(self, array: pa.Array, rows: IntArray, place: str) -> None:
        import pyarrow as pa

        values = _numpy(array)
        if values.dtype.kind == "f":
            nan = np.isnan(values)
            self._note_where(place, "nan", nan, rows)
            values, numbers = values[~nan], rows[~nan]
        else:
            numbers = rows
        if values.dtype.kind != "b":
            self._note_where(place, "negative", values < 0, numbers)
            self._note_extremes(place, "size", values, numbers)
        if values.dtype == np.float16:  # of which pyarrow 15 makes no dictionary
            array = pa.array(values.astype(np.float32))
        self._note_distinct(place, VALUE, array, rows)

    def _look_at_texts(self, array: pa.Array, rows: IntArray, place: str) -> None:
        """Values, then what they have in common where there are too many."""
        import pyarrow.compute as pc

        self._note_extremes(place, "length", _numpy(pc.binary_length(array)), rows)
        if (place, WORD) in self._full:
            return  # no more to be learnt: nearly always so for texts to read, after the rows looked at
        starts = pc.utf8_slice_codeunits(array, 0, MAX_TEXT)
        if not self._note_distinct(place, VALUE, starts, rows):
            if (place, SHAPE) not in self._full:
                shapes = pc.replace_substring_regex(starts, r"[0-9]+", "0")
                if self._note_distinct(place, SHAPE, shapes, rows):
                    return
            words = pc.struct_field(pc.extract_regex(starts, r"^(?P<word>\pL*)"), [0])
            self._note_distinct(place, WORD, words, rows)

    def _note_where(self, place: str, kind: str, where: npt.NDArray[np.bool_], rows: IntArray) -> None:
        first = self._first.setdefault((place, "is"), {})
        if kind not in first and where.any():
            first[kind] = int(rows[int(where.argmax())])

    def _note_extremes(self, place: str, what: str, values: npt.NDArray[Any], rows: IntArray) -> None:
        if not len(values):
            return
        for name, at in ((f"least {what}", int(values.argmin())), (f"most {what}", int(values.argmax()))):
            known = self._extremes.get((place, name))
            if known is None or (values[at] < known[0] if name.startswith("least") else values[at] > known[0]):
                self._extremes[place, name] = (values[at], int(rows[at]))

    def _note_distinct(self, place: str, what: str, array: pa.Array, rows: IntArray) -> bool:
        """The first row of each distinct value; False where there are too many."""
        if (place, what) in self._full:
            return False
        encoded = array.dictionary_encode()
        codes, first = _numpy(encoded.indices), np.zeros(len(encoded.dictionary), np.int64)
        first[codes[::-1]] = rows[::-1]  # the last that is written stays
        known = self._first.setdefault((place, what), {})
        for value, row in zip(encoded.dictionary.slice(0, 4 * MAX_KINDS).to_pylist(), first.tolist(), strict=False):
            if value in known:
                continue
            if len(known) == MAX_KINDS:
                self._full.add((place, what))
                break
            known[value] = row
        return (place, what) not in self._full


def _spread(num: int) -> IntArray:
    """Rows of a dataset: all of them, or stretches that start at equal distances."""
    if num <= MAX_ROWS:
        return np.arange(num)
    starts = np.linspace(0, num - BLOCK, MAX_ROWS // BLOCK).astype(np.int64)
    return np.unique(np.concatenate([np.arange(start, start + BLOCK) for start in starts]))


def _pieces(column: pa.ChunkedArray, physical: IntArray, rows: IntArray) -> Iterator[tuple[pa.Array, IntArray]]:
    """The values at sorted table rows, some at a time, with the dataset rows that they belong to."""
    small: list[Any] = []
    first = start = stop = size = 0
    for chunk in column.chunks:
        end = start + len(chunk)
        upto = int(np.searchsorted(physical, end))
        for low in range(stop, upto, BLOCK):
            high = min(low + BLOCK, upto)
            small.append(_taken(chunk, physical[low:high] - start))
            size += small[-1].nbytes
            if high - first >= BLOCK or size >= BLOCK_BYTES:
                yield _joined(small), rows[first:high]
                small, first, size = [], high, 0
        start, stop = end, upto
    if small:
        yield _joined(small), rows[first:]


def _taken(chunk: pa.Array, where: IntArray) -> pa.Array:
    """Sorted places of a chunk, not copied where they follow each other."""
    import pyarrow as pa

    if where[-1] - where[0] == len(where) - 1 and bool(np.all(np.diff(where) == 1)):
        return chunk.slice(int(where[0]), len(where))
    return chunk.take(pa.array(where))


def _joined(pieces: Sequence[pa.Array]) -> pa.Array:
    import pyarrow as pa

    return pieces[0] if len(pieces) == 1 else pa.concat_arrays(list(pieces))


def _numpy(array: pa.Array) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


class WatchedRow(dict[str, Any]):
    """A row that notes which of its columns are read as `row[name]`; a walk over `items()` notes none.

    Args:
        row: The items of the row.
        asked_for: Set that the names are added to.
    """

    def __init__(self, row: Iterable[tuple[str, Any]], asked_for: set[str]) -> None:
        super().__init__(row)
        self._asked_for = asked_for

    def __iter__(self) -> Iterator[str]:
        # Defined so that `dict(row)` and `{**row}` ask for each column: what is done with the copy is not seen.
        return super().__iter__()

    def __getitem__(self, name: str) -> Any:
        self._asked_for.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self._asked_for.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        return self[name] if name in self else default

    def pop(self, name: str, *default: Any) -> Any:
        """As of a dict."""
        self._asked_for.add(name)
        return super().pop(name, *default)

    def copy(self) -> WatchedRow:
        """A copy that is watched too."""
        return WatchedRow(self.items(), self._asked_for)

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedRow:
        return WatchedRow(copy.deepcopy(list(self.items()), memo), self._asked_for)
