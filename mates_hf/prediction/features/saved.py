"""The files of a fitted `FeatureInfluenceModel`: a line or a matrix, what it was fitted on, and never a model.

Where it is used: `feature_model` saves and loads by it. Trade-off: as in `artifacts`, which this is a thin layer on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mates_hf.prediction.artifacts import damaged, read_artifact, write_artifact
from mates_hf.prediction.features.gradient import HeadLine
from mates_hf.prediction.ridge import SETTINGS, StateLine
from mates_hf.records import FitReport

_HEAD = "head_gradient"  # the features whose line is a matrix


def write_line(
    path: Any, kind: str, settings: Mapping[str, Any], line: StateLine | HeadLine, report: FitReport
) -> None:
    """Write a fit into a directory.

    Args:
        path: Created where missing.
        kind: Class name of the influence model.
        settings: Plain JSON values, `features` among them.
        line: What was fitted.
        report: How well it predicts.
    """
    flat = line.line if isinstance(line, HeadLine) else line
    tensors, num_classes = {"coefficient": flat.coefficient}, None
    if isinstance(line, HeadLine):
        tensors["mean"], num_classes = line.mean, line.num_classes
    write_artifact(path, kind, {**settings, **flat.settings(), "num_classes": num_classes}, tensors, report)


def read_line(path: Any, kind: str, names: Iterable[str]) -> tuple[dict[str, Any], StateLine | HeadLine, FitReport]:
    """Read what `write_line` wrote.

    Args:
        path: The directory.
        kind: Class name that must have written it.
        names: Settings that it must have.

    Returns:
        Its settings, what was fitted, and the report.

    Raises:
        FileNotFoundError: the directory holds no influence model.
        ValueError: it holds another kind of model, or was written in a newer format.
        MatesError: a file is damaged or was changed after it was written.
    """
    config, tensors, report = read_artifact(path, kind, (*names, *SETTINGS, "num_classes"))
    try:
        line = StateLine.read(config, tensors.get("coefficient"))
        if config["features"] == _HEAD:
            return config, HeadLine.read(line, tensors.get("mean"), config["num_classes"]), report
    except (TypeError, ValueError, OverflowError) as error:  # damaged along with its checksum
        raise damaged(path, error) from error
    return config, line, report
