"""Compiled loops that are compiled once a machine: `compiled` is `numba.njit(nogil=True)` with a cache on disk.

Where it is used: by every compiled loop. Compiling the loops takes seconds, so without a cache each worker process
would begin with them. Trade-off: numba's own files are not taken over whole. Its index gives the code for one type or
processor to another where two processes write at once, and a fault of the disk ends a run. Here each file is named by
all that it depends on and ends with its checksum. So writers cannot mix, and a file that is not whole counts as none.

The folder is numba's: `NUMBA_CACHE_DIR`, else `__pycache__` next to the source, else the user's own cache. What lies
there is code, as `.pyc` files are. Where no folder can be written to, or others may write to it, nothing is kept.
"""

# mypy: allow-untyped-calls
# (numba types little of what is used here)

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_OTHERS_MAY_WRITE = 0o002


def compiled(function: Any) -> Any:
    """Compile a function for each kind of arguments on first use, and keep what was compiled on disk.

    Args:
        function: What numba can compile; it lets go of the interpreter while it runs.

    Returns:
        The compiled function.
    """
    dispatcher: Any = numba.njit(nogil=True)(function)
    try:
        dispatcher._cache = _Cache(function)
    except Exception as error:  # there is no folder, or this numba keeps its files in another way
        _say_not_kept(function.__name__, error)
    return dispatcher


def _say_not_kept(name: Any, why: object) -> None:
    logger.debug("What is compiled of `%s` is not kept: %s", name, why)


class _Cache(FunctionCache):
    """What numba asks before it compiles, and gives what it compiled. No fault of a file ends anything."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        _require_private(self._cache_path)
        stamp = hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _say_not_kept(self._name, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _say_not_kept(self._name, error)


class _Files(IndexDataCacheFile):
    """A file for each kind of arguments, processor, and version of numba and of the source; there is no index."""

    def save(self, key: Any, data: Any) -> None:
        content = self._dump(data)
        with self._open_for_write(self._data_path(self._name(key))) as file:
            file.write(content + hashlib.sha256(content).digest())

    def load(self, key: Any) -> Any:
        try:
            content = Path(self._data_path(self._name(key))).read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
            return None
        return self._load_data(self._name(key))  # which does not look behind the end of what was dumped

    def _name(self, key: Any) -> str:
        depends_on = repr((key, self._source_stamp, self._version)).encode()
        return str(self._data_name(0)).replace(".0.", f".{hashlib.sha256(depends_on).hexdigest()[:32]}.")


def _require_private(folder: str) -> None:
    """Raise where somebody else may put code into a folder."""
    if not hasattr(os, "getuid"):  # on Windows access is not in the mode
        return
    facts = os.stat(folder)
    if facts.st_mode & _OTHERS_MAY_WRITE or facts.st_uid not in (os.getuid(), 0):
        raise PermissionError(f"`{folder}` is of another user, or others may write to it")
