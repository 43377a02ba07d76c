"""What a round does beside training: fit, guard, score and select, in a thread, until the selection is due.

Where it is used: `session` starts it at a boundary where `rounds.run_round` has its labels, and asks for the order a
few steps later, at the last step at which it can still take effect where it was planned. In a run of several processes
each has such a thread; they hear of each other by connections of their own.

Trade-off: a thread and no process of its own. It shares the pool without a copy, and what it runs (numpy, Arrow, our
kernels) lets go of the interpreter's lock. It must not touch what training uses, which is why only influence models
that say so (`runs_beside_training`) and pools whose columns are read without a collator may run in it: a model, a
device or a random stream would be training's own. Everything else is done at the boundary, while training waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from mates_hf.engine.processes import ProcessError
from mates_hf.training.disk_errors import disk_errors_named
from mates_hf.training.order import Order
from mates_hf.training.run import Run
from mates_hf.training.scoring import help_to_score

T = TypeVar("T")


def conclude_round(run: Run, rest: Callable[[], Order] | None) -> Order:
    """In the main process: the rest of a round, whose order the other processes are told.

    Args:
        run: the run's state.
        rest: what follows the labels.

    Returns:
        The order to train on.
    """
    assert rest is not None
    with disk_errors_named(run.rounds_dir):
        order = rest()
        run.ledger.mark_trained(np.asarray(order.rows))
    share_order(run, order)
    return order


def share_order(run: Run, order: Order) -> None:
    """Tell the other processes the order of a round.

    Args:
        run: the run's state.
        order: to train on.

    Raises:
        ProcessError: a process received another selection.
    """
    rows = np.ascontiguousarray(order.rows, np.int64)
    message = {"number": order.number, "from_position": order.from_position, "info": dict(order.info)}
    run.side.publish(message, rows=rows, **order.files)
    run.side.require_same("selection", rows)


def await_order(run: Run) -> Order:
    """Every process but the main one: score what it asks for, until it says what the round's order is.

    Args:
        run: the run's state.

    Returns:
        The order to train on.

    Raises:
        ProcessError: the main process failed, or what was received is not what it decided.
    """
    while True:
        message, arrays = run.side.receive()
        if "score" in message:
            help_to_score(run, arrays)
            continue
        rows = arrays.pop("rows")
        run.side.require_same("selection", rows)
        order = Order(**message, rows=rows, files=arrays)
        if "num_replaced" not in order.info and order.digest() != order.info["order_sha256"]:
            raise ProcessError("The rows received are not those whose hash the round recorded.")
        return order


def may_run_beside(run: Run) -> bool:
    """Whether what follows the labels of a round leaves model, devices and random streams alone."""
    return bool(getattr(run.influence_model, "runs_beside_training", False)) and run.pool.is_read_by_columns


def due_step(run: Run, step: int, look_ahead_steps: int) -> int:
    """The step at whose end the order of a round that begins now is needed: `step` where it may not run beside.

    It is before the dataloader may fetch the round's first row, and before the averaging window of the next round or
    drift check begins.

    Args:
        run: the run's state.
        step: optimizer steps done.
        look_ahead_steps: optimizer steps whose rows the dataloader has fetched at the end of a step.

    Returns:
        An optimizer step, at least `step`.
    """
    config = run.config
    if not may_run_beside(run):
        return step
    due = [step + config.lead_steps - look_ahead_steps, step + config.shortest_steps - config.window_steps]
    if config.drift_check_steps:
        due.append(step + max(config.lead_steps, config.drift_check_steps) - config.window_steps)
    return max(step, min(due))


class Beside(Generic[T]):
    """Work in a thread, begun now; its result, or its error, is waited for once.

    Args:
        work: what to do.
        due: the optimizer step at whose end the result is needed.

    Attributes:
        due: The step at which it is due, as given.
        waited: seconds that `result` waited; 0 before.
    """

    def __init__(self, work: Callable[[], T], due: int) -> None:
        self.due, self.waited = due, 0.0
        self._work = work
        self._result: list[T] = []
        self._error: BaseException | None = None
        # A daemon: a training loop that ends by an error must not wait for a fit. What the thread leaves half done is
        # found by the next start, as after a kill.
        self._thread = threading.Thread(target=self._run, name="mates-round", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether the work has ended by an error already, which `result` will raise."""
        return self._error is not None

    def result(self) -> T:
        """Wait for the work.

        Returns:
            What it returned.

        Raises:
            BaseException: what it raised.
        """
        begin = time.perf_counter()
        self._thread.join()
        self.waited = time.perf_counter() - begin
        if self._error is not None:
            raise self._error
        return self._result[0]

    def abandon(self) -> None:
        """Wait for the work and forget what came of it: nothing may be written any more by a run that is over."""
        self._thread.join()


class CheckpointState(dict[str, Any]):
    """What a checkpoint holds, JSON values. A round that goes on beside training is waited for where one is written.

    A checkpoint that another callback asks for after ours were called, say, cannot be seen coming.

    Args:
        before_reading: what is done before the values are read as a whole.
    """

    def __init__(self, before_reading: Any = ()) -> None:
        super().__init__(() if callable(before_reading) else before_reading)
        self._before_reading = before_reading if callable(before_reading) else None

    def items(self) -> Any:
        """All keys and values, as they are to be saved."""
        if self._before_reading is not None:
            self._before_reading()
        return super().items()

    def let_go(self) -> None:
        """The values stay as they are: nothing is waited for, or kept alive, any more."""
        self._before_reading = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is a plain dict."""
        return dict, (list(self.items()),)
