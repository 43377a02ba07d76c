"""Which pool rows were trained on, and what a round may draw.

Where it is used: at each round's boundary `training/` asks the `Ledger` for candidates and probes, and marks what it
chose. A row is marked when it is assigned to a round, not when its step is over: the steps between a boundary and its
switch still train on the earlier assignment.

Trade-off: one byte a pool row and a shuffled order of four (made when first needed), so that every draw is a plain
numpy scan and any round can be replayed from the mask, the seed and the cursor alone; from the second pass on also
from another mask, which says whose turn is still to come (`turns`). A draw takes another four bytes a pool row, and
eight a candidate that it returns; it goes through the pool in blocks for that.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mates_hf.config import MatesConfig
from mates_hf.errors import MatesError
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.selection.choose import GroupOf
from mates_hf.selection.plan import num_candidates
from mates_hf.selection.probe_draw import draw_probes
from mates_hf.selection.turns import Mask, next_in_turn, next_rows, waiting_after, waiting_in_new_pass

logger = logging.getLogger(__name__)

SHUFFLE, PROBES = 0x7368, 0x7072  # keep the streams of one seed apart; never 0, which seeds like no word


@dataclass(frozen=True)
class RoundDraw:
    """What a round may choose from and what it probes; no row is in both, and none was trained on in this pass.

    Attributes:
        candidates: (M,) int64 pool rows, in the order of the shuffled pool.
        probes: (P,) int64 pool rows, in random order; not trained on in this round. Of rows that no earlier round
            probed, as far as there are any.
        cursor_after: the ledger's cursor once the round has selected.
    """

    candidates: IntArray
    probes: IntArray
    cursor_after: int


class Ledger:
    """The rows of a pool that were trained on in the current pass or probed, and a cursor into the shuffled pool.

    Nothing but `mark_trained`, `release`, `mark_probed`, `mark_offered`, `make_room`, `start_new_pass` and setting
    `cursor` changes it, so a draw can be repeated.

    Args:
        num_rows: Number of rows in the pool.
        seed: Random seed of the pool's shuffle and of the probes.

    Attributes:
        num_rows: Number of rows in the pool.
        seed: Random seed of the pool's shuffle and of the probes.
        consumed: (num_rows,) bool, True where the row was trained on, or assigned to be, in this pass.
        probed: (num_rows,) bool, True where an earlier round probed the row, in whatever pass.
        cursor: position in `shuffled` where the next slice begins.
        pass_number: passes over the pool that were begun, from 1.
        waiting: (num_rows,) bool, True where a row's turn is still to come; None in the first pass, whose cursor says
            it, and in rounds of earlier versions.
        blocked: (num_rows,) bool, True where a row must not be used; None where all may be. Never drawn.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ValueError(f"`num_rows` must be at least 1, got {num_rows}. An empty pool cannot be selected from.")
        self.num_rows = num_rows
        self.seed = seed
        self.consumed = np.zeros(num_rows, np.bool_)
        self.probed = np.zeros(num_rows, np.bool_)
        self.cursor = 0
        self.pass_number = 1
        self.waiting: Mask | None = None
        self.blocked: Mask | None = None
        self._shuffling: threading.Thread | None = None
        self._shuffled: npt.NDArray[np.integer[Any]] | None = None

    def prepare(self) -> None:
        """Start to shuffle the pool in a thread, so that the first draw need not wait: seconds for 1e8 rows."""
        if "shuffled" not in self.__dict__ and self._shuffling is None:
            self._shuffling = threading.Thread(target=self._shuffle, daemon=True, name="mates-shuffle")
            self._shuffling.start()

    @cached_property
    def shuffled(self) -> npt.NDArray[np.integer[Any]]:
        """(num_rows,) integer, the pool's rows in the order slices are taken; the same in every pass."""
        if self._shuffling is not None:
            self._shuffling.join()
            self._shuffling = None
        return self._shuffled if self._shuffled is not None else self._shuffle()

    def _shuffle(self) -> npt.NDArray[np.integer[Any]]:
        order: npt.NDArray[np.integer[Any]] = np.arange(
            self.num_rows, dtype=np.int32 if self.num_rows <= 2**31 else np.int64
        )
        np.random.default_rng([self.seed, SHUFFLE]).shuffle(order)
        self._shuffled = order
        return order

    @property
    def num_unused(self) -> int:
        """Rows not yet trained on in this pass, of those that may be used."""
        return self.num_rows - int(np.count_nonzero(self._unavailable))

    @property
    def _unavailable(self) -> Mask:
        """(num_rows,) bool, True where a row is consumed or must not be used; not to be written to."""
        return self.consumed if self.blocked is None else self.consumed | self.blocked

    def mark_trained(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Record that rows are trained on in this pass.

        Args:
            rows: (k,) integer pool rows.

        Raises:
            MatesError: a row was trained on already or is given twice; nothing is recorded then.
            ValueError: a row is not in the pool.
        """
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= self.num_rows:
            raise ValueError(
                f"`rows` must be from 0 to {self.num_rows - 1}, got {int(rows.min())} to {int(rows.max())}."
            )
        ordered = np.sort(rows)
        again = np.union1d(rows[self.consumed[rows]], ordered[1:][ordered[1:] == ordered[:-1]])
        if len(again):
            raise MatesError(
                f"A row must be trained on at most once in a pass; {len(again)} of {len(rows)} would be trained on "
                f"again, first {again[:8].tolist()}. The order handed over repeats rows: use a sampler without "
                "replacement."
            )
        self.consumed[rows] = True

    def release(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Make rows unused again that a round selected and that the next one, started early, cut off."""
        self.consumed[rows] = False

    def mark_probed(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Record that rows were probed: later rounds probe others, and may choose these."""
        self.probed[rows] = True

    def mark_offered(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Record that rows had their turn: a round chose from them, or trained on them in the own order."""
        if self.waiting is not None:
            self.waiting = waiting_after(self.waiting, rows)

    def num_probed_before(self, rows: npt.NDArray[np.integer[Any]]) -> int:
        """How many of some rows an earlier round probed."""
        return int(np.count_nonzero(self.probed[rows]))

    def start_new_pass(self) -> None:
        """Make every row unused again; those whose turn is still to come are the first that rounds draw."""
        self.waiting = waiting_in_new_pass(self.waiting, self.consumed, self.shuffled[: self.cursor])
        self.consumed = np.zeros(self.num_rows, np.bool_)
        self.pass_number += 1

    def make_room(self, num_selected: int, config: MatesConfig) -> None:
        """Start a new pass where this one has too few unused rows for a round, and `max_passes` allows one.

        Args:
            num_selected: Number of rows that the round will train on.
            config: Settings of the run; its ratio, probes and passes count here.
        """
        needed = num_candidates(num_selected, config.selection_ratio) + config.num_probes
        if needed > self.num_unused and self.pass_number < config.most_passes:
            logger.info(
                "Pass %d over the pool begins: %d rows are unused, a round needs %d.",
                self.pass_number + 1, self.num_unused, needed,
            )  # fmt: skip
            self.start_new_pass()

    def draw(
        self,
        *,
        round_number: int,
        num_selected: int,
        selection_ratio: float,
        candidate_scope: Literal["slice", "pool"],
        num_probes: int,
        group_of: GroupOf | None = None,
    ) -> RoundDraw:
        """Candidates and probes of a round, from rows not trained on in this pass. Changes nothing.

        Args:
            round_number: Number of the round; it seeds the probes together with the ledger's seed.
            num_selected: Number of rows that the round will train on.
            selection_ratio: Share of the candidates that is trained on, in (0, 1].
            candidate_scope: `slice`: the next `num_selected / selection_ratio` unused rows from the cursor, from the
                start again where the shuffled pool ends, in a later pass those whose turn is still to come first;
                `pool`: all unused rows but the probes.
            num_probes: rows to probe, uniformly without replacement. In a slice's scope they are of the rows behind
                the slice, which are of the distribution it is of, and not of those that were passed over; in a pool's,
                of all unused rows. Rows that an earlier round probed come last, passed-over ones before them: they
                are taken only where others are too few.
            group_of: The number of each row's group, asked once for all rows that may become probes. Then each group
                has its share of the probes, but for rounding, and a row is as likely to be probed as without.

        Returns:
            Candidates and probes, and the cursor to set once the round has selected.

        Raises:
            MatesError: too few unused rows; `RunPlan.check` says so before the run.
        """
        num_slice = num_candidates(num_selected, selection_ratio)
        if num_slice + num_probes > self.num_unused:
            raise MatesError(
                f"Round {round_number} must have {num_slice} unused rows to choose {num_selected} from and "
                f"{num_probes} more to probe, got {self.num_unused} unused of {self.num_rows}. Enlarge the pool, "
                "lower `num_probes` or `max_steps`, or raise `selection_ratio`."
            )
        if candidate_scope == "slice":
            candidates, cursor = self._next_slice(num_slice)
            ahead = np.zeros(self.num_rows, np.bool_)
            ahead[self.shuffled[cursor:]] = True
            free = self._without(candidates)
            np.logical_not(free, out=free)
            probes = self._draw_probes(free, ahead, num_probes, round_number, group_of)
            return RoundDraw(candidates, probes, cursor)
        probes = self._draw_probes(~self._unavailable, np.ones(1, np.bool_), num_probes, round_number, group_of)
        candidates, _ = next_rows(self.shuffled, 0, self.num_rows, self._without(probes))
        return RoundDraw(candidates, probes, self.cursor)

    def narrowed(self, draw: RoundDraw, num_selected: int, config: MatesConfig) -> RoundDraw:
        """What a round may choose from that is shorter than the one it was drawn for. Changes nothing.

        Args:
            draw: What this ledger drew, as it is, for as many rows or more.
            num_selected: rows the round will train on.
            config: ratio and scope of the run.

        Returns:
            The first `num_selected / selection_ratio` candidates of a slice, and the cursor behind them; all of a
            pool. The probes stay.
        """
        num_slice = num_candidates(num_selected, config.selection_ratio)
        if config.candidate_scope == "pool" or num_slice >= len(draw.candidates):
            return draw
        candidates, cursor = self._next_slice(num_slice)
        return replace(draw, candidates=candidates, cursor_after=cursor)

    def own_order(
        self, own_rows: npt.NDArray[np.integer[Any]], num_rows_needed: int, exclude: npt.NDArray[np.integer[Any]]
    ) -> IntArray:
        """The rows of a round that does not select: the next unused ones of the Trainer's own order. Changes nothing.

        In a later pass those whose turn is still to come are first.

        Args:
            own_rows: (L,) integer pool rows in the Trainer's own order, no row twice.
            num_rows_needed: Number of rows that the round trains on.
            exclude: (P,) integer pool rows left out though unused: those probed in this round.

        Returns:
            (num_rows_needed,) int64 pool rows in training order.

        Raises:
            MatesError: the order has too few such rows.
        """
        rows, _ = next_in_turn(own_rows, 0, num_rows_needed, self._without(exclude), self.waiting)
        if len(rows) < num_rows_needed:
            raise MatesError(
                f"A round in the Trainer's own order must have {num_rows_needed} unused rows that it did not probe, "
                f"got {len(rows)} in an order of {len(own_rows)}. Enlarge the pool, or lower `num_probes` or "
                "`max_steps`."
            )
        return rows

    def rows_after(
        self, rows: npt.NDArray[np.integer[Any]], num_more: int, exclude: npt.NDArray[np.integer[Any]]
    ) -> IntArray:
        """What follows a round's rows where the next round begins later than they last. Changes nothing.

        Args:
            rows: (k,) integer pool rows of the round.
            num_more: Number of rows that are missing until the next round.
            exclude: (P,) integer pool rows left out though unused: those probed in the round.

        Returns:
            (num_more,) int64 unused rows, in the order of the shuffled pool from the cursor on: a function of the
            round alone, and the first of them are the same for any `num_more`.

        Raises:
            MatesError: the pool has too few such rows.
        """
        return self.own_order(np.roll(self.shuffled, -self.cursor), num_more, np.concatenate([exclude, rows]))

    def to_bits(self) -> npt.NDArray[np.uint8]:
        """(ceil(num_rows / 8),) uint8 for disk: `consumed`, eight rows a byte."""
        return np.packbits(self.consumed)

    def probed_to_bits(self) -> npt.NDArray[np.uint8]:
        """(ceil(num_rows / 8),) uint8 for disk: `probed`, eight rows a byte."""
        return np.packbits(self.probed)

    def waiting_to_bits(self) -> npt.NDArray[np.uint8] | None:
        """(ceil(num_rows / 8),) uint8 for disk: `waiting`, eight rows a byte; None where it is None."""
        return None if self.waiting is None else np.packbits(self.waiting)

    @classmethod
    def from_bits(
        cls,
        bits: npt.NDArray[np.uint8],
        num_rows: int,
        seed: int,
        cursor: int,
        probed: npt.NDArray[np.uint8] | None = None,
        waiting: npt.NDArray[np.uint8] | None = None,
    ) -> Ledger:
        """Inverse of `to_bits`; the seed, the cursor and the number of the pass are kept separately.

        Args:
            bits: (ceil(num_rows / 8),) uint8 as from `to_bits`.
            num_rows: Number of rows in the pool.
            seed: Random seed of the pool's shuffle and of the probes.
            cursor: position in `shuffled` where the next slice begins.
            probed: (ceil(num_rows / 8),) uint8 as from `probed_to_bits`; None: no row was probed.
            waiting: (ceil(num_rows / 8),) uint8 as from `waiting_to_bits`, or None.

        Returns:
            A ledger that draws what the saved one would have drawn.

        Raises:
            ValueError: the bits or the cursor belong to a pool of another size.
        """
        ledger = cls(num_rows, seed)
        if not 0 <= cursor < num_rows:
            raise ValueError(f"`cursor` must be from 0 to {num_rows - 1}, got {cursor}. Resume with its own pool.")
        ledger.consumed = _mask(bits, num_rows, "bits")
        if probed is not None:
            ledger.probed = _mask(probed, num_rows, "probed")
        if waiting is not None:
            ledger.waiting = _mask(waiting, num_rows, "waiting")
        ledger.cursor = cursor
        return ledger

    def _next_slice(self, num: int) -> tuple[IntArray, int]:
        """The next `num` unused rows, and the cursor behind them."""
        return next_in_turn(self.shuffled, self.cursor, num, self._unavailable, self.waiting)

    def _draw_probes(self, free: Mask, ahead: Mask, num: int, round_number: int, group_of: GroupOf | None) -> IntArray:
        """`num` free rows: never probed and ahead, never probed, then any."""
        return draw_probes(free, ahead, self.probed, num, [self.seed, round_number, PROBES], group_of)

    def _without(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """(num_rows,) bool, True where a row is consumed, must not be used, or is among `rows`."""
        found = self._unavailable.copy()
        found[rows] = True
        return found


def _mask(bits: npt.NDArray[np.uint8], num_rows: int, name: str) -> npt.NDArray[np.bool_]:
    """(num_rows,) bool of what was packed eight rows a byte."""
    if bits.shape != (-(-num_rows // 8),) or np.unpackbits(bits[-1:])[(num_rows - 1) % 8 + 1 :].any():
        raise ValueError(
            f"`{name}` must hold {num_rows} rows in {-(-num_rows // 8)} bytes, got {bits.shape} and rows beyond the "
            "last at most. They were saved for a pool of another size: resume with that pool."
        )
    return np.unpackbits(bits, count=num_rows).astype(np.bool_)


def probed_rows(labels: InfluenceLabels) -> IntArray:
    """(P,) int64 pool rows that a round probed: the measured ones, then those that had no trained token."""
    return np.concatenate([labels.candidate_id, np.asarray(labels.info.get("skipped", ()), np.int64)]).astype(np.int64)
