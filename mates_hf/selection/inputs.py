"""What `MatesSelector` is given, opened: a dataset, a stream, or splits of either. Errors say the way in.

Place in the flow: the one place that tells these apart, refuses what is none of them, and decides which column is
scored; what it returns maps, scores and selects without asking again. Trade-off: nothing is converted; a caller who
has a data frame or a list is told the one call that makes a dataset of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mates_hf.data.scored_column import find_column
from mates_hf.errors import UnsupportedSettingError
from mates_hf.paths import expand_path
from mates_hf.prediction.score import INFLUENCE_COLUMN, Predictions, Scorer
from mates_hf.selection.mapped import log_intercepts, map_rows, score_rows
from mates_hf.selection.opened import OpenDataset
from mates_hf.selection.options import Options
from mates_hf.selection.result import Budget, Selection
from mates_hf.selection.reuse import Scored, is_own, read_own, record
from mates_hf.selection.streaming import StreamSelection, map_stream, select_stream

logger = logging.getLogger(__name__)

NUM_PEEKED = 100  # rows looked at for the columns of a stream that does not say which it has


class Fitted(NamedTuple):
    """What a selector scores with.

    Attributes:
        model: fitted influence model.
        tokenizer: Tokenizer of its tokens, or None.
        max_length: tokens a text is cut to, or None.
        memory: what was scored before.
    """

    model: Any
    tokenizer: Any
    max_length: int | None
    memory: Scored

    def scorer(self, schema: Any, column: str | None) -> Scorer:
        """What scores this column of a dataset of this `pyarrow.Schema`."""
        return Scorer(self.model, find_column(schema, column, self.tokenizer, self.max_length))

    @property
    def label_std(self) -> float:
        """Standard deviation of the labels' `influence`; NaN where the model keeps no report."""
        report = getattr(self.model, "report", None)
        return float("nan") if report is None else float(report.label_std)


def open_input(dataset: Any, fitted: Fitted, options: Options) -> Splits | StreamInput | DatasetInput:
    """Decide what is scored, from which column and by what.

    Args:
        dataset: as `MatesSelector.map` was given it.
        fitted: what the selector scores with.
        options: how rows are scored.

    Returns:
        The dataset, the stream, or the splits of either.

    Raises:
        ValueError: there is no such column, or no tokenizer or chat template for it.
        TypeError: this is no dataset, the column holds nothing that can be scored, or an option is not for this kind.
        UnsupportedSettingError: a transform hides the dataset's columns.
    """
    if is_splits(dataset):
        each = options.of_splits(dataset)
        return Splits(type(dataset), {name: open_input(dataset[name], fitted, each[name]) for name in dataset})
    if is_stream(dataset):
        stream, had = _unformatted(dataset)
        schema = _schema_of_stream(stream)
        options.check_for_stream(list(schema.names))
        scorer = fitted.scorer(schema, options.column)
        return StreamInput(stream, had, list(schema.names), scorer, options, fitted.label_std)
    schema = _schema_of(dataset)
    options.check_for_dataset(dataset.column_names)
    scorer = fitted.scorer(schema, options.column)
    opened = OpenDataset(dataset, scorer, scorer.known_digest(), options.batch_size)
    return DatasetInput(opened, options, fitted.memory, fitted.label_std)


@dataclasses.dataclass(frozen=True)
class Splits:
    """Datasets or streams by split, each handled by itself.

    Attributes:
        kind: class of the dict they came in.
        inputs: by split.
    """

    kind: type
    inputs: Mapping[str, Any]

    def map(self) -> Any:
        """A dict of the same kind."""
        return self.kind({name: one.map() for name, one in self.inputs.items()})

    def score(self) -> Predictions:
        """Refused: predictions are of one dataset."""
        raise _not_one_dataset(self.kind)

    def select(self, budget: Budget) -> dict[str, Any]:
        """Selections by split."""
        return {name: one.select(budget) for name, one in self.inputs.items()}


@dataclasses.dataclass(frozen=True)
class StreamInput:
    """A stream, and what scores its rows as they are read.

    Attributes:
        stream: handing out plain Python values.
        had: format that it had, in which what is made of it hands rows out.
        columns: that it has, or its first rows where it does not say.
        scorer: what predicts.
        options: how.
        label_std: standard deviation of the labels' `influence`.
    """

    stream: Any
    had: str | None
    columns: list[str]
    scorer: Scorer
    options: Options
    label_std: float

    def map(self) -> Any:
        """The stream with its new column."""
        return map_stream(self.stream, self.had, self.columns, self.scorer, self.options)

    def score(self) -> Predictions:
        """Refused: nobody has all rows of a stream."""
        raise _not_one_dataset(type(self.stream))

    def select(self, budget: Budget) -> StreamSelection:
        """What a budget keeps."""
        if INFLUENCE_COLUMN in self.columns:
            logger.warning(
                "The stream's column `%s` is not used: its rows are scored as they are read.", INFLUENCE_COLUMN
            )
        return select_stream(self.stream, self.had, self.scorer, self.options, budget, self.label_std)


@dataclasses.dataclass(frozen=True)
class DatasetInput:
    """A dataset that is opened, and what was scored before.

    Attributes:
        opened: the dataset with what scores it.
        options: how.
        memory: predictions of datasets that are alive.
        label_std: standard deviation of the labels' `influence`.
    """

    opened: OpenDataset
    options: Options
    memory: Scored
    label_std: float

    def map(self) -> Any:
        """The dataset with its new column."""
        opened = self.opened
        if INFLUENCE_COLUMN in opened.dataset.column_names and not is_own(opened):
            logger.warning("The column `%s`, not known to be this selector's, is replaced.", INFLUENCE_COLUMN)
        whole, scored = map_rows(opened, self.options)
        mapped = opened.with_dataset(whole)
        record(mapped)
        log_intercepts(scored)
        self.memory.keep(opened, scored)
        if set(opened.columns) <= set(whole.column_names):
            self.memory.keep(mapped, scored)
        return whole

    def score(self) -> Predictions:
        """Predictions of all rows."""
        found = score_rows(self.opened, self.options)
        self.memory.keep(self.opened, found)
        return found

    def select(self, budget: Budget) -> Selection:
        """What a budget keeps; nothing that is known is scored again."""
        scored = self.memory.find(self.opened)
        if scored is None:
            scored = read_own(self.opened)
            if scored is None:
                scored = score_rows(self.opened, self.options)
            self.memory.keep(self.opened, scored)
        selection = Selection.make(self.opened.dataset, scored, budget, self.opened.scorer, self.label_std)
        logger.info("Selected %d of %d rows (%.4f).", len(selection), len(scored.influence), selection.ratio)
        return selection


def _not_one_dataset(kind: type) -> TypeError:
    return TypeError(f"`score` takes one `Dataset`, got {kind.__name__}. Pass a split, or use `map`.")


def is_stream(dataset: Any) -> bool:
    """True for a stream, False for a `Dataset`; a `TypeError` that says the way in for anything else."""
    import datasets

    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(
            "`dataset` must be a `datasets.Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`, got "
            f"{type(dataset).__name__}. {_way_in(dataset)}"
        )
    return isinstance(dataset, datasets.IterableDataset)


def is_splits(dataset: Any) -> bool:
    """True for a dict of datasets; a `TypeError` for any other dict, such as one of columns."""
    if not isinstance(dataset, dict):
        return False
    for name, split in dataset.items():
        try:
            is_stream(split)
        except TypeError as error:
            if isinstance(split, (list, np.ndarray)):
                raise TypeError(
                    "`dataset` must be a `datasets.Dataset` or a dict of them by split, got a dict of columns. Pass "
                    "`Dataset.from_dict(columns)`."
                ) from None
            raise TypeError(f"Split {name!r}: {error}") from None
    return True


def _schema_of(dataset: Any) -> Any:
    """`pyarrow.Schema` of a dataset, or the refusal of one with a transform."""
    if dataset.format["type"] == "custom":
        raise UnsupportedSettingError(
            "A dataset with a transform (`set_transform`) has other rows than columns, and columns are scored. "
            "Write what the transform makes into columns with `dataset.map`, or take it off with "
            "`dataset.with_format(None)`."
        )
    return dataset.data.schema


def _unformatted(stream: Any) -> tuple[Any, str | None]:
    """The stream handing out plain Python values, and the format it had."""
    had = getattr(getattr(stream, "_formatting", None), "format_type", None)
    return (stream if had is None else stream.with_format(None)), had


def _schema_of_stream(stream: Any) -> Any:
    """`pyarrow.Schema` of a stream of plain values: its features, or what its first rows look like."""
    import pyarrow as pa

    if stream.features is not None:
        return stream.features.arrow_schema
    rows = list(stream.take(NUM_PEEKED))
    names = dict.fromkeys(name for row in rows for name in row)  # a later row may have more than the first
    return pa.schema([(name, _type_of([row.get(name) for row in rows])) for name in names])


def _type_of(values: list[Any]) -> Any:
    """Arrow type of one column's rows; null where Arrow cannot say, so that reading the rows has to tell."""
    import pyarrow as pa

    try:
        return pa.array(values).type
    except (pa.ArrowException, TypeError, ValueError):
        return pa.null()


def _way_in(given: Any) -> str:
    """The call that makes a dataset of what was given."""
    kind = type(given)
    module = (kind.__module__ or "").partition(".")[0]
    if isinstance(given, (str, Path)):
        return _way_from_path(Path(given))
    if kind.__name__ == "DataFrame" and module in ("pandas", "polars"):
        return f"Pass `Dataset.from_{module}(frame)`."
    if module == "pyarrow":
        wrap = "table" if kind.__name__ == "Table" else "pyarrow.table(...)"
        return f"Pass `Dataset({wrap})`."
    if isinstance(given, (list, tuple)):
        if given and isinstance(given[0], str):
            return 'Pass `Dataset.from_dict({"text": texts})`.'
        return "Pass `Dataset.from_list(rows)` with one dict a row."
    if isinstance(given, Mapping):
        return "Pass `Dataset.from_dict(columns)`."
    if inspect.isgenerator(given) or inspect.isgeneratorfunction(given):
        return "Pass `Dataset.from_generator(function)`, or `IterableDataset.from_generator(function)` for a stream."
    return "Make one with `Dataset.from_list`, `Dataset.from_dict` or `datasets.load_dataset`."


def _way_from_path(path: Path) -> str:
    """The call that reads a dataset from a path or from the Hub."""
    kinds = {
        ".parquet": "parquet",
        ".json": "json",
        ".jsonl": "json",
        ".csv": "csv",
        ".txt": "text",
        ".arrow": "arrow",
    }
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst", ".xz") else path
    if plain.suffix in kinds:
        return f'Pass `load_dataset("{kinds[plain.suffix]}", data_files="{path}", split="train")`.'
    with contextlib.suppress(ValueError):  # no such home folder: then it is no folder, and what follows is said of it
        folder = expand_path(path)
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            return f'Pass `datasets.load_from_disk("{path}")`.'
    return f'Pass `load_dataset("{path}", split="train")`, or `load_from_disk` of what `save_to_disk` wrote.'
