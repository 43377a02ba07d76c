"""Rows of a stream that are to be trained on, in one Arrow file a buffer: what a dataloader's workers read.

Where it is used: `training/stream/sampler` writes a buffer's rows before it hands out their numbers; `MatesStream`
answers the numbers from the files, in whatever process it is asked. A file is written whole and renamed, so that it is
there or is not. Processes of one machine may write the same one: its rows are the same.

Trade-off: a dataloader's workers get nothing but files, so no stream, no influence model and no state has to reach
them; the price is disk for the rows of a few buffers.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mates_hf.errors import MatesError
from mates_hf.records import IntArray

if TYPE_CHECKING:
    import pyarrow as pa

ROW_COLUMN = "__stream_row__"
_OPEN = 3  # files that are kept open


class Spool:
    """A folder of buffers' rows.

    Args:
        folder: Where the files are.
        buffer_rows: Rows of a buffer as it is read, by which a row's number tells its buffer.
    """

    def __init__(self, folder: Path, buffer_rows: int) -> None:
        self.folder, self.buffer_rows = folder, buffer_rows
        self._open: dict[tuple[int, int, int], tuple[pa.Table, dict[int, int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def path(self, number: int) -> Path:
        """The file of a buffer."""
        return self.folder / f"buffer-{number:08d}.arrow"

    def write(self, number: int, rows: IntArray, table: pa.Table) -> None:
        """Write a buffer's rows.

        Args:
            number: Number of the buffer.
            rows: (k,) int64 numbers of the rows in the stream.
            table: the k rows.
        """
        import pyarrow as pa

        path = self.path(number)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        table = table.append_column(ROW_COLUMN, pa.array(rows))
        try:
            with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def row(self, row: int) -> dict[str, Any]:
        """A row by its number in the stream, as plain Python values.

        Args:
            row: Number of the row.

        Returns:
            The row.

        Raises:
            MatesError: it is not in its buffer's file, or there is no such file.
        """
        table, where = self._opened(row // self.buffer_rows)
        at = where.get(row)
        if at is None:
            raise MatesError(
                f"Row {row} of the stream is not in `{self.path(row // self.buffer_rows)}`, which holds "
                f"{len(where)} others: another run writes there. Give each run a `spool_dir` of its own."
            )
        return {name: table.column(name)[at].as_py() for name in table.column_names if name != ROW_COLUMN}

    def _opened(self, number: int) -> tuple[pa.Table, dict[int, int]]:
        """A buffer's table and the place of each row in it; a file that was written anew is read anew."""
        import pyarrow as pa

        path = self.path(number)
        try:
            status = os.stat(path)
        except FileNotFoundError as error:
            raise MatesError(
                f"`{path}` must be there as long as its rows are trained on, and is not: something deletes files in "
                "the folder. Set `spool_dir` of the MatesStream to a folder that nothing cleans up."
            ) from error
        key = (number, status.st_mtime_ns, status.st_ino)
        found = self._open.get(key)
        if found is None:
            options = pa.ipc.IpcReadOptions(use_threads=False)  # a worker may be a fork
            table = pa.ipc.open_file(pa.memory_map(str(path)), options=options).read_all()
            where = {row: at for at, row in enumerate(np.asarray(table.column(ROW_COLUMN)).tolist())}
            for old in list(self._open)[: 1 - _OPEN]:
                del self._open[old]
            found = self._open[key] = (table, where)
        return found

    def drop_before(self, number: int) -> None:
        """Delete the files of earlier buffers, which nobody trains on any more."""
        for path in self.folder.glob("buffer-*.arrow"):
            found = path.name.removeprefix("buffer-").removesuffix(".arrow")
            if found.isdigit() and int(found) < number:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Make the folder, and delete what an earlier start left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("buffer-*"):
            path.unlink(missing_ok=True)
