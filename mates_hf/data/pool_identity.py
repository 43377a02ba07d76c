"""What tells one candidate pool from another, what of its rows is no text, and what is no pool at all.

Where it is used: behind `CandidatePool`. Trade-off: 1,024 rows stand for all of them. Reading every image of a pool
before a run would take hours; what changed in other rows is not seen.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.arrow import effective_labels
from mates_hf.data.collated import collate, drawn_row
from mates_hf.data.columns import fixed_positions, visible_columns
from mates_hf.data.examples import beyond_text, content_hash
from mates_hf.data.stream import MatesStream
from mates_hf.errors import UnsupportedSettingError

if TYPE_CHECKING:
    from mates_hf.data.pool import CandidatePool
    from mates_hf.records import IntArray

logger = logging.getLogger(__name__)

NUM_IDENTITY_ROWS = 1024


def look_beyond_text(dataset: Any, collate_fn: Any) -> tuple[tuple[str, ...], bool]:
    """What the first row of a pool has besides text.

    Args:
        dataset: The rows.
        collate_fn: The collator of the run; rows without one are text.

    Returns:
        Names of the inputs that are no text, and whether there are token ids.
    """
    if collate_fn is None:
        return (), True
    try:
        batch = collate(dataset, collate_fn, [0])
    except Exception as error:  # whoever reads rows will name it
        logger.debug("The first row of the pool could not be collated: %s", error)
        return (), True
    return beyond_text(batch), batch.get("input_ids") is not None


def identity_of(pool: CandidatePool) -> dict[str, Any]:
    """`CandidatePool.identity`.

    Args:
        pool: A view of some or all rows.

    Returns:
        Plain JSON values.
    """
    where, ids = _looked_at(pool)
    digest = hashlib.sha256()
    found: dict[str, Any] = {"num_rows": len(pool), "features": pool._features()}
    if pool.beyond_text:
        for row in ids.tolist():
            digest.update(_whole_hash(pool, row))
        return {**found, "rows_sha256": digest.hexdigest(), "inputs": ", ".join(pool.beyond_text)}
    rows = pool.token_rows(ids)
    documents = [] if rows.segments is None else [rows.segments]
    for part in (where, rows.offsets, rows.values, effective_labels(rows), *documents):
        digest.update(np.ascontiguousarray(part, "<i8").tobytes())
    return {**found, "rows_sha256": digest.hexdigest()}


def marks_of(pool: CandidatePool) -> npt.NDArray[np.uint64]:
    """`CandidatePool.row_marks`.

    Args:
        pool: A view of some or all rows.

    Returns:
        (K,) uint64.
    """
    ids = _looked_at(pool)[1]
    found = np.empty(len(ids), np.uint64)
    if pool.beyond_text:
        found[:] = [int.from_bytes(_whole_hash(pool, row)[:8], "little") for row in ids.tolist()]
        return found
    rows = pool.token_rows(ids)
    labels = effective_labels(rows)
    for i, (start, stop) in enumerate(itertools.pairwise(rows.offsets.tolist())):
        digest = hashlib.blake2b(digest_size=8)
        for part in (rows.values[start:stop], labels[start:stop]):
            digest.update(np.ascontiguousarray(part, "<i8").tobytes())
        found[i] = int.from_bytes(digest.digest(), "little")
    return found


def _looked_at(pool: CandidatePool) -> tuple[IntArray, IntArray]:
    """Places of fixed rows in a view, and their numbers in the pool."""
    where = fixed_positions(len(pool), NUM_IDENTITY_ROWS)
    return where, where if pool._ids is None else pool._ids[where]


def _whole_hash(pool: CandidatePool, row: int) -> bytes:
    """SHA-256 of all inputs and labels of a row."""
    assert pool.collate_fn is not None
    return content_hash(collate(pool.dataset, pool.collate_fn, [row]), with_labels=True)


def features_of(dataset: Any) -> str:
    """Names and Arrow types of a `datasets.Dataset`, else the keys and the type of the first row."""
    names = visible_columns(dataset)
    if names is not None:
        schema = dataset.data.schema
        return ", ".join(f"{name}: {schema.field(name).type}" for name in sorted(names))
    row = drawn_row(dataset, 0)
    return ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else type(row).__name__


def refuse_streams(dataset: Any) -> None:
    """Raise for what has no numbered rows: streams, bare iterables, dicts of splits or columns.

    Args:
        dataset: What is to be a pool.

    Raises:
        UnsupportedSettingError: it is a stream.
        TypeError: it is something else without numbered rows.
    """
    if isinstance(dataset, MatesStream):
        raise UnsupportedSettingError(
            "The candidate pool must have rows that are known beforehand, got a MatesStream, whose rows only the "
            "sampler of a Trainer's dataloader reads. Train with a MatesCallback, or filter the stream before with "
            "`MatesSelector.filter`."
        )
    loaded = [(name, sys.modules.get(name)) for name in ("datasets", "torch.utils.data")]
    streams = tuple(module.IterableDataset for _, module in loaded if module is not None)
    if isinstance(dataset, streams):
        raise UnsupportedSettingError(
            "The candidate pool must be a map-style dataset, got a stream "
            f"({type(dataset).__name__}), whose rows cannot be re-ordered. Wrap it for a Trainer "
            "(`train_dataset=MatesStream(dataset)`), select from it before the run with `MatesSelector.filter`, or "
            "load it without streaming."
        )
    if isinstance(dataset, (Mapping, str)) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            "The candidate pool must be a map-style dataset whose rows are dicts, got "
            f"{type(dataset).__name__}. Pass one split of a DatasetDict; columns go through `Dataset.from_dict`."
        )
