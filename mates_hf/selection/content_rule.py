"""A cut as a rule on what a row says, for engines that do not know where a row lies.

Where it is used: by Ray Data, which hands out rows in blocks and batches of its own making. `find_cut` says of each
row of each piece whether it is kept; almost all of that follows from a row's scores alone. The rest are a few texts at
the edge of the budget: of some all copies are kept, of others a number of them. Trade-off: which copies of such a text
are kept is left to the engine, so that no row needs a number of its own.

Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mates_hf.selection.cut import Cut
from mates_hf.selection.prefix import Keys, Mask, Pieces, PieceScores, each


@dataclasses.dataclass(frozen=True)
class ContentRule:
    """Which rows are kept, by what they say.

    Attributes:
        cut: The cut without places: what decides for all rows but those at the edge.
        edge: (E,) uint64 sorted hashes of the texts at the edge.
        whole: Hashes of those of them of which all copies are kept, sorted.
        some: Number of copies that are kept of the others.
    """

    cut: Cut
    edge: Keys
    whole: Keys
    some: Mapping[int, int]

    def mask(self, scores: PieceScores) -> Mask:
        """(N,) bool, True for the rows that are kept, but for the copies in `some`."""
        kept = self.cut.mask(0, scores)
        if len(self.edge):
            kept &= ~np.isin(scores.content, self.edge)
            kept |= np.isin(scores.content, self.whole)
        return kept


def content_rule(cut: Cut, pieces: Pieces) -> ContentRule:
    """The rule that keeps what a cut keeps.

    Args:
        cut: The cut through the pieces.
        pieces: What reads the scores of each piece; gone through twice.

    Returns:
        The rule. Its `mask` together with `some` keeps as many rows of each text as the cut does.
    """
    best, drawn = (part and dataclasses.replace(part, allowed={}) for part in (cut.best, cut.drawn))
    plain = dataclasses.replace(cut, best=best, drawn=drawn, fitting={})

    def differing(number: int, scores: PieceScores) -> Keys:
        return np.unique(scores.content[cut.mask(number, scores) != plain.mask(number, scores)])

    edge = np.unique(np.concatenate([np.zeros(0, np.uint64), *each(pieces, differing)]))

    def counted(number: int, scores: PieceScores) -> npt.NDArray[np.int64]:
        there = np.isin(scores.content, edge)
        where = np.searchsorted(edge, scores.content[there])
        kept = cut.mask(number, scores)[there]
        return np.stack([np.bincount(rows, minlength=len(edge)) for rows in (where, where[kept])])

    num_all, num_kept = np.zeros((2, len(edge)), np.int64)
    if len(edge):
        num_all, num_kept = sum(each(pieces, counted), np.zeros((2, len(edge)), np.int64))
    is_some = (num_kept > 0) & (num_kept < num_all)
    some = dict(zip(edge[is_some].tolist(), num_kept[is_some].tolist(), strict=True))
    return ContentRule(plain, edge, edge[(num_kept > 0) & ~is_some], some)
