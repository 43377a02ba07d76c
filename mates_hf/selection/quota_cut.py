"""The exact cut through scores that lie in parts, with bounds on what each group of rows gets.

Where it is used: `file_scoring`, where a column says which group a row is of. It keeps what `budget.keep_rows` keeps
with a `Quota`, and nobody holds all rows. The best rows within bounds are the first rows of each group, as many as the
bounds and one threshold for all say. So first the number of rows of each group is found, and then where each group
ends. Trade-off: counts of all groups at once are kept, at most four million of them. With many groups the pieces are
read more often, up to 16 times for each of the two.

Sign: > 0 helps, higher is better. Shape suffixes: N rows of a piece, G groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.records import IntArray
from mates_hf.selection.budget import Budget, require_rows
from mates_hf.selection.cut import Order, amount_of, order_of
from mates_hf.selection.prefix import LAST, Keys, Mask, PieceScores, Prefix, each, prefix_of
from mates_hf.selection.quota import Bounds, limits_of, places_in_groups

_MOST_COUNTS = 2**22  # of a table of groups by digits
_KEY_BITS = 64


class GroupedScores(NamedTuple):
    """What is known of the rows of a piece.

    Attributes:
        scores: Their scores.
        codes: (N,) int32 number of each row's group.
    """

    scores: PieceScores
    codes: npt.NDArray[np.int32]


GroupedPieces = Sequence[Callable[[], GroupedScores]]
Asked = Callable[[int, GroupedScores], Keys]  # keys of a piece's rows, the smallest for the best; `LAST` is not in


@dataclasses.dataclass(frozen=True)
class GroupPrefix:
    """The first rows of each group in an order.

    Attributes:
        keys: (G,) uint64 key at which each group ends; its rows of smaller keys are in.
        allowed: Rows of just that key that are in, by the number of the piece: the groups and how many of each.
    """

    keys: Keys
    allowed: Mapping[int, tuple[IntArray, IntArray]]

    def mask(self, piece: int, keys: Keys, codes: npt.NDArray[np.int32]) -> Mask:
        """(N,) bool, True for the rows of a piece that are in."""
        ends = self.keys[codes]
        inside = keys < ends
        if piece in self.allowed:
            groups, numbers = self.allowed[piece]
            most = np.zeros(len(self.keys), np.int64)
            most[groups] = numbers
            here = np.flatnonzero((keys == ends) & (keys != LAST))
            inside[here[places_in_groups(codes[here], len(most)) < most[codes[here]]]] = True
        return inside


@dataclasses.dataclass(frozen=True)
class QuotaCut:
    """Which rows of every piece are kept; a pure function of the pieces' scores and groups, the budget and the bounds.

    Attributes:
        budget: How much was asked for.
        bounds: What groups may get and must get.
        order: What rows are ranked by.
        best: The best rows that the bounds allow.
        drawn: Rows that were drawn at random from the rest; None without a random share.
        others: What else is kept where the bounds and rows with a trained token do not suffice; None where they do.
        num_rows: Rows of all pieces.
        num_tokens: Trained tokens of all pieces.
        num_kept: Rows that are kept.
        num_tokens_kept: Trained tokens of the kept rows.
    """

    budget: Budget
    bounds: Bounds
    order: Order
    best: GroupPrefix
    drawn: GroupPrefix | None
    others: Prefix | None
    num_rows: int
    num_tokens: int
    num_kept: int = 0
    num_tokens_kept: int = 0
    threshold: float = -math.inf  # each group has its own

    def mask(self, piece: int, grouped: GroupedScores) -> Mask:
        """The rows of a piece that are kept.

        Args:
            piece: Number of the piece.
            grouped: Its scores and groups.

        Returns:
            (N,) bool, True where a row is kept.
        """
        kept = self.best.mask(piece, _best_keys(self.order, grouped), grouped.codes)
        if self.drawn is not None:
            keys = np.where(kept, LAST, self.order.random_keys(grouped.scores))
            kept |= self.drawn.mask(piece, keys, grouped.codes)
        if self.others is not None:
            keys = np.where(kept, LAST, self.order.keys(grouped.scores))
            kept |= self.others.mask(piece, keys, np.ones(len(keys), np.int64))
        return kept


def _best_keys(order: Order, grouped: GroupedScores) -> Keys:
    """Keys of rows with a trained token; the others are chosen only where nothing else is left."""
    return np.where(grouped.scores.num_targets > 0, order.keys(grouped.scores), LAST)


def find_quota_cut(
    pieces: GroupedPieces, budget: Budget, bounds: Bounds, num_groups: int, label_std: float = math.nan
) -> QuotaCut:
    """The cut through all pieces: exactly the rows of a budget within bounds.

    Args:
        pieces: What reads the scores and groups of each piece; called some times each, in turn.
        budget: How many rows to keep.
        bounds: What groups may get and must get.
        num_groups: Number of groups.
        label_std: Standard deviation of the labels' `influence`, the unit of a temperature.

    Returns:
        The cut, with how many rows and tokens it keeps.

    Raises:
        ValueError: the budget counts no rows, `k` is more than there are rows, or a temperature without `label_std`.
        InfluenceError: a score is not finite.
    """
    require_rows(budget)
    order, num_rows, num_tokens = order_of([_scores_of(read) for read in pieces], budget, label_std)
    num = amount_of(budget, num_rows)
    sizes, trained = _sizes(pieces, num_groups)
    least, most = limits_of(sizes, trained, num, bounds.most, bounds.least)
    within = min(num, int(trained.sum()))

    def best(_piece: int, grouped: GroupedScores) -> Keys:
        return _best_keys(order, grouped)

    counts = _counts(pieces, best, least, most, within)
    num_best = min(num - round(budget.random_share * num), within)
    if num_best < within:
        counts = _counts(pieces, best, np.zeros_like(counts), counts, num_best)
    found = _group_prefix(pieces, best, counts)
    cut = QuotaCut(budget, bounds, order, found, None, None, num_rows, num_tokens)
    if num_best < within:

        def rest(piece: int, grouped: GroupedScores, before: QuotaCut = cut) -> Keys:
            return np.where(before.mask(piece, grouped), LAST, order.random_keys(grouped.scores))

        drawn = _counts(pieces, rest, np.maximum(least - counts, 0), most - counts, within - int(counts.sum()))
        cut = dataclasses.replace(cut, drawn=_group_prefix(pieces, rest, drawn))
        counts = counts + drawn
    if int(counts.sum()) < num:

        def left(piece: int, grouped: Any, before: QuotaCut = cut) -> tuple[Keys, IntArray]:
            keys = np.where(before.mask(piece, grouped), LAST, order.keys(grouped.scores))
            return keys, np.ones(len(keys), np.int64)

        more: Any = pieces
        cut = dataclasses.replace(cut, others=prefix_of(more, left, num - int(counts.sum())))
    num_kept = num_tokens_kept = 0
    for rows, tokens in each(pieces, lambda piece, grouped: _kept_of(cut, piece, grouped)):  # type: ignore[arg-type]
        num_kept, num_tokens_kept = num_kept + rows, num_tokens_kept + tokens
    return dataclasses.replace(cut, num_kept=num_kept, num_tokens_kept=num_tokens_kept)


def _scores_of(read: Callable[[], GroupedScores]) -> Callable[[], PieceScores]:
    return lambda: read().scores


def _kept_of(cut: QuotaCut, piece: int, grouped: GroupedScores) -> tuple[int, int]:
    kept = cut.mask(piece, grouped)
    return int(np.count_nonzero(kept)), int(grouped.scores.num_targets[kept].sum(dtype=np.int64))


def _sizes(pieces: GroupedPieces, num_groups: int) -> tuple[IntArray, IntArray]:
    """(G,) rows of each group, and (G,) those with a trained token."""
    sizes, trained = np.zeros(num_groups, np.int64), np.zeros(num_groups, np.int64)
    for read in pieces:
        scores, codes = read()
        sizes += np.bincount(codes, minlength=num_groups)
        trained += np.bincount(codes[scores.num_targets > 0], minlength=num_groups)
    return sizes, trained


# --- counts of rows by group and by a few bits of their keys ---


def _digit_bits(num_groups: int) -> int:
    """Bits of a key that are looked at in one go, so that a table of all groups is small enough."""
    return next(bits for bits in (16, 8, 4, 2) if bits == 2 or num_groups << bits <= _MOST_COUNTS)


def _table(pieces: GroupedPieces, asked: Asked, above: Keys, shift: int, bits: int) -> npt.NDArray[np.int64]:
    """(G, 2**bits) rows by group and by the bits at `shift`, of those whose bits above are their group's `above`."""
    table = np.zeros(len(above) << bits, np.int64)
    high, low = np.uint64(shift + bits), np.uint64((1 << bits) - 1)
    for number, read in enumerate(pieces):
        grouped = read()
        keys = asked(number, grouped)
        inside = keys != LAST
        if shift + bits < _KEY_BITS:
            inside &= (keys >> high) == (above[grouped.codes] >> high)
        digits = (keys[inside] >> np.uint64(shift)) & low
        table += np.bincount(
            (grouped.codes[inside].astype(np.int64) << bits) + digits.astype(np.int64), None, len(table)
        )
    return table.reshape(len(above), 1 << bits)


def _counts(pieces: GroupedPieces, asked: Asked, least: IntArray, most: IntArray, amount: int) -> IntArray:
    """Rows of each group among the best that bounds allow.

    With a threshold t, group g has `clip(rows of g before t, least, most)`; t is the last one with which these add up
    to at most the amount. Of rows at t itself, groups come in turn.

    Args:
        pieces: What reads each piece.
        asked: The order.
        least: (G,) rows that each group must get, of those that it has; at most `amount` in all.
        most: (G,) rows that each may get.
        amount: Rows in all.

    Returns:
        (G,) int64 rows of each; fewer in all than `amount` where the bounds allow no more.
    """
    num_groups, bits = len(least), _digit_bits(len(least))
    above, before = 0, np.zeros(num_groups, np.int64)
    at = before
    for shift in range(_KEY_BITS - bits, -1, -bits):
        table = _table(pieces, asked, np.full(num_groups, above, np.uint64), shift, bits)
        ends = np.cumsum(table, axis=1) + before[:, None]
        totals = np.clip(ends, least[:, None], most[:, None]).sum(axis=0)
        over = np.flatnonzero(totals > amount)
        if not len(over):  # only ever of the first bits: everything that the bounds allow fits
            return np.asarray(np.clip(ends[:, -1], least, most), np.int64)
        digit = int(over[0])
        at = ends[:, digit]
        before = ends[:, digit - 1] if digit else before
        above |= digit << shift
    found = np.clip(before, least, most)
    room = np.clip(at, least, most) - found
    taken = np.cumsum(room) - room
    return np.asarray(found + np.clip(amount - int(found.sum()) - taken, 0, room), np.int64)


def _group_prefix(pieces: GroupedPieces, asked: Asked, counts: IntArray) -> GroupPrefix:
    """The first rows of each group in an order, so many of each as `counts` says and as there are."""
    num_groups, bits = len(counts), _digit_bits(len(counts))
    above, before = np.zeros(num_groups, np.uint64), np.zeros(num_groups, np.int64)
    whole = np.zeros(num_groups, np.bool_)
    groups = np.arange(num_groups)
    for shift in range(_KEY_BITS - bits, -1, -bits):
        ends = np.cumsum(_table(pieces, asked, above, shift, bits), axis=1) + before[:, None]
        if shift + bits == _KEY_BITS:
            whole = ends[:, -1] <= counts
        digit = np.argmax(ends > counts[:, None], axis=1)
        before = np.where(digit > 0, ends[groups, digit - 1], before)
        above |= digit.astype(np.uint64) << np.uint64(shift)
    above[whole] = LAST
    left, allowed = np.where(whole, 0, counts - before), {}
    for number, read in enumerate(pieces):
        if not left.any():
            break
        grouped = read()
        keys = asked(number, grouped)
        there = np.bincount(grouped.codes[keys == above[grouped.codes]], minlength=num_groups)
        taken = np.minimum(there, left)
        used = np.flatnonzero(taken)
        if len(used):
            allowed[number] = (used, taken[used])
        left = left - taken
    return GroupPrefix(above, allowed)
