"""A score that every row of the pool brings along, as of a filter, and how it counts beside predicted influence.

Where it is used: under `scoring`, for runs with a `score_column`. Both rankings are added, each in its standard
deviations over the rows that are compared, so that neither needs a unit or a weight. Influence says what helps this
model now, at the price of a few hundred labels; a filter by words knows every word and never changes. On questions of
five tasks their sum was ahead of either (`benchmarks/README.md`, `horizon`). The scores stand in the place of the
log-odds that the default influence model counts beside its labels (`static_evidence`).

Trade-off: equal weight, whatever the labels say of the column; `round.json` records how far the two agree. The guard
judges the influence model alone. An entry that is missing counts as the mean of the others.

Shape suffix: N rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.columns import fixed_positions
from mates_hf.data.groups import entries_of
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.records import FloatArray, IntArray

SETTING = "score_column"
_NUM_CHECKED = 256


def column_scores(dataset: Any, column: str, ids: IntArray) -> npt.NDArray[np.float64]:
    """The scores of some rows.

    Args:
        dataset: A `datasets.Dataset`, or any map-style dataset of rows that are mappings.
        column: Column with one number a row, higher is better.
        ids: (N,) rows.

    Returns:
        (N,) scores; NaN where an entry is missing or not finite.

    Raises:
        ValueError: there is no such column, or an entry is no number.
    """
    entries, places = entries_of(dataset, column, SETTING, ids)
    values = np.full(len(entries), np.nan)
    for place in np.unique(places).tolist():
        entry = entries[place]
        if isinstance(entry, np.generic):
            entry = entry.item()
        if entry is None:
            continue
        if not isinstance(entry, (int, float)):
            row = int(ids[int(np.flatnonzero(places == place)[0])])
            raise ValueError(
                f"`{SETTING}` must hold one number a row, higher is better, got {type(entry).__name__} in `{column}`, "
                f"pool row {row}. Name another column, or make one with `dataset.map`."
            )
        values[place] = float(entry)
    found = values[places]
    return np.where(np.isfinite(found), found, np.nan)


def require_scores(dataset: Any, column: str) -> None:
    """Look at a few rows before the first step.

    Args:
        dataset: The pool's dataset.
        column: Its column of scores.

    Raises:
        ValueError: there is no such column, it holds no numbers, or they are all equal.
    """
    scores = column_scores(dataset, column, fixed_positions(len(dataset), _NUM_CHECKED))
    if len(scores) > 1 and len(np.unique(scores[np.isfinite(scores)])) < 2:
        raise ValueError(
            f"`{SETTING}` must hold numbers that differ, got {len(scores)} rows of `{column}` without two different "
            "ones. Leave it out, or name another column."
        )


def added(influence: FloatArray, scores: npt.NDArray[np.float64]) -> FloatArray:
    """Predicted influence, and scores in its unit on top of it.

    Args:
        influence: (N,) predicted influence, higher is better.
        scores: (N,) scores of the same rows, higher is better; NaN counts as the mean of the others.

    Returns:
        (N,) float32. Influence as it is where no two scores differ.
    """
    known = np.isfinite(scores)
    if not known.any() or scores[known].min() == scores[known].max():  # whose deviation may be a rounding error
        return influence
    centred = np.where(known, scores - scores[known].mean(), 0.0)
    unit = float(influence.std(dtype=np.float64)) / float(scores[known].std())
    return (influence + unit * centred).astype(np.float32)


def agreement(influence: FloatArray, scores: npt.NDArray[np.float64]) -> float | None:
    """Spearman rank correlation of influence and scores where both are known; None where either is all equal."""
    known = np.isfinite(scores)
    one, other = influence[known].astype(np.float64), scores[known]
    if len(one) < 2 or one.min() == one.max() or other.min() == other.max():
        return None
    return float(rank_correlation(one, other))
