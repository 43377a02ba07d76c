"""What an n-gram influence model is given, checked: its arguments, and the derivatives among labels.

Where it is used: its constructor and its fit. Trade-off: a number of buckets must be a power of two, so that a hash is
cut to it by a mask.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mates_hf.records import InfluenceLabels

LabelKind = Literal["auto", "token", "document", "both"]


def check_buckets(num_buckets: Any) -> None:
    """Raise a `ValueError` where a number of hash buckets is no power of two of at least 2."""
    if not isinstance(num_buckets, int) or num_buckets < 2 or num_buckets & (num_buckets - 1):
        raise ValueError(f"`num_buckets` must be a power of two of at least 2, got {num_buckets!r}.")


def check_arguments(num_buckets: int, pool_decay: float, seed: Any, labels: str, evidence_weight: float) -> None:
    """Raise a `ValueError` where an argument is outside its range.

    Args:
        num_buckets: Hash buckets of the bigram table.
        pool_decay: Weight of the previous round's labels.
        seed: Random seed of the splits.
        labels: What is fitted.
        evidence_weight: How much static evidence counts beside labels.
    """
    check_buckets(num_buckets)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
    if not 0 <= pool_decay <= 1:
        raise ValueError(f"`pool_decay` must be in [0, 1], got {pool_decay!r}.")
    if labels not in ("auto", "token", "document", "both"):
        raise ValueError(f"`labels` must be 'auto', 'token', 'document' or 'both', got {labels!r}.")
    if not 0 <= evidence_weight < math.inf:
        raise ValueError(f"`evidence_weight` must be a finite number of at least 0, got {evidence_weight!r}.")


def standardised_derivatives(labels: InfluenceLabels, scale: float) -> npt.NDArray[np.float64]:
    """The derivative at each target, minus their mean, in standard deviations of `influence_per_token`.

    Args:
        labels: Labels that have them.
        scale: That standard deviation.

    Returns:
        (K,) float64, for the K targets of all candidates.

    Raises:
        ValueError: one is not finite.
    """
    assert labels.token_derivatives is not None
    derivatives = np.asarray(labels.token_derivatives, np.float64)
    derivatives = np.asarray((derivatives - derivatives.mean()) / scale)
    if not np.isfinite(derivatives).all():
        raise ValueError("`labels.token_derivatives` must be finite. Look for NaN in the probed losses.")
    return derivatives
