"""What this library raises about the state of a run: every error has `MatesError` as its root.

Wrong input raises `ValueError` or `TypeError` instead. Errors that one module alone raises stand in that module. This
one is left of everything and imports nothing, so that any other can raise what is here.
"""

from __future__ import annotations

from typing import Any


class MatesError(RuntimeError):
    """Root of the errors this library raises about state (wrong input raises `ValueError` or `TypeError`)."""


class UnsupportedSettingError(MatesError):
    """A setting of the run that would bypass or break the data order; raised before the first optimizer step."""


class InfluenceError(MatesError):
    """Influence that must not be selected on: non-finite, all zero or all equal."""


class UnrankableError(InfluenceError):
    """Finite influence that ranks nothing: all zero, all equal, or of a single document.

    Attributes:
        labels: those measured, where labels are what ranks nothing; else None.
    """

    labels: Any = None


class EvaluationError(MatesError):
    """A model that cannot be evaluated as it is: it gives NaN, or its context is too short for a task's items."""


class WeakSignalError(MatesError):
    """The guard refused a round and `on_weak_signal="error"`."""


class RoundMismatchError(MatesError):
    """A round directory belongs to another config, pool or file layout than the run that asks for it."""
