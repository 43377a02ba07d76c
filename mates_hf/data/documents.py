"""Which rows are of one document, so that a split, a bootstrap and a fit report do not count it several times.

Where it is used: influence models ask it when they split a pool's rows. A held-out row whose document was fitted on is
no test, and rows of one document are not independent in an interval.

Trade-off: where no column says which document a row is cut from, copies of a text count as one document and nothing
else does: separating pieces of one document from pieces of two needs what a tokenised row no longer has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.feeds import CollatedRows
from mates_hf.data.rows import TokenRows
from mates_hf.records import IntArray


def document_codes(
    rows: TokenRows | CollatedRows, pool: Any = None, ids: IntArray | None = None, column: str | None = None
) -> IntArray:
    """A number for the document of each row: equal numbers are one document.

    Args:
        rows: The N rows; of those that are fed by a collator the bytes of all inputs stand for the tokens.
        pool: the `CandidatePool` they are of; needed with a column.
        ids: (N,) their pool rows; needed with a column.
        column: Column of the pool with the document of each row (text or numbers); None recognises documents by
            their tokens, so that copies of a text are one.

    Returns:
        (N,) int64. A row whose entry of the column is null is recognised by its tokens.

    Raises:
        ValueError: the dataset has no such column, or it holds neither text nor numbers.
    """
    if column is None:
        return _own_codes(rows)
    assert ids is not None
    require_column(pool.dataset, column)
    codes, own = np.empty(len(rows), np.int64), None
    for i, value in enumerate(_read_column(pool.dataset, column, ids.tolist())):
        if value is None:
            own = _own_codes(rows) if own is None else own
            codes[i] = own[i]
        elif isinstance(value, (str, int, float, np.integer, np.floating)):
            codes[i] = _hash(b"column" + str(value).encode("utf-8", "surrogatepass"))
        else:
            raise ValueError(
                f"`document_column` must hold text or numbers, got {type(value).__name__} in `{column}` of pool row "
                f"{ids[i]}. Name a column with one text or number a row."
            )
    return codes


def _own_codes(rows: TokenRows | CollatedRows) -> IntArray:
    """(N,) int64, equal for rows of equal content."""
    if isinstance(rows, TokenRows):
        return text_codes(rows.values[start:stop] for start, stop in zip(rows.offsets, rows.offsets[1:], strict=False))
    return rows.hashes.view(np.int64)


def text_codes(texts: Iterable[Any], found: npt.NDArray[np.bool_] | None = None) -> IntArray:
    """(N,) int64, equal for texts of equal tokens; each text as (length,) integer ids.

    Args:
        texts: M token ids.
        found: (N,) bool with M that are true, where some candidates have no text; None: all have one.

    Returns:
        The codes; candidates without a text have 0.
    """
    codes = np.array([_hash(b"tokens" + _as_bytes(ids)) for ids in texts], np.int64)
    if found is None:
        return codes
    everyone = np.zeros(len(found), np.int64)
    everyone[found] = codes
    return everyone


def require_column(dataset: Any, column: str, setting: str = "document_column") -> None:
    """Raise unless a dataset has a column.

    Args:
        dataset: The dataset of the pool.
        column: Name of the column.
        setting: Field of the config that names it, for the error.

    Raises:
        ValueError: it has none of that name; says which there are.
    """
    names = getattr(dataset, "column_names", None)
    if names is None and len(dataset):
        names = list(dataset[0])
    if column not in (names or ()):
        raise ValueError(
            f"`{setting}` must be a column of the pool, got {column!r}; it has {sorted(map(str, names or ()))}. "
            "The Trainer removes columns that the model does not take: set `remove_unused_columns=False`, and use a "
            "collator that leaves this column out."
        )


def _read_column(dataset: Any, column: str, ids: list[int]) -> list[Any]:
    """What some rows have in a column, read from Arrow where that is how they are kept."""
    if hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):
        found = dataset.with_format(None, columns=[column])[ids][column]
        return list(found)
    return [dataset[i][column] for i in ids]


def _as_bytes(ids: Any) -> bytes:
    return np.ascontiguousarray(ids, "<i8").tobytes()


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
