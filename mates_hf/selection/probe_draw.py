"""Which rows of a pool a round probes: at random, those first that teach most about what is to be chosen.

Where it is used: the ledger draws the probes of a round here, and `verify` draws them again. Trade-off: masks of the
whole pool, one at a time, so that a draw needs no list of the free rows; groups are read of few rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mates_hf.records import IntArray
from mates_hf.selection.choose import GroupOf, even_places, nth_true
from mates_hf.selection.turns import Mask

_DRAWN_FROM = 16  # rows a probe whose groups are looked at where probes are drawn group by group


def draw_probes(
    free: Mask, ahead: Mask, probed: Mask, num: int, seed: Sequence[int], group_of: GroupOf | None = None
) -> IntArray:
    """Free rows, uniformly without replacement: never probed and ahead, never probed, then any.

    Args:
        free: (N,) rows that may be drawn.
        ahead: (N,) rows whose turn is still to come, or (1,) true for all.
        probed: (N,) rows that earlier rounds probed.
        num: Rows to draw; fewer where fewer are free.
        seed: Of the random numbers.
        group_of: The number of each row's group, asked once for each kind of row. Then each group has its share of
            the probes, but for rounding.

    Returns:
        (num,) int64 rows.
    """
    generator = np.random.default_rng(seed)
    found: list[IntArray] = []
    missing = num
    # One mask of the pool at a time; a > b of two masks is a and not b.
    kinds: tuple[Callable[[], Mask], ...] = (
        lambda: np.logical_and(free > probed, ahead),
        lambda: np.greater(free > probed, ahead),
        lambda: np.logical_and(free, probed),
    )
    for rows_of_kind in kinds:
        part = rows_of_kind()
        there = int(np.count_nonzero(part))
        taken = min(missing, there)
        num_drawn = taken if group_of is None or taken == there else min(there, _DRAWN_FROM * taken)
        if taken:
            rows = nth_true(part, generator.choice(there, num_drawn, replace=False))
            if group_of is not None and num_drawn > taken:
                rows = rows[even_places(group_of(rows), taken, generator)]
            found.append(rows)
        missing -= taken
        if not missing:
            break
    return np.concatenate(found) if found else np.zeros(0, np.int64)
