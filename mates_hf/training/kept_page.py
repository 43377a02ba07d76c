"""What a run keeps for its page beside its rounds: texts, and thumbnails with labels, of the rows shown last.

Where it is used: `run_report` writes and reads these files; `forget` takes rows out of them. Trade-off: no round
depends on them, so they are read with distrust, and what is not as it must be counts as not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mates_hf.disk import read_json, write_json
from mates_hf.errors import MatesError
from mates_hf.records import IntArray
from mates_hf.reporting.page.examples import checked_media, checked_texts
from mates_hf.reporting.report import IMAGES_FILE, PAGE_FILE, TEXTS_FILE
from mates_hf.training.journal import Change

_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    TEXTS_FILE: checked_texts,
    IMAGES_FILE: checked_media,
}


def read_kept(path: Path) -> dict[str, Any] | None:
    """What a run kept.

    Args:
        path: `report-texts.json` or `report-images.json`.

    Returns:
        Its content; None where there is none, or where it is not as it must be.
    """
    try:
        return _CHECKS[path.name](read_json(path)) if path.exists() else None
    except (KeyError, TypeError, ValueError, AttributeError, MatesError):
        return None


def keep(path: Path, content: Mapping[str, Any] | None) -> None:
    """Write what the page shows, or delete what an earlier page showed.

    Args:
        path: The file.
        content: JSON values; None deletes the file.
    """
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_plainly(path, json.dumps(content).encode())


def delete_shown(rounds_dir: Path, names: Iterable[str]) -> None:
    """Delete what earlier pages of a run showed, and their page with it: the run may not show it any more.

    Args:
        rounds_dir: The folder of the rounds.
        names: Files that the run kept for its page.
    """
    there = [rounds_dir / name for name in names if (rounds_dir / name).exists()]
    for path in [*there, *([rounds_dir / PAGE_FILE] if there else [])]:
        path.unlink(missing_ok=True)


def leave_out(change: Change, rows: IntArray, *, with_model: bool) -> bool:
    """Take rows out of what a run kept for its page, and delete the page itself, which may show them.

    Args:
        change: Takes the files.
        rows: (R,) int64 rows to leave out.
        with_model: Whether n-grams stay; they are of an influence model, which may be made of these rows.

    Returns:
        Whether there was a page.
    """
    gone = set(rows.tolist())
    for name in _CHECKS:
        path = change.rounds_dir / name
        found = read_kept(path)
        if found is None:
            change.delete(name)
            continue
        examples = found["examples"].items()
        found["examples"] = {kind: [one for one in entries if one["row"] not in gone] for kind, entries in examples}
        if "ngrams" in found and not with_model:
            found["ngrams"] = None
        write_json(change.put(name), found)
    change.delete(PAGE_FILE)
    return (change.rounds_dir / PAGE_FILE).exists()


def write_plainly(path: Path, content: bytes) -> None:
    """Write a file that nothing depends on: whole for its readers, and not flushed to disk.

    Args:
        path: The file.
        content: Its bytes.
    """
    temporary = path.with_name(path.name + ".run.tmp")  # not that of somebody who writes a page of the run meanwhile
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
