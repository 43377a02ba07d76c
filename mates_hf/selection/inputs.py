"""What `MatesSelector` is given: datasets or what is none, sizes, columns, files of splits. Errors say the way in.

Place in the flow: asked first by every method of the selector, before a row is read, so that `map`, `score`, `filter`
and `select` take and refuse the same, of datasets and of streams. Trade-off: nothing is converted; a caller who has a
data frame or a list is told the one call that makes a dataset of it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.data.text_columns import check_chat_template, field_path, is_conversation, type_at
from mates_hf.errors import UnsupportedSettingError
from mates_hf.paths import expand_path
from mates_hf.prediction.score import Scorer, find_column

NUM_PEEKED = 100  # rows looked at for the columns of a stream that does not say which it has
_ALL_ROWS = "The selector scores in batches; for few large ones take a large number."


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


def stream_schema(stream: Any) -> Any:
    """`pyarrow.Schema` of a stream: its features, or what its first rows look like."""
    import pyarrow as pa

    if stream.features is not None:
        return stream.features.arrow_schema
    rows = list(unformatted(stream)[0].take(NUM_PEEKED))
    names = dict.fromkeys(name for row in rows for name in row)  # a later row may have more than the first
    return pa.schema([(name, _type_of([row.get(name) for row in rows])) for name in names])


def _type_of(values: list[Any]) -> Any:
    """Arrow type of one column's rows; null where Arrow cannot say, so that reading the rows has to tell."""
    import pyarrow as pa

    try:
        return pa.array(values).type
    except (pa.ArrowException, TypeError, ValueError):
        return pa.null()


def unformatted(stream: Any) -> tuple[Any, str | None]:
    """The stream handing out plain Python values, and the format it had."""
    had = getattr(getattr(stream, "_formatting", None), "format_type", None)
    return (stream if had is None else stream.with_format(None)), had


def schema_of(dataset: Any) -> Any:
    """`pyarrow.Schema` of a dataset or a stream.

    Args:
        dataset: a `Dataset` or an `IterableDataset`.

    Returns:
        The schema.

    Raises:
        TypeError: this is neither.
        UnsupportedSettingError: a transform hides the dataset's columns.
    """
    if is_stream(dataset):
        return stream_schema(dataset)
    if dataset.format["type"] == "custom":
        raise UnsupportedSettingError(
            "A dataset with a transform (`set_transform`) has other rows than columns, and columns are scored. "
            "Write what the transform makes into columns with `dataset.map`, or take it off with "
            "`dataset.with_format(None)`."
        )
    return dataset.data.schema


def make_scorer(
    schema: Any, column: str | None, model: Any, tokenizer: Any, max_length: int | None, num_threads: int | None
) -> Scorer:
    """What scores a column.

    Args:
        schema: `pyarrow.Schema` of the dataset.
        column: Column to score, as `MatesSelector.map` takes it.
        model: fitted influence model.
        tokenizer: Tokenizer of its tokens, or None.
        max_length: tokens a text is cut to, or None.
        num_threads: at most, or None.

    Returns:
        The scorer.

    Raises:
        ValueError: there is no such column, or no tokenizer or chat template for it.
        TypeError: the column holds nothing that can be scored.
    """
    name, is_text = find_column(schema, column)
    path = field_path(schema, name) or (name,)
    is_chat = is_conversation(type_at(schema, path), name)
    if is_text and tokenizer is None:
        raise ValueError(
            f"Column `{name}` holds {'conversations' if is_chat else 'texts'}, and no tokenizer is recorded with this "
            "influence model. Pass the training tokenizer: `MatesSelector.from_pretrained(path, tokenizer=tokenizer)`."
        )
    if is_chat:
        check_chat_template(tokenizer, name)
    return Scorer(model, name, is_text, tokenizer, max_length, num_threads, is_chat, path)


def refuse_arguments(why: str, **given: Any) -> None:
    """Raise a `TypeError` that names the arguments which are not None, and says why they cannot be given."""
    wrong = sorted(name for name, value in given.items() if value is not None)
    if wrong:
        raise TypeError(f"`{'`, `'.join(wrong)}` cannot be given: {why}.")


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise a `TypeError` that names the arguments which neither `MatesSelector.map` nor `Dataset.map` has."""
    import datasets

    known = set(inspect.signature(datasets.Dataset.map).parameters)
    wrong = sorted(set(arguments) - known)
    if wrong:
        raise TypeError(
            f"`{'`, `'.join(wrong)}` cannot be given: neither `MatesSelector.map` nor `Dataset.map` of datasets "
            f"{datasets.__version__} takes it for what it got."
        )


def check_sizes(batch_size: Any, num_proc: Any = None, *, shard_rows: Any = 1, calibration_rows: Any = 1) -> None:
    """Raise a `ValueError` that names what is not a whole number of at least 1; `num_proc` may be None."""
    given = {"batch_size": batch_size, "shard_rows": shard_rows, "calibration_rows": calibration_rows}
    if num_proc is not None:
        given["num_proc"] = num_proc
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            hint = f" {_ALL_ROWS}" if name == "batch_size" else ""
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.{hint}")


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Raise a `ValueError` where an influence model has seen ids that the tokenizer does not have."""
    seen = getattr(model, "vocab_size", 0)
    if isinstance(seen, int) and seen > len(tokenizer):
        raise ValueError(
            f"`tokenizer` must be the one the influence model was fitted with: the model has seen the id {seen - 1}, "
            f"and the tokenizer has ids below {len(tokenizer)}."
        )


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


def names_of(remove_columns: Any, columns: list[str]) -> list[str]:
    """`remove_columns` as names.

    Args:
        remove_columns: one name, several, or None.
        columns: those the dataset has, or the first rows of a stream that does not say.

    Returns:
        The names.

    Raises:
        ValueError: one is not there.
    """
    names = [remove_columns] if isinstance(remove_columns, str) else list(remove_columns or ())
    missing = [name for name in names if name not in columns]
    if missing:
        raise ValueError(f"`remove_columns` must be columns of the dataset, {columns}, got {missing}.")
    return names


def files_of_splits(splits: Any, shards_dir: str | Path | None, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of `map` that differ from split to split.

    Args:
        splits: dict of datasets.
        shards_dir: folder that gets one for each split, or None.
        kwargs: others of `map`; `cache_file_names` is taken out.

    Returns:
        `shards_dir` and, where files are named, `cache_file_name`, by split.

    Raises:
        TypeError: one file is named for all, or files of streams.
        ValueError: a file is named for a split that is not there.
    """
    files = kwargs.pop("cache_file_names", None)
    refuse_arguments(
        "one file cannot hold several splits (`cache_file_names={split: file}` names one for each)",
        cache_file_name=kwargs.get("cache_file_name"),
    )
    if files is not None and not (isinstance(files, Mapping) and set(files) <= set(splits)):
        raise ValueError(f"`cache_file_names` must be a dict of files by split ({list(splits)}), got {files!r}.")
    found: dict[str, dict[str, Any]] = {}
    for name in splits:
        found[name] = {"shards_dir": None if shards_dir is None else Path(shards_dir) / str(name)}
        file = (files or {}).get(name)
        if file is not None:
            found[name]["cache_file_name"] = str(file)
    return found


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
