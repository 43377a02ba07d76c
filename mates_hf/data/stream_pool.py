"""A stream as `CandidatePool`: the rows of it that are at hand, by their numbers in the stream.

Where it is used: `training/` makes one where the dataset is a `MatesStream`. At hand are the first rows, by which the
run's loss, its collator and its identity are looked at, and the rows that buffers set aside, of which a round probes
some. A whole buffer, whose rows are scored, is a pool of its own (`buffer_pool`).

Trade-off: what is asked of "the pool" before the first step (its token ids, the length of its rows, the background of
the reference task) is asked of its first rows, and a stream may change later. Where a later row cannot be trained on,
the model says so.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mates_hf.data.arrow import effective_labels
from mates_hf.data.collated import Collator
from mates_hf.data.columns import DatasetColumns, LabelRule
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.data.stream import MatesStream
from mates_hf.data.stream_reader import first_rows
from mates_hf.display import card
from mates_hf.errors import MatesError
from mates_hf.records import IntArray

if TYPE_CHECKING:
    import pyarrow as pa

HEAD_ROWS = 4_096  # first rows that are kept in memory


class StreamPool(CandidatePool):
    """The rows of a stream that are at hand. Ids are numbers of rows in the stream; the length counts its first rows.

    Args:
        stream: What the Trainer was given.
        collate_fn: The collator of the dataloader.

    Attributes:
        stream: What the Trainer was given.

    Raises:
        ValueError: the stream is empty.
        UnsupportedSettingError: its first rows cannot be read in a thread, or put on disk.
    """

    def __init__(self, stream: MatesStream, collate_fn: Collator | None = None) -> None:
        self.stream = stream
        held = HeldRows(first_rows(stream.source, HEAD_ROWS))
        super().__init__(held, collate_fn)
        self._columns: Any = held

    def __repr__(self) -> str:
        facts = {
            "first rows": f"{len(self):,} at hand",
            "stream": f"in buffers of up to {self.stream.buffer_rows:,} rows",
        }
        return card("StreamPool", facts)

    @property
    def stream_columns(self) -> list[str]:
        """Columns of the stream's first rows."""
        return list(self._columns.head.column_names)

    @property
    def trained_from(self) -> Any:
        """What the dataloader reads: the stream, whose rows are spooled."""
        return self.stream

    def hold(self, number: int, rows: IntArray, table: pa.Table) -> None:
        """Keep the rows that a buffer sets aside; `rows` are their numbers in the stream, ascending."""
        self._columns.hold(number, rows, table)

    def let_go_before(self, number: int) -> None:
        """Forget what buffers before this one set aside."""
        self._columns.let_go_before(number)

    def identity(self) -> dict[str, Any]:
        """What the stream is, as plain JSON values that are equal for equal content: its first rows and its files.

        Returns:
            `stream`, `features`, `rows_sha256` over tokens and labels of the first rows, `buffer_rows`, and the number
            and names of its files where they are known. Not its length.
        """
        rows = self.token_rows(np.arange(len(self)))
        digest = hashlib.sha256()
        documents = [] if rows.segments is None else [rows.segments]
        for part in (rows.offsets, rows.values, effective_labels(rows), *documents):
            digest.update(np.ascontiguousarray(part, "<i8").tobytes())
        return {
            "stream": True,
            "features": self._features(),
            "rows_sha256": digest.hexdigest(),
            "buffer_rows": self.stream.buffer_rows,
            **self.stream.source.shards(),
        }

    def _features(self) -> str:
        schema = self._columns.head.schema
        return ", ".join(f"{name}: {schema.field(name).type}" for name in sorted(schema.names))

    def _checked(self, ids: Sequence[int] | IntArray) -> IntArray:
        """`ids` as (N,) int64; which of them are at hand is seen where they are read."""
        array = np.asarray(ids)
        if array.ndim != 1 or (len(array) and (array.dtype.kind not in "iu" or array.min() < 0)):
            raise ValueError(f"`ids` must be a list of stream row numbers, got {array.dtype} of shape {array.shape}.")
        return array.astype(np.int64, copy=False)

    def _label_rule(self) -> LabelRule | None:
        found: LabelRule | None = self._columns.find_rule(self.collate_fn)
        return found


class HeldRows:
    """Rows of a stream by their numbers in it: a dataset, and its token columns where the collator allows it.

    Args:
        head: The first rows.
    """

    def __init__(self, head: pa.Table) -> None:
        self.head = head
        self._parts: dict[int, tuple[IntArray, pa.Table]] = {}
        self._current: tuple[IntArray, DatasetColumns] | None = None
        self._lock = threading.Lock()  # a round beside training reads, while the sampler adds

    def __len__(self) -> int:
        return len(self.head)

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids, columns = self._opened()
        found: dict[str, Any] = columns.dataset[int(_places(ids, np.array([row]))[0])]
        return found

    def hold(self, number: int, rows: IntArray, table: pa.Table) -> None:
        """Add the rows that a buffer sets aside."""
        with self._lock:
            self._parts[number] = (rows, table)
            self._current = None

    def let_go_before(self, number: int) -> None:
        """Leave out what earlier buffers set aside."""
        with self._lock:
            kept = {each: part for each, part in self._parts.items() if each >= number}
            if len(kept) < len(self._parts):
                self._parts, self._current = kept, None

    def held(self) -> dict[int, tuple[IntArray, pa.Table]]:
        """What each buffer sets aside: numbers of the rows, ascending, and the rows."""
        with self._lock:
            return dict(self._parts)

    def find_rule(self, collate_fn: Collator | None) -> LabelRule | None:
        """The rule by which columns give exactly the collator's rows; None where rows must be read one by one."""
        return self._opened()[1].find_rule(collate_fn)

    def read(self, ids: IntArray, rule: LabelRule) -> TokenRows:
        """Rows by a rule that `find_rule` gave."""
        held, columns = self._opened()
        return columns.read(_places(held, ids), rule)

    def lengths(self, ids: IntArray) -> IntArray:
        """(N,) int64 tokens of some rows."""
        held, columns = self._opened()
        return columns.lengths(_places(held, ids))

    def _opened(self) -> tuple[IntArray, DatasetColumns]:
        """Numbers of all rows at hand, ascending, and their columns."""
        import pyarrow as pa

        with self._lock:
            if self._current is None:
                parts = [(np.arange(len(self.head)), self.head), *self._parts.values()]
                ids, first = np.unique(np.concatenate([rows for rows, _ in parts]), return_index=True)
                table = pa.concat_tables([table for _, table in parts], promote_options="permissive")
                self._current = (ids, DatasetColumns(as_dataset(table.take(first))))
            return self._current


def _places(held: IntArray, ids: IntArray) -> IntArray:
    """Where some rows are among those at hand."""
    places = np.searchsorted(held, ids)
    there = places < len(held)
    there[there] = held[places[there]] == ids[there]
    if not there.all():
        raise MatesError(
            f"Rows of a stream can be read while they are at hand, got row {int(ids[~there][0])}, which is not: only "
            "its first rows and those that its last buffers set aside to be probed are."
        )
    return places


def as_dataset(table: pa.Table) -> Any:
    """A table as a `datasets.Dataset`, without a look at its content for a fingerprint."""
    import datasets

    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="mates-stream")


def take_rows(table: pa.Table, places: IntArray) -> pa.Table:
    """Some rows of a table, by their places in it, ascending; chunk by chunk, since Arrow would join all of them."""
    import pyarrow as pa

    parts, start = [], 0
    for batch in table.to_batches():
        first, last = np.searchsorted(places, (start, start + len(batch)))
        if first < last:
            parts.append(batch.take(pa.array(places[first:last] - start)))
        start += len(batch)
    return pa.Table.from_batches(parts, table.schema)


def buffer_pool(table: pa.Table, pool: CandidatePool) -> CandidatePool:
    """The rows of one buffer as a pool, read as those of another; ids are places in the buffer."""
    found = CandidatePool(as_dataset(table), pool.collate_fn)
    found.reading = pool.reading
    return found
