"""What a full or broken disk does to a run: it ends, with the folder's name and the way out.

Where it is used: around everything that writes beside the rounds. Trade-off: an error that names no file, and is none
of a disk, is left as it is, because it may be of the user's own code.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mates_hf.errors import MatesError

_DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "ESTALE", "EACCES", "EPERM", "ENOTDIR", "ENAMETOOLONG")
    if hasattr(errno, name)
}


class DiskError(MatesError):
    """Rounds cannot be written where they must go: no such folder, no right to it, no room, or a disk that fails."""


@contextlib.contextmanager
def disk_errors_named(rounds_dir: Path, *, any_of_them: bool = False) -> Iterator[None]:
    """What a disk refuses inside ends the run with its name and the way out.

    Args:
        rounds_dir: where the run's rounds go.
        any_of_them: every `OSError` inside is of the folder; else only those that tell of it, or of a full or broken
            disk.

    Raises:
        DiskError: in place of the `OSError`.
    """
    try:
        yield
    except OSError as error:
        named = isinstance(error.filename, (str, os.PathLike)) and Path(error.filename).is_relative_to(rounds_dir)
        if not (any_of_them or named or (error.filename is None and error.errno in _DISK_ERRORS)):
            raise
        raise DiskError(
            f"Rounds must be written to `{rounds_dir}`, which failed: {error}. Free some space there, or set "
            "`rounds_dir` to a folder that can be written to. Nothing that is finished was lost: resume from the last "
            "checkpoint, and the round is finished."
        ) from error
