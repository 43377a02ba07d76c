"""What a selector has scored before: in memory while the dataset lives, or in the dataset's own `influence` column.

Place in the flow: `filter` and `select` ask here before they score; `map` and `score` leave here what they found.
Trade-off: a score is reused only where the model, the tokenizer and the column are the same by digest, so a column of
unknown origin is never taken for this selector's. A column carried through other changes of a dataset is used only
where every row still is as it was scored: `map` records a sum over the rows of a hash of what was scored together with
the prediction, which needs no order, and reading the column hashes every row again. So one changed text is noticed,
and a shuffled or sorted dataset is not scored again.

Shape suffix: N rows.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from typing import Any

import numpy as np

from mates_hf.data.columns import physical_rows
from mates_hf.prediction.score import Predictions, Scorer
from mates_hf.selection.mapped import AHEAD_ROWS, SHARD_ROWS, scores_key
from mates_hf.selection.streaming import INFLUENCE_COLUMN

logger = logging.getLogger(__name__)

_RECORD = "mates_hf:influence"  # in `DatasetInfo.download_checksums`, which `save_to_disk` keeps
_MOST_HASHED = 32  # table rows for each visible one: of a few rows picked from a large table, scoring is the cheaper


class Scored:
    """Predictions of datasets that are alive, each held as long as its dataset."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def keep(self, dataset: Any, scorer: Scorer, digest: str | None, scored: Any) -> None:
        """Remember predictions.

        Args:
            dataset: what was scored; what is kept goes when this object does.
            scorer: what predicted.
            digest: Digest of the scorer; None keeps nothing.
            scored: `Predictions`, or a dataset with their columns, which may lie on disk.
        """
        if digest is None or not len(dataset):
            return
        key = scores_key(dataset, scorer, digest)
        self._found[key] = scored
        weakref.finalize(dataset, self._found.pop, key, None).atexit = False

    def find(self, dataset: Any, scorer: Scorer, digest: str | None) -> Predictions | None:
        """Predictions of this dataset by this scorer, or None."""
        if digest is None or not self._found or not len(dataset):
            return None
        found = self._found.get(scores_key(dataset, scorer, digest))
        if found is None or isinstance(found, Predictions):
            return found
        return Predictions(*(found.data.column(name).to_numpy() for name in Predictions._fields))


def digest_of(scorer: Scorer) -> str | None:
    """The scorer's digest; None where the influence model cannot say what it depends on."""
    try:
        return scorer.digest()
    except Exception as error:  # `save_pretrained` or `digest` of a user's class
        logger.debug("Scores are not kept for later calls: the influence model has no digest (%s).", error)
        return None


def record(dataset: Any, scorer: Scorer, digest: str) -> None:
    """Write into a mapped dataset's info whose predictions its `influence` column holds, and of which rows.

    Args:
        dataset: with the column, and with an info that is its own.
        scorer: what predicted.
        digest: Digest of the scorer.
    """
    whose = {"num_bytes": None, "checksum": digest, "num_rows": len(dataset), "rows": _digest_of_rows(dataset, scorer)}
    dataset.info.download_checksums = {**(dataset.info.download_checksums or {}), _RECORD: whose}


def is_own(dataset: Any, digest: str | None) -> bool:
    """True where the `influence` column is recorded as this scorer's."""
    return digest is not None and INFLUENCE_COLUMN in dataset.column_names and _found(dataset)["checksum"] == digest


def read_own(dataset: Any, scorer: Scorer, digest: str | None, batch_size: int) -> Predictions | None:
    """Predictions from the dataset's `influence` column; targets are counted, which needs no model.

    Args:
        dataset: a `Dataset`.
        scorer: what would predict.
        digest: Digest of the scorer.
        batch_size: texts tokenised at once.

    Returns:
        The predictions; None, after a warning, where the column is another's or no longer fits its rows, and None
        where there is no such column, or not every row it was written for is there to compare.
    """
    if INFLUENCE_COLUMN not in dataset.column_names or not len(dataset):
        return None
    if not is_own(dataset, digest):
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
    if not is_whole or _digest_of_rows(dataset, scorer) != found["rows"]:
        logger.warning(
            "The dataset's column `%s` no longer fits its rows, of which at least one was changed after they were "
            "scored: all are scored anew.", INFLUENCE_COLUMN,
        )  # fmt: skip
        return None
    influence = column.to_numpy()
    step = batch_size if scorer.is_text else SHARD_ROWS
    starts = range(0, len(dataset), step)
    counts = [scorer.rows_of(dataset, np.arange(i, min(i + step, len(dataset)))).num_targets for i in starts]
    logger.info("The column `%s` of this selector is used; no row is predicted again.", INFLUENCE_COLUMN)
    influence = influence if rows is None else influence[rows]
    return Predictions(np.asarray(influence, np.float32), np.concatenate(counts))


def _found(dataset: Any) -> dict[str, Any]:
    """What is recorded of a dataset's `influence` column."""
    found = (dataset.info.download_checksums or {}).get(_RECORD) or {}
    return {name: found.get(name) for name in ("checksum", "num_rows", "rows")}


def _digest_of_rows(dataset: Any, scorer: Scorer) -> str | None:
    """Sum over the rows of a dataset's table, in whatever order, of a hash of what is scored and its influence.

    None where the scored column is not there.
    """
    table = dataset.data
    names = scorer.columns_of(table.column_names)
    if scorer.names[0] not in names:
        return None
    table, total = table.select([*names, INFLUENCE_COLUMN]), 0
    for begin in range(0, table.num_rows, AHEAD_ROWS):
        part = table.fast_slice(begin, min(AHEAD_ROWS, table.num_rows - begin))
        values = part.column(INFLUENCE_COLUMN).to_numpy().astype("<f4").view("V4").tolist()
        for content, value in zip(scorer.row_bytes(part), values, strict=True):
            total += int.from_bytes(hashlib.blake2b(value + content, digest_size=8).digest(), "little")
    return f"{total % 2**64:016x}"
