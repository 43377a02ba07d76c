"""The benchmarks out of a folder of JSON lines, for machines without a hub.

Where it is used: the `_local` task files name `load` as their `custom_dataset`; lm-eval hands it the metadata
(`--metadata '{"data_dir": "...", "split": "validation"}'`) and which benchmark is wanted. Trade-off: files are scored
as they are (no clean-up of brackets and spaces, as the Hub's data get), and read when a split is first asked for.

A folder has one subfolder for each benchmark, with a file `<split>.jsonl` (or `<split>_<anything>.jsonl`, `.jsonl.gz`)
for each split. Rows: `{"context", "question", "choices", "label"}`; LAMBADA `{"context", "target"}`. Other keys are
ignored.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mates_hf.evaluation.benchmarks import BENCHMARKS, Splits, document, required_columns
from mates_hf.paths import expand_path

_SUFFIXES = (".jsonl", ".jsonl.gz")
_EVALUATED = ("test", "validation", "val", "dev")  # in the order of preference


def load(*, benchmark: str, data_dir: str | Path | None = None, split: str | None = None, **metadata: Any) -> Splits:
    """The splits of a benchmark in a folder.

    Args:
        benchmark: its name, that of its subfolder.
        data_dir: the folder; `~` is the home folder.
        split: which split is evaluated; None takes a test split where there is one, else a validation split.
        **metadata: what else lm-eval passes on; not read.

    Returns:
        The splits, not yet read.

    Raises:
        ValueError: no `data_dir`, or no such split; says which there are.
        FileNotFoundError: no folder, or no file in it.
    """
    if data_dir is None:
        raise ValueError(
            f"The local task of `{benchmark}` must be told its folder, got no `data_dir`: "
            """`--metadata '{"data_dir": "path/to/eval"}'`, or `metadata={"data_dir": ...}` in Python."""
        )
    data_dir = expand_path(data_dir)
    folder = data_dir / benchmark
    there = {_split_of(path): path for path in sorted(folder.glob("*")) if path.name.endswith(_SUFFIXES)}
    if not there:
        known = sorted(path.name for path in data_dir.glob("*") if path.name in BENCHMARKS)
        raise FileNotFoundError(
            f"`data_dir` must have {benchmark}/<split>.jsonl, but {folder} has no such file. Benchmarks found in "
            f"{data_dir}: {known or 'none'}."
        )
    evaluated = _find(there, (split,) if split else _EVALUATED)
    if evaluated is None:
        asked = f"`split` {split!r}" if split else "a split to evaluate on (test or validation)"
        raise ValueError(
            f"{folder} must have {asked}; it has {sorted(there)}. Name one of these with `split` in the metadata."
        )
    files = {"test": there[evaluated]}
    others = {name: path for name, path in there.items() if name != evaluated}
    for role, names in (("train", ("train",)), ("validation", _EVALUATED[1:])):
        name = _find(others, names)
        if name is not None:
            files[role] = others[name]
    return Splits({role: functools.partial(_read, path, benchmark) for role, path in files.items()})


def read_rows(path: Path, benchmark: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, checked.

    Args:
        path: JSON lines, gzipped where its name ends in .gz.
        benchmark: a key of `BENCHMARKS`.

    Yields:
        Each row.

    Raises:
        ValueError: a line is no JSON object in UTF-8, lacks a column or has a value that cannot be scored; names the
            line. Or the file has no row.
    """
    columns = required_columns(benchmark)
    number = 0
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        row = _parsed(line, where)
        if not isinstance(row, dict) or (missing := [name for name in columns if name not in row]):
            has = sorted(row) if isinstance(row, dict) else type(row).__name__
            wanted = missing if isinstance(row, dict) else list(columns)
            raise ValueError(f"{where} must have {wanted} for the benchmark `{benchmark}`, it has {has}.")
        yield _checked(row, columns, where, benchmark)
    if not number:
        raise ValueError(f"{path} must have at least one row, it is empty.")


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, gzipped where its name ends in .gz."""
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as file:
        try:
            yield from file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} must be a whole gzip file, and is damaged ({error}). Copy it again.") from error


def _parsed(line: bytes, where: str) -> Any:
    """What a line holds, or an error that says which line does not hold JSON."""
    if not line.strip():
        raise ValueError(f"{where} must be a JSON object, got a blank line. Delete it.")
    if line.startswith(codecs.BOM_UTF8):
        raise ValueError(f"{where} must be a JSON object, got a byte order mark. Save the file as UTF-8 without it.")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} must be text in UTF-8, got {line[:60]!r} ({error}). Convert the file.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} must be a JSON object, got {line[:60].decode('utf-8', 'replace')!r} ({error})."
        ) from error


def _read(path: Path, benchmark: str) -> Any:
    import datasets

    return datasets.Dataset.from_list([document(benchmark, row) for row in read_rows(path, benchmark)])


def _checked(row: Mapping[str, Any], columns: Any, where: str, benchmark: str) -> Mapping[str, Any]:
    """The row, or an error where a value cannot be scored."""
    for name in columns:
        value = row[name]
        if name == "choices":
            ok = isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) and v.strip() for v in value)
            what = "a list of two or more texts"
        elif name == "label":
            ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(row["choices"])
            what = f"the position of the right choice, 0 to {len(row['choices']) - 1}"
        elif name == "question" and benchmark == "winogrande":
            ok = isinstance(value, str) and value.count("_") == 1 and bool(value.partition("_")[2].strip())
            what = "a text with one blank `_`, and text after it, which is what is scored"
        elif name == "target":
            ok, what = isinstance(value, str) and bool(value.strip()), "a text"
        else:
            ok, what = isinstance(value, str), "a text"
        if not ok:
            raise ValueError(f"{where}: `{name}` must be {what}, got {value!r}.")
    return row


def _split_of(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _find(there: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first split called one of the names, or beginning with one and an underscore."""
    for name in names:
        for split in there:
            if split == name or split.startswith(f"{name}_"):
                return split
    return None
