"""What is done with a bundle: its parts are scored, and later those of their rows that are kept are written.

Where it is used: in each worker process, or in the one that there is. Trade-off: a part is read twice, so that nothing
but 16 bytes a row has to be kept until it is known which rows stay.

Where something is wrong with a file, it is an error that names the file and the line, or, with `skip`, it is counted
and left out: a line that is no JSON object alone, anything else with its whole file. Sign: influence > 0 helps.
Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mates_hf.data.listing import located
from mates_hf.data.raw_texts import RawTexts
from mates_hf.data.scored_column import Conversations, ScoredColumn, Texts
from mates_hf.errors import InfluenceError, MatesError
from mates_hf.prediction.score import Scorer
from mates_hf.prediction.threads import at_most_threads
from mates_hf.selection.cut import Cut
from mates_hf.selection.files import json_files, parquet_files
from mates_hf.selection.files.ahead import read_ahead
from mates_hf.selection.files.allow import AllowedRows
from mates_hf.selection.files.folder import Folder, read_object, write_object
from mates_hf.selection.files.plan import Bundle, Part
from mates_hf.selection.inputs import Fitted
from mates_hf.selection.prefix import Mask, PieceScores
from mates_hf.selection.quota_cut import GroupedScores, QuotaCut
from mates_hf.selection.score_file import (
    content_hashes,
    flush_files,
    joined_scores,
    read_facts,
    rows_between,
    write_scores,
    written_whole_at,
)

_TOKENISED_BYTES, _TOKENISED_ROWS = 2**22, 1000  # of texts whose tokens are in memory at once
_MOST_BAD = 100_000  # lines of a file that cannot be read; with more, it is the file
_MOST_SAID = 20  # lines of a file whose fault is recorded

OwnPieces = Sequence[Callable[[], "PieceScores | GroupedScores"]]  # of one bundle


class FileError(MatesError):
    """A file that cannot be scored or written as it is; names it."""


@dataclasses.dataclass
class PartFacts:
    """What came of scoring a part.

    Attributes:
        rows: Rows that were scored.
        tokens: Trained tokens of them.
        content_bytes: Bytes of the scored column, unpacked.
        bad: Numbers of the lines that cannot be read, of those that are not blank, from 0.
        said: What is wrong with the first of them.
        dropped: Why the whole part is left out; None where it is not.
        not_allowed: Rows that may not be used, and were not scored.
    """

    rows: int = 0
    tokens: int = 0
    content_bytes: int = 0
    bad: list[int] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)
    dropped: str | None = None
    not_allowed: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """What every bundle is scored with and written by; all that a worker process needs.

    Attributes:
        fitted: The model and tokenizer, in the form that decides on a column.
        column: The scored column, as its name was given; None finds it.
        scored: What the scored column holds and its name, the same in every part.
        digest: Digest of the scorer.
        out: The output folder.
        skip: Whether what is wrong with a file is counted and left out.
        threads: Threads of a process; None is one a core.
        allowed: Says which rows may be used; None: all.
    """

    fitted: Fitted
    column: str | None
    scored: tuple[str, str]
    digest: str
    out: str
    skip: bool
    threads: int | None = None
    allowed: AllowedRows | None = None

    @property
    def many_threads(self) -> bool:
        """Whether more than one thread may be used."""
        return self.threads != 1


def schema_of(part: Part) -> Any:
    """`pyarrow.Schema` of a part."""
    return (parquet_files if part.kind == "parquet" else json_files).schema_of(part)


# --- scores ---


def score_bundle(work: Work, bundle: Bundle) -> dict[str, Any]:
    """Score the parts of a bundle and leave their scores in the output folder.

    Args:
        work: What to score with.
        bundle: The parts.

    Returns:
        What was recorded with the scores.

    Raises:
        FileError: a file cannot be read, or changed meanwhile.
    """
    dropped: dict[str, str] = {}
    with at_most_threads(work.threads):
        while True:
            facts: dict[str, Any] = {"selector": work.digest, "source": bundle.source}
            try:
                return write_scores(Folder(work.out).scores(bundle), _scores(work, bundle, dropped, facts), facts)
            except _PartError as error:  # some of its rows may be written already: begin again without it
                if not work.skip:
                    raise FileError(f"{error} {_SKIP}") from error
                dropped[error.name] = str(error)


class _PartError(Exception):
    """What is wrong with a part."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def _scores(work: Work, bundle: Bundle, dropped: dict[str, str], facts: dict[str, Any]) -> Iterator[PieceScores]:
    """The scores of a bundle's parts, one part after the other; `facts` says at the end what came of each."""
    found = {part.name: PartFacts(dropped=dropped.get(part.name)) for part in bundle.parts}
    for part in bundle.parts:
        if part.name not in dropped:
            check_same(part)
            try:
                yield from _part_scores(work, part, found[part.name])
            except InfluenceError as error:  # the model's fault, which no file is left out for
                raise FileError(named(part, error)) from error
            except Exception as error:
                if not is_of_content(error):
                    raise
                raise _PartError(part.name, named(part, error)) from error
            check_same(part)
    facts["parts"] = json.dumps([dataclasses.asdict(one) for one in found.values()])


def _part_scores(work: Work, part: Part, facts: PartFacts) -> Iterator[PieceScores]:
    schema = schema_of(part)
    if not schema.names:  # a file of no line says nothing of its columns
        return
    scorer = work.fitted.scorer(schema, work.column)
    if what_is(scorer.column) != work.scored:
        (kind, name), (wanted_kind, wanted) = what_is(scorer.column), work.scored
        raise ValueError(
            f"all files must hold {wanted_kind} in `{wanted}`, as the first one does, and this one has {kind} in "
            f"`{name}`; score it apart"
        )
    for rows, num_rows in read_ahead(_rows(work, part, scorer.column, schema, facts), part.size):
        scored = scorer.predict_batch(rows) if isinstance(rows, dict) else _predict(scorer, rows, facts.rows)
        facts.rows += num_rows
        facts.tokens += int(scored.num_targets.sum(dtype=np.int64))
        yield PieceScores(scored.influence, scored.num_targets, content_hashes(scorer.column, rows))


def _predict(scorer: Scorer, table: Any, first_row: int) -> Any:
    return scorer.predict_rows(scorer.column.open_table(table, first_row), 0, table.num_rows)


def _rows(work: Work, part: Part, column: ScoredColumn, schema: Any, facts: PartFacts) -> Iterator[tuple[Any, int]]:
    """The scored rows of a part, as much at once as may be in memory, and how many."""
    if part.kind == "parquet":
        names = column.names_among(schema.names)
        names = [".".join(column.path) if name == column.path[0] else name for name in names]
        beside = [] if work.allowed is None else work.allowed.require_columns(part, schema)
        every = list(dict.fromkeys([*names, *map(".".join, beside)]))
        for table in parquet_files.tables(part, every, work.many_threads):
            if work.allowed is not None:
                table, num_before = table.filter(work.allowed.of_table(table, beside)), table.num_rows
                facts.not_allowed += num_before - table.num_rows
                kept = {column.path[0], *names}
                table = table.drop_columns([name for name in table.column_names if name not in kept])
            facts.content_bytes += table.nbytes
            yield from _cut(table, column)
        return
    for block in json_files.blocks(part, column, schema, work.many_threads, work.allowed):
        facts.not_allowed += block.num_passed_over
        _note(part, facts, block.bad, work.skip)
        if isinstance(block.rows, dict):
            facts.content_bytes += sum(map(len, map(str, block.rows[column.path[0]])))
            yield from _cut_lists(block.rows, block.num_rows)
        else:
            facts.content_bytes += block.rows.nbytes
            yield from _cut(block.rows, column)


def _cut(table: Any, column: ScoredColumn) -> Iterator[tuple[Any, int]]:
    """A table in so many rows that their tokens may be in memory at once, where they are yet to be made."""
    rows = max(1, table.num_rows)
    if isinstance(column, Texts):
        rows = max(1, min(_TOKENISED_ROWS, rows * _TOKENISED_BYTES // max(table.nbytes, 1)))
    for begin in range(0, table.num_rows, rows):
        part = table.slice(begin, rows)
        yield part, part.num_rows


def _cut_lists(rows: dict[str, list[Any]], num_rows: int) -> Iterator[tuple[Any, int]]:
    for begin in range(0, num_rows, _TOKENISED_ROWS):
        end = min(begin + _TOKENISED_ROWS, num_rows)
        yield {name: values[begin:end] for name, values in rows.items()}, end - begin


def _note(part: Part, facts: PartFacts, bad: list[json_files.BadLine], skip: bool) -> None:
    """Record lines that cannot be read; the first one is an error where nothing is skipped."""
    if bad and not skip:
        raise ValueError(f"line {bad[0].number + 1} cannot be read: {bad[0].why}")
    facts.bad += [line.number for line in bad]
    facts.said += [f"line {line.number + 1}: {line.why}" for line in bad[: _MOST_SAID - len(facts.said)]]
    if len(facts.bad) > _MOST_BAD:
        raise ValueError(f"more than {_MOST_BAD:,} lines cannot be read: {facts.said[0]}")


def parts_in(facts: Mapping[str, Any]) -> list[PartFacts]:
    """What is recorded of each part with the scores of a bundle."""
    return [PartFacts(**one) for one in json.loads(str(facts["parts"]))]


_SKIP = "Mend the file, or leave out what cannot be read: `on_error='skip'`, `--on-error skip`."


def what_is(column: ScoredColumn) -> tuple[str, str]:
    """What a column holds and its name, by which columns of several files are compared."""
    kind = "conversations" if isinstance(column, Conversations) else "tokens"
    return "texts" if type(column) in (Texts, RawTexts) else kind, column.name


def is_of_content(error: Exception) -> bool:
    """True where what a file holds is at fault, and not the disk, the network or this program."""
    import pyarrow as pa

    if isinstance(error, OSError):
        return type(error) is OSError and error.errno is None  # as pyarrow says that something is damaged
    return isinstance(error, (pa.ArrowException, ValueError, TypeError, EOFError, MatesError))


def check_same(part: Part) -> None:
    """Raise where a file is no longer what it was when the inputs were listed.

    Args:
        part: The part.

    Raises:
        FileError: it was changed.
    """
    if part.now() != part:
        raise FileError(
            f"Inputs must stay as they are until all is written, and `{part.url}` was changed meanwhile. Score into "
            "a new folder."
        )


def named(part: Part, error: Exception) -> str:
    """What is wrong with a part, in one line."""
    return f"`{part.url}`: {' '.join(str(error).split()).rstrip('.')}."


# --- what is kept ---


def write_bundle(
    work: Work, bundle: Bundle, pieces: OwnPieces, cut: Cut | QuotaCut | None, first_piece: int, key: str
) -> dict[str, Any]:
    """Write what is kept of a bundle's parts, and the mark that says so.

    Args:
        work: What it was scored with.
        bundle: The parts.
        pieces: What reads the scores of its rows, with their groups where the cut has bounds on these.
        cut: Which rows are kept; None writes all, with their influence.
        first_piece: Number of the bundle's first piece of scores.
        key: What the mark is for.

    Returns:
        The mark.

    Raises:
        FileError: a file changed meanwhile.
    """
    folder = Folder(work.out)
    facts = read_facts(folder.scores(bundle))
    known = parts_in(facts)
    scores = _Scores(pieces, cut, first_piece)
    written: list[dict[str, Any]] = []
    for part, found in zip(bundle.parts, known, strict=True):
        if found.dropped is None:
            before = scores.rows_kept, scores.tokens_kept
            size = _write_part(work, part, found, scores, cut is None)
            rows, tokens = scores.rows_kept - before[0], scores.tokens_kept - before[1]
            written.append({"name": part.name, "rows": rows, "tokens": tokens, "bytes": size})
    flush_files([folder.part(part) for part, found in zip(bundle.parts, known, strict=True) if found.dropped is None])
    mark = {"key": key, "parts": written}
    write_object(folder.mark(bundle), mark)
    return mark


def find_mark(work: Work, bundle: Bundle, key: str) -> dict[str, Any] | None:
    """The mark of a bundle that is written for this key and still there, or None."""
    folder = Folder(work.out)
    try:
        mark = read_object(folder.mark(bundle))
    except MatesError:
        return None
    if mark is None or mark.get("key") != key:
        return None
    names = {part.name: part for part in bundle.parts}
    for one in mark["parts"]:
        fs, path = located(folder.part(names[one["name"]]))
        if not fs.exists(path) or fs.size(path) != one["bytes"]:
            return None
    return mark


def _write_part(work: Work, part: Part, facts: PartFacts, scores: _Scores, add_scores: bool) -> int:
    """Write a part; its bytes."""
    check_same(part)
    with at_most_threads(work.threads), written_whole_at(Folder(work.out).part(part), flush=False) as local:
        end = scores.done + facts.rows
        try:
            if part.kind == "parquet":
                parquet_files.write_rows(
                    part, local, scores.take, add_scores=add_scores, threads=work.many_threads, allowed=work.allowed
                )
            else:
                json_files.write_rows(
                    part, local, scores.take, bad=facts.bad, add_scores=add_scores, allowed=work.allowed
                )
        except _TooFewError:
            scores.done = -1
        check_same(part)
        if scores.done != end:
            raise FileError(f"`{part.url}` must have the {facts.rows} rows that were scored, and has another number.")
        return local.stat().st_size


class _TooFewError(Exception):
    """There are more rows than scores."""


class _Scores:
    """The scores of a bundle's rows in their order, and which rows are kept."""

    def __init__(self, pieces: OwnPieces, cut: Cut | QuotaCut | None, first_piece: int) -> None:
        self._pieces = self._read(pieces, cut, first_piece)
        self._held, self._mask = joined_scores([]), np.zeros(0, np.bool_)
        self.done = self.rows_kept = self.tokens_kept = 0

    @staticmethod
    def _read(pieces: OwnPieces, cut: Cut | QuotaCut | None, first_piece: int) -> Iterator[tuple[PieceScores, Mask]]:
        for number, read in enumerate(pieces, first_piece):
            found: Any = read()
            scores = found.scores if isinstance(found, GroupedScores) else found
            yield scores, np.ones(len(scores.content), np.bool_) if cut is None else cut.mask(number, found)

    def take(self, num_rows: int) -> tuple[PieceScores, Mask]:
        """What is known of the next rows."""
        while len(self._mask) < num_rows:
            found = next(self._pieces, None)
            if found is None:
                raise _TooFewError
            self._held = joined_scores([self._held, found[0]])
            self._mask = np.concatenate([self._mask, found[1]])
        scores, mask = rows_between(self._held, 0, num_rows), self._mask[:num_rows]
        self._held = rows_between(self._held, num_rows, len(self._mask))
        self._mask = self._mask[num_rows:]
        self.done += num_rows
        self.rows_kept += int(np.count_nonzero(mask))
        self.tokens_kept += int(scores.num_targets[mask].sum(dtype=np.int64))
        return scores, mask
