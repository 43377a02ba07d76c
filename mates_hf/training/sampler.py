"""The data order: global row position -> pool row, through a schedule that grows while the run goes on.

Place in the flow: `MatesCallback` puts a `ScheduledSampler` where the dataloader's own sampler was and appends each
round's order to it. The order of rows is then a pure function of config, seed and selections: the same for any number
of dataloader workers, and across a resume.

Trade-off: positions are counted in rows, not in steps or batches, so that a changed batch size moves no row; the price
is that someone has to know how steps and rows relate. That is `RowClock`. A resumed run draws the Trainer's own order
again instead of reading it from disk, and proves by its hash that it is the same.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from mates_hf.records import IntArray, MatesError

logger = logging.getLogger(__name__)


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
        saved: `own_state` in the checkpoint that is resumed; None where there is none.
        finished: the run that is resumed has taken all its steps. It gets no row: given one, the Trainer, which looks
            at `max_steps` behind a step, would take another.

    Attributes:
        own_rows: (N,) int64, the running pass in the Trainer's own order; empty until it is drawn.
        own_start: global position at which that pass began.
        own_state: what a checkpoint holds of that pass, JSON values.
        drawn_position: global position behind the last row that was handed to the dataloader.
    """

    def __init__(
        self, own: Any, clock: RowClock, saved: Mapping[str, Any] | None = None, *, finished: bool = False
    ) -> None:
        self.own = own
        self.clock = clock
        self.epoch = clock.first_epoch
        self.own_rows: IntArray = np.zeros(0, np.int64)
        self.own_start = clock.epoch_position(clock.first_epoch)
        self._own_epoch = clock.first_epoch
        self._saved = saved
        if saved is not None:
            self.own_start, self._own_epoch = int(saved["own_start"]), int(saved["own_epoch"])
        self.own_state = self._describe_pass("", "")
        self.drawn_position = clock.start_position
        self._finished = finished
        self._orders: list[tuple[int, npt.NDArray[Any]]] = []

    def _describe_pass(self, sha256: str, random: str) -> dict[str, Any]:
        return {
            "own_start": self.own_start,
            "own_epoch": self._own_epoch,
            "own_sha256": sha256,
            "own_random": random,
        }

    def __len__(self) -> int:
        return self.clock.rows_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch; passed on to the sampler that was there.

        A run that resumes inside its second or a later epoch is told epoch 0 by accelerate before 1.15, whose
        `skip_first_batches` forgets the epoch (`checks.resume_caveats`); none before the first of this call can be
        meant.
        """
        self.epoch = max(epoch, self.clock.first_epoch)
        if hasattr(self.own, "set_epoch"):
            self.own.set_epoch(self.epoch)

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

    def own_order_until(self, position: int) -> IntArray:
        """Rows of the running own-order pass that lie before a global position, (M,) int64."""
        return self.own_rows[: max(0, position - self.own_start)]

    def __iter__(self) -> Iterator[int]:
        start = self.clock.epoch_position(self.epoch)
        self._begin_pass(start)
        for position in range(start, start + self.clock.rows_per_epoch):
            if position < self.clock.start_position:
                yield 0  # the Trainer throws these away while it skips to where it stopped; no row is read
                continue
            row = None if self._finished else self._row_at(position)
            if row is None:
                return
            self.drawn_position = max(self.drawn_position, position + 1)
            yield row

    def _begin_pass(self, start: int) -> None:
        """Draw the whole permutation, at the moment the sampler that was there would draw its own.

        A resumed run goes on in the pass it was in, also where the Trainer would begin its epoch anew
        (`ignore_data_skip`) or elsewhere (another batch size). A first selection that was scheduled before an epoch
        began has counted on the rows of the pass before, so that pass goes on until then.

        Args:
            start: global position at which the epoch begins.

        Raises:
            MatesError: a resumed run goes on in the Trainer's own order, and the order is another one now.
        """
        saved, self._saved = self._saved, None
        is_first = self.epoch == self.clock.first_epoch
        goes_on = is_first and self.own_start + self.clock.rows_per_epoch > start
        awaited = bool(self._orders) and self._orders[0][0] > start
        if awaited and len(self.own_rows):
            return
        if not (goes_on or awaited):
            self.own_start, self._own_epoch, saved = start, self.epoch, None
        self._draw_own_order(saved or {})

    def _draw_own_order(self, saved: Mapping[str, Any]) -> None:
        """The permutation of `_own_epoch`, checked against the one that a checkpoint tells of."""
        if hasattr(self.own, "set_epoch"):
            self.own.set_epoch(self._own_epoch)
        with torch.random.fork_rng(devices=[], enabled=bool(saved.get("own_random"))):
            if saved.get("own_random"):
                state = np.frombuffer(base64.b64decode(saved["own_random"]), np.uint8)
                torch.set_rng_state(torch.from_numpy(state.copy()))
            # A sampler that is not seeded by epoch draws from torch's own stream, whose state at this moment a resumed
            # run does not have otherwise: the Trainer restores the one of the checkpoint, which is later.
            random = b"" if hasattr(self.own, "set_epoch") else torch.get_rng_state().numpy().tobytes()
            self.own_rows = np.fromiter(iter(self.own), np.int64, count=len(self.own))
        sha256 = hashlib.sha256(self.own_rows.data).hexdigest()
        self.own_state = self._describe_pass(sha256, base64.b64encode(random).decode())
        expected = saved.get("own_sha256")
        if not expected or expected == sha256:
            return
        if not self._orders or self._orders[0][0] > self.clock.start_position:
            raise MatesError(
                f"A resumed run must go on in the order of rows that it was in, but the Trainer's own order has the "
                f"SHA-256 {sha256[:12]} now and had {expected[:12]} when the checkpoint was saved. Set "
                "`seed`, `data_seed`, `accelerator_config.use_seedable_sampler` and `train_sampling_strategy` as they "
                "were, or start a new run in another `output_dir`."
            )
        logger.warning(
            "The Trainer's own order is another one than before the resume (is `data_seed` another?). Selections go "
            "on exactly; a round that the guard sends back to that order takes other rows."
        )

    def _row_at(self, position: int) -> int | None:
        """The pool row at a position, or None behind the end of the schedule."""
        order: tuple[int, Sequence[Any] | npt.NDArray[Any]] | None = None
        for candidate in self._orders:
            if candidate[0] > position:
                break
            order = candidate
        if order is None:
            return self._own_row_at(position)
        index = position - order[0]
        return int(order[1][index]) if index < len(order[1]) else None

    def _own_row_at(self, position: int) -> int | None:
        """The row of the Trainer's own order at a position."""
        index = position - self.own_start
        if self.own_start == self.clock.epoch_position(self.epoch):  # ends where the epoch ends, maybe inside a batch
            return int(self.own_rows[index]) if index < len(self.own_rows) else None
        # A pass that does not end with the epoch is followed by itself: a fresh pass may use its rows again.
        return int(self.own_rows[index % self.clock.rows_per_epoch % len(self.own_rows)])
