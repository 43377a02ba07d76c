"""Which group each row of a pool is of, by a column of it: its source, its language, its licence.

Where it is used: the select stage asks for the groups of a round's candidates, its record for those of the probes, and
`MatesSelector` for those of a dataset. Trade-off: the column is read anew each time, so that nothing of it is kept
between rounds; an entry becomes a Python object once, however many rows have it.

Shape suffix: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.documents import require_column
from mates_hf.records import IntArray

MOST_GROUPS = 65_536
NO_GROUP = "(none)"  # what a row is of whose entry is null


class Groups(NamedTuple):
    """The groups of N rows.

    Attributes:
        codes: (N,) int32 number of each row's group in `names`.
        names: The groups, sorted.
    """

    codes: npt.NDArray[np.int32]
    names: list[str]


def read_groups(dataset: Any, column: str, ids: IntArray | None = None) -> Groups:
    """The groups of some rows.

    Args:
        dataset: A `datasets.Dataset`, or any map-style dataset of rows that are mappings.
        column: Column with one text, number or truth value a row; a null is a group of its own.
        ids: (N,) rows that are asked for; None: all.

    Returns:
        Their groups.

    Raises:
        ValueError: there is no such column, it holds lists or structs, or more than 65,536 groups.
    """
    require_column(dataset, column, "group_column")
    entries, places = _read(dataset, column, ids)
    used = np.unique(places)  # a category that no row has is no group
    names = [_name_of(entries[place], column) for place in used.tolist()]
    order = sorted(set(names))
    require_few(len(order), column)
    number = {name: code for code, name in enumerate(order)}
    code_of = np.zeros(len(entries), np.int32)
    code_of[used] = [number[name] for name in names]
    return Groups(code_of[places], order)


class GroupNumbers:
    """Numbers of groups as they turn up, where rows come some at a time.

    Args:
        column: Name of the column, for errors.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The groups so far, each at its number."""
        return list(self._numbers)

    def of_values(self, values: Iterable[Any]) -> npt.NDArray[np.int32]:
        """(N,) number of the group of each entry."""
        return np.array([self._number_of(value) for value in values], np.int32)

    def of_arrow(self, column: Any) -> npt.NDArray[np.int32]:
        """(N,) number of the group of each entry of a `pyarrow.ChunkedArray`."""
        entries, places = entries_in(column)
        used, inverse = np.unique(places, return_inverse=True)
        return self.of_values(entries[place] for place in used.tolist())[inverse.reshape(-1)]

    def _number_of(self, entry: Any) -> int:
        name = _name_of(entry, self._column)
        found = self._numbers.setdefault(name, len(self._numbers))
        require_few(len(self._numbers), self._column)
        return found


def require_few(num: int, column: str) -> None:
    """Raise a `ValueError` where there are more groups than may be."""
    if num > MOST_GROUPS:
        raise ValueError(
            f"`group_column` must have at most {MOST_GROUPS:,} groups, got {num:,} in `{column}`. Name a column of "
            "sources or kinds, not of documents."
        )


def shares_of(names: Sequence[str], every: IntArray, chosen: IntArray) -> dict[str, dict[str, float]]:
    """What each group is of all rows and of those that are kept.

    Args:
        names: Names of the G groups.
        every: (G,) rows of each.
        chosen: (G,) rows of each that are kept.

    Returns:
        By name: `rows` and `kept` as shares of all, and `boost`, how many times its share of the rows it got.
    """
    of_all, of_kept = every / max(1, int(every.sum())), chosen / max(1, int(chosen.sum()))
    return {
        name: {"rows": float(a), "kept": float(b), "boost": float(b / a)}
        for name, a, b in zip(names, of_all, of_kept, strict=True)
    }


def entries_of(dataset: Any, column: str, setting: str, ids: IntArray | None = None) -> tuple[list[Any], IntArray]:
    """The entries of a column, and which of them each row has.

    Args:
        dataset: A `datasets.Dataset`, or any map-style dataset of rows that are mappings.
        column: Name of the column.
        setting: What names it, for the error.
        ids: (N,) rows that are asked for; None: all.

    Returns:
        The entries, some of which no row may have, and (N,) int64 places in them. Equal entries may stand twice.

    Raises:
        ValueError: there is no such column.
    """
    require_column(dataset, column, setting)
    return _read(dataset, column, ids)


def _name_of(entry: Any, column: str) -> str:
    """What the group of an entry is called."""
    if not isinstance(entry, (str, int, float, bool, type(None))):
        raise ValueError(
            f"`group_column` must hold one text or number a row, got {type(entry).__name__} in `{column}`. Name "
            "another column, or make one with `dataset.map`."
        )
    return NO_GROUP if entry is None else str(entry)


def shares_by_group(groups: Groups, candidates: IntArray, chosen: IntArray) -> dict[str, dict[str, int]]:
    """How many candidates and how many chosen rows each group has.

    Args:
        groups: Groups of the candidates.
        candidates: (M,) int64 pool rows, in any order.
        chosen: (k,) int64 pool rows, each of them a candidate.

    Returns:
        By name of the group: `candidates` and `chosen`.
    """
    order = np.argsort(candidates, kind="stable")
    codes = groups.codes[order[np.searchsorted(candidates, chosen, sorter=order)]]
    every = np.bincount(groups.codes, minlength=len(groups.names)).tolist()
    taken = np.bincount(codes, minlength=len(groups.names)).tolist()
    return {
        name: {"candidates": num, "chosen": got} for name, num, got in zip(groups.names, every, taken, strict=True)
    }


def _read(dataset: Any, column: str, ids: IntArray | None) -> tuple[list[Any], IntArray]:
    """The entries that there are, and (N,) which of them each row has; read from Arrow where that is how they lie."""
    if hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):
        table = dataset.with_format("arrow", columns=[column])[slice(None) if ids is None else ids]
        return entries_in(table.column(column))
    rows = range(len(dataset)) if ids is None else ids.tolist()
    values = [dataset[i][column] for i in rows]
    return values, np.arange(len(values))


def entries_in(column: Any) -> tuple[list[Any], IntArray]:
    """The entries of a `pyarrow.ChunkedArray`, and (N,) which of them each row has."""
    found = column.combine_chunks()
    if hasattr(found, "chunks"):
        found = found.chunk(0) if found.num_chunks else None
    if found is None:
        return [], np.zeros(0, np.int64)
    encoded = _encoded(found)
    if encoded is not None:
        entries = [*encoded.dictionary.to_pylist(), None]
        places = encoded.indices.fill_null(len(entries) - 1).to_numpy(zero_copy_only=False)
        return entries, places.astype(np.int64)
    values = list(found.to_pylist())
    return values, np.arange(len(values))


def _encoded(column: Any) -> Any:
    """The column as a `pyarrow.DictionaryArray`; None where its type cannot be."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        return column
    try:
        return column.dictionary_encode()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, NotImplementedError):
        return None
