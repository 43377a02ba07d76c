"""The ledger and the order of a finished round, as they were when it was decided, read from its directory alone.

Where it is used: a run that resumes (`restore`) and whoever asks where a row was trained on (`where`) get both here,
so that they cannot differ. Trade-off: numpy and pyarrow alone, so questions are answered on a machine without torch;
the pool's shuffle is made again for rows that follow a round.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mates_hf.disk import read_array
from mates_hf.errors import MatesError
from mates_hf.selection.ledger import Ledger
from mates_hf.training.blocked import read_blocked
from mates_hf.training.order import Order
from mates_hf.training.redact import probed_by
from mates_hf.training.replaced import LATE_FILE, read_late, read_replaced, with_replaced


def ledger_of(path: Path, order: Order, num_rows: int, seed: int) -> Ledger:
    """The ledger as it was when a finished round was decided, with the rows that it probed.

    Rows that took the place of removed ones before the round, after it was decided, are marked as trained on.

    Args:
        path: the finished round.
        order: its order.
        num_rows: rows of the pool.
        seed: Selection seed of the run.

    Returns:
        The ledger; the rows of the order are not marked.

    Raises:
        MatesError: the round does not say what was trained on before it.
    """
    bits = read_array(path / "consumed.npy", np.uint8)
    if bits is None:
        raise MatesError(f"`{path}` must hold consumed.npy, which says what was trained on before it, got none.")
    probed = read_array(path / "probed.npy", np.uint8)  # not there in rounds of earlier versions
    waiting = read_array(path / "waiting.npy", np.uint8)  # there from the second pass on
    ledger = Ledger.from_bits(
        np.asarray(bits),
        num_rows,
        seed,
        int(order.info["cursor"]),
        None if probed is None else np.asarray(probed),
        None if waiting is None else np.asarray(waiting),
    )
    ledger.pass_number = int(order.info.get("pass", 1))
    blocked = read_blocked(path.parent, order.info, num_rows)
    ledger.blocked = blocked.mask_of(int(order.info.get("num_removed", 0)))
    late = read_late(path)[:, 0]
    if len(late) and (late.min() < 0 or late.max() >= num_rows):
        raise MatesError(f"`{path / LATE_FILE}` must hold rows of the pool, below {num_rows}: it was changed.")
    ledger.consumed[late] = True
    ledger.mark_probed(probed_by(path))
    return ledger


def lasting(path: Path, order: Order, ledger: Ledger, until: int) -> Order:
    """A round's order with the rows that follow it up to a position, and with those that replaced removed ones.

    A larger batch or more steps than planned use an order up sooner. What is missing are unused rows in the order of
    the shuffled pool, none of them probed in that round. They depend on the round alone.

    Args:
        path: the finished round.
        order: its order.
        ledger: `ledger_of` the round.
        until: pool rows before the next round takes effect.

    Returns:
        The order, with as many rows as are needed.

    Raises:
        MatesError: the pool has too few such rows.
    """
    missing, entries = until - order.from_position - len(order.rows), read_replaced(path)
    if missing > 0:
        exclude = np.concatenate([probed_by(path), entries[:, 2]])
        more = ledger.rows_after(order.rows, missing, exclude=exclude)
        order = dataclasses.replace(order, rows=np.concatenate([order.rows, more]))
    return with_replaced(order, entries)
