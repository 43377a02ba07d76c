"""Rows that a finished round must not have used, read with distrust, and the rows that followed it.

Where it is used: `replay` asks it for each round. Trade-off: which rows `allow` leaves in only the pool knows, so the
hash in `round.json` stands for that; that none of the others was probed, drawn or trained on is recomputed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mates_hf.disk import read_array
from mates_hf.errors import MatesError
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.round_files import ROUND_FILE
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.turns import Mask
from mates_hf.training.blocked import ALLOWED_FILE, read_blocked
from mates_hf.training.order import Order
from mates_hf.training.redact import REDACTED_FILE, REDACTED_PROBES_FILE
from mates_hf.training.replaced import LATE_FILE, REPLACED_FILE, read_late, read_replaced, with_replaced
from mates_hf.training.replay.reader import RoundReader, WrongError, is_whole


class RoundWithBlocked(RoundReader):
    """What of a finished round the rows that it must not use are checked by; `replay` reads the rest.

    Attributes:
        info: its `round.json`.
        num_pool_rows: rows of the pool.
        rows: what it trains on, in order, once they are read.
        consumed: (N,) bool, rows that were trained on before it in its pass.
        waiting: whose turn was still to come when it drew.
        labels: its labels, once they are read.
        probes: what it probed, once the labels are read.
        probed: (N,) bool, rows that earlier rounds probed.
        ledger: has the pool's shuffled order, once it is read.
        blocked: (N,) bool, rows that it must not use; None where all may be.
        gone: (R,) int64 rows that were removed after it was decided.
        redacted: What was taken out of it; None where nothing was.
        entries: (n, 3) int64 of the rows that were replaced in its order.
        late: (n, 2) int64 of the rows that took the place of others before it, after it was decided (`read_late`).
    """

    info: dict[str, Any]
    num_pool_rows: int
    rows: IntArray
    consumed: Mask
    waiting: Mask | None
    labels: InfluenceLabels
    ledger: Ledger
    probes: IntArray
    probed: Mask
    blocked: Mask | None = None
    gone: IntArray = np.zeros(0, np.int64)
    redacted: dict[str, Any] | None = None
    entries: IntArray = np.zeros((0, 3), np.int64)
    late: IntArray = np.zeros((0, 2), np.int64)

    def trained_on(self, following: RoundWithBlocked) -> IntArray:
        """The rows that a round trains on, as the next one knew them when it was decided.

        Args:
            following: the next round.

        Returns:
            (k,) int64: those it decided, but for those that were replaced by then.
        """
        known = self.entries[~np.isin(self.entries[:, 1], following.gone)]
        order = Order(number=0, from_position=self.info["from_position"], rows=self.rows, info={})
        return np.asarray(with_replaced(order, known).rows)

    @property
    def lacks_model(self) -> bool:
        """Whether its influence model was deleted and is not there again."""
        return self.redacted is not None and self.redacted.get("influence_model") in (
            "removed",
            "dropped",
            "not fitted",
        )

    def is_gone(self, rows: IntArray) -> bool:
        """Whether some of these rows were removed after the round was decided."""
        return len(self.gone) > 0 and bool(np.isin(rows, self.gone).any())


def read_redacted(current: RoundWithBlocked) -> None:
    """What was taken out of a round, and which rows of its order were replaced.

    Args:
        current: the round; `gone` is known.

    Raises:
        WrongError: rows were taken out or replaced that were not removed.
    """
    current.entries = read_replaced_of(current)
    try:
        current.late = read_late(current.path)
    except MatesError as error:
        raise WrongError(LATE_FILE, "two numbers for each row", str(error)) from error
    if not (current.path / REDACTED_FILE).exists():
        current.require("redacted" not in current.info, REDACTED_FILE, "the file, as round.json names it", "none")
        return
    assert current.redacted is not None  # it was read with the checksums
    events, names = current.redacted.get("events"), ("probes", "candidates")
    ok = isinstance(events, list) and all(
        isinstance(each, dict) and all(is_whole(each.get(name)) for name in names) for each in events
    )
    current.require(ok and bool(events), REDACTED_FILE, "`events` with `probes` and `candidates`", repr(events))
    counts = {name: sum(each[name] for each in current.redacted["events"]) for name in names}
    told, total = current.info.get("redacted"), sum(counts.values())
    current.require(told == total, ROUND_FILE, f"`redacted` {total}, as {REDACTED_FILE} counts", repr(told))
    probes = redacted_probes(current)
    what = f"{len(probes)} `probes`, as in {REDACTED_PROBES_FILE}"
    current.require(counts["probes"] == len(probes), REDACTED_FILE, what, str(counts["probes"]))
    candidates = read_array(current.path / "candidates.npy", np.int64)
    num = 0 if candidates is None else int(np.count_nonzero(np.isin(candidates, current.gone)))
    what = f"{num} `candidates`, those removed since"
    current.require(counts["candidates"] == num, REDACTED_FILE, what, str(counts["candidates"]))


def redacted_probes(current: RoundWithBlocked) -> IntArray:
    """(r,) int64 rows that a round probed and that were taken out of its labels since.

    Args:
        current: the round.

    Returns:
        The rows; none where nothing was taken out.

    Raises:
        WrongError: a row was taken out that was not removed.
    """
    if not (current.path / REDACTED_PROBES_FILE).exists():
        return np.zeros(0, np.int64)
    found = np.asarray(read_array(current.path / REDACTED_PROBES_FILE, np.int64))
    ok = current.redacted is not None and bool(np.isin(found, current.gone).all())
    current.require(ok, REDACTED_PROBES_FILE, "rows that were removed since", f"{len(found)} rows, others among them")
    return found


def read_replaced_of(current: RoundWithBlocked) -> IntArray:
    """(n, 3) int64 rows that were replaced in a round's order; a removed row each, of the place that is named."""
    try:
        entries = read_replaced(current.path)
    except (MatesError, ValueError) as error:
        raise WrongError(REPLACED_FILE, "three numbers for each replaced row", str(error)) from error
    stand: dict[int, int] = {}
    first = current.info["from_position"]
    for position, old, new in entries.tolist():
        at = position - first
        if 0 <= at < len(current.rows):
            there = stand.get(at, int(current.rows[at]))
            what = f"row {there} at position {position}, as {'an entry before' if at in stand else 'the order'} says"
            current.require(old == there, REPLACED_FILE, what, str(old))
        ok = position >= first and old in current.gone and 0 <= new < current.num_pool_rows
        current.require(ok, REPLACED_FILE, f"a removed row at position {position}", f"row {old}, replaced by {new}")
        stand[at] = new
    return entries


def check_replaced(current: RoundWithBlocked) -> None:
    """What stands in the place of removed rows: unused rows, each once, in the order of the shuffled pool.

    Args:
        current: the round; its draw was checked.

    Raises:
        WrongError: another row stands there.
    """
    new = current.entries[:, 2]
    if not len(new):
        return
    file, numbers = REPLACED_FILE, current.num_pool_rows
    current.require(len(np.unique(new)) == len(new), file, "each new row once", "one more than once")
    used = current.consumed[new] | np.isin(new, current.rows)
    used |= np.isin(new, np.concatenate([current.labels.candidate_id, redacted_probes(current)]))
    used |= False if current.blocked is None else current.blocked[new]
    current.require(not used.any(), file, "unused rows that were not probed", f"row {new[used][:1].tolist()}")
    if current.waiting is None:
        place = np.empty(numbers, np.int64)
        place[np.roll(current.ledger.shuffled, -int(current.info["cursor"]))] = np.arange(numbers)
        ok = bool((np.diff(place[new]) > 0).all())
        current.require(ok, file, "rows in the order of the shuffled pool", "another order")


def check_late(current: RoundWithBlocked, before: RoundWithBlocked | None) -> None:
    """What took the place of removed rows before a round, after it was decided: rows that it knew to be unused.

    Args:
        current: the round; its draw was checked.
        before: the round before it, where it is on disk and of the same pass.

    Raises:
        WrongError: another row stands there, or one that the round before trains on is missing.
    """
    late, numbers = current.late[:, 0], current.num_pool_rows
    ok = bool(((late >= 0) & (late < numbers)).all()) and len(np.unique(late)) == len(late)
    current.require(ok, LATE_FILE, f"rows of the pool, below {numbers}, each once", f"{late.tolist()[:8]}")
    used = current.consumed[late] | np.isin(late, np.concatenate([current.rows, current.probes]))
    used |= False if current.blocked is None else current.blocked[late]
    current.require(not used.any(), LATE_FILE, "unused rows that were not probed", f"row {late[used][:1].tolist()}")
    if before is None:
        return
    since = np.isin(before.entries[:, 1], current.gone) & (before.entries[:, 0] < current.info["from_position"])
    missing = np.setdiff1d(before.entries[since, 2], late)
    what = f"the rows that replaced others in round {before.info['number']} since"
    current.require(not len(missing), LATE_FILE, what, f"row {missing[:1].tolist()} missing")


def read_blocked_of(current: RoundWithBlocked) -> Mask | None:
    """The rows that a round was not to use.

    Args:
        current: the round.

    Returns:
        (N,) bool; None where all could be used.

    Raises:
        WrongError: a file is not the one that the round records.
    """
    has_rule = current.info["config"].get("allow") is not None
    what = f"{'' if has_rule else 'no '}`allowed`, as `allow` of the config {'is' if has_rule else 'is not'} set"
    current.require(("allowed" in current.info) == has_rule, ROUND_FILE, what, repr(current.info.get("allowed")))
    num_removed = current.info.get("num_removed", 0)
    try:
        found = read_blocked(current.path.parent, current.info, current.num_pool_rows)
    except (MatesError, OSError) as error:
        raise WrongError(f"../{ALLOWED_FILE}", "the rows that may be used", str(error)) from error
    ok = is_whole(num_removed) and 0 <= num_removed <= len(found.removed)
    current.require(ok, ROUND_FILE, f"`num_removed` up to {len(found.removed)}", repr(num_removed))
    current.gone = found.removed[num_removed:]
    read_redacted(current)
    return found.mask_of(num_removed)


def read_probed(current: RoundWithBlocked, before: RoundWithBlocked | None) -> Mask:
    """The rows that earlier rounds probed, which a round draws its own apart from.

    Args:
        current: the round.
        before: the round before it, where it is on disk.

    Returns:
        (N,) bool.

    Raises:
        WrongError: they are not those.
    """
    bits = current.array("probed.npy", np.uint8, -(-current.num_pool_rows // 8))
    seed, first = current.info["config"]["selection_seed"], current.info["config"]["random_rounds"]
    try:
        found = Ledger.from_bits(np.asarray(bits), current.num_pool_rows, seed, 0).consumed
    except ValueError as error:
        raise WrongError("probed.npy", f"the bits of {current.num_pool_rows} rows", str(error)) from error
    expected = None
    if before is not None:
        expected = before.probed.copy()
        expected[before.probes] = True
    elif current.info["number"] == first:
        expected = np.zeros(current.num_pool_rows, np.bool_)
    wrong = np.flatnonzero(found != expected) if expected is not None else np.zeros(0, np.int64)
    told = f"{len(wrong)} rows, first row {int(wrong[0])}," if len(wrong) else "none"
    current.require(
        not len(wrong), "probed.npy", "the rows that earlier rounds probed",
        f"{told} the first that is told otherwise",
    )  # fmt: skip
    return found


def consumed_after(before: RoundWithBlocked, following: RoundWithBlocked) -> Mask:
    """(N,) bool, a new array: rows trained on before a round, those put there until the next one was decided too."""
    found: Mask = before.consumed.copy()
    found[before.late[before.late[:, 1] <= following.info.get("num_removed", 0), 0]] = True
    return found


def rows_between(before: RoundWithBlocked, following: RoundWithBlocked, num_more: int) -> IntArray:
    """The rows trained on after those of a round and before those of the next one.

    Args:
        before: the round.
        following: the next one.
        num_more: how many they are.

    Returns:
        (num_more,) int64 pool rows; none where the number is not above 0.

    Raises:
        WrongError: the pool has too few rows.
    """
    if num_more <= 0:
        return np.zeros(0, np.int64)
    ledger = before.ledger
    ledger.consumed, ledger.waiting, ledger.blocked = consumed_after(before, following), before.waiting, before.blocked
    ledger.cursor = int(before.info["cursor"])
    exclude = np.concatenate([before.probes, before.entries[:, 2]])
    try:
        found = ledger.rows_after(before.rows, num_more, exclude=exclude)
    except MatesError as error:
        what = f"rows enough after those of round {before.info['number']}"
        raise WrongError(ROUND_FILE, what, str(error)) from error
    order = Order(number=0, from_position=before.info["from_position"] + len(before.rows), rows=found, info={})
    known = before.entries[~np.isin(before.entries[:, 1], following.gone)]
    return np.asarray(with_replaced(order, known).rows)
