"""One `train()` call with a schedule: when rounds happen, what they may draw from, and going on after a stop.

Place in the flow: `MatesCallback` opens a `Session` in `on_train_begin` and tells it of every optimizer step; the
session runs the rounds (`rounds.run_round`) and feeds their orders to the `ScheduledSampler`.

Trade-off: everything that lives as long as one `train()` call is here, so that the callback itself can be reused,
retried with a smaller batch, or trained twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.records import round_path
from mates_hf.selection.ledger import Ledger, PlannedRound
from mates_hf.training import resume
from mates_hf.training.averaging import WeightAverage
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
        rounds: the planned rounds, in order.
        output_dir: where the Trainer's checkpoints go.
        origin_step: the optimizer step from which rounds are counted.
        step: the optimizer step the call starts after.
        resumed: true where the checkpoint holds this library's state.
    """

    def __init__(
        self,
        run: Run,
        clock: RowClock,
        sampler: ScheduledSampler,
        rounds: Sequence[PlannedRound],
        *,
        output_dir: Path,
        origin_step: int,
        step: int,
        resumed: bool,
    ) -> None:
        self.run, self.clock, self.sampler, self.rounds = run, clock, sampler, rounds
        self.output_dir = output_dir
        self.next_round: PlannedRound | None = None
        self.average: WeightAverage | None = None
        self._window_start = 0
        self._average_saved_at = -1
        self._learning_rates: tuple[float, ...] | None = None
        self.state: dict[str, Any] = {
            "version": resume.STATE_VERSION,
            "position": clock.start_position,
            "own_start": sampler.own_start,
            "origin_step": origin_step,
            **run.identity(),
        }
        if resumed:
            self._restore_rounds(step)
        else:
            resume.set_earlier_run_aside(run.rounds_dir)
        self._plan_next(step)

    def after_step(self, step: int, saves: bool) -> Order | None:
        """Count the rows of an optimizer step; average weights inside the window; at a boundary, run a round.

        Args:
            step: optimizer steps done.
            saves: true where a checkpoint of this step is known to follow.

        Returns:
            The order of the round run at this step, or None.
        """
        self.state["position"] = self.clock.position(step)
        self.state["own_start"] = self.sampler.own_start
        rates = tuple(group["lr"] for group in self.run.optimizer.param_groups)
        # A boundary where a scheduler has them at 0 uses the last ones that moved. A rate kept in a tensor is left to
        # the probe: looking at it here would wait for the device at each step.
        if all(isinstance(rate, float) for rate in rates) and any(rates):
            self._learning_rates = rates
        order = None
        planned = self.next_round
        if planned is not None and step > self._window_start:
            if self.average is not None:
                self.average.update()
            if step == planned.boundary_step:
                order = self._run_round(planned)
            elif saves:
                self.save_average(step)
        if saves:
            self.state["weights"] = resume.weight_marks(self.run.model)
        return order

    def save_average(self, step: int) -> None:
        """Keep the running mean for a checkpoint inside the averaging window."""
        if self.average is not None and self.average.num_steps and self._average_saved_at != step:
            # Over whatever an earlier attempt at this step left there: its weights may have been others.
            self.average.save(resume.average_path(self.run.rounds_dir, step))
            self._average_saved_at = step
            resume.prune_averages(self.run.rounds_dir, self.output_dir, step)

    def _run_round(self, planned: PlannedRound) -> Order:
        """Bring the ledger up to date, run the round at averaged weights, append its order to the schedule."""
        run, clock, sampler = self.run, self.clock, self.sampler
        from_position = clock.position(planned.from_step)
        if planned is self.rounds[0]:
            self._mark_own_order(from_position)
        run.settings = dataclasses.replace(run.settings, learning_rates=self._learning_rates)
        average, self.average = self.average, None
        with average.swapped_in() if average is not None else contextlib.nullcontext():
            order = run_round(
                run,
                planned,
                from_position=from_position,
                num_rows=clock.position(planned.to_step) - from_position,
                own_rows=sampler.own_rows,
            )
        sampler.append(order.from_position, order.rows)
        sampler.drop_finished(clock.position(planned.boundary_step))
        run.ledger.mark_trained(np.asarray(order.rows))
        self._plan_next(planned.boundary_step)
        self._prune(planned.number)
        return order

    def _mark_own_order(self, from_position: int) -> None:
        """Before the first selection: the rows that the Trainer's own order consumes in its running pass."""
        sampler = self.sampler
        pass_end = sampler.own_start + self.clock.rows_per_epoch
        if from_position < pass_end:
            self.run.ledger.mark_trained(sampler.own_order_until(from_position))
        elif from_position > pass_end:
            # A next pass would begin inside the lead, with a permutation not drawn yet. Its first rows are the present
            # permutation's, which a fresh pass may use again.
            lead_rows = sampler.own_rows[: from_position - pass_end]
            sampler.append(pass_end, lead_rows)
            self.run.ledger.mark_trained(lead_rows)

    def _plan_next(self, step: int) -> None:
        """The next round after `step`, and the averaging window before it."""
        self.next_round = next((planned for planned in self.rounds if planned.boundary_step > step), None)
        self.average = None
        if self.next_round is None:
            return
        window = self.run.config.window_steps
        self._window_start = self.next_round.boundary_step - max(window, 1)
        if window:
            self.average = WeightAverage(self.run.model)
            path = resume.average_path(self.run.rounds_dir, step)
            if step > self._window_start and not self.average.load(path):
                logger.warning(
                    "The running mean of the weights at step %d is not in %s: the next round averages from here on, "
                    "so its labels differ from the uninterrupted run's.", step, self.run.rounds_dir,
                )  # fmt: skip

    def _restore_rounds(self, step: int) -> None:
        """Orders, ledger and influence models as they were in memory at `step`."""
        run, start = self.run, self.clock.start_position
        done = [planned for planned in self.rounds if planned.boundary_step <= step]
        if not done:
            return
        paths = [resume.require_round(run.rounds_dir, planned.number, step) for planned in done[-2:]]
        orders = [load_order(path) for path in paths]
        bits = np.load(paths[-1] / "consumed.npy", allow_pickle=False)
        run.ledger = Ledger.from_bits(bits, len(run.pool), run.config.selection_seed, int(orders[-1].info["cursor"]))
        run.ledger.mark_trained(np.asarray(orders[-1].rows))
        for order in orders:
            if order.from_position + len(order.rows) > start:
                self.sampler.append(max(order.from_position, start), _rows_from(order, start))
        for planned in done:
            path = round_path(run.rounds_dir, planned.number)
            if path.exists():
                run.remember(run.load_model(path), load_order(path).info)

    def _prune(self, number: int) -> None:
        """Bound the disk: delete rounds older than `keep_rounds`."""
        keep = self.run.config.keep_rounds
        if keep is None:
            return
        for path in self.run.rounds_dir.glob("round-*"):
            digits = path.name.removeprefix("round-").split(".")[0]
            if digits.isdigit() and int(digits) <= number - keep:
                shutil.rmtree(path)


def round_metrics(info: Mapping[str, Any]) -> dict[str, float]:
    """`mates/...` metrics of a round, from its `round.json`."""
    metrics: dict[str, float] = {
        "mates/round": info["number"],
        "mates/spearman": info["guard"]["spearman"],
        "mates/spearman_low": info["guard"]["interval"][0],
        "mates/spearman_high": info["guard"]["interval"][1],
        "mates/selected": float(info["guard"]["decision"] != "own_order"),
        "mates/num_rows": info["num_rows"],
        "mates/num_candidates": info["num_candidates"],
        "mates/num_probed": info["num_probed"],
        "mates/seconds": sum(stage["seconds"] for stage in info["stages"].values()),
    }
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
