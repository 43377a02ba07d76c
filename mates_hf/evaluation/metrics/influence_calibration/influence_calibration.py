"""`evaluate` module: whether predicted influence has the size of measured influence, not only its order.

Use and trade-off: as `mates_hf.evaluation.metrics` says. A slope near 1 says that the shrinkage of the
predictions is right; it says nothing of how well they rank.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from mates_hf.evaluation.agreement import calibration_bins, check_pair, check_varies, slope_of

_INPUTS = """
Args:
    predictions: predicted influence of N candidates, nats/token, > 0 helps.
    references: their measured influence, same sign and unit, not fitted on. Path labels (DirectionalProbe) are an
        order: with them the line says how far predictions shrink the labels, not what an optimizer step would do.
    num_bins: parts of equal size that the candidates are put in, by prediction.
Returns:
    slope: least-squares slope of references on predictions; 1 is calibrated, below 1 they are too far apart.
    intercept: of the same line, nats/token; 0 is calibrated.
    mean_predicted, mean_label: list of the mean in each part, nats/token, lowest predictions first.
Raises:
    ValueError: lengths differ, fewer than 2 candidates, a value that is not finite, or all predictions equal.
"""


class InfluenceCalibration(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Calibration of an influence model, by tenths of its predictions."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Mean predicted against mean measured influence by tenths, and the line through all.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Any, references: Any, num_bins: int = 10) -> dict[str, Any]:
        predicted, actual = check_pair(predictions, references, ("predictions", "references"))
        check_varies(predicted, "predictions", "the slope of a calibration")
        slope = slope_of(actual, predicted)
        bins = calibration_bins(predicted, actual, num_bins)
        return {
            "slope": slope,
            "intercept": float(actual.mean() - slope * predicted.mean()),
            "mean_predicted": [mean for mean, _ in bins],
            "mean_label": [mean for _, mean in bins],
        }
