"""What a stream leaves beside the rounds: of each buffer the rows that it chose, and those that it set aside.

Where it is used: the main process writes both before a buffer's rows are trained on. `buffer-00000012.parquet` says
what was read, what was predicted of it and what was trained on, 24 bytes a row, and stays. `aside-00000012.arrow`
holds the rows that a round may probe; a run that resumes reads them back, and older ones are deleted.

Trade-off: a run of a stream does not keep its text. Whoever wants to know what a row said needs the stream again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.disk import written_whole
from mates_hf.records import FloatArray, IntArray
from mates_hf.selection.copies import Hashes
from mates_hf.training.order import Files

if TYPE_CHECKING:
    import pyarrow as pa

_FACTS = b"mates_hf"


class BufferRecord(NamedTuple):
    """What a buffer of a stream came to.

    Attributes:
        facts: `number`, `position` (pool rows before its first), `round` whose rule it was made by (-1: none),
            `sizes` of the run's buffers, `num_rows` read, `first_row`, and `num_repeated`, `num_passed_over` and
            `num_random` as a round records them.
        rows: (C,) int64 numbers in the stream of the rows that could be trained on.
        places: (C,) int64 place of each in the order of training; -1 where it was not chosen.
        influence: (C,) float32 predicted influence of each, > 0 helps; None in the own order.
        num_targets: (C,) int32 trained tokens of each, or None.
        hashes: (C,) uint64, equal for copies of a text, or None.
    """

    facts: dict[str, Any]
    rows: IntArray
    places: IntArray
    influence: FloatArray | None = None
    num_targets: npt.NDArray[np.int32] | None = None
    hashes: Hashes | None = None

    @property
    def selection(self) -> IntArray:
        """(k,) int64 numbers in the stream of the rows that are trained on, in their order."""
        chosen = np.flatnonzero(self.places >= 0)
        found: IntArray = self.rows[chosen[np.argsort(self.places[chosen])]]
        return found


def stream_dir(rounds_dir: Path) -> Path:
    """Where a stream's files are, beside the rounds."""
    return rounds_dir / "stream"


def buffer_path(rounds_dir: Path, number: int) -> Path:
    """The record of a buffer."""
    return stream_dir(rounds_dir) / f"buffer-{number:08d}.parquet"


def write_buffer(rounds_dir: Path, record: BufferRecord) -> None:
    """Write down what a buffer came to."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: getattr(record, name) for name in ("rows", "places", "influence", "num_targets", "hashes")}
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    table = table.replace_schema_metadata({_FACTS: json.dumps(record.facts, sort_keys=True).encode()})
    with written_whole(buffer_path(rounds_dir, record.facts["number"])) as file:
        pq.write_table(table, file)


def read_buffer(path: Path) -> BufferRecord:
    """Read back what `write_buffer` wrote."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {name: np.asarray(table.column(name)) for name in table.column_names}
    return BufferRecord(json.loads(table.schema.metadata[_FACTS]), **columns)


def write_aside(rounds_dir: Path, number: int, position: int, rows: IntArray, table: pa.Table) -> None:
    """Keep the rows that a buffer sets aside, for a run that resumes."""
    import pyarrow as pa

    table = table.append_column("__stream_row__", pa.array(rows))
    table = table.replace_schema_metadata({_FACTS: json.dumps({"position": position}).encode()})
    with (
        written_whole(stream_dir(rounds_dir) / f"aside-{number:08d}.arrow") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)


def read_aside(data: Any) -> tuple[int, IntArray, pa.Table]:
    """Position, rows and table of a buffer's rows that were set aside, from the bytes of its file."""
    import pyarrow as pa

    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    position = int(json.loads(table.schema.metadata[_FACTS])["position"])
    rows = np.asarray(table.column("__stream_row__")).astype(np.int64)
    return position, rows, table.drop_columns(["__stream_row__"]).replace_schema_metadata(None)


def numbered(rounds_dir: Path, kind: str) -> Iterator[tuple[int, Path]]:
    """Number and path of each file of a kind (`buffer` or `aside`), ascending."""
    for path in sorted(stream_dir(rounds_dir).glob(f"{kind}-????????.*")):
        number = path.name.split(".")[0].removeprefix(f"{kind}-")
        if number.isdigit() and path.suffix != ".tmp":
            yield int(number), path


def files_in(folder: Path) -> Files:
    """All files of a folder as bytes, by their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): np.frombuffer(path.read_bytes(), np.uint8) for path in paths}
