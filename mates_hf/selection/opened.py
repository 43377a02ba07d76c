"""A `datasets.Dataset` opened for scoring: who scores it, from which column, and how all its rows are scored.

Where it is used: `inputs` makes one in each call; `dataset_input` asks it for a new column (`map_rows`) or for
predictions (`score_rows`). Trade-off: `map_rows` writes the predictions alone (influence, and the number of targets
that a later `filter` needs) and sets the first next to the other columns, as `concatenate_datasets(axis=1)` does. So a
corpus is not copied, and the result needs the files that the dataset had (`save_to_disk` writes one that does not).

The key of scores is made here instead of by `datasets`, which would hash the live model by pickling it and find
another hash after each call of a tokenizer. It holds the dataset's fingerprint and the content of 1,024 rows, so that
a dataset that was changed under its old fingerprint is scored anew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.data.arrow import physical_rows
from mates_hf.data.columns import fixed_positions
from mates_hf.data.scored_column import OpenRows
from mates_hf.disk import read_array, write_array
from mates_hf.errors import MatesError
from mates_hf.prediction.score import INFLUENCE_COLUMN, Predictions, Scorer
from mates_hf.prediction.threads import at_most_threads, num_threads
from mates_hf.selection.options import Options

logger = logging.getLogger(__name__)

NUM_KEY_ROWS = 1024
_AHEAD_ROWS = 4096  # scored at a time while others are written


@dataclasses.dataclass(frozen=True)
class OpenDataset:
    """A dataset with what scores it.

    Attributes:
        dataset: The dataset with the column; a format of it is not applied.
        scorer: The influence model with the column to score.
        digest: Digest of the scorer; None where the model cannot say what it depends on.
        options: How rows are scored, and what `Dataset.map` is given.
    """

    dataset: Any
    scorer: Scorer
    digest: str | None
    options: Options

    @functools.cached_property
    def rows(self) -> OpenRows:
        """The scored column's rows."""
        return self.scorer.column.open(self.dataset, self.options.batch_size)

    @property
    def columns(self) -> list[str]:
        """The columns that a prediction may read."""
        return self.scorer.column.names_among(self.dataset.column_names)

    @property
    def sure_digest(self) -> str:
        """The digest, or the influence model's own error where it has none."""
        return self.scorer.digest() if self.digest is None else self.digest

    def with_dataset(self, dataset: Any) -> OpenDataset:
        """Another dataset with what scores this one."""
        return dataclasses.replace(self, dataset=dataset)

    def part(self, begin: int, end: int) -> OpenDataset:
        """The rows from `begin` to before `end` as a dataset of their own."""
        return self.with_dataset(self.dataset.select(range(begin, end)))

    def predict(self, begin: int, end: int) -> Predictions:
        """Predictions of the rows from one number to before another.

        Args:
            begin: Number of the first row.
            end: Number of the row after the last.

        Returns:
            The predictions. For token columns and a model that `reads_spans`, several threads may ask.
        """
        return self.scorer.predict_rows(self.rows, begin, end)

    def key(self, *more: str) -> str:
        """Fingerprint of a result: of the data, its scored columns' content, and what else it depends on."""
        digest = hashlib.sha256()
        parts = [self.dataset._fingerprint, len(self.dataset), str(self.dataset.features), *more]
        digest.update(json.dumps(parts).encode())
        if num := len(self.dataset):
            digest.update(self.rows.content(fixed_positions(num, NUM_KEY_ROWS)))
        return digest.hexdigest()[:32]

    @functools.cached_property
    def scores_key(self) -> str:
        """Fingerprint of the predictions."""
        return self.key(self.sure_digest, "scores")


# --- into a column ---


def map_rows(opened: OpenDataset) -> tuple[Any, Any]:
    """`MatesSelector.map` of a `Dataset`.

    Args:
        opened: the dataset.

    Returns:
        The dataset with its new column, and a dataset of the predictions alone.
    """
    import datasets

    dataset, options = opened.dataset, opened.options
    left_out = {INFLUENCE_COLUMN, *options.removed}
    kept = dataset.with_format(None).select_columns([name for name in dataset.column_names if name not in left_out])
    features = datasets.Features({**kept.features, INFLUENCE_COLUMN: datasets.Value("float32")})
    if not len(dataset):  # which `Dataset.map` and `concatenate_datasets` leave as it is
        nothing: dict[str, list[Any]] = {name: [] for name in features}
        empty = datasets.Dataset.from_dict(nothing, features=features, split=dataset.split)
        return _with_format_of(dataset, empty), empty
    scored = _mapped_scores(opened)
    column = scored.select_columns([INFLUENCE_COLUMN])
    if not kept.column_names:
        return _with_format_of(dataset, column), scored
    if physical_rows(kept) is not None:  # a column beside a table needs its order: the rows are written in theirs
        in_memory = bool(options.for_map.get("keep_in_memory"))
        rows_key = opened.key("rows", *kept.column_names)
        kept = kept.flatten_indices(keep_in_memory=in_memory, num_proc=options.num_proc, new_fingerprint=rows_key)
    info = dataset.info.copy()
    info.features = features
    whole = datasets.concatenate_datasets([kept, column], info=info, split=dataset.split, axis=1)
    return _with_format_of(dataset, whole), scored


def _with_format_of(dataset: Any, mapped: Any) -> Any:
    """The mapped dataset in the format that the dataset has; the new column is shown."""
    had = dataset.format
    hidden = set(dataset.column_names) - set(had["columns"]) - {INFLUENCE_COLUMN}
    columns = [name for name in mapped.column_names if name not in hidden] if hidden else None
    return mapped.with_format(
        had["type"], columns=columns, output_all_columns=had["output_all_columns"], **had["format_kwargs"]
    )


def _mapped_scores(opened: OpenDataset) -> Any:
    """A dataset of the predictions alone, in `datasets`' cache or in the files that were asked for."""
    import datasets

    num, key, options = len(opened.dataset), opened.scores_key, opened.options
    if options.shards_dir is None:
        return _map(opened, key, **options.further)
    folder, parts = Path(options.shards_dir) / key, []
    for begin in range(0, num, options.shard_rows):
        end = min(begin + options.shard_rows, num)
        name = folder / f"{begin:012d}-{end:012d}.arrow"  # `datasets` moves a file to its name when it is whole
        more = {**options.further, "cache_file_name": str(name)}
        parts.append(_map(opened.part(begin, end), f"{key}-{begin:x}-{end:x}", **more))
    return datasets.concatenate_datasets(parts)


def _map(opened: OpenDataset, key: str, **more: Any) -> Any:
    """`Dataset.map` over Arrow tables of the columns that scoring reads."""
    import datasets

    options = opened.options
    features = {INFLUENCE_COLUMN: datasets.Value("float32"), "num_targets": datasets.Value("int32")}
    more = {
        "batched": True,
        "with_indices": True,
        "batch_size": options.batch_size,
        "num_proc": options.num_proc,
        "features": datasets.Features(features),
        "desc": "Scoring",
        "new_fingerprint": key,
        **more,
    }
    tables = opened.dataset.with_format("arrow").select_columns(opened.columns)
    if options.num_proc or not opened.scorer.reads_in_place:
        return tables.map(OnlyScores(opened.scorer, 1 if options.num_proc else None), **more)
    with Ahead(opened) as ahead:
        return tables.map(OnlyScores(opened.scorer, ahead=ahead), **more)


@dataclasses.dataclass(frozen=True)
class OnlyScores:
    """What `Dataset.map` runs on a batch: the predictions alone.

    Attributes:
        scorer: The influence model with the column to score.
        num_threads: Largest number of threads that predict; None is one a core.
        ahead: Predictions that are made while `datasets` writes; None in worker processes.
    """

    scorer: Scorer
    num_threads: int | None = None
    ahead: Ahead | None = None

    def __call__(self, table: Any, indices: list[int]) -> Any:
        """The predictions of a batch."""
        import pyarrow as pa

        if self.ahead is None:
            opened = self.scorer.column.open_table(table, indices[0])
            with at_most_threads(self.num_threads):
                scored = self.scorer.predict_rows(opened, 0, table.num_rows)
        else:
            scored = self.ahead.predictions(indices[0], indices[-1] + 1)
        return pa.table({name: pa.array(values) for name, values in scored._asdict().items()})


class Ahead:
    """Predictions of a token column's rows in their order, made on threads while `datasets` writes earlier rows.

    Args:
        opened: a dataset of a token column and a model that `reads_spans`.
    """

    def __init__(self, opened: OpenDataset) -> None:
        self._num_rows = len(opened.dataset)
        self._scorer, self._rows = opened.scorer, opened.rows
        self._num_threads = num_threads()
        self._pool = ThreadPoolExecutor(self._num_threads)
        self._blocks: dict[int, Future[Predictions]] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def predictions(self, begin: int, end: int) -> Predictions:
        """Predictions of these rows; asked for from the first to the last."""
        first, last = begin // _AHEAD_ROWS, (end - 1) // _AHEAD_ROWS
        for block in range(first, last + 1 + 2 * self._num_threads):
            start = block * _AHEAD_ROWS
            if block not in self._blocks and start < self._num_rows:
                stop = min(start + _AHEAD_ROWS, self._num_rows)
                self._blocks[block] = self._pool.submit(self._predict, start, stop)
        for block in [block for block in self._blocks if block < first]:
            del self._blocks[block]
        found = Predictions.joined([self._blocks[block].result() for block in range(first, last + 1)])
        part = slice(begin - first * _AHEAD_ROWS, end - first * _AHEAD_ROWS)
        return Predictions(found.influence[part], found.num_targets[part])

    def _predict(self, begin: int, end: int) -> Predictions:
        with at_most_threads(1):
            return self._scorer.predict_rows(self._rows, begin, end)


# --- in memory ---


def score_rows(opened: OpenDataset) -> Predictions:
    """`MatesSelector.score`: predictions of all rows, part by part."""
    from tqdm import tqdm

    num, options = len(opened.dataset), opened.options
    folder = None if options.shards_dir is None else Path(options.shards_dir) / opened.key(opened.sure_digest)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    influence, num_targets = np.empty(num, np.float32), np.empty(num, np.int32)
    for begin in tqdm(range(0, num, options.shard_rows), desc="Scoring", delay=3, unit="part"):
        end = min(begin + options.shard_rows, num)

        def compute(begin: int = begin, end: int = end) -> Predictions:
            return _scores_by_map(opened, begin, end) if options.num_proc else opened.predict(begin, end)

        scored = compute() if folder is None else _kept(folder / f"{begin:012d}-{end:012d}", end - begin, compute)
        influence[begin:end], num_targets[begin:end] = scored
    return Predictions(influence, num_targets)


def _scores_by_map(opened: OpenDataset, begin: int, end: int) -> Predictions:
    """Predictions of some rows by worker processes, which hand them over in memory: no file is left behind."""
    part = opened.part(begin, end)
    key = f"{part.key('scores')}-{begin:x}-{end:x}"  # of what is in memory alone: no cache finds it
    return Predictions.of(_map(part, key, keep_in_memory=True, load_from_cache_file=False))


def _kept(path: Path, num: int, compute: Callable[[], Predictions]) -> Predictions:
    """Predictions of a part, read back where they are on disk whole, else computed and written."""
    names = [path.with_name(f"{path.name}.{name}.npy") for name in Predictions._fields]
    try:
        found = [read_array(name, kind) for name, kind in zip(names, (np.float32, np.int32), strict=True)]
    except MatesError as error:
        logger.warning("A scored part is damaged and is scored again: %s", error)
        found = []
    if len(found) == 2 and all(array is not None and len(array) == num for array in found):
        return Predictions(*found)  # type: ignore[arg-type]
    scored = compute()
    for name, array in zip(names, scored, strict=True):
        write_array(name, array)
    return scored
