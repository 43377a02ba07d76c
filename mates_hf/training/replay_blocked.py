"""Rows that a finished round must not have used, read with distrust, and the rows that followed it.

Where it is used: `replay` asks it for each round. Trade-off: which rows `allow` leaves in only the pool knows, so the
hash in `round.json` stands for that; that none of the others was probed, drawn or trained on is recomputed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mates_hf.errors import MatesError
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.round_files import ROUND_FILE
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.turns import Mask
from mates_hf.training.blocked import ALLOWED_FILE, read_blocked
from mates_hf.training.round_reader import RoundReader, WrongError, is_whole


class RoundWithBlocked(RoundReader):
    """What of a finished round the rows that it must not use are checked by; `replay` reads the rest.

    Attributes:
        info: its `round.json`.
        num_pool_rows: rows of the pool.
        rows: what it trains on, in order, once they are read.
        consumed: (N,) bool, rows that were trained on before it in its pass.
        waiting: whose turn was still to come when it drew.
        labels: its labels, once they are read.
        ledger: has the pool's shuffled order, once it is read.
        blocked: (N,) bool, rows that it must not use; None where all may be.
    """

    info: dict[str, Any]
    num_pool_rows: int
    rows: IntArray
    consumed: Mask
    waiting: Mask | None
    labels: InfluenceLabels
    ledger: Ledger
    blocked: Mask | None = None


def read_blocked_of(current: RoundWithBlocked) -> Mask | None:
    """The rows that a round was not to use.

    Args:
        current: the round.

    Returns:
        (N,) bool; None where all could be used.

    Raises:
        WrongError: a file is not the one that the round records.
    """
    has_rule = current.info["config"].get("allow") is not None
    what = f"{'' if has_rule else 'no '}`allowed`, as `allow` of the config {'is' if has_rule else 'is not'} set"
    current.require(("allowed" in current.info) == has_rule, ROUND_FILE, what, repr(current.info.get("allowed")))
    num_removed = current.info.get("num_removed", 0)
    try:
        found = read_blocked(current.path.parent, current.info, current.num_pool_rows)
    except (MatesError, OSError) as error:
        raise WrongError(f"../{ALLOWED_FILE}", "the rows that may be used", str(error)) from error
    ok = is_whole(num_removed) and 0 <= num_removed <= len(found.removed)
    current.require(ok, ROUND_FILE, f"`num_removed` up to {len(found.removed)}", repr(num_removed))
    return found.mask_of(num_removed)


def rows_between(before: RoundWithBlocked, num_more: int) -> IntArray:
    """The rows trained on after those of a round and before those of the next one.

    Args:
        before: the round.
        num_more: how many they are.

    Returns:
        (num_more,) int64 pool rows; none where the number is not above 0.

    Raises:
        WrongError: the pool has too few rows.
    """
    if num_more <= 0:
        return np.zeros(0, np.int64)
    ledger = before.ledger
    ledger.consumed, ledger.waiting, ledger.blocked = before.consumed, before.waiting, before.blocked
    ledger.cursor = int(before.info["cursor"])
    try:
        return ledger.rows_after(before.rows, num_more, exclude=before.labels.candidate_id)
    except MatesError as error:
        raise WrongError(
            ROUND_FILE, f"rows enough after those of round {before.info['number']}", str(error)
        ) from error
