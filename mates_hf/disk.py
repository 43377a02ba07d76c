"""Files and folders that are there whole or not at all, also after a power cut, and what to do where a disk is full.

Where it is used: left of every folder; `round_files` writes and reads through it, and so does everything that a
killed run must find again. A rename is on disk only once the folder that holds the name was flushed as well: until
then a power cut, or a file server that crashes, takes it back. What is read is distrusted: a damaged file is a
`MatesError` that names it.

Trade-off: two flushes a file, some milliseconds each, for a few dozen files a round.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mates_hf.errors import MatesError

logger = logging.getLogger(__name__)

COPY_AGAIN = "Copy the directory again from where it was written."

# A platform or a file system that cannot flush a folder, or a folder that may be written to and not read.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}


def sync_directory(path: Path) -> None:
    """Flush the names that a folder holds to disk; does nothing where the platform cannot.

    Args:
        path: the folder.

    Raises:
        OSError: the disk failed.
    """
    if os.name == "nt":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _CANNOT_FLUSH:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise _named(error, path) from error
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Flush every file and folder below a folder, and the folder: for what others wrote into it.

    Args:
        path: the folder.

    Raises:
        OSError: the disk failed.
    """
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            with open(Path(folder) / name, "r+b" if os.name == "nt" else "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


def replace_path(source: Path, target: Path) -> None:
    """Rename a file or a folder within one folder, so that it has the new name after a power cut as well.

    Args:
        source: what is there.
        target: its new path; a file there is replaced.

    Raises:
        OSError: it could not be renamed, or the disk failed.
    """
    os.replace(source, target)
    sync_directory(target.parent)


def make_directory(path: Path) -> None:
    """Make a folder, and those above it that are missing, so that they are there after a power cut as well.

    Args:
        path: the folder, which may be there.

    Raises:
        OSError: it could not be made, or the disk failed.
    """
    if path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_directory(folder.parent)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write `path` through: under a temporary name, flushed to disk, renamed; readers see all or none.

    Its mode is what the umask leaves. A link planted under the temporary name is removed, never followed. Where it
    cannot be written to its end, the room that it took is given back, and the `OSError` has the file's name.
    """
    with _renamed_when_whole(path) as temporary, open(temporary, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def written_whole_by_name(path: Path) -> Iterator[Path]:
    """As `written_whole`, for writers that take a path and no file: yields the temporary path that they must make."""
    with _renamed_when_whole(path) as temporary:
        yield temporary
        with open(temporary, "r+b" if os.name == "nt" else "rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _renamed_when_whole(path: Path) -> Iterator[Path]:
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        replace_path(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise _named(error, path) from error
        raise


def _named(error: OSError, path: Path) -> OSError:
    """The same error with the file's name; numpy tells of a full disk without a number."""
    return OSError(error.errno or errno.EIO, error.strerror or str(error), str(path))


@contextlib.contextmanager
def unless_disk_fails(what: str) -> Iterator[None]:
    """Write inside what only saves a rerun some time: where the disk does not take it, a warning is all.

    Args:
        what: is not kept, for the warning; ends in what that costs.
    """
    try:
        yield
    except OSError as error:
        logger.warning("Not kept: %s (%s).", what, error)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=True).encode("utf-8") + b"\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    content = json_bytes(value)
    with written_whole(path) as file:
        file.write(content)


def write_array(path: Path, value: npt.NDArray[Any]) -> None:
    """Write a `.npy` file, whole or not at all."""
    with written_whole(path) as file:
        np.save(file, value, allow_pickle=False)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        FileNotFoundError: there is no such file.
        MatesError: it is damaged or holds something else.
    """
    require_file(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MatesError(f"`{path}` must be a whole JSON object, and is damaged ({error}). {COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise MatesError(f"`{path}` must be a JSON object, got {type(value).__name__}. {COPY_AGAIN}")
    return value


def read_array(path: Path, dtype: npt.DTypeLike | None = None, num_dims: int = 1) -> npt.NDArray[Any] | None:
    """Memory-map a `.npy` file read-only. Never unpickles.

    Args:
        path: the file.
        dtype: with it, the array must be of this type, and have `num_dims` dimensions.
        num_dims: Number of dimensions that the array must have where `dtype` is given.

    Returns:
        The array, or None where there is no file.

    Raises:
        MatesError: the file is damaged, or holds another type or shape.
    """
    if not path.exists():
        return None
    require_file(path)
    try:
        with np.errstate(all="ignore"):
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header ends in any of a dozen kinds, `tokenize`'s among them
        raise MatesError(f"`{path}` must be a whole .npy file, and is damaged ({error}). {COPY_AGAIN}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise MatesError(f"`{path}` must be a .npy file, got a zip archive. {COPY_AGAIN}")
    if dtype is not None and (array.dtype != dtype or array.ndim != num_dims):
        raise MatesError(
            f"`{path}` must hold {np.dtype(dtype)} in {('one dimension', 'two dimensions')[num_dims - 1]}, got "
            f"{array.dtype} of shape {array.shape}. {COPY_AGAIN}"
        )
    return array


def require_file(path: Path) -> None:
    """Raise unless `path` is a plain file: opening a pipe or a device could wait for ever.

    Args:
        path: what is to be opened.

    Raises:
        FileNotFoundError: there is nothing there.
        MatesError: it is something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"`{path}` is not there.")
    if not path.is_file():
        raise MatesError(f"`{path}` must be a plain file, and is none. {COPY_AGAIN}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, a piece in memory at a time."""
    require_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
