"""A change of many files that happens whole or not at all: written aside, decided by one rename, then carried out.

Where it is used: `forget` changes several rounds at once. Killed before the rename, nothing was changed, and what was
written aside is thrown away. Killed after it, the next `forget`, or the run when it resumes, carries out the rest.

Trade-off: files that change are on disk twice for a moment. While a change is being carried out, a round may be half
old and half new; `verify` says so, and whoever holds the lock finishes it first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mates_hf.disk import make_directory, read_json, replace_path, sync_directory, sync_tree, write_json
from mates_hf.training.lock import RoundsLock

logger = logging.getLogger(__name__)

FOLDER = "forget"  # holds a change that is decided
PARTIAL = "forget.partial"  # holds one that is being written
JOURNAL_FILE = "journal.json"
_FILES = "files"


class Change:
    """A change in the making.

    Args:
        rounds_dir: the folder whose files change; its lock must be held.
    """

    def __init__(self, rounds_dir: Path) -> None:
        self.rounds_dir, self._folder = rounds_dir, rounds_dir / PARTIAL
        self._put: list[str] = []
        self._delete: list[str] = []
        shutil.rmtree(self._folder, ignore_errors=True)
        make_directory(self._folder / _FILES)

    def put(self, name: str) -> Path:
        """Where to write what a file is to hold.

        Args:
            name: the file's path below the folder.

        Returns:
            The path to write to.
        """
        path = self._folder / _FILES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in self._put:
            self._put.append(name)
        return path

    def delete(self, name: str) -> None:
        """Have a file or a folder deleted, whether or not it is there.

        Args:
            name: its path below the folder.
        """
        self._delete.append(name)

    def decide(self, about: Mapping[str, Any]) -> None:
        """From here on the change happens, whoever carries it out.

        Args:
            about: what it is, JSON values.
        """
        write_json(self._folder / JOURNAL_FILE, {**about, "put": self._put, "delete": self._delete})
        sync_tree(self._folder)
        replace_path(self._folder, self.rounds_dir / FOLDER)


def is_pending(rounds_dir: Path) -> bool:
    """Whether a change of a folder was decided and is not carried out."""
    return (rounds_dir / FOLDER / JOURNAL_FILE).exists()


def carry_out(rounds_dir: Path) -> None:
    """Carry out a change that was decided, as far as that was not done; throw away one that was not.

    Args:
        rounds_dir: the folder; its lock must be held.

    Raises:
        OSError: the disk failed; the next call continues.
        MatesError: the journal is damaged.
    """
    folder = rounds_dir / FOLDER
    if is_pending(rounds_dir):
        journal = read_json(folder / JOURNAL_FILE)
        for name in journal["put"]:
            source, target = folder / _FILES / name, rounds_dir / name
            if source.exists():
                os.replace(source, target)
                sync_directory(target.parent)
        for name in journal["delete"]:
            _delete(rounds_dir / name)
        (folder / JOURNAL_FILE).unlink()
    for path in (folder, rounds_dir / PARTIAL):
        if path.exists():
            shutil.rmtree(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def finish_pending(rounds_dir: Path) -> bool:
    """Before a run reads a folder: carry out what a killed `forget` had decided.

    Args:
        rounds_dir: where the run's rounds are.

    Returns:
        Whether there was anything to do.

    Raises:
        LockedError: a live run, or another `forget`, holds the folder.
    """
    if not (rounds_dir / FOLDER).exists():
        return False
    with held(rounds_dir):
        carry_out(rounds_dir)
    logger.warning("A `mates-hf forget` of `%s` was stopped in the middle: it is finished now.", rounds_dir)
    return True


class _Owner:
    """Holds a lock for as long as it lives."""


@contextlib.contextmanager
def held(rounds_dir: Path) -> Iterator[RoundsLock]:
    """Hold the lock of a folder of rounds inside.

    Args:
        rounds_dir: the folder.

    Yields:
        The lock.

    Raises:
        LockedError: a live run holds it.
    """
    owner = _Owner()
    lock = RoundsLock(rounds_dir, owner)
    try:
        yield lock
    finally:
        lock.release()
