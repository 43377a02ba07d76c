"""When the rounds of a run happen, and whether the pool has rows enough for them.

Place in the flow: `training/` makes a `RunPlan` before the first step and asks it for each next round; the `Ledger`
draws the rows. Trade-off: rounds are counted in optimizer steps from config alone, so a run can be refused before it
starts; where drift checks may start rounds early, the plan reckons with the worst of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from mates_hf.config import MatesConfig


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
        planned = self.round_at(first, self.first_step + first * length)
        while planned is not None:
            rounds.append(planned)
            planned = self.round_at(planned.number + 1, planned.boundary_step + length)
        return rounds

    def round_at(self, number: int, boundary_step: int) -> PlannedRound | None:
        """The round that starts after `boundary_step` steps, or None where nothing could be trained on its rows."""
        start = boundary_step + self.config.lead_steps
        stop = min(start + self.config.update_steps, self.max_steps)
        if start >= stop:
            return None
        return PlannedRound(number, boundary_step, start, stop, (stop - start) * self.batch_rows)

    @property
    def max_steps_that_fit(self) -> int:
        """The largest `max_steps` for which the pool suffices; `first_from_step` where not even one selection fits."""
        fits = self._max_steps_without_early_rounds
        if self.config.drift_check_steps:
            low = self.first_from_step
            while low < fits:  # a run that fits still fits when it is shorter
                middle = (low + fits + 1) // 2
                shorter = replace(self, max_steps=middle)
                low, fits = (middle, fits) if next(shorter._too_large(), None) is None else (low, middle - 1)
        return fits

    @property
    def _max_steps_without_early_rounds(self) -> int:
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
        for planned, candidates, unused in self._too_large():
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

    def _too_large(self) -> Iterator[tuple[PlannedRound, int, int]]:
        """The rounds for which the pool does not suffice, the candidates they need and the rows unused by then."""
        for planned, unused in self._with_unused():
            candidates = num_candidates(planned.num_rows, self.config.selection_ratio)
            if candidates + self.config.num_probes > unused:
                yield planned, candidates, unused

    def _with_unused(self) -> Iterator[tuple[PlannedRound, int]]:
        """Each round with the rows unused when it draws; last the early one that would find least to spare."""
        unused = self.num_rows - self.rows_before
        for planned in self.rounds:
            yield planned, unused
            unused -= planned.num_rows
        # A drift check may start a round at any step; the latest that still chooses a full round's rows has the fewest
        # unused rows for it.
        latest = self.max_steps - self.config.update_steps - self.config.lead_steps
        if self.config.drift_check_steps and self.rounds and latest > self.rounds[0].boundary_step:
            early = self.round_at(self.rounds[-1].number, latest)
            if early is not None:
                trained = (early.from_step - self.first_from_step) * self.batch_rows
                yield early, self.num_rows - self.rows_before - trained


def num_candidates(num_selected: int, selection_ratio: float) -> int:
    """Candidates from which a ratio of `selection_ratio` selects `num_selected`: their quotient, rounded up.

    Exact for the decimal the ratio was written as: 3 rows at 0.3 are 10 candidates, not 11.
    """
    return math.ceil(num_selected / _exact(selection_ratio))


def _exact(ratio: float) -> Fraction:
    """The fraction a ratio was meant as: 0.2 is 1/5, not the nearest binary number."""
    return Fraction(repr(float(ratio)))
