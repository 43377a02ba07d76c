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
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mates_hf.allow import parse_allow
from mates_hf.data.arguments import described
from mates_hf.data.listing import is_local, located
from mates_hf.errors import MatesError
from mates_hf.selection.budget import Budget, require_rows
from mates_hf.selection.card import label_unit
from mates_hf.selection.files.allow import AllowedRows
from mates_hf.selection.files.folder import Folder
from mates_hf.selection.files.groups import require_column
from mates_hf.selection.files.plan import Part, bundles_of, find_parts
from mates_hf.selection.files.report import FilesReport as FilesReport
from mates_hf.selection.files.run import Run
from mates_hf.selection.files.work import (
    FileError,
    Work,
    is_of_content,
    named,
    schema_of,
    what_is,
)
from mates_hf.selection.inputs import Fitted
from mates_hf.selection.options import bounds_of
from mates_hf.selection.quota import Bounds
from mates_hf.selection.score_file import remove_partial
from mates_hf.selection.selector import MatesSelector


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
    group_column: str | None = None,
    max_group_boost: float | None = None,
    min_group_boost: float = 0.0,
    allow: Mapping[str, Any] | str | None = None,
    column: str | None = None,
    workers: int = 1,
    on_error: str = "stop",
) -> FilesReport:
    """Score files and write the rows that help most, or all rows with their influence.

    Parquet and JSON Lines files (plain, `.gz`, `.zst` or `.bz2`) keep their format, columns and order of rows; kept
    JSON lines stay byte for byte. Each input has one output file, by its path below the folder that all inputs lie in.
    Paths and URLs are those of `fsspec`: local ones, `s3://`, `gs://` and `hf://` where their packages are installed.

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
        group_column: Column that says which group a row is of, nested ones with dots. The report then has each
            group's share. It is read after all is scored; a JSON line without it is of the group `(none)`.
        max_group_boost: No group gets more than so many times its share of the rows, over all files; at least 1.
        min_group_boost: No group gets less than so many times its share of the rows, in [0, 1]. Both need a budget of
            rows, `ratio` or `k`.
        allow: Rows that may be used at all, such as `"licence=cc-by,cc0;consent=yes"`, or lists of entries by column,
            nested ones with dots. Other rows, and those without an entry, are neither scored nor written.
        column: Column to score, in any form that `MatesSelector.map` takes.
        workers: Number of processes, of one thread each; 1 is this process, with all cores.
        on_error: `"stop"` raises an error at the first file or line that cannot be read. `"skip"` counts and names
            it, and leaves it out: a line that is no JSON object alone, anything else with its file.

    Returns:
        What was kept and what it took; also `_mates/summary.json` in the output folder.

    Raises:
        FileNotFoundError: an input is not there.
        ValueError: the budget is impossible, a file has another format, there is no such column, or no row is allowed.
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
    bounds = _bounds_of(budget, group_column, max_group_boost, min_group_boost)
    rule = parse_allow(allow)
    allowed = None if rule is None else AllowedRows(rule)
    _check_options(workers, on_error)
    folder = Folder(os.fspath(out))
    parts = find_parts(inputs, folder.url)
    _check_processes([folder.url, *(part.url for part in parts)], workers)
    work = _opened(selector, parts, column, folder, on_error == "skip", group_column, allowed)
    work = dataclasses.replace(work, threads=None if workers == 1 else 1)
    with _alone(folder):
        folder.claim(work.digest, work.scored[1], parts, rule)
        return Run(work, bundles_of(parts), budget, bounds, started_at).do(workers)


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


def _bounds_of(budget: Budget | None, column: str | None, most: float | None, least: float) -> Bounds | None:
    """The bounds on groups, also where they only say which groups there are; None without a column."""
    found = bounds_of(column, most, least)
    if found is None:
        return None
    if budget is None:
        raise ValueError(
            "`add_scores` writes all rows, and `group_column` is of what is kept. Give one of the two; the written "
            "files have both columns."
        )
    if found.bind:
        require_rows(budget)
    return found


def _check_options(workers: int, on_error: str) -> None:
    if not isinstance(workers, int) or workers < 1:
        raise ValueError(f"`workers` must be a whole number of at least 1, got {workers!r}.")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"`on_error` must be 'stop' or 'skip', got {on_error!r}.")


def _check_processes(urls: Sequence[str], workers: int) -> None:
    """Refuse several processes where the files are in the memory of this one."""
    if workers > 1 and any(url.startswith("memory://") for url in urls):
        raise ValueError(f"`workers` must be 1 with `memory://`, which is of one process, got {workers}.")


def _opened(
    selector: MatesSelector,
    parts: Sequence[Part],
    column: str | None,
    folder: Folder,
    skip: bool,
    group_column: str | None,
    allowed: AllowedRows | None,
) -> Work:
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
        if group_column is not None:
            require_column(part, schema, group_column)
        if allowed is not None:
            allowed.require_columns(part, schema)
        return Work(fitted, column, what_is(scorer.column), scorer.digest(), folder.url, skip, allowed=allowed)
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
