"""Rows before the newest round takes effect, where a run resumes between that round's boundary and its switch.

Where it is used: `restore` asks for them. Rows that were removed meanwhile are replaced, and the round, which was
decided before that, is told by which (`replaced.add_late`): no later round may draw them again. No round holds the
rows of the own order before a first selection. The run's history does, with what earlier resumes replaced.

Trade-off: where rows were removed, the rest of the own order is read from disk and not drawn again, because what an
earlier resume put somewhere must stay there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mates_hf.disk import read_json
from mates_hf.errors import MatesError
from mates_hf.records import IntArray
from mates_hf.round_files import ROUND_FILE
from mates_hf.training.history import NO_ROW, keep_own, read_history
from mates_hf.training.ledger_on_disk import ledger_of
from mates_hf.training.order import Order, load_order
from mates_hf.training.redact import probed_by
from mates_hf.training.replaced import add_late, read_replaced
from mates_hf.training.run import Run


def rows_of_round(path: Path) -> IntArray:
    """(n,) int64 rows that a finished round trains on or has probed, those that were removed since among them."""
    return np.concatenate([np.asarray(load_order(path).rows), read_replaced(path)[:, 2], probed_by(path)])


def tell_later_round(path: Path, earlier: Path, removed: IntArray) -> None:
    """Have a finished round know of the rows that replaced others in the round before it since it was decided.

    Args:
        path: the round.
        earlier: the round before it, whose entries are written.
        removed: (R,) int64 rows that were removed, in the order of their removal.
    """
    info, before = read_json(path / ROUND_FILE), read_json(earlier / ROUND_FILE)
    if int(info.get("pass", 1)) != int(before.get("pass", 1)):
        return  # a pass began with it, in which these rows are unused
    entries = read_replaced(earlier)
    since = np.isin(entries[:, 1], removed[int(info.get("num_removed", 0)) :])
    add_late(path, entries[since & (entries[:, 0] < int(info["from_position"])), 2], len(removed))


def own_order_before(run: Run, path: Path, start: int) -> list[Order]:
    """The rest of the own order before the first selection, with removed rows replaced, and written down so.

    Args:
        run: the run's state, in the main process.
        path: the first round that selects; finished.
        start: pool rows that are trained on.

    Returns:
        Its stretches, none where nothing was removed; between them a batch is not full.

    Raises:
        MatesError: the history lacks these rows, or the pool has too few.
    """
    if run.blocked is None or not len(run.blocked.removed):
        return []
    first = load_order(path)
    rows = _rows_on_disk(run.rounds_dir, start, first.from_position)
    holes = np.flatnonzero(np.isin(rows, run.blocked.removed))
    if len(holes):
        ledger = ledger_of(path, first, len(run.pool), run.config.selection_seed)
        ledger.blocked = run.blocked.mask
        exclude = np.concatenate([rows_of_round(path), rows[rows != NO_ROW]])
        rows[holes] = ledger.rows_after(np.zeros(0, np.int64), len(holes), exclude=exclude)
        if ledger.pass_number == 1:  # else a pass began with it, in which these rows are unused
            add_late(path, rows[holes], len(run.blocked.removed))
    keep_own(run.rounds_dir, start, rows)
    return list(_stretches(start, rows))


def _rows_on_disk(rounds_dir: Path, start: int, stop: int) -> IntArray:
    """The own order's rows from a position to another, as the run's history has them."""
    found, known = np.full(stop - start, NO_ROW, np.int64), np.zeros(stop - start, np.bool_)
    for at, rows in read_history(rounds_dir).own:
        low, high = max(at, start), min(at + len(rows), stop)
        if low < high:
            found[low - start : high - start], known[low - start : high - start] = rows[low - at : high - at], True
    if not known.all():
        raise MatesError(
            f"`{rounds_dir}` must have the rows {start} to {stop} of the own order in its `history`, in which rows "
            "were removed, and lacks some. Resume from a checkpoint before the first round, or from one after it."
        )
    return found


def _stretches(start: int, rows: IntArray) -> Iterator[Order]:
    """Rows without a gap; their orders have numbers that no round has."""
    there = np.concatenate([[False], rows != NO_ROW, [False]])
    begins, ends = np.flatnonzero(there[1:] & ~there[:-1]), np.flatnonzero(~there[1:] & there[:-1])
    for number, (low, high) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        yield Order(number=-1 - number, from_position=start + low, rows=rows[low:high], info={})
