"""`mates-hf verify`: recompute what a run's rounds decided from what they left on disk, and say what is wrong first.

Where it is used: after a run, or beside it; it reads round directories, changes nothing. `replay` checks one.

Trade-off: it stops at the first thing that is wrong, because what follows from a wrong file is wrong too.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mates_hf.paths import expand_path
from mates_hf.round_files import ROUND_FILE, round_path
from mates_hf.training.journal import FOLDER, JOURNAL_FILE, is_pending
from mates_hf.training.replay.finished import FinishedRound
from mates_hf.training.replay.reader import WrongError
from mates_hf.training.replay.stream import check_buffers, open_round


@dataclasses.dataclass(frozen=True)
class Problem:
    """The first thing that is wrong with a run.

    Attributes:
        round: name of the round's directory.
        file: name of the file in it that is wrong.
        expected: what it must hold.
        found: what it holds.
    """

    round: str
    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.round}/{self.file}: expected {self.expected}, found {self.found}"


@dataclasses.dataclass(frozen=True)
class CheckedRound:
    """A round that is as it must be.

    Attributes:
        number: the round.
        decision: the guard's.
        from_position: number of pool rows that are trained on before its own.
        num_rows: how many rows it chose.
        num_candidates: how many it chose from; 0 in the Trainer's own order.
        num_probed: how many were labelled.
        num_redacted: how many rows were taken out of it on request; what hung on their values is as recorded.
        num_replaced: how many rows of its order were removed and have others in their place.
    """

    number: int
    decision: str
    from_position: int
    num_rows: int
    num_candidates: int
    num_probed: int
    num_redacted: int = 0
    num_replaced: int = 0


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify_run` found.

    Attributes:
        rounds_dir: the directory that holds the rounds.
        rounds: those that are as they must be, in order, up to the first problem.
        leftovers: names of unfinished and set-aside rounds, which are no error.
        problem: the first thing that is wrong, or None.
    """

    rounds_dir: Path
    rounds: tuple[CheckedRound, ...]
    leftovers: tuple[str, ...]
    problem: Problem | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "rounds_dir": str(self.rounds_dir), "ok": self.problem is None}


def verify_run(path: str | os.PathLike[str]) -> Verification:
    """Check every round of a run; of the rounds that `keep_rounds` left.

    Checked: files, their types, lengths and checksums; `key.json` and `selection.json` against `round.json`; the hash
    of the order; that candidates and probes are what seed and ledger draw; that no row is trained on twice in a pass,
    none that was probed is in the selection; that the selection is what scores, labels, hashes of texts and seed give;
    that each round goes on where the one before it ends. Of a stream: that the buffers follow one another, and that
    rows set aside and chosen are what seed, round, scores and hashes give.

    Args:
        path: a run's `output_dir`, or the directory that holds its rounds.

    Returns:
        The rounds that are as they must be, and the first thing that is not.

    Raises:
        FileNotFoundError: there is no finished round.
        ValueError: the path begins with a home folder that is not there.
    """
    rounds_dir = _find_rounds(expand_path(path))
    if is_pending(rounds_dir):
        what = "no removal that was stopped in the middle; the run, when it resumes, or `mates-hf forget` finishes it"
        return Verification(rounds_dir, (), (), Problem(FOLDER, JOURNAL_FILE, what, "one"))
    numbers, leftovers = _list_rounds(rounds_dir)
    checked: list[CheckedRound] = []
    before: FinishedRound | None = None
    for number in numbers:
        directory = round_path(rounds_dir, number)
        try:
            current = open_round(directory, number)
            if before is None:
                _check_first(current)
            elif number != before.number + 1:
                if current.config.keep_rounds is None:
                    directory = round_path(rounds_dir, before.number + 1)
                    raise WrongError(ROUND_FILE, "a finished round", f"none, though round {number} is there")
                before = None  # an older round was kept for its influence model
            current.check(before)
        except WrongError as wrong:
            return Verification(rounds_dir, tuple(checked), leftovers, Problem(directory.name, *wrong.args))
        checked.append(_summary(current))
        before = current
    try:
        check_buffers(rounds_dir)
    except WrongError as wrong:
        return Verification(rounds_dir, tuple(checked), leftovers, Problem("stream", *wrong.args))
    return Verification(rounds_dir, tuple(checked), leftovers, None)


def _find_rounds(path: Path) -> Path:
    """The directory that holds the rounds."""
    for rounds_dir in (path, path / "_mates"):
        if rounds_dir.is_dir() and any(rounds_dir.glob("round-*")):
            return rounds_dir
    what = "is a round: pass the directory it lies in" if (path / ROUND_FILE).exists() else "holds no round"
    raise FileNotFoundError(f"`{path}` {what}. Rounds are in `<output_dir>/_mates`, or where `rounds_dir` says.")


def _list_rounds(rounds_dir: Path) -> tuple[list[int], tuple[str, ...]]:
    """Numbers of the finished rounds, ascending, and the names of what else is there of rounds."""
    numbers, leftovers = [], []
    for path in rounds_dir.iterdir():
        match = re.fullmatch(r"round-(\d{4,9})", path.name)
        if match and path == round_path(rounds_dir, int(match[1])):
            numbers.append(int(match[1]))
        elif path.name.startswith("round-") or path.name.endswith(".tmp"):
            leftovers.append(path.name)
    if not numbers:
        raise FileNotFoundError(
            f"`{rounds_dir}` must hold a finished round, got {', '.join(sorted(leftovers)) or 'none'}. A round is "
            "finished once its directory has lost the ending `.partial`."
        )
    return sorted(numbers), tuple(sorted(leftovers))


def _check_first(current: FinishedRound) -> None:
    """Rounds before the first one there is may have been deleted by `keep_rounds`, and by nothing else."""
    first = current.config.random_rounds
    if current.number < first or (current.number > first and current.config.keep_rounds is None):
        raise WrongError(
            ROUND_FILE,
            f"the first round to be {first} (`random_rounds`), as `keep_rounds` is {current.config.keep_rounds}",
            f"round {current.number} as the first",
        )


def _summary(current: FinishedRound) -> CheckedRound:
    """What a line of the report says of a round."""
    own_order = current.decision == "own_order"
    return CheckedRound(
        number=current.number,
        decision=current.decision,
        from_position=current.info["from_position"],
        num_rows=len(current.rows),
        num_candidates=0 if own_order else current.info["num_candidates"],
        num_probed=current.info["num_probed"],
        num_redacted=current.info.get("redacted") or 0,
        num_replaced=len(current.entries),
    )


def report_lines(result: Verification) -> Iterator[str]:
    """One line a round, then the leftovers."""
    for checked in result.rounds:
        of = f" of {checked.num_candidates} candidates" if checked.num_candidates else ""
        end = checked.from_position + checked.num_rows
        yield (
            f"round {checked.number}: ok, {checked.decision}, {checked.num_rows} rows{of}, positions "
            f"{checked.from_position} to {end}, {checked.num_probed} probed{_without(checked)}"
        )
    for name in result.leftovers:
        yield f"left over: {name} (not part of the run's order)"


def _without(checked: CheckedRound) -> str:
    """What a line says of rows that were removed on request."""
    parts = [""]
    if checked.num_redacted:
        parts.append(f"{checked.num_redacted} rows taken out, so what hung on them is as recorded")
    if checked.num_replaced:
        parts.append(f"{checked.num_replaced} rows of its order replaced")
    return "; ".join(parts)
