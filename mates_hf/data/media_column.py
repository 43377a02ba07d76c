"""A column of images or sounds, as a selector scores it: what is in it, and which values are the same.

Where it is used: `scored_column` is for influence models of tokens, this for one that says `reads_media`. Trade-off:
values are read as they are stored, encoded or as numbers, a few at a time; the influence model decodes them.

Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.column_types import find_path
from mates_hf.data.scored_column import ScoredColumn, column_at, values_at
from mates_hf.records import IntArray

_ROWS_AT_ONCE = 64  # images are large
_LOOKED_FOR = ("image", "audio")  # columns that are scored without being named, the first there is


@dataclasses.dataclass(frozen=True)
class MediaRows:
    """N images or sounds.

    Attributes:
        values: As they are stored or decoded; None where there is none.
        num_targets: (N,) int32 1 where there is a value, else 0.
    """

    values: list[Any]
    num_targets: npt.NDArray[np.int32]

    @classmethod
    def of(cls, values: list[Any], num_targets: Any = None) -> MediaRows:
        """Rows of these values; `num_targets` where a run trains more of each than one label."""
        there = np.array([value is not None for value in values], np.int32)
        return cls(values, there if num_targets is None else np.asarray(num_targets, np.int32) * there)

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: npt.NDArray[Any]) -> MediaRows:
        """Some rows: `index` is (M,) int row numbers or an (N,) bool mask."""
        index = np.flatnonzero(index) if np.asarray(index).dtype == np.bool_ else index
        return MediaRows([self.values[int(i)] for i in index], self.num_targets[index])

    def hashes(self) -> IntArray:
        """(N,) int64, equal for equal values."""
        digests = [hashlib.blake2b(media_bytes(value), digest_size=8).digest() for value in self.values]
        return np.array([int.from_bytes(one, "little", signed=True) for one in digests], np.int64)


def media_bytes(value: Any) -> bytes:
    """What a value is known by: its encoded bytes, its numbers, or the path of its file."""
    if value is None:
        return b""
    if isinstance(value, Mapping):
        inside = value.get("bytes")
        if inside is None and value.get("array") is not None:
            return media_bytes(value["array"])
        return b"b" + bytes(inside) if inside is not None else b"p" + str(value.get("path")).encode()
    if isinstance(value, (bytes, bytearray)):
        return b"b" + bytes(value)
    if isinstance(value, str):
        return b"p" + value.encode()
    array = np.asarray(value)
    return f"a{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes()


def find_media_column(schema: Any, column: str | None) -> MediaColumn:
    """Decide which column of images or sounds is scored.

    Args:
        schema: `pyarrow.Schema` of the dataset.
        column: Name of the column, with dots where it is nested; None takes `image`, else `audio`.

    Returns:
        The column.

    Raises:
        ValueError: there is no such column (names those there are).
    """
    name, path = find_path(schema, column, _LOOKED_FOR, "images or sounds", nested=False)
    return MediaColumn(name, path)


class MediaColumn(ScoredColumn):
    """Images or sounds as they are stored."""

    def depends_on(self) -> list[Any]:
        """See `ScoredColumn`."""
        return [self.name, "media"]

    def open(self, dataset: Any, batch_size: int = 1000) -> OpenMedia:
        """See `ScoredColumn`; how many are read at once is not for the caller to say."""
        return OpenMedia(self, dataset.with_format("arrow", columns=[self.path[0]]))

    def open_table(self, table: Any, first_row: int = 0) -> OpenMedia:
        """See `ScoredColumn`."""
        return OpenMedia(self, table, first_row)

    def read_batch(self, batch: Mapping[str, Any]) -> Any:
        """See `ScoredColumn`."""
        return MediaRows.of(list(values_at(batch, self.path)))

    def stretches(self, dataset: Any, row: int) -> Any:
        """Refused: an image or a sound has no words.

        Args:
            dataset: The dataset.
            row: Number of the row.

        Returns:
            Nothing.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"`explain` is for texts and tokens, and the column `{self.name}` holds images or sounds.")

    def _bytes_of(self, value: Any) -> bytes:
        return media_bytes(value)


class OpenMedia:
    """Rows of images or sounds, opened once.

    Args:
        column: The column that is read.
        source: A `pyarrow.Table`, or a dataset that gives such tables.
        first_row: Number of the first row, for errors.
    """

    def __init__(self, column: MediaColumn, source: Any, first_row: int = 0) -> None:
        self._column, self._source, self._first_row = column, source, first_row

    def parts(self, begin: int, end: int, *, in_place: bool) -> Iterator[tuple[int, Any]]:
        """See `OpenRows`."""
        for start in range(begin, end, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, end))
            yield self._first_row + start, MediaRows.of(self._values(rows))

    def rows(self, ids: IntArray) -> Any:
        """See `OpenRows`."""
        return MediaRows.of(self._values(ids.tolist()))

    def content(self, ids: IntArray) -> bytes:
        """See `OpenRows`."""
        return json.dumps(MediaRows.of(self._values(ids.tolist())).hashes().tolist()).encode()

    def row_bytes(self, begin: int, end: int) -> list[bytes]:
        """See `OpenRows`."""
        return [media_bytes(value) for value in self._values(slice(begin, end))]

    def _values(self, rows: slice | list[int]) -> list[Any]:
        found: list[Any] = column_at(self._source[rows] if isinstance(rows, slice) else _taken(self._source, rows),
                                     self._column.path).to_pylist()  # fmt: skip
        return found


def _taken(source: Any, ids: list[int]) -> Any:
    return source.take(ids) if hasattr(source, "schema") and not hasattr(source, "features") else source[ids]
