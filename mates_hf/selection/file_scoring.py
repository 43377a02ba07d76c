"""Files in, files out: a corpus of Parquet and JSON Lines files, scored and cut to what helps most.

Where it is used: by data engineers, as a function or as `mates-hf score`. `MatesSelector.filter` does the same to a
`Dataset`. Here nobody holds more than a batch: each file is read, its scores are left in the output folder, one cut
goes through the scores of all, and each file is read again and written with the rows that are kept. Trade-off: files
are read twice, and 16 bytes a row are written in between; so a run that is killed anywhere continues, and which rows
are kept is exact over all files, however these divide them.

The room `files/` holds the parts. Sign: influence > 0 helps, higher is better.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mates_hf.data.arguments import described
from mates_hf.data.listing import is_local, located
from mates_hf.errors import MatesError
from mates_hf.selection.budget import Budget, asked_for
from mates_hf.selection.card import label_unit
from mates_hf.selection.cut import Cut, find_cut
from mates_hf.selection.files.folder import Folder, write_object
from mates_hf.selection.files.plan import Bundle, Part, bundles_of, find_parts
from mates_hf.selection.files.report import FilesReport as FilesReport
from mates_hf.selection.files.work import (
    FileError,
    PartFacts,
    Work,
    find_mark,
    is_of_content,
    named,
    schema_of,
    score_bundle,
    what_is,
    write_bundle,
)
from mates_hf.selection.files.workers import workers as started
from mates_hf.selection.inputs import Fitted
from mates_hf.selection.prefix import PieceScores
from mates_hf.selection.score_file import open_scores, remove_partial
from mates_hf.selection.selector import MatesSelector

_HELD_ROWS = 2**24  # of scores that are kept in memory while the cut is found; with more they are read each time
_MOST_ERRORS = 1000  # that a report lists


def score_files(
    selector: MatesSelector,
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    ratio: float | None = None,
    k: int | None = None,
    threshold: float | None = None,
    num_tokens: int | None = None,
    add_scores: bool = False,
    random_share: float = 0.0,
    temperature: float = 0.0,
    seed: int = 0,
    column: str | None = None,
    workers: int = 1,
    on_error: str = "stop",
) -> FilesReport:
    """Score files and write the rows that help most, or all rows with their influence.

    Parquet and JSON Lines files (plain, `.gz`, `.zst` or `.bz2`) keep their format, columns and order of rows; kept
    JSON lines stay byte for byte. Each input has one output file, by its path below the folder that all inputs lie in. Paths and
    URLs are those of `fsspec`: local ones, `s3://`, `gs://` and `hf://` where their packages are installed.

    A call that was killed continues when it is made again, and so does one with another budget: scores are kept. The
    result is the same for any number of workers. Which rows are kept is exact over all files; rows that rank alike
    stand in an order of their content and the seed.

    Memory is about a gigabyte a worker or less, whatever the size of a file. With several workers, a script must
    begin its work under `if __name__ == "__main__":`, as each process imports it.

    Args:
        selector: What scores.
        inputs: Files, patterns such as `data/*.parquet`, or folders, which are searched whole for files of a known
            ending (plain `.json` must be named). Several may be given.
        out: The output folder: a new one, or one that a call with the same selector, inputs and column began.
        ratio: Share of the rows to keep, over all files, in (0, 1].
        k: Number of rows to keep, over all files.
        threshold: Lowest `influence` to keep. It means nothing for path labels, and a warning says so.
        num_tokens: Largest number of trained tokens to keep, over all files.
        add_scores: Whether all rows are written, with a float32 column `influence`, instead of some without it.
        random_share: Share of what is kept that is drawn at random from the rest, in [0, 1).
        temperature: Temperature of Gumbel noise in standard deviations of the labels; 0 takes the highest.
        seed: Random seed of the noise and of the order among equals, from 0 to below 2**64.
        column: Column to score, in any form that `MatesSelector.map` takes.
        workers: Number of processes, of one thread each; 1 is this process, with all cores.
        on_error: `"stop"` raises an error at the first file or line that cannot be read. `"skip"` counts and names
            it, and leaves it out: a line that is no JSON object alone, anything else with its file.

    Returns:
        What was kept and what it took; also `_mates/summary.json` in the output folder.

    Raises:
        FileNotFoundError: an input is not there.
        ValueError: the budget is impossible, a file has another format, or there is no such column.
        MatesError: the output folder holds other work, a file cannot be read, or it changed meanwhile.
    """
    started_at = time.perf_counter()
    if not isinstance(selector, MatesSelector):
        raise TypeError(
            f"`selector` must be a `MatesSelector`, got {described(selector)}. Open one with "
            "`MatesSelector.from_pretrained(path)`."
        )
    amount = {"ratio": ratio, "k": k, "threshold": threshold, "num_tokens": num_tokens}
    drawn = {"random_share": random_share, "temperature": temperature, "seed": seed}
    budget = _budget_of(selector, amount, drawn, add_scores)
    _check_options(workers, on_error)
    folder = Folder(os.fspath(out))
    parts = find_parts(inputs, folder.url)
    _check_processes([folder.url, *(part.url for part in parts)], workers)
    work = _opened(selector, parts, column, folder, on_error == "skip")
    work = dataclasses.replace(work, threads=None if workers == 1 else 1)
    with _alone(folder):
        folder.claim(work.digest, work.scored[1], parts)
        return _Run(work, bundles_of(parts), budget, selector, started_at).do(workers)


def _budget_of(
    selector: MatesSelector, amount: Mapping[str, Any], drawn: Mapping[str, Any], add_scores: bool
) -> Budget | None:
    """The budget; None where all rows are written."""
    if not add_scores:
        found = Budget(**amount, **drawn)
        return found.of_labels(label_unit(getattr(selector.influence_model, "report", None), selector.origin))
    given = [name for name, value in amount.items() if value is not None]
    given += [name for name in ("random_share", "temperature") if drawn[name]]
    if given:
        raise ValueError(
            f"`add_scores` writes all rows, and `{given[0]}` keeps some. Give one of the two; another call with the "
            "other into a second folder scores again."
        )
    return None


def _check_options(workers: int, on_error: str) -> None:
    if not isinstance(workers, int) or workers < 1:
        raise ValueError(f"`workers` must be a whole number of at least 1, got {workers!r}.")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"`on_error` must be 'stop' or 'skip', got {on_error!r}.")


def _check_processes(urls: Sequence[str], workers: int) -> None:
    """Refuse several processes where the files are in the memory of this one."""
    if workers > 1 and any(url.startswith("memory://") for url in urls):
        raise ValueError(f"`workers` must be 1 with `memory://`, which is of one process, got {workers}.")


def _opened(selector: MatesSelector, parts: Sequence[Part], column: str | None, folder: Folder, skip: bool) -> Work:
    """What to score with, decided by the first file that can be read."""
    fitted = Fitted.of(selector)
    first: Exception | None = None
    for part in parts:
        try:
            schema = schema_of(part)
            if not schema.names:  # of no line
                continue
            scorer = fitted.scorer(schema, column)
        except Exception as error:
            if not is_of_content(error):
                raise
            kind = type(error) if type(error) in (ValueError, TypeError) else FileError
            first = first or kind(named(part, error))
            if not skip:
                raise first from error
            continue
        return Work(fitted, column, what_is(scorer.column), scorer.digest(), folder.url, skip)
    raise first or ValueError("`inputs` must hold at least one row, and all files are empty.")


@contextlib.contextmanager
def _alone(folder: Folder) -> Iterator[None]:
    """Keep a second call out of a folder on this machine's disks, and remove what a killed one left half written."""
    fs, path = located(folder.url)
    try:
        import fcntl
    except ImportError:  # not on Windows
        fcntl = None  # type: ignore[assignment]
    if fcntl is None or not is_local(fs) or os.path.isfile(path):
        yield
        return
    os.makedirs(path, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MatesError(
                f"`out` must be of one call at a time, and another process writes into `{folder.url}`. Wait for it."
            ) from error
        remove_partial(Path(path))
        yield
    finally:
        os.close(handle)


class _Run:
    """One call, stage by stage."""

    def __init__(
        self, work: Work, bundles: Sequence[Bundle], budget: Budget | None, selector: MatesSelector, started_at: float
    ) -> None:
        self.work, self.bundles, self.budget, self.started_at = work, bundles, budget, started_at
        self.folder = Folder(work.out)
        self.label_std = work.fitted.label_std
        self.resumed = False

    def do(self, num_workers: int) -> FilesReport:
        """Score, cut, write, report."""
        with started(self.work, min(num_workers, len(self.bundles))) as each:
            facts = self._score(each)
            known = [PartFacts(**one) for bundle in facts for one in json.loads(str(bundle["parts"]))]
            self._check_errors(known)
            cut, first_pieces = self._cut(sum(int(bundle["num_rows"]) for bundle in facts))
            marks = self._write(each, cut, first_pieces, self._key(facts))
        report = self._report(known, cut, marks)
        write_object(self.folder.summary, report.to_dict())
        return report

    def _score(self, each: Callable[..., Iterator[Any]]) -> list[dict[str, Any]]:
        """What is recorded with the scores of each bundle, those that are missing made first."""
        found = [self.folder.score_facts(bundle, self.work.digest) for bundle in self.bundles]
        todo = [bundle for bundle, facts in zip(self.bundles, found, strict=True) if facts is None]
        self.resumed |= len(todo) < len(self.bundles)
        with self._progress("Scoring", todo) as count:
            for number, facts in each(_score_one, [(bundle,) for bundle in todo]):
                found[number] = facts
                count(number)
        return [facts for facts in found if facts is not None]

    def _check_errors(self, known: Sequence[PartFacts]) -> None:
        """Raise where an earlier call left something out that this one may not."""
        errors = _errors_of(known, self._parts)
        if errors and not self.work.skip:
            raise FileError(f"{errors[0]} An earlier call left it out: `on_error='skip'` does so again.")
        if all(one.dropped is not None for one in known):
            raise FileError(f"At least one file must be read, and all {len(known)} are left out: {errors[0]}")

    @property
    def _parts(self) -> list[Part]:
        return [part for bundle in self.bundles for part in bundle.parts]

    def _cut(self, num_rows: int) -> tuple[Cut | None, list[int]]:
        """The cut through all scores, and the number of each bundle's first piece."""
        pieces: list[Callable[[], PieceScores]] = []
        first_pieces = []
        for bundle in self.bundles:
            first_pieces.append(len(pieces))
            pieces += open_scores(self.folder.scores(bundle))
        if self.budget is None:
            return None, first_pieces
        if num_rows <= _HELD_ROWS:
            pieces = [functools.cache(read) for read in pieces]
        return find_cut(pieces, self.budget, self.label_std), first_pieces

    def _key(self, facts: Sequence[Mapping[str, Any]]) -> str:
        """What the written files depend on besides the inputs."""
        budget = None if self.budget is None else dataclasses.asdict(self.budget)
        scored = [[one["num_rows"], one["num_tokens"], one["parts"]] for one in facts]
        return hashlib.sha256(json.dumps([self.work.digest, budget, scored], default=str).encode()).hexdigest()

    def _write(
        self, each: Callable[..., Iterator[Any]], cut: Cut | None, first_pieces: Sequence[int], key: str
    ) -> list[dict[str, Any]]:
        """The mark of each bundle, those that are missing written first."""
        marks = [find_mark(self.work, bundle, key) for bundle in self.bundles]
        todo = [bundle for bundle, mark in zip(self.bundles, marks, strict=True) if mark is None]
        self.resumed |= len(todo) < len(self.bundles)
        with self._progress("Writing", todo) as count:
            for number, mark in each(_write_one, [(one, cut, first_pieces[one.number], key) for one in todo]):
                marks[number] = mark
                count(number)
        return [mark for mark in marks if mark is not None]

    @contextlib.contextmanager
    def _progress(self, what: str, todo: Sequence[Bundle]) -> Iterator[Callable[[int], None]]:
        """A bar over the bytes of what is to do; the function takes the number of a bundle that is done."""
        from tqdm import tqdm

        total = sum(bundle.size for bundle in todo)
        with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=3) as bar:

            def count(number: int) -> None:
                bar.update(self.bundles[number].size)

            yield count

    def _report(self, known: Sequence[PartFacts], cut: Cut | None, marks: Sequence[dict[str, Any]]) -> FilesReport:
        seconds = time.perf_counter() - self.started_at
        written = [part for mark in marks for part in mark["parts"]]
        num_bytes = sum(bundle.size for bundle in self.bundles)
        errors = _errors_of(known, self._parts)
        return FilesReport(
            out=self.folder.url,
            asked_for="all rows" if self.budget is None else asked_for(self.budget),
            files=len(known),
            files_left_out=sum(one.dropped is not None for one in known),
            lines_left_out=sum(len(one.bad) for one in known),
            rows=sum(one.rows for one in known),
            rows_kept=sum(one["rows"] for one in written),
            tokens=sum(one.tokens for one in known),
            tokens_kept=sum(one["tokens"] for one in written),
            threshold=None if cut is None or not math.isfinite(cut.threshold) else cut.threshold,
            bytes_read=num_bytes,
            bytes_scored=sum(one.content_bytes for one in known),
            bytes_written=sum(one["bytes"] for one in written),
            seconds=seconds,
            gb_per_hour=None if self.resumed else num_bytes / 1e9 / seconds * 3600,
            errors=tuple(errors[:_MOST_ERRORS]),
        )


def _score_one(work: Work, bundle: Bundle) -> tuple[int, dict[str, Any]]:
    return bundle.number, score_bundle(work, bundle)


def _write_one(work: Work, bundle: Bundle, cut: Cut | None, first_piece: int, key: str) -> tuple[int, dict[str, Any]]:
    return bundle.number, write_bundle(work, bundle, cut, first_piece, key)


def _errors_of(known: Sequence[PartFacts], parts: Sequence[Part]) -> list[str]:
    """What could not be read, one line each, by the file's name."""
    errors: list[str] = []
    for facts, part in zip(known, parts, strict=True):
        if facts.dropped is not None:
            errors.append(facts.dropped)
        else:
            errors += [f"`{part.url}`: {said}." for said in facts.said]
    return errors
