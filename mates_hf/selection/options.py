"""How `MatesSelector` scores: sizes, workers, files and further arguments, checked once for every method.

Place in the flow: made at the top of each method, before a row is read, and handed on whole. Trade-off: what
`Dataset.map` takes further is not listed here but asked of the installed `datasets`, so that its versions may differ.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SHARD_ROWS = 65_536
_ALL_ROWS = "The selector scores in batches; for few large ones take a large number."
_STREAMED = "a stream is scored in the process that reads it, as it is read"
# Arguments of `Dataset.map` that the selector sets, or that would change what is computed.
_OURS = (
    "batched", "drop_last_batch", "features", "fn_kwargs", "function", "input_columns", "new_fingerprint",
    "with_indices", "with_rank",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How rows are scored.

    Attributes:
        column: to score; None takes the first known one there is.
        batch_size: rows scored, and texts tokenised, at once.
        num_proc: worker processes, of one thread each; None scores in this process on all cores.
        shards_dir: folder for finished parts of `shard_rows` rows, so that a killed run continues; None keeps none.
        shard_rows: see `shards_dir`.
        calibration_rows: first rows of a stream, from which the threshold for a ratio is taken.
        for_map: what `map` was given for `Dataset.map`.

    Raises:
        ValueError: a size is no whole number of at least 1.
    """

    column: str | None = None
    batch_size: int = 1000
    num_proc: int | None = None
    shards_dir: str | Path | None = None
    shard_rows: int = SHARD_ROWS
    calibration_rows: int = 10_000
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

    def of_splits(self, names: Iterable[str]) -> dict[str, Options]:
        """The options of each split, which has files of its own.

        Args:
            names: Names of the splits.

        Returns:
            Options by split, with `shards_dir` and, where files are named, `cache_file_name`.

        Raises:
            TypeError: one file is named for all.
            ValueError: a file is named for a split that is not there.
        """
        for_map = dict(self.for_map)
        files = for_map.pop("cache_file_names", None)
        refuse_arguments(
            "one file cannot hold several splits (`cache_file_names={split: file}` names one for each)",
            cache_file_name=for_map.get("cache_file_name"),
        )
        if files is not None and not (isinstance(files, Mapping) and set(files) <= set(names)):
            raise ValueError(f"`cache_file_names` must be a dict of files by split ({list(names)}), got {files!r}.")
        found: dict[str, Options] = {}
        for name in names:
            folder = None if self.shards_dir is None else Path(self.shards_dir) / str(name)
            file = (files or {}).get(name)
            named = {} if file is None else {"cache_file_name": str(file)}
            found[name] = dataclasses.replace(self, shards_dir=folder, for_map={**for_map, **named})
        return found

    def check_for_dataset(self, columns: list[str]) -> None:
        """Refuse what is not for a dataset.

        Args:
            columns: those the dataset has.

        Raises:
            TypeError: an argument is unknown, is of splits, or would change what is computed.
            ValueError: a column to remove is not there, or a file is named beside `shards_dir`.
        """
        import datasets

        refuse_arguments("this is no dict of splits", cache_file_names=self.for_map.get("cache_file_names"))
        given = self.further
        wrong = sorted(set(_OURS) & set(given))
        if wrong:
            raise TypeError(f"`{'`, `'.join(wrong)}` cannot be given: the selector sets how rows are scored.")
        wrong = sorted(set(given) - set(inspect.signature(datasets.Dataset.map).parameters))
        if wrong:
            raise TypeError(
                f"`{'`, `'.join(wrong)}` cannot be given: neither `MatesSelector.map` nor `Dataset.map` of datasets "
                f"{datasets.__version__} takes it for what it got."
            )
        if self.shards_dir is not None and ("cache_file_name" in given or given.get("keep_in_memory")):
            raise ValueError(
                "`cache_file_name` and `keep_in_memory` must not be given with `shards_dir`, which is on disk."
            )
        self._check_removed(columns)

    def check_for_stream(self, columns: list[str]) -> None:
        """Refuse what is not for a stream.

        Args:
            columns: those the stream has, or its first rows where it does not say.

        Raises:
            TypeError: something was given that only a dataset can have.
            ValueError: a column to remove is not there; `datasets` would pass over it.
        """
        refuse_arguments("this is no dict of splits", cache_file_names=self.for_map.get("cache_file_names"))
        refuse_arguments(_STREAMED, num_proc=self.num_proc, shards_dir=self.shards_dir, **self.further)
        self._check_removed(columns)

    @property
    def removed(self) -> list[str]:
        """The names in `remove_columns`."""
        given = self.for_map.get("remove_columns")
        return [given] if isinstance(given, str) else list(given or ())

    def _check_removed(self, columns: list[str]) -> None:
        missing = [name for name in self.removed if name not in columns]
        if missing:
            raise ValueError(f"`remove_columns` must be columns of the dataset, {columns}, got {missing}.")


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


def refuse_arguments(why: str, **given: Any) -> None:
    """Raise a `TypeError` that names the arguments which are not None, and says why they cannot be given."""
    wrong = sorted(name for name, value in given.items() if value is not None)
    if wrong:
        raise TypeError(f"`{'`, `'.join(wrong)}` cannot be given: {why}.")
