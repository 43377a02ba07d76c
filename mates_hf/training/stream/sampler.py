"""The order of a streamed pool: a buffer is read, scored, chosen from and spooled when its first row is asked for.

Where it is used: in the place of `ScheduledSampler`, where the Trainer was given a `MatesStream`. Rows are handed out
by their numbers in the stream. Which buffer holds the rows that are in training, and where it begins in the source, is
in each checkpoint (`state_at`), so that a run that resumes reads one buffer again and no more.

A round's rule takes effect at the first buffer that begins at its position or later. A buffer is made when the last
whole optimizer step before it has been handed out, not earlier, so a rule that comes in time changes no row that a
dataloader has fetched, however far ahead that looks.

Trade-off: a buffer is scored while the dataloader waits for its first row; reading it does not wait, since a thread
reads ahead. A dataloader's workers fetch meanwhile what they were told before.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from mates_hf.data.stream import LENGTH
from mates_hf.data.stream_reader import BufferReader
from mates_hf.errors import MatesError
from mates_hf.records import IntArray
from mates_hf.training.clock import RowClock
from mates_hf.training.order import Order
from mates_hf.training.stream.maker import BufferMaker
from mates_hf.training.stream.rules import Rule


class StreamEndedError(MatesError):
    """The stream ended before the run's last step."""


class Made(NamedTuple):
    """A buffer that was made, or is to be made again.

    Attributes:
        number: Number of the buffer, from 0.
        position: pool rows before its first.
        place: Place of its first row in the source; JSON values.
    """

    number: int
    position: int
    place: dict[str, Any]


class StreamSampler(Sampler[int]):
    """Gives the rows of a stream, as buffers come.

    Args:
        maker: makes buffers.
        clock: steps and positions of this call.
        saved: this library's state in the checkpoint that is resumed; None where there is none.
        step_rows: rows of an optimizer step; rows are handed out in whole steps.
        finished: the run that is resumed has taken all its steps, and gets no row.

    Attributes:
        ended: rows of the stream, once its end was read; None before.
    """

    own = None
    each_once = True
    unproven = False
    keeps_own_rows = False
    before_pass: Callable[[int], None] | None = None  # a stream has no passes

    def __init__(
        self,
        maker: BufferMaker,
        clock: RowClock,
        saved: Mapping[str, Any] | None,
        *,
        step_rows: int,
        finished: bool = False,
    ) -> None:
        self.maker, self.clock, self.epoch = maker, clock, clock.first_epoch
        self.own_rows: npt.NDArray[Any] = np.zeros(0, np.int64)
        self.own_rows_once = self.own_rows
        self.own_start = 0
        self.ended: int | None = None
        self._end_position = 0  # behind the last row that is handed out, once `ended` is known
        self._step_rows, self._finished = step_rows, finished
        self._rules = [Rule()]
        start = clock.pool_rows(clock.start_position)
        first = Made(0, start, maker.source.beginning)
        self._first = first if saved is None else Made(**saved["stream"]["buffer"])
        self._made: list[Made] = []
        self._reader: BufferReader | None = None
        self._block: list[int] = []
        self._block_start = clock.start_position
        self._left: Iterator[int] = iter(self._block)

    @property
    def own_state(self) -> dict[str, Any]:
        """What a checkpoint holds before the first step."""
        return self.state_at(self.clock.start_position)

    def state_at(self, position: int) -> dict[str, Any]:
        """What a checkpoint holds once the rows before a position are trained on, JSON values.

        Files of buffers that are two or more behind are deleted.
        """
        consumed = self.clock.pool_rows(position)
        here = [made for made in self._made if made.position <= consumed][-1:] or [self._first]
        if here[0] is not self._first:
            self._first = here[0]
            self._made = [made for made in self._made if made.position >= here[0].position]
            self.maker.spool.drop_before(here[0].number - 1)
        self.maker.passed(consumed)
        stream = {"buffer": self._first._asdict(), "sizes": list(self.maker.sizes)}
        return {"own_start": 0, "own_epoch": 0, "own_sha256": "", "own_random": "", "stream": stream}

    @property
    def first_position(self) -> int:
        """Pool rows before the buffer in training."""
        return self._first.position

    @property
    def first_number(self) -> int:
        """Number of the buffer in training."""
        return self._first.number

    def begin(self) -> None:
        """Have an empty folder for the rows of this run's buffers."""
        self.maker.begin()

    @property
    def drawn_position(self) -> int:
        """Global position behind the last row that was handed to the dataloader."""
        return self._block_start + len(self._block) - operator.length_hint(self._left)

    def __len__(self) -> int:
        return self.clock.rows_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch; a stream has one."""
        self.epoch = max(epoch, self.clock.first_epoch)

    def take(self, order: Order) -> None:
        """Select from buffers by a round's rule, from the first that begins at its position or later.

        Args:
            order: the round's.

        Raises:
            MatesError: such a buffer was made already.
        """
        late = [made for made in self._made if made.position >= order.from_position]
        if late:
            raise MatesError(
                f"A selection must take effect at a buffer of the stream that is not made yet, but the one at row "
                f"position {late[0].position} was, and the selection is to begin at {order.from_position}: the "
                "dataloader looks further ahead than `switch_lead_steps` covers. Raise `switch_lead_steps`, or lower "
                "`dataloader_num_workers` or `dataloader_prefetch_factor`."
            )
        self.select_by(Rule.of(self.maker.run, order))

    def select_by(self, rule: Rule) -> None:
        """Select from buffers by a rule, from the first that begins at its position or later."""
        self._rules = [each for each in self._rules if each.from_position < rule.from_position or each.number < 0]
        self._rules.append(rule)

    def drop_finished(self, position: int) -> None:
        """Forget rules by which no buffer is made any more."""
        oldest = self._first.position
        later = [rule for rule in self._rules if rule.from_position > oldest]
        self._rules = [rule for rule in self._rules if rule.from_position <= oldest][-1:] + later

    def uses_own_rows(self, position: int) -> bool:
        """False: there is no order to be proven equal in all processes before it is read."""
        return False

    def restart(self, step: int) -> None:
        """Never called, since no epoch ends early."""

    def ended_early(self, step: int) -> bool:
        """False: a stream has one epoch."""
        return False

    def is_over(self, step: int) -> bool:
        """Whether the stream has no whole step more after `step` steps."""
        return self.ended is not None and self.clock.position(step) >= self._end_position

    def require_more(self, step: int, max_steps: int) -> None:
        """Refuse to end a run before its time because its stream did.

        Args:
            step: optimizer steps done.
            max_steps: optimizer steps of the run.

        Raises:
            StreamEndedError: says how many rows the stream has, and which steps they are enough for.
        """
        if self.ended is not None and step < max_steps:
            raise StreamEndedError(
                f"The stream must have rows for all of the run, but it ended after {self.ended} rows, at step {step} "
                f"of {max_steps}. What was trained up to there is sound. Set `max_steps={step}` for a run of this "
                "length, or give the stream more files; `num_rows` of MatesStream has a run refused before its start."
            )

    def __iter__(self) -> Iterator[int]:
        start = self.clock.epoch_position(self.epoch)
        skipped = max(self.clock.start_position - start, 0)
        # The Trainer throws these away while it skips to where it stopped; no row is read.
        yield from itertools.repeat(0, skipped)
        if self._finished:
            return
        self.close()
        try:
            for position, rows in self._steps(start + skipped):
                self._block_start, self._block = position, rows.tolist()
                self._left = iter(self._block)
                yield from self._left
        finally:
            self.close()

    def _steps(self, position: int) -> Iterator[tuple[int, IntArray]]:
        """Rows of whole optimizer steps as buffers come, each with the global position of its first."""
        clock, source, first = self.clock, self.maker.source, self._first
        base, behind = position, first.position
        skip = clock.pool_rows(position) - first.position
        held = np.zeros(0, np.int64)
        self._made, self.ended = [], None
        self._reader = BufferReader(source, first.number, first.place, self.maker.sizes.rows)
        while True:
            raw = self._reader.next()
            self._made.append(Made(raw.number, behind, raw.place))
            rows = self.maker.make(raw, behind, self._rule_at(behind))
            behind += len(rows)
            held = np.concatenate([held, rows[skip:]])
            skip = max(skip - len(rows), 0)
            stop = clock.position_of(behind)
            stop -= (stop - base) % self._step_rows
            if raw.is_last:
                self.ended, self._end_position = raw.number * self.maker.sizes.rows + len(raw.table), max(stop, base)
            if stop > position:
                num = clock.pool_rows(stop) - clock.pool_rows(position)
                block, held = held[:num], held[num:]
                if clock.passages is not None:
                    block = clock.passages.merged(block, position, stop, LENGTH)
                yield position, block
                position = stop
            if raw.is_last:
                break
        if position == base:
            raise StreamEndedError(
                f"The stream must have rows for an optimizer step ({self._step_rows}), but it ended after "
                f"{self.ended} rows, of which {behind - first.position} may be trained on. Give it more rows."
            )

    def _rule_at(self, position: int) -> Rule:
        return [rule for rule in self._rules if rule.from_position <= position][-1]

    def close(self) -> None:
        """Read no further, and leave the source where it stood."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.stop()
            self.maker.source.let_go()
