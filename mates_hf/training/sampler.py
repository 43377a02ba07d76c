"""The data order: global row position -> pool row, through a schedule that grows while the run goes on.

Place in the flow: `MatesCallback` puts a `ScheduledSampler` where the dataloader's own sampler was and appends each
round's order to it. The order of rows is then a pure function of config, seed and selections: the same for any number
of dataloader workers, and across a resume.

Trade-off: positions are counted in rows, not in steps or batches, so that a changed batch size moves no row; the price
is that someone has to know how steps and rows relate. That is `RowClock`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from mates_hf.records import IntArray, MatesError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowClock:
    """How optimizer steps and epochs of this `train()` call relate to global row positions.

    Attributes:
        batches_per_epoch: batches one process takes from the dataloader in an epoch.
        accumulation: batches in one optimizer step; the last step of an epoch may have fewer.
        batch_rows: rows in one batch over all processes.
        start_step: the optimizer step this call starts after (0, or the resumed one).
        start_position: rows consumed by then.
        first_epoch: the epoch the Trainer starts in.
        first_epoch_step: the optimizer step at which that epoch counts as begun (what the Trainer skips up to).
    """

    batches_per_epoch: int
    accumulation: int
    batch_rows: int
    start_step: int = 0
    start_position: int = 0
    first_epoch: int = 0
    first_epoch_step: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the ragged last one included."""
        return max(1, math.ceil(self.batches_per_epoch / self.accumulation))

    @property
    def rows_per_epoch(self) -> int:
        """Row positions in an epoch: a multiple of `batch_rows`."""
        return self.batches_per_epoch * self.batch_rows

    def _rows_from_epoch_start(self, steps: int) -> int:
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.rows_per_epoch + min(rest * self.accumulation, self.batches_per_epoch) * self.batch_rows

    def epoch_position(self, epoch: int) -> int:
        """Global position of the first row the sampler is asked for in `epoch` (maybe before `start_position`)."""
        skipped = self._rows_from_epoch_start(self.start_step - self.first_epoch_step)
        return self.start_position - skipped + (epoch - self.first_epoch) * self.rows_per_epoch

    def position(self, step: int) -> int:
        """Rows consumed once `step` optimizer steps are done, for any step of this call."""
        return self.epoch_position(self.first_epoch) + self._rows_from_epoch_start(step - self.first_epoch_step)


class ScheduledSampler(Sampler[int]):
    """A sampler whose later rows are decided while the earlier ones train.

    Until the first appended order takes effect it yields what the dataloader's own sampler yields, drawn at the same
    moment of the same random streams, so a run that never appends is the run without it.

    Args:
        own: the sampler that was there.
        clock: steps and positions of this call.
        own_start: global position at which the running pass in the Trainer's own order began; None: with the epoch.
    """

    def __init__(self, own: Any, clock: RowClock, own_start: int | None = None) -> None:
        self.own = own
        self.clock = clock
        self.epoch = clock.first_epoch
        self.own_rows: IntArray = np.zeros(0, np.int64)
        self.own_start = clock.epoch_position(clock.first_epoch) if own_start is None else own_start
        self.drawn_position = clock.start_position
        self._orders: list[tuple[int, npt.NDArray[Any]]] = []

    def __len__(self) -> int:
        return self.clock.rows_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch; passed on to the sampler that was there."""
        self.epoch = epoch
        if hasattr(self.own, "set_epoch"):
            self.own.set_epoch(epoch)

    def append(self, from_position: int, rows: npt.NDArray[Any]) -> None:
        """Let `rows` be trained on, in this order, from `from_position` on.

        Args:
            from_position: global row position of the first of them.
            rows: (k,) pool rows.

        Raises:
            MatesError: rows at that position were already handed to the dataloader, so they could not be replaced.
        """
        if from_position < self.drawn_position:
            raise MatesError(
                f"A selection must take effect at a row position not yet fetched ({self.drawn_position} and later), "
                f"got {from_position}: the dataloader looks further ahead than `switch_lead_steps` covers. Raise "
                "`switch_lead_steps`, or lower `dataloader_num_workers` or `dataloader_prefetch_factor`."
            )
        self._orders = [order for order in self._orders if order[0] != from_position]
        self._orders.append((from_position, rows))
        self._orders.sort(key=lambda order: order[0])

    def drop_finished(self, position: int) -> None:
        """Forget orders that ended before `position`, so that a long run holds two at most."""
        later = [order for order in self._orders if order[0] > position]
        current = [order for order in self._orders if order[0] <= position][-1:]
        self._orders = current + later

    def own_order_from(self, position: int) -> IntArray:
        """Rows of the running own-order pass that lie at or after a global position, (M,) int64."""
        return self.own_rows[max(0, position - self.own_start) :]

    def own_order_until(self, position: int) -> IntArray:
        """Rows of the running own-order pass that lie before a global position, (M,) int64."""
        return self.own_rows[: max(0, position - self.own_start)]

    def __iter__(self) -> Iterator[int]:
        start = self.clock.epoch_position(self.epoch)
        # The whole permutation is drawn here, at the moment the sampler that was there would draw its own.
        self.own_rows = np.fromiter(iter(self.own), np.int64, count=len(self.own))
        if self.epoch != self.clock.first_epoch:
            self.own_start = start
        for position in range(start, start + self.clock.rows_per_epoch):
            if position < self.clock.start_position:
                yield 0  # the Trainer throws these away while it skips to where it stopped; no row is read
                continue
            row = self._row_at(position)
            if row is None:
                return
            self.drawn_position = max(self.drawn_position, position + 1)
            yield row

    def _row_at(self, position: int) -> int | None:
        """The pool row at a position, or None behind the end of the schedule."""
        order: tuple[int, Sequence[Any] | npt.NDArray[Any]] = (self.own_start, self.own_rows)
        for candidate in self._orders:
            if candidate[0] > position:
                break
            order = candidate
        index = position - order[0]
        return int(order[1][index]) if index < len(order[1]) else None
