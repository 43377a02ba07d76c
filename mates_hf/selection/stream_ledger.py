"""What a round draws of a stream: the rows to probe, of those that buffers have set aside.

Where it is used: in the place of `Ledger`, whose questions it answers where a pool's rows are not known beforehand. A
row of a stream is read once and trained on at most once, so there is nothing to mark.

Trade-off: a round probes rows of the last few buffers that began before its boundary. So what it draws depends neither
on what a dataloader has fetched ahead, nor on how much of the past is still on disk.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mates_hf.config import MatesConfig
from mates_hf.errors import MatesError
from mates_hf.records import IntArray
from mates_hf.selection.choose import GroupOf
from mates_hf.selection.ledger import PROBES, RoundDraw

WINDOW = 2  # times `num_probes` rows that a round draws from
KEPT = 5  # times `num_probes` rows behind the position that are kept, for a round that is still being fitted


class StreamLedger:
    """The rows that buffers set aside, and which of them were probed.

    Args:
        seed: Selection seed of the run.

    Attributes:
        seed: Selection seed of the run.
        position: Pool rows that are trained on.
        cursor: position at which the last round drew.
        pass_number: 1; a stream is read once.
        num_unused: 0; nobody knows how many rows follow.
        waiting: None; no row waits for its turn.
    """

    blocked = None  # rows of a stream have no numbers by which they could be

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.position = 0
        self.cursor = 0
        self.pass_number = 1
        self.num_unused = 0
        self.waiting = None
        self._aside: dict[int, tuple[int, IntArray]] = {}
        self._probed = np.zeros(0, np.int64)

    def set_aside(self, number: int, position: int, rows: IntArray) -> None:
        """Take note of what a buffer sets aside.

        Args:
            number: Number of the buffer.
            position: Pool rows before the buffer's first.
            rows: (m,) int64 numbers of the rows in the stream.
        """
        self._aside[number] = (position, rows)

    def oldest_kept(self, num_probes: int, times: int = KEPT) -> int:
        """Number of the oldest buffer whose rows may still be drawn; what older ones set aside can go."""
        found = 0
        for number in sorted(self._aside, reverse=True):
            position, rows = self._aside[number]
            if position < self.position:
                found += len(rows)
                if found >= times * num_probes:
                    return number
        return 0

    def let_go_before(self, number: int) -> None:
        """Forget older buffers."""
        self._aside = {each: found for each, found in self._aside.items() if each >= number}

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
        """The rows that a round probes; what it chooses from is not read yet. Changes nothing.

        Args:
            round_number: Number of the round, which seeds the draw.
            num_selected: Not used.
            selection_ratio: Not used.
            candidate_scope: Not used.
            num_probes: How many rows to probe, of those that buffers which began before the position have set aside;
                rows that an earlier round probed only where others are too few.
            group_of: Not used: a stream has no column of groups.

        Returns:
            The probes, without candidates; `cursor_after` is the position.

        Raises:
            MatesError: too few rows were set aside.
        """
        oldest = self.oldest_kept(num_probes, WINDOW)
        eligible = [r for n, (at, r) in sorted(self._aside.items()) if n >= oldest and at < self.position]
        rows = np.concatenate([np.zeros(0, np.int64), *eligible])
        if len(rows) < min(num_probes, 10):
            raise MatesError(
                f"Round {round_number} must have rows of the stream to probe, got {len(rows)} that were set aside "
                f"before it. Raise `update_steps` or `buffer_rows`, or lower `num_probes`."
            )
        generator = np.random.default_rng([self.seed, round_number, PROBES])
        again = np.isin(rows, self._probed)
        order = np.concatenate([generator.permutation(rows[~again]), generator.permutation(rows[again])])
        return RoundDraw(np.zeros(0, np.int64), order[:num_probes], self.position)

    def num_probed_before(self, rows: IntArray) -> int:
        """How many of some rows an earlier round probed."""
        return int(np.count_nonzero(np.isin(rows, self._probed)))

    def mark_probed(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Record that rows were probed: later rounds probe others first."""
        self._probed = np.union1d(self._probed, rows)

    def narrowed(self, draw: RoundDraw, num_selected: int, config: MatesConfig) -> RoundDraw:
        """The same: a shorter round chooses from fewer buffers."""
        return draw

    def prepare(self) -> None:
        """Nothing to shuffle."""

    def mark_trained(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Nothing to mark: a row of a stream is read once."""

    def mark_offered(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Nothing to mark: there is one pass."""

    def release(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Nothing was assigned."""

    def make_room(self, num_selected: int, config: MatesConfig) -> None:
        """There is one pass."""

    def to_bits(self) -> npt.NDArray[np.uint8]:
        """(0,) uint8: which rows were trained on is in the buffers' files."""
        return np.zeros(0, np.uint8)

    def probed_to_bits(self) -> npt.NDArray[np.uint8]:
        """(0,) uint8: which rows were probed is in the rounds' labels."""
        return np.zeros(0, np.uint8)

    def waiting_to_bits(self) -> None:
        """None: no row waits for its turn."""
