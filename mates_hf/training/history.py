"""How far a run came and in which order before its first selection, on disk: what its rounds alone do not say.

Where it is used: `session` writes it in the main process; `where` and `audit` read it. Each `train()` call leaves a
file that says how its steps relate to rows, and how many steps are known to be done. The rows of the Trainer's own
order before the first selection are here as well, because no round decided them.

Trade-off: eight bytes for each row of the own order, written where a checkpoint is, so that a killed run lacks
none that it will not train on again. A call that resumes takes the place of what earlier calls left behind its start.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.data.mixing import PassageSchedule
from mates_hf.disk import make_directory, read_array, read_json, replace_path, write_array, write_json
from mates_hf.errors import MatesError
from mates_hf.records import IntArray
from mates_hf.training.clock import RowClock

HISTORY = "history"  # the folder, beside the rounds
NO_ROW = -1  # in a last batch that was not full


def history_dir(rounds_dir: Path) -> Path:
    """Where the history of a run lies."""
    return rounds_dir / HISTORY


class History:
    """Writes the history of one `train()` call.

    Args:
        rounds_dir: where the run's rounds are.
        step: optimizer steps done when the call begins.
        position: pool rows before its first one.
        about: what else is said of the run, JSON values.
        fills: whether a last batch that is not full is filled up with the first rows of its pass.
    """

    def __init__(self, rounds_dir: Path, step: int, position: int, about: Mapping[str, Any], *, fills: bool) -> None:
        self.folder = history_dir(rounds_dir)
        self._step, self._own_until, self._call = step, position, position
        self._began, self._fills, self._about = False, fills, dict(about)
        self._due: RowClock | None = None
        self._kept = position

    def has_own(self, until: int) -> None:
        """Say that the own order's rows up to a position are on disk as the call trains on them (`keep_own`).

        Args:
            until: pool rows before the end of them.
        """
        self._kept = max(self._kept, until)

    def begin(self, clock: RowClock) -> None:
        """How steps relate to rows from here on; what earlier calls said of later rows holds no longer.

        Nothing is written before `write`, because a call may still be refused.

        Args:
            clock: steps and positions of the call.
        """
        self._due = clock

    def write(self) -> None:
        """Write what `begin` was told, if it is not written yet."""
        clock, self._due = self._due, None
        if clock is None:
            return
        make_directory(self.folder)
        self._call = clock.pool_rows(clock.start_position)
        self._own_until = max(min(self._own_until, self._call), self._kept)
        if not self._began:
            _forget_from(self.folder, "own", self._own_until)
        self._began = True
        _forget_from(self.folder, "call", self._call)
        self._clock = dataclasses.asdict(clock)
        self.reached(self._step)

    def reached(self, step: int) -> None:
        """Say that so many optimizer steps are done.

        Args:
            step: Number of them.
        """
        self._step = step
        write_json(
            self.folder / f"call-{self._call:012d}.json", {"clock": self._clock, "done_step": step, **self._about}
        )

    def keep(self, step: int, clock: RowClock, sampler: Any, until: int | None) -> None:
        """Say that so many steps are done, and write the rows of the own order that are not written yet.

        Args:
            step: optimizer steps done.
            clock: steps and positions of the call.
            sampler: gives the own order's rows; None where selections have taken its place.
            until: pool rows before the end of what is known of the own order; None: those of the steps.
        """
        if self._due is not None and step == self._step and until is None:
            return  # no step was done, and the call may have been refused
        self.write()
        until = clock.pool_position(step) if until is None else until
        if hasattr(sampler, "own_between") and until > self._own_until:
            rows = sampler.own_between(self._own_until, until, fills=self._fills)
            write_array(self.folder / f"own-{self._own_until:012d}.npy", rows)
            self._own_until = until
        if step != self._step:
            self.reached(step)


def keep_own(rounds_dir: Path, start: int, rows: IntArray) -> None:
    """Write what the own order trains on from a position to its end, in the place of what earlier calls left.

    Args:
        rounds_dir: where the run's rounds are.
        start: pool rows before the first of them.
        rows: (L,) int64 rows; `NO_ROW` where no row stands.
    """
    folder = history_dir(rounds_dir)
    make_directory(folder)
    write_array(folder / f"own-{start:012d}.npy", rows)
    _forget_from(folder, "own", start + 1)


def open_history(run: Any, clock: RowClock, step: int, *, a_loop: bool) -> History:
    """The history that a `train()` call writes.

    Args:
        run: the `training.run.Run`.
        clock: steps and positions of the call.
        step: optimizer steps done when it begins.
        a_loop: whether a loop of the user's own trains, which fills its last batch up in one process too.

    Returns:
        It, without a file yet.
    """
    history = History(
        run.rounds_dir, step, clock.pool_rows(clock.start_position), {"pool": dict(run.pool_identity)},
        fills=run.processes.size > 1 or a_loop,
    )  # fmt: skip
    history.begin(clock)
    return history


def _forget_from(folder: Path, kind: str, position: int) -> None:
    """Delete what is said of rows from a position on."""
    for path, start in _numbered(folder, kind):
        if start >= position:
            path.unlink(missing_ok=True)


def set_history_aside(rounds_dir: Path) -> None:
    """Rename the history of an earlier run, as its rounds are: `history.stale`, `history.stale-2` and so on."""
    folder, number = history_dir(rounds_dir), 1
    if not folder.exists():
        return
    while os.path.lexists(aside := folder.with_name(f"{HISTORY}.stale{'' if number == 1 else f'-{number}'}")):
        number += 1
    replace_path(folder, aside)


@dataclasses.dataclass(frozen=True)
class Call:
    """One `train()` call.

    Attributes:
        start: pool rows before its first one.
        clock: how its steps relate to rows.
        done_step: optimizer steps that are known to be done.
        about: what else the call says of the run.
    """

    start: int
    clock: RowClock
    done_step: int
    about: Mapping[str, Any]

    @property
    def done(self) -> int:
        """Pool rows that are known to be trained on."""
        return self.clock.pool_position(self.done_step)

    def step_of(self, position: int) -> int:
        """The optimizer step that trains on a pool row, counted from 1 as the Trainer's log does.

        Args:
            position: pool rows before it.

        Returns:
            The step.
        """
        low = high = self.clock.start_step
        while self.clock.pool_position(high) <= position:
            low, high = high, 2 * high + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.clock.pool_position(middle) <= position else (low, middle)
        return high


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """What a run left of its history.

    Attributes:
        calls: Its `train()` calls, in order of their first rows.
        own: stretches of the own order: pool rows before each, and (k,) rows; they do not overlap.
    """

    calls: tuple[Call, ...]
    own: tuple[tuple[int, IntArray], ...]

    @property
    def done(self) -> int | None:
        """Pool rows that are known to be trained on; None where the run has no history."""
        return self.calls[-1].done if self.calls else None

    @property
    def begin(self) -> int | None:
        """Pool rows before the first one that selection knows of; None where the run has no history."""
        return self.calls[0].start if self.calls else None

    def step_of(self, position: int) -> int | None:
        """The optimizer step that trains on a pool row, from 1; None where that is not known."""
        found = [call for call in self.calls if call.start <= position]
        return found[-1].step_of(position) if found else None


def read_history(rounds_dir: Path) -> RunHistory:
    """Read what `History` wrote.

    Args:
        rounds_dir: where the run's rounds are.

    Returns:
        The history, which is empty for runs of earlier versions.

    Raises:
        MatesError: a file is damaged.
    """
    folder = history_dir(rounds_dir)
    calls = tuple(_read_call(path, start) for path, start in _numbered(folder, "call"))
    own: list[tuple[int, IntArray]] = []
    for path, start in _numbered(folder, "own"):
        rows = read_array(path, np.int64)
        assert rows is not None
        if own and own[-1][0] + len(own[-1][1]) > start:
            own[-1] = (own[-1][0], own[-1][1][: start - own[-1][0]])
        own.append((start, rows))
    return RunHistory(calls, tuple(own))


def _read_call(path: Path, start: int) -> Call:
    found = read_json(path)
    try:
        clock = dict(found["clock"])
        passages = clock.pop("passages", None)
        schedule = None if passages is None else PassageSchedule(**passages)
        about = {name: value for name, value in found.items() if name not in ("clock", "done_step")}
        return Call(start, RowClock(**clock, passages=schedule), int(found["done_step"]), about)
    except (KeyError, TypeError, ValueError) as error:
        raise MatesError(f"`{path}` must say how steps relate to rows, and is damaged ({error}).") from error


def _numbered(folder: Path, kind: str) -> list[tuple[Path, int]]:
    """Files of a kind with the number in their names, ascending."""
    found = [(path, path.stem.removeprefix(f"{kind}-")) for path in folder.glob(f"{kind}-*")]
    return sorted(((path, int(digits)) for path, digits in found if digits.isdigit()), key=lambda each: each[1])
