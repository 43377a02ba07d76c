"""Scoring a `datasets.Dataset`: through `Dataset.map` with its cache and processes, or in place; in parts that stay.

Place in the flow: what `MatesSelector.map`, `score` and `select` do with a map-style dataset. Trade-offs: `map` writes
the predictions alone (influence, and the number of targets that a later `filter` needs) and sets the first beside the
other columns, as `concatenate_datasets(axis=1)` does, so a corpus is not copied, and the result needs the files that
the dataset had (`save_to_disk` writes one that does not). The cache key is made here instead of by `datasets`, which
would hash the live model by pickling it and find another hash after each call of a tokenizer. It holds the dataset's
fingerprint and the content of 1,024 rows, so that a dataset that was changed under its old fingerprint is scored anew.

Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.data.columns import fixed_positions, physical_rows
from mates_hf.disk import read_array, write_array
from mates_hf.errors import MatesError
from mates_hf.prediction.score import Predictions, Scorer
from mates_hf.prediction.threads import num_threads
from mates_hf.selection.inputs import names_of, refuse_unknown
from mates_hf.selection.streaming import INFLUENCE_COLUMN

logger = logging.getLogger(__name__)

SHARD_ROWS = 65_536
NUM_KEY_ROWS = 1024
AHEAD_ROWS = 4096  # scored at a time while others are written
# Arguments of `Dataset.map` that this module sets, or that would change what is computed.
_OURS = (
    "batched", "drop_last_batch", "features", "fn_kwargs", "function", "input_columns", "new_fingerprint",
    "with_indices", "with_rank",
)  # fmt: skip


class Ahead:
    """Predictions of a token column's rows in their order, made on threads while `datasets` writes earlier rows.

    Args:
        dataset: with the column.
        scorer: Scorer of a token column and a model that `reads_spans`.
    """

    def __init__(self, dataset: Any, scorer: Scorer) -> None:
        self._num_rows = len(dataset)
        self._predict = dataclasses.replace(scorer, num_threads=1).open(dataset)
        self._num_threads = num_threads()
        self._pool = ThreadPoolExecutor(self._num_threads)
        self._blocks: dict[int, Future[Predictions]] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def predictions(self, begin: int, end: int) -> Predictions:
        """Predictions of these rows; asked for from the first to the last."""
        first, last = begin // AHEAD_ROWS, (end - 1) // AHEAD_ROWS
        for block in range(first, last + 1 + 2 * self._num_threads):
            start = block * AHEAD_ROWS
            if block not in self._blocks and start < self._num_rows:
                stop = min(start + AHEAD_ROWS, self._num_rows)
                self._blocks[block] = self._pool.submit(self._predict, start, stop)
        for block in [block for block in self._blocks if block < first]:
            del self._blocks[block]
        found = [self._blocks[block].result() for block in range(first, last + 1)]
        part = slice(begin - first * AHEAD_ROWS, end - first * AHEAD_ROWS)
        return Predictions(*(np.concatenate(arrays)[part] for arrays in zip(*found, strict=True)))


@dataclasses.dataclass(frozen=True)
class OnlyScores:
    """What `Dataset.map` runs on a batch: the predictions alone.

    Attributes:
        scorer: what predicts.
        ahead: has the predictions where they are made while `datasets` writes; None in worker processes.
    """

    scorer: Scorer
    ahead: Ahead | None = None

    def __call__(self, table: Any, indices: list[int]) -> Any:
        """The predictions of a batch."""
        import pyarrow as pa

        if self.ahead is None:
            scored = self.scorer.predict_table(table, indices[0])
        else:
            scored = self.ahead.predictions(indices[0], indices[-1] + 1)
        return pa.table({name: pa.array(values) for name, values in scored._asdict().items()})


def map_rows(
    dataset: Any,
    scorer: Scorer,
    *,
    batch_size: int,
    num_proc: int | None,
    shards_dir: str | Path | None,
    shard_rows: int,
    digest: str,
    info: Any,
    remove_columns: str | list[str] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """`MatesSelector.map` of a `Dataset`.

    Args:
        dataset: with the column.
        scorer: what predicts.
        batch_size: rows scored at once.
        num_proc: worker processes, or None.
        shards_dir: folder of finished parts, or None.
        shard_rows: rows of a part.
        digest: Digest of the scorer.
        info: `DatasetInfo` of the result.
        remove_columns: one name or several.
        **kwargs: others of `Dataset.map`.

    Returns:
        The dataset with its new column, and a dataset of the predictions alone.

    Raises:
        TypeError: an argument would change what is computed.
        ValueError: a column to remove is not there, or a file is named beside `shards_dir`.
    """
    import datasets

    wrong = sorted(set(_OURS) & set(kwargs))
    if wrong:
        raise TypeError(f"`{'`, `'.join(wrong)}` cannot be given: the selector sets how rows are scored.")
    refuse_unknown(kwargs)
    removed = names_of(remove_columns, dataset.column_names)
    if shards_dir is not None and ("cache_file_name" in kwargs or kwargs.get("keep_in_memory")):
        raise ValueError(
            "`cache_file_name` and `keep_in_memory` must not be given with `shards_dir`, which is on disk."
        )
    left_out = {INFLUENCE_COLUMN, *removed}
    kept = dataset.with_format(None).select_columns([name for name in dataset.column_names if name not in left_out])
    features = datasets.Features({**kept.features, INFLUENCE_COLUMN: datasets.Value("float32")})
    if not len(dataset):  # which `Dataset.map` and `concatenate_datasets` leave as it is
        nothing: dict[str, list[Any]] = {name: [] for name in features}
        empty = datasets.Dataset.from_dict(nothing, features=features, split=dataset.split)
        return _with_format_of(dataset, empty), empty
    options = {"batch_size": batch_size, "num_proc": num_proc, "features": _features(), **kwargs}
    key = scores_key(dataset, scorer, digest)

    def score(part: Any, key: str, **more: Any) -> Any:
        if num_proc or scorer.is_text or not getattr(scorer.model, "reads_spans", False):
            return _map(part, OnlyScores(scorer), key, scorer, **options, **more)
        with Ahead(part, scorer) as ahead:
            return _map(part, OnlyScores(scorer, ahead), key, scorer, **options, **more)

    if shards_dir is None:
        scored = score(dataset, key)
    else:
        folder = Path(shards_dir) / key
        parts = []
        for begin in range(0, len(dataset), shard_rows):
            end = min(begin + shard_rows, len(dataset))
            name = folder / f"{begin:012d}-{end:012d}.arrow"  # `datasets` moves a file to its name when it is whole
            part = dataset.select(range(begin, end))
            parts.append(score(part, f"{key}-{begin:x}-{end:x}", cache_file_name=str(name)))
        scored = datasets.concatenate_datasets(parts)
    column = scored.select_columns([INFLUENCE_COLUMN])
    if not kept.column_names:
        return _with_format_of(dataset, column), scored
    if physical_rows(kept) is not None:  # a column beside a table needs its order: the rows are written in theirs
        in_memory = bool(kwargs.get("keep_in_memory"))
        rows_key = _key(dataset, scorer, "rows", *kept.column_names)
        kept = kept.flatten_indices(keep_in_memory=in_memory, num_proc=num_proc, new_fingerprint=rows_key)
    info = info.copy()
    info.features = features
    whole = datasets.concatenate_datasets([kept, column], info=info, split=dataset.split, axis=1)
    return _with_format_of(dataset, whole), scored


def score_rows(
    dataset: Any,
    scorer: Scorer,
    *,
    batch_size: int,
    num_proc: int | None,
    shards_dir: str | Path | None,
    shard_rows: int = SHARD_ROWS,
) -> Predictions:
    """`MatesSelector.score`: predictions of all rows, part by part."""
    from tqdm import tqdm

    folder = None if shards_dir is None else Path(shards_dir) / _key(dataset, scorer, scorer.digest())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    influence, num_targets = np.empty(len(dataset), np.float32), np.empty(len(dataset), np.int32)
    predict = scorer.open(dataset, batch_size)
    for begin in tqdm(range(0, len(dataset), shard_rows), desc="Scoring", delay=3, unit="part"):
        end = min(begin + shard_rows, len(dataset))

        def compute(begin: int = begin, end: int = end) -> Predictions:
            if not num_proc:
                return predict(begin, end)
            return _scores_by_map(dataset, scorer, begin, end, batch_size, num_proc)

        scored = compute() if folder is None else _kept(folder / f"{begin:012d}-{end:012d}", end - begin, compute)
        influence[begin:end], num_targets[begin:end] = scored
    return Predictions(influence, num_targets)


def log_intercepts(scored: Any) -> None:
    """Count the rows that say nothing, from a dataset of predictions; the model is not asked about an empty row."""
    if not len(scored):
        return
    empty = scored.data.column("num_targets").to_numpy() == 0
    num = int(np.count_nonzero(empty))
    if num:
        intercept = scored.data.column(INFLUENCE_COLUMN)[int(np.argmax(empty))].as_py()
        logger.info(
            "%d of %d rows have no trained token (empty documents among them); their influence is the model's "
            "intercept, %.3g.", num, len(empty), intercept,
        )  # fmt: skip


def scores_key(dataset: Any, scorer: Scorer, digest: str) -> str:
    """Fingerprint of a dataset's predictions by a scorer of this digest."""
    return _key(dataset, scorer, digest, "scores")


def _features() -> Any:
    """`datasets.Features` of predictions."""
    import datasets

    return datasets.Features({INFLUENCE_COLUMN: datasets.Value("float32"), "num_targets": datasets.Value("int32")})


def _key(dataset: Any, scorer: Scorer, *more: str) -> str:
    """Fingerprint of a result: of the data, its scored columns' content, and what else it depends on."""
    digest = hashlib.sha256()
    parts = [dataset._fingerprint, len(dataset), str(dataset.features), *more]
    digest.update(json.dumps(parts).encode())
    if len(dataset):
        digest.update(scorer.content(dataset, fixed_positions(len(dataset), NUM_KEY_ROWS)))
    return digest.hexdigest()[:32]


def _map(dataset: Any, function: Callable[..., Any], key: str, scorer: Scorer, **options: Any) -> Any:
    """`Dataset.map` over Arrow tables of the columns that scoring reads."""
    return (
        dataset.with_format("arrow")
        .select_columns(scorer.columns_of(dataset.column_names))
        .map(function, batched=True, with_indices=True, new_fingerprint=key, **{"desc": "Scoring", **options})
    )


def _with_format_of(dataset: Any, mapped: Any) -> Any:
    """The mapped dataset in the format that the dataset has; the new column is shown."""
    had = dataset.format
    hidden = set(dataset.column_names) - set(had["columns"]) - {INFLUENCE_COLUMN}
    columns = [name for name in mapped.column_names if name not in hidden] if hidden else None
    return mapped.with_format(
        had["type"], columns=columns, output_all_columns=had["output_all_columns"], **had["format_kwargs"]
    )


def _scores_by_map(dataset: Any, scorer: Scorer, begin: int, end: int, batch_size: int, num_proc: int) -> Predictions:
    """Predictions of some rows by worker processes, which hand them over in memory: no file is left behind."""
    part = dataset.select(range(begin, end)).with_format(None)
    key = f"{_key(part, scorer, 'scores')}-{begin:x}-{end:x}"  # of what is in memory alone: no cache finds it
    options = {"features": _features(), "batch_size": batch_size, "num_proc": num_proc, "keep_in_memory": True}
    found = _map(part, OnlyScores(scorer), key, scorer, load_from_cache_file=False, **options)
    return Predictions(*(found.data.column(name).to_numpy() for name in Predictions._fields))


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
