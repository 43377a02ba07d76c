"""The compiled loop under `copies.row_hashes`: a sum over the tokens of each row, at memory speed.

Where it is used: only where rows are hashed, so that reading a finished round compiles nothing. Trade-off: compiled
with numba on first use, half a second for each integer type of the token ids; numpy took several times as long.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_ONE, _ZERO = np.uint64(1), np.uint64(0)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


@numba.njit(nogil=True)
def sum_tokens(values: Any, begins: Any, stops: Any, step: Any, out: Any) -> None:
    """Write the sum of each row's mixed tokens, each with its place (SplitMix64's finaliser, as `copies._mix`).

    Args:
        values: (T,) integer token ids.
        begins: (N,) int64 first token of each row.
        stops: (N,) int64 token behind each row's last.
        step: uint64 that a place is multiplied by.
        out: (N,) uint64, written to.
    """
    for row in range(len(out)):
        total, place = _ZERO, _ZERO
        for i in range(begins[row], stops[row]):
            mixed = place * step + np.uint64(np.int64(values[i]))
            mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FIRST
            mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _SECOND
            total += mixed ^ (mixed >> _SHIFTS[2])
            place += _ONE
        out[row] = total
