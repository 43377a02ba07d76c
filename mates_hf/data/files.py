"""Rows of files, of the Hub or of a dataset, named as on a command line, and only as many as are wanted.

Where it is used: `mates-hf fit` reads its pool and its reference through `load_rows`. A pool may be a terabyte, and a
fit needs some thousands of its rows. So rows are drawn at random: of all where the files are small, else of a share of
each file, and of many files of some that are drawn at random. What was read is said in words.

Trade-off: of a large JSON Lines file the share is its beginning, because lines cannot be found without reading what
is before them; of Parquet it is row groups at random. A corpus that is sorted should be in several files. Nothing goes
through the cache of `datasets`, which would copy the whole corpus first; a dataset of the Hub does.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mates_hf.data.listing import JSON_LINES, KINDS, PARQUET, TEXT, format_of, list_files
from mates_hf.paths import expand_path

logger = logging.getLogger(__name__)

MOST_FILES = 64  # that are opened where only some rows are wanted
READ_BYTES = 2**28  # of all of them together, as they lie on disk
_BLOCK = 2**20
_FORMATS = "Parquet, JSON Lines (.jsonl, .json) or lines of text (.txt), the last two also as .gz, .zst or .bz2"
_MOST_FAULTS = 0.01  # of the lines of a file, that may be no JSON object

Columns = Callable[[Sequence[str]], list[str]]
"""Says which columns to read of those that there are; raises a `ValueError` where what is wanted is not there."""


class Loaded(NamedTuple):
    """Rows that were read.

    Attributes:
        dataset: A `datasets.Dataset` of them.
        told: Where they come from and how they were drawn, in half a sentence.
    """

    dataset: Any
    told: str


class _File(NamedTuple):
    """A file that is there.

    Attributes:
        fs: The `fsspec` file system.
        path: Path of the file on it.
        size: Bytes, as it lies there.
    """

    fs: Any
    path: str
    size: int

    @property
    def codec(self) -> str | None:
        """How it is compressed as a whole, or None."""
        found = format_of(self.path)
        return None if found is None else found.packed

    @property
    def kind(self) -> str | None:
        """What it holds, by its name, or None where that does not say."""
        found = format_of(self.path)
        return None if found is None else found.kind


def load_rows(
    source: Any,
    columns: Columns,
    *,
    name: str,
    split: str = "train",
    num_rows: int | None = None,
    seed: int = 0,
) -> Loaded:
    """Read some rows of whatever a user names.

    Args:
        source: A `datasets.Dataset`; or a path, a glob, an `fsspec` URL or a list of these; or a folder of such files
            or one that `save_to_disk` wrote; or the name of a dataset on the Hub.
        columns: Which columns to read.
        name: What the source is called, for errors.
        split: Split of a dataset on the Hub, or of a folder with several.
        num_rows: Largest number of rows, which are then drawn at random; None reads all.
        seed: Random seed of the draw.

    Returns:
        The rows, in their order.

    Raises:
        FileNotFoundError: there are no such files, and no such dataset that can be read.
        ValueError: a file is of a format that is not known, there is no row, a column is missing or not the same in
            all files, or a file is damaged.
        TypeError: the source is none of these.
    """
    rng = np.random.default_rng([seed, 0x66696C65])
    if isinstance(source, (str, os.PathLike)) or (isinstance(source, (list, tuple)) and source):
        named = [os.fspath(one) for one in (source if isinstance(source, (list, tuple)) else [source])]
        files = [file for one in named for file in _files_of(one, name)]
        if files:
            table, told = _read(files, columns, name, num_rows, rng)
            return Loaded(_dataset(table), told)
        if len(named) > 1:
            raise FileNotFoundError(f"`{name}` must name files that are there, and none of {named} is.")
        source = _opened(named[0], name, split)
    return _of_dataset(source, columns, name, num_rows, rng)


def _of_dataset(dataset: Any, columns: Columns, name: str, num_rows: int | None, rng: Any) -> Loaded:
    """Some rows of a `datasets.Dataset`."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset`, files, a folder or a dataset on the Hub, got "
            f"{type(dataset).__name__}. Pass one split of a DatasetDict; of a stream, the rows that are wanted: "
            "`Dataset.from_list(list(stream.take(20_000)))`."
        )
    dataset = dataset.with_format(None).select_columns(columns(dataset.column_names))
    total = len(dataset)
    _require_rows(total, name)
    if num_rows is None or num_rows >= total:
        return Loaded(dataset, f"all {total:,} rows of a dataset")
    drawn = dataset.select(np.sort(rng.permutation(total)[:num_rows]))
    return Loaded(drawn, f"{num_rows:,} rows drawn at random from the {total:,} of a dataset")


def _dataset(table: Any) -> Any:
    import datasets

    return datasets.Dataset(table)


def _require_rows(total: int, name: str) -> None:
    if not total:
        raise ValueError(f"`{name}` must have rows, got none. Check its files, its split and its filters.")


# --- what a name stands for ---


def _files_of(named: str, name: str) -> list[_File]:
    """The files that a path, a glob or a URL stands for, in the order of their names; none for anything else."""
    listing = list_files(named, name)
    if listing is None or (listing.how == "folder" and _is_saved(listing.fs, listing.base)):
        return []
    found = [_File(listing.fs, path, int(info.get("size") or 0)) for path, info in listing.inputs().items()]
    if not found:
        raise FileNotFoundError(
            f"`{name}` must be a folder with files of {_FORMATS}, and `{named}` has none. Plain `.json` files in a "
            "folder are passed over: name them by a pattern."
        )
    return found


def _is_saved(fs: Any, path: str) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return any(fs.exists(f"{path}/{file}") for file in ("state.json", "dataset_dict.json"))


def _opened(named: str, name: str, split: str) -> Any:
    """A folder that `save_to_disk` wrote, or a dataset of the Hub."""
    import datasets

    folder = expand_path(named)
    try:
        found = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(named, split=split)
    except Exception as error:  # each of the two raises whatever its parts do
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"`{name}` must be files that are there, a folder of them, or a dataset on the Hub that can be read, and "
            f"{named!r} is not ({why[0]})."
        ) from error
    if isinstance(found, dict):
        if split not in found:
            raise ValueError(f"`{named}` must have the split {split!r}, got {sorted(map(str, found))}.")
        found = found[split]
    return found


# --- reading files ---


class _Rows(NamedTuple):
    """Rows of one format that were read, and of which some are kept.

    Attributes:
        num: How many were read.
        take: Given (M,) positions, a `pyarrow.Table` of those rows; of damaged lines there is no row.
        path: Path of a file that they are of.
    """

    num: int
    take: Callable[[Any], Any]
    path: str


def _read(files: list[_File], columns: Columns, name: str, num_rows: int | None, rng: Any) -> tuple[Any, str]:
    """A `pyarrow.Table` of some rows, and how they were drawn. Rows of several formats follow one another."""
    unknown = next((file for file in files if file.kind is None), None)
    if unknown is not None:
        raise ValueError(
            f"`{name}` must be files of {_FORMATS}, got `{unknown.path}`. Name the files by their ending."
        )
    num_files, limit = len(files), READ_BYTES if num_rows is not None else None
    of = " and ".join(_counted(files, kind) for kind in KINDS if any(file.kind == kind for file in files))
    if num_rows is not None and num_files > MOST_FILES:
        files = [files[i] for i in np.sort(rng.permutation(num_files)[:MOST_FILES])]
    total = sum(file.size for file in files)
    share = 1.0 if limit is None or total <= limit else limit / total
    readers = {PARQUET: _read_parquet, JSON_LINES: _read_lines, TEXT: _read_texts}
    found = []
    for kind, read in readers.items():
        some = [file for file in files if file.kind == kind]
        found += [read(some, columns, name, share, rng)] if some else []
    num_read = sum(rows.num for rows in found)
    _require_rows(num_read, name)
    table = _joined(found, _drawn(num_read, num_rows, rng), name)
    if share < 1 or len(files) < num_files:
        of = f"{len(files):,} of {of}" + ("" if share == 1 else f", {share:.2%} of each")
    if table.num_rows == num_read:
        return table, f"all {num_read:,} rows of {of}"
    return table, f"{table.num_rows:,} rows drawn at random from the {num_read:,} that were read, of {of}"


def _counted(files: Sequence[_File], kind: str) -> str:
    num = sum(file.kind == kind for file in files)
    return f"{num:,} {KINDS[kind]} file{'s' if num > 1 else ''}"


def _joined(found: Sequence[_Rows], kept: Any, name: str) -> Any:
    """The rows that are kept, of all formats, which must have the same columns."""
    tables, begin = [], 0
    for rows in found:
        end = begin + rows.num
        here = kept[(kept >= begin) & (kept < end)] - begin
        if len(here):
            tables.append((rows.take(here), rows.path))
        begin = end
    filled = [(table, path) for table, path in tables if table.num_rows]
    _require_rows(len(filled), name)
    names = filled[0][0].column_names
    for table, path in filled[1:]:
        _require_columns(names, table.column_names, path)
    return _concatenated([table.select(names) for table, _ in filled], name)


def _concatenated(tables: Sequence[Any], name: str) -> Any:
    import pyarrow as pa

    try:
        return pa.concat_tables([one.replace_schema_metadata(None) for one in tables], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"`{name}` must hold the same in the columns {tables[0].column_names} of all files, and does not "
            f"({error}). Give a pattern that names those that belong together."
        ) from error


def _drawn(num_read: int, num_rows: int | None, rng: Any) -> Any:
    """(M,) int64 positions to keep of the rows that were read, ascending."""
    if num_rows is None or num_rows >= num_read:
        return np.arange(num_read)
    return np.sort(rng.permutation(num_read)[:num_rows])


def _read_parquet(files: list[_File], columns: Columns, name: str, share: float, rng: Any) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted: list[str] = []
    parts = []
    for file in files:
        try:
            with file.fs.open(file.path, "rb") as source:
                parquet = pq.ParquetFile(source)
                wanted = wanted or columns(parquet.schema_arrow.names)
                _require_columns(wanted, parquet.schema_arrow.names, file.path)
                groups = range(parquet.num_row_groups)
                if share < 1:
                    groups = np.sort(rng.permutation(len(groups))[: max(round(len(groups) * share), 1)]).tolist()
                parts.append(parquet.read_row_groups(list(groups), columns=wanted).select(wanted))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"`{file.path}` must be a whole Parquet file, and cannot be read ({error}).") from error
    table = _concatenated(parts, name)
    return _Rows(table.num_rows, table.take, files[0].path)


def _require_columns(wanted: Sequence[str], names: Sequence[str], path: str) -> None:
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise ValueError(
            f"All files must have the columns {list(wanted)}, and `{path}` has {list(names)}. Give a pattern that "
            "names those that belong together, or name a column that all have."
        )


def _read_texts(files: list[_File], columns: Columns, name: str, share: float, rng: Any) -> _Rows:
    import pyarrow as pa

    del name, rng
    lines = [line for file in files for line in _lines_of(file, share)]

    def take(kept: Any) -> Any:
        texts = [lines[i].decode("utf-8", "replace") for i in kept.tolist()]
        return pa.table(dict.fromkeys(columns(["text"]), texts))

    return _Rows(len(lines), take, files[0].path)


def _read_lines(files: list[_File], columns: Columns, name: str, share: float, rng: Any) -> _Rows:
    del rng
    lines: list[bytes] = []
    owners: list[int] = []
    for number, file in enumerate(files):
        for line in _lines_of(file, share):
            lines.append(line)
            owners.append(number)

    def take(kept: Any) -> Any:
        return _objects([(files[owners[i]].path, lines[i]) for i in kept.tolist()], columns, name)

    return _Rows(len(lines), take, files[0].path)


def _objects(lines: Sequence[tuple[str, bytes]], columns: Columns, name: str) -> Any:
    """A `pyarrow.Table` of the objects of some lines, each with the path of its file."""
    import pyarrow as pa

    rows = [(path, _parsed(line)) for path, line in lines]
    faults = [path for path, row in rows if row is None]
    if len(faults) > _MOST_FAULTS * len(rows):
        raise ValueError(
            f"`{faults[0]}` must hold one JSON object a line, and {len(faults):,} of the {len(rows):,} "
            "lines that were drawn are none. Write one with `Dataset.to_json(path)`, or give Parquet files."
        )
    if faults:
        logger.warning("%d of %d lines of `%s` are no JSON objects and were left out.", len(faults), len(rows), name)
    found = [(path, row) for path, row in rows if row is not None]
    if not found:
        return pa.table({})
    names = list(dict.fromkeys(key for _, row in found for key in row))
    wanted = columns(names)
    with_it = {path for path, row in found if any(one in row for one in wanted)}
    for path, row in found:
        if path not in with_it:
            _require_columns(wanted, list(row), path)
    arrays = {}
    for one in wanted:
        try:
            arrays[one] = pa.array([row.get(one) for _, row in found])
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(
                f"`{name}` must hold the same kind of value in each row of the column `{one}`, and does not ({error})."
            ) from error
    return pa.table(arrays)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's object, or None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _lines_of(file: _File, share: float) -> Iterator[bytes]:
    """Lines that are not blank, from the beginning up to a share of the bytes, at least one."""
    import pyarrow as pa

    try:
        with file.fs.open(file.path, "rb") as source:
            stream = pa.CompressedInputStream(pa.PythonFile(source, "r"), file.codec) if file.codec else source
            left, any_yet = b"", False
            while block := stream.read(_BLOCK):
                *whole, left = (left + block).split(b"\n")
                for line in whole:
                    if line.strip():
                        any_yet = True
                        yield line
                if share < 1 and any_yet and source.tell() >= share * file.size:
                    return
            if left.strip():
                yield left
    except (pa.ArrowException, OSError, EOFError) as error:
        raise ValueError(
            f"`{file.path}` must be a whole file, and cannot be read to its end ({error}). Copy it again."
        ) from error
