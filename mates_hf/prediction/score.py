"""Scoring rows: what a fitted influence model predicts of one column, and all that a prediction depends on.

Where it is used: between a fitted influence model and `selection/`. A `Scorer` is the model with the column that was
decided on (`data/scored_column`), small enough to be sent to worker processes. Trade-off: token columns are read where
Arrow has them, so that the n-gram model scores at the speed of memory; models that want rows of their own get a copy,
a batch at a time.

Every row is scored alone: neither its neighbours, nor the batch, nor the number of threads or processes changes a bit
of an n-gram prediction. Sign: > 0 helps, higher is better.

Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import TokenRows, TokenSpans
from mates_hf.data.scored_column import OpenRows, ScoredColumn, TokenIds
from mates_hf.data.text_spans import TextSpans
from mates_hf.errors import InfluenceError
from mates_hf.prediction.artifacts import model_digest
from mates_hf.records import FloatArray

logger = logging.getLogger(__name__)

INFLUENCE_COLUMN = "influence"  # that predictions are written into
_VERSION = 1  # of what a score is; raised when the same model gives other numbers, so that no cache is stale


class Predictions(NamedTuple):
    """What was predicted of N rows.

    Attributes:
        influence: (N,) float32 predicted influence in the unit of the labels, higher is better; the model's intercept
            where a row has no target.
        num_targets: (N,) int32 trained tokens of each row; estimated at four bytes a token for a model of texts.
    """

    influence: FloatArray
    num_targets: npt.NDArray[np.int32]

    @classmethod
    def of(cls, dataset: Any) -> Predictions:
        """Those that a `datasets.Dataset` has as its columns."""
        return cls(*(dataset.data.column(name).to_numpy() for name in cls._fields))

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Those of all rows, from those of their parts; of no row, where there is no part."""
        if len(parts) == 1:
            return parts[0]
        nothing = cls(np.zeros(0, np.float32), np.zeros(0, np.int32))
        return cls(*(np.concatenate(arrays) for arrays in zip(nothing, *parts, strict=True)))


@dataclasses.dataclass(frozen=True)
class Scorer:
    """An influence model and the column to score: all that a worker process needs.

    Attributes:
        model: fitted; anything with `predict(TokenRows)`. One whose class says `reads_spans = True` gets `TokenSpans`,
            one whose class says `reads_texts = True` gets `TextSpans`, one that `reads_media` gets `MediaRows`.
        column: what is scored.
    """

    model: Any
    column: ScoredColumn

    @property
    def reads_in_place(self) -> bool:
        """True where the model takes rows of tokens where they lie; what stands beside some may yet say otherwise."""
        return isinstance(self.column, TokenIds) and bool(getattr(self.model, "reads_spans", False))

    def digest(self) -> str:
        """SHA-256 of everything but the rows that a prediction depends on."""
        parts = [_VERSION, model_digest(self.model), *self.column.depends_on()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def known_digest(self) -> str | None:
        """The digest; None where the influence model cannot say what it depends on."""
        try:
            return self.digest()
        except Exception as error:  # `save_pretrained` or `digest` of a user's class
            logger.debug("Scores are not kept for later calls: the influence model has no digest (%s).", error)
            return None

    def predict(self, rows: TokenRows | TokenSpans | TextSpans, first_row: int = 0) -> Predictions:
        """Predict rows of tokens, or texts.

        Args:
            rows: N rows, as the column reads them.
            first_row: what errors call the first of them.

        Returns:
            The predictions.

        Raises:
            ValueError: an id is negative, or outside the tokenizer's vocabulary.
            InfluenceError: the model predicts what is not finite.
        """
        num_targets = rows.num_targets
        if not len(num_targets):
            return Predictions(np.zeros(0, np.float32), num_targets)
        if isinstance(rows, TokenRows):
            self.column.check_ids(rows, first_row)
        influence = np.asarray(self.model.predict(rows), np.float32)
        if influence.shape != num_targets.shape:
            raise ValueError(
                f"`predict` of {type(self.model).__name__} must return one number a row ({len(num_targets)}), got "
                f"shape {influence.shape}."
            )
        bad = np.flatnonzero(~np.isfinite(influence))
        if len(bad):
            raise InfluenceError(
                f"Predicted influence must be finite; that of {len(bad)} of {len(influence)} rows is not, first row "
                f"{int(bad[0]) + first_row}. Look at these rows, and at the influence model."
            )
        return Predictions(influence, num_targets)

    def predict_batch(self, batch: Mapping[str, Any]) -> Predictions:
        """Predict rows as `datasets` hands them out of a stream: lists by column."""
        return self.predict(self.column.read_batch(batch))

    def predict_rows(self, opened: OpenRows, begin: int, end: int) -> Predictions:
        """Predict rows of what the column has opened, a part at a time.

        Args:
            opened: a dataset or a table.
            begin: first row.
            end: row after the last.

        Returns:
            The predictions.

        Raises:
            ValueError: a token is null, negative or outside the vocabulary.
        """
        parts = opened.parts(begin, end, in_place=self.reads_in_place)
        return Predictions.joined([self.predict(rows, first_row) for first_row, rows in parts])
