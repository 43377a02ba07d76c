"""One `train()` call with a schedule: when rounds happen, what they may draw from, and going on after a stop.

Where it is used: `MatesCallback` opens a `Session` in `on_train_begin` and tells it of every optimizer step; the
session runs the rounds (`rounds.run_round`) and feeds their orders to the `ScheduledSampler`. The main process decides
and writes; the others assist it and receive the order.

Trade-off: everything that lives as long as one `train()` call is here, so that the callback itself can be used again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.disk import unless_disk_fails
from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.digest import weight_marks
from mates_hf.reporting.metrics import round_metrics
from mates_hf.selection.choose import stage_seed
from mates_hf.selection.plan import PlannedRound, RunPlan
from mates_hf.training import resume, rounds_on_disk
from mates_hf.training.beside import Beside, CheckpointState, await_order, conclude_round, due_step
from mates_hf.training.clock import RowClock
from mates_hf.training.disk_errors import disk_errors_named
from mates_hf.training.drift import look_inside, rate_steps_ahead
from mates_hf.training.history import History, open_history
from mates_hf.training.lock import RoundsLock, released_on_error, withdrawn_on_error
from mates_hf.training.measure import assist, release
from mates_hf.training.memory import place_average, starts_on_host
from mates_hf.training.opening import leave_marks, open_rounds
from mates_hf.training.order import Order
from mates_hf.training.own_order import require_one_order
from mates_hf.training.restore import restore_rounds
from mates_hf.training.rounds import run_round
from mates_hf.training.run import Run, recorded_steps
from mates_hf.training.run_report import RunPage
from mates_hf.training.sampler import ScheduledSampler
from mates_hf.training.stream.rounds import go_on, prune_aside
from mates_hf.training.stream.sampler import StreamSampler
from mates_hf.training.trust import longest_steps, next_check

logger = logging.getLogger(__name__)


class Session:
    """The rounds of one `train()` call.

    Args:
        run: what the rounds share.
        clock: steps and row positions.
        sampler: the schedule, already made and not yet installed.
        plan: when rounds happen.
        output_dir: where the Trainer's checkpoints go.
        step: the optimizer step the call starts after.
        look_ahead_steps: optimizer steps whose rows the dataloader has fetched at the end of a step.
        saved: this library's state in the checkpoint that is resumed; None where there is none.
        saved_rounds: the rounds that a loop's checkpoints need (-1: none), which it adds to; None where the Trainer's
            tell.
    """

    def __init__(
        self,
        run: Run,
        clock: RowClock,
        sampler: ScheduledSampler | StreamSampler,
        plan: RunPlan,
        *,
        output_dir: Path,
        step: int,
        look_ahead_steps: int,
        saved: Mapping[str, Any] | None,
        saved_rounds: list[int] | None = None,
    ) -> None:
        self.run, self.clock, self.sampler, self.plan = run, clock, sampler, plan
        sampler.keeps_own_rows, self.output_dir, self._page = run.processes.is_main, output_dir, RunPage(run)
        self.average: WeightAverage | None = None
        self.order: Order | None = None  # the last round's
        self.saved_rounds, self._look_ahead_steps = saved_rounds, look_ahead_steps
        self._pending: Beside[Order] | None = None  # a round that has its labels
        self._metrics: dict[str, float] = {}  # not reported yet
        self._next_round: PlannedRound | None = None
        self.next_look, self.last_look = 0, -1  # steps of the next round or check (0: none is known), and of the last
        self._window_start, self._average_saved_at = 0, -1
        self._on_host, self._first_step = starts_on_host(run.model), step + 1
        self._learning_rates: tuple[float, ...] | None = None
        self.state = CheckpointState(self.settle)
        self.state |= {
            **{"version": resume.STATE_VERSION, "step": step, "position": clock.start_position, **sampler.own_state},
            "origin_step": plan.first_step,
            "last_round": saved["last_round"] if saved else None,
            **run.identity(),
        }
        self.lock: RoundsLock | None = None  # the main process's, as is the history
        self.history: History | None = None
        if run.processes.is_main:
            self.lock = open_rounds(run, plan, output_dir, resumes=bool(saved), step=step, owner=self)
            self.history = open_history(run, clock, step, a_loop=saved_rounds is not None)
            sampler.before_pass = self._begin_pass
            run.processes.publish({"opened": True})
        else:
            run.processes.receive()
        with released_on_error(self.lock):
            sampler.begin()
            if saved and isinstance(sampler, StreamSampler):
                self.order = go_on(run, sampler, saved["last_round"], step)
            elif saved and saved["last_round"] is not None:
                self._restore_rounds(saved["last_round"], step)
            self._plan_next(step)

    def begin_step(self, step: int) -> None:
        """Behind the first batch of a pass: prove that all processes drew the same, and shuffle the pool ahead."""
        sampler, run = self.sampler, self.run
        if sampler.unproven:
            sampler.unproven = False
            if sampler.uses_own_rows(self.clock.position(step)) and isinstance(sampler, ScheduledSampler):
                with withdrawn_on_error(self.lock):
                    require_one_order(run.processes, sampler.own, sampler.own_state["own_sha256"])
                if self.order is not None:  # a resume between the first boundary and its switch
                    self._keep_history(self.order.from_position)
            if run.processes.is_main and self.next_look:
                run.ledger.prepare()

    def begin_epoch(self, step: int) -> None:
        """Where a callback ended an epoch before its time, count steps and rows anew from there."""
        if self.sampler.ended_early(step):
            self._keep_history()
            self.sampler.restart(step)
            self.clock = self.sampler.clock
            if self.history is not None:
                self.history.begin(self.clock)
            self.plan = dataclasses.replace(self.plan, clock=self.clock)
            logger.info("An epoch was ended by a callback at step %d: the next one goes on with the next row.", step)

    def after_step(self, step: int, saves: bool, evaluates: bool = False) -> dict[str, float]:
        """Count the rows of an optimizer step; average weights inside the window; look inside, run a round.

        Args:
            step: optimizer steps done.
            saves: true where a checkpoint of this step is known to follow.
            evaluates: true where an evaluation is, whose dataloader may start processes.

        Returns:
            `mates/...` metrics of what happened at this step, mostly none.
        """
        position = self.clock.position(step)
        self.state.update(step=step, position=position, **self.sampler.state_at(position))
        rates = tuple(group["lr"] for group in self.run.optimizer.param_groups)
        # A boundary where a scheduler has them at 0 uses the last ones that moved. A rate kept in a tensor is left to
        # the probe: looking at it here would wait for the device at each step.
        if all(isinstance(rate, float) for rate in rates) and any(rates):
            self._learning_rates = rates
        if step == self._first_step:  # what training takes at its peak is known now
            self._on_host = place_average(self.run)
            if self.history is not None:  # nothing refuses the call any more
                leave_marks(self.run, self.history, self.lock)
            if self.average is not None:
                self.average.place(on_host=self._on_host)
        pending = self._pending
        if pending is not None and (saves or evaluates or step >= pending.due or pending.failed):
            self.settle()
        if self.next_look and step > self._window_start:
            if self.average is not None:
                self.average.update()
            if step == self.next_look:
                self._look(step)
                if self._pending is not None and (saves or evaluates):
                    self.settle()
            elif saves:
                self.save_average(step)
        self.state.pop("weights", None)  # those of an earlier save do not vouch for one that is not known to follow
        if saves:
            self._keep_history()
            self.state["weights"] = weight_marks(self.run.model, self.run.processes)
        return self.new_metrics()

    def new_metrics(self) -> dict[str, float]:
        """`mates/...` metrics that were not asked for yet."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def abandon(self) -> None:
        """Let go of a `train()` call that is over, once nothing of it writes any more."""
        if self._pending is not None:
            self._pending.abandon()
        self.state.let_go()

    def save_average(self, step: int) -> None:
        """Keep the running mean for a checkpoint inside the averaging window; all processes must call it."""
        if self.average is not None and self.average.num_steps and self._average_saved_at != step:
            # Over whatever an earlier attempt at this step left there: its weights may have been others.
            path = rounds_on_disk.average_path(self.run.rounds_dir, step)
            with released_on_error(self.lock), disk_errors_named(self.run.rounds_dir):
                self.average.save(path, self.run.processes, output_dir=self.output_dir)
            self._average_saved_at = step
            if self.run.processes.is_main and self.saved_rounds is None:
                rounds_on_disk.prune_averages(self.run.rounds_dir, self.output_dir, step)
            self.run.processes.meet()  # a disk that is full fails the main process alone

    def _look(self, step: int) -> None:
        """At averaged weights: a round where one is due, else a look inside the present one, which may end it."""
        run, self.last_look = self.run, step
        number = self._next_number(step)
        run.settings = dataclasses.replace(
            run.settings,
            learning_rates=self._learning_rates,
            seed=stage_seed(run.config.selection_seed, number, "probe"),
            rate_steps=rate_steps_ahead(run, self.plan, self._next_round, self.order, self._learning_rates, step),
        )
        average, self.average = self.average, None
        run.averaged_steps = 0 if average is None else average.num_steps
        order: Order | None = None
        with average.swapped_in() if average is not None else contextlib.nullcontext():
            if not run.processes.is_main:
                due, conclude = assist(run), functools.partial(await_order, run)
            else:
                due = due_step(run, step, self._look_ahead_steps)
                with released_on_error(self.lock), disk_errors_named(run.rounds_dir):
                    rest = self._decide(step, beside=due > step)
                due = None if rest is None else due
                release(run, due)
                conclude = functools.partial(conclude_round, run, rest)
            if due is not None and due <= step:  # with the weights that were probed still in place
                with released_on_error(self.lock):
                    order = conclude()
        if order is not None:
            self._take(order, step)
        elif due is None:
            self._plan_next(step)
        else:
            self.next_look = 0
            self._pending = Beside(conclude, due)

    def settle(self) -> None:
        """Wait for the order of the round that goes on beside training, where there is one, and schedule it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            # What failed there is told to the others here, where all of them wait for it.
            with self.run.processes.together(), released_on_error(self.lock):
                order = pending.result()
            self._metrics["mates/waited_seconds"] = pending.waited
            self._take(order, self.state["step"])

    def _take(self, order: Order, step: int) -> None:
        """In every process: train on a round's order, and look out for the next one."""
        self._schedule(order)
        self._keep_history()
        self._prune(order.number)
        self._page.update()
        self._metrics.update(round_metrics(order.info))
        self._plan_next(step)

    def _next_number(self, step: int) -> int:
        """Number of the round that starts at this step, or would if a check ended the present one."""
        planned = self._next_round
        if planned is not None and step >= planned.boundary_step:
            return planned.number
        assert self.order is not None
        return self.order.number + 1

    def _decide(self, step: int, *, beside: bool) -> Callable[[], Order] | None:
        """In the main process: the rest of a new round, or None where a check finds that none is due."""
        assert self.lock is not None
        self.lock.check()
        planned = self._next_round
        if planned is None or step < planned.boundary_step:
            assert self.order is not None
            planned, found = look_inside(self.run, self.order, self.plan, self.clock.pool_position, step)
            self._metrics.update(found)
            if planned is None:
                return None
        return self._run_round(planned, beside=beside)

    def _run_round(self, planned: PlannedRound, *, beside: bool) -> Callable[[], Order]:
        """Bring the ledger up to date and run the round as far as it needs the model; returns the rest."""
        run, clock, sampler = self.run, self.clock, self.sampler
        from_position = clock.pool_position(planned.from_step)
        if self.order is None:
            self._mark_own_order(clock.position(planned.from_step))
        else:  # what an early start cuts off
            run.ledger.release(np.asarray(self.order.rows_from(from_position)))
        planned = dataclasses.replace(planned, num_rows=clock.pool_position(planned.to_step) - from_position)
        run.ledger.make_room(planned.num_rows, run.config)
        return run_round(
            run, planned, self.plan, from_position=from_position, own_rows=sampler.own_rows_once, beside=beside
        )

    def _schedule(self, order: Order) -> None:
        """In every process: train on the order from its position on."""
        self.sampler.take(order)
        self.sampler.drop_finished(self.clock.position(order.info["step"]))
        self.order = order
        self.state["last_round"] = {name: order.info[name] for name in ("number", "step", "order_sha256")}

    def _begin_pass(self, start: int) -> None:
        if self.order is None:
            self._keep_history(self.clock.pool_rows(start))

    def _keep_history(self, own_until: int | None = None) -> None:
        """In the main process: write how far the run is, and the own order's rows up to there, or to a pool row."""
        if self.history is not None:
            in_own_order = self.order is None or own_until is not None
            with released_on_error(self.lock), disk_errors_named(self.run.rounds_dir):
                self.history.keep(self.state["step"], self.clock, self.sampler if in_own_order else None, own_until)

    def _mark_own_order(self, from_position: int) -> None:
        """Before the first selection: the rows that the Trainer's own order consumes in its running pass.

        Where a next pass would begin inside the lead, with a permutation not drawn yet, the present one goes on from
        its beginning until the selection takes effect (`ScheduledSampler`), as a fresh pass may.
        """
        self._keep_history(self.clock.pool_rows(from_position))
        used = self.clock.rows_of_pass(self.sampler.own_start, from_position)
        rows = self.sampler.own_rows[:used]
        self.run.ledger.mark_trained(rows if self.run.ledger.blocked is None else np.unique(rows))

    def _plan_next(self, step: int) -> None:
        """The next round and check after `step`, and the averaging window before the earlier of them."""
        self._next_round = planned = self._planned_after(self.order, step)
        events = [planned.boundary_step] if planned is not None else []
        check = self._next_check(step)
        if check is not None and (planned is None or check < planned.boundary_step):
            events.append(check)
        self.next_look = min(events, default=0)
        self.average = None
        window = self.run.config.window_steps
        self._window_start = self.next_look - max(window, 1)
        if window and self.next_look:
            self.average = WeightAverage(self.run.model, self.run.processes, on_host=self._on_host)
            path = rounds_on_disk.average_path(self.run.rounds_dir, step)
            if step > self._window_start and not self.average.load(path, self.run.processes):
                logger.warning(
                    "The running mean of the weights at step %d is not in %s: the next round averages from here on, "
                    "so its labels differ from the uninterrupted run's.", step, self.run.rounds_dir,
                )  # fmt: skip

    def _planned_after(self, order: Order | None, step: int) -> PlannedRound | None:
        """The round planned after `order`, or the first one, whose boundary is behind `step`; as long as it may be."""
        plan, config = self.plan, self.run.config
        if order is None:
            planned = next(iter(plan.rounds), None)
            length = longest = config.shortest_steps
        else:
            length = recorded_steps(order.info, config)
            longest = longest_steps(config, length, order.info["guard"]["decision"])
            planned = plan.round_at(order.number + 1, order.info["step"] + length, longest)
        # Behind a boundary at which a shorter run had nothing to select for; the next number is not used up by it.
        while planned is not None and planned.boundary_step <= step:
            planned = plan.round_at(planned.number, planned.boundary_step + length, longest)
        return planned

    def _next_check(self, step: int) -> int | None:
        """The step of the next check inside the round, or None where there is none or no round could start from it."""
        order = self.order
        if isinstance(self.sampler, StreamSampler):  # the rows that a round has still to train on are not read yet
            return None
        check = None if order is None else next_check(self.run.config, order.info, step)
        if order is None or check is None or self.plan.round_at(order.number + 1, check) is None:
            return None
        return check

    def _restore_rounds(self, last_round: Mapping[str, Any], step: int) -> None:
        """Orders, ledger and influence models as they were in memory at `step`."""
        assert isinstance(self.sampler, ScheduledSampler)
        start = self.clock.pool_rows(self.clock.start_position)
        orders = restore_rounds(self.run, self.plan, last_round, step, start, self._what_follows)
        self.order = orders[-1]
        if self.history is not None and orders[0].number < 0:  # the rest of the own order, without removed rows
            self.history.has_own(self.order.from_position)
        for order in orders:
            if order.from_position + len(order.rows) > start:
                self.sampler.append(max(order.from_position, start), order.rows_from(start))

    def _what_follows(self, last: Order, step: int) -> tuple[PlannedRound | None, int]:
        """The round planned after one that was read back, and the pool rows before it, or before the run's end."""
        planned = self._planned_after(last, step)
        return planned, self.clock.pool_position(planned.from_step if planned is not None else self.plan.max_steps)

    def _prune(self, number: int) -> None:
        """Bound the disk: delete rounds older than `keep_rounds` that no resume would ask for."""
        keep = self.run.config.keep_rounds
        if keep is not None and self.run.processes.is_main:
            rounds_on_disk.prune_rounds(self.run.rounds_dir, self.output_dir, number, keep, self.saved_rounds)
        prune_aside(self.run, self.sampler, self.output_dir)

    def close(self) -> None:
        """Let go of the rows, and let other runs write to the folder of the rounds."""
        self.sampler.close()
        with unless_disk_fails("how far the run came"):
            self._keep_history()
        self._page.update(last=True)
        if self.lock is not None:
            self.lock.release()
