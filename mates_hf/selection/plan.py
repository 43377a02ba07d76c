"""When the rounds of a run happen, and whether the pool has rows enough for them.

Where it is used: `training/` makes a `RunPlan` before the first step and asks it for each next round; the `Ledger`
draws the rows. Trade-off: rounds are counted in optimizer steps from config alone, so a run can be refused before it
starts; where rounds grow, or drift checks may start them early, the plan reckons with the worst of them. How many
rows some steps take is asked of the clock that counts them in the run (`training/sampler.RowClock`): the plan has no
count of its own.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

from mates_hf.config import MatesConfig


class StepClock(Protocol):
    """How optimizer steps relate to rows of the pool; passages that are trained on between them do not count."""

    def pool_position(self, step: int) -> int:
        """Rows consumed once `step` optimizer steps are done, counted from anywhere."""
        ...

    def own_rows_used(self, boundary_step: int, from_step: int) -> int:
        """Rows of the own-order pass that runs at a boundary which are trained on before a later step."""
        ...

    @property
    def uneven_rows(self) -> int:
        """How many more rows some stretch of steps may have than another one of as many whole steps."""
        ...

    def ending_at(self, max_steps: int) -> StepClock:
        """The clock of the run if it had so many steps."""
        ...


@dataclass(frozen=True)
class EvenSteps:
    """The clock of a run whose steps all have as many rows, and whose passes are the pool.

    Attributes:
        batch_rows: Number of rows in one optimizer step.
        num_rows: Number of rows in the pool.
    """

    batch_rows: int
    num_rows: int

    def pool_position(self, step: int) -> int:
        """Rows consumed once `step` optimizer steps are done."""
        return step * self.batch_rows

    def own_rows_used(self, boundary_step: int, from_step: int) -> int:
        """Rows of the current pass that lie before `from_step`."""
        return self.pool_position(from_step) % self.num_rows

    @property
    def uneven_rows(self) -> int:
        """None: all steps have as many."""
        return 0

    def ending_at(self, max_steps: int) -> EvenSteps:
        """The same, whatever the number of steps."""
        return self


@dataclass(frozen=True)
class PlannedRound:
    """A round that selects.

    Attributes:
        number: the round's number.
        boundary_step: optimizer steps done when it probes, fits, scores and selects.
        from_step: First optimizer step (counted from 0) that trains on its rows.
        to_step: First optimizer step that no longer trains on them.
        num_rows: Number of rows that it selects, k.
        steps: Length where `max_steps` does not cut it; the next round's boundary is so many steps after its own.
    """

    number: int
    boundary_step: int
    from_step: int
    to_step: int
    num_rows: int
    steps: int = field(default=0, compare=False)  # `to_step` tells all but the end of a last round that is cut


class Rest(NamedTuple):
    """What is ahead of a run.

    Attributes:
        first: the next round; None where there is none.
        unused: rows not yet trained on in this pass, nor assigned to be, when it draws.
        num_passes: passes that may still begin.
        since_step: optimizer step from which on drift checks may start a round.
    """

    first: PlannedRound | None
    unused: int
    num_passes: int
    since_step: int


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The selecting rounds of a run, and whether the pool has rows enough for them.

    The steps before the first selection are in the Trainer's own order; of those only the rows of the current pass
    count as used. A round whose selection could not be trained on is not planned. A row is trained on at most once in
    a pass, so each round needs `num_rows / selection_ratio` unused rows to choose from and `num_probes` others; where
    there are too few, a new pass begins, if `max_passes` allows one.

    Attributes:
        num_rows: Number of rows in the pool.
        batch_rows: Number of rows in one optimizer step, over all devices and accumulation; the last step of an epoch
            may have fewer.
        max_steps: Number of optimizer steps of the run.
        config: Settings of the run: round length, lead, ratio, number of probes and of passes.
        first_step: optimizer step from which rounds are counted: 0, or where selection was added to a run.
        clock: How steps relate to rows; with None each step has `batch_rows`, and a pass is the pool.

    Raises:
        ValueError: a count is below 1.
    """

    num_rows: int
    batch_rows: int
    max_steps: int
    config: MatesConfig
    first_step: int = 0
    clock: StepClock | None = None

    def __post_init__(self) -> None:
        for name in ("num_rows", "batch_rows", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    @property
    def _clock(self) -> StepClock:
        return self.clock or EvenSteps(self.batch_rows, self.num_rows)

    @property
    def first_boundary_step(self) -> int:
        """Optimizer steps done when the first selection would be made."""
        return self.first_step + self.config.random_rounds * self.config.update_steps

    @property
    def first_from_step(self) -> int:
        """First optimizer step that would train on a selection, whether or not the run reaches it."""
        return self.first_boundary_step + self.config.lead_steps

    @property
    def rows_before(self) -> int:
        """Rows of the current pass that the Trainer's own order uses before the first selection; 0 is a fresh pass."""
        return min(self._clock.own_rows_used(self.first_boundary_step, self.first_from_step), self.num_rows)

    @cached_property
    def rounds(self) -> list[PlannedRound]:
        """The rounds that select, in order; they cover the steps from `first_from_step` to `max_steps` once each.

        Where rounds grow (`first_round_steps`), those of a run whose rounds grow as fast as they may.
        """
        length = self.config.longest_steps(None)
        return list(self._rounds_from(self.round_at(self.config.random_rounds, self.first_boundary_step, length)))

    def _rounds_from(self, planned: PlannedRound | None) -> Iterator[PlannedRound]:
        while planned is not None:
            yield planned
            length = self.config.longest_steps(planned.steps)
            planned = self.round_at(planned.number + 1, planned.boundary_step + planned.steps, length)

    def round_at(self, number: int, boundary_step: int, length: int | None = None) -> PlannedRound | None:
        """The round that starts after `boundary_step` steps, or None where nothing could be trained on its rows.

        Args:
            number: the round's number.
            boundary_step: optimizer steps done when it probes.
            length: its optimizer steps; None: `update_steps`.

        Returns:
            The round, cut where the run ends.
        """
        length = self.config.update_steps if length is None else length
        start = boundary_step + self.config.lead_steps
        stop = min(start + length, self.max_steps)
        if start >= stop:
            return None
        num_rows = self._clock.pool_position(stop) - self._clock.pool_position(start)
        if not num_rows:  # a last step of one row, which is a passage
            return None
        return PlannedRound(number, boundary_step, start, stop, num_rows, length)

    @property
    def whole(self) -> Rest:
        """What is ahead of a run that has not selected yet."""
        first = self.rounds[0] if self.rounds else None
        return Rest(first, self.num_rows - self.rows_before, self.config.most_passes - 1, self.first_boundary_step)

    @property
    def max_steps_that_fit(self) -> int:
        """The largest `max_steps` for which the pool suffices; `first_from_step` where not even one selection fits.

        `sys.maxsize` where a new pass may begin with each round.
        """
        return self._most_steps(None)

    def _most_steps(self, rest: Rest | None) -> int:
        """The largest `max_steps` for which the pool suffices for what is ahead; None: for all of it."""

        def fits(steps: int) -> bool:
            clock = None if self.clock is None else self.clock.ending_at(max(steps, 1))
            plan = replace(self, max_steps=max(steps, 1), clock=clock)
            ahead = plan.whole if rest is None else rest
            if ahead.first is not None:
                first = ahead.first
                ahead = ahead._replace(first=plan.round_at(first.number, first.boundary_step, first.steps))
            return next(plan._too_large(ahead), None) is None

        config = self.config
        whole_round = config.update_steps * self.batch_rows
        if config.max_passes is None and self._rows_needed_for(whole_round) <= self.num_rows:
            return sys.maxsize  # a pass may begin with each round
        first = self.whole.first if rest is None else rest.first
        low = self.first_from_step if first is None else first.from_step
        room = 1
        while fits(low + room):  # it ends, because the pool does
            room *= 2
        high = low + room
        while high - low > 1:  # a run that fits still fits when it is shorter
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def check(self, rest: Rest | None = None) -> None:
        """Raise before the run's first step if one of its rounds would find too few unused rows.

        Args:
            rest: The part that is ahead of a run which continues after a stop; None is the whole run.

        Raises:
            ValueError: the pool is too small for this many steps; says which round lacks rows, how many there are and
                the largest `max_steps` that fits.
        """
        for planned, candidates, unused in self._too_large(rest or self.whole):
            fits = self._most_steps(rest)
            if fits > (self.first_from_step if rest is None else rest.since_step):
                way_out = f"The largest `max_steps` that fits is {fits} (got {self.max_steps}): set it"
            else:
                way_out = f"No selection of this config fits this pool; up to `max_steps` {fits} nothing is selected"
            passes = self.config.max_passes
            allowed = {1: "none is trained on twice", None: "each round finds its own"}
            suffices = allowed.get(passes, f"`max_passes` ({passes}) suffice")
            room = self.update_steps_within(self.num_rows - self.config.num_probes)
            ways = ["enlarge the pool", "lower `update_steps` or `num_probes`", "raise `selection_ratio`"]
            if passes is not None and room >= self.config.least_update_steps:
                ways.append("let rows be trained on again in new passes (`max_passes=None`)")
            # A run that resumes keeps its config.
            further = "" if rest is not None else f", or {', '.join(ways[:-1])}, or {ways[-1]}"
            raise ValueError(
                f"The pool must have rows enough that {suffices}. Round {planned.number} (steps "
                f"{planned.from_step} to {planned.to_step}) must choose {planned.num_rows} rows from {candidates} "
                f"unused ones (`selection_ratio` {self.config.selection_ratio}) and probe {self.config.num_probes} "
                f"others (`num_probes`), {candidates + self.config.num_probes} in all; of the {self.num_rows} rows in "
                f"the pool {unused} are unused by then. {way_out}{further}."
            )

    def _too_large(self, rest: Rest) -> Iterator[tuple[PlannedRound, int, int]]:
        """The rounds for which the pool does not suffice, the candidates they need and the rows unused by then."""
        ahead = self._with_unused(rest) if self.config.max_passes is not None else self._longest(rest)
        for planned, unused in ahead:
            if self._rows_needed(planned) > unused:
                yield planned, num_candidates(planned.num_rows, self.config.selection_ratio), unused

    def _rows_needed(self, planned: PlannedRound) -> int:
        return self._rows_needed_for(planned.num_rows)

    def update_steps_within(self, num_rows: int) -> int:
        """The largest `update_steps` whose rounds choose from so many rows at most; 0 where not even one step does."""
        return int(num_rows * _exact(self.config.selection_ratio)) // self.batch_rows

    def _rows_needed_for(self, num_rows: int) -> int:
        return num_candidates(num_rows, self.config.selection_ratio) + self.config.num_probes

    def _longest(self, rest: Rest) -> Iterator[tuple[PlannedRound, int]]:
        """Where a pass may begin with any round: the longest that may come, and all rows of the pool."""
        if rest.first is not None:
            boundary = rest.first.boundary_step if self.config.first_steps is None else self._peak(rest.first)
            yield self._numbered(self._longest_at(boundary, rest.first), rest.first), self.num_rows

    def _longest_at(self, boundary: int, first: PlannedRound) -> PlannedRound:
        """The longest round that may begin at a boundary, of steps that are all whole; its number is the first's."""
        length = min(self.config.update_steps, boundary - first.boundary_step + first.steps)
        planned = self.round_at(first.number, boundary, length)
        assert planned is not None
        return replace(planned, num_rows=(planned.to_step - planned.from_step) * self.batch_rows)

    def _numbered(self, planned: PlannedRound, first: PlannedRound) -> PlannedRound:
        """A round with the number that it has where rounds grow as fast as they may."""
        numbers = [each.number for each in self._rounds_from(first) if each.boundary_step <= planned.boundary_step]
        return replace(planned, number=numbers[-1])

    def _peak(self, first: PlannedRound) -> int:
        """Where rounds grow, the boundary of the longest that may come: the last that the run's end does not cut."""
        end, config = self.max_steps - self.config.lead_steps, self.config
        peak = end - config.update_steps  # the last that is not cut, if one may be as long by then
        if peak < first.boundary_step + config.update_steps - first.steps:
            peak = (end + first.boundary_step - first.steps) // 2
        return min(max(peak, first.boundary_step), end - 1)

    def _with_unused(self, rest: Rest) -> Iterator[tuple[PlannedRound, int]]:
        """Each round with the rows unused when it draws; last those at other steps that would find least to spare."""
        unused = before = rest.unused
        passes, last = rest.num_passes, None

        def drawn_from(planned: PlannedRound, unused: int) -> int:
            """Unused rows, those of a new pass where they are too few and there may be one."""
            return self.num_rows if passes > 0 and self._rows_needed(planned) > unused else unused

        for planned in self._rounds_from(rest.first):
            before, last = unused, planned
            unused = drawn_from(planned, before)
            yield planned, unused
            passes -= unused != before
            unused -= planned.num_rows
        if self.config.first_steps is not None and rest.first is not None:
            yield from self._tightest(rest.first, rest.unused, rest.num_passes)
        # A drift check may start a round at any step; the latest that still chooses a full round's rows has the fewest
        # unused rows for it. What it cuts off of the round before it is unused again.
        latest = self.max_steps - self.config.update_steps - self.config.lead_steps
        if self.config.drift_check_steps is None or self.config.first_steps is not None:
            return  # where rounds grow, they are no longer than reckoned above, wherever one starts
        if last is not None and latest > rest.since_step:
            early = self.round_at(last.number, latest)
            if early is not None:
                position = self._clock.pool_position
                early = replace(early, num_rows=early.num_rows + self._clock.uneven_rows)
                yield early, drawn_from(early, before + position(last.from_step) - position(early.from_step))

    def _tightest(self, first: PlannedRound, unused: int, num_passes: int) -> Iterator[tuple[PlannedRound, int]]:
        """Of rounds that may or may not grow: those that begin a pass, as early as one could, and the one with least.

        What a round needs beyond the unused rows rises with its boundary as long as later rounds may be longer, and
        falls where the end of the run cuts them. A pass that begins earlier leaves fewer unused rows at later steps.
        """
        position = self._clock.pool_position
        own, begins = unused, first.from_step
        end = self.max_steps - self.config.lead_steps

        def at(boundary: int) -> tuple[PlannedRound, int]:
            """The longest round that may be there, and its unused rows."""
            planned = self._longest_at(boundary, first)
            return planned, own - (position(planned.from_step) - position(begins))

        def lacks(boundary: int) -> bool:
            planned, left = at(boundary)
            return self._rows_needed(planned) > left

        def told(boundary: int) -> tuple[PlannedRound, int]:
            planned, left = at(boundary)
            return self._numbered(planned, first), left

        peak = self._peak(first)
        low = first.boundary_step
        while low <= peak:
            most = next((step for step in (peak, peak + 1) if step < end and lacks(step)), None)
            if most is None:
                yield told(peak)
                return
            earliest = low + bisect_left(range(low, most), True, key=lacks)
            if num_passes > 0:
                num_passes, own, begins = num_passes - 1, self.num_rows, at(earliest)[0].from_step
            yield told(earliest)
            if lacks(earliest):
                return
            low = earliest + 1


def num_candidates(num_selected: int, selection_ratio: float) -> int:
    """Candidates from which a ratio of `selection_ratio` selects `num_selected`: their quotient, rounded up.

    Exact for the decimal the ratio was written as: 3 rows at 0.3 are 10 candidates, not 11.
    """
    return math.ceil(num_selected / _exact(selection_ratio))


@lru_cache
def _exact(ratio: float) -> Fraction:
    """The fraction a ratio was meant as: 0.2 is 1/5, not the nearest binary number."""
    return Fraction(repr(float(ratio)))
