"""A `datasets.Dataset` opened for scoring: who scores it, from which column, and what its scores are known by.

Place in the flow: made once a call by `inputs`; `mapped`, which scores, and `reuse`, which remembers, ask it.
Trade-off: the key of scores is made here instead of by `datasets`, which would hash the live model by pickling it and
find another hash after each call of a tokenizer. It holds the dataset's fingerprint and the content of 1,024 rows, so
that a dataset that was changed under its old fingerprint is scored anew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

from mates_hf.data.columns import fixed_positions
from mates_hf.data.scored_column import OpenRows
from mates_hf.prediction.score import Predictions, Scorer

NUM_KEY_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class OpenDataset:
    """A dataset with what scores it.

    Attributes:
        dataset: with the column; a format of it is not applied.
        scorer: what predicts.
        digest: Digest of the scorer; None where the model cannot say what it depends on.
        batch_size: texts tokenised at once.
    """

    dataset: Any
    scorer: Scorer
    digest: str | None
    batch_size: int

    @functools.cached_property
    def rows(self) -> OpenRows:
        """The scored column's rows."""
        return self.scorer.column.open(self.dataset, self.batch_size)

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
            begin: first row.
            end: row after the last.

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
