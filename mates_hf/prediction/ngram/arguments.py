"""The arguments of an n-gram influence model, checked.

Where it is used: its constructor. Trade-off: a number of buckets must be a power of two, so that a hash is cut to it
by a mask.
"""

from __future__ import annotations

from typing import Any, Literal

LabelKind = Literal["auto", "token", "document", "both"]


def check_arguments(num_buckets: int, pool_decay: float, seed: Any, labels: str) -> None:
    """Raise a `ValueError` where an argument is outside its range.

    Args:
        num_buckets: Hash buckets of the bigram table.
        pool_decay: Weight of the previous round's labels.
        seed: Random seed of the splits.
        labels: What is fitted.
    """
    if num_buckets < 2 or num_buckets & (num_buckets - 1):
        raise ValueError(f"`num_buckets` must be a power of two of at least 2, got {num_buckets!r}.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
    if not 0 <= pool_decay <= 1:
        raise ValueError(f"`pool_decay` must be in [0, 1], got {pool_decay!r}.")
    if labels not in ("auto", "token", "document", "both"):
        raise ValueError(f"`labels` must be 'auto', 'token', 'document' or 'both', got {labels!r}.")
