"""A round's directory in the making: how it gets its name, and what becomes of one that stood there before.

Where it is used: left of every folder, on top of `round_files`, which reads what is finished. `training/` writes
through `RoundWriter` and sets directories aside.

Trade-off: what another attempt left is never deleted here, since a start made by mistake must not cost the record of
the run it was mistaken for. It takes room on disk until `keep_rounds` prunes it or someone deletes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.disk import make_directory, read_array, read_json, replace_path, sha256_of, write_json
from mates_hf.errors import MatesError, RoundMismatchError
from mates_hf.round_files import KEY_FILE, ROUND_FILE, read_checksums, round_path, write_checksums

_STALE = re.compile(r"\.stale-(\d+)$")


def is_whole(path: Path, order_sha256: str | None = None) -> bool:
    """Whether a directory holds all of a finished round, whatever its name: every file as its checksum says.

    Args:
        path: the directory.
        order_sha256: the order it must have decided on; None takes any.

    Returns:
        True where `round.json` and the checksums are there, every file is as it was written, and the order has the
        hash that `round.json` says.
    """
    try:
        if not (path / ROUND_FILE).exists():
            return False
        info, checksums = read_json(path / ROUND_FILE), read_checksums(path)
        if ROUND_FILE not in checksums or info.get("order_sha256") is None:
            return False
        if order_sha256 is not None and info["order_sha256"] != order_sha256:
            return False
        rows = next((path / name for name in ("selection.npy", "own_order.npy") if (path / name).exists()), None)
        order = None if rows is None else read_array(rows, np.int64)
        if order is None or hashlib.sha256(np.ascontiguousarray(order).tobytes()).hexdigest() != info["order_sha256"]:
            return False
        return all(sha256_of(path / name) == digest for name, digest in checksums.items())
    except (OSError, MatesError):  # a file that is missing, cut short or not to be read
        return False


class RoundWriter:
    """A round in the making: stage results in `round-0003.partial`, renamed to `round-0003` when complete.

    Safe to kill at any instant, and to cut the power: each stage's file appears whole or not at all, `round.json` is
    written last and the rename follows it; where the rename alone was lost, it is made up for. A rerun with the same
    key finds the finished stages; with another weights digest it sets the old directory aside as `.stale`; with
    another config or pool it refuses.

    Args:
        rounds_dir: `<output_dir>/_mates`.
        number: the round's number.
        key: what the round depends on: `config`, `pool`, `reference`, `step` and `weights`, plain JSON values.

    Raises:
        RoundMismatchError: a directory of that number was made with another config, pool or reference; both values
            are shown.
    """

    def __init__(self, rounds_dir: Path, number: int, key: Mapping[str, Any]) -> None:
        self.final_path = round_path(rounds_dir, number)
        self.path = self.final_path.with_suffix(".partial")
        self.key = json.loads(json.dumps(dict(key)))
        for path in (self.final_path, self.path):
            self._reconcile(path)
        if self.final_path.exists() and not self.complete:  # what vouches for it is gone, which no kill does
            replace_path(self.final_path, self.path) if not self.path.exists() else set_aside(self.final_path)
        if self.complete:
            return
        if is_whole(self.path):
            replace_path(self.path, self.final_path)
        elif not (self.path / KEY_FILE).exists():
            make_directory(self.path)
            write_json(self.path / KEY_FILE, self.key)

    def _reconcile(self, path: Path) -> None:
        """Keep a directory whose key matches, set a stale one aside, refuse one of another config or pool."""
        if not path.exists():
            return
        key_path = path / KEY_FILE
        found = read_json(key_path) if key_path.exists() else None
        if found == self.key or (found is None and all(file.suffix == ".tmp" for file in path.iterdir())):
            return
        if found is not None:
            for name in ("config", "pool", "reference"):
                if found.get(name) != self.key.get(name):
                    raise RoundMismatchError(
                        f"`{path}` was made with another {name}: it has {found.get(name)}, this run has "
                        f"{self.key.get(name)}. Use another `output_dir` or `rounds_dir`, or the {name} it was made "
                        "with."
                    )
        set_aside(path)

    @property
    def complete(self) -> bool:
        """True where a finished round of this key is already on disk."""
        return (self.final_path / ROUND_FILE).exists()

    def finish(self, info: Mapping[str, Any]) -> Path:
        """Write the checksums and `round.json`, rename the directory to its final name and return that."""
        write_checksums(self.path, info)
        write_json(self.path / ROUND_FILE, info)
        replace_path(self.path, self.final_path)
        return self.final_path


def is_set_aside(path: Path) -> bool:
    """Whether a directory's name is one that `set_aside` gives."""
    return re.fullmatch(r"round-\d+\.stale(-\d+)?", path.name) is not None


def set_aside(path: Path) -> Path:
    """Rename a directory to `<name>.stale`, `.stale-2` and so on, the first one free, and return the new path."""
    first = path.with_name(path.name.removesuffix(".partial") + ".stale")
    taken = [1] if os.path.lexists(first) else []
    taken += [int(found[1]) for other in first.parent.glob(f"{first.name}-*") if (found := _STALE.search(other.name))]
    stale = first.with_name(f"{first.name}-{max(taken) + 1}") if taken else first
    replace_path(path, stale)
    return stale
