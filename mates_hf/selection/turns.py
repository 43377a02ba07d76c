"""Whose turn it is in a pool that is gone through more than once: the next rows of an order, and who still waits.

A row has its turn where a round may choose it, whether it is chosen or passed over, or where it is trained on in the
own order. Turns go round: no row has its next one before each row that waits has had its own. So a row that was
trained on comes back only when all had their turn, although a new pass begins while rows of the last one are left.

Where it is used: under the `Ledger`, from the second pass on; in the first one the cursor says it all. Trade-off: one
bit a pool row on disk in each round of a later pass, so that any round can be replayed alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.records import IntArray

BLOCK = 1 << 20  # rows of an order looked at at once

Mask = npt.NDArray[np.bool_]


def next_rows(order: npt.NDArray[np.integer[Any]], start: int, num: int, blocked: Mask) -> tuple[IntArray, int]:
    """Up to `num` rows of an order that are not blocked, from `start` and round the end.

    Args:
        order: (L,) integer pool rows, none twice.
        start: Position in the order at which to begin.
        num: How many rows to find.
        blocked: (N,) bool, true for pool rows to leave out.

    Returns:
        The rows, int64, and the position behind the last of them; `start` where there is none.
    """
    rows = np.empty(min(num, len(order)), np.int64)
    done, stop = 0, start
    for low, high in ((start, len(order)), (0, start)):
        for at in range(low, high, BLOCK):
            if done == num:
                break
            block = order[at : min(at + BLOCK, high)]
            where = np.flatnonzero(~blocked[block])[: num - done]
            if len(where):
                rows[done : done + len(where)] = block[where]
                done += len(where)
                stop = at + int(where[-1]) + 1
    return rows[:done], stop % max(len(order), 1)


def next_in_turn(
    order: npt.NDArray[np.integer[Any]], start: int, num: int, blocked: Mask, waiting: Mask | None
) -> tuple[IntArray, int]:
    """As `next_rows`, those that wait for their turn first.

    Args:
        order: (L,) integer pool rows, none twice.
        start: Position in the order at which to begin.
        num: How many rows to find.
        blocked: (N,) bool, true for pool rows to leave out.
        waiting: (N,) bool, true for pool rows whose turn is still to come; None where the order alone decides.

    Returns:
        The rows, int64, and the position behind the last of them.
    """
    if waiting is None:
        return next_rows(order, start, num, blocked)
    rows, stop = next_rows(order, start, num, blocked | ~waiting)
    if len(rows) == num:
        return rows, stop
    rest, stop = next_rows(order, stop, num - len(rows), blocked | waiting)
    return np.concatenate([rows, rest]), stop


def waiting_in_new_pass(waiting: Mask | None, consumed: Mask, passed: npt.NDArray[np.integer[Any]]) -> Mask:
    """Who waits where a new pass begins: of the rows that waited those that the last pass did not train on.

    Args:
        waiting: (N,) bool, who waited before; None in the first pass.
        consumed: (N,) bool, true for rows that the last pass trained on.
        passed: pool rows that were passed over in the first pass since it went through the pool last.

    Returns:
        (N,) bool, a new array.
    """
    if waiting is not None:
        found: Mask = waiting & ~consumed
        return found
    found = ~consumed
    found[passed] = False
    return found


def waiting_after(waiting: Mask, offered: npt.NDArray[np.integer[Any]]) -> Mask:
    """Who waits once some rows have had their turn; where some of them did not wait, turns begin anew.

    Args:
        waiting: (N,) bool, who waited before.
        offered: pool rows that have had their turn since.

    Returns:
        (N,) bool, a new array.
    """
    again = offered[~waiting[offered]]
    found: Mask = np.ones(len(waiting), np.bool_) if len(again) else waiting.copy()
    found[again if len(again) else offered] = False
    return found
