"""One `train()` call with a schedule: when rounds happen, what they may draw from, and going on after a stop.

Place in the flow: `MatesCallback` opens a `Session` in `on_train_begin` and tells it of every optimizer step; the
session runs the rounds (`rounds.run_round`) and feeds their orders to the `ScheduledSampler`. The main process decides
and writes; the others assist it and receive the order.

Trade-off: everything that lives as long as one `train()` call is here, so that the callback itself can be reused,
retried with a smaller batch, or trained twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.influence.path_length import rate_steps
from mates_hf.records import MatesError, read_array
from mates_hf.round_files import PROBES_FILE, read_labels, round_path
from mates_hf.selection.choose import stage_seed
from mates_hf.selection.ledger import Ledger, probed_rows
from mates_hf.selection.plan import PlannedRound, RunPlan
from mates_hf.training import resume
from mates_hf.training.averaging import WeightAverage
from mates_hf.training.digest import weight_marks
from mates_hf.training.drift import check_drift
from mates_hf.training.measure import assist, release
from mates_hf.training.rounds import run_round
from mates_hf.training.run import Order, Run, load_order
from mates_hf.training.sampler import RowClock, ScheduledSampler

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
        saved: this library's state in the checkpoint that is resumed; None where there is none.
    """

    def __init__(
        self,
        run: Run,
        clock: RowClock,
        sampler: ScheduledSampler,
        plan: RunPlan,
        *,
        output_dir: Path,
        step: int,
        saved: Mapping[str, Any] | None,
    ) -> None:
        self.run, self.clock, self.sampler, self.plan = run, clock, sampler, plan
        self.output_dir = output_dir
        self.average: WeightAverage | None = None
        self.order: Order | None = None  # the last round's
        self._next_round: PlannedRound | None = None
        self._next_event = 0
        self.last_look = -1  # the step of the last round or drift check
        self._window_start = 0
        self._average_saved_at = -1
        self._learning_rates: tuple[float, ...] | None = None
        self.state: dict[str, Any] = {
            "version": resume.STATE_VERSION,
            "step": step,
            "position": clock.start_position,
            **sampler.own_state,
            "origin_step": plan.first_step,
            "last_round": saved["last_round"] if saved else None,
            **run.identity(),
        }
        if saved and saved["last_round"] is not None:
            self._restore_rounds(saved["last_round"], step)
        elif not saved and run.processes.is_main:
            resume.set_earlier_run_aside(run.rounds_dir)
        self._plan_next(step)

    def after_step(self, step: int, saves: bool) -> dict[str, float]:
        """Count the rows of an optimizer step; average weights inside the window; check for drift, run a round.

        Args:
            step: optimizer steps done.
            saves: true where a checkpoint of this step is known to follow.

        Returns:
            `mates/...` metrics of what happened at this step, mostly none.
        """
        self.state.update(step=step, position=self.clock.position(step), **self.sampler.own_state)
        rates = tuple(group["lr"] for group in self.run.optimizer.param_groups)
        # A boundary where a scheduler has them at 0 uses the last ones that moved. A rate kept in a tensor is left to
        # the probe: looking at it here would wait for the device at each step.
        if all(isinstance(rate, float) for rate in rates) and any(rates):
            self._learning_rates = rates
        metrics: dict[str, float] = {}
        if self._next_event and step > self._window_start:
            if self.average is not None:
                self.average.update()
            if step == self._next_event:
                metrics = self._look(step)
            elif saves:
                self.save_average(step)
        self.state.pop("weights", None)  # those of an earlier save do not vouch for one that is not known to follow
        if saves:
            self.state["weights"] = weight_marks(self.run.model, self.run.processes)
        return metrics

    def save_average(self, step: int) -> None:
        """Keep the running mean for a checkpoint inside the averaging window; all processes must call it."""
        if self.average is not None and self.average.num_steps and self._average_saved_at != step:
            # Over whatever an earlier attempt at this step left there: its weights may have been others.
            self.average.save(resume.average_path(self.run.rounds_dir, step), self.run.processes)
            self._average_saved_at = step
            if self.run.processes.is_main:
                resume.prune_averages(self.run.rounds_dir, self.output_dir, step)
            self.run.processes.meet()  # a disk that is full fails the main process alone

    def _look(self, step: int) -> dict[str, float]:
        """At averaged weights: a round where one is due, else a drift check, and a round where it finds drift."""
        run, self.last_look = self.run, step
        number = self._next_number(step)
        run.settings = dataclasses.replace(
            run.settings,
            learning_rates=self._learning_rates,
            seed=stage_seed(run.config.selection_seed, number, "probe"),
            rate_steps=self._rate_steps(step),
        )
        if self.order is None and self._next_round is not None:
            self._mark_own_order(self.clock.position(self._next_round.from_step))
        average, self.average = self.average, None
        metrics: dict[str, float] = {}
        with average.swapped_in() if average is not None else contextlib.nullcontext():
            if not run.processes.is_main:
                order = assist(run)
            else:
                order = self._decide(step, metrics)
                release(run, order)
        if order is not None:
            self._schedule(order)
            metrics.update(round_metrics(order.info))
        self._plan_next(step)
        return metrics

    def _next_number(self, step: int) -> int:
        """Number of the round that starts at this step, or would if a drift check found drift."""
        planned = self._next_round
        if planned is not None and step >= planned.boundary_step:
            return planned.number
        assert self.order is not None
        return self.order.number + 1

    def _rate_steps(self, step: int) -> float | None:
        """The coming round in steps at the present rates; at a drift check, that of the round that is checked."""
        planned, run = self._next_round, self.run
        if planned is None or step < planned.boundary_step:
            assert self.order is not None
            found: float | None = self.order.info.get("rate_steps")
            return found
        rates = self._learning_rates or tuple(float(group["lr"]) for group in run.optimizer.param_groups)
        return rate_steps(run.lr_scheduler, min(run.config.update_steps, self.plan.max_steps - step), rates)

    def _decide(self, step: int, metrics: dict[str, float]) -> Order | None:
        """In the main process: the order of a new round, or None where a drift check finds none is due."""
        planned = self._next_round
        if planned is None or step < planned.boundary_step:
            assert self.order is not None
            correlation = check_drift(self.run, round_path(self.run.rounds_dir, self.order.number))
            metrics["mates/drift_spearman"] = correlation
            logger.info("drift check of round %d at step %d: %.3f", self.order.number, step, correlation)
            if correlation >= self.run.config.drift_spearman:
                return None
            planned = self.plan.round_at(self.order.number + 1, step)
            assert planned is not None
            logger.info("labels no longer hold: round %d starts early, at step %d", planned.number, step)
        return self._run_round(planned)

    def _run_round(self, planned: PlannedRound) -> Order:
        """Bring the ledger up to date and run the round."""
        run, clock, sampler = self.run, self.clock, self.sampler
        from_position = clock.position(planned.from_step)
        if self.order is not None:  # what an early start cuts off
            run.ledger.release(np.asarray(_rows_from(self.order, from_position)))
        order = run_round(
            run,
            planned,
            from_position=from_position,
            num_rows=clock.position(planned.to_step) - from_position,
            own_rows=sampler.own_rows,
        )
        run.ledger.mark_trained(np.asarray(order.rows))
        self._prune(planned.number)
        return order

    def _schedule(self, order: Order) -> None:
        """In every process: train on the order from its position on."""
        self.sampler.append(order.from_position, order.rows)
        self.sampler.drop_finished(self.clock.position(order.info["step"]))
        self.order = order
        self.state["last_round"] = {name: order.info[name] for name in ("number", "step", "order_sha256")}

    def _mark_own_order(self, from_position: int) -> None:
        """Before the first selection: the rows that the Trainer's own order consumes in its running pass."""
        sampler = self.sampler
        pass_end = sampler.own_start + self.clock.rows_per_epoch
        if from_position < pass_end:
            self.run.ledger.mark_trained(sampler.own_order_until(from_position))
        elif from_position > pass_end:
            # A next pass would begin inside the lead, with a permutation not drawn yet. Until the selection takes
            # effect the present one goes on from its beginning (`ScheduledSampler`), as a fresh pass may.
            self.run.ledger.mark_trained(sampler.own_rows[: from_position - pass_end])

    def _plan_next(self, step: int) -> None:
        """The next round and drift check after `step`, and the averaging window before the earlier of them."""
        self._next_round = planned = self._planned_after(self.order, step)
        events = [planned.boundary_step] if planned is not None else []
        check = self._next_check(step)
        if check is not None and (planned is None or check < planned.boundary_step):
            events.append(check)
        self._next_event = min(events, default=0)
        self.average = None
        window = self.run.config.window_steps
        self._window_start = self._next_event - max(window, 1)
        if window and self._next_event:
            self.average = WeightAverage(self.run.model)
            path = resume.average_path(self.run.rounds_dir, step)
            if step > self._window_start and not self.average.load(path, self.run.processes):
                logger.warning(
                    "The running mean of the weights at step %d is not in %s: the next round averages from here on, "
                    "so its labels differ from the uninterrupted run's.", step, self.run.rounds_dir,
                )  # fmt: skip

    def _planned_after(self, order: Order | None, step: int) -> PlannedRound | None:
        """The round planned after `order`, or the first one, whose boundary is behind `step`."""
        plan, length = self.plan, self.run.config.update_steps
        planned = plan.rounds[0] if order is None else plan.round_at(order.number + 1, order.info["step"] + length)
        while planned is not None and planned.boundary_step <= step:
            planned = plan.round_at(planned.number + 1, planned.boundary_step + length)
        return planned

    def _next_check(self, step: int) -> int | None:
        """The step of the next drift check, or None where there is none or no round could start from it."""
        every, order = self.run.config.drift_check_steps, self.order
        if every is None or order is None or order.info["guard"]["decision"] == "own_order":
            return None
        boundary = int(order.info["step"])
        first = -(-self.run.config.lead_steps // every)  # the first check at which the round's rows are in training
        check = boundary + every * max(first, (step - boundary) // every + 1)
        return check if self.plan.round_at(order.number + 1, check) is not None else None

    def _restore_rounds(self, last_round: Mapping[str, Any], step: int) -> None:
        """Orders, ledger and influence models as they were in memory at `step`."""
        run, start = self.run, self.clock.start_position
        if not run.processes.is_main:
            message, arrays = run.processes.receive()
            orders = [Order(rows=arrays[str(order["number"])], **order) for order in message["orders"]]
        else:
            path = resume.require_round(run.rounds_dir, last_round, step)
            last = load_order(path)
            earlier = resume.round_before(run.rounds_dir, last.number)
            orders = []
            if last.from_position > start and earlier is not None:
                orders.append(self._restore_order(earlier, last.from_position))
            planned = self._planned_after(last, step)
            until = self.clock.position(planned.from_step if planned is not None else self.plan.max_steps)
            orders.append(self._restore_order(path, until))
            self._restore_models(last.number)
            run.processes.publish(
                {
                    "orders": [
                        {"number": order.number, "from_position": order.from_position, "info": dict(order.info)}
                        for order in orders
                    ]
                },
                **{str(order.number): np.asarray(order.rows, np.int64) for order in orders},
            )
        self.order = orders[-1]
        for order in orders:
            if order.from_position + len(order.rows) > start:
                self.sampler.append(max(order.from_position, start), _rows_from(order, start))

    def _restore_order(self, path: Path, until: int) -> Order:
        """A finished round's order that lasts until a position, and the ledger as it was when that was decided.

        A larger batch or more steps than planned use it up sooner. What is missing are unused rows in the order of the
        shuffled pool, none of them probed in that round. They depend on the round alone, so that a second resume
        trains on the same ones.
        """
        run, order = self.run, load_order(path)
        bits = read_array(path / "consumed.npy", np.uint8)
        if bits is None:
            raise MatesError(f"`{path}` must hold consumed.npy, which says what was trained on before it, got none.")
        cursor = int(order.info["cursor"])
        before = read_array(path / "probed.npy", np.uint8)  # not there in rounds of earlier versions
        run.ledger = Ledger.from_bits(
            np.asarray(bits),
            len(run.pool),
            run.config.selection_seed,
            cursor,
            None if before is None else np.asarray(before),
        )
        probed = probed_rows(read_labels(path / PROBES_FILE))
        run.ledger.mark_probed(probed)
        missing = until - order.from_position - len(order.rows)
        if missing > 0:
            more = run.ledger.rows_after(order.rows, missing, exclude=probed)
            logger.warning(
                "The selection of round %d ends %d rows before the next one begins, because the batch is larger or "
                "`max_steps` is higher than when it was made: unused rows of the pool follow it, at random.",
                order.number, missing,
            )  # fmt: skip
            order = dataclasses.replace(order, rows=np.concatenate([order.rows, more]))
        run.ledger.mark_trained(np.asarray(order.rows))
        return order

    def _restore_models(self, number: int) -> None:
        """The last round's influence model, and the last that passed the guard."""
        run = self.run
        passed, fitted = resume.last_passed(run.rounds_dir, number), resume.last_fitted(run.rounds_dir, number)
        for earlier in sorted({each for each in (passed, fitted) if each is not None}):
            path = round_path(run.rounds_dir, earlier)
            run.remember(run.load_model(path), load_order(path).info)
        run.note_decision(load_order(round_path(run.rounds_dir, number)).info)

    def _prune(self, number: int) -> None:
        """Bound the disk: delete rounds older than `keep_rounds` that no resume would ask for."""
        keep = self.run.config.keep_rounds
        if keep is not None:
            resume.prune_rounds(self.run.rounds_dir, self.output_dir, number, keep)


def round_metrics(info: Mapping[str, Any]) -> dict[str, float]:
    """`mates/...` metrics of a round, from its `round.json`."""
    metrics: dict[str, float] = {
        "mates/round": info["number"],
        "mates/spearman": info["guard"]["spearman"],
        "mates/spearman_low": info["guard"]["interval"][0],
        "mates/spearman_high": info["guard"]["interval"][1],
        "mates/selected": float(info["guard"]["decision"] != "own_order"),
        "mates/reversed": float(info["guard"].get("reversed", False)),
        "mates/num_rows": info["num_rows"],
        "mates/num_candidates": info["num_candidates"],
        "mates/num_probed": info["num_probed"],
        "mates/seconds": sum(stage["seconds"] for stage in info["stages"].values()),
    }
    if "previous_spearman" in info["guard"]:
        metrics["mates/previous_spearman"] = info["guard"]["previous_spearman"]
    if "reference_loss" in info["probe"]:
        metrics["mates/reference_loss"] = info["probe"]["reference_loss"]
    if "spearman" in info["fidelity"]:
        metrics["mates/fidelity"] = info["fidelity"]["spearman"]
    for name, stage in info["stages"].items():
        metrics[f"mates/{name}_seconds"] = stage["seconds"]
    return metrics


def _rows_from(order: Order, position: int) -> npt.NDArray[Any]:
    """The rows of an order at and after a global position."""
    rows: npt.NDArray[Any] = order.rows[max(0, position - order.from_position) :]
    return rows
