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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mates_hf.paths import expand_path

logger = logging.getLogger(__name__)

MOST_FILES = 64  # that are opened where only some rows are wanted
READ_BYTES = 2**28  # of all of them together, as they lie on disk
_BLOCK = 2**20
_KINDS = {
    ".parquet": "Parquet", ".jsonl": "JSON Lines", ".json": "JSON Lines", ".ndjson": "JSON Lines", ".txt": "text",
}  # fmt: skip
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_FORMATS = "Parquet, JSON Lines (.jsonl, .json) or lines of text (.txt), the last two also as .gz or .zst"
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
        return _CODECS.get(Path(self.path).suffix.lower())

    @property
    def kind(self) -> str | None:
        """What it holds, by its name, or None where that does not say."""
        path = Path(self.path.lower())
        return _KINDS.get(path.with_suffix("").suffix if self.codec else path.suffix)


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
        ValueError: files are of several formats or of one that is not known, there is no row, a column is missing, or
            a file is damaged.
        TypeError: the source is none of these.
    """
    rng = np.random.default_rng([seed, 0x66696C65])
    if isinstance(source, (str, os.PathLike)) or (isinstance(source, (list, tuple)) and source):
        named = [os.fspath(one) for one in (source if isinstance(source, (list, tuple)) else [source])]
        files = [file for one in named for file in _files_of(one)]
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


def _files_of(named: str) -> list[_File]:
    """The files that a path, a glob or a URL stands for, in the order of their names; none for anything else."""
    import fsspec

    url = named if "://" in named else str(expand_path(named))
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"`{named}` cannot be read: {error}") from error
    is_pattern = any(char in path for char in "*?[")
    if fs.isfile(path):  # also one with such a character in its name
        found = [path]
    elif is_pattern:
        found = sorted(one for one in fs.glob(path) if fs.isfile(one))
    elif fs.isdir(path) and not _is_saved(fs, path):
        found = sorted(one for one in fs.find(path) if _File(fs, one, 0).kind and "/." not in one)
    else:
        return []
    if not found and is_pattern:
        raise FileNotFoundError(f"`{named}` must match files, and matches none. Put it in quotes, and check the path.")
    return [_File(fs, one, int(fs.size(one) or 0)) for one in found]


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


def _read(files: list[_File], columns: Columns, name: str, num_rows: int | None, rng: Any) -> tuple[Any, str]:
    """A `pyarrow.Table` of some rows, and how they were drawn."""
    kinds = {file.kind: file.path for file in files}
    if None in kinds:
        raise ValueError(f"`{name}` must be files of {_FORMATS}, got `{kinds[None]}`. Name the files by their ending.")
    if len(kinds) > 1:
        shown = ", ".join(f"{kind} (`{path}`)" for kind, path in sorted(kinds.items(), key=str))
        raise ValueError(f"`{name}` must be files of one format, got {shown}. Give a pattern that names one of them.")
    (kind,) = kinds
    num_files, limit = len(files), READ_BYTES if num_rows is not None else None
    if num_rows is not None and num_files > MOST_FILES:
        files = [files[i] for i in np.sort(rng.permutation(num_files)[:MOST_FILES])]
    total = sum(file.size for file in files)
    share = 1.0 if limit is None or total <= limit else limit / total
    read = _read_parquet if kind == "Parquet" else _read_lines
    table, num_read = read(files, columns, name, share, num_rows, kind == "text", rng)
    _require_rows(num_read, name)
    whole = share == 1 and len(files) == num_files
    of = f"{num_files:,} {kind} file{'s' if num_files > 1 else ''}"
    if not whole:
        of = f"{len(files):,} of {of}" + ("" if share == 1 else f", {share:.2%} of each")
    drawn = f"all {num_read:,} rows" if table.num_rows == num_read else f"{table.num_rows:,} rows drawn at random"
    of = of if table.num_rows == num_read else f"the {num_read:,} that were read, of {of}"
    return table, f"{drawn} {'of' if table.num_rows == num_read else 'from'} {of}"


def _drawn(num_read: int, num_rows: int | None, rng: Any) -> Any:
    """(M,) int64 positions to keep of the rows that were read, ascending."""
    if num_rows is None or num_rows >= num_read:
        return np.arange(num_read)
    return np.sort(rng.permutation(num_read)[:num_rows])


def _read_parquet(
    files: list[_File], columns: Columns, name: str, share: float, num_rows: int | None, is_text: bool, rng: Any
) -> tuple[Any, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    del is_text
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
    try:
        table = pa.concat_tables([part.replace_schema_metadata(None) for part in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"`{name}` must hold the same in the columns {wanted} of all files, and does not ({error}). Give a "
            "pattern that names those that belong together."
        ) from error
    return table.take(_drawn(table.num_rows, num_rows, rng)), table.num_rows


def _require_columns(wanted: Sequence[str], names: Sequence[str], path: str) -> None:
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise ValueError(
            f"All files must have the columns {list(wanted)}, and `{path}` has {list(names)}. Give a pattern that "
            "names those that belong together."
        )


def _read_lines(
    files: list[_File], columns: Columns, name: str, share: float, num_rows: int | None, is_text: bool, rng: Any
) -> tuple[Any, int]:
    import pyarrow as pa

    lines: list[bytes] = []
    owners: list[int] = []
    for number, file in enumerate(files):
        for line in _lines_of(file, share):
            lines.append(line)
            owners.append(number)
    kept = _drawn(len(lines), num_rows, rng).tolist()
    if is_text:
        wanted = columns(["text"])
        return pa.table({one: [lines[i].decode("utf-8", "replace") for i in kept] for one in wanted}), len(lines)
    rows = [(owners[i], _parsed(lines[i])) for i in kept]
    faults = [owner for owner, row in rows if row is None]
    if len(faults) > _MOST_FAULTS * len(rows):
        raise ValueError(
            f"`{files[faults[0]].path}` must hold one JSON object a line, and {len(faults):,} of the {len(rows):,} "
            "lines that were drawn are none. Write one with `Dataset.to_json(path)`, or give Parquet files."
        )
    if faults:
        logger.warning("%d of %d lines of `%s` are no JSON objects and were left out.", len(faults), len(rows), name)
    found = [(owner, row) for owner, row in rows if row is not None]
    if not found:
        return pa.table({}), 0
    names = list(dict.fromkeys(key for _, row in found for key in row))
    wanted = columns(names)
    with_it = {owner for owner, row in found if any(one in row for one in wanted)}
    for owner, row in found:
        if owner not in with_it:
            _require_columns(wanted, list(row), files[owner].path)
    arrays = {}
    for one in wanted:
        try:
            arrays[one] = pa.array([row.get(one) for _, row in found])
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(
                f"`{name}` must hold the same kind of value in each row of the column `{one}`, and does not ({error})."
            ) from error
    return pa.table(arrays), len(lines)


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
