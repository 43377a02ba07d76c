"""How optimizer steps and epochs of a `train()` call relate to global row positions.

Where it is used: `MatesCallback` makes a `RowClock` of what the Trainer says at its start. The sampler, the session
and the plan (`selection/plan`) ask it, so that none of them counts for itself.

Where passages of the reference task are mixed in (`MatesConfig.reference_passes`), they stand at some of the
positions. Orders, rounds and the plan count pool rows alone; without passages a pool row's number is its position.

Trade-off: a pure function of a few numbers, so that any step can be asked for at any time; where a callback ends an
epoch before its time, another clock takes over.
"""

from __future__ import annotations

import dataclasses
import math

from mates_hf.data.mixing import PassageSchedule
from mates_hf.errors import MatesError


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
        own_start: position at which the pass in the Trainer's own order began that a resumed run was in; None where
            that is for the first epoch to say.
        passages: where passages of the reference task stand among the rows; None where there are none.
    """

    batches_per_epoch: int
    accumulation: int
    batch_rows: int
    start_step: int = 0
    start_position: int = 0
    first_epoch: int = 0
    first_epoch_step: int = 0
    own_start: int | None = None
    passages: PassageSchedule | None = None

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

    def pool_rows(self, position: int) -> int:
        """Pool rows before a position."""
        return position if self.passages is None else self.passages.pool_rows(position)

    def pool_position(self, step: int) -> int:
        """Pool rows consumed once `step` optimizer steps are done."""
        return self.pool_rows(self.position(step))

    def next_pool_row(self, position: int) -> int:
        """The first position from this one on at which a pool row stands."""
        return position if self.passages is None else self.passages.next_pool_row(position)

    def position_of(self, pool_row: int) -> int:
        """Position of a pool row that so many others stand before."""
        return pool_row if self.passages is None else self.passages.position_of(pool_row)

    @property
    def uneven_rows(self) -> int:
        """Pool rows that a stretch of steps may have more than another one of as many whole steps."""
        return 0 if self.passages is None else 1

    def ending_at(self, max_steps: int) -> RowClock:
        """The clock of this run if it had so many steps: passages of a run that has not begun are spread over them."""
        if self.passages is None or self.passages.start < self.start_position:
            return self
        num_rows = max(self.position(max_steps) - self.passages.start, 0)
        return dataclasses.replace(self, passages=dataclasses.replace(self.passages, num_rows=num_rows))

    def goes_on(self, own_start: int) -> bool:
        """Whether the first epoch goes on in the pass that began at `own_start`, however the epoch begins."""
        return own_start + self.rows_per_epoch > self.epoch_position(self.first_epoch)

    def own_rows_used(self, boundary_step: int, from_step: int) -> int:
        """Pool rows of the own-order pass that runs at a boundary which are trained on before a later step.

        A pass that ends between the two goes on from its beginning (`ScheduledSampler`), as a fresh pass may.

        Args:
            boundary_step: optimizer steps done when the first selection is made.
            from_step: first optimizer step (counted from 0) that trains on it.

        Returns:
            How many, counted from the beginning of the pass; 0 where a fresh one begins with `from_step`.
        """
        epochs = max(boundary_step - self.first_epoch_step - 1, 0) // self.steps_per_epoch
        began = self.epoch_position(self.first_epoch + epochs)
        if not epochs and self.own_start is not None and self.goes_on(self.own_start):
            began = self.own_start
        return self.rows_of_pass(began, self.position(from_step))

    def rows_of_pass(self, began: int, position: int) -> int:
        """Pool rows of a pass in the own order before a position; a pass that ended goes on from its beginning.

        Args:
            began: position at which the pass began.
            position: any position behind that.

        Returns:
            How many, counted from the last beginning.
        """
        return self.pool_rows(position) - self.pool_rows(position - (position - began) % self.rows_per_epoch)

    def restarted(self, step: int, epoch: int) -> RowClock:
        """The clock of a run whose epoch was ended after `step` steps, before its time.

        Args:
            step: optimizer steps done.
            epoch: the epoch that begins there.

        Returns:
            A clock that agrees with this one about every row up to there.

        Raises:
            MatesError: rounds that are planned already would move against the rows, because an epoch's last step is
                shorter than others.
        """
        if self.batches_per_epoch % self.accumulation:
            raise MatesError(
                f"An epoch must end by itself where its last step has fewer batches than others "
                f"({self.batches_per_epoch} batches, `gradient_accumulation_steps` {self.accumulation}); a callback "
                f"set `control.should_epoch_stop` at step {step}, inside one. Let that callback set "
                "`control.should_training_stop` and resume, or choose `gradient_accumulation_steps` so that it "
                "divides the batches of an epoch."
            )
        position = self.position(step)
        return dataclasses.replace(
            self,
            start_step=step,
            start_position=position,
            first_epoch=epoch,
            first_epoch_step=step,
            own_start=position,
        )
