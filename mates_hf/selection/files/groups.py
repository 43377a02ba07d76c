"""Which group each row of a bundle is of, by a column of its files, and the scores of rows with their groups.

Where it is used: after all is scored, where a `group_column` is given. Trade-off: the column is read in a pass of its
own, so that scores stay what they are and another column needs no second scoring. Of Parquet it is one column; JSON
Lines files are read once more. What is left of it are 4 bytes a row in the output folder, and the names.

Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.column_types import field_path
from mates_hf.data.groups import GroupNumbers, require_few, shares_of
from mates_hf.data.listing import PARQUET, located
from mates_hf.data.scored_column import column_at
from mates_hf.errors import MatesError
from mates_hf.prediction.threads import at_most_threads
from mates_hf.selection.cut import Cut
from mates_hf.selection.files import parquet_files
from mates_hf.selection.files.ahead import read_ahead
from mates_hf.selection.files.folder import Folder, read_object, write_object
from mates_hf.selection.files.lines import read_lines, value_at
from mates_hf.selection.files.plan import Bundle, Part
from mates_hf.selection.files.work import FileError, PartFacts, Work, check_same, named, parts_in, schema_of
from mates_hf.selection.prefix import PieceScores
from mates_hf.selection.quota_cut import GroupedPieces, GroupedScores, QuotaCut
from mates_hf.selection.score_file import GROUP_ROWS, open_scores, read_facts, written_whole_at

Codes = npt.NDArray[np.int32]


def require_column(part: Part, schema: Any, column: str) -> tuple[str, ...]:
    """Names from the row down to the column of groups.

    Args:
        part: The file.
        schema: Its `pyarrow.Schema`, of JSON Lines as the first rows have it.
        column: Name of the column, with dots for a nested one.

    Returns:
        The names.

    Raises:
        ValueError: the file has no such column.
    """
    path = field_path(schema, column)
    if path is None:
        raise ValueError(
            f"`group_column` must be a column of the files, got {column!r}, and `{part.url}` has the columns "
            f"{list(schema.names)}. Name the one that says which group a row is of."
        )
    return path


def group_bundle(work: Work, bundle: Bundle, column: str) -> dict[str, Any]:
    """Leave the groups of a bundle's rows in the output folder.

    Args:
        work: What the bundle was scored with.
        bundle: The parts.
        column: Column that says the groups.

    Returns:
        What was recorded: the identity of what was read, and the names of its groups.

    Raises:
        FileError: a file has no such column, another number of rows than were scored, or changed meanwhile.
    """
    numbers = GroupNumbers(column)
    codes = _codes(work, bundle, numbers, column)
    place = Folder(work.out).groups(bundle, column)
    with at_most_threads(work.threads):
        _write(f"{place}.parquet", codes)
    facts = {"source": bundle.source, "column": column, "names": list(numbers.names)}
    write_object(f"{place}.json", facts)
    return facts


def found_groups(work: Work, bundle: Bundle, column: str) -> dict[str, Any] | None:
    """What an earlier call recorded of a bundle's groups; None where it did not get so far."""
    place = Folder(work.out).groups(bundle, column)
    try:
        facts = read_object(f"{place}.json")
        if facts is None or facts.get("source") != bundle.source:
            return None
        num = sum(len(read()) for read in _open(f"{place}.parquet"))
    except (MatesError, OSError, ValueError):  # damaged, or not there
        return None
    return facts if num == read_facts(Folder(work.out).scores(bundle))["num_rows"] else None


def _codes(work: Work, bundle: Bundle, numbers: GroupNumbers, column: str) -> Iterator[Codes]:
    known = parts_in(read_facts(Folder(work.out).scores(bundle)))
    for part, found in zip(bundle.parts, known, strict=True):
        if found.dropped is not None:
            continue
        check_same(part)
        num = 0
        try:
            for codes in _part_codes(work, part, found, numbers, column):
                num += len(codes)
                yield codes
        except ValueError as error:
            raise FileError(str(error) if part.url in str(error) else named(part, error)) from error
        check_same(part)
        if num != found.rows:
            raise FileError(f"`{part.url}` must have the {found.rows} rows that were scored, and has {num}.")


def _part_codes(work: Work, part: Part, found: PartFacts, numbers: GroupNumbers, column: str) -> Iterator[Codes]:
    if part.kind == PARQUET:
        schema = schema_of(part)
        path = require_column(part, schema, column)
        beside = [] if work.allowed is None else work.allowed.require_columns(part, schema)
        names = list(dict.fromkeys(".".join(one) for one in (path, *beside)))
        for table in read_ahead(parquet_files.tables(part, names, work.many_threads), part.size):
            if work.allowed is not None:
                table = table.filter(work.allowed.of_table(table, beside))
            yield numbers.of_arrow(column_at(table, path))
        return
    first, bad = 0, np.array(sorted(found.bad), np.int64)
    for lines in read_ahead(read_lines(part), part.size):
        here = bad[slice(*np.searchsorted(bad, [first, first + len(lines)]).tolist())] - first
        rows = np.delete(np.arange(len(lines)), here)
        if work.allowed is not None:
            rows = rows[work.allowed.of_lines(lines)[0][rows]]
        values = [_value(lines.line(i), column, first + i) for i in rows.tolist()]
        first += len(lines)
        yield numbers.of_values(values)


def _value(line: bytes, column: str, number: int) -> Any:
    """What a line has at a column; None where it has none."""
    try:
        return value_at(line, column)
    except ValueError as error:
        raise ValueError(f"line {number + 1} cannot be read: it must be one JSON object ({error})") from error


def _write(url: str, parts: Iterator[Codes]) -> None:
    """Write all codes, as many in a row group as there are rows in a piece of scores."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("code", pa.int32())])
    held: list[Codes] = []
    with written_whole_at(url) as local, pq.ParquetWriter(local, schema, compression="zstd") as writer:
        for codes in parts:
            held.append(codes)
            while sum(map(len, held)) >= GROUP_ROWS:
                whole = np.concatenate(held)
                writer.write_table(pa.table([whole[:GROUP_ROWS]], schema=schema), row_group_size=GROUP_ROWS)
                held = [whole[GROUP_ROWS:]]
        if sum(map(len, held)):
            writer.write_table(pa.table([np.concatenate(held)], schema=schema), row_group_size=GROUP_ROWS)


def _open(url: str) -> list[Callable[[], Codes]]:
    """What reads each row group."""
    import pyarrow.parquet as pq

    fs, path = located(url)
    with fs.open(path, "rb") as file:
        num = pq.ParquetFile(file).num_row_groups

    def read(number: int) -> Codes:
        with fs.open(path, "rb") as file:
            codes: Codes = pq.ParquetFile(file).read_row_group(number).column("code").to_numpy()
            return codes

    return [functools.partial(read, number) for number in range(num)]


@dataclasses.dataclass(frozen=True)
class BundleGroups:
    """Where the groups of a bundle's rows are.

    Attributes:
        place: As `Folder.groups` says.
        renumbered: (g,) number among all groups of each of the bundle's own.
    """

    place: str
    renumbered: Codes

    def open(self, scores_url: str) -> list[Callable[[], GroupedScores]]:
        """What reads the scores of the bundle with the groups of its rows, piece by piece, as `open_scores` does."""
        both = zip(open_scores(scores_url), _open(f"{self.place}.parquet"), strict=True)
        return [functools.partial(self._read, scores, codes) for scores, codes in both]

    def _read(self, scores: Callable[[], PieceScores], codes: Callable[[], Codes]) -> GroupedScores:
        return GroupedScores(scores(), self.renumbered[codes()])


@dataclasses.dataclass(frozen=True)
class AllGroups:
    """The groups of all rows.

    Attributes:
        names: Their names, sorted.
        bundles: Where they are, of each bundle.
    """

    names: tuple[str, ...]
    bundles: tuple[BundleGroups, ...]

    @classmethod
    def of(cls, folder: Folder, bundles: Sequence[Bundle], facts: Sequence[dict[str, Any]], column: str) -> AllGroups:
        """The groups of all bundles, numbered alike.

        Args:
            folder: The output folder.
            bundles: The bundles.
            facts: What `group_bundle` recorded of each.
            column: Column that says the groups.

        Returns:
            The groups.

        Raises:
            ValueError: there are too many.
        """
        names = sorted({name for one in facts for name in one["names"]})
        require_few(len(names), column)
        number = {name: code for code, name in enumerate(names)}
        own = [np.array([number[name] for name in one["names"]], np.int32) for one in facts]
        places = [folder.groups(bundle, column) for bundle in bundles]
        return cls(tuple(names), tuple(map(BundleGroups, places, own)))

    def shares(self, pieces: GroupedPieces, cut: Cut | QuotaCut) -> dict[str, dict[str, float]]:
        """What each group is of all rows and of those that are kept, as `shares_of` says.

        Args:
            pieces: What reads the scores and groups of all pieces.
            cut: Which rows are kept.

        Returns:
            By name of the group.
        """
        every, kept = np.zeros((2, len(self.names)), np.int64)
        for number, read in enumerate(pieces):
            grouped = read()
            mask = cut.mask(number, grouped) if isinstance(cut, QuotaCut) else cut.mask(number, grouped.scores)
            every += np.bincount(grouped.codes, minlength=len(every))
            kept += np.bincount(grouped.codes[mask], minlength=len(kept))
        return shares_of(self.names, every, kept)
