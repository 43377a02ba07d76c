"""`mates-hf where`: at which step a row of the pool was trained on, from what a run left on disk.

Where it is used: after a run, or while it trains, by whoever must answer for what a model was trained on. Positions
and steps follow from the rounds, and from the history of the run for what no round decided.

Trade-off: numpy and pyarrow alone. It says what the run's files say, so a row is named by its number in the pool; how
far a killed run came behind its last checkpoint is not known, and such steps are marked as not known to be done.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.disk import read_json
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.paths import expand_path
from mates_hf.records import IntArray
from mates_hf.round_files import ROUND_FILE, find_rounds
from mates_hf.training.history import RunHistory, history_dir, read_history
from mates_hf.training.ledger_on_disk import lasting, ledger_of
from mates_hf.training.order import load_order


@dataclasses.dataclass(frozen=True)
class Use:
    """One time that a row is trained on.

    Attributes:
        row: Number of the row in the pool.
        position: pool rows that are trained on before it.
        step: The optimizer step that trains on it, from 1 as the Trainer's log counts; None where that is not known.
        round: Number of the round that decided it; None in the Trainer's own order before the first selection.
        done: Whether that step is known to be done.
    """

    row: int
    position: int
    step: int | None
    round: int | None
    done: bool


@dataclasses.dataclass(frozen=True)
class Whereabouts:
    """What `where_rows` found.

    Attributes:
        rounds_dir: the directory that holds the rounds.
        rows: The rows that were asked for.
        uses: each time that one of them is trained on, by row and position.
        done: pool rows that are known to be trained on; None for runs of versions that did not record it.
        unknown: stretches of positions, each with its end, of which no file says which rows stood there.
    """

    rounds_dir: Path
    rows: tuple[int, ...]
    uses: tuple[Use, ...]
    done: int | None
    unknown: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; of each row that was asked for its uses, an empty list where there is none."""
        uses: dict[int, list[dict[str, Any]]] = {row: [] for row in self.rows}
        for use in self.uses:
            uses[use.row].append({name: value for name, value in dataclasses.asdict(use).items() if name != "row"})
        return {
            "rounds_dir": str(self.rounds_dir),
            "rows": [{"row": row, "uses": found} for row, found in uses.items()],
            "done_positions": self.done,
            "unknown_positions": [list(stretch) for stretch in self.unknown],
        }

    def lines(self) -> Iterator[str]:
        """A table for a person, then what is not known."""
        by_row: dict[int, list[Use]] = {row: [] for row in self.rows}
        for use in self.uses:
            by_row[use.row].append(use)
        yield f"{'row':>10} {'position':>10} {'step':>8}  decided by"
        for row, uses in by_row.items():
            for use in uses:
                by = "the own order, before the first selection" if use.round is None else f"round {use.round}"
                step = "?" if use.step is None else str(use.step)
                yield f"{row:>10} {use.position:>10} {step:>8}  {by}{'' if use.done else ', not known to be done'}"
            if not uses:
                yield f"{row:>10} {'-':>10} {'-':>8}  not trained on"
        for start, stop in self.unknown:
            yield f"not known: which rows stood at positions {start} to {stop}, as no file that is left says it"


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Rows that are trained on one after the other.

    Attributes:
        start: pool rows that are trained on before the first of them.
        rows: (k,) integer pool rows; -1 where a last batch was not full.
        round: Number of the round that decided them; None in the Trainer's own order before the first selection.
    """

    start: int
    rows: npt.NDArray[np.integer[Any]]
    round: int | None

    @property
    def stop(self) -> int:
        """Pool rows before what follows them."""
        return self.start + len(self.rows)


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What a run left on disk, as far as its order is concerned.

    Attributes:
        rounds_dir: the directory that holds the rounds.
        rounds: directories of the finished rounds by number, ascending.
        history: how far the run came.
        pool: What the run recorded of its pool.
    """

    rounds_dir: Path
    rounds: Mapping[int, Path]
    history: RunHistory
    pool: Mapping[str, Any]

    @property
    def num_rows(self) -> int:
        """Rows of the pool."""
        return int(self.pool["num_rows"])

    @property
    def done(self) -> int | None:
        """Pool rows that are known to be trained on; None where the run does not say."""
        return self.history.done

    def stretches(self) -> list[Stretch]:
        """The order of the run, as far as it is known; no position is in two of them.

        Returns:
            The stretches, ascending.

        Raises:
            MatesError: a round is damaged.
        """
        found: list[Stretch] = []
        numbers = list(self.rounds)
        for number, following in itertools.zip_longest(numbers, numbers[1:]):
            path = self.rounds[number]
            order = load_order(path)
            until = max(self.done or 0, order.from_position + len(order.rows))
            if following is not None:
                until = load_order(self.rounds[following]).from_position
                if following != number + 1:  # one between them was deleted
                    until = min(until, order.from_position + len(order.rows))
            order = lasting(path, order, ledger_of(path, order, self.num_rows, int(order.info["seed"])), until)
            found.append(Stretch(order.from_position, order.rows[: until - order.from_position], number))
        first = found[0].start if found else None
        own = [
            Stretch(start, rows if first is None else rows[: max(first - start, 0)], None)
            for start, rows in self.history.own
        ]
        return [stretch for stretch in own if len(stretch.rows)] + found

    def unknown(self, stretches: Sequence[Stretch]) -> tuple[tuple[int, int], ...]:
        """Stretches of positions of which no file says which rows stood there, each with its end."""
        gaps, at = [], 0
        for stretch in stretches:
            if stretch.start > at:
                gaps.append((at, stretch.start))
            at = max(at, stretch.stop)
        if self.done is not None and self.done > at:
            gaps.append((at, self.done))
        return tuple(gaps)


def open_run(path: str | os.PathLike[str], what: str) -> RunFiles:
    """Find a run's rounds and its history.

    Args:
        path: a run's `output_dir`, or the directory that holds its rounds.
        what: the command that asks, for errors.

    Returns:
        The run.

    Raises:
        FileNotFoundError: there is no run.
        UnsupportedSettingError: the run trains on a stream, whose rows have no numbers.
        MatesError: a file is damaged.
    """
    path = expand_path(path)
    folder, rounds = find_rounds(path)
    if not rounds:
        folder = next((each for each in (path, path / "_mates") if history_dir(each).is_dir()), folder)
    history = read_history(folder)
    if not rounds and not history.calls:
        raise FileNotFoundError(
            f"`{path}` must be a run that selects its data, got no round and no history there. Rounds are in "
            "`<output_dir>/_mates`, or where `rounds_dir` says."
        )
    newest = max(rounds, default=None)
    pool = (
        history.calls[-1].about.get("pool") if newest is None else read_json(rounds[newest] / ROUND_FILE).get("pool")
    )
    if not isinstance(pool, Mapping) or (not pool.get("stream") and not isinstance(pool.get("num_rows"), int)):
        raise MatesError(f"`{folder}` must say how many rows the pool has, got {pool!r}: a file of it was changed.")
    if pool.get("stream"):
        raise UnsupportedSettingError(
            f"`{what}` needs a pool whose rows have numbers, and `{folder}` is of a stream. The files in its `stream` "
            "folder say which rows of the stream each buffer chose; for a pool of your own, write the stream to disk "
            "first (`Dataset.from_generator`)."
        )
    return RunFiles(folder, rounds, history, pool)


def where_rows(path: str | os.PathLike[str], rows: Any) -> Whereabouts:
    """When rows of the pool were trained on.

    Args:
        path: a run's `output_dir`, or the directory that holds its rounds.
        rows: (N,) row numbers in the pool.

    Returns:
        Each time that one of them is trained on, as far as the run's files say.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a row is not in the pool, or is no whole number.
        MatesError: the run trains on a stream, or a file is damaged.
    """
    run = open_run(path, "mates-hf where")
    wanted = check_rows(rows, run.num_rows)
    stretches = run.stretches()
    uses = [use for stretch in stretches for use in _uses_in(stretch, wanted, run)]
    uses.sort(key=lambda use: (use.row, use.position))
    return Whereabouts(run.rounds_dir, tuple(wanted.tolist()), tuple(uses), run.done, run.unknown(stretches))


def check_rows(rows: Any, num_rows: int) -> IntArray:
    """Row numbers that a user gave.

    Args:
        rows: What was given.
        num_rows: rows of the pool.

    Returns:
        (N,) int64, each once, ascending.

    Raises:
        ValueError: a row is not in the pool, or is no whole number.
    """
    found = np.asarray(rows)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise ValueError(
            f"`rows` must be a list of one row number or more, got {found.dtype} of shape {found.shape}. Rows are "
            "numbers in the pool, from 0."
        )
    if found.min() < 0 or found.max() >= num_rows:
        raise ValueError(
            f"`rows` must be rows of the pool, 0 to {num_rows - 1}, got {int(found.min())} to {int(found.max())}."
        )
    return np.unique(found.astype(np.int64))


def _uses_in(stretch: Stretch, wanted: IntArray, run: RunFiles) -> Iterator[Use]:
    """Each time that a row that is asked for stands in a stretch."""
    for at in np.flatnonzero(np.isin(stretch.rows, wanted)).tolist():
        position = stretch.start + at
        done = run.done is not None and position < run.done
        yield Use(int(stretch.rows[at]), position, run.history.step_of(position), stretch.round, done)
