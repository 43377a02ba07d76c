"""`mates-hf audit`: a listing of what a run trained on, to be signed off by whoever answers for it.

Where it is used: after a run. It reads the run's files, and the dataset where counts by a column are asked for, and
changes nothing. `verify` says whether the files are what they must be, and `where` which rows were trained on.

Trade-off: it says what the files of the run say, and which checks stand behind that. What other programs on the
machine did with the data is not in them, and the listing does not claim to know it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.answering.rows_asked import open_dataset, require_same_pool
from mates_hf.answering.where import RunFiles, Stretch, open_run
from mates_hf.data.groups import read_groups
from mates_hf.disk import read_json, write_array
from mates_hf.paths import expand_path
from mates_hf.records import IntArray
from mates_hf.round_files import CHECKSUMS_FILE, ROUND_FILE, read_checksums
from mates_hf.training.blocked import EVENTS_FILE, read_removed
from mates_hf.training.verify import verify_run


@dataclasses.dataclass(frozen=True)
class Listing:
    """What `audit_run` found.

    Attributes:
        facts: all of it, as JSON values.
        used: (U,) int64 rows that are known to be trained on, ascending.
    """

    facts: Mapping[str, Any]
    used: IntArray

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return bool(self.facts["verify"]["ok"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(self.facts)

    def lines(self) -> Iterator[str]:
        """The listing for a person, with a place to sign."""
        facts = self.facts
        pool, used, removed, verify = (facts[name] for name in ("pool", "trained_on", "forgotten", "verify"))
        yield f"{'run':<18} {facts['run']}"
        yield f"{'listed':<18} {facts['date']}"
        yield f"{'pool':<18} {pool['num_rows']:,} rows"
        yield f"{'':<18} SHA-256 of fixed rows of it {pool.get('rows_sha256', 'not recorded')}"
        yield f"{'columns':<18} {pool.get('features', 'not recorded')}"
        yield f"{'allowed':<18} {_allowed_text(facts)}"
        done = "as far as is known, " if used["done_positions"] is None or used["unknown_positions"] else ""
        yield f"{'trained on':<18} {done}{used['rows']:,} rows, {used['times']:,} times in all"
        yield f"{'':<18} SHA-256 of their numbers {used['sha256']}"
        for start, stop in used["unknown_positions"]:
            yield f"{'':<18} not known: the rows at positions {start} to {stop}"
        for name, counts in facts["columns"].items():
            yield f"{'by ' + name:<18} {counts['source']}"
            for entry, each in counts["entries"].items():
                of = f" of {each['rows']:,}" if "rows" in each else ""
                yield f"{'':<18} {entry}: {each['used']:,}{of}"
        before = f"{removed['trained_on_before']:,} of them had been trained on"
        yield f"{'forgotten':<18} {removed['rows']:,} rows; {before}"
        for event in removed["events"]:
            yield f"{'':<18} {event['date']}: {event['count']:,} rows, SHA-256 of their numbers {event['sha256']}"
        yield f"{'left the machine':<18} {facts['left_the_machine']['statement']}"
        for check, holds in facts["left_the_machine"]["checked"].items():
            yield f"{'':<18} {'yes' if holds else 'NO '} {check}"
        state = "every check holds" if verify["ok"] else f"WRONG: {verify['problem']}"
        yield f"{'verified':<18} {verify['rounds']} rounds, {verify['files']} files by their checksums: {state}"
        for name, versions in facts["versions"].items():
            yield f"{name:<18} {', '.join(versions)}"
        yield ""
        yield "Signed off by: ______________________    Date: ______________"


def audit_run(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    dataset: Any = None,
    rows_out: str | os.PathLike[str] | None = None,
) -> Listing:
    """List what a run trained on, and what stands behind it.

    Args:
        path: a run's `output_dir`, or the directory that holds its rounds.
        column: Column by which the rows are counted, such as their licence. Needs `dataset`, or rounds that recorded
            it as their `group_column`.
        dataset: The pool as the run had it: a dataset, files, a folder, or a name on the Hub.
        rows_out: File for the numbers of the rows that were trained on, as `.npy`.

    Returns:
        The listing.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the column cannot be counted by, or the dataset is not the run's pool.
        MatesError: the run trains on a stream, or a file is damaged.
    """
    run = open_run(path, "mates-hf audit")
    stretches = run.stretches()
    times = _times(run, stretches)
    used = np.flatnonzero(times).astype(np.int64)
    infos = [read_json(each / ROUND_FILE) for each in run.rounds.values()]
    newest = infos[-1] if infos else {}
    removed = read_removed(run.rounds_dir, run.num_rows)
    facts = {
        "run": str(run.rounds_dir),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "pool": dict(run.pool),
        "reference": newest.get("reference"),
        "model": newest.get("model"),
        "allow": newest.get("config", {}).get("allow"),
        "allowed": newest.get("allowed"),
        "trained_on": {
            "rows": len(used),
            "times": int(times.sum()),
            "sha256": hashlib.sha256(used.astype("<i8").tobytes()).hexdigest(),
            "done_positions": run.done,
            "unknown_positions": [list(gap) for gap in run.unknown(stretches)],
        },
        "columns": {} if column is None else {column: _counts(column, dataset, run, times, infos)},
        "forgotten": {
            "rows": len(removed),
            "trained_on_before": int(np.count_nonzero(times[removed])),
            "events": _events(run.rounds_dir),
        },
        "left_the_machine": _left_the_machine(run.rounds_dir),
        "verify": _verified(run),
        "versions": _versions(infos),
    }
    if rows_out is not None:
        write_array(expand_path(rows_out), used)
    return Listing(facts, used)


def _times(run: RunFiles, stretches: list[Stretch]) -> IntArray:
    """(N,) int64, how often each row is known to be trained on."""
    found = np.zeros(run.num_rows, np.int64)
    for stretch in stretches:
        num = len(stretch.rows) if run.done is None else max(run.done - stretch.start, 0)
        rows = np.asarray(stretch.rows[:num])
        np.add.at(found, rows[rows >= 0], 1)
    return found


def _counts(column: str, dataset: Any, run: RunFiles, times: IntArray, infos: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows by their entry in a column: of the dataset, or as rounds recorded them."""
    if dataset is not None:
        opened = open_dataset(dataset)
        proven = require_same_pool(opened, run.pool)
        groups = read_groups(opened, column)
        every = np.bincount(groups.codes, minlength=len(groups.names)).tolist()
        got = np.bincount(groups.codes[times > 0], minlength=len(groups.names)).tolist()
        entries = {
            name: {"rows": rows, "used": used} for name, rows, used in zip(groups.names, every, got, strict=True)
        }
        what = "whose tokens are those of the pool" if proven else "whose tokens could not be compared with the pool"
        return {"source": f"rows trained on, of the dataset, {what}", "proven": proven, "entries": entries}
    recorded = [info for info in infos if info.get("config", {}).get("group_column") == column]
    if not recorded:
        raise ValueError(
            f"`column` must be counted in the dataset (`dataset`, `--dataset`), or be the `group_column` of the run, "
            f"got {column!r} alone. Pass the pool as the run had it."
        )
    chosen: dict[str, dict[str, int]] = {}
    for info in recorded:
        for name, each in info.get("groups", {}).items():
            chosen.setdefault(name, {"used": 0})["used"] += int(each.get("chosen", 0))
    text = "rows that rounds chose, as they recorded it; those of the own order are not in it"
    return {"source": text, "proven": True, "entries": dict(sorted(chosen.items()))}


def _events(rounds_dir: Path) -> list[dict[str, Any]]:
    """When rows were removed, and how many."""
    path = rounds_dir / EVENTS_FILE
    found = read_json(path).get("events", []) if path.exists() else []
    return [{name: event.get(name) for name in ("date", "count", "sha256")} for event in found]


def _left_the_machine(rounds_dir: Path) -> dict[str, Any]:
    """What can be said of what left the machine, and what was looked at for it."""
    links = [path for path in rounds_dir.rglob("*") if path.is_symlink()]
    return {
        "statement": (
            "nothing by mates_hf, which sends no data and no telemetry. Trackers that the run reports to get numbers."
        ),
        "checked": {
            "the folder of the rounds begins with `_`, and the upload of the Trainer to the Hub leaves such out":
                rounds_dir.name.startswith("_"),
            "no file in that folder is a link to another place": not links,
        },
    }  # fmt: skip


def _verified(run: RunFiles) -> dict[str, Any]:
    """What `verify` says, and how many files have a checksum."""
    if not run.rounds:
        return {"ok": True, "rounds": 0, "files": 0, "problem": None}
    result = verify_run(run.rounds_dir)
    files = sum(len(read_checksums(path)) for path in run.rounds.values() if (path / CHECKSUMS_FILE).exists())
    problem = None if result.problem is None else str(result.problem)
    return {"ok": problem is None, "rounds": len(result.rounds), "files": files, "problem": problem}


def _versions(infos: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Versions of the libraries that the rounds were made with."""
    found: dict[str, set[str]] = {}
    for info in infos:
        for name, version in info.get("versions", {}).items():
            found.setdefault(name, set()).add(str(version))
    return {name: sorted(versions) for name, versions in sorted(found.items())}


def _allowed_text(facts: Mapping[str, Any]) -> str:
    """What was allowed, in words."""
    if facts["allowed"] is None:
        return "all rows; no `allow` was set"
    return f"{facts['allowed']['num_rows']:,} rows, by {facts['allow']}"
