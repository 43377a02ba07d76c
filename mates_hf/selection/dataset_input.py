"""A dataset that is mapped, scored or selected from, and what was scored before: no row is scored twice.

Where it is used: `inputs` makes one in each call of `MatesSelector`; `opened` scores its rows, `result` keeps the
best. What was scored is remembered while the dataset lives, or stands in the dataset's own `influence` column.
Trade-off: a score is reused only where the model, the tokenizer and the column are the same by digest, so a column of
unknown origin is never taken for this selector's. A column carried through other changes of a dataset is used only
where every row still is as it was scored: `map` records a sum over the rows of a hash of what was scored together with
the prediction, which needs no order, and reading the column hashes every row again. So one changed text is noticed,
and a shuffled or sorted dataset is not scored again.

Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import weakref
from typing import Any

import numpy as np

from mates_hf.data.arrow import physical_rows
from mates_hf.prediction.score import INFLUENCE_COLUMN, Predictions
from mates_hf.selection.budget import Budget
from mates_hf.selection.opened import OpenDataset, map_rows, score_rows
from mates_hf.selection.result import Selection

logger = logging.getLogger(__name__)

_RECORD = "mates_hf:influence"  # in `DatasetInfo.download_checksums`, which `save_to_disk` keeps
_ROWS_AT_ONCE = 4096  # are hashed
_MOST_HASHED = 32  # table rows for each visible one: of a few rows picked from a large table, scoring is the cheaper


@dataclasses.dataclass(frozen=True)
class DatasetInput:
    """A dataset that is opened, and what was scored before.

    Attributes:
        opened: The dataset with the object that scores it.
        memory: Predictions of datasets that are alive.
        label_std: Standard deviation of the labels' `influence`.
    """

    opened: OpenDataset
    memory: Scored
    label_std: float

    def map(self) -> Any:
        """The dataset with its new column."""
        opened = self.opened
        if INFLUENCE_COLUMN in opened.dataset.column_names and not _is_own(opened):
            logger.warning("The column `%s`, not known to be this selector's, is replaced.", INFLUENCE_COLUMN)
        whole, scored = map_rows(opened)
        mapped = opened.with_dataset(whole)
        _record(mapped)
        _log_intercepts(scored)
        self.memory.keep(opened, scored)
        if set(opened.columns) <= set(whole.column_names):
            self.memory.keep(mapped, scored)
        return whole

    def score(self) -> Predictions:
        """Predictions of all rows."""
        found = score_rows(self.opened)
        self.memory.keep(self.opened, found)
        return found

    def select(self, budget: Budget) -> Selection:
        """What a budget keeps; nothing that is known is scored again."""
        scored = self.memory.find(self.opened)
        if scored is None:
            scored = _read_own(self.opened)
            if scored is None:
                scored = score_rows(self.opened)
            self.memory.keep(self.opened, scored)
        bounds = self.opened.options.bounds
        selection = Selection.make(self.opened.dataset, scored, budget, self.opened.scorer, self.label_std, bounds)
        logger.info("Selected %d of %d rows (%.4f).", len(selection), len(scored.influence), selection.ratio)
        return selection


class Scored:
    """Predictions of datasets that are alive, each held as long as its dataset."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def keep(self, opened: OpenDataset, scored: Any) -> None:
        """Remember predictions.

        Args:
            opened: The dataset that was scored. Its predictions are dropped when the dataset is; those of a scorer
                without digest are not kept.
            scored: `Predictions`, or a dataset with their columns, which may lie on disk.
        """
        if opened.digest is None or not len(opened.dataset):
            return
        key = opened.scores_key
        self._found[key] = scored
        weakref.finalize(opened.dataset, self._found.pop, key, None).atexit = False

    def find(self, opened: OpenDataset) -> Predictions | None:
        """Predictions of this dataset by this scorer, or None."""
        if opened.digest is None or not self._found or not len(opened.dataset):
            return None
        found = self._found.get(opened.scores_key)
        if found is None or isinstance(found, Predictions):
            return found
        return Predictions.of(found)


def _log_intercepts(scored: Any) -> None:
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


def _record(opened: OpenDataset) -> None:
    """Write into a mapped dataset's info, which is its own, whose predictions its `influence` column holds."""
    info, num = opened.dataset.info, len(opened.dataset)
    whose = {"num_bytes": None, "checksum": opened.digest, "num_rows": num, "rows": _digest_of_rows(opened)}
    info.download_checksums = {**(info.download_checksums or {}), _RECORD: whose}


def _is_own(opened: OpenDataset) -> bool:
    """True where the `influence` column is recorded as this scorer's."""
    is_there = INFLUENCE_COLUMN in opened.dataset.column_names
    return opened.digest is not None and is_there and _found(opened.dataset)["checksum"] == opened.digest


def _read_own(opened: OpenDataset) -> Predictions | None:
    """Predictions from the dataset's `influence` column; targets are counted, which needs no model.

    Args:
        opened: The dataset, and the object that would predict.

    Returns:
        The predictions; None, after a warning, where the column is another's or no longer fits its rows, and None
        where there is no such column, or not every row it was written for is there to compare.
    """
    dataset = opened.dataset
    if INFLUENCE_COLUMN not in dataset.column_names or not len(dataset):
        return None
    if not _is_own(opened):
        logger.warning(
            "The dataset's column `%s` is not known to be this selector's, so it is not used: the rows are scored "
            "anew. To choose by the column itself, use `dataset.sort` or `dataset.filter`.", INFLUENCE_COLUMN,
        )  # fmt: skip
        return None
    column, rows, found = dataset.data.column(INFLUENCE_COLUMN), physical_rows(dataset), _found(dataset)
    # What `filter`, `shuffle` and `train_test_split` leave out or reorder is still in the table.
    if len(column) != found["num_rows"] or len(column) > _MOST_HASHED * len(dataset):
        logger.info(
            "Rows were added or picked since the column `%s` was written (for %s rows, now %d), so it cannot be told "
            "whether they were changed: they are scored anew.", INFLUENCE_COLUMN, found["num_rows"], len(dataset),
        )  # fmt: skip
        return None
    is_whole = str(column.type) == "float" and not column.null_count
    if not is_whole or _digest_of_rows(opened) != found["rows"]:
        logger.warning(
            "The dataset's column `%s` no longer fits its rows, of which at least one was changed after they were "
            "scored: all are scored anew.", INFLUENCE_COLUMN,
        )  # fmt: skip
        return None
    influence = column.to_numpy()
    counts = [part.num_targets for _, part in opened.rows.parts(0, len(dataset), in_place=True)]
    logger.info("The column `%s` of this selector is used; no row is predicted again.", INFLUENCE_COLUMN)
    influence = influence if rows is None else influence[rows]
    return Predictions(np.asarray(influence, np.float32), np.concatenate(counts))


def _found(dataset: Any) -> dict[str, Any]:
    """What is recorded of a dataset's `influence` column."""
    found = (dataset.info.download_checksums or {}).get(_RECORD) or {}
    return {name: found.get(name) for name in ("checksum", "num_rows", "rows")}


def _digest_of_rows(opened: OpenDataset) -> str | None:
    """Sum over the rows of a dataset's table, in whatever order, of a hash of what is scored and its influence.

    None where the scored column is not there.
    """
    column, table, total = opened.scorer.column, opened.dataset.data, 0
    names = column.names_among(table.column_names)
    if column.path[0] not in names:
        return None
    table = table.select([*names, INFLUENCE_COLUMN])
    for begin in range(0, table.num_rows, _ROWS_AT_ONCE):
        part = table.fast_slice(begin, min(_ROWS_AT_ONCE, table.num_rows - begin))
        values = part.column(INFLUENCE_COLUMN).to_numpy().astype("<f4").view("V4").tolist()
        for content, value in zip(column.open_table(part).row_bytes(0, part.num_rows), values, strict=True):
            total += int.from_bytes(hashlib.blake2b(value + content, digest_size=8).digest(), "little")
    return f"{total % 2**64:016x}"
