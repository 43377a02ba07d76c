"""What `MatesSelector` is given, opened: a dataset, a stream, or splits of either. Errors say the way in.

Where it is used: each method of `MatesSelector` calls `open_input` once. It decides which of these it is, raises an
error for anything else, checks the options that depend on it, and decides which column is scored. What it returns
maps, scores and selects without deciding again.

Trade-off: nothing is converted; the error for a data frame or a list names the one call that makes a dataset of it.
Further arguments of `Dataset.map` are not listed here but read from the installed `datasets`, so that its versions may
differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mates_hf.data.media_column import find_media_column
from mates_hf.data.raw_texts import find_text_column
from mates_hf.data.scored_column import find_column
from mates_hf.errors import UnsupportedSettingError
from mates_hf.paths import expand_path
from mates_hf.prediction.score import Predictions, Scorer
from mates_hf.selection.budget import Budget
from mates_hf.selection.dataset_input import DatasetInput, Scored
from mates_hf.selection.opened import OpenDataset
from mates_hf.selection.options import Options, not_one_dataset
from mates_hf.selection.streaming import StreamInput

NUM_PEEKED = 100  # rows looked at for the columns of a stream that does not say which it has
_STREAMED = "a stream is scored in the process that reads it, as it is read"
# Arguments of `Dataset.map` that the selector sets, or that would change what is computed.
_OURS = (
    "batched", "drop_last_batch", "features", "fn_kwargs", "function", "input_columns", "new_fingerprint",
    "with_indices", "with_rank",
)  # fmt: skip


class Fitted(NamedTuple):
    """What a selector scores with.

    Attributes:
        model: The fitted influence model.
        tokenizer: Tokenizer of its tokens, or None.
        max_length: Number of tokens that a text is cut to, or None.
        memory: Predictions of datasets that were scored before.
    """

    model: Any
    tokenizer: Any
    max_length: int | None
    memory: Scored

    @classmethod
    def of(cls, selector: Any, memory: Scored | None = None) -> Fitted:
        """What a `MatesSelector` scores with; without a memory it gets one of its own."""
        return cls(selector.influence_model, selector.tokenizer, selector.max_length, memory or Scored())

    def scorer(self, schema: Any, column: str | None) -> Scorer:
        """What scores this column of a dataset of this `pyarrow.Schema`."""
        if getattr(self.model, "reads_texts", False):
            return Scorer(self.model, find_text_column(schema, column))
        if getattr(self.model, "reads_media", False):
            return Scorer(self.model, find_media_column(schema, column or self.model.column))
        return Scorer(self.model, find_column(schema, column, self.tokenizer, self.max_length))

    @property
    def label_std(self) -> float:
        """Standard deviation of the labels' `influence`; NaN where the model keeps no report."""
        report = getattr(self.model, "report", None)
        return float("nan") if report is None else float(report.label_std)


def open_input(dataset: Any, fitted: Fitted, options: Options) -> Splits | StreamInput | DatasetInput:
    """Decide what is scored, from which column and by what.

    Args:
        dataset: The dataset in any form that `MatesSelector.map` takes.
        fitted: The model and tokenizer that the selector scores with.
        options: How rows are scored.

    Returns:
        The dataset, the stream, or the splits of either.

    Raises:
        ValueError: there is no such column, or no tokenizer or chat template for it.
        TypeError: this is no dataset, the column holds nothing that can be scored, or an option is not for this kind.
        UnsupportedSettingError: a transform hides the dataset's columns.
    """
    if is_splits(dataset):
        each = _options_of_splits(options, list(dataset))
        return Splits(type(dataset), {name: open_input(dataset[name], fitted, each[name]) for name in dataset})
    stream, had = _unformatted(dataset) if is_stream(dataset) else (None, None)
    schema = _schema_of(dataset) if stream is None else _schema_of_stream(stream)
    _check_options(options, list(schema.names), streamed=stream is not None)
    scorer = fitted.scorer(schema, options.column)
    if stream is not None:
        return StreamInput(stream, had, list(schema.names), scorer, options, fitted.label_std)
    opened = OpenDataset(dataset, scorer, scorer.known_digest(), options)
    return DatasetInput(opened, fitted.memory, fitted.label_std)


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


def _options_of_splits(options: Options, names: list[str]) -> dict[str, Options]:
    """The options of each split, which has files of its own: `shards_dir` and, where files are named, its cache."""
    for_map = dict(options.for_map)
    files = for_map.pop("cache_file_names", None)
    _refuse_arguments(
        "one file cannot hold several splits (`cache_file_names={split: file}` names one for each)",
        cache_file_name=for_map.get("cache_file_name"),
    )
    if files is not None and not (isinstance(files, Mapping) and set(files) <= set(names)):
        raise ValueError(f"`cache_file_names` must be a dict of files by split ({names}), got {files!r}.")
    found: dict[str, Options] = {}
    for name in names:
        folder = None if options.shards_dir is None else Path(options.shards_dir) / str(name)
        file = (files or {}).get(name)
        named = {} if file is None else {"cache_file_name": str(file)}
        found[name] = dataclasses.replace(options, shards_dir=folder, for_map={**for_map, **named})
    return found


def _unformatted(stream: Any) -> tuple[Any, str | None]:
    """The stream handing out plain Python values, and the format it had."""
    had = getattr(getattr(stream, "_formatting", None), "format_type", None)
    return (stream if had is None else stream.with_format(None)), had


def _schema_of(dataset: Any) -> Any:
    """`pyarrow.Schema` of a dataset, or the refusal of one with a transform."""
    if dataset.format["type"] == "custom":
        raise UnsupportedSettingError(
            "A dataset with a transform (`set_transform`) has other rows than columns, and columns are scored. "
            "Write what the transform makes into columns with `dataset.map`, or take it off with "
            "`dataset.with_format(None)`."
        )
    return dataset.data.schema


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


def _check_options(options: Options, columns: list[str], *, streamed: bool) -> None:
    """Refuse what is of splits or not for this kind, and a column to remove that is not there."""
    _refuse_arguments("this is no dict of splits", cache_file_names=options.for_map.get("cache_file_names"))
    if streamed:
        _refuse_arguments(_STREAMED, num_proc=options.num_proc, shards_dir=options.shards_dir, **options.further)
    else:
        _check_for_dataset(options)
    missing = [name for name in options.removed if name not in columns]  # `datasets` would pass over them in a stream
    if missing:
        raise ValueError(f"`remove_columns` must be columns of the dataset, {columns}, got {missing}.")


def _check_for_dataset(options: Options) -> None:
    """Refuse what is unknown to `Dataset.map`, would change what is computed, or names a second place for files."""
    import datasets

    given = options.further
    wrong = sorted(set(_OURS) & set(given))
    if wrong:
        raise TypeError(f"`{'`, `'.join(wrong)}` cannot be given: the selector sets how rows are scored.")
    wrong = sorted(set(given) - set(inspect.signature(datasets.Dataset.map).parameters))
    if wrong:
        raise TypeError(
            f"`{'`, `'.join(wrong)}` cannot be given: neither `MatesSelector.map` nor `Dataset.map` of datasets "
            f"{datasets.__version__} takes it for what it got."
        )
    if options.shards_dir is not None and ("cache_file_name" in given or given.get("keep_in_memory")):
        raise ValueError(
            "`cache_file_name` and `keep_in_memory` must not be given with `shards_dir`, which is on disk."
        )


def _refuse_arguments(why: str, **given: Any) -> None:
    """Raise a `TypeError` that names the arguments which are not None, and says why they cannot be given."""
    wrong = sorted(name for name, value in given.items() if value is not None)
    if wrong:
        raise TypeError(f"`{'`, `'.join(wrong)}` cannot be given: {why}.")


@dataclasses.dataclass(frozen=True)
class Splits:
    """Datasets or streams by split, each handled by itself.

    Attributes:
        kind: Class of the dict they came in.
        inputs: The dataset or stream of each split.
    """

    kind: type
    inputs: Mapping[str, Any]

    def map(self) -> Any:
        """A dict of the same kind."""
        return self.kind({name: one.map() for name, one in self.inputs.items()})

    def score(self) -> Predictions:
        """Refused: predictions are of one dataset."""
        raise not_one_dataset(self.kind)

    def select(self, budget: Budget) -> dict[str, Any]:
        """Selections by split."""
        return {name: one.select(budget) for name, one in self.inputs.items()}


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
