"""The file of one part's scores: what a worker leaves behind, and what the cut through all parts reads.

Where it is used: `mates-hf score` and the blocks for other engines write one for each part that they have scored, with
what it was scored by and from, so that a run that was killed knows what is done. `find_cut` reads the pieces of all.
Trade-off: 16 bytes a row, not compressed, so that going through them several times costs no more than reading them.

The file is Parquet with the columns of `PieceScores`, and the facts as JSON under the key `mates_hf` in its metadata.
Sign: influence > 0 helps, higher is better. Shape suffix: N rows.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.data.arrow import effective_labels
from mates_hf.data.conversations import messages_of
from mates_hf.data.listing import is_local, located
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.data.scored_column import Conversations, ScoredColumn, TokenIds, column_at, python_values, values_at
from mates_hf.data.text_spans import TextSpans
from mates_hf.disk import make_directory, sync_directory
from mates_hf.errors import MatesError
from mates_hf.prediction.threads import spread
from mates_hf.records import IntArray
from mates_hf.selection.prefix import Keys, PieceScores

GROUP_ROWS = 2**20  # rows of a row group, which is one piece
_KEY = b"mates_hf"
_REQUIRED = ("selector", "source")  # facts that the writer must give
_STEP, _LABEL_STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)
_FLUSHED_AT_ONCE = 16  # files: a disk takes many together in the time of one, and one after the other each its own
_SMALL, _PART = 2**22, 2**18  # bytes below which threads, or another part for one, are not worth starting


# --- writing ---


def write_scores(
    path_or_url: str, scores: PieceScores | Iterable[PieceScores], facts: Mapping[str, str | int], *, fs: Any = None
) -> dict[str, str | int]:
    """Write the scores of a part, whole or not at all.

    Args:
        path_or_url: Where to: a path or a URL that `fsspec` knows. A file there is replaced.
        scores: Scores of the part's rows in their order, at once or some at a time.
        facts: What is recorded with them. `selector` is the `Scorer`'s digest, `source` the identity of what was
            scored; the numbers of rows and tokens are added. Read after the last score was, so that what gives the
            scores may add to them.
        fs: The `fsspec` file system that `path_or_url` is a path of; None finds it by the URL.

    Returns:
        The facts that were written, `num_rows` and `num_tokens` among them.

    Raises:
        ValueError: `selector` or `source` is missing.
        OSError: it cannot be written.
    """
    missing = [name for name in _REQUIRED if name not in facts]
    if missing:
        raise ValueError(f"`facts` must hold {' and '.join(map(repr, _REQUIRED))}, got {sorted(facts)}.")
    pieces = [scores] if isinstance(scores, PieceScores) else scores
    with written_whole_at(path_or_url, fs) as local:
        return _write(local, pieces, facts)


def _write(local: Path, pieces: Iterable[PieceScores], facts: Mapping[str, str | int]) -> dict[str, str | int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("influence", pa.float32()), ("num_targets", pa.int32()), ("content", pa.uint64())])
    counts = {"num_rows": 0, "num_tokens": 0}

    def counted(pieces: Iterable[PieceScores]) -> Iterator[Any]:
        for piece in _regrouped(pieces):
            counts["num_rows"] += len(piece.influence)
            counts["num_tokens"] += int(piece.num_targets.sum(dtype=np.int64))
            yield pa.table([pa.array(column) for column in piece], schema=schema)

    def all_facts() -> dict[str, str | int]:
        return {**facts, **counts}

    tables: Iterable[Any] = counted(pieces)
    late = hasattr(pq.ParquetWriter, "add_key_value_metadata")
    if not late:  # pyarrow before 16 writes metadata first: then all scores are held
        held = list(tables)
        with_facts = schema.with_metadata({_KEY: json.dumps(all_facts()).encode()})
        schema, tables = with_facts, [table.cast(with_facts) for table in held]
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(local, schema, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=GROUP_ROWS)
        if late:
            writer.add_key_value_metadata({_KEY.decode(): json.dumps(all_facts())})
    return all_facts()


def _regrouped(pieces: Iterable[PieceScores]) -> Iterator[PieceScores]:
    """The same rows in pieces of `GROUP_ROWS`, the last one of fewer."""
    held: list[PieceScores] = []
    num = 0
    for piece in pieces:
        held.append(_checked(piece))
        num += len(piece.influence)
        while num >= GROUP_ROWS:
            whole = joined_scores(held)
            yield rows_between(whole, 0, GROUP_ROWS)
            held = [rows_between(whole, GROUP_ROWS, num)]
            num -= GROUP_ROWS
    if num:
        yield joined_scores(held)


def _checked(piece: PieceScores) -> PieceScores:
    """The piece in its types."""
    found = PieceScores(
        np.asarray(piece.influence, np.float32),
        np.asarray(piece.num_targets, np.int32),
        np.asarray(piece.content, np.uint64),
    )
    shapes = [column.shape for column in found]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"`scores` must be one-dimensional columns of one length, got the shapes {shapes}.")
    return found


def joined_scores(pieces: Iterable[PieceScores]) -> PieceScores:
    """Several pieces as one; no rows where there is no piece."""
    nothing = PieceScores(np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.uint64))
    return PieceScores(*(np.concatenate(columns) for columns in zip(nothing, *pieces, strict=True)))


def rows_between(piece: PieceScores, begin: int, end: int) -> PieceScores:
    """The rows of a piece from `begin` to before `end`."""
    return PieceScores(piece.influence[begin:end], piece.num_targets[begin:end], piece.content[begin:end])


@contextlib.contextmanager
def written_whole_at(path_or_url: str, fs: Any = None, *, flush: bool = True) -> Iterator[Path]:
    """A local file to write, which becomes the file at a path or URL when it is whole.

    On this machine's disks the file is written next to its place, flushed and renamed. Elsewhere it is written into a
    temporary folder of this machine and put there in one call. The name is of this writer alone, so two that write the
    same file do each other no harm.

    Args:
        path_or_url: Where the file is to be.
        fs: The `fsspec` file system that it is a path of; None finds it by the URL.
        flush: Whether it is on disk at the end. Without, `flush_files` must see to it for many at once.

    Yields:
        The path to write to.
    """
    fs, path = located(path_or_url, fs)
    if is_local(fs):
        target = Path(path)
        make_directory(target.parent)
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            yield temporary
            os.replace(temporary, target)
            if flush:
                flush_files([str(target)])
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="mates-hf-") as folder:
        local = Path(folder) / "part"
        yield local
        fs.makedirs(fs._parent(path), exist_ok=True)
        fs.put_file(str(local), path)


def flush_files(paths_or_urls: Iterable[str]) -> None:
    """Have files on disk, with their names, after a power cut as well; those of this machine's disks.

    Args:
        paths_or_urls: Files that were written without.
    """
    local = [path for fs, path in map(located, paths_or_urls) if is_local(fs)]
    with ThreadPoolExecutor(max(1, min(_FLUSHED_AT_ONCE, len(local)))) as pool:
        list(pool.map(_flush, local))
    for folder in {Path(path).parent for path in local}:
        sync_directory(folder)


def _flush(path: str) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def remove_partial(folder: Path) -> None:
    """Remove what writers that were killed left half written below a folder of this machine; none may be at work."""
    for path in folder.rglob("*.tmp"):
        if re.search(r"\.[0-9a-f]{12}\.tmp$", path.name):
            path.unlink(missing_ok=True)


# --- reading ---


def read_facts(path_or_url: str, *, fs: Any = None) -> dict[str, str | int]:
    """What was recorded with the scores of a part; the scores are not read.

    Args:
        path_or_url: Where the file is.
        fs: The `fsspec` file system that `path_or_url` is a path of; None finds it by the URL.

    Returns:
        The facts.

    Raises:
        FileNotFoundError: there is no such file.
        MatesError: it is damaged, or holds something else.
    """
    fs, path = located(path_or_url, fs)
    with fs.open(path, "rb") as file, _named(path_or_url):
        return _opened(file, path_or_url)[1]


def open_scores(path_or_url: str, *, fs: Any = None) -> list[Callable[[], PieceScores]]:
    """What reads the scores of a part: a function for each piece of at most 2**20 rows, in their order.

    Args:
        path_or_url: Where the file is.
        fs: The `fsspec` file system that `path_or_url` is a path of; None finds it by the URL.

    Returns:
        The functions, which another process may call as well.

    Raises:
        FileNotFoundError: there is no such file.
        MatesError: it is damaged, or holds something else.
    """
    fs, path = located(path_or_url, fs)
    with fs.open(path, "rb") as file, _named(path_or_url):
        num_groups = _opened(file, path_or_url)[0].num_row_groups
    return [functools.partial(_read_group, path_or_url, fs, number) for number in range(num_groups)]


def _read_group(path_or_url: str, fs: Any, number: int) -> PieceScores:
    fs, path = located(path_or_url, fs)
    with fs.open(path, "rb") as file, _named(path_or_url):
        table = _opened(file, path_or_url)[0].read_row_group(number, columns=list(PieceScores._fields))
        return _checked(PieceScores(*(table.column(name).to_numpy() for name in PieceScores._fields)))


def _opened(file: Any, name: str) -> tuple[Any, dict[str, str | int]]:
    """The Parquet file and its facts."""
    import pyarrow.parquet as pq

    found = pq.ParquetFile(file)
    facts = json.loads((found.metadata.metadata or {}).get(_KEY, b"null"))
    if not isinstance(facts, dict) or set(PieceScores._fields) - set(found.schema_arrow.names):
        raise MatesError(f"`{name}` must be a file of scores, and is another Parquet file.")
    if facts.get("num_rows") != found.metadata.num_rows:
        raise MatesError(f"`{name}` must hold the rows that it says, and is damaged. Delete it and score again.")
    return found, facts


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of a damaged file say which it is."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's or the network's, not of the content
            raise
        raise MatesError(
            f"`{name}` must be a whole file of scores, and is damaged ({error}). Delete it and score again."
        ) from error


# --- what rows say ---


def content_hashes(column: ScoredColumn, rows: Any) -> Keys:
    """A hash of what each row says: equal for copies, in every process, file format and version.

    Texts are hashed where Arrow has them, at gigabytes a second; conversations one by one. A null is an empty row.
    Which other rows there are makes no difference, and neither do the types of strings and integers.

    Args:
        column: The scored column.
        rows: N rows: a `pyarrow.Table`, or a dict of lists of plain values by column, as `datasets` hands out.

    Returns:
        (N,) uint64.

    Raises:
        ValueError: a row cannot count as what its column is called.
    """
    in_lists = isinstance(rows, Mapping)
    if isinstance(column, Conversations):
        values = values_at(rows, column.path) if in_lists else python_values(column_at(rows, column.path))
        return np.array([_hash_of(value) for value in values], np.uint64)
    if isinstance(column, TokenIds):
        if in_lists:
            return _token_hashes(column.read_batch(rows))
        return _token_hashes(column.open_table(rows).rows(np.arange(rows.num_rows)))
    return _text_hashes(TextSpans.of(values_at(rows, column.path) if in_lists else column_at(rows, column.path)))


def _hash_of(conversation: Any) -> int:
    content = json.dumps(messages_of(conversation), sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


def _text_hashes(spans: TextSpans) -> Keys:
    from mates_hf.selection.text_hashes import hash_bytes

    out = np.zeros(len(spans), np.uint64)

    def hash_piece(piece: Any) -> None:
        found = np.empty(len(piece.where), np.uint64)
        hash_bytes(piece.values, piece.starts, piece.lengths, found)
        out[piece.where] = found

    spread(hash_piece, spans.pieces, small=_SMALL, part=_PART)
    return out


def _token_hashes(rows: TokenRows) -> Keys:
    """Hashes of rows of tokens, and of their labels where these are not the tokens themselves."""
    from mates_hf.selection.text_hashes import hash_bytes, sum_tokens

    begins, stops = rows.offsets[:-1].astype(np.int64), rows.offsets[1:].astype(np.int64)
    sums = np.empty((len(rows), 3), np.uint64)
    sums[:, 0] = (stops - begins).view(np.uint64)
    sum_tokens(rows.values, begins, stops, _STEP, sums[:, 1])
    sums[:, 2] = 0
    others = _rows_with_labels(rows)
    if len(others):
        found = np.empty(len(others), np.uint64)
        sum_tokens(effective_labels(rows), begins[others], stops[others], _LABEL_STEP, found)
        sums[others, 2] = found
    out = np.empty(len(rows), np.uint64)
    places = np.arange(len(rows), dtype=np.int64) * 24
    content = np.ascontiguousarray(sums, "<u8").view(np.uint8).reshape(-1)
    hash_bytes(content, places, np.full(len(rows), 24, np.int64), out)
    return out


def _rows_with_labels(rows: TokenRows) -> IntArray:
    """Rows whose labels are not what they would be without any."""
    if rows.labels is None:
        return np.zeros(0, np.int64)
    plain = rows.values.astype(np.int64)
    starts = rows.offsets[:-1][rows.lengths > 0]
    plain[starts] = IGNORED
    different = np.concatenate([[0], np.cumsum(effective_labels(rows) != plain)])
    return np.flatnonzero(different[rows.offsets[1:]] > different[rows.offsets[:-1]])
