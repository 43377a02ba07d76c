"""Which further columns of a dataset decide what a collator makes of a row: found by changing them.

Where it is used: `columns` looks at a fixed set of rows, and what only rare rows show is not among them: a mixture of
texts and a few instructions whose `completion_mask` counts, say. So a row is collated again with each further column
changed, alone and two at a time, and held against the row as it was. Leaving a column out would be no test: a collator
may do without it as it does for most rows.

Trade-off: some hundred calls of the collator at the start of a run, and a column that decides nothing else than what
no change tried here shows is not found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CALLS = 600  # of a collator, over all changes to a row
MAX_OTHERS = 24  # other values of a column that are tried
MAX_IN_PAIRS = 5  # values of each of two columns that are changed together


def deciding_column(
    row: Mapping[str, Any], others: Mapping[str, Sequence[Any]], length: int, collated: Callable[[dict[str, Any]], Any]
) -> str | None:
    """The name of a further column on which the collated row depends, or None where no change shows one.

    Args:
        row: A row of the dataset with all its visible columns.
        others: Values that other rows have, for each further column.
        length: the row's tokens; numbers of this size may say where a completion begins.
        collated: Function that gives what the collator makes of a row, comparable by `==`; an error that it raises
            counts as a change.

    Returns:
        One column, or two joined by "and".
    """
    as_it_is = collated(dict(row))
    trials = {name: list(_changed(row[name], values, length)) for name, values in others.items() if name in row}
    alone = ({name: value} for name, values in trials.items() for value in values)
    together = (
        {first: a, second: b}
        for first, second in itertools.combinations(trials, 2)
        for a, b in itertools.product(trials[first][:MAX_IN_PAIRS], trials[second][:MAX_IN_PAIRS])
    )
    for change in itertools.islice(itertools.chain(alone, together), MAX_CALLS):
        try:
            same = collated({**row, **change}) == as_it_is
        except Exception:  # user code, given a value that it reads
            same = False
        if not same:
            return "` and `".join(change)
    return None


def _changed(value: Any, others: Sequence[Any], length: int) -> Iterator[Any]:
    """Values that a column might have in another row: those that change most first."""
    yield from _made_up(value, length)
    yield from itertools.islice((other for other in others if not _equal(other, value)), MAX_OTHERS)


def _made_up(value: Any, length: int) -> Iterator[Any]:
    """The value turned over, moved on, or replaced by another of its kind."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        if value in (0, 1):
            yield 1 - value
        yield from (number for number in (max(1, length // 2), value + 1, value + 2, 0) if number != value)
    elif isinstance(value, float):
        yield from (number for number in (1.0 - value, -value, value + 1.0, -1.0, 0.0, 1.0) if number != value)
    elif isinstance(value, str):
        yield from (text for text in (value + "x" * max(1, length // 2), value + "x", "") if text != value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from ({**value, key: other} for other in _made_up(inner, length))
    elif isinstance(value, Sequence) and len(value):
        half = len(value) // 2
        for turned in (
            _turned(value),
            [*value[:half], *_turned(value[half:])],
            [*_turned(value[:half]), *value[half:]],
        ):
            if list(turned) != list(value):
                yield turned
        if all(element in (0, 1) for element in value):
            yield from (kind for kind in ([0] * len(value), [1] * len(value)) if kind != list(value))


def has_gap(value: Any) -> bool:
    """True for a value that has nothing to change, in some part of it."""
    if isinstance(value, Mapping):
        return any(map(has_gap, value.values()))
    return value is None or (isinstance(value, Sequence) and not isinstance(value, str) and not len(value))


def made_up_of(kind: pa.DataType, length: int) -> list[Any]:
    """Values of an Arrow type for a row of so many tokens, for want of one to change; none for a type not known.

    Args:
        kind: the column's type.
        length: numbers of this size may say where a completion begins.

    Returns:
        Up to six values.
    """
    import pyarrow as pa

    half = max(1, length // 2)
    if pa.types.is_boolean(kind):
        return [True, False]
    if pa.types.is_integer(kind):
        return [half, 0, length]  # in this order for structs: each two fields are once a span
    if pa.types.is_floating(kind):
        return [-1.0, 0.0, 1.0]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ["x" * half, ""]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner, rest = kind.value_type, length - half
        singles = [[value] for value in made_up_of(inner, length)]
        if pa.types.is_boolean(inner) or pa.types.is_integer(inner) or pa.types.is_floating(inner):
            off, on = (False, True) if pa.types.is_boolean(inner) else (0, 1)
            return [[off] * half + [on] * rest, [on] * half + [off] * rest, *singles]
        return singles
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: made_up_of(kind.field(i).type, length) or [None] for i in range(kind.num_fields)}
        return [
            {name: values[(turn + i) % len(values)] for i, (name, values) in enumerate(fields.items())}
            for turn in range(3)
        ]
    return []


def _turned(values: Sequence[Any]) -> list[Any]:
    """Each element of a list changed: flags and zeros and ones inverted, other numbers moved on."""
    return [next(_made_up(element, 2), element) for element in values]


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except ValueError:  # arrays
        return False
