"""A selector as a worker of a cluster has it: read from a path once, then asked for the scores of Arrow tables.

Where it is used: under the engines in `integrations/` (datatrove, Ray Data, NeMo Curator), which hand over their
batches as tables. Trade-off: what is sent to a worker is a path and a name of a column, so that a job is a few bytes
and every worker reads the selector itself; a folder on a shared disk is read faster than the Hub.

Sign: > 0 helps, higher is better. Shape suffix: N rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mates_hf.paths import expand_path
from mates_hf.prediction.score import INFLUENCE_COLUMN, Scorer
from mates_hf.prediction.threads import at_most_threads
from mates_hf.selection.card import label_unit
from mates_hf.selection.inputs import Fitted
from mates_hf.selection.prefix import PieceScores
from mates_hf.selection.score_file import content_hashes
from mates_hf.selection.selector import MatesSelector

CONTENT_COLUMN = "content_hash"
SCORE_COLUMNS = (INFLUENCE_COLUMN, "num_targets", CONTENT_COLUMN)
_PARALLEL_TOKENIZERS = "TOKENIZERS_PARALLELISM"  # tokenizers reads it in each call


def check_selector_path(path: Any) -> str:
    """Where workers find a saved selector, from whatever folder they start in.

    Args:
        path: A folder of this machine, or a name on the Hub.

    Returns:
        The folder's whole path, or the name.

    Raises:
        TypeError: this is a selector in memory, which no job can carry.
    """
    if isinstance(path, (str, Path)):
        folder = expand_path(path)
        return str(folder.absolute() if folder.is_dir() else path)
    raise TypeError(
        f"`selector_path` must be a path or a name on the Hub, which every worker reads, got {type(path).__name__}. "
        "Write the selector to a disk that all see, `selector.save_pretrained(path)`, and pass `path`."
    )


class TableScorer:
    """Scores the rows of Arrow tables by a saved selector.

    Args:
        selector_path: What `MatesSelector.from_pretrained` reads.
        column: Column to score, in any form that `MatesSelector.map` takes; None takes `input_ids`, else `text`, else
            `messages`.
        num_threads: Number of threads that tokenise and predict; None is one a core.

    Raises:
        FileNotFoundError: there is no such selector.
        ValueError: `num_threads` is below 1.
    """

    def __init__(self, selector_path: str, column: str | None = None, num_threads: int | None = 1) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"`num_threads` must be at least 1, or None for one a core, got {num_threads!r}.")
        selector = MatesSelector.from_pretrained(selector_path)
        self._fitted = Fitted.of(selector)
        self._column, self._num_threads = column, num_threads
        self.label_std = self._fitted.label_std
        self.label_unit = label_unit(getattr(selector.influence_model, "report", None), selector.origin)

    def scorer(self, schema: Any) -> Scorer:
        """What scores tables of a `pyarrow.Schema`, as `MatesSelector` decides it."""
        return self._fitted.scorer(schema, self._column)

    def score(self, table: Any, first_row: int = 0) -> PieceScores:
        """Scores of a table's rows.

        Args:
            table: A `pyarrow.Table` with the column.
            first_row: Number that errors call the first row by.

        Returns:
            Of each row the predicted influence, the number of trained tokens and the hash of what it says.

        Raises:
            ValueError: there is no such column, or a token is impossible.
            TypeError: the column holds neither texts, nor conversations, nor tokens.
            InfluenceError: a prediction is not finite.
        """
        scorer = self.scorer(table.schema)
        opened = scorer.column.open_table(table, first_row)
        with at_most_threads(self._num_threads), _tokenizers_of(self._num_threads):
            found = scorer.predict_rows(opened, 0, table.num_rows)
        return PieceScores(found.influence, found.num_targets, content_hashes(scorer.column, table))


def with_scores(table: Any, scorer: TableScorer) -> Any:
    """A table with its scores in the columns `SCORE_COLUMNS`; columns of these names are replaced.

    Args:
        table: The `pyarrow.Table`.
        scorer: What scores it.

    Returns:
        The table.

    Raises:
        TypeError: this is no Arrow table.
    """
    import pyarrow as pa

    if not isinstance(table, pa.Table):
        raise TypeError(f'Batches must be Arrow tables, got {type(table).__name__}. Pass `batch_format="pyarrow"`.')
    scores = scorer.score(table)
    kept = table.drop_columns([name for name in SCORE_COLUMNS if name in table.column_names])
    for name, values in zip(SCORE_COLUMNS, scores, strict=True):
        kept = kept.append_column(name, pa.array(values))
    return kept


@contextlib.contextmanager
def _tokenizers_of(num_threads: int | None) -> Iterator[None]:
    """Keep a tokenizer to one thread where one is asked for; what the variable was is put back."""
    before = os.environ.get(_PARALLEL_TOKENIZERS)
    if num_threads == 1:
        os.environ[_PARALLEL_TOKENIZERS] = "false"
    try:
        yield
    finally:
        if num_threads == 1:
            os.environ.pop(_PARALLEL_TOKENIZERS)
            if before is not None:
                os.environ[_PARALLEL_TOKENIZERS] = before
