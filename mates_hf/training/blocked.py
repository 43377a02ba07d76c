"""Rows that a run must not use: those that `allow` leaves out, and those that were removed on request.

Where it is used: the plan counts without them, the ledger draws none of them, and the own order skips them. Both are
on disk beside the rounds, as row numbers alone, so that `verify` draws again what a round drew.

Trade-off: one bit a pool row for what is allowed, and eight bytes for each removed row. Removed rows stand in the
order of their removal, so that a round names those that it knew of by their number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.disk import read_array, replace_path, write_array
from mates_hf.errors import MatesError
from mates_hf.records import IntArray
from mates_hf.selection.turns import Mask

logger = logging.getLogger(__name__)

ALLOWED_FILE = "allowed.npy"  # (ceil(num_rows / 8),) uint8, eight rows a byte
REMOVED_FILE = "removed.npy"  # (R,) int64 pool rows, in the order of their removal
MARKS_FILE = "pool_rows.npy"  # (K,) uint64 `CandidatePool.row_marks` of the pool as the run began with it
EVENTS_FILE = "removed.json"  # dates and counts of removals


@dataclasses.dataclass(frozen=True, eq=False)
class Blocked:
    """Rows of a pool that must not be used.

    Attributes:
        num_rows: rows of the pool.
        allowed: (num_rows,) bool, True where `allow` leaves the row in; None where it is not set.
        removed: (R,) int64 removed rows, in the order of their removal.
    """

    num_rows: int
    allowed: Mask | None = None
    removed: IntArray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @cached_property
    def mask(self) -> Mask | None:
        """(num_rows,) bool, True where a row must not be used; None where all may be."""
        return self.mask_of(len(self.removed))

    def mask_of(self, num_removed: int) -> Mask | None:
        """As `mask`, of the first rows that were removed.

        Args:
            num_removed: how many of them.

        Returns:
            (num_rows,) bool, or None.
        """
        if self.allowed is None and not num_removed:
            return None
        found = np.zeros(self.num_rows, np.bool_) if self.allowed is None else ~self.allowed
        found[self.removed[:num_removed]] = True
        return found

    @property
    def num(self) -> int:
        """How many rows must not be used."""
        return 0 if self.mask is None else int(np.count_nonzero(self.mask))

    def identity(self) -> dict[str, Any]:
        """What a run records of the allowed rows, JSON values; nothing where all are."""
        if self.allowed is None:
            return {}
        return {"num_rows": int(np.count_nonzero(self.allowed)), "sha256": _digest(self.allowed)}

    def write(self, rounds_dir: Path) -> None:
        """Leave the allowed rows beside the rounds, for `verify`."""
        path = rounds_dir / ALLOWED_FILE
        if self.allowed is None:
            path.unlink(missing_ok=True)
        else:
            write_array(path, np.packbits(self.allowed))


def own_order_without(rows: npt.NDArray[np.integer[Any]], blocked: Blocked) -> npt.NDArray[np.integer[Any]]:
    """A pass in the own order without the rows that must not be used; as long as it was.

    Of rows that `allow` leaves out the next allowed ones take the place, and where these end, the first ones follow.
    A removed row's place is taken by the last row that stands nowhere else, so that no other row moves; a row that is
    removed later changes nothing that an earlier removal decided. No row is twice in as many rows as are left.

    Args:
        rows: (L,) integer pool rows, as the sampler draws them, no row twice.
        blocked: the rows that must not be used.

    Returns:
        (L,) integer pool rows of the same type.

    Raises:
        MatesError: no row is left.
    """
    if blocked.mask is None or not len(rows):
        return rows
    kept = rows if blocked.allowed is None else rows[blocked.allowed[rows]]
    found = np.resize(kept, len(rows))
    places: dict[int, list[int]] = {}
    for at in np.flatnonzero(np.isin(found, blocked.removed)).tolist():
        places.setdefault(int(found[at]), []).append(at)
    end = len(kept)  # before it each row stands once; behind it stand rows again
    for row in blocked.removed.tolist():
        if row not in places:
            continue
        end -= 1
        if not end:
            raise MatesError("The pool must have rows that were not removed, got none that is left to train on.")
        for at in sorted(places.pop(row)):  # the one before the end first: others may take what stands there now
            other = int(found[end] if at < end else found[at % end])
            found[at] = other
            places.setdefault(other, []).append(at)
    return found


def _digest(allowed: Mask) -> str:
    return hashlib.sha256(np.packbits(allowed).tobytes()).hexdigest()


def read_removed(rounds_dir: Path, num_rows: int) -> IntArray:
    """The rows that were removed from a run on request.

    Args:
        rounds_dir: where its rounds are.
        num_rows: rows of its pool.

    Returns:
        (R,) int64, in the order of their removal; none where there is no such file.

    Raises:
        MatesError: the file is damaged.
    """
    found = read_array(rounds_dir / REMOVED_FILE, np.int64)
    if found is None:
        return np.zeros(0, np.int64)
    rows = np.array(found)
    if len(rows) and (rows.min() < 0 or rows.max() >= num_rows or len(np.unique(rows)) < len(rows)):
        raise MatesError(f"`{rounds_dir / REMOVED_FILE}` must hold rows of the pool, each once: it was changed.")
    return rows


def set_removed_aside(rounds_dir: Path) -> None:
    """A new run knows nothing of rows that were removed from an earlier one, whose numbers may be of other rows."""
    for name in (REMOVED_FILE, EVENTS_FILE):
        path, number = rounds_dir / name, 1
        if not path.exists():
            continue
        if name == REMOVED_FILE:
            logger.warning(
                "`%s` names rows that were removed from an earlier run in this folder. This run is a new one and does "
                "not know them: leave them out of its dataset.", path,
            )  # fmt: skip
        while os.path.lexists(aside := path.with_name(f"{name}.stale{'' if number == 1 else f'-{number}'}")):
            number += 1
        replace_path(path, aside)


def read_blocked(rounds_dir: Path, info: Mapping[str, Any], num_rows: int) -> Blocked:
    """The rows that a round on disk was not to use, and those that were removed since.

    Args:
        rounds_dir: where the run's rounds are.
        info: The round's `round.json`, or what else says which rows are allowed.
        num_rows: rows of the pool.

    Returns:
        The rows; `mask_of(info["num_removed"])` are those that the round knew of.

    Raises:
        MatesError: a file is missing or is not the one that the round records.
    """
    told, allowed = info.get("allowed"), None
    if told is not None:
        bits = read_array(rounds_dir / ALLOWED_FILE, np.uint8)
        if bits is None or len(bits) != -(-num_rows // 8):
            raise MatesError(f"`{rounds_dir / ALLOWED_FILE}` must hold the allowed ones of {num_rows} rows.")
        allowed = np.unpackbits(np.asarray(bits), count=num_rows).astype(np.bool_)
        if not isinstance(told, Mapping) or told.get("sha256") != _digest(allowed):
            raise MatesError(
                f"`{rounds_dir / ALLOWED_FILE}` must hold the rows that the round records: it was changed."
            )
    return Blocked(num_rows, allowed, read_removed(rounds_dir, num_rows))
