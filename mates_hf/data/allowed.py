"""The rows of a dataset that may be used at all, by their entries in columns such as a licence or a consent.

Where it is used: before a run probes, draws or trains on anything, and before a selector scores. Trade-off: the
columns are read whole, once; a row without an entry is not allowed, since nobody has said that it is.

Shape suffix: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.allow import Allow, parse_allow
from mates_hf.data.groups import entries_in, entries_of

_MOST_NAMED = 8  # entries that an error names


def allowed_rows(dataset: Any, allow: Allow) -> npt.NDArray[np.bool_]:
    """Which rows have an allowed entry in every column.

    Args:
        dataset: A `datasets.Dataset`, or any map-style dataset of rows that are mappings.
        allow: Allowed entries by column, as text.

    Returns:
        (N,) bool, True where the row may be used.

    Raises:
        ValueError: there is no such column, it holds lists or structs, or no row is allowed; names what there is.
    """
    found = np.ones(len(dataset), np.bool_)
    for column, wanted in allow.items():
        entries, places = entries_of(dataset, column, "allow")
        fine = np.array([is_allowed(entry, wanted, column) for entry in entries], np.bool_)
        found &= fine[places]
        if not found.any():
            raise ValueError(_none_left(allow, column, entries, places))
    return found


def allowed_part(dataset: Any, given: Mapping[str, Any] | str | None) -> Any:
    """The allowed rows of what a selector is given.

    Args:
        dataset: `Dataset`, `IterableDataset`, or a dict of them, each split by itself.
        given: What is allowed, as a user gives it (`parse_allow`); None allows every row.

    Returns:
        A dataset of the same kind.

    Raises:
        ValueError: there is no such column, or no row is allowed.
    """
    allow = parse_allow(given)
    if allow is None:
        return dataset
    if isinstance(dataset, dict):
        return type(dataset)({name: allowed_part(split, allow) for name, split in dataset.items()})
    if not hasattr(dataset, "filter"):
        return dataset  # no dataset: whoever opens it says the way in
    if hasattr(dataset, "select"):
        return dataset.select(np.flatnonzero(allowed_rows(dataset, allow)))
    names = getattr(dataset, "column_names", None)
    for column in allow:
        if names is not None and column not in names:
            raise ValueError(f"`allow` must name a column of the stream, got {column!r}; it has {sorted(names)}.")
    return dataset.filter(_IsAllowed(allow))


class _IsAllowed:
    """Says of a row of a stream whether it may be used; can be sent to other processes."""

    def __init__(self, allow: Allow) -> None:
        self.allow = allow

    def __call__(self, row: dict[str, Any]) -> bool:
        return all(is_allowed(row.get(column), wanted, column) for column, wanted in self.allow.items())


def is_allowed_arrow(values: Any, wanted: list[str], column: str) -> npt.NDArray[np.bool_]:
    """Which entries of a column of Arrow are allowed ones.

    Args:
        values: A `pyarrow.ChunkedArray` of N entries.
        wanted: Allowed entries, as text.
        column: Name of the column, for errors.

    Returns:
        (N,) bool.

    Raises:
        ValueError: an entry is a list or a struct.
    """
    entries, places = entries_in(values)
    used = np.unique(places)
    fine = np.zeros(len(entries), np.bool_)
    fine[used] = [is_allowed(entries[place], wanted, column) for place in used.tolist()]
    return fine[places]


def is_allowed(entry: Any, wanted: list[str], column: str) -> bool:
    """Whether an entry is an allowed one; a missing one is not.

    Args:
        entry: What a row has.
        wanted: Allowed entries, as text.
        column: Name of the column, for errors.

    Returns:
        Whether the row may be used.

    Raises:
        ValueError: it is a list or a struct.
    """
    if not isinstance(entry, (str, int, float, bool, type(None))):
        raise ValueError(
            f"`allow` must name a column with one text or number a row, got {type(entry).__name__} in `{column}`. "
            "Name another column, or make one with `dataset.map`."
        )
    if entry is None or (isinstance(entry, float) and math.isnan(entry)):
        return False
    return str(entry) in wanted


def _none_left(allow: Allow, column: str, entries: list[Any], places: Any) -> str:
    """Why no row is left, with the entries that there are."""
    used = np.unique(places)
    names = sorted({"(missing)" if entries[place] is None else str(entries[place]) for place in used.tolist()})
    shown = ", ".join(names[:_MOST_NAMED]) + (
        f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    )
    others = " and the columns before it" if list(allow).index(column) else ""
    return (
        f"`allow` must leave rows, but none has {', '.join(allow[column])} in `{column}`{others}; the entries there "
        f"are {shown}."
    )


def columns_with(found: list[str], names: Sequence[str], allow: Allow | None) -> list[str]:
    """Columns to read, with those that `allow` names.

    Args:
        found: Columns to read anyway.
        names: Columns that there are.
        allow: Allowed entries by column; None names none.

    Returns:
        The columns, each once.

    Raises:
        ValueError: one that `allow` names is not there.
    """
    for name in allow or {}:
        if name not in names:
            raise ValueError(f"`allow` must name columns of the pool, got {name!r}; it has {sorted(map(str, names))}.")
    return list(dict.fromkeys([*found, *(allow or {})]))
