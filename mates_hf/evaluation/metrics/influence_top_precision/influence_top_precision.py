"""`evaluate` module: how many of the candidates predicted best are truly among the best.

Use and trade-off: as `mates_hf.evaluation.metrics` says. Ties are broken at random in closed form, so
the figure depends on no order of rows.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from mates_hf.evaluation.agreement import check_pair, num_best, top_precision

_INPUTS = """
Args:
    predictions: predicted influence of N candidates, nats/token, > 0 helps.
    references: their measured influence, same sign and unit, not fitted on. Only the order counts, which is all that
        path labels (DirectionalProbe) have.
    fraction: of the candidates that counts as the best, in (0, 1].
Returns:
    top_precision: share of the predicted best fraction that is truly in the best fraction, in [0, 1]; where candidates
        tie, the expected value over random ways to break the ties.
    base_rate: what chance gives, and a constant prediction.
Raises:
    ValueError: lengths differ, fewer than 2 candidates, a value that is not finite, or a wrong fraction.
"""


class InfluenceTopPrecision(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Precision of the best fraction that an influence model picks."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Share of the candidates predicted best that are truly among the best.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Any, references: Any, fraction: float = 0.2) -> dict[str, float]:
        predicted, actual = check_pair(predictions, references, ("predictions", "references"))
        return {
            "top_precision": top_precision(predicted, actual, fraction),
            "base_rate": num_best(len(actual), fraction) / len(actual),
        }
