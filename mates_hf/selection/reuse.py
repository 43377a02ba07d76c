"""What a selector has scored before: in memory while the dataset lives, or in the dataset's own `influence` column.

Place in the flow: `filter` and `select` ask here before they score; `map` and `score` leave here what they found.
Trade-off: a score is reused only where the model, the tokenizer and the column are the same by digest, so a column of
unknown origin is never taken for this selector's. A column carried through other changes of a dataset is compared on
1,024 rows that are predicted anew, so that texts changed under it are noticed, unless few were.

Shape suffix: N rows.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import numpy as np

from mates_hf.data.columns import fixed_positions, physical_rows
from mates_hf.influence.scoring import Predictions, Scorer
from mates_hf.selection.mapped import NUM_KEY_ROWS, SHARD_ROWS, scores_key
from mates_hf.selection.streaming import INFLUENCE_COLUMN

logger = logging.getLogger(__name__)

_RECORD = "mates_hf:influence"  # in `DatasetInfo.download_checksums`, which `save_to_disk` keeps
_NEAR = 0.01  # of a standard deviation: an encoder's predictions differ a little from batch to batch


class Scored:
    """Predictions of datasets that are alive, each held as long as its dataset."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def keep(self, dataset: Any, scorer: Scorer, digest: str | None, scored: Any) -> None:
        """Remember predictions.

        Args:
            dataset: what was scored; what is kept goes when this object does.
            scorer: what predicted.
            digest: of the scorer; None keeps nothing.
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


def record(info: Any, digest: str) -> Any:
    """A `DatasetInfo` that says whose predictions the `influence` column holds."""
    info = info.copy()
    info.download_checksums = {**(info.download_checksums or {}), _RECORD: {"num_bytes": None, "checksum": digest}}
    return info


def is_own(dataset: Any, digest: str | None) -> bool:
    """True where the `influence` column is recorded as this scorer's."""
    found = (dataset.info.download_checksums or {}).get(_RECORD) or {}
    return digest is not None and INFLUENCE_COLUMN in dataset.column_names and found.get("checksum") == digest


def read_own(dataset: Any, scorer: Scorer, digest: str | None, batch_size: int) -> Predictions | None:
    """Predictions from the dataset's `influence` column; targets are counted, which needs no model.

    Args:
        dataset: a `Dataset`.
        scorer: what would predict.
        digest: of it.
        batch_size: texts tokenised at once.

    Returns:
        The predictions; None, after a warning, where the column is another's or no longer fits its rows, and None
        where there is no such column.
    """
    if INFLUENCE_COLUMN not in dataset.column_names or not len(dataset):
        return None
    if not is_own(dataset, digest):
        logger.warning(
            "The dataset's column `%s` is not known to be this selector's, so it is not used: the rows are scored "
            "anew. To choose by the column itself, use `dataset.sort` or `dataset.filter`.", INFLUENCE_COLUMN,
        )  # fmt: skip
        return None
    column, rows = dataset.data.column(INFLUENCE_COLUMN), physical_rows(dataset)
    if str(column.type) != "float" or column.null_count:
        influence = np.full(len(dataset), np.nan, np.float32)
    else:
        influence = column.to_numpy()
        influence = influence if rows is None else influence[rows]
    asked = fixed_positions(len(dataset), NUM_KEY_ROWS)
    again = scorer.predict(scorer.rows_of(dataset, asked)).influence
    if not np.allclose(influence[asked], again, rtol=_NEAR, atol=_NEAR * float(np.std(again))):
        logger.warning(
            "The dataset's column `%s` no longer fits its rows, which were changed after they were scored: they are "
            "scored anew.", INFLUENCE_COLUMN,
        )  # fmt: skip
        return None
    step = batch_size if scorer.is_text else SHARD_ROWS
    starts = range(0, len(dataset), step)
    counts = [scorer.rows_of(dataset, np.arange(i, min(i + step, len(dataset)))).num_targets for i in starts]
    logger.info("The column `%s` of this selector is used; no row is predicted again.", INFLUENCE_COLUMN)
    return Predictions(np.asarray(influence, np.float32), np.concatenate(counts))
