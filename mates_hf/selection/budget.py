"""A budget: how much of a scored dataset is kept, and the rule by which rows are.

Where it is used: `result.Selection` and the filter of a stream ask it. Trade-off: rows are kept by pure functions of
predictions and numbers of tokens, so that another budget costs no second scoring.

Sign: > 0 helps, higher is better. Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mates_hf.prediction.score import Predictions
from mates_hf.prediction.worth import row_worth
from mates_hf.records import IntArray
from mates_hf.selection.choose import gumbel_top_k, noisy, nth_true, ranked, with_others
from mates_hf.selection.quota import Quota, best_within

logger = logging.getLogger(__name__)

_WELL_USED = 0.9  # of a token budget; below it, a warning

Ranking = Literal["influence", "row_worth"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to keep. Exactly one of the first four is given.

    Attributes:
        ratio: Share of the rows to keep, in (0, 1]; rounded to whole rows, at least one.
        k: Number of rows to keep.
        threshold: Lowest `influence` of a row that is kept. Of path labels only the order means anything.
        num_tokens: Largest number of trained tokens of the kept rows together. Rows are taken from the highest
            influence down; a row that does not fit into what is left is skipped.
        random_share: Share of what is kept that is drawn at random from the rest, in [0, 1).
        temperature: Temperature of the Gumbel noise, in standard deviations of the labels; 0 takes the highest.
        seed: Random seed of the noise and of the order among ties, from 0 to below 2**64.
        order_only: Whether the labels give an order and price no step, so that a threshold means nothing. Then a
            warning says so.

    Raises:
        ValueError: none or several are given, or one is out of range.
    """

    ratio: float | None = None
    k: int | None = None
    threshold: float | None = None
    num_tokens: int | None = None
    random_share: float = 0.0
    temperature: float = 0.0
    seed: int = 0
    order_only: bool = False

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in ("ratio", "k", "threshold", "num_tokens")}
        given = [name for name, value in values.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                "Exactly one of `ratio`, `k`, `threshold` and `num_tokens` must say how much to keep, got "
                f"{', '.join(f'{name}={values[name]!r}' for name in given) or 'none'}."
            )
        rules: dict[str, tuple[bool, str]] = {
            "ratio": (self.ratio is None or 0 < self.ratio <= 1, "in (0, 1]"),
            "k": (_is_count(self.k), "a whole number of at least 0"),
            "threshold": (self.threshold is None or not math.isnan(self.threshold), "a number"),
            "num_tokens": (_is_count(self.num_tokens), "a whole number of at least 0"),
            "random_share": (0 <= self.random_share < 1, "in [0, 1)"),
            "temperature": (0 <= self.temperature < math.inf, "a finite number of at least 0"),
            "seed": (self.seed is not None and _is_count(self.seed) and self.seed < 2**64, _SEEDS),
        }
        for name, (ok, rule) in rules.items():
            if not ok:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")
        for name, wanted in (("temperature", "a temperature"), ("random_share", "a random share")):
            if self.threshold is not None and getattr(self, name):
                raise ValueError(
                    f"`{name}` must be 0 with `threshold`, which asks for all rows above it, got "
                    f"{getattr(self, name)}. Use `ratio` or `k` with {wanted}."
                )
        if self.threshold is not None and self.order_only:
            logger.warning(
                "`threshold` has no meaning here: the influence model was fitted on path labels, which give an order "
                "and whose zero and scale are not those of a step. Use `ratio`, `k` or `num_tokens`."
            )

    def of_labels(self, label_unit: Any) -> Budget:
        """The budget where the labels price a step (`"step"`) or give an order (`"order"`); None is not known."""
        return dataclasses.replace(self, order_only=label_unit == "order")

    @property
    def ranking(self) -> Ranking:
        """What rows are ranked by: `influence` where tokens are counted, `row_worth` where rows are."""
        return "row_worth" if self.threshold is None and self.num_tokens is None else "influence"


_SHARE = 0x5A4E  # the stream of random numbers of a random share
_SEEDS = "a whole number from 0 to below 2**64"


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 0)


def asked_for(budget: Budget) -> str:
    """A budget as it was written, defaults left out."""
    said = [f"{name}={getattr(budget, name)}" for name in ("ratio", "k", "threshold", "num_tokens")]
    said = [word for word in said if not word.endswith("=None")]
    drawn = [f"{name}={getattr(budget, name)}" for name in ("random_share", "temperature") if getattr(budget, name)]
    return ", ".join([*said, *drawn, *([f"seed={budget.seed}"] if drawn else [])])


def rank_values(scored: Predictions, ranking: Ranking) -> npt.NDArray[np.float32]:
    """What rows are ranked by, (N,) float32, higher is better.

    `influence` as predicted; or `row_worth` of it, in nats/token times tokens (`influence` is `influence_per_token`
    times a step size that all rows share, so both rank alike).
    """
    if ranking == "influence":
        return scored.influence
    return np.asarray(row_worth(scored.influence, scored.num_targets), np.float32)


def temperature_unit(num_targets: npt.NDArray[np.int32], ranking: Ranking, label_std: float) -> float:
    """Standard deviation of the labels in the unit that rows are ranked in.

    Args:
        num_targets: (N,) trained tokens of the rows.
        ranking: What the rows are ranked by.
        label_std: Standard deviation of the labels' `influence`.

    Returns:
        `label_std`; for `row_worth`, n (d - mean), what that is over rows of these lengths whose influence d does not
        depend on their length n: `label_std` times the root of the mean of n squared.

    Raises:
        ValueError: the fit did not record a standard deviation.
    """
    trained = num_targets[num_targets > 0].astype(np.float64)
    return temperature_unit_of(float(np.mean(trained**2)) if len(trained) else 1.0, ranking, label_std)


def temperature_unit_of(mean_square: float, ranking: Ranking, label_std: float) -> float:
    """`temperature_unit` where only the mean of the squares of the rows' numbers of trained tokens is at hand.

    Args:
        mean_square: Mean of n squared over the rows that have a trained token.
        ranking: What the rows are ranked by.
        label_std: Standard deviation of the labels' `influence`.

    Returns:
        As `temperature_unit`.

    Raises:
        ValueError: the fit did not record a standard deviation.
    """
    if not (math.isfinite(label_std) and label_std > 0):
        raise ValueError(
            "A `temperature` above 0 is in standard deviations of the labels, and this model's fit records "
            f"{label_std}. Use `temperature=0`."
        )
    return label_std if ranking == "influence" else label_std * math.sqrt(mean_square)


def keep_rows(scored: Predictions, budget: Budget, label_std: float, quota: Quota | None = None) -> IntArray:
    """The rows that a budget keeps.

    Args:
        scored: Predictions of N rows.
        budget: How much to keep. Rows without a trained token come last in a row budget and never in a token budget;
            with `threshold` their influence, the intercept, decides. Rows that rank alike stand in one random order. A
            random share is of rows with a trained token, too, as far as there are any.
        label_std: Standard deviation of the labels' `influence`, the unit of a temperature.
        quota: Bounds of what each group of rows gets; None sets none.

    Returns:
        (k,) int64 row numbers, ascending.

    Raises:
        ValueError: `k` is more than there are rows, a temperature without `label_std`, or a quota with a budget that
            counts no rows.
    """
    num = len(scored.influence)
    if quota is not None:
        require_rows(budget)
    if budget.threshold is not None:
        return np.flatnonzero(scored.influence >= np.float32(budget.threshold))
    if budget.k is not None and budget.k > num:
        raise ValueError(f"`k` must be at most the number of rows ({num}), got {budget.k}.")
    trained = scored.num_targets > 0
    values = rank_values(scored, budget.ranking)[trained]
    if budget.temperature and len(values):
        values = values / np.float32(temperature_unit(scored.num_targets, budget.ranking, label_std))
    where = np.flatnonzero(trained)
    if budget.num_tokens is not None:
        order = where[ranked(values, budget.temperature, budget.seed)]
        kept: IntArray = np.sort(_filled(order, scored.num_targets, budget))
        return kept
    k = budget.k if budget.k is not None else share_of(num, budget.ratio)
    num_ranked = min(k - round(budget.random_share * k), len(values))
    if quota is not None:
        return _kept_within(quota, values, trained, (num_ranked, k), budget)
    chosen = gumbel_top_k(values, num_ranked, temperature=budget.temperature, seed=budget.seed)
    if budget.random_share:
        others = np.ones(len(values), np.bool_)
        others[chosen] = False
        chosen = with_others(chosen, others, min(k, len(values)), (budget.seed, _SHARE))
    chosen = where[chosen]
    if k > len(values):
        chosen = np.sort(np.concatenate([chosen, nth_true(~trained, np.arange(k - len(values)))]))
    return np.asarray(chosen, np.int64)


def require_rows(budget: Budget) -> None:
    """Raise a `ValueError` where a budget counts no rows, so that bounds on groups mean nothing."""
    if budget.ranking != "row_worth":
        raise ValueError(
            "Bounds on groups hold for a number of rows, and `num_tokens` and `threshold` fix none. Use `ratio` or "
            "`k`."
        )


def _kept_within(
    quota: Quota, values: npt.NDArray[Any], trained: npt.NDArray[np.bool_], numbers: tuple[int, int], budget: Budget
) -> IntArray:
    """`keep_rows` of a row budget with bounds on groups; `numbers` are of the best rows and of all."""
    k, num = numbers
    if budget.temperature and len(values):
        values = noisy(values, budget.temperature, budget.seed)
    limits, within = quota.limits(num, trained), min(num, len(values))
    seeds = (budget.seed, [budget.seed, _SHARE])
    chosen = np.flatnonzero(trained)[best_within(values, quota.codes[trained], limits, (k, within), seeds)]
    return np.sort(np.concatenate([chosen, nth_true(~trained, np.arange(num - within))]))


def _filled(order: IntArray, num_targets: npt.NDArray[np.int32], budget: Budget) -> IntArray:
    """The rows of an order that fit into a budget of tokens, and random others that fit into its random share."""
    num_tokens = int(budget.num_tokens or 0)
    rows = filled(order, num_targets, num_tokens - round(budget.random_share * num_tokens))
    if budget.random_share:
        others = np.random.default_rng([budget.seed, _SHARE]).permutation(np.setdiff1d(order, rows))
        left = num_tokens - int(num_targets[rows].sum(dtype=np.int64))
        rows = np.concatenate([rows, filled(others, num_targets, left)])
    used = int(num_targets[rows].sum(dtype=np.int64))
    if used < _WELL_USED * num_tokens and len(rows) < len(order):
        skipped = int(order[~np.isin(order, rows)][0])
        logger.warning(
            "`num_tokens=%d` keeps %d tokens in %d rows, %.0f %% of the budget: rows are taken whole, and those left "
            "are longer than what is left of it. The first that does not fit is row %d, with %d trained tokens. Raise "
            "`num_tokens`, or cut the rows.",
            num_tokens, used, len(rows), 100 * used / num_tokens, skipped, int(num_targets[skipped]),
        )  # fmt: skip
    return rows


def filled(order: IntArray, num_targets: npt.NDArray[np.int32], num_tokens: int) -> IntArray:
    """The rows of an order that fit into a number of tokens, each tried in its turn.

    Args:
        order: Row numbers, the best first.
        num_targets: (N,) int32 trained tokens of all rows.
        num_tokens: Number of tokens that there is room for.

    Returns:
        The row numbers, in their order.
    """
    left, parts = num_tokens, [order[:0]]
    while len(order):
        ends = np.cumsum(num_targets[order], dtype=np.int64)
        num = int(np.searchsorted(ends, left, side="right"))
        parts.append(order[:num])
        left -= int(ends[num - 1]) if num else 0
        rest = order[num + 1 :]
        order = rest[num_targets[rest] <= left]
    return np.concatenate(parts)


def share_of(num: int, ratio: float | None) -> int:
    """Rows in a share of `num`: rounded, at least one where there is one."""
    return min(num, max(1, round(num * (ratio or 0.0))))
