"""One JSON Lines file: its scored field in batches, and the same file with fewer lines or with one more field.

Where it is used: by `work`, for parts that are JSON Lines. Kept lines are the same byte for byte. Arrow reads the
scored field alone, and passes over the others. Where a block cannot be read, it is read in halves, down to the lines
that are at fault. Trade-off: a line is judged in the same way alone and among others, so that which lines count does
not depend on where a block ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mates_hf.data.column_types import is_list, is_null, names_beside
from mates_hf.data.raw_texts import RawTexts
from mates_hf.data.scored_column import Conversations, ScoredColumn, Texts
from mates_hf.prediction.score import INFLUENCE_COLUMN
from mates_hf.selection.files.ahead import read_ahead
from mates_hf.selection.files.allow import AllowedRows, lines_among
from mates_hf.selection.files.lines import Lines, packed_file, read_lines
from mates_hf.selection.files.parquet_files import Kept
from mates_hf.selection.files.plan import Part

_PEEKED_BYTES, _PEEKED_LINES = 2**20, 1000
_THREAD_BYTES = 2**20  # that one thread reads at once


class BadLine(NamedTuple):
    """A line that cannot be read.

    Attributes:
        number: Which of the file's lines that are not blank it is, from 0.
        why: What is wrong with it.
    """

    number: int
    why: str


class Block(NamedTuple):
    """Some rows.

    Attributes:
        rows: `pyarrow.Table` of the scored columns, or, of conversations, lists of plain values by column.
        num_rows: How many.
        bad: Lines among them that cannot be read, and are no rows.
        num_passed_over: Lines between them that may not be used.
    """

    rows: Any
    num_rows: int
    bad: list[BadLine]
    num_passed_over: int = 0


def schema_of(part: Part) -> Any:
    """`pyarrow.Schema` of what the first lines hold; null where they do not say, or not one thing."""
    import pyarrow as pa

    values: dict[str, list[Any]] = {}
    lines = next(read_lines(part, _PEEKED_BYTES), None)
    for number in range(min(_PEEKED_LINES, 0 if lines is None else len(lines))):
        assert lines is not None
        try:
            row = json.loads(lines.line(number))
        except ValueError:
            continue
        if isinstance(row, dict):
            for name, value in row.items():
                values.setdefault(name, []).append(value)
    return pa.schema([(name, _type_of(found)) for name, found in values.items()])


def _type_of(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.null()


def blocks(
    part: Part, column: ScoredColumn, schema: Any, threads: bool, allowed: AllowedRows | None = None
) -> Iterator[Block]:
    """The scored column, a block at a time.

    Args:
        part: The file.
        column: The scored column.
        schema: What `schema_of` found.
        threads: Whether a block may be read by several threads.
        allowed: Says which lines may be used; None: all. The others are passed over.

    Yields:
        Blocks of some megabytes.
    """
    first = 0
    wanted = None if isinstance(column, Conversations) else _wanted(column, schema)
    for lines in read_lines(part):
        mask, unread = (np.ones(len(lines), np.bool_), {}) if allowed is None else allowed.of_lines(lines)
        rest = lines_among(lines, mask)
        block = _read_conversations(rest, column.path) if wanted is None else _read_block(rest, wanted, threads)
        numbers = first + np.flatnonzero(mask)
        bad = [BadLine(int(numbers[one.number]), one.why) for one in block.bad]
        bad += [BadLine(first + number, why) for number, why in unread.items()]
        yield Block(block.rows, block.num_rows, sorted(bad), len(lines) - len(rest) - len(unread))
        first += len(lines)


def _wanted(column: ScoredColumn, schema: Any) -> Any:
    """`pyarrow.Schema` of what is read: the column alone, inside of its structs, and what counts beside it."""
    import pyarrow as pa

    kind = schema.field(column.path[0]).type
    for name in column.path[1:]:
        kind = kind.field(name).type
    kind = pa.string() if isinstance(column, (RawTexts, Texts)) else _list_type(kind)
    for name in reversed(column.path[1:]):
        kind = pa.struct([(name, kind)])
    beside = [pa.field(name, _list_type(schema.field(name).type)) for name in names_beside(schema.names, column.name)]
    return pa.schema([pa.field(column.path[0], kind), *beside])


def _list_type(kind: Any) -> Any:
    """The type of a column of lists, where the first lines have none, or none that holds a value."""
    import pyarrow as pa

    nothing = is_null(kind) or (is_list(kind) and is_null(kind.value_type))
    return pa.list_(pa.int64()) if nothing else kind


def _read_block(lines: Lines, wanted: Any, threads: bool) -> Block:
    import pyarrow as pa

    found: list[Any] = []
    bad: list[BadLine] = []
    todo = [(0, len(lines))] if len(lines) else []
    while todo:
        begin, end = todo.pop()
        table = _parse(lines, begin, end, wanted, threads)
        if not isinstance(table, str):
            found.append(table)
        elif end - begin == 1:
            bad.append(BadLine(begin, table))
        else:
            middle = (begin + end) // 2
            todo += [(middle, end), (begin, middle)]
    table = pa.concat_tables([wanted.empty_table(), *found])
    return Block(table, table.num_rows, bad)


def _parse(lines: Lines, begin: int, end: int, wanted: Any, threads: bool) -> Any:
    """The table of some lines, one row each; what is wrong with them where they are not."""
    import pyarrow as pa
    import pyarrow.json as pj

    content = pa.py_buffer(lines.content)[lines.starts[begin] : lines.nexts[end - 1]]
    if not _all_objects(lines, begin, end):
        return "it must be one JSON object"
    if not _is_utf8(content):
        return "it must be UTF-8"
    parse = pj.ParseOptions(explicit_schema=wanted, unexpected_field_behavior="ignore")
    sizes = [_THREAD_BYTES, content.size + 1] if threads and content.size > _THREAD_BYTES else [content.size + 1]
    why = ""
    for size in sizes:  # a line that is longer than a thread's share needs the whole
        read = pj.ReadOptions(use_threads=threads, block_size=size)
        try:
            table = pj.read_json(pa.BufferReader(content), read_options=read, parse_options=parse)
        except (pa.ArrowException, ValueError) as error:
            why = str(error).removeprefix("JSON parse error: ").rpartition(" in row ")[0] or str(error)
            continue
        if table.num_rows == end - begin:
            return table
        why = "it must be one JSON object"
    return why


def _all_objects(lines: Lines, begin: int, end: int) -> bool:
    """True where every line begins as an object and ends as one, as far as one byte tells."""
    signs = np.frombuffer(lines.content, np.uint8)
    whole = (signs[lines.starts[begin:end]] == ord("{")) & (signs[lines.ends[begin:end] - 1] == ord("}"))
    for number in np.flatnonzero(~whole) + begin:
        line = lines.line(int(number)).strip()
        if not (line.startswith(b"{") and line.endswith(b"}")):
            return False
    return True


def _is_utf8(content: Any) -> bool:
    import pyarrow as pa

    offsets = pa.py_buffer(np.array([0, content.size], np.int64))
    try:
        pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, content]).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _read_conversations(lines: Lines, path: Sequence[str]) -> Block:
    """Conversations as plain values: their messages may have other fields than those before."""
    values: list[Any] = []
    bad: list[BadLine] = []
    for number in range(len(lines)):
        try:
            row = json.loads(lines.line(number))
        except ValueError as error:
            bad.append(BadLine(number, f"it must be one JSON object ({error})"))
            continue
        for name in path:
            if row is not None and not isinstance(row, Mapping):
                bad.append(BadLine(number, f"`{name}` must be in an object"))
                break
            row = None if row is None else row.get(name)
        else:
            values.append(row)
    for name in reversed(path[1:]):
        values = [{name: value} for value in values]
    return Block({path[0]: values}, len(values), bad)


# --- writing ---


def write_rows(
    part: Part, local: Path, kept: Kept, *, bad: Sequence[int], add_scores: bool, allowed: AllowedRows | None = None
) -> None:
    """Write the lines that are kept, or all of them with their influence.

    Args:
        part: The file that is read.
        local: Where to.
        kept: What is known of the next rows.
        bad: Numbers of the lines that cannot be read; they are not written.
        add_scores: Whether all rows are written, with a field `influence`; one of that name is replaced.
        allowed: Says which lines may be used; None: all. The others are not written.
    """
    first = 0
    all_bad = np.array(sorted(bad), np.int64)
    with packed_file(local, part.packed) as file:
        for lines in read_ahead(read_lines(part), part.size):
            here = slice(*np.searchsorted(all_bad, [first, first + len(lines)]).tolist())
            numbers = np.delete(np.arange(len(lines)), all_bad[here] - first)
            first += len(lines)
            if allowed is not None:
                numbers = numbers[allowed.of_lines(lines)[0][numbers]]
            scores, mask = kept(len(numbers))
            if add_scores:
                values = [str(value) for value in scores.influence]
                file.write(b"".join(map(_with_influence, _whole(lines, numbers), values)))
            else:
                file.write(b"".join(_whole(lines, numbers[mask])))


def _whole(lines: Lines, numbers: Any) -> Iterator[bytes]:
    """Some lines with their ends."""
    content = lines.content
    for start, stop in zip(lines.starts[numbers].tolist(), lines.nexts[numbers].tolist(), strict=True):
        yield content[start:stop]


def _with_influence(line: bytes, value: str) -> bytes:
    """A line with one more field; the rest of it stays as it was written."""
    body = line.rstrip()
    ending = line[len(body) :]
    if f'"{INFLUENCE_COLUMN}"'.encode() in body:
        row = json.loads(body)
        if row.pop(INFLUENCE_COLUMN, None) is not None:
            body = json.dumps(row, ensure_ascii=False).encode()
    inside = body[:-1].rstrip()
    comma = b"" if inside.strip() == b"{" else b", "
    return inside + comma + f'"{INFLUENCE_COLUMN}": {value}}}'.encode() + ending
