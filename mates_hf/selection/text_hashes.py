"""The compiled loops under `copies.row_hashes` and `score_file.content_hashes`: rows of tokens or bytes to hashes.

Where it is used: only where rows are hashed, so that reading a finished round compiles nothing. Trade-off: compiled
with numba on a machine's first use, half a second for each integer type of the token ids; numpy took several times
as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mates_hf.prediction.compiled import compiled

_ONE, _ZERO = np.uint64(1), np.uint64(0)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN, _EIGHT, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(8), np.uint64(32)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


@compiled
def sum_tokens(values: Any, begins: Any, stops: Any, step: Any, out: Any) -> None:
    """Write the sum of each row's mixed tokens, each with its place (SplitMix64's finaliser, as `copies.mix`).

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


@compiled
def hash_bytes(values: Any, starts: Any, lengths: Any, out: Any) -> None:
    """Write a hash of each row's bytes, the same on every platform and in every version, at gigabytes a second.

    A row of L bytes starts as L * 0xBF58476D1CE4E5B9. Each 8 bytes of it, read as a little-endian number that ends in
    zero bytes, make h into `f((h ^ number) * 0x9E3779B97F4A7C15)` with `f(x) = x ^ (x >> 32)`. The last number has 0
    to 7 bytes. SplitMix64's finaliser is the last step.

    Args:
        values: (B,) uint8 bytes.
        starts: (N,) int64 first byte of each row.
        lengths: (N,) int64 bytes of each row.
        out: (N,) uint64, written to.
    """
    for row in range(len(out)):
        i, left = np.uint64(starts[row]), np.uint64(lengths[row])
        total = left * _FIRST
        while left >= _EIGHT:
            eight = np.uint64(values[i])
            for k in range(1, 8):  # one load: the compiler sees that these are neighbours
                eight |= np.uint64(values[i + np.uint64(k)]) << np.uint64(8 * k)
            total = (total ^ eight) * _GOLDEN
            total ^= total >> _HALF
            i += _EIGHT
            left -= _EIGHT
        rest = _ZERO
        for k in range(left):
            rest |= np.uint64(values[i + np.uint64(k)]) << np.uint64(8 * k)
        total = (total ^ rest) * _GOLDEN
        total ^= total >> _HALF
        total = (total ^ (total >> _SHIFTS[0])) * _FIRST
        total = (total ^ (total >> _SHIFTS[1])) * _SECOND
        out[row] = total ^ (total >> _SHIFTS[2])
