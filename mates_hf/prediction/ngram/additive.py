"""Fitting additive n-gram tables: penalties chosen out of fold, and the two kinds of labels.

Where it is used: the fit inside `ngram.NgramInfluenceModel`. Everything is in standardised units: derivatives minus
their mean, divided by the round's standard deviation of `influence_per_token`, so that rounds can be added up.

The model is y(previous, token) = mu + T[token] + P[previous] + B[bucket of the bigram], and a candidate's prediction
is the mean over its targets. Both kinds of labels end in such tables:

- token labels: ridge on the derivative at each token. The sparse table of bigrams (count, sum) is all it needs, so
  earlier rounds are pooled by adding their table with less weight.
- document labels: ridge of the candidate's label on its L1-normalised counts of the same features. Earlier rounds
  enter as the tables it shrinks towards.

Trade-off: penalties are chosen by the out-of-fold rank correlation of whole candidates, not by the error of tokens,
because ranking candidates is what the tables are for; it costs a few dozen small fits.

Shape suffixes: N candidates, K targets over all candidates, C cells (distinct bigrams), S slots (distinct buckets).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import TokenRows
from mates_hf.evaluation.agreement import rank_correlation, slope_of
from mates_hf.prediction import judge
from mates_hf.prediction.ngram import kernels
from mates_hf.prediction.ngram.tables import FloatVector, Statistics, Tables, join_keys, split_keys
from mates_hf.prediction.threads import num_threads

if TYPE_CHECKING:
    import scipy.sparse as sp

NUM_FOLDS = 4
MIN_BIGRAM_COUNT = 1.5  # a bigram seen once says almost nothing, and filling its bucket disturbs unseen bigrams
MIN_KEPT_COUNT = 0.01  # weight below which a cell of earlier rounds is dropped
_FINAL_SWEEPS = 12
_SEARCH_SWEEPS = 3
_LANCZOS_STEPS = 24
# Weight (tokens) at which an effect is halved; the first of each is where the search starts.
_GRID: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("token", (300.0, 30.0, 100.0, 1000.0, 3000.0)),
    ("previous", (30.0, 10.0, 100.0, 1000.0)),
    ("bigram", (10.0, 3.0, 30.0, 1000.0)),
)
# Document ridge penalty, in units of the mean squared length of the centred features.
_DOCUMENT_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Penalties:
    """Shrinkage of each table: the weight in tokens at which an effect is halved; `document` in its own unit."""

    token: float = _GRID[0][1][0]
    previous: float = _GRID[1][1][0]
    bigram: float = _GRID[2][1][0]
    document: float | None = None

    @property
    def array(self) -> FloatVector:
        """(3,) token, previous, bigram."""
        return np.array([self.token, self.previous, self.bigram])


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the out-of-fold search found.

    Attributes:
        penalties: the chosen shrinkage.
        token_part: (N,) prediction of the token tables for each candidate by a fit without it; NaN where not searched.
        prior_weight: weight of the earlier rounds' document tables, in [0, 1].
        predicted: (N,) prediction of token and document tables by a fit without the candidate; NaN where not searched.
        fold: (N,) int, the candidates predicted by one fit; -1 where not searched.
    """

    penalties: Penalties
    token_part: FloatVector
    prior_weight: float
    predicted: FloatVector
    fold: npt.NDArray[np.int64]


def centre_by(values: FloatVector, group: npt.NDArray[np.int64]) -> FloatVector:
    """(N,) values minus the mean of their group.

    Predictions of several fits are compared with labels this way: a fold whose labels are low leaves a high mean to
    the fit of the others, so that folds taken together would count against any model.
    """
    number = np.unique(group, return_inverse=True)[1]
    return np.asarray(values - (np.bincount(number, weights=values) / np.bincount(number))[number])


def calibration(labels: FloatVector, predicted: FloatVector, fold: npt.NDArray[np.int64]) -> float:
    """Slope of labels on out-of-sample predictions, kept positive; both about the mean of what one fit predicts."""
    return float(np.clip(slope_of(centre_by(labels, fold), centre_by(predicted, fold)), *judge.SLOPE_RANGE))


class TokenDesign:
    """The targets of N candidates as cells of a sparse bigram table, next to earlier rounds' statistics.

    Args:
        rows: N candidates, each with at least one target.
        num_buckets: hash buckets of the bigram table, a power of two.
        labels: (N,) float64 standardised label of each candidate.
        derivatives: (K,) float64 standardised derivative at each target, or None: fit document labels alone.
        earlier: statistics of earlier rounds, already decayed.
        prior: document tables of earlier rounds in standardised units, or None.
        document: also fit document labels (of what the token tables leave over, where there are derivatives).
        offset: tables in standardised units that the token tables shrink towards; None shrinks towards 0. Only with
            derivatives.
    """

    def __init__(
        self,
        rows: TokenRows,
        num_buckets: int,
        labels: FloatVector,
        derivatives: FloatVector | None,
        *,
        earlier: Statistics,
        prior: Tables | None,
        document: bool,
        offset: Tables | None = None,
    ) -> None:
        mask = rows.target_mask
        where = np.flatnonzero(mask)
        targets = (rows.values if rows.labels is None else rows.labels)[where].astype(np.int64)
        before = rows.values[where - 1].astype(np.int64)
        lowest, highest = min(targets.min(), before.min()), max(targets.max(), before.max())
        if lowest < 0 or highest >= 2**31:
            raise ValueError(
                f"Token ids of candidates must be in [0, 2**31), got {lowest} to {highest}. Mask untrained tokens in "
                "`labels` (-100), not in `input_ids`."
            )
        self.num_targets = rows.num_targets.astype(np.float64)
        self.owner = np.repeat(np.arange(len(rows)), rows.num_targets)
        keys, index = np.unique(np.concatenate([join_keys(before, targets), earlier.keys]), return_inverse=True)
        self.cell = index[: len(where)]
        self.keys = keys
        self.earlier_counts, self.earlier_sums = (
            np.bincount(index[len(where) :], weights=values, minlength=len(keys))
            for values in (earlier.counts, earlier.sums)
        )
        self.previous, self.token = (ids.astype(np.int32) for ids in split_keys(keys))
        sizes = [len(tables.token) for tables in (prior, offset) if tables is not None]
        self.vocab_size = max(int(self.token.max()) + 1, int(self.previous.max()) + 1, *sizes)
        self.num_buckets = num_buckets
        counts = np.bincount(self.cell, minlength=len(keys)) + self.earlier_counts
        active = np.flatnonzero(counts >= MIN_BIGRAM_COUNT)
        buckets = kernels.hash_bigrams(self.previous[active], self.token[active], num_buckets)
        self.buckets, slots = np.unique(buckets, return_inverse=True)
        self.slot = np.zeros(len(keys), np.int32)
        self.slot[active] = slots + 1
        self.labels = labels
        self.derivatives = derivatives
        self.document = document
        self.prior = None if prior is None else prior.resized(self.vocab_size)
        self.prior_score = np.zeros(len(rows)) if self.prior is None else self._mean(self._cell_values(self.prior))
        self.offset: Tables | None = None
        self._offset_cells = np.zeros(len(keys))
        if offset is not None and derivatives is not None:
            self.offset = offset.resized(self.vocab_size)
            values = self._cell_values(self.offset)
            self._offset_cells = values - values[self.cell].mean()  # as derivatives are about their mean
        self._matrix: sp.csr_matrix | None = None

    def _cell_values(self, tables: Tables) -> FloatVector:
        """(C,) value of each cell under tables as they score, hash collisions of unseen bigrams included."""
        buckets = kernels.hash_bigrams(self.previous, self.token, self.num_buckets)
        return np.asarray(tables.token[self.token] + tables.previous[self.previous] + tables.bigram[buckets])

    def _mean(self, cell_values: FloatVector, members: npt.NDArray[np.bool_] | None = None) -> FloatVector:
        """(N,) mean of the cells' values over each candidate's targets; given (N,) bool `members`, (M,) of those."""
        if members is None:
            sums = np.bincount(self.owner, weights=cell_values[self.cell], minlength=len(self.num_targets))
            return np.asarray(sums / self.num_targets)
        chosen = members[self.owner]
        sums = np.bincount(self.owner[chosen], weights=cell_values[self.cell[chosen]], minlength=len(self.num_targets))
        return np.asarray(sums[members] / self.num_targets[members])

    def score(self, tables: Tables) -> FloatVector:
        """(N,) float64 prediction of the candidates."""
        return self._mean(self._cell_values(tables))

    def _counted(self, members: npt.NDArray[np.bool_]) -> tuple[FloatVector, FloatVector]:
        """(C,) counts of targets of some candidates and earlier rounds, and sums of what the offset leaves over."""
        chosen = members[self.owner]
        cells = self.cell[chosen]
        counts = np.asarray(np.bincount(cells, minlength=len(self.keys)) + self.earlier_counts, np.float64)
        if self.derivatives is None:
            return counts, np.zeros(len(self.keys))
        sums = np.bincount(cells, weights=self.derivatives[chosen], minlength=len(self.keys))
        return counts, np.asarray(sums + self.earlier_sums - counts * self._offset_cells, np.float64)

    def statistics(self) -> Statistics:
        """Statistics of all candidates and the earlier rounds, to keep."""
        counts, sums = self._counted(np.ones(len(self.num_targets), bool))
        if self.derivatives is not None:
            sums = sums + counts * self._offset_cells
        kept = counts >= MIN_KEPT_COUNT
        return Statistics(self.keys[kept], counts[kept].astype(np.float32), sums[kept].astype(np.float32))

    def _slots(self) -> tuple[FloatVector, FloatVector, FloatVector]:
        return np.zeros(self.vocab_size), np.zeros(self.vocab_size), np.zeros(len(self.buckets) + 1)

    def _spread(self, token: FloatVector, previous: FloatVector, slots: FloatVector) -> Tables:
        """Tables with the slots put into their buckets."""
        bigram = np.zeros(self.num_buckets)
        bigram[self.buckets] = slots[1:]
        return Tables(token, previous, bigram)

    def choose(self, members: npt.NDArray[np.bool_], seed: int, penalties: Penalties | None = None) -> Choice:
        """Choose penalties by the out-of-fold rank correlation among some candidates.

        Args:
            members: (N,) bool, the candidates that may be looked at.
            seed: Random seed of the folds.
            penalties: Penalties of the token tables, where they are chosen already.

        Returns:
            The penalties, and what fits without them predict for the members.
        """
        rows = np.flatnonzero(members)
        fold = np.full(len(members), -1)
        fold[np.random.default_rng(seed).permutation(rows)] = np.arange(len(rows)) % min(NUM_FOLDS, len(rows))
        token_part = np.zeros(len(members))
        if self.derivatives is not None:
            penalties, token_part = self._choose_token(fold, penalties)
        penalties = penalties or Penalties()
        left_over = self.labels - token_part
        weight = self._prior_weight(members, left_over)
        predicted = token_part + weight * self.prior_score
        if self.document:
            alpha, extra = self._choose_document(fold, left_over - weight * self.prior_score, predicted)
            penalties = dataclasses.replace(penalties, document=alpha)
            predicted = predicted + extra
        outside = ~members
        token_part[outside] = predicted[outside] = np.nan
        return Choice(penalties, token_part, weight, predicted, fold)

    def _agreement(self, predicted: FloatVector, fold: npt.NDArray[np.int64]) -> float:
        """Rank correlation with the labels, both about their fold's mean."""
        members = fold >= 0
        values = (centre_by(values[members], fold[members]) for values in (predicted, self.labels))
        return rank_correlation(*values)

    def _choose_token(self, fold: npt.NDArray[np.int64], penalties: Penalties | None) -> tuple[Penalties, FloatVector]:
        """Penalties of the token tables, by one pass of coordinate search if none are given, and what they predict.

        The predictions are out of fold; folds run side by side.
        """
        folds = range(int(fold.max()) + 1)
        counted = [self._counted((fold >= 0) & (fold != k)) for k in folds]
        states = [self._slots() for _ in folds]

        with ThreadPoolExecutor(min(len(folds), num_threads())) as pool:

            def predict(penalties: Penalties, num_sweeps: int) -> FloatVector:
                def of_fold(k: int) -> FloatVector:
                    counts, sums = counted[k]
                    state, sizes = states[k], penalties.array
                    kernels.backfit(counts, sums, self.token, self.previous, self.slot, sizes, state, num_sweeps)
                    values = state[0][self.token] + state[1][self.previous] + state[2][self.slot]
                    return self._mean(values + self._offset_cells, fold == k)

                predicted = np.zeros(len(fold))
                for k, found in zip(folds, pool.map(of_fold, folds), strict=True):
                    predicted[fold == k] = found
                return predicted

            best = penalties or Penalties()
            if penalties is None:
                best_value = self._agreement(predict(best, _SEARCH_SWEEPS), fold)
                for name, grid in _GRID:
                    for penalty in grid[1:]:
                        tried = dataclasses.replace(best, **{name: penalty})
                        value = self._agreement(predict(tried, _SEARCH_SWEEPS), fold)
                        if value > best_value:
                            best, best_value = tried, value
            return best, predict(best, _FINAL_SWEEPS)

    def _choose_document(
        self, fold: npt.NDArray[np.int64], target: FloatVector, predicted: FloatVector
    ) -> tuple[float | None, FloatVector]:
        """Penalty of the document ridge on `target`, None where it adds nothing, and its predictions out of fold."""
        members = fold >= 0
        path = np.zeros((len(fold), len(_DOCUMENT_GRID)))
        for k in range(int(fold.max()) + 1):
            weights = self._ridge(members & (fold != k), target, _DOCUMENT_GRID)
            path[fold == k] = (self._features() @ weights)[fold == k]
        values = [self._agreement(predicted + path[:, k], fold) for k in range(len(_DOCUMENT_GRID))]
        best = int(np.argmax(values))
        something = self.derivatives is not None or self.prior is not None
        if something and values[best] <= self._agreement(predicted, fold):
            return None, np.zeros(len(fold))
        return _DOCUMENT_GRID[best], path[:, best]

    def _prior_weight(self, members: npt.NDArray[np.bool_], left_over: FloatVector) -> float:
        """Least-squares weight of the earlier rounds' document tables, held to [0, 1]."""
        if self.prior is None:
            return 0.0
        score = self.prior_score[members] - self.prior_score[members].mean()
        variance = float(score @ score)
        return float(np.clip(score @ left_over[members] / variance, 0.0, 1.0)) if variance > 0 else 0.0

    def solve(self, members: npt.NDArray[np.bool_], choice: Choice) -> tuple[Tables, Tables | None]:
        """Fit on some candidates.

        Args:
            members: (N,) bool; each must have an entry in `choice.token_part`.
            choice: What `choose` returned.

        Returns:
            Token tables, and document tables (None without document labels), float64 and standardised.
        """
        token = Tables.zeros(self.vocab_size, self.num_buckets)
        if self.derivatives is not None:
            counts, sums = self._counted(members)
            state = self._slots()
            kernels.backfit(
                counts, sums, self.token, self.previous, self.slot, choice.penalties.array, state, _FINAL_SWEEPS
            )
            token = self._spread(*state)
            if self.offset is not None:
                token = token.plus(self.offset)
        if not self.document:
            return token, None
        document = Tables.zeros(self.vocab_size, self.num_buckets)
        if self.prior is not None:
            document = document.plus(self.prior, choice.prior_weight)
        if choice.penalties.document is not None:
            left_over = self.labels - np.where(members, choice.token_part, 0.0)
            left_over = left_over - choice.prior_weight * self.prior_score
            weights = self._ridge(members, left_over, [choice.penalties.document])
            vocab = self.vocab_size
            slots = np.concatenate([[0.0], weights[2 * vocab :, 0]])
            document = document.plus(self._spread(weights[:vocab, 0], weights[vocab : 2 * vocab, 0], slots))
        return token, document

    def _features(self) -> sp.csr_matrix:
        """(N, 2 V + S) L1-normalised counts of target tokens, previous tokens and slots."""
        if self._matrix is None:
            import scipy.sparse as sp

            vocab = self.vocab_size
            slot = self.slot[self.cell]
            columns = [self.token[self.cell], vocab + self.previous[self.cell], 2 * vocab + slot[slot > 0] - 1]
            owners = np.concatenate([self.owner, self.owner, self.owner[slot > 0]])
            shape = (len(self.num_targets), 2 * vocab + len(self.buckets))
            entries = (1.0 / self.num_targets[owners], (owners, np.concatenate(columns)))
            self._matrix = sp.coo_matrix(entries, shape=shape).tocsr()
        return self._matrix

    def _ridge(self, members: npt.NDArray[np.bool_], target: FloatVector, alphas: Sequence[float]) -> FloatVector:
        """(F, A) weights of a ridge of `target` on some candidates' features, one column a penalty; mean not included.

        One Lanczos run in the dual serves all penalties; that it stops early shrinks a little more.
        """
        features = self._features()[members]
        centred = target[members] - target[members].mean()
        norm = float(np.linalg.norm(centred))
        transposed = features.T.tocsr()
        if norm == 0:
            return np.zeros((features.shape[1], len(alphas)))
        centre = np.asarray(features.mean(axis=0)).ravel()
        scale = float(features.multiply(features).sum() / features.shape[0] - centre @ centre)
        basis = [centred / norm]
        diagonal: list[float] = []
        beside: list[float] = []
        for _ in range(min(_LANCZOS_STEPS, len(centred))):
            product = features @ (transposed @ basis[-1])
            product -= product.mean()
            diagonal.append(float(basis[-1] @ product))
            stacked = np.array(basis)
            for _ in range(2):  # twice is enough for orthogonality to rounding
                product -= stacked.T @ (stacked @ product)
            beside.append(float(np.linalg.norm(product)))
            if beside[-1] <= 1e-10 * max(diagonal):
                break
            basis.append(product / beside[-1])
        size = len(diagonal)
        inner = np.diag(diagonal) + np.diag(beside[: size - 1], 1) + np.diag(beside[: size - 1], -1)
        start = np.zeros(size)
        start[0] = norm
        dual = np.stack([np.linalg.solve(inner + alpha * scale * np.eye(size), start) for alpha in alphas], axis=1)
        return np.asarray(transposed @ (np.array(basis[:size]).T @ dual))
