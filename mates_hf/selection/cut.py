"""The exact cut through scores that lie in parts: which rows of a terabyte are the best k, or fit into so many tokens.

Where it is used: where the parts of a corpus are scored by several processes or machines, and nobody holds all scores
at once. It keeps what `budget.keep_rows` keeps. Trade-off: the pieces are read once for the facts of all and once for
each 16 bits of the order that are needed, so memory does not grow with their number. Equals stand in an order of
their content and the seed, not of where they lie, so that another division into parts keeps the same texts.

Sign: > 0 helps, higher is better. Shape suffix: N rows of a piece.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mates_hf.errors import InfluenceError
from mates_hf.records import IntArray
from mates_hf.selection.budget import Budget, Ranking, filled, share_of, temperature_unit_of
from mates_hf.selection.prefix import (
    LAST,
    SCALE,
    Keys,
    Mask,
    Pieces,
    PieceScores,
    Prefix,
    blocks,
    each,
    exact_sum,
    mixed,
    prefix_of,
    rows_of,
)

_LOOKED_AT = 2**20  # rows at once that may fit into what is left of a budget of tokens
_SHARE, _NOISE = 0x5A4E, 0x6E6F  # streams of random numbers of a random share, and of a temperature


@dataclasses.dataclass(frozen=True)
class Order:
    """What rows are ranked by, the best first; the same for every piece.

    Attributes:
        ranking: `"influence"`, or `"row_worth"` where the budget counts rows.
        mean: Token-weighted mean of the influence of all rows.
        noise: Scale of the Gumbel noise in the unit of the ranking; 0 adds none.
        seed: Random seed of the noise, of the random share, and of the order among equals.
    """

    ranking: Ranking
    mean: float
    noise: float
    seed: int

    def keys(self, scores: PieceScores) -> Keys:
        """(N,) uint64, the smallest for the best row; rows without a trained token come last, or are not in."""
        trained = scores.num_targets > 0
        values = scores.influence.astype(np.float64)
        if self.ranking == "row_worth":
            values = scores.num_targets * (values - self.mean)
        if self.noise:
            uniform = (mixed(scores.content, self.seed, _NOISE) + 0.5) / 2.0**64
            values = values - self.noise * np.log(-np.log(np.clip(uniform, 2.0**-64, 1 - 2.0**-53)))
        values[~trained] = -np.inf
        bits = (values + 0.0).astype(np.float32).view(np.uint32)  # 0.0 and -0.0 are equal
        rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
        keys: Keys = ((~rising).astype(np.uint64) << np.uint64(32)) | (
            mixed(scores.content, self.seed) >> np.uint64(32)
        )
        if self.ranking == "influence":
            keys[~trained] = LAST
        return keys

    def random_keys(self, scores: PieceScores) -> Keys:
        """(N,) uint64 of an order by chance; rows without a trained token are not in."""
        keys = mixed(scores.content, self.seed, _SHARE) >> np.uint64(1)
        keys[scores.num_targets == 0] = LAST
        return keys


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which rows of every piece are kept; a pure function of the pieces' scores and the budget.

    Attributes:
        budget: How much was asked for.
        order: What rows are ranked by.
        best: The best rows; None where a threshold was asked for.
        drawn: Rows that were drawn at random from the rest; None without a random share.
        most: What a row that is drawn may use at most.
        fitting: Further rows that fit into what is left of a budget of tokens, by the number of the piece.
        num_rows: Rows of all pieces.
        num_kept: Rows that are kept.
        num_tokens: Trained tokens of all pieces.
        num_tokens_kept: Trained tokens of the kept rows.
    """

    budget: Budget
    order: Order
    best: Prefix | None
    drawn: Prefix | None
    most: int
    fitting: Mapping[int, IntArray]
    num_rows: int
    num_tokens: int
    num_kept: int = 0
    num_tokens_kept: int = 0

    def mask(self, piece: int, scores: PieceScores) -> Mask:
        """The rows of a piece that are kept.

        Args:
            piece: Number of the piece.
            scores: Its scores.

        Returns:
            (N,) bool, True where a row is kept.
        """
        if self.best is None:
            return np.asarray(scores.influence >= np.float32(self.budget.threshold or 0.0))
        kept = self.best.mask(piece, self.order.keys(scores), self._weights(scores))
        if self.drawn is not None:
            weights = self._weights(scores)
            keys = np.where(kept | (weights > self.most), LAST, self.order.random_keys(scores))
            kept |= self.drawn.mask(piece, keys, weights)
        kept[self.fitting.get(piece, np.zeros(0, np.int64))] = True
        return kept

    def _weights(self, scores: PieceScores) -> IntArray:
        return _weights(scores, self.budget)

    @property
    def threshold(self) -> float:
        """Influence, or worth of a row, at which the best rows end; -inf where all are kept."""
        if self.best is None:
            return float(np.float32(self.budget.threshold or 0.0))
        rising = ~np.uint32(self.best.key >> 32)
        bits = rising ^ np.uint32(1 << 31) if rising >> 31 else ~rising
        found = float(np.array([bits], np.uint32).view(np.float32)[0])
        return found if math.isfinite(found) else -math.inf


def find_cut(pieces: Pieces, budget: Budget, label_std: float = math.nan) -> Cut:
    """The cut through all pieces: exactly the rows of a budget, in memory that does not grow with their number.

    Args:
        pieces: What reads the scores of each piece; called a few times each, in turn.
        budget: How much to keep.
        label_std: Standard deviation of the labels' `influence`, the unit of a temperature.

    Returns:
        The cut, with how many rows and tokens it keeps.

    Raises:
        ValueError: `k` is more than there are rows, or a temperature without `label_std`.
        InfluenceError: a score is not finite.
    """
    order, num_rows, num_tokens = order_of(pieces, budget, label_std)
    cut = Cut(budget, order, None, None, 0, {}, num_rows, num_tokens)
    if budget.threshold is None:
        cut = _of_amount(cut, pieces, amount_of(budget, num_rows))

    def kept_of(number: int, scores: PieceScores) -> tuple[int, int]:
        kept = cut.mask(number, scores)
        return int(np.count_nonzero(kept)), int(scores.num_targets[kept].sum(dtype=np.int64))

    num_kept = num_tokens = 0
    for rows, tokens in each(pieces, kept_of):
        num_kept, num_tokens = num_kept + rows, num_tokens + tokens
    return dataclasses.replace(cut, num_kept=num_kept, num_tokens_kept=num_tokens)


def order_of(pieces: Pieces, budget: Budget, label_std: float) -> tuple[Order, int, int]:
    """What rows are ranked by, and how many rows and trained tokens there are.

    Args:
        pieces: What reads the scores of each piece.
        budget: How much to keep.
        label_std: Standard deviation of the labels' `influence`, the unit of a temperature.

    Returns:
        The order, the rows and the tokens of all pieces.

    Raises:
        ValueError: a temperature without `label_std`.
        InfluenceError: a score is not finite.
    """
    facts = _facts(pieces)
    noise = 0.0
    if budget.temperature:
        noise = budget.temperature * temperature_unit_of(facts.mean_square, budget.ranking, label_std)
    return Order(budget.ranking, facts.mean, noise, budget.seed), facts.num_rows, facts.num_tokens


def amount_of(budget: Budget, num_rows: int) -> int:
    """Rows or tokens to keep; a `ValueError` where there are not as many rows."""
    if budget.num_tokens is not None:
        return int(budget.num_tokens)
    if budget.k is not None and budget.k > num_rows:
        raise ValueError(f"`k` must be at most the number of rows ({num_rows}), got {budget.k}.")
    return int(budget.k) if budget.k is not None else share_of(num_rows, budget.ratio)


def _of_amount(cut: Cut, pieces: Pieces, amount: int) -> Cut:
    """The cut that keeps an amount of rows or tokens."""
    num_random = round(cut.budget.random_share * amount)

    def best(_number: int, scores: PieceScores) -> tuple[Keys, IntArray]:
        return cut.order.keys(scores), _weights(scores, cut.budget)

    found = prefix_of(pieces, best, amount - num_random)
    left = amount - found.amount
    cut = dataclasses.replace(cut, best=found)
    if num_random:

        def others(number: int, scores: PieceScores, left: int = left) -> tuple[Keys, IntArray]:
            weights = _weights(scores, cut.budget)
            inside = found.mask(number, cut.order.keys(scores), weights)
            return np.where(inside | (weights > left), LAST, cut.order.random_keys(scores)), weights

        drawn = prefix_of(pieces, others, left)
        left -= drawn.amount
        cut = dataclasses.replace(cut, drawn=drawn, most=amount - found.amount)
        if left and cut.budget.num_tokens is None:  # there are not as many rows with a trained token
            cut = dataclasses.replace(cut, best=prefix_of(pieces, best, amount), drawn=None)
    return cut if cut.budget.num_tokens is None else _filled_up(cut, pieces, left)


def _filled_up(cut: Cut, pieces: Pieces, left: int) -> Cut:
    """The cut with the rows behind it that still fit into a budget of tokens, each tried in its turn."""
    fitting: dict[int, list[int]] = {}
    begin = 0
    while left > 0:

        def behind(number: int, scores: PieceScores, begin: int = begin, left: int = left) -> tuple[Keys, IntArray]:
            keys = cut.order.keys(scores)
            out = cut.mask(number, scores) | (keys < np.uint64(begin)) | (scores.num_targets > left)
            return np.where(out, LAST, keys), np.ones(len(keys), np.int64)

        window = prefix_of(pieces, behind, _LOOKED_AT)
        rows = rows_of(pieces, behind, window)
        if not len(rows.number):
            break
        chosen = filled(np.arange(len(rows.number)), rows.num_targets, left)
        left -= int(rows.num_targets[chosen].sum(dtype=np.int64))
        for number, row in zip(rows.number[chosen].tolist(), rows.row[chosen].tolist(), strict=True):
            fitting.setdefault(number, []).append(row)
        if len(rows.number) < _LOOKED_AT:
            break
        begin = int(rows.key[-1]) + 1
    return dataclasses.replace(cut, fitting={number: np.array(sorted(rows)) for number, rows in fitting.items()})


def _weights(scores: PieceScores, budget: Budget) -> IntArray:
    """(N,) what each row uses of a budget."""
    if budget.num_tokens is not None:
        return scores.num_targets.astype(np.int64)
    return np.ones(len(scores.num_targets), np.int64)


class _Facts(NamedTuple):
    """What the order needs to know of all rows."""

    num_rows: int
    num_tokens: int
    mean: float
    mean_square: float


class _Sums(NamedTuple):
    """Facts of one piece; the last two are exact."""

    num_rows: int
    num_tokens: int
    num_trained: int
    squares: int
    weighted: int


def _facts(pieces: Pieces) -> _Facts:
    """Facts of all rows, the same to the last bit for every division into pieces."""
    sums = _Sums(*(sum(column) for column in zip(_Sums(0, 0, 0, 0, 0), *each(pieces, _sums_of), strict=True)))
    mean = sums.weighted / (sums.num_tokens << SCALE) if sums.num_tokens else 0.0
    mean_square = sums.squares / sums.num_trained if sums.num_trained else 1.0
    return _Facts(sums.num_rows, sums.num_tokens, mean, mean_square)


def _sums_of(number: int, scores: PieceScores) -> _Sums:
    """Facts of a piece; an `InfluenceError` where a score is not finite."""
    if not np.isfinite(scores.influence).all():
        raise InfluenceError(f"Predicted influence must be finite; that of piece {number} is not. Score it again.")
    tokens = scores.num_targets.astype(np.int64)
    weighted = scores.influence.astype(np.float64) * tokens
    return _Sums(
        len(tokens),
        int(tokens.sum()),
        int(np.count_nonzero(tokens)),
        sum(int(block @ block) for block in blocks(tokens)),
        sum(exact_sum(block) for block in blocks(weighted)),
    )
