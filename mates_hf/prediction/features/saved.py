"""The files of a fitted `FeatureInfluenceModel`: a line or a matrix, what it was fitted on, and never a model.

Where it is used: `feature_model` saves and loads by it. Trade-off: as in `artifacts`, which this is a thin layer on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mates_hf.errors import MatesError
from mates_hf.prediction.artifacts import damaged, read_artifact, write_artifact
from mates_hf.prediction.features.gradient import HeadLine
from mates_hf.prediction.features.inputs import InputLine
from mates_hf.prediction.features.media import MediaReader
from mates_hf.prediction.ridge import SETTINGS, StateLine
from mates_hf.records import FitReport

Line = StateLine | HeadLine | InputLine


def write_line(path: Any, kind: str, settings: Mapping[str, Any], line: Line, report: FitReport) -> None:
    """Write a fit into a directory.

    Args:
        path: Created where missing.
        kind: Class name of the influence model.
        settings: Plain JSON values, `features` among them.
        line: What was fitted.
        report: How well it predicts.
    """
    flat, num_classes = units_of(line), None
    tensors = {"coefficient": flat.coefficient}
    if isinstance(line, HeadLine):
        tensors["mean"], num_classes = line.mean, line.num_classes
    if isinstance(line, InputLine):
        tensors |= line.tensors()
    write_artifact(path, kind, {**settings, **flat.settings(), "num_classes": num_classes}, tensors, report)


def units_of(line: Line) -> StateLine:
    """The units of what was fitted, and its coefficients."""
    return line if isinstance(line, StateLine) else line.line


def line_of(previous: Any, kind: str) -> Line | None:
    """What the influence model of the round before has to build on.

    Args:
        previous: A fitted `FeatureInfluenceModel`, or None.
        kind: Its features must be.

    Returns:
        Its line; None without a `previous`.

    Raises:
        ValueError: it is of another kind.
        MatesError: it is not fitted.
    """
    if previous is None:
        return None
    found = getattr(previous, "_kind", None)
    if found != kind:
        raise ValueError(
            f"`previous` must be a FeatureInfluenceModel with the same features ({kind!r}), got "
            f"{found or type(previous).__name__!r}."
        )
    line: Line = previous._fitted()
    return line


def read_line(path: Any, kind: str, names: Iterable[str]) -> tuple[dict[str, Any], Line, FitReport]:
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
        if config["features"] == "head_gradient":
            return config, HeadLine.read(line, tensors.get("mean"), config["num_classes"]), report
        if config["features"] == "inputs":
            return config, InputLine.read(line, tensors), report
    except (TypeError, ValueError, OverflowError) as error:  # damaged along with its checksum
        raise damaged(path, error) from error
    return config, line, report


def features_to_load(path: Any, config: Mapping[str, Any], given: Any) -> Any:
    """The `features` of a saved influence model.

    Args:
        path: Its directory, for errors.
        config: What it was saved with.
        given: What the caller passes, or None.

    Returns:
        The name, the function or the encoder.

    Raises:
        ValueError: a function or an encoder is needed and was not given, or the other way round.
    """
    kind, needed = config["features"], ""
    if kind == "function" and given is None:
        needed = "the function that it was fitted with"
    elif kind == "encoder" and given is None and config["encoder"] is None:
        needed = "the encoder that it was fitted with, and `processor` its processor"
    elif kind not in ("function", "encoder") and given is not None:
        needed = f"left out, because it reads {kind!r}"
    if needed:
        raise ValueError(f"`features` must be {needed}, for the influence model of `{path}`.")
    return given if given is not None else (config["encoder"] if kind == "encoder" else kind)


def require_encoder(reader: MediaReader | None, digest: Any) -> None:
    """Raise a `MatesError` where an encoder is not the one of the fit, whose digest was saved."""
    if reader is not None and reader.digest() != digest:
        raise MatesError(
            "The encoder must be the one that the influence model was fitted with, and its weights are others. Pass "
            "that one as `features=`, with its `processor=`, or fit again."
        )
