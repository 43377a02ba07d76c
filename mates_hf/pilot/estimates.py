"""How sure a figure of a pilot is: its interval over seeds and passages, and how many seeds more would settle it.

Where it is used: `summary` makes estimates of paired figures, `verdict` asks them. Half of an interval is the root of
two squares: the t interval over seeds, and what other passages would have changed, by bootstrap.

Trade-off: the part that seeds and passages share is counted twice, so intervals are rather too wide than too narrow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

_RESAMPLES = 400
_MOST_SEEDS = 100
_LEAST_SEEDS = 3  # that are asked for where there is one

Values = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds, and how far it may be off.

    Attributes:
        mean: Mean over seeds.
        seed_deviation: Standard deviation over seeds; None of one seed, which has no interval.
        passage_half: Half of the 95 % interval over passages.
        num_seeds: Number of seeds.
    """

    mean: float
    seed_deviation: float | None
    passage_half: float
    num_seeds: int

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval; None of one seed."""
        return self._half(self.num_seeds)

    def _half(self, num_seeds: int) -> float | None:
        if self.seed_deviation is None or num_seeds < 2:
            return None
        width = float(stats.t.ppf(0.975, num_seeds - 1)) * self.seed_deviation / math.sqrt(num_seeds)
        return math.hypot(width, self.passage_half)

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half is None else self.mean + self.half

    def more_seeds(self, value: float) -> int | None:
        """Further seeds after which the interval would leave a value out, if mean and deviation stay as they are.

        Args:
            value: What the interval should not hold.

        Returns:
            The number, 0 where it does not hold it now; None where none up to a hundred would do.
        """
        if self.seed_deviation is None:
            return max(0, _LEAST_SEEDS - self.num_seeds)
        for num in range(self.num_seeds, _MOST_SEEDS + 1):
            half = self._half(num)
            if half is not None and half < abs(self.mean - value):
                return num - self.num_seeds
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the interval."""
        return {**dataclasses.asdict(self), "low": self.low, "high": self.high}


def estimate(figure: Callable[[Values], Sequence[float]], num_passages: int) -> Estimate:
    """A figure over seeds, with the interval over seeds and passages.

    Args:
        figure: From (P,) weights of passages to one value a seed.
        num_passages: P.

    Returns:
        The estimate.
    """
    values = np.asarray(figure(np.ones(num_passages)), np.float64)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(num_passages, np.full(num_passages, 1 / num_passages), _RESAMPLES).astype(np.float64)
    means = np.array([np.mean(figure(weights)) for weights in drawn])
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(
        mean=float(values.mean()),
        seed_deviation=float(values.std(ddof=1)) if len(values) > 1 else None,
        passage_half=float(high - low) / 2,
        num_seeds=len(values),
    )


def mean_loss(sums: Values, tokens: Values, weights: Values) -> Values:
    """Token-weighted mean loss of (..., P) sums over passages of P weights, nats/token."""
    return np.asarray(sums @ weights / (tokens @ weights))


def first_reached(steps: Values, losses: Values, loss: float) -> float | None:
    """The step at which a curve first gets to a loss, interpolated; None where it does not."""
    for i in np.flatnonzero(losses <= loss)[:1].tolist():
        if i == 0:
            return float(steps[0])
        share = (losses[i - 1] - loss) / max(losses[i - 1] - losses[i], 1e-12)
        return float(steps[i - 1] + min(share, 1.0) * (steps[i] - steps[i - 1]))
    return None
