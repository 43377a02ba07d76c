"""Going on after a stop: orders, ledger and influence models as they were in memory, from finished rounds on disk.

Where it is used: `session` calls it where a checkpoint names a round. The main process reads; the others receive the
orders. Which round a checkpoint needs is `rounds_on_disk`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.disk import read_array
from mates_hf.records import IntArray
from mates_hf.round_files import round_path
from mates_hf.selection.plan import PlannedRound, Rest, RunPlan
from mates_hf.training import rounds_on_disk
from mates_hf.training.lead import own_order_before, rows_of_round, tell_later_round
from mates_hf.training.ledger_on_disk import lasting, ledger_of
from mates_hf.training.order import Order, load_order
from mates_hf.training.replaced import replace_blocked
from mates_hf.training.run import Run

logger = logging.getLogger(__name__)


def publish_orders(run: Run, orders: Sequence[Order]) -> None:
    """In the main process: tell the others the orders that a resumed run goes on with."""
    described = [
        {"number": order.number, "from_position": order.from_position, "info": dict(order.info)} for order in orders
    ]
    run.processes.publish(
        {"orders": described}, **{str(order.number): np.asarray(order.rows, np.int64) for order in orders}
    )


def receive_orders(run: Run) -> list[Order]:
    """In the others: what `publish_orders` told."""
    message, arrays = run.processes.receive()
    return [Order(rows=arrays[str(order["number"])], **order) for order in message["orders"]]


def restore_order(run: Run, path: Path, until: int, start: int, later: Path | None = None) -> Order:
    """A finished round's order that lasts until a position, and the ledger as it was when that was decided.

    Args:
        run: the run's state; gets the ledger.
        path: the finished round.
        until: pool rows before the next round takes effect.
        start: pool rows that are trained on; behind them removed rows are replaced.
        later: the round after it, where that is decided already.

    Returns:
        The order, with as many rows as are needed (`ledger_on_disk.lasting`): a second resume trains on the same ones.

    Raises:
        MatesError: the round does not say what was trained on before it.
    """
    decided = load_order(path)
    run.ledger = ledger_of(path, decided, len(run.pool), run.config.selection_seed)
    order = lasting(path, decided, run.ledger, until)
    run.ledger.blocked = None if run.blocked is None else run.blocked.mask
    avoid = np.zeros(0, np.int64) if later is None else rows_of_round(later)
    order = replace_blocked(path, order, run.ledger, run.ledger.blocked, start, avoid)
    if later is not None and run.blocked is not None:
        tell_later_round(later, path, run.blocked.removed)
    more = np.asarray(order.rows[len(decided.rows) :])
    if len(more):
        logger.warning(
            "The selection of round %d ends %d rows before the next one begins, because the batch is larger or "
            "`max_steps` is higher than when it was made: unused rows of the pool follow it, at random.",
            order.number, len(more),
        )  # fmt: skip
    run.ledger.mark_offered(np.concatenate([rows_offered(path, decided), more]))
    run.ledger.mark_trained(np.asarray(order.rows))
    return order


def rows_offered(path: Path, order: Order) -> IntArray:
    """The rows that had their turn in a finished round: those it chose from, or those of the own order.

    Args:
        path: the round's directory.
        order: its order.

    Returns:
        (M,) int64 pool rows.
    """
    candidates = read_array(path / "candidates.npy", np.int64)
    return np.asarray(order.rows if candidates is None else candidates)


def restore_rounds(
    run: Run,
    plan: RunPlan,
    last_round: Mapping[str, Any],
    step: int,
    start: int,
    what_follows: Callable[[Order, int], tuple[PlannedRound | None, int]],
) -> list[Order]:
    """Orders, ledger and influence models as they were in memory at a step.

    Args:
        run: the run's state; in the main process it gets the ledger and the models.
        plan: when rounds happen.
        last_round: `number` and `order_sha256` of the last round, from the checkpoint.
        step: optimizer steps done.
        start: pool rows trained on.
        what_follows: gives the round after another one, and the pool rows before it takes effect.

    Returns:
        The orders that the run continues with, in every process; the last one is that of the last round.

    Raises:
        ValueError: the pool has too few rows for what is ahead.
        MatesError: a round that is needed is not there.
    """
    if not run.processes.is_main:
        return receive_orders(run)
    path = rounds_on_disk.require_round(run.rounds_dir, last_round, step)
    last = load_order(path)
    earlier = rounds_on_disk.round_before(run.rounds_dir, last.number)
    orders: list[Order] = []
    if last.from_position > start and earlier is not None:
        orders.append(restore_order(run, earlier, last.from_position, start, later=path))
    elif last.from_position > start:
        orders += own_order_before(run, path, start)
    planned, until = what_follows(last, step)
    orders.append(restore_order(run, path, until, start))
    restore_models(run, last.number)
    left = run.config.most_passes - run.ledger.pass_number
    plan.check(Rest(planned, run.ledger.num_unused, left, step))
    publish_orders(run, orders)
    return orders


def restore_models(run: Run, number: int) -> None:
    """Give the run the last round's influence model, and the last that passed the guard.

    Args:
        run: the run's state.
        number: Number of the last finished round.
    """
    passed = rounds_on_disk.last_passed(run.rounds_dir, number)
    fitted = rounds_on_disk.last_fitted(run.rounds_dir, number)
    for earlier in sorted({each for each in (passed, fitted) if each is not None}):
        path = round_path(run.rounds_dir, earlier)
        run.remember(run.load_model(path), load_order(path).info)
    run.note_decision(load_order(round_path(run.rounds_dir, number)).info)
