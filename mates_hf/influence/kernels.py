"""Compiled loops of the n-gram influence model: scoring rows of tokens, and fitting the shrunken tables.

Place in the flow: under `ngram.py`, and knows arrays only. Trade-off: compiled with numba on first use
(about a second for each integer type of the token ids, not cached on disk, so that read-only installs and clusters of
mixed processors work) for scoring at memory speed. Every row is summed by one thread in text order and in float64, so
the result is the same to the bit, whatever the number of threads. The threads are Python's, around a kernel that lets
go of the interpreter: numba's own share the OpenMP runtime with torch, change how many threads training has, and kill
a child that is forked after they ran.

Shape suffixes: N rows, T tokens over all rows, V vocabulary, H hash buckets, C cells of the bigram table.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import IGNORED

_CHUNKS_PER_THREAD = 8
_SMALL = 2**18  # tokens below which threads are not worth starting
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WORD = np.uint64(32)


@numba.njit(inline="always")
def _bucket(previous: Any, token: Any, shift: Any) -> Any:
    """Hash bucket of a bigram: the top `64 - shift` bits of a multiplied, folded and multiplied key."""
    mixed = ((np.uint64(previous) << _WORD) | np.uint64(token)) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> _WORD)) * _MULTIPLIER
    return np.int64(mixed >> shift)


@numba.njit(nogil=True)
def _hash_bigrams(previous: Any, token: Any, shift: Any, out: Any) -> None:
    for i in range(len(previous)):
        out[i] = _bucket(previous[i], token[i], shift)


@numba.njit(inline="always")
def _score_row(
    values: Any, labels: Any, start: int, end: int, token_V: Any, previous_V: Any, bigram_H: Any, shift: Any
) -> Any:
    """Mean table value over one row's targets: 0 without targets, NaN where an id is negative."""
    vocab_size = len(token_V)
    total = 0.0
    num_targets = 0
    if end > start and values[start] < 0:
        return np.nan
    for i in range(start + 1, end):
        if values[i] < 0:
            return np.nan
        if labels[i] == IGNORED:
            continue
        if labels[i] < 0:
            return np.nan
        num_targets += 1
        token = np.int64(labels[i])
        previous = np.int64(values[i - 1])
        if token < vocab_size:
            total += np.float64(token_V[token])
        if previous < vocab_size:
            total += np.float64(previous_V[previous])
            if token < vocab_size:
                total += np.float64(bigram_H[_bucket(previous, token, shift)])
    return total / num_targets if num_targets else 0.0


@numba.njit(nogil=True)
def _score_serial(
    values: Any, labels: Any, offsets: Any, token_V: Any, previous_V: Any, bigram_H: Any, shift: Any, out: Any
) -> None:
    for i in range(len(out)):
        out[i] = _score_row(values, labels, offsets[i], offsets[i + 1], token_V, previous_V, bigram_H, shift)


@numba.njit(nogil=True)
def _backfit(
    count_C: Any,
    sum_C: Any,
    token_C: Any,
    previous_C: Any,
    slot_C: Any,
    penalties: Any,
    token_V: Any,
    previous_V: Any,
    slot_S: Any,
    num_sweeps: int,
) -> None:
    """Gauss-Seidel sweeps, in place, on the ridge `sum n (y - mu - T - P - B)^2 + sum of penalty * table^2`."""
    weight_T = np.full(len(token_V), penalties[0])
    weight_P = np.full(len(previous_V), penalties[1])
    weight_S = np.full(len(slot_S), penalties[2])
    total = 0.0
    for c in range(len(count_C)):
        weight_T[token_C[c]] += count_C[c]
        weight_P[previous_C[c]] += count_C[c]
        weight_S[slot_C[c]] += count_C[c]
        total += count_C[c]
    for _ in range(num_sweeps):
        mean = 0.0
        for c in range(len(count_C)):
            fitted = token_V[token_C[c]] + previous_V[previous_C[c]] + slot_S[slot_C[c]]
            mean += sum_C[c] - count_C[c] * fitted
        mean = mean / total
        token_V[:] = 0.0
        for c in range(len(count_C)):
            fitted = mean + previous_V[previous_C[c]] + slot_S[slot_C[c]]
            token_V[token_C[c]] += sum_C[c] - count_C[c] * fitted
        for k in range(len(token_V)):
            token_V[k] /= weight_T[k]
        previous_V[:] = 0.0
        for c in range(len(count_C)):
            fitted = mean + token_V[token_C[c]] + slot_S[slot_C[c]]
            previous_V[previous_C[c]] += sum_C[c] - count_C[c] * fitted
        for k in range(len(previous_V)):
            previous_V[k] /= weight_P[k]
        slot_S[:] = 0.0
        for c in range(len(count_C)):
            fitted = mean + token_V[token_C[c]] + previous_V[previous_C[c]]
            slot_S[slot_C[c]] += sum_C[c] - count_C[c] * fitted
        for k in range(len(slot_S)):
            slot_S[k] /= weight_S[k]
        slot_S[0] = 0.0


def _shift(num_buckets: int) -> np.uint64:
    return np.uint64(64 - (num_buckets.bit_length() - 1))


def hash_bigrams(previous: npt.NDArray[Any], token: npt.NDArray[Any], num_buckets: int) -> npt.NDArray[np.int64]:
    """Buckets of bigrams, the ones that scoring looks them up in.

    Args:
        previous: (C,) integer ids of the tokens before.
        token: (C,) integer ids of the targets.
        num_buckets: a power of two.

    Returns:
        (C,) int64 in [0, num_buckets).
    """
    out = np.empty(len(token), np.int64)
    _hash_bigrams(previous, token, _shift(num_buckets), out)
    return out


def backfit(
    count: npt.NDArray[np.float64],
    total: npt.NDArray[np.float64],
    token: npt.NDArray[np.int32],
    previous: npt.NDArray[np.int32],
    slot: npt.NDArray[np.int32],
    penalties: npt.NDArray[np.float64],
    tables: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]],
    num_sweeps: int,
) -> None:
    """Improve additive tables in place towards the ridge solution on a sparse bigram table.

    Args:
        count: (C,) weight of each cell, its summed weight positive.
        total: (C,) weighted sum of the derivative over each cell.
        token: (C,) target id of each cell.
        previous: (C,) id before it.
        slot: (C,) bigram parameter of each cell; slot 0 stays 0.
        penalties: (3,) for token, previous and bigram: the weight at which an effect is halved; positive.
        tables: token (V,), previous (V,) and slot tables; where the sweeps start.
        num_sweeps: passes over the table.
    """
    _backfit(count, total, token, previous, slot, penalties, *tables, num_sweeps)


def score_rows(
    values: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    labels: npt.NDArray[Any] | None,
    tables: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]],
    *,
    parallel: bool | None = None,
) -> npt.NDArray[np.float64]:
    """Mean over each row's targets of the token, previous-token and bigram tables.

    Args:
        values: (T,) integer token ids of any width; not copied.
        offsets: (N + 1,) int64.
        labels: (T,) integer with -100 where a token is not trained, or None for all but the first of each row.
        tables: token (V,), previous (V,) and bigram (H,) float32, H a power of two. Ids of V and above add 0.
        parallel: True uses one thread a core, False one; None decides by the number of tokens.

    Returns:
        (N,) float64, 0 for a row without targets, unit and sign those of the tables.

    Raises:
        ValueError: an id is negative, or the arrays do not fit each other.
    """
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"Token ids must be integers, got {values.dtype}. Tokenize the rows first.")
    for ids in (values, values if labels is None else labels):
        if ids.dtype == np.uint64 and len(ids) and ids.max() >= 2**63:  # would be negative, hence out of the tables
            raise ValueError(f"Token ids must be below 2**63, got {ids.max()}. Look for damaged rows.")
    if labels is not None and len(labels) != len(values):
        raise ValueError(f"`labels` must have one entry a token ({len(values)}), got {len(labels)}.")
    if len(offsets) == 0 or offsets[0] < 0 or offsets[-1] > len(values) or np.any(np.diff(offsets) < 0):
        raise ValueError(f"`offsets` must rise from 0 to the number of tokens ({len(values)}), and do not.")
    targets = values if labels is None else labels
    out = np.empty(len(offsets) - 1, np.float64)
    shift = _shift(len(tables[2]))

    def score(begin: int, end: int) -> None:
        _score_serial(values, targets, offsets[begin : end + 1], *tables, shift, out[begin:end])

    num_threads = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if parallel is None:
        parallel = num_threads > 1 and len(values) >= _SMALL
    if parallel:
        # Equal tokens, not equal rows, for every thread.
        goals = np.linspace(offsets[0], offsets[-1], _CHUNKS_PER_THREAD * num_threads + 1)[1:-1]
        bounds = [0, *np.searchsorted(offsets[:-1], goals).tolist(), len(out)]
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(score, bounds[:-1], bounds[1:]))
    else:
        score(0, len(out))
    bad = np.isnan(out)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        ids = targets[offsets[row] : offsets[row + 1]]
        raise ValueError(
            f"Token ids must not be negative (labels: except {IGNORED}); row {row} holds "
            f"{int(min(ids.min(), values[offsets[row] : offsets[row + 1]].min()))}. Mask untrained tokens in "
            "`labels`, not in `input_ids`."
        )
    return out
