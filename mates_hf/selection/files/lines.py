"""Lines of a JSON Lines file, in blocks of bytes: where each begins and ends, packed or not.

Where it is used: `json_files` reads a file twice by it, and counts the same lines both times. A line of white space
alone is none. Trade-off: a line must fit into memory; one of half a gigabyte is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mates_hf.data.listing import is_local, located
from mates_hf.records import IntArray
from mates_hf.selection.files.plan import Part

BLOCK_BYTES = 8 * 2**20
_LONGEST = 2**29
_GZIP_LEVEL = 6  # what `gzip` takes where nothing is said
_NEWLINE, _RETURN = 10, 13
_WHITE = b" \t\r\n"


@dataclasses.dataclass(frozen=True)
class Lines:
    """Some whole lines.

    Attributes:
        content: The bytes.
        starts: (N,) first byte of each line that is not blank.
        ends: (N,) byte after its last; the line's end is not in it.
        nexts: (N,) byte after its line's end.
    """

    content: bytes
    starts: IntArray
    ends: IntArray
    nexts: IntArray

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, number: int) -> bytes:
        """A line without its end."""
        return self.content[self.starts[number] : self.ends[number]]


def read_lines(part: Part, block_bytes: int = BLOCK_BYTES) -> Iterator[Lines]:
    """The lines of a file, some megabytes at a time.

    Args:
        part: The file.
        block_bytes: Bytes that are read at once.

    Yields:
        Lines.

    Raises:
        ValueError: a line is too long.
        OSError: the file cannot be read, or ends in the middle of what it is packed in.
    """
    with _unpacked(part) as stream:
        rest = b""
        while block := stream.read(block_bytes):
            cut = block.rfind(b"\n") + 1
            if cut:
                yield lines_of(rest + block[:cut])
                rest = block[cut:]
            else:
                rest += block
                if len(rest) > _LONGEST:
                    raise ValueError(f"A line must be shorter than {_LONGEST:,} bytes, and one is longer.")
        if rest:
            yield lines_of(rest)


def lines_of(content: bytes) -> Lines:
    """Where the lines of some bytes are."""
    signs = np.frombuffer(content, np.uint8)
    nexts = np.flatnonzero(signs == _NEWLINE) + 1
    if len(signs) and signs[-1] != _NEWLINE:
        nexts = np.append(nexts, len(signs))
    starts = np.concatenate([np.zeros(min(1, len(nexts)), np.int64), nexts[:-1]])
    ends = nexts - (signs[nexts - 1] == _NEWLINE)
    ends = ends - ((ends > starts) & (signs[np.maximum(ends - 1, 0)] == _RETURN))
    blank = ends == starts
    for number in np.flatnonzero(np.isin(signs[np.minimum(starts, max(len(signs) - 1, 0))], list(_WHITE)) & ~blank):
        blank[number] = not content[starts[number] : ends[number]].strip()
    return Lines(content, starts[~blank], ends[~blank], nexts[~blank])


def value_at(line: bytes, column: str) -> Any:
    """What a line has at a column.

    Args:
        line: The line.
        column: Name of the column, with dots for a nested one.

    Returns:
        The value; None where it has none.

    Raises:
        ValueError: the line is no JSON.
    """
    return _at(json.loads(line), column)


def _at(row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        return None
    if column in row:
        return row[column]
    for end in (i for i, char in enumerate(column) if char == "."):
        if isinstance(row.get(column[:end]), dict):
            return _at(row[column[:end]], column[end + 1 :])
    return None


@contextlib.contextmanager
def _unpacked(part: Part) -> Iterator[Any]:
    """A stream of the file's bytes, unpacked."""
    import pyarrow as pa

    fs, path = located(part.url)
    with contextlib.ExitStack() as stack:
        if is_local(fs):
            source = stack.enter_context(pa.OSFile(path, "rb"))
        else:
            source = stack.enter_context(pa.PythonFile(stack.enter_context(fs.open(path, "rb")), mode="r"))
        if part.packed is not None and part.size:
            source = stack.enter_context(pa.CompressedInputStream(source, part.packed))
        yield source


@contextlib.contextmanager
def packed_file(local: Path, packed: str | None) -> Iterator[BinaryIO]:
    """A file to write to, packed as is asked for; the same content gives the same bytes.

    Args:
        local: Where to.
        packed: `"gzip"`, `"zstd"` or None.

    Yields:
        What has a method `write`.
    """
    import pyarrow as pa

    if packed == "gzip":
        with open(local, "wb") as raw, gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as file:
            yield file  # type: ignore[misc]
    elif packed:
        with pa.CompressedOutputStream(str(local), packed) as file:
            yield file
    else:
        with open(local, "wb") as file:
            yield file
