"""How `MatesSelector` scores: sizes, workers, files and further arguments, checked once for every method.

Where it is used: each method of `MatesSelector` makes one before a row is read, and everything after reads it.
Trade-off: only what holds for every kind of dataset is checked here; `inputs` checks the rest where the kind is
decided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.selection.quota import Bounds

SHARD_ROWS = 65_536
_ALL_ROWS = "The selector scores in batches; for few large ones take a large number."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How rows are scored.

    Attributes:
        column: Column to score; None takes the first known one there is.
        batch_size: Number of rows that are scored, and of texts that are tokenised, at once.
        num_proc: Number of worker processes, of one thread each; None scores in this process on all cores.
        shards_dir: Folder for finished parts of `shard_rows` rows, so that a killed run continues; None keeps none.
        shard_rows: Number of rows in each part that is kept in `shards_dir`.
        calibration_rows: Number of first rows of a stream from which the threshold for a ratio is taken.
        bounds: Bounds on what each group of rows gets; None sets none.
        for_map: Arguments that `MatesSelector.map` was given for `Dataset.map`.

    Raises:
        ValueError: a size is no whole number of at least 1.
    """

    column: str | None = None
    batch_size: int = 1000
    num_proc: int | None = None
    shards_dir: str | Path | None = None
    shard_rows: int = SHARD_ROWS
    calibration_rows: int = 10_000
    bounds: Bounds | None = None
    for_map: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_rows", "calibration_rows", "num_proc"):
            value = getattr(self, name)
            if name == "num_proc" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                hint = f" {_ALL_ROWS}" if name == "batch_size" else ""
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.{hint}")

    @property
    def further(self) -> dict[str, Any]:
        """What is handed to `Dataset.map` as it is."""
        ours = ("remove_columns", "cache_file_names")
        return {name: value for name, value in self.for_map.items() if name not in ours}

    @property
    def removed(self) -> list[str]:
        """The names in `remove_columns`."""
        given = self.for_map.get("remove_columns")
        return [given] if isinstance(given, str) else list(given or ())


def one_column(column: str | None, text_column: str | None) -> str | None:
    """The column by either of its names; a `ValueError` where both are given, a `TypeError` where it is no text."""
    if column is not None and text_column is not None:
        raise ValueError(
            f"`column` and `text_column` are two names for one argument, got {column!r} and {text_column!r}. Pass one."
        )
    name = column if column is not None else text_column
    if name is not None and not isinstance(name, str):
        raise TypeError(f"`column` must be the name of one column, got {name!r}.")
    return name


def bounds_of(group_column: str | None, most: float | None, least: float) -> Bounds | None:
    """The bounds that were asked for; a `ValueError` where they need a column and have none."""
    if group_column is not None:
        return Bounds(group_column, most, least)
    for name, value, nothing in (("max_group_boost", most, None), ("min_group_boost", least, 0)):
        if value != nothing:
            raise ValueError(f"`{name}` needs `group_column`, the column with each row's group, got {value!r} alone.")
    return None


def not_one_dataset(kind: type) -> TypeError:
    """The error for a call of `score` with anything but one `Dataset`."""
    return TypeError(f"`score` takes one `Dataset`, got {kind.__name__}. Pass a split, or use `map`.")
