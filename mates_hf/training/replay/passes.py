"""The passes of a finished run, recomputed: when one begins, and whose turn is still to come.

Where it is used: `replay` asks it for each round. The rules are not written down twice: they are the `Ledger`'s and
`turns`' own. Trade-off: where the round before is deleted, who waits is read and not recomputed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mates_hf.config import MatesConfig
from mates_hf.records import IntArray
from mates_hf.round_files import ROUND_FILE
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.plan import num_candidates
from mates_hf.selection.turns import Mask, waiting_after, waiting_in_new_pass
from mates_hf.training.replay.reader import RoundReader, WrongError, is_whole

WAITING_FILE = "waiting.npy"  # (ceil(num_rows / 8),) uint8, eight rows a byte: whose turn is still to come


class RoundWithPasses(RoundReader):
    """What of a finished round its pass is checked by; `replay` reads the rest.

    Attributes:
        number: the round.
        info: its `round.json`.
        config: The config in it.
        decision: The guard's.
        num_pool_rows: rows of the pool.
        num_rows_drawn_for: rows that it was drawn for.
        pass_number: its pass, from 1.
        rows: what it trains on, in order, once they are read.
        ledger: has the pool's shuffled order, once it is read.
        waiting: whose turn was still to come when it drew; None in the first pass and in rounds of earlier versions.
        blocked: (N,) bool, rows that it must not use; None where all may be.
    """

    number: int
    info: dict[str, Any]
    config: MatesConfig
    decision: Any
    num_pool_rows: int
    num_rows_drawn_for: int
    pass_number: int
    rows: IntArray
    ledger: Ledger
    waiting: Mask | None = None
    blocked: Mask | None = None

    @property
    def offered(self) -> IntArray:
        """The rows that had their turn in the round."""
        if self.decision == "own_order":
            return self.rows
        return np.asarray(self.array("candidates.npy", np.int64, self.info["num_candidates"]))


def pass_of(current: RoundWithPasses) -> int:
    """The pass that a round records; rounds of versions that had one pass name none.

    Args:
        current: the round.

    Returns:
        Its pass, from 1.

    Raises:
        WrongError: there is no such pass.
    """
    number, most = current.info.get("pass", 1), current.config.most_passes
    ok = is_whole(number) and 1 <= number <= most
    limit = "on" if current.config.max_passes is None else f"to `max_passes` ({most})"
    current.require(ok, ROUND_FILE, f"`pass` from 1 {limit}", repr(number))
    return int(number)


def asked_of(current: RoundWithPasses) -> dict[str, Any]:
    """What was asked for where rounds were fitted to the pool; empty where they were not.

    Args:
        current: the round.

    Returns:
        The fields of the config that were given otherwise.

    Raises:
        WrongError: it is no object, or asks for what the round has.
    """
    asked = current.info.get("asked", {})
    current.require(isinstance(asked, dict), ROUND_FILE, "`asked` as an object", repr(asked))
    steps = asked.get("update_steps")
    ok = not asked or (set(asked) == {"update_steps"} and is_whole(steps) and steps > current.config.update_steps)
    what = f"`asked` with an `update_steps` above {current.config.update_steps}, or none"
    current.require(ok, ROUND_FILE, what, repr(asked))
    return dict(asked)


def read_waiting(current: RoundWithPasses) -> Mask | None:
    """Whose turn was still to come when a round drew.

    Args:
        current: the round.

    Returns:
        (N,) bool; None in the first pass and in rounds of earlier versions.

    Raises:
        WrongError: the file is not what the round records of it.
    """
    told = current.info.get("num_waiting")
    if told is None:
        return None
    what = "`pass` above 1, as `num_waiting` is there"
    current.require(current.pass_number > 1, ROUND_FILE, what, str(current.pass_number))
    bits = current.array(WAITING_FILE, np.uint8, -(-current.num_pool_rows // 8))
    try:
        seed = current.config.selection_seed
        waiting = Ledger.from_bits(np.asarray(bits), current.num_pool_rows, seed, 0).consumed
    except ValueError as error:
        raise WrongError(WAITING_FILE, f"the bits of {current.num_pool_rows} rows", str(error)) from error
    num = int(np.count_nonzero(waiting))
    current.require(told == num, ROUND_FILE, f"`num_waiting` {num}, as in {WAITING_FILE}", repr(told))
    return waiting


def check_pass(current: RoundWithPasses, before: RoundWithPasses, consumed: Mask, more: IntArray) -> bool:
    """A pass begins where too few rows are left and `max_passes` allows it; who waits follows from the round before.

    Args:
        current: the round.
        before: the one before it.
        consumed: (N,) bool, true for rows that were trained on in the pass of the round before, up to this one.
        more: the rows that were trained on after those of the round before and before those of this one.

    Returns:
        Whether a pass begins, and every row counts as unused again.

    Raises:
        WrongError: the first thing that is wrong.
    """
    config, gone = current.config, consumed if current.blocked is None else consumed | current.blocked
    num_unused = current.num_pool_rows - int(np.count_nonzero(gone))
    needed = num_candidates(current.num_rows_drawn_for, config.selection_ratio) + config.num_probes
    begins = needed > num_unused and before.pass_number < config.most_passes
    expected = before.pass_number + begins
    what = f"`pass` {expected}, as {num_unused} rows are unused and {needed} needed"
    current.require(current.pass_number == expected, ROUND_FILE, what, str(current.pass_number))
    found, waiting = current.waiting, before.waiting
    if waiting is not None:
        what = f"`num_waiting`, as round {before.number} has it"
        current.require(found is not None, ROUND_FILE, what, "none")
        waiting = waiting_after(waiting, np.concatenate([before.offered, more]))
    if found is None:
        return begins
    current.require(begins or waiting is not None, ROUND_FILE, "no `num_waiting` before a pass begins", "one")
    if begins:
        waiting = waiting_in_new_pass(waiting, consumed, before.ledger.shuffled[: before.info["cursor"]])
    wrong = np.flatnonzero(waiting != found)
    if len(wrong):
        row = int(wrong[0])
        told = f"{len(wrong)} rows that differ, the first of them row {row}"
        what = f"the rows whose turn is still to come, so row {row} {'not ' * bool(found[row])}among them"
        current.require(False, WAITING_FILE, what, told)
    return begins
