"""What rows of several lengths are worth to a batch: the one ranking that a fit is judged by and a round selects by.

Sign: > 0 helps, higher is better. Memory beyond the input is one array of its size; the rest goes in blocks.

Shape suffix: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 20  # rows handled at once


def row_worth(influence_per_token: npt.ArrayLike, num_tokens: npt.ArrayLike) -> npt.NDArray[Any]:
    """What a row adds to a batch, `num_tokens * (influence_per_token - pool mean)`; to rank by where rows are counted.

    The Trainer minimises a token-weighted loss, so to first order a batch of rows with n_i trained tokens and
    influence per token d_i is worth their token-weighted mean, D = sum(n_i d_i) / T with T = sum(n_i). One more row of
    n tokens and influence d changes that by

        (T D + n d) / (T + n) - D  =  n (d - D) / (T + n)  =  n (d - D) / T * (1 + O(n / T)).

    T is the same for every row that could be added, and D is on average the pool's token-weighted mean, so rows rank
    by n (d - D): a long row counts more, for better or worse, and a row no better than the tokens it displaces is
    worth nothing. With this mean, and not the plain mean over rows, the worth of all rows sums to 0.

    Args:
        influence_per_token: (N,) influence a trained token, > 0 helps.
        num_tokens: (N,) trained tokens of each row, at least 0. A row without any is worth 0.

    Returns:
        (N,) float32 (float64 where `influence_per_token` is), in the unit of `influence_per_token` times tokens;
        > 0 makes the average batch better, higher is better. Where all rows have one length it ranks like
        `influence_per_token`.

    Raises:
        ValueError: the arrays differ in shape, or a count is negative.
    """
    values_N, num_N = np.asarray(influence_per_token), np.asarray(num_tokens)
    if values_N.ndim != 1 or values_N.shape != num_N.shape:
        raise ValueError(
            "`influence_per_token` and `num_tokens` must be one-dimensional and of one length, got shapes "
            f"{values_N.shape} and {num_N.shape}."
        )
    if num_N.size and num_N.min() < 0:
        raise ValueError(f"`num_tokens` must be at least 0, got {num_N.min()} at position {int(num_N.argmin())}.")
    total = float(num_N.sum(dtype=np.float64))
    sums = [float(np.multiply(values_N[i], num_N[i], dtype=np.float64).sum()) for i in _spans(len(num_N))]
    mean = math.fsum(sums) / total if total else 0.0
    worth_N = np.empty(len(num_N), np.result_type(values_N.dtype, np.float32))
    for span in _spans(len(num_N)):
        worth_N[span] = num_N[span] * (values_N[span].astype(np.float64) - mean)
    return worth_N


def _spans(num: int) -> Iterator[slice]:
    """The span of each block of rows."""
    return (slice(start, min(start + BLOCK, num)) for start in range(0, num, BLOCK))
