"""Rows of a pool for a fit: read as tokens, cut, and left out where they share text with the reference.

Where it is used: `inputs` for a fit that asks a model, `counted` for a filter that does not. Trade-off: all rows that
were drawn are held in memory, which `pool_rows` bounds.

Shape suffix: T tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mates_hf.data.arrow import effective_labels, joined_rows
from mates_hf.data.column_types import TOKENS
from mates_hf.data.files import Loaded
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.data.scored_column import find_column
from mates_hf.data.token_overlap import TokenNgramIndex
from mates_hf.engine.processes import Processes

logger = logging.getLogger(__name__)

_AT_ONCE = 1_000  # texts that are tokenised together
_MOST_SHARED = 0.5  # of the pool's rows, that may share text with the reference


def as_dataset(rows: TokenRows) -> Any:
    """Token rows as a `datasets.Dataset` of `input_ids` and `labels`."""
    import datasets
    import pyarrow as pa

    offsets = pa.array(rows.offsets.astype(np.int32))
    columns = {TOKENS: rows.values, "labels": effective_labels(rows)}
    lists = {name: pa.ListArray.from_arrays(offsets, pa.array(v.astype(np.int32))) for name, v in columns.items()}
    return datasets.Dataset(pa.table(lists))


def tokens_of(loaded: Loaded, column: str, tokenizer: Any, max_length: int, progress: bool) -> TokenRows:
    """All rows that were loaded as tokens, cut to `max_length`."""
    from tqdm.auto import tqdm

    dataset = loaded.dataset
    opened = find_column(dataset.features.arrow_schema, column, tokenizer, max_length).open(dataset)
    parts = []
    for start in tqdm(range(0, len(dataset), _AT_ONCE), desc="tokens", disable=not progress, leave=False):
        rows = opened.rows(np.arange(start, min(start + _AT_ONCE, len(dataset))))
        assert isinstance(rows, TokenRows)
        parts.append(_cut(rows, max_length))
    return joined_rows(parts)


def _cut(rows: TokenRows, max_length: int) -> TokenRows:
    """Rows without what is behind their first `max_length` tokens."""
    lengths = rows.lengths
    if not len(lengths) or lengths.max() <= max_length:
        return rows
    place = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], lengths)
    kept = place < max_length
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_length))]).astype(np.int64)
    labels = None if rows.labels is None else rows.labels[kept]
    return TokenRows(values=rows.values[kept], offsets=offsets, labels=labels)


def trainable(rows: TokenRows, task: ReferenceTask) -> tuple[TokenRows, dict[str, Any]]:
    """The rows that have a trained token and share no text with the reference, and how many others there are."""
    has_target = rows.num_targets > 0
    shared = np.zeros(len(rows), bool)
    shared[TokenNgramIndex(task.text("a fit on a file of texts")).shared(rows)] = True
    num_shared = int((shared & has_target).sum())
    facts = {"num_rows": len(rows), "num_empty": int((~has_target).sum()), "num_shared": num_shared}
    if not has_target.any():
        raise ValueError(
            f"`pool` must have texts, got {len(rows):,} rows with fewer than two tokens each, or no label. Name "
            "the column that holds the text: `column`."
        )
    if num_shared > _MOST_SHARED * has_target.sum():
        raise ValueError(
            f"`reference` must not be text of the pool, and {num_shared:,} of the pool's {int(has_target.sum()):,} "
            "rows share 13 tokens in a row with it. Take passages that are kept out of the pool."
        )
    if num_shared and Processes.of_run().is_main:
        logger.warning(
            "%d of the pool's %d rows that were read share 13 tokens in a row with the reference: they are left out "
            "of the fit. Drop such rows before you train (`mates_hf.data.token_overlap.shared_rows`).",
            num_shared, len(rows),
        )  # fmt: skip
    return rows.take(has_target & ~shared), facts
