"""The source of a `MatesStream`: any iterable of rows, read from any place that it has been to, in Arrow tables.

Where it is used: `stream_reader` reads buffers of it in a thread; `stream_pool` looks at its first rows. A place is
what the source's own `state_dict` says, as JSON, since it travels in a checkpoint. Where there is none and the user
says so, it is the number of rows before it, and the source is read again up to there.

Trade-off: a source is driven through its `load_state_dict`, one reading at a time, and is not copied: copies of a
stream share their state. When a run lets go of it, it stands where it stood.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mates_hf.errors import MatesError, UnsupportedSettingError

if TYPE_CHECKING:
    import pyarrow as pa

Resume = Literal["state", "reread"]

_SHUFFLED = "BufferShuffledExamplesIterable"
_WALKED = ("ex_iterable", "ex_iterables")


class StreamSource:
    """Rows of an iterable, from its beginning or from a place in it.

    Args:
        source: Gives rows, which are dicts; each time that it is asked for them, the same ones.
        resume: How a run that resumes finds its place: `state` by the source's own `state_dict`, `reread` by reading
            it again from the beginning.

    Raises:
        TypeError: `source` is no iterable of rows.
        UnsupportedSettingError: it cannot be read again from a place, or draws its rows from a buffer of its own.
    """

    def __init__(self, source: Any, resume: Resume) -> None:
        _refuse(source, resume)
        self._in_tables = resume == "state" and _gives_tables(source)
        self._source = source.with_format("arrow") if self._in_tables else source
        self._by_state = resume == "state"
        self._beginning = _plain(source.state_dict()) if hasattr(source, "state_dict") else None

    @property
    def beginning(self) -> dict[str, Any]:
        """The place before the first row."""
        if not self._by_state:
            return {"rows": 0}
        assert self._beginning is not None
        return self._beginning

    def tables(self, place: Mapping[str, Any], first_row: int, size: int) -> Iterator[pa.Table]:
        """The rows from a place on, in tables; a reading that was begun before must not go on.

        Args:
            place: Where they begin.
            first_row: Number of the first of them, for errors.
            size: Rows of each table; the last one may have fewer.

        Yields:
            The tables.
        """
        if self._in_tables:
            self._source.load_state_dict(_plain(place))
            yield from self._source.iter(size)
            return
        rows = self._rows(place)
        while part := list(itertools.islice(rows, size)):
            yield to_table(part, first_row)
            first_row += len(part)

    def _rows(self, place: Mapping[str, Any]) -> Iterator[Any]:
        """The rows from a place on, one by one."""
        if self._by_state:
            self._source.load_state_dict(_plain(place))
            by_state: Iterator[Any] = iter(self._source)
            return by_state
        self.let_go()
        rows: Iterator[Any] = iter(self._source)
        skipped = sum(1 for _ in itertools.islice(rows, int(place["rows"])))
        if skipped < int(place["rows"]):
            raise MatesError(
                f"A source with `resume='reread'` must give the same rows each time, but had {skipped} rows now where "
                f"the run had read {place['rows']} before it stopped. Give it the files that it had."
            )
        return rows

    def place(self, num_rows: int) -> dict[str, Any]:
        """The place behind the row that was given last, `num_rows` rows from the beginning; JSON values."""
        return _plain(self._source.state_dict()) if self._by_state else {"rows": num_rows}

    def let_go(self) -> None:
        """Put the source back to where it stood."""
        if self._beginning is not None and hasattr(self._source, "load_state_dict"):
            self._source.load_state_dict(_plain(self._beginning))

    def length(self) -> int | None:
        """Rows of the source where it has a length; None where it has none."""
        with contextlib.suppress(TypeError, AttributeError, NotImplementedError):
            return len(self._source)
        return None

    def shards(self) -> dict[str, Any]:
        """What tells the source's files from others: their names without folders, and their number; JSON values."""
        names = sorted(_shard_names(getattr(self._source, "_ex_iterable", None)))
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest() if names else ""
        return {"num_files": len(names), "names_sha256": digest}


def _refuse(source: Any, resume: Resume) -> None:
    """Raise for what cannot be read from a place on."""
    if resume not in ("state", "reread"):
        raise ValueError(f"`resume` must be 'state' or 'reread', got {resume!r}.")
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        raise TypeError(
            f"`pool` of a MatesStream must be a stream, got {type(source).__name__}. Give a Dataset to the Trainer as "
            "it is: its rows can be chosen from all of it."
        )
    if isinstance(source, (str, Mapping)) or not hasattr(source, "__iter__"):
        raise TypeError(
            f"`pool` of a MatesStream must be an iterable of rows, got {type(source).__name__}. Pass one split of "
            "`load_dataset(..., streaming=True)`, or an object whose `__iter__` gives dicts."
        )
    if getattr(source, "_distributed", None) is not None:
        raise UnsupportedSettingError(
            "`pool` of a MatesStream must be the whole stream in each process, got one of `split_dataset_by_node`. "
            "Pass the stream before it is split: the dataloader shares its rows out."
        )
    if _SHUFFLED in _kinds(getattr(source, "_ex_iterable", None)):
        raise UnsupportedSettingError(
            "`pool` of a MatesStream must not be shuffled by a buffer (`.shuffle(buffer_size=...)`), whose rows a run "
            "that resumes would lose. Leave the shuffle out: a MatesStream shuffles each buffer of `buffer_rows` rows "
            "itself, by `selection_seed`. To shuffle files, pass their names to `load_dataset` in another order."
        )
    is_stateful = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
    if not is_stateful and resume == "state":
        raise UnsupportedSettingError(
            f"`pool` of a MatesStream must have `state_dict` and `load_state_dict`, by which a run that resumes finds "
            f"its place, got {type(source).__name__}. Set `resume='reread'` to have it read again up to there, if it "
            "gives the same rows each time, or use a `datasets.IterableDataset`."
        )
    if not is_stateful and iter(source) is source:
        raise UnsupportedSettingError(
            f"`pool` of a MatesStream must give its rows each time that it is asked, got {type(source).__name__}, "
            "whose rows are gone once they were read. Pass an object whose `__iter__` begins anew, such as "
            "`datasets.IterableDataset.from_generator(function)`."
        )


def _gives_tables(source: Any) -> bool:
    """Whether a stream of `datasets` reads Arrow tables, of which no row is made a Python object."""
    datasets = sys.modules.get("datasets")
    is_one = datasets is not None and isinstance(source, datasets.IterableDataset)
    return is_one and getattr(getattr(source, "_ex_iterable", None), "iter_arrow", None) is not None


def _inside(found: Any) -> Iterator[Any]:
    """A `datasets` iterable and those that it is made of."""
    if found is None:
        return
    yield found
    for name in _WALKED:
        inner = getattr(found, name, None)
        for each in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from _inside(each)


def _kinds(found: Any) -> set[str]:
    """Names of the classes that a stream of `datasets` is made of."""
    return {type(each).__name__ for each in _inside(found)}


def _shard_names(found: Any) -> Iterator[str]:
    """Names of the files that a stream of `datasets` reads, without their folders."""
    for each in _inside(found):
        for value in getattr(each, "kwargs", {}).values():
            for name in value if isinstance(value, (list, tuple)) else []:
                if isinstance(name, str):
                    yield name.replace("\\", "/").rsplit("/", 1)[-1]


def _plain(state: Any) -> dict[str, Any]:
    """A state as JSON values, as a checkpoint gives it back; a copy."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(state, default=_as_python))
    except (TypeError, ValueError) as error:
        raise UnsupportedSettingError(
            f"`state_dict` of a stream must be JSON values, which a checkpoint can hold, got one that is none "
            f"({error}). Set `resume='reread'`, or leave out of the state what is no number, text, list or dict."
        ) from error
    return found


def _as_python(value: Any) -> Any:
    """A number or an array of numpy or torch as JSON has it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def to_table(rows: Sequence[Any], first_row: int) -> pa.Table:
    """Rows as an Arrow table, a column for each key.

    Args:
        rows: Dicts with the same keys.
        first_row: Number of the first of them in the stream, for errors.

    Returns:
        The table, empty where there are no rows.

    Raises:
        TypeError: a row is no dict.
        ValueError: a row has other keys than the first, or Arrow has no type for a column.
    """
    import pyarrow as pa

    if not rows:
        return pa.table({})
    names = list(rows[0]) if isinstance(rows[0], Mapping) else []
    wanted = set(names)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"A row of a stream must be a dict, got {type(row).__name__} in row {first_row + number}. Have the "
                "source give dicts with `input_ids`."
            )
        if row.keys() != wanted:
            raise ValueError(
                f"All rows of a stream must have the columns {sorted(map(str, names))}, got "
                f"{sorted(map(str, row))} in row {first_row + number}. Give each row every column, None where it has "
                "no value."
            )
    columns = {}
    for name in names:
        values = [row[name] for row in rows]
        if hasattr(values[0], "tolist"):
            values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
        try:
            columns[str(name)] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"Rows of a stream are kept in Arrow files, but the column `{name}` of rows {first_row} to "
                f"{first_row + len(rows) - 1} has no Arrow type ({error}). Leave it out (`remove_columns`), or give "
                "numbers, texts or lists of them."
            ) from error
    return pa.table(columns)
