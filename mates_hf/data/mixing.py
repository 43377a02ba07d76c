"""Where the passages of the reference task stand among the rows of a run (`MatesConfig.reference_passes`).

Where it is used: `training/clock` counts pool rows by a `PassageSchedule`, the `ScheduledSampler` hands passages out
where it says, `mates-hf verify` counts them again, and `reporting/forecast` foresees them.

Trade-off: a pure function of five numbers, so that every process and every resume has the same, and nothing need be
kept. The price is that a run which is made longer keeps the schedule that it began with.

A *position* counts rows of the run, passages included, as `RowClock` does. A *pool row* is what stands at the other
positions: so many of them are before a position.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.records import IntArray

_ORDER = 0x7061  # keeps the streams of one seed apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassageSchedule:
    """Evenly spread positions of a run, and which passage stands at each.

    At most half of the run's rows are passages, and so at most half of any stretch of rows, rounded up. Of more
    passes than fit, the last ones are left out, of the last one a part.

    Attributes:
        num_passages: Number of rows that the passages make.
        passes: How often each is to be trained on.
        start: First position of the stretch over which they are spread.
        num_rows: Number of rows in that stretch, passages included.
        seed: Random seed of the order of each pass.
    """

    num_passages: int
    passes: int
    start: int
    num_rows: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("num_passages", 1), ("passes", 1), ("start", 0), ("num_rows", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")

    @property
    def num_slots(self) -> int:
        """Number of positions at which a passage stands."""
        return min(self.num_passages * self.passes, self.num_rows // 2)

    def _slot(self, number: int) -> int:
        """Position of a slot: the middle of its share of the stretch."""
        return self.start + (2 * number + 1) * self.num_rows // (2 * self.num_slots)

    def before(self, position: int) -> int:
        """Number of passages that stand before a position."""
        num = self.num_slots
        if not num:
            return 0
        # Slot i is before position p where (2 i + 1) rows / (2 num) < p - start.
        found = -((self.num_rows - 2 * num * (position - self.start)) // (2 * self.num_rows))
        return min(max(found, 0), num)

    def pool_rows(self, position: int) -> int:
        """Number of pool rows that stand before a position."""
        return position - self.before(position)

    def next_pool_row(self, position: int) -> int:
        """First position from this one on at which a pool row stands; no two passages are next to each other."""
        return position + self.before(position + 1) - self.before(position)

    def position_of(self, pool_row: int) -> int:
        """Position of a pool row that so many others stand before; the inverse of `pool_rows` at pool rows."""
        low, high = pool_row, pool_row + self.num_slots
        while low < high:  # the first position behind which more than so many pool rows are
            middle = (low + high) // 2
            low, high = (low, middle) if self.pool_rows(middle + 1) > pool_row else (middle + 1, high)
        return low

    def standing(self, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Positions from `start` up to `stop` at which passages stand, and which ones.

        Args:
            start: First position.
            stop: Position behind the last.

        Returns:
            (S,) int64 positions, ascending, and (S,) int64 numbers of the passages.
        """
        slots = range(self.before(start), self.before(stop))
        where = np.fromiter((self._slot(slot) for slot in slots), np.int64, len(slots))
        numbers = np.arange(slots.start, slots.stop, dtype=np.int64)
        which = np.zeros(len(numbers), np.int64)
        for number in np.unique(numbers // self.num_passages).tolist():
            here = numbers // self.num_passages == number
            order = _shuffled(self.num_passages, self.seed, number)
            which[here] = order[numbers[here] % self.num_passages]
        return where, which

    def merged(self, rows: npt.NDArray[Any], start: int, stop: int, first_id: int) -> npt.NDArray[Any]:
        """Pool rows with the passages between them.

        Args:
            rows: (k,) integer, the pool rows from `start` on: all up to `stop`, or fewer, where others follow.
            start: First position.
            stop: Position behind the last.
            first_id: Number of the first passage among the ids; those below are pool rows.

        Returns:
            The ids at `start` and after, up to where the given rows do not suffice.
        """
        where, which = self.standing(start, stop)
        is_pool = np.ones(stop - start, np.bool_)
        is_pool[where - start] = False
        lacking = np.flatnonzero(is_pool)[len(rows) : len(rows) + 1]
        end = int(lacking[0]) if len(lacking) else stop - start
        is_pool = is_pool[:end]
        found = np.empty(end, np.int64)
        found[is_pool] = rows[: np.count_nonzero(is_pool)]
        found[~is_pool] = first_id + which[: end - np.count_nonzero(is_pool)]
        return found


@lru_cache(maxsize=4)
def _shuffled(num: int, seed: int, pass_number: int) -> IntArray:
    """(num,) int64, the passages in the order of a pass."""
    return np.random.default_rng([seed, _ORDER, pass_number]).permutation(num).astype(np.int64)
