"""Penalties of the token tables, found on some of many candidates.

Where it is used: a fit of `NgramInfluenceModel` with more labels than the search needs. Trade-off: penalties are
weights in tokens, whatever the number of labels, so that a few thousand candidates tell them. Earlier rounds weigh
less there, by as much as there are fewer candidates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import TokenRows
from mates_hf.prediction.ngram.additive import Penalties, TokenDesign
from mates_hf.prediction.ngram.tables import FloatVector, Statistics, Tables

SEARCH_CANDIDATES = 4_000  # that penalties are searched on


def search_penalties(
    rows: TokenRows,
    num_buckets: int,
    labels: FloatVector,
    derivatives: FloatVector,
    earlier: Statistics,
    members: npt.NDArray[np.bool_],
    seed: int,
    offset: Tables | None,
) -> Penalties | None:
    """Penalties from `SEARCH_CANDIDATES` of the members, drawn at random.

    Args:
        rows: N candidates.
        num_buckets: Hash buckets of the bigram table.
        labels: (N,) standardised label of each.
        derivatives: (K,) standardised derivative at each of their targets.
        earlier: Statistics of earlier rounds, already decayed.
        members: (N,) bool, the candidates that may be looked at.
        seed: Random seed of the draw and the folds.
        offset: Tables that the token tables shrink towards, or None.

    Returns:
        The penalties; None where there are not more candidates than that, which are then all searched.
    """
    if len(rows) <= SEARCH_CANDIDATES:
        return None
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(members))[:SEARCH_CANDIDATES]
    few = np.zeros(len(members), bool)
    few[drawn] = True
    design = TokenDesign(
        rows.take(few), num_buckets, labels[few], derivatives[np.repeat(few, rows.num_targets)],
        earlier=earlier.times(np.float32(len(drawn) / len(members))), prior=None, document=False, offset=offset,
    )  # fmt: skip
    return design.choose(np.ones(len(drawn), bool), seed).penalties
