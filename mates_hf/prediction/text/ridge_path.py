"""Effects of hashed units, fitted to how another model ranks texts.

Where it is used: under `text_model`. A text's value is an intercept plus the mean effect of its units. Effects are
the ridge solution; how strong the penalty is, and whether pairs and pieces of units count, is what ranks texts best
that were kept out. Trade-off: one penalty for all effects. A rare unit moves a text's mean little, so it is shrunk
most.

Shape suffixes: N texts, H buckets, E entries of the sparse design.
"""

from __future__ import annotations

import dataclasses
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mates_hf.data.text_spans import TextSpans
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.prediction.text.units import buckets_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)  # in variances of the values, from strong to weak
MOST_ENTRIES = 60_000_000  # of a design: about a gigabyte
_SEARCH_TEXTS = 20_000  # that penalties are tried on
_VALIDATION = 0.15  # of these, that a penalty is judged on
_NAME_OF_TOLERANCE = "tol" if tuple(map(int, version("scipy").split(".")[:2])) < (1, 12) else "rtol"
_TOLERANCE, _ITERATIONS = 1e-3, 100  # of the conjugate gradients
_FIRST = 3  # number of the penalty that words, pairs and pieces are compared with
_COUNTED = ((False, False), (True, False), (True, True))  # pairs and pieces, the simplest first

Bool = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was found to rank best.

    Attributes:
        pairs: Whether pairs of neighbouring units count.
        penalty: Strength of the ridge penalty, in variances of the values.
        spearman: Rank correlation on the texts kept out, by which it was chosen.
        pieces: Whether the ends of long units count; only with pairs.
    """

    pairs: bool
    penalty: float
    spearman: float
    pieces: bool = False


@dataclasses.dataclass(frozen=True)
class Effects:
    """A solution.

    Attributes:
        effects_H: (H,) float64, > 0 raises a text's value.
        intercept: Value of a text without units.
    """

    effects_H: Floats
    intercept: float


class Design:
    """Which buckets each text's units fall into, as a sparse matrix of means.

    Args:
        spans: N texts.
        num_buckets: Number of buckets, a power of two.
        pairs: Whether pairs of neighbouring units count.
        pieces: Whether the ends of long units count.
    """

    def __init__(self, spans: TextSpans, num_buckets: int, pairs: bool, pieces: bool = False) -> None:
        from scipy.sparse import csr_matrix

        buckets, sizes, num_units = buckets_of(spans, num_buckets, pairs, pieces)
        borders = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        weights = np.repeat(1.0 / np.maximum(num_units, 1), sizes).astype(np.float32)
        self.means: csr_matrix = csr_matrix((weights, buckets, borders), shape=(len(spans), num_buckets))
        self.means.sum_duplicates()

    def solve(self, values: Floats, members: Bool, penalty: float, start: Floats | None = None) -> Effects:
        """The ridge solution on some of the texts.

        Args:
            values: (N,) values.
            members: (N,) True for the texts to fit.
            penalty: Strength of the penalty, in variances of the values.
            start: (H,) effects to start from.

        Returns:
            The effects.
        """
        from scipy.sparse.linalg import LinearOperator, cg

        means = self.means[np.flatnonzero(members)]
        wanted = values[members]
        centre, scale = float(wanted.mean()), float(wanted.std())
        columns = np.asarray(means.mean(axis=0), np.float64).ravel()
        squares = np.asarray(means.multiply(means).sum(axis=0), np.float64).ravel()
        diagonal = squares - len(wanted) * columns**2 + penalty
        transposed = means.T.tocsr()

        def normal(effects: Floats) -> Floats:
            fitted = means @ effects
            return np.asarray(transposed @ (fitted - fitted.mean()) + penalty * effects, np.float64)

        size = len(columns)
        found, _ = cg(
            LinearOperator((size, size), matvec=normal, dtype=np.float64),
            np.asarray(transposed @ ((wanted - centre) / scale), np.float64),
            x0=None if start is None else start / scale,
            M=LinearOperator((size, size), matvec=lambda residual: residual / diagonal, dtype=np.float64),
            maxiter=_ITERATIONS,
            **{_NAME_OF_TOLERANCE: _TOLERANCE},
        )
        effects = np.asarray(found * scale, np.float64)
        return Effects(effects, centre - float(columns @ effects))

    def solve_by_way(self, values: Floats, members: Bool, penalty: float) -> Effects:
        """As `solve`, from nothing, by way of the stronger penalties that a choice went through.

        Started at a weak penalty, conjugate gradients end far from its solution: held-out Spearman was 0.95, and 0.96
        by this way.

        Args:
            values: (N,) values.
            members: (N,) True for the texts to fit.
            penalty: Strength of the penalty, in variances of the values.

        Returns:
            The effects.
        """
        found: Effects | None = None
        for stronger in (*(one for one in PENALTIES[_FIRST:] if one > penalty), penalty):
            found = self.solve(values, members, stronger, None if found is None else found.effects_H)
        assert found is not None
        return found

    def predict(self, effects: Effects, members: Bool) -> Floats:
        """(M,) values of the texts that are `members`."""
        rows = self.means[np.flatnonzero(members)]
        return np.asarray(rows @ effects.effects_H + effects.intercept, np.float64)


def choose(spans: TextSpans, values: Floats, num_buckets: int, seed: int) -> Choice:
    """Try words alone, pairs of them, and pieces too, with one penalty, and the best of the three with others.

    Args:
        spans: N texts.
        values: (N,) their values, not all equal.
        num_buckets: Number of buckets, a power of two.
        seed: Random seed of the texts that are kept out.

    Returns:
        What ranks the texts kept out best; the simpler of equals.
    """
    drawn = np.sort(np.random.default_rng([seed, 1]).permutation(len(spans))[:_SEARCH_TEXTS])
    few, wanted = spans.take(drawn), values[drawn]
    kept_out = np.random.default_rng([seed, 2]).random(len(drawn)) < _VALIDATION
    if kept_out.sum() < 2 or not np.ptp(wanted[kept_out]) or not np.ptp(wanted[~kept_out]):
        return Choice(False, PENALTIES[0], float("nan"))  # too few to tell
    best: _Search | None = None
    for counted in _COUNTED:  # one design in memory besides the best
        tried = _Search(Design(few, num_buckets, *counted), counted, wanted, kept_out)
        best = tried if best is None or tried.tried(_FIRST) > best.tried(_FIRST) else best
    assert best is not None
    return best.best()


class _Search:
    """Penalties tried on one design."""

    def __init__(self, design: Design, counted: tuple[bool, bool], values: Floats, kept_out: Bool) -> None:
        self._design, self._counted, self._values, self._kept_out = design, counted, values, kept_out
        self._start: Floats | None = None
        self._found: dict[int, float] = {}

    def tried(self, index: int) -> float:
        """Spearman on the texts kept out with the penalty of that number; below all where there is no such one."""
        if not 0 <= index < len(PENALTIES):
            return -np.inf
        if index not in self._found:
            effects = self._design.solve(self._values, ~self._kept_out, PENALTIES[index], self._start)
            self._start = effects.effects_H
            found = rank_correlation(self._design.predict(effects, self._kept_out), self._values[self._kept_out])
            about = (*self._counted, PENALTIES[index], found)
            logger.debug("Pairs %s, pieces %s, penalty %g: Spearman %.4f kept out.", *about)
            self._found[index] = found
        return self._found[index]

    def best(self) -> Choice:
        """The best penalty, found by going where it gets better."""
        here = _FIRST
        for direction in (1, -1):
            while self.tried(here + direction) > self.tried(here):
                here += direction
        pairs, pieces = self._counted
        return Choice(pairs, PENALTIES[here], self._found[here], pieces)
