"""A finished round without some rows: what of its files was made of their text is left out, and what is left adds up.

Where it is used: `forget` rewrites each round through this, into a `journal.Change`. What stays of a removed row is
its number, where it stood in the order, and which group it was of. Its labels, its predicted influence, its length,
the hash of its text and what was said of its words go.

Trade-off: a round that lost rows cannot be recomputed in full. `verify` still draws its candidates and probes again
and follows its order; what hung on the values that are gone it takes as recorded, and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.disk import json_bytes, read_array, read_json, sha256_of, write_array, write_json, written_whole
from mates_hf.records import IntArray
from mates_hf.round_files import CHECKSUMS_FILE, PROBES_FILE, ROUND_FILE, read_checksums, read_labels, write_labels
from mates_hf.selection.ledger import probed_rows
from mates_hf.training.journal import Change
from mates_hf.training.trust import GAP_FILE, SENTINEL_FILE

REDACTED_FILE = "redacted.json"
REDACTED_PROBES_FILE = "redacted.npy"  # (r,) int64 rows that were probed and taken out of the labels
MODEL_DIR = "influence_model"


def event_of(rows: IntArray, date: str) -> dict[str, Any]:
    """What is kept of a removal: when, how many rows, and a digest of their numbers."""
    digest = hashlib.sha256(np.sort(rows).astype("<i8").tobytes()).hexdigest()
    return {"date": date, "count": len(rows), "sha256": digest}


def probed_by(path: Path) -> IntArray:
    """(P,) int64 pool rows that a finished round probed, those that were taken out since among them."""
    gone = read_array(path / REDACTED_PROBES_FILE, np.int64)
    found = probed_rows(read_labels(path / PROBES_FILE))
    return found if gone is None else np.concatenate([found, gone])


def is_touched(path: Path, rows: IntArray) -> tuple[bool, bool]:
    """Whether some rows are among the labels of a finished round, and among its candidates."""
    candidates = read_array(path / "candidates.npy", np.int64)
    in_labels = bool(np.isin(probed_rows(read_labels(path / PROBES_FILE)), rows).any())
    return in_labels, candidates is not None and bool(np.isin(candidates, rows).any())


def redact_round(change: Change, path: Path, rows: IntArray, event: Mapping[str, Any], model: str | None) -> None:
    """Write what the files of a round are to hold without some rows.

    Args:
        change: takes the files.
        path: the finished round.
        rows: (R,) int64 rows to leave out.
        event: `event_of` the removal.
        model: What becomes of the influence model: `"removed"`, to be fitted again when the run resumes, or
            `"dropped"`; None leaves it.
    """
    files: dict[str, Path] = {}

    def put(name: str) -> Path:
        files[name] = change.put(f"{path.name}/{name}")
        return files[name]

    info = read_json(path / ROUND_FILE)
    num_probes = _labels_without(path, rows, info, put)
    num_candidates = _scores_without(path, rows, put)
    _checks_without(path, rows, put)
    if model is not None:
        change.delete(f"{path.name}/{MODEL_DIR}")
    told = read_json(path / REDACTED_FILE) if (path / REDACTED_FILE).exists() else {"events": []}
    mine = {**event, "probes": num_probes, "candidates": num_candidates}
    state = model or told.get("influence_model", "kept")
    events: list[dict[str, Any]] = [*told["events"], mine]
    write_json(put(REDACTED_FILE), {"events": events, "influence_model": state})
    info["redacted"] = sum(each["probes"] + each["candidates"] for each in events)
    _words_without(path, rows, info)
    write_json(put(ROUND_FILE), info)
    checksums = {name: digest for name, digest in read_checksums(path).items() if name not in files}
    if model is not None:
        checksums = {name: digest for name, digest in checksums.items() if not name.startswith(f"{MODEL_DIR}/")}
    unlisted = [name for name in files if name.startswith("check-") or name == SENTINEL_FILE]
    checksums |= {name: sha256_of(file) for name, file in files.items() if name not in unlisted}
    checksums |= {name: sha256_of(files[name]) for name in unlisted if name in read_checksums(path)}
    checksums[ROUND_FILE] = hashlib.sha256(json_bytes(info)).hexdigest()
    write_checksums_of(change.put(f"{path.name}/{CHECKSUMS_FILE}"), checksums)


def write_checksums_of(path: Path, checksums: Mapping[str, str]) -> None:
    """Write `SHA256SUMS` of known digests.

    Args:
        path: the file.
        checksums: SHA-256 by name.
    """
    with written_whole(path) as file:
        file.writelines(f"{digest}  {name}\n".encode() for name, digest in checksums.items())


def _labels_without(path: Path, rows: IntArray, info: dict[str, Any], put: Any) -> int:
    """Labels, and what is one entry a label; how many probed rows are left out."""
    labels = read_labels(path / PROBES_FILE)
    gone = np.intersect1d(probed_rows(labels), rows)
    if not len(gone):
        return 0
    kept = ~np.isin(labels.candidate_id, rows)
    skipped = [row for row in labels.info.get("skipped", ()) if row not in set(gone.tolist())]
    about = {**labels.info, **({"skipped": skipped} if "skipped" in labels.info else {})}
    rest = labels.take(kept)
    write_labels(put(PROBES_FILE), type(labels)(**{**vars(rest), "info": about}))
    for name in ("token_derivatives.npy", "reference_losses.npy"):
        if (path / name).exists():
            put(name)
    bought = read_array(path / GAP_FILE, np.float32)
    if bought is not None:
        write_array(put(GAP_FILE), np.asarray(bought)[kept])
    before = read_array(path / REDACTED_PROBES_FILE, np.int64)
    write_array(put(REDACTED_PROBES_FILE), gone if before is None else np.concatenate([before, gone]))
    if "skipped" in info.get("probe", {}):
        info["probe"]["skipped"] = skipped
    return len(gone)


def _scores_without(path: Path, rows: IntArray, put: Any) -> int:
    """Values of candidates, with nothing in the place of those left out; how many these are."""
    candidates = read_array(path / "candidates.npy", np.int64)
    if candidates is None:
        return 0
    gone = np.isin(candidates, rows)
    if not gone.any():
        return 0
    for name, dtype, nothing in (
        ("scores.npy", np.float32, np.nan), ("num_targets.npy", np.int32, 0), ("hashes.npy", np.uint64, 0),
    ):  # fmt: skip
        found = read_array(path / name, dtype)
        if found is not None:
            values = np.array(found)
            values[gone] = nothing
            write_array(put(name), values)
    return int(np.count_nonzero(gone))


def _checks_without(path: Path, rows: IntArray, put: Any) -> None:
    """What was measured inside of the round."""
    gone = set(rows.tolist())
    for file in [*sorted(path.glob("check-*.json")), path / SENTINEL_FILE]:
        check = read_json(file) if file.exists() else {}
        ids = check.get("candidate_id", [])
        kept = [at for at, row in enumerate(ids) if row not in gone]
        if len(kept) < len(ids):
            for name in ("candidate_id", "influence_per_token", "num_tokens"):
                if name in check:
                    check[name] = [check[name][at] for at in kept]
            write_json(put(file.name), check)


def _words_without(path: Path, rows: IntArray, info: dict[str, Any]) -> None:
    """What the record says of words, which may be those of a row that is left out."""
    selection = read_array(path / "selection.npy", np.int64)
    if selection is None or not np.isin(selection, rows).any():
        return
    if info.get("bought_most"):
        info["bought_most"] = []
    overlap = info.get("reference_overlap")
    if isinstance(overlap, dict):
        overlap["examples"] = [row for row in overlap.get("examples", []) if row not in set(rows.tolist())]
