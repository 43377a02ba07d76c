"""Buffers of a stream, read ahead in a thread: what is read does not depend on what is chosen.

Where it is used: `training/stream/sampler` asks for the next buffer when it needs one. Trade-off: up to three buffers
are in memory, the one in use and two that wait. A source whose code draws from the random streams of the process would
move training's own from another thread, so it is refused at its first rows.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mates_hf.data.collated import rng_state
from mates_hf.data.stream_source import StreamSource, to_table
from mates_hf.errors import UnsupportedSettingError

if TYPE_CHECKING:
    import pyarrow as pa

AHEAD = 2  # buffers that wait


class RawBuffer(NamedTuple):
    """A stretch of a stream.

    Attributes:
        number: Number of the buffer, from 0.
        place: Place of its first row in the source; JSON values.
        table: its rows.
        is_last: no row follows.
    """

    number: int
    place: dict[str, Any]
    table: pa.Table
    is_last: bool


def read_buffers(source: StreamSource, number: int, place: Mapping[str, Any], size: int) -> Iterator[RawBuffer]:
    """Buffers of a stream, one after the other, until one is the last.

    Args:
        source: The stream.
        number: Number of the first buffer.
        place: Where it begins.
        size: Rows of a buffer; the last one may have fewer, or none.

    Yields:
        The buffers.
    """
    tables, place = source.tables(place, number * size, size), dict(place)
    table = next(tables, None)
    while True:
        table = to_table([], 0) if table is None else table
        behind = source.place(number * size + len(table))
        following = next(tables, None) if len(table) == size else None
        yield RawBuffer(number, place, table, following is None)
        if following is None:
            return
        number, table, place = number + 1, following, behind


def first_rows(source: StreamSource, num: int) -> pa.Table:
    """The first rows of a stream, up to `num`, read from its beginning.

    Args:
        source: The stream, which nobody else reads.
        num: How many.

    Returns:
        The rows.

    Raises:
        ValueError: the stream is empty.
        UnsupportedSettingError: reading it moves the random streams of the process.
    """
    before = rng_state()
    buffers = read_buffers(source, 0, source.beginning, num)
    table = next(buffers).table
    buffers.close()  # type: ignore[attr-defined]
    source.let_go()
    if not len(table):
        raise ValueError("The stream must have rows, got none. Check its files and filters.")
    if rng_state() != before:
        raise UnsupportedSettingError(
            "A stream is read in a thread beside training, so its code must not draw from the random streams of "
            "`random`, numpy or torch, and it did in its first rows. Give that code a generator of its own, seeded "
            "by the row (`numpy.random.default_rng`)."
        )
    return table


class BufferReader:
    """Reads buffers ahead, in a thread that begins with the first that is asked for.

    Args:
        source: The stream, which nobody else reads meanwhile.
        number: Number of the first buffer.
        place: Where it begins.
        size: Rows of a buffer.
    """

    def __init__(self, source: StreamSource, number: int, place: Mapping[str, Any], size: int) -> None:
        self._buffers = read_buffers(source, number, place, size)
        self._ready: queue.Queue[RawBuffer | BaseException] = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self) -> RawBuffer:
        """The next buffer; what went wrong in reading it is raised here. Not to be asked for behind the last one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, daemon=True, name="mates-stream")
            self._thread.start()
        found = self._ready.get()
        if isinstance(found, BaseException):
            self._thread.join()
            raise found
        return found

    def stop(self) -> None:
        """Read no further; returns once nobody reads the source any more."""
        self._stopped.set()
        if self._thread is not None:
            while self._thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    self._ready.get_nowait()
                self._thread.join(0.01)

    def _read(self) -> None:
        try:
            for buffer in self._buffers:
                if not self._put(buffer):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, found: RawBuffer | BaseException) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(found, timeout=0.1)
                return True
        return False
