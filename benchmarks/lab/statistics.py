"""Statistics of pages: rank correlations, intervals over seeds, and figures of a few digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas

FloatArray = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def spearman(label: npt.ArrayLike, truth: npt.ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Rank correlation of two (N,) arrays with a 95 % bootstrap interval over candidates."""
    from mates_hf.prediction.judge import fit_report

    report = fit_report(np.asarray(label), np.asarray(truth), num_labels=0, seed=seed)
    return {"spearman": report.spearman, "interval": list(report.interval)}


def without_group_means(values: npt.ArrayLike, group: npt.NDArray[np.int64]) -> FloatArray:
    """(N,) values minus the mean of their group: what is left to rank within groups."""
    series = pandas.Series(np.asarray(values, np.float64))
    return np.asarray(series - series.groupby(group).transform("mean"))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of a few paired values and half the width of its 95 % t interval; nan for a single one."""
    from scipy.stats import t

    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    width = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(width)


def steps_to_reach(curve: Sequence[Mapping[str, float]], key: str, loss: float) -> float | None:
    """Steps at which a curve first gets to a loss, interpolated; None where it does not."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after[key] <= loss:
            share = (before[key] - loss) / max(before[key] - after[key], 1e-12)
            return before["step"] + min(max(share, 0.0), 1.0) * (after["step"] - before["step"])
    return None


def rounded(value: Any, digits: int = 5) -> Any:
    """Plain JSON with floats of a few significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, np.ndarray):
        return rounded(value.tolist(), digits)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{digits}g}")
    return int(value) if isinstance(value, np.integer) else value
