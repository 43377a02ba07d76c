"""The first rows of an order over many pieces, exactly, without holding the keys of all at once.

Where it is used: `cut` asks for the rows that fit into an amount. A row's key is a whole number of 64 bits, the
smallest for the best row; the pieces are gone through once for each 16 bits of it, and once for the rows of the last
key. Trade-off: five readings of 16 bytes a row, where a sort would hold all rows in memory.

Shape suffix: N rows of a piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mates_hf.records import IntArray
from mates_hf.selection.copies import mix

Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

LAST = np.uint64(2**64 - 1)  # the key of a row that is not in the order at all
_DIGITS = (48, 32, 16, 0)  # shifts of the 16 bits of a key that are looked at in turn


class PieceScores(NamedTuple):
    """What is known of the rows of a piece: of a part, or of a stretch of one.

    Attributes:
        influence: (N,) float32 predicted influence, higher is better.
        num_targets: (N,) int32 trained tokens of each row.
        content: (N,) uint64 hash of what each row says; equal for copies.
    """

    influence: npt.NDArray[np.float32]
    num_targets: npt.NDArray[np.int32]
    content: Keys


Pieces = Sequence[Callable[[], PieceScores]]
Found = TypeVar("Found")


def each(pieces: Pieces, function: Callable[[int, PieceScores], Found]) -> Iterable[Found]:
    """What a function finds in each piece, in their order.

    Args:
        pieces: What reads the scores of each piece. Pieces that lie on other machines may have an `each` of their own,
            which runs the function there.
        function: Given the number of a piece and its scores; pure, and small in what it returns.

    Returns:
        What it found.
    """
    own: Callable[[Callable[[int, PieceScores], Found]], Iterable[Found]] | None = getattr(pieces, "each", None)
    if own is not None:
        return own(function)
    return (function(number, read()) for number, read in enumerate(pieces))


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The first rows of an order, as many as fit into an amount of rows or tokens.

    Attributes:
        key: Key of the first row that no longer fits; all rows of smaller keys are in.
        allowed: Amount that rows of just this key may use, by the number of the piece, in the order of rows there.
        amount: What the rows that are in use together.
    """

    key: int
    allowed: Mapping[int, int]
    amount: int

    def mask(self, piece: int, keys: Keys, weights: IntArray) -> Mask:
        """(N,) bool, True for the rows of a piece that are in."""
        inside = keys < np.uint64(self.key)
        left = self.allowed.get(piece, 0)
        if left:
            here = np.flatnonzero(keys == np.uint64(self.key))
            inside[here[np.cumsum(weights[here], dtype=np.int64) <= left]] = True
        return inside


class Rows(NamedTuple):
    """Rows of several pieces in their order."""

    key: Keys
    number: IntArray
    row: IntArray
    num_targets: npt.NDArray[np.int32]


Asked = Callable[[int, PieceScores], tuple[Keys, IntArray]]  # keys and weights of a piece's rows, by its number


def rows_of(pieces: Pieces, asked: Asked, prefix: Prefix) -> Rows:
    """The rows of a prefix, all at once.

    Args:
        pieces: What reads the scores of each piece.
        asked: The keys and weights of a piece's rows.
        prefix: The prefix, of few enough rows to hold.

    Returns:
        The rows, the first in the order first.
    """

    def inside(number: int, scores: PieceScores) -> tuple[npt.NDArray[Any], ...]:
        keys, weights = asked(number, scores)
        rows = np.flatnonzero(prefix.mask(number, keys, weights) & (keys != LAST))
        return keys[rows], np.full(len(rows), number), rows, scores.num_targets[rows]

    joined = [np.concatenate(arrays) for arrays in zip(*each(pieces, inside), strict=True)]
    order = np.lexsort((joined[2], joined[1], joined[0]))
    return Rows(*(array[order] for array in joined))


def prefix_of(pieces: Pieces, asked: Asked, amount: int) -> Prefix:
    """The first rows of an order that fit into an amount, found by 16 bits of the key at a time.

    Args:
        pieces: What reads the scores of each piece.
        asked: The keys and weights of a piece's rows; rows of the key `LAST` are not in the order.
        amount: Sum of weights that the rows may have together.

    Returns:
        The longest prefix that fits.
    """
    above, used = 0, 0  # the key's bits so far, and what rows of smaller ones use
    for shift in _DIGITS:
        sums = np.zeros(2**16, np.int64)

        def found(
            number: int, scores: PieceScores, above: int = above, shift: int = shift
        ) -> tuple[npt.NDArray[Any], ...]:
            return _sums_by_digit(*asked(number, scores), above, shift)

        for digits, added in each(pieces, found):
            sums[digits] += added
        ends = used + np.cumsum(sums)
        over = np.flatnonzero(ends > amount)
        if not len(over):  # only ever of the first digit: everything fits
            return Prefix(int(LAST), {}, int(ends[-1]))
        digit = int(over[0])
        used = int(ends[digit - 1]) if digit else used
        above |= digit << shift
    left, allowed = amount - used, {}

    def here(number: int, scores: PieceScores) -> npt.NDArray[np.int64]:
        keys, weights = asked(number, scores)
        return np.cumsum(weights[keys == np.uint64(above)], dtype=np.int64)

    for number, ends in enumerate(each(pieces, here)):
        if left > 0 and len(ends) and ends[0] <= left:
            allowed[number] = left
            used += int(ends[ends <= left][-1])
        left -= int(ends[-1]) if len(ends) else 0
    return Prefix(above, allowed, used)


def _sums_by_digit(keys: Keys, weights: IntArray, above: int, shift: int) -> tuple[npt.NDArray[Any], ...]:
    """The numbers at the 16 bits at `shift` of rows whose bits above are as given, and the int64 weights of each."""
    inside = keys != LAST
    if shift < _DIGITS[0]:
        inside &= (keys >> np.uint64(shift + 16)) == np.uint64(above >> (shift + 16))
    digits = (keys[inside] >> np.uint64(shift)) & np.uint64(2**16 - 1)
    found = np.bincount(digits.astype(np.int64), weights[inside].astype(np.float64), 2**16)  # exact below 2**53
    there = np.flatnonzero(found)  # of a small piece a few: what is sent from machine to machine
    return there, found[there].astype(np.int64)


def mixed(content: Keys, seed: int, stream: int = 0) -> Keys:
    """Random numbers of rows that depend on what they say and the seed, not on where they lie.

    Args:
        content: (N,) uint64 hash of what each row says.
        seed: Random seed, from 0 to below 2**64.
        stream: Which of several independent numbers of a row.

    Returns:
        (N,) uint64, uniform.
    """
    mask = 2**64 - 1
    start = ((seed + 1) * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03) & mask
    found: Keys = content ^ np.uint64(start)
    mix(found)
    return found


SCALE = 1200  # a sum is kept as a whole number of 2**-1200, which every product is a multiple of


def exact_sum(values: npt.NDArray[np.float64]) -> int:
    """The sum of at most 2**20 finite numbers as a whole number of 2**-1200, without rounding."""
    mantissas, exponents = np.frexp(values)
    whole = (mantissas * 2.0**53).astype(np.int64)
    low = whole & (2**26 - 1)
    first = int(exponents.min(initial=0))
    places = exponents - first
    total = 0
    for part, bits in ((whole - low) >> 26, 26), (low, 0):
        sums = np.bincount(places, part.astype(np.float64))  # each below 2**27, a million of them below 2**53
        total += sum(int(one) << (place + first - 53 + bits + SCALE) for place, one in enumerate(sums) if one)
    return total


def blocks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """A long array in blocks of 2**20."""
    return (values[begin : begin + 2**20] for begin in range(0, len(values), 2**20))
