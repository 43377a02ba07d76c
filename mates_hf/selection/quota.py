"""Quotas: no group of rows gets more than a multiple of its share of the candidates, none less than another.

Where it is used: the select stage of a round and `budget.keep_rows`, where a column says which group a row is of.
Bounds are multiples of a group's share, so that there is always a choice that keeps them, and no table of names is
needed. Trade-off: the rows are exactly the best that the bounds allow (a matroid, so taking the best that still fits
is right), for the price of one full sort.

Sign: > 0 helps, higher is better. Shape suffixes: M candidates, G groups.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.config import MatesConfig
from mates_hf.data.groups import Groups
from mates_hf.records import IntArray
from mates_hf.selection.choose import Seed, largest, ranked


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds that were asked for, by the column that says which group a row is of.

    Attributes:
        column: Name of the column.
        most: As `Quota.most`.
        least: As `Quota.least`.

    Raises:
        ValueError: a bound is out of range.
    """

    column: str
    most: float | None = None
    least: float = 0.0

    def __post_init__(self) -> None:
        check_boosts(self.most, self.least)

    @property
    def bind(self) -> bool:
        """Whether they bound anything, and do not only say which groups there are."""
        return self.most is not None or self.least > 0


@dataclasses.dataclass(frozen=True)
class Quota:
    """Bounds of what each group may get.

    Attributes:
        codes: (M,) integer group of each candidate, from 0; the numbers mean nothing else.
        most: Largest multiple of its share of the candidates that a group may get, at least 1; None sets no bound.
        least: Smallest multiple that it must get, in [0, 1], as far as it has rows.

    Raises:
        ValueError: a bound is out of range.
    """

    codes: npt.NDArray[np.integer[Any]]
    most: float | None = None
    least: float = 0.0

    def __post_init__(self) -> None:
        check_boosts(self.most, self.least)

    @classmethod
    def of(cls, codes: npt.NDArray[Any] | None, most: float | None, least: float) -> Quota | None:
        """The bounds on these groups; None where there are none, or rows have no group."""
        return None if codes is None or (most is None and not least) else cls(codes, most, least)

    def limits(self, num_rows: int, may: npt.NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
        """Rows that each group must get and may get.

        Args:
            num_rows: Rows that are chosen in all.
            may: (M,) bool, True where a candidate may be chosen at all.

        Returns:
            (G,) int64 least, which add up to at most `num_rows`, and (G,) int64 most.
        """
        num_groups = int(self.codes.max(initial=-1)) + 1
        sizes = np.bincount(self.codes, minlength=num_groups)
        there = np.bincount(self.codes[may], minlength=num_groups)
        return limits_of(sizes, there, num_rows, self.most, self.least)


def limits_of(
    sizes: IntArray, there: IntArray, num_rows: int, most: float | None, least: float
) -> tuple[IntArray, IntArray]:
    """Rows that each group must get and may get.

    Args:
        sizes: (G,) candidates of each group.
        there: (G,) those of them that may be chosen at all.
        num_rows: Rows that are chosen in all.
        most: As `Quota.most`.
        least: As `Quota.least`.

    Returns:
        (G,) int64 least, which add up to at most `num_rows`, and (G,) int64 most.
    """
    # In whole numbers where the share is one: 0.3 * 10 must not be 3.0000000000000004, whose ceiling is 4.
    fair = sizes * (num_rows / max(1, int(sizes.sum())))
    lowest = np.floor(_clean(least * fair)).astype(np.int64)
    highest = there if most is None else np.ceil(_clean(most * fair)).astype(np.int64)
    return np.minimum(lowest, there), np.minimum(highest, there)


def places_in_groups(codes: npt.NDArray[np.integer[Any]], num_groups: int) -> IntArray:
    """(R,) int64 place of each row among those of its group, from 0, in the order in which they stand."""
    by_group = np.argsort(codes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=num_groups))])[:-1]
    place = np.empty(len(codes), np.int64)
    place[by_group] = np.arange(len(codes)) - starts[codes[by_group]]
    return place


def quota_of(config: MatesConfig, groups: Groups | None) -> Quota | None:
    """The bounds of a run's config on the groups of a round's candidates; None where there are none.

    Args:
        config: The config of the run.
        groups: Groups of the candidates, or None where rows have no group.

    Returns:
        The bounds.
    """
    codes = None if groups is None else groups.codes
    return Quota.of(codes, config.max_group_boost, config.min_group_boost)


def check_boosts(most: float | None, least: float) -> None:
    """Raise a `ValueError` unless the multiples of a group's share are such that every pool has a choice."""
    if most is not None and not (math.isfinite(most) and most >= 1):
        raise ValueError(
            f"`max_group_boost` must be None or a number of at least 1, got {most!r}. 1 gives each group its share of "
            "the candidates, 2 at most twice that."
        )
    if not 0 <= least <= 1:
        raise ValueError(
            f"`min_group_boost` must be in [0, 1], got {least!r}. 1 gives each group its share of the candidates, 0.5 "
            "at least half of it."
        )


def first_allowed(
    order: IntArray, codes: IntArray, k: int, least: IntArray, most: IntArray, num_rows: int
) -> IntArray:
    """The first k of an order that the bounds allow, with room left for what groups must still get.

    Args:
        order: (R,) int64 positions, the best first.
        codes: (M,) integer group of each position.
        k: Rows to choose now.
        least: (G,) int64 rows that each group must get of `num_rows`.
        most: (G,) int64 rows that each may get.
        num_rows: Rows that are chosen in all, now and later, at least k.

    Returns:
        Int64 positions, ascending; fewer than k where the bounds allow no more.
    """
    groups = codes[order]
    place = places_in_groups(groups, len(most))
    must = place < least[groups]
    free = ~must & (place < most[groups])
    free[free] = np.cumsum(free[free]) <= num_rows - int(least.sum())
    return np.sort(order[must | free][:k])


def best_within(
    values_N: npt.NDArray[Any],
    codes: npt.NDArray[Any],
    limits: tuple[IntArray, IntArray],
    numbers: tuple[int, int],
    seeds: tuple[Seed, Seed],
    left_out: IntArray | None = None,
) -> IntArray:
    """The best rows that a quota allows, then random ones that it allows, then whatever is left.

    Args:
        values_N: (N,) finite numbers, higher is better.
        codes: (N,) integer group of each.
        limits: (G,) rows that each group must get, and may get, of all that are chosen.
        numbers: Rows to choose by their value, and rows to choose in all.
        seeds: Random seeds of the order among equals, and of the random rows.
        left_out: Positions that are chosen only where all others and the bounds do not suffice.

    Returns:
        (num,) int64 positions, ascending.
    """
    (k, num), (least, most) = numbers, limits
    free = np.ones(len(values_N), np.bool_)
    free[[] if left_out is None else left_out] = False
    order = ranked(values_N, 0.0, seeds[0])
    order = order[free[order]]
    chosen = first_allowed(order, codes, k, least, most, num)
    if num > k:
        taken = np.bincount(codes[chosen], minlength=len(most))
        rest = np.setdiff1d(order, chosen)
        by_chance = rest[np.random.default_rng(seeds[1]).permutation(len(rest))]
        missing = num - len(chosen)
        more = first_allowed(by_chance, codes, missing, np.maximum(least - taken, 0), most - taken, missing)
        chosen = np.sort(np.concatenate([chosen, more]))
    if len(chosen) < num:
        others = np.setdiff1d(np.arange(len(values_N)), chosen)
        best = largest(np.where(free[others], values_N[others], -np.inf), num - len(chosen), seeds[0])
        chosen = np.sort(np.concatenate([chosen, others[best]]))
    return np.asarray(chosen, np.int64)


def _clean(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers without the rounding of a product: those that are whole but for it are whole."""
    near = np.rint(values)
    return np.where(np.abs(values - near) < 1e-9 * np.maximum(1, near), near, values)
