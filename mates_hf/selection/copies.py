"""Copies of a text among a round's candidates: how they are found, and how many of each may be chosen.

Where it is used: the score stage hashes the tokens it passes over (`row_hashes`), and the select stage leaves out
what is beyond the limit (`find_copies`). Equal tokens have equal predictions, so a top-k without a limit takes every
copy of a good text.

What is one text: the token ids of a row, without the special tokens at its ends (beginning and end of a text, padding)
and without a row's tail of one untrained token. Padding that a mask marks is gone before. Labels make no difference,
and neither does the type of the ids. Rows without tokens, and rows of which a model gets more than tokens (pictures,
sound), are each a text of their own.

Trade-off: a hash of 64 bits takes 8 bytes a candidate, and finds exact copies only. Among 10 million different texts
the chance that any two are taken for one is 3e-6. Copies are limited within a round: a round may choose a text that an
earlier one trained on, whose influence was measured anew since.

Shape suffixes: N candidates, T tokens over all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.collated import collate
from mates_hf.data.rows import TokenRows
from mates_hf.records import IntArray

logger = logging.getLogger(__name__)

Hashes = npt.NDArray[np.uint64]

PART = 1 << 24  # hashes sorted at once
_STEP = 0x9E3779B97F4A7C15  # its multiples are far apart, so that no two (position, token) are mixed from one number
_OWN = 0x6F776E  # keeps the hashes of rows without tokens apart from those of texts
_OF_TOKENS = frozenset({
    "input_ids", "labels", "attention_mask", "shift_labels", "position_ids", "token_type_ids", "special_tokens_mask",
    "loss_mask", "completion_mask", "assistant_masks", "decoder_input_ids", "decoder_attention_mask", "length",
})  # fmt: skip


def row_hashes(rows: TokenRows, ids: IntArray, ends: Sequence[int] = ()) -> Hashes:
    """A hash for the text of each row: equal for copies of a text, in any chunk, process and version of numpy.

    Cost: about 1 ns a token, and half a second once.

    Args:
        rows: N rows, without the padding that a mask marks.
        ids: (N,) int64 pool row of each, by which rows without tokens are kept apart.
        ends: Token ids that do not count at either end of a row.

    Returns:
        (N,) uint64.
    """
    from mates_hf.selection.text_hashes import sum_tokens

    begins, stops = _text_spans(rows, ends)
    hashes = np.empty(len(rows), np.uint64)
    sum_tokens(rows.values, begins, stops, np.uint64(_STEP), hashes)
    hashes += (stops - begins).view(np.uint64) * np.uint64(_STEP)
    alone = stops == begins
    hashes[alone] = ids[alone].astype(np.int64).view(np.uint64) * np.uint64(_STEP) + np.uint64(_OWN)
    mix(hashes)
    return hashes


def own_hashes(ids: IntArray) -> Hashes:
    """(N,) uint64 hashes of rows that are each a text of their own, by their pool rows."""
    return row_hashes(TokenRows.from_lists([[]] * len(ids)), ids)


def other_inputs(dataset: Any, collate_fn: Any) -> list[str]:
    """What a collator gives a model of a row besides its tokens: pictures or sound, by which equal tokens differ."""
    if collate_fn is None:
        return []
    return sorted(str(name) for name in collate(dataset, collate_fn, [0]) if name not in _OF_TOKENS)


def end_tokens(*sources: Any) -> tuple[int, ...]:
    """Ids of the tokens that begin, end and pad a text, from tokenizers and model configs (or None)."""
    found: set[int] = set()
    for source in sources:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            found.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
    return tuple(sorted(found))


def find_copies(hashes: Hashes, values: npt.NDArray[Any] | None = None, max_copies: int | None = None) -> IntArray:
    """The candidates that are copies of another, beyond a limit.

    Memory: a few numbers for each of `PART` candidates at once, and for each that is returned.

    Args:
        hashes: (N,) uint64, equal for copies.
        values: (N,) numbers, higher is better: the best of a text's copies are kept, the first ones among equals.
            None keeps the first ones.
        max_copies: How many copies of each text are kept; None is 1.

    Returns:
        (C,) int64 positions of the copies that are not kept, ascending.
    """
    keep = 1 if max_copies is None else max_copies
    found = [np.zeros(0, np.int64)]
    for positions, part in _parts(hashes):
        order = np.argsort(part)
        again = part[order[1:]] == part[order[:-1]]
        repeated = np.zeros(len(part), np.bool_)
        repeated[order[1:][again]] = True
        repeated[order[:-1][again]] = True
        members = np.flatnonzero(repeated)
        if not len(members):
            continue
        where = members if positions is None else positions[members]
        keys = [where] if values is None else [where, -values[where].astype(np.float64)]
        best_first = np.lexsort([*keys, part[members]])
        groups = part[members][best_first]
        first_of = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
        rank = np.arange(len(groups)) - np.repeat(first_of, np.diff(np.append(first_of, len(groups))))
        found.append(where[best_first[rank >= keep]])
    return np.sort(np.concatenate(found))


def _parts(hashes: Hashes) -> Iterator[tuple[IntArray | None, Hashes]]:
    """Hashes by their first bits, so that copies are in one part: their positions (None: all of them) and values."""
    num_bits = max(len(hashes) - 1, 0).bit_length() - PART.bit_length() + 1
    if num_bits <= 0:
        yield None, np.asarray(hashes)
        return
    for prefix in range(1 << num_bits):
        here = [
            np.flatnonzero(hashes[start : start + PART] >> np.uint64(64 - num_bits) == prefix) + start
            for start in range(0, len(hashes), PART)
        ]
        positions = np.concatenate(here)
        yield positions, np.asarray(hashes[positions])


def _text_spans(rows: TokenRows, ends: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Where each row's text begins and stops, (N,) both; a row of nothing but end tokens is its text."""
    begins, stops = rows.offsets[:-1].astype(np.int64), rows.offsets[1:].astype(np.int64)
    is_end = np.asarray(sorted(ends), np.int64)
    untrained = None if rows.labels is None else ~rows.target_mask
    tails = rows.values[np.maximum(stops - 1, 0)] if len(rows.values) else np.zeros(len(rows), np.int64)
    active = np.flatnonzero(stops > begins)
    while len(active):
        last = stops[active] - 1
        drop = np.isin(rows.values[last], is_end)
        if untrained is not None:
            drop |= untrained[last] & (rows.values[last] == tails[active])
        active = active[drop]
        stops[active] -= 1
        active = active[stops[active] > begins[active]]
    active = np.flatnonzero(stops > begins)
    while len(active):
        active = active[np.isin(rows.values[begins[active]], is_end)]
        begins[active] += 1
    nothing = stops == begins
    begins[nothing], stops[nothing] = rows.offsets[:-1][nothing], rows.offsets[1:][nothing]
    return begins, stops


def mix(values: Hashes) -> None:
    """Spread each number over 64 bits, in place.

    Args:
        values: (N,) uint64, changed: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), which is one-to-one.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
