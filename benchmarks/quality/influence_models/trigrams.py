"""Two influence models that the package does not have: a plain n-gram ridge, and token tables with trigrams on top.

Contenders of `influence_models`, to see what longer n-grams would add. Trade-off: written to be read, not to be fast;
trigrams are fitted on what the token tables leave over, out of fold, so that a trigram is not credited with what its
tokens explain.

Shape suffixes: N candidates, K targets over all candidates, F hashed features.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import TokenRows
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.prediction.judge import split_held_out
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import InfluenceLabels

if TYPE_CHECKING:
    import scipy.sparse as sp

Values = npt.NDArray[np.float64]

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
_BITS = 18
_ALPHAS = tuple(float(10.0**power) for power in np.arange(-1.5, 3.1, 0.5))  # in units of the mean squared length
_TRIGRAM_PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 1e9)  # tokens at which an effect is halved
_FOLDS = 4


def hashed(ids: list[npt.NDArray[Any]], bits: int) -> npt.NDArray[np.int64]:
    """(K,) bucket of K n-grams, given by the (K,) ids of each place."""
    key = np.zeros(len(ids[0]), np.uint64)
    for place in ids:
        key = (key ^ (place.astype(np.uint64) + np.uint64(1))) * _ODD
        key ^= key >> np.uint64(29)
    return ((key * _ODD) >> np.uint64(64 - bits)).astype(np.int64)


def ngram_features(rows: TokenRows, order: int) -> sp.csr_matrix:
    """(N, F) counts of n-grams of up to `order` tokens, over the tokens of a row."""
    import scipy.sparse as sp

    lengths = rows.lengths
    owner = np.repeat(np.arange(len(rows)), lengths)
    place = np.arange(len(rows.values)) - rows.offsets[owner]
    columns, owners = [], []
    for n in range(1, order + 1):
        ends = np.flatnonzero(place >= n - 1)
        columns.append((n - 1) * 2**_BITS + hashed([rows.values[ends - i] for i in range(n)], _BITS))
        owners.append(owner[ends])
    where = np.concatenate(owners)
    counts = 1.0 / lengths[where]
    shape = (len(rows), order * 2**_BITS)
    return sp.coo_matrix((counts, (where, np.concatenate(columns))), shape=shape).tocsr()


class NgramRidge:
    """scikit-learn's ridge of z-scored document labels on hashed n-gram counts; a fifth chooses the penalty."""

    def __init__(self, *, order: int, seed: int = 0) -> None:
        self.order, self.seed = order, seed

    def fit(self, rows: TokenRows, labels: InfluenceLabels) -> NgramRidge:
        """Fit, > 0 helps."""
        from sklearn.linear_model import Ridge

        features = ngram_features(rows, self.order)
        target = labels.influence.astype(np.float64)
        self.centre, self.scale = target.mean(), target.std()
        target = (target - self.centre) / self.scale
        held_out = split_held_out(len(target), 0.2, self.seed)
        unit = float(features.multiply(features).sum()) / len(target)
        ridges = [Ridge(alpha=alpha * unit, solver="sparse_cg", tol=1e-3) for alpha in _ALPHAS]
        values = []
        for ridge in ridges:
            ridge.fit(features[~held_out], target[~held_out])
            values.append(rank_correlation(ridge.predict(features[held_out]), target[held_out]))
        self.ridge = ridges[int(np.argmax(values))].fit(features, target)
        return self

    def predict(self, rows: TokenRows) -> Values:
        """(N,) predicted influence."""
        return np.asarray(self.centre + self.scale * self.ridge.predict(ngram_features(rows, self.order)))


class TrigramTables:
    """`NgramInfluenceModel` on token labels, and a shrunken effect of each hashed trigram on what it leaves over."""

    def __init__(self, *, vocab_size: int, seed: int = 0, bits: int = 20) -> None:
        self.vocab_size, self.seed, self.bits = vocab_size, seed, bits

    def fit(self, rows: TokenRows, labels: InfluenceLabels) -> TrigramTables:
        """Fit, > 0 helps; every row has at least two tokens, and all of them but the first are targets."""
        assert labels.token_derivatives is not None
        fold = np.random.default_rng(self.seed).permutation(len(rows)) % _FOLDS
        base = np.zeros(len(labels.token_derivatives))
        numbered = dataclasses.replace(labels, candidate_id=np.arange(len(rows)))
        owner, previous, token = _targets(rows)
        for k in range(_FOLDS):
            part = dataclasses.replace(numbered.take(fold != k), candidate_id=np.arange(int((fold != k).sum())))
            model = NgramInfluenceModel(labels="token", seed=self.seed).fit(rows.take(fold != k), part)
            here = fold[owner] == k
            base[here] = _effects(model, previous[here], token[here])
        residual = labels.token_derivatives - base
        trigram, bucket = self._buckets(rows)
        truth = labels.influence_per_token.astype(np.float64)
        scores = np.zeros((len(_TRIGRAM_PENALTIES), len(rows)))
        base_mean = np.bincount(owner, weights=base, minlength=len(rows)) / labels.num_tokens
        for k in range(_FOLDS):
            other = fold[owner[trigram]] != k
            sums, counts = self._sums(bucket[other], residual[trigram][other])
            here = ~other
            for i, penalty in enumerate(_TRIGRAM_PENALTIES):
                effect = (sums / (counts + penalty))[bucket[here]]
                found = np.bincount(owner[trigram][here], weights=effect, minlength=len(rows)) / labels.num_tokens
                scores[i] += np.where(fold == k, base_mean + found, 0.0)
        self.penalty = _TRIGRAM_PENALTIES[int(np.argmax([rank_correlation(score, truth) for score in scores]))]
        sums, counts = self._sums(bucket, residual[trigram])
        self.table = sums / (counts + self.penalty)
        self.model = NgramInfluenceModel(labels="token", seed=self.seed).fit(rows, numbered)
        return self

    def predict(self, rows: TokenRows) -> Values:
        """(N,) predicted influence per token."""
        owner = _targets(rows)[0]
        trigram, bucket = self._buckets(rows)
        found = np.bincount(owner[trigram], weights=self.table[bucket], minlength=len(rows)) / rows.num_targets
        return np.asarray(self.model.predict_per_token(rows) + found)

    def _buckets(self, rows: TokenRows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which of the K targets end a trigram, and the bucket of each."""
        place = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], rows.lengths)
        ends = np.flatnonzero(place >= 2)
        bucket = hashed([rows.values[ends - i] for i in range(3)], self.bits)
        return np.flatnonzero(place[place >= 1] >= 2), bucket

    def _sums(self, bucket: npt.NDArray[np.int64], residual: Values) -> tuple[Values, Values]:
        size = 2**self.bits
        return np.bincount(bucket, weights=residual, minlength=size), np.bincount(bucket, minlength=size).astype(float)


def _targets(rows: TokenRows) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]:
    """Row, previous token and token of each of the K targets."""
    ends = np.flatnonzero(rows.target_mask)
    owner = np.repeat(np.arange(len(rows)), rows.lengths)[ends]
    return owner, rows.values[ends - 1], rows.values[ends]


def _effects(model: NgramInfluenceModel, previous: npt.NDArray[Any], token: npt.NDArray[Any]) -> Values:
    """(K,) what the tables predict at each target: rows of two tokens have one."""
    pairs = np.stack([previous, token], axis=1)
    offsets = 2 * np.arange(len(pairs) + 1, dtype=np.int64)
    return model.predict_per_token(TokenRows(values=pairs.ravel(), offsets=offsets)).astype(np.float64)
