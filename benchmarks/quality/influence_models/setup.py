"""What the parts of `influence_models` share: sizes, the labelled candidates, and what judges a prediction.

Trade-off: all labels are measured once, at one checkpoint, and read back from disk by every unit; so they answer for
one moment of one run.

Shape suffix: E evaluated candidates, the test candidates before the slice.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.lab.checkpoint import Paths, Point, one_a_document, warm_point
from benchmarks.lab.corpus import Lab, load_lab
from benchmarks.lab.statistics import Ids
from mates_hf.data.rows import TokenRows
from mates_hf.evaluation.agreement import bootstrap_interval, rank_correlation, top_precision, within_group
from mates_hf.records import InfluenceLabels
from mates_hf.round_files import read_labels, write_labels

Values = npt.NDArray[np.float64]

RATIO = 0.2  # of a slice that is trained on, and of the test candidates that `precision` looks at
SEED = 0  # of the checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; the defaults are the full run."""

    documents: int | None = None
    warm: int = 300
    labels: int = 16_000
    test: int = 2_000
    slice_rows: int = 8_000
    numbers: tuple[int, ...] = (250, 500, 1_000, 2_000, 4_000, 8_000, 16_000)
    draws: int = 3
    main: int = 2_000
    horizons: tuple[int, ...] = (10, 100)
    gain_seeds: int = 5


QUICK = Sizes(
    documents=3_000, warm=60, labels=500, test=200, slice_rows=800, numbers=(250, 500), draws=1, main=250,
    horizons=(2, 10), gain_seeds=1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """Labelled candidates at one checkpoint."""

    lab: Lab  # the corpus, reference and development passages
    sizes: Sizes  # of the run
    paths: Paths  # data and work folders
    ids: Ids  # (P,) pool rows: those to fit on, then the test candidates, then the slice; no document is in two parts
    labels: InfluenceLabels  # of all P, > 0 helps; `candidate_id` is the position among them

    @functools.cached_property
    def rows(self) -> TokenRows:
        """The P rows."""
        return self.lab.rows.take(self.ids)

    @functools.cached_property
    def domain(self) -> Ids:
        """(P,) domain of each; read by reports and by the row that is told it."""
        return self.lab.domain[self.ids]

    @property
    def test(self) -> slice:
        """Positions of the test candidates."""
        return slice(self.sizes.labels, self.sizes.labels + self.sizes.test)

    @property
    def evaluated(self) -> Ids:
        """(E,) positions of test candidates and slice."""
        return np.arange(self.sizes.labels, len(self.ids))

    def draw(self, num: int, draw: int) -> Ids:
        """Positions of the first `num` candidates of one order of those to fit on."""
        return np.random.default_rng([SEED, 7, draw]).permutation(self.sizes.labels)[:num]

    def labels_of(self, positions: Ids) -> InfluenceLabels:
        """Labels of these positions, numbered anew."""
        return dataclasses.replace(self.labels.take(positions), candidate_id=np.arange(len(positions)))

    def point(self) -> Point:
        """The checkpoint, with the optimizer's state."""
        return warm_point(self.lab, self.sizes.warm, self.paths.work, SEED)


@functools.lru_cache(maxsize=1)
def open_labelled(paths: Paths, sizes: Sizes) -> Labelled:
    """The candidates with their labels, once a process; measured where they are not on disk."""
    lab = load_lab(paths.data, paths.work, num_documents=sizes.documents)
    point = warm_point(lab, sizes.warm, paths.work, SEED)
    first = one_a_document(lab, point.rest)[: sizes.labels + sizes.test]
    others = point.rest[~np.isin(lab.document[point.rest], lab.document[first])]
    ids = np.concatenate([first, others[: sizes.slice_rows]])
    if len(ids) < sizes.labels + sizes.test + sizes.slice_rows:
        raise ValueError(f"The corpus must have enough rows for all parts, got {len(first)} and {len(others)}.")
    return Labelled(lab=lab, sizes=sizes, paths=paths, ids=ids, labels=_labels(point, ids, paths.work))


def _labels(point: Point, ids: Ids, work: Path) -> InfluenceLabels:
    """Labels of these rows at the averaged weights, the reference loss over all tokens."""
    path = work / "labels.parquet"
    if not path.exists():
        with point.weights(averaged=True):
            write_labels(path, dataclasses.replace(point.measure(ids), candidate_id=ids))
    labels = read_labels(path)
    if not np.array_equal(labels.candidate_id, ids):
        raise ValueError(f"`{path.name}` must be of this run's candidates. Use another --work, or delete it.")
    return dataclasses.replace(labels, candidate_id=np.arange(len(ids)))


def judge(predicted: npt.ArrayLike, truth: npt.ArrayLike, domain: Ids) -> dict[str, Any]:
    """Agreement of (N,) predictions with labels: Spearman with interval, within domain, precision of the top fifth."""
    predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    return {
        "spearman": rank_correlation(predicted, truth),
        "interval": list(bootstrap_interval(predicted, truth, 0)),
        "within": within_group(predicted, truth, domain),
        "precision": top_precision(predicted, truth, RATIO),
    }


def packed_ranks(values: npt.ArrayLike) -> str:
    """(N,) values as base64 of little-endian uint16 ranks, 0 the lowest, ties equal: all that `judge` depends on."""
    ranks = np.unique(np.asarray(values), return_inverse=True)[1]
    return base64.b64encode(ranks.astype("<u2").tobytes()).decode("ascii")


def unpacked_ranks(text: str) -> Values:
    """(N,) ranks that `packed_ranks` wrote."""
    return np.frombuffer(base64.b64decode(text), "<u2").astype(np.float64)


def best(values: npt.ArrayLike, num: int, seed: int) -> Ids:
    """(num,) positions of the largest values; ties are broken at random."""
    values = np.asarray(values)
    chance = np.random.default_rng([seed, 9]).permutation(len(values))
    return np.lexsort((chance, -values))[:num]
