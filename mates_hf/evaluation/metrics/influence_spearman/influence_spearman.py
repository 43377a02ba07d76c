"""`evaluate` module: Spearman correlation of predicted with measured influence, and its bootstrap interval.

Use and trade-off: as `mates_hf.evaluation.metrics` says. The interval is the 95 % percentile interval
over resampled candidates, as in a fit report.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from mates_hf.evaluation.agreement import (
    MIN_GROUP_SIZE,
    NUM_RESAMPLES,
    bootstrap_interval,
    check_pair,
    check_varies,
    rank_correlation,
    within_group,
)

_INPUTS = """
Args:
    predictions: predicted influence of N candidates, nats/token, > 0 helps.
    references: their measured influence, same sign and unit, not fitted on. Only the order counts, which is all that
        path labels (DirectionalProbe) have.
    groups: group of each candidate (a domain, a source), or None.
    num_resamples: bootstrap draws of N candidates.
    seed: Random seed of the bootstrap.
Returns:
    spearman: rank correlation, in [-1, 1]; > 0 where a higher prediction goes with a higher influence.
    interval_low, interval_high: its 95 % interval; -1 and 1 below 5 candidates.
    spearman_within_group: mean of the correlations inside groups of at least 8, weighted by size; with `groups` only.
Raises:
    ValueError: lengths differ, fewer than 2 candidates, a value that is not finite, all predictions or all references
        equal, or no group that is large enough.
"""


class InfluenceSpearman(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Held-out Spearman of an influence model."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Spearman correlation of predicted with measured influence, and its bootstrap interval.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        groups: Any = None,
        num_resamples: int = NUM_RESAMPLES,
        seed: int = 0,
    ) -> dict[str, float]:
        predicted, actual = check_pair(predictions, references, ("predictions", "references"))
        check_varies(predicted, "predictions", "a rank correlation")
        check_varies(actual, "references", "a rank correlation")
        low, high = bootstrap_interval(predicted, actual, seed, num_resamples)
        result = {
            "spearman": rank_correlation(predicted, actual),
            "interval_low": low,
            "interval_high": high,
        }
        if groups is not None:
            within = within_group(predicted, actual, groups)
            if within is None:
                raise ValueError(
                    f"`groups` must have a group of at least {MIN_GROUP_SIZE} candidates, got groups of "
                    f"{sorted(np.unique(groups, return_counts=True)[1].tolist())}. Give coarser groups, or none."
                )
            result["spearman_within_group"] = within
        return result
