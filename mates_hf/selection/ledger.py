"""Which pool rows were trained on, what a round may draw, and whether the pool suffices for a run.

Place in the flow: `training/` asks `RunPlan` before the first step whether the run fits the pool, then at each round's
boundary asks the `Ledger` for candidates and probes, and marks what it chose. A row is marked when it is assigned to a
round, not when its step is over: the steps between a boundary and its switch still train on the earlier assignment.

Trade-off: one byte a pool row and a shuffled order of four (made when first needed), so that every draw is a plain
numpy scan and any round can be replayed from the mask, the seed and the cursor alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mates_hf.config import MatesConfig
from mates_hf.records import IntArray, MatesError

BLOCK = 1 << 20  # rows of an order looked at at once
SHUFFLE, PROBES = 0x7368, 0x7072  # keep the streams of one seed apart; never 0, which seeds like no word


@dataclass(frozen=True)
class RoundDraw:
    """What a round may choose from and what it probes; no row is in both, and none was trained on in this pass.

    Attributes:
        candidates: (M,) int64 pool rows, in the order of the shuffled pool.
        probes: (P,) int64 pool rows, in random order; not trained on in this round.
        cursor_after: the ledger's cursor once the round has selected.
    """

    candidates: IntArray
    probes: IntArray
    cursor_after: int


class Ledger:
    """The rows of a pool that were trained on in the current pass, and a cursor into the shuffled pool.

    Nothing but `mark_trained`, `start_new_pass` and setting `cursor` changes it, so a draw can be repeated.

    Args:
        num_rows: rows in the pool.
        seed: of the pool's shuffle and of the probes.

    Attributes:
        num_rows: rows in the pool.
        seed: of the pool's shuffle and of the probes.
        consumed: (num_rows,) bool, True where the row was trained on, or assigned to be, in this pass.
        cursor: position in `shuffled` where the next slice begins.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ValueError(f"`num_rows` must be at least 1, got {num_rows}. An empty pool cannot be selected from.")
        self.num_rows = num_rows
        self.seed = seed
        self.consumed = np.zeros(num_rows, np.bool_)
        self.cursor = 0

    @cached_property
    def shuffled(self) -> npt.NDArray[np.integer[Any]]:
        """(num_rows,) integer, the pool's rows in the order slices are taken; the same in every pass."""
        order: npt.NDArray[np.integer[Any]] = np.arange(self.num_rows).astype(
            np.int32 if self.num_rows <= 2**31 else np.int64
        )
        np.random.default_rng([self.seed, SHUFFLE]).shuffle(order)
        return order

    @property
    def num_unused(self) -> int:
        """Rows not yet trained on in this pass."""
        return self.num_rows - int(np.count_nonzero(self.consumed))

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

    def start_new_pass(self) -> None:
        """Make every row unused again and go back to the start of the shuffled pool: the pool is used up."""
        self.consumed = np.zeros(self.num_rows, np.bool_)
        self.cursor = 0

    def draw(
        self,
        *,
        round_number: int,
        num_selected: int,
        selection_ratio: float,
        candidate_scope: Literal["slice", "pool"],
        num_probes: int,
    ) -> RoundDraw:
        """Candidates and probes of a round, from rows not trained on in this pass. Changes nothing.

        Args:
            round_number: the round; it seeds the probes together with the ledger's seed.
            num_selected: rows the round will train on.
            selection_ratio: share of the candidates that is trained on, in (0, 1].
            candidate_scope: `slice`: the next `num_selected / selection_ratio` unused rows from the cursor, from the
                start again where the shuffled pool ends; `pool`: all unused rows but the probes.
            num_probes: rows to probe, uniformly without replacement among the unused rows outside a slice.

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
            candidates, cursor = self._next_unused(self.shuffled, self.cursor, num_slice, self.consumed)
            probes = self._draw_probes(self._blocked(candidates), num_probes, round_number)
            return RoundDraw(candidates, probes, cursor)
        probes = self._draw_probes(self.consumed, num_probes, round_number)
        keep = ~self._blocked(probes)[self.shuffled]
        return RoundDraw(self.shuffled[keep].astype(np.int64), probes, self.cursor)

    def own_order(
        self, own_rows: npt.NDArray[np.integer[Any]], num_rows_needed: int, exclude: npt.NDArray[np.integer[Any]]
    ) -> IntArray:
        """The rows of a round that does not select: the next unused ones of the Trainer's own order. Changes nothing.

        Args:
            own_rows: (L,) integer pool rows in the Trainer's own order, no row twice.
            num_rows_needed: rows the round trains on.
            exclude: (P,) integer pool rows left out though unused: those probed in this round.

        Returns:
            (num_rows_needed,) int64 pool rows in training order.

        Raises:
            MatesError: the order has too few such rows.
        """
        rows, _ = self._next_unused(own_rows, 0, num_rows_needed, self._blocked(exclude))
        if len(rows) < num_rows_needed:
            raise MatesError(
                f"A round in the Trainer's own order must have {num_rows_needed} unused rows that it did not probe, "
                f"got {len(rows)} in an order of {len(own_rows)}. Enlarge the pool, or lower `num_probes` or "
                "`max_steps`."
            )
        return rows

    def to_bits(self) -> npt.NDArray[np.uint8]:
        """(ceil(num_rows / 8),) uint8 for disk: `consumed`, eight rows a byte."""
        return np.packbits(self.consumed)

    @classmethod
    def from_bits(cls, bits: npt.NDArray[np.uint8], num_rows: int, seed: int, cursor: int) -> Ledger:
        """Inverse of `to_bits`; the seed and the cursor are kept beside the bits.

        Args:
            bits: (ceil(num_rows / 8),) uint8 as from `to_bits`.
            num_rows: rows in the pool.
            seed: of the pool's shuffle and of the probes.
            cursor: position in `shuffled` where the next slice begins.

        Returns:
            A ledger that draws what the saved one would have drawn.

        Raises:
            ValueError: the bits or the cursor belong to a pool of another size.
        """
        ledger = cls(num_rows, seed)
        if bits.shape != (-(-num_rows // 8),) or np.unpackbits(bits[-1:])[(num_rows - 1) % 8 + 1 :].any():
            raise ValueError(
                f"`bits` must hold {num_rows} rows in {-(-num_rows // 8)} bytes, got {bits.shape} and rows beyond the "
                "last at most. They were saved for a pool of another size: resume with that pool."
            )
        if not 0 <= cursor < num_rows:
            raise ValueError(f"`cursor` must be from 0 to {num_rows - 1}, got {cursor}. Resume with its own pool.")
        ledger.consumed = np.unpackbits(bits, count=num_rows).astype(np.bool_)
        ledger.cursor = cursor
        return ledger

    def _blocked(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """(num_rows,) bool, True where a row is consumed or among `rows`."""
        blocked = self.consumed.copy()
        blocked[rows] = True
        return blocked

    def _draw_probes(self, blocked: npt.NDArray[np.bool_], num: int, round_number: int) -> IntArray:
        """`num` rows that are not blocked, uniformly without replacement."""
        free = np.flatnonzero(~blocked)
        generator = np.random.default_rng([self.seed, round_number, PROBES])
        return free[generator.choice(len(free), num, replace=False)].astype(np.int64, copy=False)

    @staticmethod
    def _next_unused(
        order: npt.NDArray[np.integer[Any]], start: int, num: int, blocked: npt.NDArray[np.bool_]
    ) -> tuple[IntArray, int]:
        """Up to `num` rows of `order` that are not blocked, from `start` and round the end; and where it stopped."""
        parts: list[npt.NDArray[np.integer[Any]]] = [np.zeros(0, np.int64)]
        missing, stop = num, start
        for low, high in ((start, len(order)), (0, start)):
            for at in range(low, high, BLOCK):
                if not missing:
                    break
                block = order[at : min(at + BLOCK, high)]
                where = np.flatnonzero(~blocked[block])[:missing]
                if len(where):
                    parts.append(block[where])
                    missing -= len(where)
                    stop = at + int(where[-1]) + 1
        return np.concatenate(parts).astype(np.int64, copy=False), stop % max(len(order), 1)


@dataclass(frozen=True)
class PlannedRound:
    """A round that selects.

    Attributes:
        number: the round's number.
        boundary_step: optimizer steps done when it probes, fits, scores and selects.
        from_step: first optimizer step (counted from 0) that trains on its rows.
        to_step: first optimizer step that no longer does.
        num_rows: rows it selects, k.
    """

    number: int
    boundary_step: int
    from_step: int
    to_step: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The selecting rounds of a run, and whether the pool has rows enough for them.

    The steps before the first selection are in the Trainer's own order; of those only the rows of the current pass
    count as used. A round whose selection could not be trained on is not planned. A row is trained on at most once in
    a pass, so each round needs `num_rows / selection_ratio` unused rows to choose from and `num_probes` others.

    Attributes:
        num_rows: rows in the pool.
        batch_rows: rows in one optimizer step, over all devices and accumulation.
        max_steps: optimizer steps of the run.
        config: round length, lead, ratio and number of probes.
        first_step: optimizer step from which rounds are counted: 0, or where selection was added to a run.
        rows_per_pass: row positions of one pass in the Trainer's own order; None: `num_rows`. A loader that drops or
            fills up its last batch makes them differ.

    Raises:
        ValueError: a count is below 1.
    """

    num_rows: int
    batch_rows: int
    max_steps: int
    config: MatesConfig
    first_step: int = 0
    rows_per_pass: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_rows", "batch_rows", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    @property
    def first_from_step(self) -> int:
        """First optimizer step that would train on a selection, whether or not the run reaches it."""
        return self.first_step + self.config.random_rounds * self.config.update_steps + self.config.lead_steps

    @property
    def rows_before(self) -> int:
        """Rows of the current pass that the Trainer's own order uses before the first selection; 0 is a fresh pass."""
        rows = self.first_from_step * self.batch_rows % (self.rows_per_pass or self.num_rows)
        return min(rows, self.num_rows)

    @cached_property
    def rounds(self) -> list[PlannedRound]:
        """The rounds that select, in order; they cover the steps from `first_from_step` to `max_steps` once each."""
        length, first = self.config.update_steps, self.config.random_rounds
        rounds = []
        for number, start in enumerate(range(self.first_from_step, self.max_steps, length), first):
            stop = min(start + length, self.max_steps)
            boundary = self.first_step + number * length
            rounds.append(PlannedRound(number, boundary, start, stop, (stop - start) * self.batch_rows))
        return rounds

    @property
    def max_steps_that_fit(self) -> int:
        """The largest `max_steps` for which the pool suffices; `first_from_step` where not even one selection fits."""
        ratio, full = _exact(self.config.selection_ratio), self.config.update_steps
        unused, start = self.num_rows - self.rows_before, self.first_from_step
        while True:
            # ceil(steps * batch_rows / ratio) + num_probes <= unused, solved for steps.
            steps = math.floor((unused - self.config.num_probes) * ratio / self.batch_rows)
            if steps < full:
                return start + max(steps, 0)
            start += full
            unused -= full * self.batch_rows

    def check(self) -> None:
        """Raise before the run's first step if one of its rounds would find too few unused rows.

        Raises:
            ValueError: the pool is too small for this many steps; says which round lacks rows, how many there are and
                the largest `max_steps` that fits.
        """
        for planned, unused in self._with_unused():
            candidates = num_candidates(planned.num_rows, self.config.selection_ratio)
            if candidates + self.config.num_probes <= unused:
                continue
            fits = self.max_steps_that_fit
            if fits > self.first_from_step:
                way_out = f"The largest `max_steps` that fits is {fits} (got {self.max_steps}): set it"
            else:
                way_out = f"No selection of this config fits this pool; up to `max_steps` {fits} nothing is selected"
            raise ValueError(
                f"The pool must have rows enough that none is trained on twice. Round {planned.number} (steps "
                f"{planned.from_step} to {planned.to_step}) must choose {planned.num_rows} rows from {candidates} "
                f"unused ones (`selection_ratio` {self.config.selection_ratio}) and probe {self.config.num_probes} "
                f"others (`num_probes`), {candidates + self.config.num_probes} in all; of the {self.num_rows} rows in "
                f"the pool {unused} are unused by then. {way_out}, or enlarge the pool, lower `update_steps` or "
                "`num_probes`, or raise `selection_ratio`. A run of whole epochs leaves nothing to choose."
            )

    def _with_unused(self) -> Iterator[tuple[PlannedRound, int]]:
        """Each round with the rows unused when it draws."""
        unused = self.num_rows - self.rows_before
        for planned in self.rounds:
            yield planned, unused
            unused -= planned.num_rows


def num_candidates(num_selected: int, selection_ratio: float) -> int:
    """Candidates from which a ratio of `selection_ratio` selects `num_selected`: their quotient, rounded up.

    Exact for the decimal the ratio was written as: 3 rows at 0.3 are 10 candidates, not 11.
    """
    return math.ceil(num_selected / _exact(selection_ratio))


def _exact(ratio: float) -> Fraction:
    """The fraction a ratio was meant as: 0.2 is 1/5, not the nearest binary number."""
    return Fraction(repr(float(ratio)))
