"""Rows of a round's order that were removed before they were trained on, and what stands in their place.

Where it is used: a run that resumes replaces them from the first position that it has not come to; `verify` and
`where` follow the same entries. A round that was decided before, and takes effect after them, has the new rows in a
file of its own, so that none is drawn again. Trade-off: `selection.npy` stays as the round decided it, because
checkpoints name its hash; the entries are files of their own, in the order in which they were made.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mates_hf.disk import COPY_AGAIN, read_array, write_array
from mates_hf.errors import MatesError
from mates_hf.records import IntArray
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.turns import Mask
from mates_hf.training.order import Order
from mates_hf.training.redact import probed_by

LATE_FILE = "late.npy"  # `read_late`
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
    if found is not None and found.shape[1] != 3:
        raise MatesError(f"`{path / REPLACED_FILE}` must have three numbers a row, got {found.shape[1]}. {COPY_AGAIN}")
    return np.zeros((0, 3), np.int64) if found is None else np.array(found)


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


def read_late(path: Path) -> IntArray:
    """The rows that took the place of removed ones before a round, after it was decided.

    Args:
        path: the finished round.

    Returns:
        (n, 2) int64: the row, which is trained on before the round takes effect, and how many rows of the run were
        removed when it got its place. A round that is decided later, with as many removed, knows of it.

    Raises:
        MatesError: the file is damaged.
    """
    found = read_array(path / LATE_FILE, np.int64, num_dims=2)
    if found is not None and found.shape[1] != 2:
        raise MatesError(f"`{path / LATE_FILE}` must have two numbers a row, got {found.shape[1]}. {COPY_AGAIN}")
    return np.zeros((0, 2), np.int64) if found is None else np.array(found)


def add_late(path: Path, rows: IntArray, num_removed: int) -> None:
    """Write down that rows took the place of removed ones before a round, after it was decided.

    Args:
        path: the finished round.
        rows: (n,) int64 rows; those that are written down already change nothing.
        num_removed: how many rows of the run are removed by now.

    Raises:
        MatesError: the file is damaged.
    """
    late = read_late(path)
    new = rows[~np.isin(rows, late[:, 0])]
    if len(new):
        more = np.stack([new, np.full(len(new), num_removed)], axis=1).astype(np.int64)
        write_array(path / LATE_FILE, np.concatenate([late, more]))


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
