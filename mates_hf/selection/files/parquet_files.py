"""One Parquet file: its scored column in batches, and the same file with fewer rows or with one more column.

Where it is used: by `work`, for parts that are Parquet. Columns, schema, metadata, compression and the order of rows
stay. Trade-off: what is in memory at once is a batch of some megabytes, whatever the file and its row groups; row
groups of the output hold what was kept of about as many rows, not the same rows.

Shape suffix: N rows of a batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mates_hf.data.listing import is_local, located
from mates_hf.prediction.score import INFLUENCE_COLUMN
from mates_hf.selection.files.ahead import SMALL, read_ahead
from mates_hf.selection.files.allow import AllowedRows
from mates_hf.selection.files.plan import Part
from mates_hf.selection.prefix import Mask, PieceScores

BATCH_BYTES = 32 * 2**20
_MOST_ROWS = 2**16
_LOOKED_AT = 64  # rows whose size is measured
_GROUP_BYTES = 64 * 2**20  # of a row group that is written
_BUFFER, _REMOTE_BUFFER = 2**20, 8 * 2**20  # bytes of a column that are read at once

Kept = Callable[[int], tuple[PieceScores, Mask]]
"""What is known of the next so many rows: their scores, and which of them are kept."""


@contextlib.contextmanager
def _opened(part: Part) -> Iterator[Any]:
    """The `pyarrow.parquet.ParquetFile`, which reads column by column through small buffers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = located(part.url)
    options = {"pre_buffer": False, "page_checksum_verification": True}  # where the file has checksums
    if is_local(fs):
        with pa.OSFile(path) as raw, pq.ParquetFile(raw, buffer_size=_BUFFER, **options) as file:
            yield file
    else:
        with fs.open(path, "rb") as raw, pq.ParquetFile(raw, buffer_size=_REMOTE_BUFFER, **options) as file:
            yield file


def schema_of(part: Part) -> Any:
    """`pyarrow.Schema` of the file."""
    with _opened(part) as file:
        return file.schema_arrow


def tables(part: Part, columns: Sequence[str], threads: bool) -> Iterator[Any]:
    """Some columns, a batch at a time.

    Args:
        part: The file.
        columns: Names with dots of what is read.
        threads: Whether columns may be decoded by several threads.

    Yields:
        `pyarrow.Table` of a batch, of some megabytes.
    """
    with _opened(part) as file:
        yield from _batches(file, list(columns), threads and part.size >= SMALL)


def _batches(file: Any, columns: list[str] | None, threads: bool) -> Iterator[Any]:
    import pyarrow as pa

    rows = _rows_at_once(file, columns)
    for batch in file.iter_batches(batch_size=rows, columns=columns, use_threads=threads):
        yield pa.Table.from_batches([batch])


def _rows_at_once(file: Any, columns: list[str] | None) -> int:
    """Rows that are about as many bytes as a batch may have, by what the file says and by how its first ones come out.

    A file says how many bytes it stores, which is little for a long text that is there many times.
    """
    per_row = 1.0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        if columns is not None:
            chunks = [one for one in chunks if any(_within(one.path_in_schema, name) for name in columns)]
        per_row = max(per_row, sum(one.total_uncompressed_size for one in chunks) / max(group.num_rows, 1))
    if file.metadata.num_rows > _LOOKED_AT:
        first = next(file.iter_batches(batch_size=_LOOKED_AT, columns=columns, use_threads=False), None)
        per_row = max(per_row, 0.0 if first is None else first.nbytes / max(first.num_rows, 1))
    return max(1, min(_MOST_ROWS, int(BATCH_BYTES / per_row)))


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(name + ".")


def write_rows(
    part: Part, local: Path, kept: Kept, *, add_scores: bool, threads: bool, allowed: AllowedRows | None = None
) -> None:
    """Write the rows that are kept, or all of them with their influence.

    Args:
        part: The file that is read.
        local: Where to.
        kept: What is known of the next rows.
        add_scores: Whether all rows are written, with a float32 column `influence`; one of that name is replaced.
        threads: Whether columns may be decoded by several threads.
        allowed: Says which rows may be used; None: all. The others are not written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    threads = threads and part.size >= SMALL
    with _opened(part) as file:
        had = schema = file.schema_arrow
        if add_scores:
            fields = [field for field in had if field.name != INFLUENCE_COLUMN]
            schema = pa.schema([*fields, pa.field(INFLUENCE_COLUMN, pa.float32())], had.metadata)
        with pa.OSFile(str(local), "wb") as out, pq.ParquetWriter(out, schema, **_as_written(file, schema)) as writer:
            may = None
            if allowed is not None:
                may = functools.partial(allowed.of_table, paths=allowed.require_columns(part, had))
            tables = _allowed_only(read_ahead(_batches(file, None, threads), part.size), may)
            for group in _groups(_rows(tables, schema, kept, add_scores), _usual_rows(file)):
                writer.write_table(group, row_group_size=max(group.num_rows, 1))


def _allowed_only(tables: Iterator[Any], may: Callable[[Any], Mask] | None) -> Iterator[Any]:
    """The rows of each table that may be used; None: all."""
    for table in tables:
        yield table if may is None else table.filter(may(table))


def _rows(tables: Iterator[Any], schema: Any, kept: Kept, add_scores: bool) -> Iterator[Any]:
    """The rows to write, batch by batch."""
    import pyarrow as pa

    for table in tables:
        scores, mask = kept(table.num_rows)
        if not add_scores:
            yield table.filter(pa.array(mask))
            continue
        if INFLUENCE_COLUMN in table.column_names:
            table = table.drop_columns([INFLUENCE_COLUMN])
        yield table.append_column(schema.field(INFLUENCE_COLUMN), pa.array(scores.influence)).cast(schema)


def _groups(found: Iterator[Any], usual: int) -> Iterator[Any]:
    """Tables of the size of a row group."""
    import pyarrow as pa

    held: list[Any] = []
    for table in found:
        held.append(table)
        if sum(one.num_rows for one in held) >= usual or sum(one.nbytes for one in held) >= _GROUP_BYTES:
            yield pa.concat_tables(held)
            held = []
    if any(one.num_rows for one in held):
        yield pa.concat_tables(held)


def _usual_rows(file: Any) -> int:
    """Rows of the file's largest row group."""
    return max((file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)), default=1) or 1


def _as_written(file: Any, schema: Any) -> dict[str, Any]:
    """Compression of each column as in the file; its first row group speaks for all."""
    if not file.metadata.num_row_groups:
        return {}
    group = file.metadata.row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    known = {chunk.path_in_schema: chunk.compression.lower() for chunk in chunks}
    codecs = {name: "none" if codec == "uncompressed" else codec for name, codec in known.items()}
    dictionaries = [chunk.path_in_schema for chunk in chunks if any("DICT" in word for word in chunk.encodings)]
    if INFLUENCE_COLUMN in schema.names:
        codecs[INFLUENCE_COLUMN] = next(iter(codecs.values()), "none")
    return {"compression": codecs or "none", "use_dictionary": dictionaries or False}
