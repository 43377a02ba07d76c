"""Compiled loops of the n-gram influence model: scoring rows of tokens, and fitting the shrunken tables.

Where it is used: under `ngram_model`, and knows arrays only. Trade-off: compiled with numba on a machine's first use
(about a second for each integer type of the token ids, see `compiled`) for scoring at memory speed. Every row is
summed by one thread in text order and in float64, so the result is the same to the bit, whatever the number of
threads. The threads are Python's, around a kernel that lets go of the interpreter: numba's own share the OpenMP
runtime with torch, change how many threads training has, and kill a child that is forked after they ran.

Shape suffixes: N rows, T tokens over all rows, V vocabulary, H hash buckets, C cells of the bigram table.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import IGNORED, Piece, TokenSpans
from mates_hf.prediction.compiled import compiled
from mates_hf.prediction.threads import spread

_SMALL = 2**18  # tokens below which threads are not worth starting
_PART = 2**15  # tokens below which handing a part to a thread costs more than it saves
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WORD = np.uint64(32)
_ONE = np.uint64(1)
_NO_LIMIT = 2**63  # ids of this and above are negative ones

Tables = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


@numba.njit(inline="always")
def _bucket(previous: Any, token: Any, shift: Any) -> Any:
    """Hash bucket of a bigram: the top `64 - shift` bits of a multiplied, folded and multiplied key."""
    mixed = ((np.uint64(previous) << _WORD) | np.uint64(token)) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> _WORD)) * _MULTIPLIER
    return mixed >> shift


@compiled
def _hash_bigrams(previous: Any, token: Any, shift: Any, out: Any) -> None:
    for i in range(len(previous)):
        out[i] = _bucket(previous[i], token[i], shift)


# Unsigned positions and ids: signed ones cost a test for "counted from the end" at each access, half of the time. An
# id below 0 becomes one of 2**63 or more, so that one comparison with a limit finds both kinds of impossible ids. The
# body is written out: handing tables on to another compiled function counts their references at each token. Without
# labels numba leaves their lines out, a fifth of the time. What is left is the time to fetch bigram entries.
@compiled
def _score_spans(
    values: Any, labels: Any, starts: Any, lengths: Any, token_V: Any, previous_V: Any, bigram_H: Any, shift: Any,
    limit: Any, out: Any,
) -> None:  # fmt: skip
    """Mean table value over each row's targets: 0 without targets, NaN where an id is not below the limit."""
    vocab_size = np.uint64(len(token_V))
    for row in range(len(out)):
        out[row] = 0.0
        if lengths[row] == 0:
            continue
        start = np.uint64(starts[row])
        previous = np.uint64(np.int64(values[start]))
        highest = previous
        total = 0.0
        num_targets = lengths[row] - 1
        for i in range(start + _ONE, start + np.uint64(lengths[row])):
            following = np.uint64(np.int64(values[i]))
            highest = max(highest, following)
            token = following
            if labels is not None:
                if labels[i] == IGNORED:
                    num_targets -= 1
                    previous = following
                    continue
                token = np.uint64(np.int64(labels[i]))
                highest = max(highest, token)
            if token < vocab_size and previous < vocab_size:
                pair = np.float64(token_V[token]) + np.float64(previous_V[previous])
                total += pair + np.float64(bigram_H[_bucket(previous, token, shift)])
            elif token < vocab_size:
                total += np.float64(token_V[token])
            elif previous < vocab_size:
                total += np.float64(previous_V[previous])
            previous = following
        if highest >= limit:
            out[row] = np.nan
        elif num_targets:
            out[row] = total / num_targets


@compiled
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
    tables: Tables,
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
    if labels is not None and len(labels) != len(values):
        raise ValueError(f"`labels` must have one entry a token ({len(values)}), got {len(labels)}.")
    if len(offsets) == 0 or offsets[0] < 0 or offsets[-1] > len(values) or np.any(np.diff(offsets) < 0):
        raise ValueError(f"`offsets` must rise from 0 to the number of tokens ({len(values)}), and do not.")
    piece = Piece(values, offsets[:-1], np.diff(offsets), np.arange(len(offsets) - 1))
    spans = TokenSpans(pieces=(piece,), num_rows=len(offsets) - 1)
    return _score(spans, labels, tables, parallel)


def score_spans(spans: TokenSpans, tables: Tables) -> npt.NDArray[np.float64]:
    """`score_rows` over rows in buffers of others, a thread to a core for as many tokens as are worth it.

    Args:
        spans: N rows; the tokens are read once and not copied.
        tables: The tables, as `score_rows` takes them.

    Returns:
        (N,) float64, as `score_rows`: to the bit what each row gives alone.

    Raises:
        ValueError: an id is negative or not below the spans' `vocab_size`, or a row lies outside its buffer.
    """
    return _score(spans, None, tables, None)


def _score(
    spans: TokenSpans, labels: npt.NDArray[Any] | None, tables: Tables, parallel: bool | None
) -> npt.NDArray[np.float64]:
    """Score the rows; with labels there is one piece, and they lie as its values do."""
    for piece in spans.pieces:
        if not np.issubdtype(piece.values.dtype, np.integer):
            raise ValueError(f"Token ids must be integers, got {piece.values.dtype}. Tokenize the rows first.")
        ends = piece.starts + piece.lengths
        if len(ends) and (min(piece.starts.min(), piece.lengths.min()) < 0 or ends.max() > len(piece.values)):
            raise ValueError(
                f"Rows must lie within their buffer of {len(piece.values)} tokens, and one reaches from "
                f"{piece.starts.min()} to {ends.max()}. The dataset's file is damaged: make it anew."
            )
    out = np.zeros(spans.num_rows, np.float64)
    shift, limit = _shift(len(tables[2])), _NO_LIMIT if spans.vocab_size is None else spans.vocab_size

    def score(piece: Piece) -> None:
        found = np.empty(len(piece.where), np.float64)
        _score_spans(piece.values, labels, piece.starts, piece.lengths, *tables, shift, np.uint64(limit), found)
        out[piece.where] = found

    spread(score, spans.pieces, parallel, small=_SMALL, part=_PART)
    bad = np.flatnonzero(np.isnan(out))
    if len(bad):
        raise _impossible_id(spans, labels, limit, int(bad[0]))
    return out


def _impossible_id(spans: TokenSpans, labels: npt.NDArray[Any] | None, limit: int, row: int) -> ValueError:
    """What is wrong with the ids of a row."""
    piece, i = next(
        (piece, int(np.flatnonzero(piece.where == row)[0])) for piece in spans.pieces if row in piece.where
    )
    span = slice(int(piece.starts[i]), int(piece.starts[i] + piece.lengths[i]))
    ids = [int(token) for token in piece.values[span]]
    if labels is not None:
        ids += [int(label) for label in labels[span][1:] if label != IGNORED]
    lowest, highest, name = min(ids), max(ids), f"row {row + spans.first_row}"
    if lowest < 0:
        return ValueError(
            f"Token ids must not be negative (labels: except {IGNORED}); {name} holds {lowest}. Mask untrained tokens "
            "in `labels`, not in `input_ids`."
        )
    if highest >= _NO_LIMIT:
        return ValueError(f"Token ids must be below 2**63, got {highest} in {name}. Look for damaged rows.")
    return ValueError(
        f"Token ids must be below the tokenizer's {limit}, got {highest} in {name}. They were made with another "
        "tokenizer than the influence model's: tokenise the texts again, or pass the tokenizer that made them."
    )
