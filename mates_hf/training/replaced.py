"""Rows of a round's order that were removed before they were trained on, and what stands in their place.

Where it is used: a run that resumes replaces them from the first position that it has not come to; `verify` and
`where` follow the same entries. Trade-off: `selection.npy` stays as the round decided it, because checkpoints name its
hash; the entries are a file of their own, in the order in which they were made.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mates_hf.disk import read_array, write_array
from mates_hf.records import IntArray
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.turns import Mask
from mates_hf.training.order import Order
from mates_hf.training.redact import probed_by

REPLACED_FILE = "replaced.npy"  # (n, 3) int64: pool rows before the place, the row that stood there, the new one


def read_replaced(path: Path) -> IntArray:
    """The entries of a round.

    Args:
        path: the finished round.

    Returns:
        (n, 3) int64, in the order in which they were made.

    Raises:
        MatesError: the file is damaged.
    """
    found = read_array(path / REPLACED_FILE, np.int64, num_dims=2)
    return np.zeros((0, 3), np.int64) if found is None else np.array(found).reshape(-1, 3)


def with_replaced(order: Order, entries: IntArray) -> Order:
    """An order with its entries followed.

    Args:
        order: As the round decided it, with the rows that follow it.
        entries: (n, 3) int64 of `read_replaced`.

    Returns:
        The order that is trained on.
    """
    if not len(entries):
        return order
    rows = np.array(order.rows)
    for position, _, new in entries.tolist():
        if 0 <= position - order.from_position < len(rows):
            rows[position - order.from_position] = new
    return dataclasses.replace(order, rows=rows, info={**order.info, "num_replaced": len(entries)})


def replaced_since(path: Path, removed: IntArray) -> IntArray:
    """The rows that were put into a round's order after the next round was decided.

    Args:
        path: the finished round.
        removed: (R,) int64 rows that were removed when the next round was decided.

    Returns:
        (n,) int64 rows, which the next round did not know to be trained on.
    """
    entries = read_replaced(path)
    found: IntArray = entries[~np.isin(entries[:, 1], removed), 2]
    return found


def replace_blocked(
    path: Path, order: Order, ledger: Ledger, blocked: Mask | None, start: int, avoid: IntArray
) -> Order:
    """Replace the rows of an order that must not be used, from a position on, and write down by which.

    The new rows are the next unused ones of the shuffled pool, as `Ledger.rows_after` finds them.

    Args:
        path: the finished round.
        order: The order that is trained on.
        ledger: The ledger as it was when the round was decided, but for rows that must not be used.
        blocked: (N,) bool, rows that must not be used; None where all may be.
        start: pool rows that are trained on.
        avoid: (n,) int64 rows that a later round, which is decided already, trains on or has probed.

    Returns:
        The order that is trained on from there.

    Raises:
        MatesError: the pool has too few rows.
    """
    first = max(start - order.from_position, 0)
    if blocked is None:
        return order
    holes = first + np.flatnonzero(blocked[np.asarray(order.rows[first:])])
    if not len(holes):
        return order
    entries = read_replaced(path)
    exclude = np.concatenate([probed_by(path), entries[:, 2], avoid])
    new = ledger.rows_after(np.asarray(order.rows), len(holes), exclude=exclude)
    rows = np.array(order.rows)
    made = np.stack([order.from_position + holes, rows[holes], new], axis=1).astype(np.int64)
    write_array(path / REPLACED_FILE, np.concatenate([entries, made]))
    rows[holes] = new
    return dataclasses.replace(order, rows=rows, info={**order.info, "num_replaced": len(entries) + len(made)})
