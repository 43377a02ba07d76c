"""The data order: global row position -> pool row, through a schedule that grows while the run goes on.

Where passages of the reference task are mixed in, they stand at some of the positions (`RowClock.passages`) and are
handed out as ids behind those of the pool; orders count pool rows alone.

Where it is used: `MatesCallback` puts a `ScheduledSampler` where the dataloader's own sampler was and appends each
round's order to it. The order of rows is then a pure function of config, seed and selections: the same for any number
of dataloader workers, and across a resume.

Trade-off: positions are counted in rows, not in steps or batches, so that a changed batch size moves no row; the price
is that someone has to know how steps and rows relate. That is `clock.RowClock`. A resumed run draws the Trainer's own
order again instead of reading it from disk, and proves by its hash that it is the same. Rows are handed out from a
list of the next few thousand, which is cut where an order is appended inside it.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from mates_hf.errors import MatesError
from mates_hf.records import IntArray
from mates_hf.training.blocked import Blocked, own_order_without
from mates_hf.training.clock import RowClock
from mates_hf.training.history import NO_ROW
from mates_hf.training.order import Order
from mates_hf.training.own_order import OrderHash, Rows, check_rows_once, draw_pass

logger = logging.getLogger(__name__)

BLOCK = 1 << 13  # rows made ready at once


class ScheduledSampler(Sampler[int]):
    """A sampler whose later rows are decided while the earlier ones train.

    Until the first appended order takes effect it yields what the dataloader's own sampler yields, drawn at the same
    moment of the same random streams, so a run that never appends is the run without it.

    Args:
        own: the sampler that was there.
        clock: steps and positions of this call.
        saved: `own_state` in the checkpoint that is resumed; None where there is none.
        num_rows: rows in the pool; None where that is not known.
        finished: the run that is resumed has taken all its steps. It gets no row: given one, the Trainer, which looks
            at `max_steps` behind a step, would take another.
        blocked: rows that must not be used, which the own order skips; None where there are none.

    Attributes:
        own_rows: (N,) integer, the running pass in the Trainer's own order; empty until it is drawn, and where
            `keeps_own_rows` is false, once selections have taken its place.
        own_rows_once: the same rows without those that must not be used, each once.
        own_start: global position at which that pass began.
        keeps_own_rows: false where nobody asks for the own order once there are selections.
        each_once: whether no row can be twice in the running pass, by how it was drawn.
        unproven: whether a pass was drawn that other processes were not compared with.
        before_pass: is called with the position at which a pass begins, while the rows of the one before are there.
    """

    def __init__(
        self,
        own: Any,
        clock: RowClock,
        saved: Mapping[str, Any] | None = None,
        *,
        num_rows: int | None = None,
        finished: bool = False,
        blocked: Blocked | None = None,
    ) -> None:
        self.own = own
        self.clock = clock
        self.epoch = clock.first_epoch
        self.own_rows: Rows = np.zeros(0, np.int64)
        self.own_rows_once = self.own_rows
        self.own_start = clock.epoch_position(clock.first_epoch)
        self.keeps_own_rows = True
        self.each_once = True
        self.unproven = False
        self.before_pass: Callable[[int], None] | None = None
        self._own_epoch = clock.first_epoch
        self._saved = saved
        if saved is not None:
            self.own_start, self._own_epoch = int(saved["own_start"]), int(saved["own_epoch"])
        self._own_hash: OrderHash | None = None
        self._own_random = {"own_random": ""}
        self._finish_own: Callable[[], Any] | None = None
        self._num_rows = 2**31 + 1 if num_rows is None else num_rows
        self._finished, self._blocked = finished, blocked
        self._orders: list[tuple[int, npt.NDArray[Any]]] = []
        self._begun_epoch: int | None = None
        # The rows made ready: the list, where its first row is, and what hands it out.
        self._block: list[int] = []
        self._block_start = self._drawn = clock.start_position
        self._left: Iterator[int] = iter(self._block)

    @property
    def own_state(self) -> dict[str, Any]:
        """What a checkpoint holds of the running pass, JSON values. Waits for the hash of an order just drawn."""
        sha256 = "" if self._own_hash is None else self._own_hash.hexdigest()
        return {
            "own_start": self.own_start,
            "own_epoch": self._own_epoch,
            "own_sha256": sha256,
            **self._own_random,
        }

    def state_at(self, position: int) -> dict[str, Any]:
        """What a checkpoint holds once the rows before a position are trained on."""
        return self.own_state

    def take(self, order: Order) -> None:
        """Train on a round's rows from its position on."""
        self.append(order.from_position, order.rows)

    def begin(self) -> None:
        """Nothing to prepare where rows are known."""

    def close(self) -> None:
        """Nothing to let go of."""

    def is_over(self, step: int) -> bool:
        """False: how many rows there are was known before the first step."""
        return False

    def require_more(self, step: int, max_steps: int) -> None:
        """Nothing to refuse: the plan has counted the rows."""

    @property
    def drawn_position(self) -> int:
        """Global position behind the last row that was handed to the dataloader."""
        return max(self._drawn, self._block_start + len(self._block) - operator.length_hint(self._left))

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
            from_position: number of pool rows before the first of them; its global row position where no passages are
                mixed in.
            rows: (k,) pool rows.

        Raises:
            MatesError: rows at that position were already handed to the dataloader, so they could not be replaced.
        """
        from_position = self.clock.position_of(from_position)
        if from_position < self.drawn_position:
            raise MatesError(
                f"A selection must take effect at a row position not yet fetched ({self.drawn_position} and later), "
                f"got {from_position}: the dataloader looks further ahead than `switch_lead_steps` covers. Raise "
                "`switch_lead_steps`, or lower `dataloader_num_workers` or `dataloader_prefetch_factor`."
            )
        # The iterator looks at the list's length at each row, so it ends where the list is cut.
        del self._block[max(from_position - self._block_start, 0) :]
        self._orders = [order for order in self._orders if order[0] != from_position]
        self._orders.append((from_position, rows))
        self._orders.sort(key=lambda order: order[0])

    def drop_finished(self, position: int) -> None:
        """Forget orders that ended before `position`, so that a long run holds two at most."""
        later = [order for order in self._orders if order[0] > position]
        current = [order for order in self._orders if order[0] <= position][-1:]
        self._orders = current + later
        self._drop_own_rows(position)

    def _drop_own_rows(self, position: int) -> None:
        """Free the own order where no row of it is trained on from a position on and nobody else asks for it."""
        if not self.keeps_own_rows and not self.uses_own_rows(position):
            self.own_rows = self.own_rows_once = self.own_rows[:0].copy()

    def restart(self, step: int) -> None:
        """Begin a new epoch after `step` steps: the one that runs was ended before its time.

        Rows that were fetched ahead and not trained on are handed out again.

        Args:
            step: optimizer steps done.

        Raises:
            MatesError: an epoch's last step has fewer batches than others.
        """
        assert self._begun_epoch is not None
        clock = self.clock.restarted(step, self._begun_epoch + 1)
        self.clock, self.epoch = clock, clock.first_epoch
        if not self._awaits(clock.start_position):
            self.own_start, self._own_epoch = clock.start_position, clock.first_epoch
        self._block, self._left = [], iter(())
        self._block_start = self._drawn = clock.start_position

    def ended_early(self, step: int) -> bool:
        """Whether a new epoch is about to begin after `step` steps, though the one before it is not at its end."""
        begun = self._begun_epoch
        return begun is not None and self.clock.position(step) < self.clock.epoch_position(begun + 1)

    def _awaits(self, start: int) -> bool:
        """Whether a first selection was scheduled, for later than `start`, that counts on the rows before it."""
        return bool(self._orders) and self.uses_own_rows(start)

    def uses_own_rows(self, position: int) -> bool:
        """Whether the pool row at a position, or the next one, is of the own order.

        The same in all processes, which hold the same orders.
        """
        return not self._orders or self._orders[0][0] > self.clock.next_pool_row(position)

    def __iter__(self) -> Iterator[int]:
        start = self.clock.epoch_position(self.epoch)
        end = start + self.clock.rows_per_epoch
        self._begun_epoch = self.epoch
        self._begin_pass(start)
        skipped = min(max(self.clock.start_position - start, 0), self.clock.rows_per_epoch)
        # The Trainer throws these away while it skips to where it stopped; no row is read.
        yield from itertools.repeat(0, skipped)
        position = start + skipped
        while position < end and not self._finished:
            self._drawn = self.drawn_position
            self._block_start, self._block = position, self._rows_at(position, min(position + BLOCK, end))
            if not self._block:
                break
            self._left = iter(self._block)
            yield from self._left
            position = self._block_start + len(self._block)
        finish, self._finish_own = self._finish_own, None
        if finish is not None:
            finish()

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
        goes_on = self.epoch == self.clock.first_epoch and self.clock.goes_on(self.own_start)
        awaited = self._awaits(start)
        if awaited and len(self.own_rows):
            return
        if len(self.own_rows) and self.before_pass is not None:
            self.before_pass(start)
        if not (goes_on or awaited):
            self.own_start, self._own_epoch, saved = start, self.epoch, None
        self._draw_own_order(saved or {})
        self._drop_own_rows(start)

    def _draw_own_order(self, saved: Mapping[str, Any]) -> None:
        """The permutation of `_own_epoch`, checked against the one that a checkpoint tells of."""
        by_epoch = hasattr(self.own, "set_epoch")
        if by_epoch:
            self.own.set_epoch(self._own_epoch)
        with _as_it_was(self.own, saved):
            # A sampler that is not seeded by epoch draws from torch's own stream, or from a generator that goes on
            # from pass to pass. A resumed run does not have their state at this moment otherwise: the Trainer restores
            # torch's of the checkpoint, which is later.
            self._own_random = {"own_random": ""} if by_epoch else _random_state(self.own)
            self.own_rows, self.each_once, self._finish_own = draw_pass(self.own, self._num_rows)
        self._own_hash, self.unproven = OrderHash(self.own_rows), True
        self.own_rows_once = self.own_rows
        if self._blocked is not None and self._blocked.mask is not None:
            if not self.each_once:
                check_rows_once(self.own_rows)
            self.own_rows_once = self.own_rows[~self._blocked.mask[self.own_rows]]
            self.each_once, self.own_rows = True, own_order_without(self.own_rows, self._blocked)
        expected = saved.get("own_sha256")
        if not expected or expected == (sha256 := self._own_hash.hexdigest()):
            return
        if self.uses_own_rows(self.clock.start_position):
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

    def _rows_at(self, position: int, stop: int) -> list[int]:
        """The ids from a position on: up to `stop`, or where another order begins; none behind the schedule."""
        order: tuple[int, npt.NDArray[Any]] | None = None
        for candidate in self._orders:
            if candidate[0] > self.clock.next_pool_row(position):
                stop = min(stop, candidate[0])
                break
            order = candidate
        if order is None:
            rows = self._own_rows_at(position, stop)
        else:
            before, first, end = (self.clock.pool_rows(each) for each in (order[0], position, stop))
            rows = order[1][first - before : end - before]
        if self.clock.passages is not None:
            rows = self.clock.passages.merged(rows, position, stop, self._num_rows)
        found: list[int] = rows.tolist()
        return found

    def _own_rows_at(self, position: int, stop: int) -> Rows:
        """Pool rows of the Trainer's own order from a position on, not behind `stop`; more may follow."""
        index, mixed = position - self.own_start, self.clock.passages is not None
        if not mixed and self.own_start == self.clock.epoch_position(self.epoch):
            return self.own_rows[index : index + stop - position]  # ends where the epoch ends, maybe inside a batch
        # A pass that does not end with the epoch is followed by itself: a fresh pass may use its rows again. Nor does
        # a batch end early where passages stand in it.
        stop = min(stop, position + self.clock.rows_per_epoch - index % self.clock.rows_per_epoch)
        first = self.clock.rows_of_pass(self.own_start, position) % max(len(self.own_rows), 1)
        return self.own_rows[first : first + self.clock.pool_rows(stop) - self.clock.pool_rows(position)]

    def own_between(self, first: int, stop: int, *, fills: bool = False) -> IntArray:
        """The own order's pool rows of the running pass, by the number of pool rows before each.

        Args:
            first: pool rows before the first of them, which is in this pass.
            stop: pool rows before the end.
            fills: whether a last batch that is not full is filled up with the first rows of the pass.

        Returns:
            (stop - first,) int64; `NO_ROW` where no row stands, because a last batch is not full.
        """
        found = np.full(max(stop - first, 0), NO_ROW, np.int64)
        clock, at = self.clock, first
        while at < stop and len(self.own_rows):
            position = clock.position_of(at)
            end = position + clock.rows_per_epoch - (position - self.own_start) % clock.rows_per_epoch
            num = min(stop, clock.pool_rows(end)) - at
            offset = clock.rows_of_pass(self.own_start, position)
            part = self.own_rows[offset : offset + num]
            if fills and len(part) < num:
                part = np.concatenate([part, np.resize(self.own_rows, num - len(part))])
            found[at - first : at - first + len(part)] = part
            at += max(num, 1)
        return found


def _own_generator(own: Any) -> torch.Generator | None:
    generator = getattr(own, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None


def _random_state(own: Any) -> dict[str, str]:
    """What a sampler's next pass depends on beside its arguments, for JSON."""
    states = {"own_random": torch.get_rng_state()}
    generator = _own_generator(own)
    if generator is not None:
        states["own_generator"] = generator.get_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


@contextlib.contextmanager
def _as_it_was(own: Any, saved: Mapping[str, Any]) -> Iterator[None]:
    """Torch's stream as it was when a checkpoint's pass was drawn, for now, and the sampler's generator, for good."""

    def state(name: str) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(base64.b64decode(saved[name]), np.uint8).copy())

    generator = _own_generator(own)
    if generator is not None and saved.get("own_generator"):
        generator.set_state(state("own_generator"))
    with torch.random.fork_rng(devices=[], enabled=bool(saved.get("own_random"))):
        if saved.get("own_random"):
            torch.set_rng_state(state("own_random"))
        yield
