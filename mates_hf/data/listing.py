"""Which files a path, a pattern, a folder or a URL stands for, and what each holds by the ending of its name.

Where it is used: `files` lists a pool or passages by it, and `selection.files.plan` what is scored, so that the two
take the same words for the same files. Trade-off: a name says what a file holds, so nothing is opened; a file without
a known ending is never guessed at. In a folder, plain `.json` is passed over, because it is often an index or a card.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
from collections.abc import Mapping
from typing import Any, NamedTuple

from mates_hf.paths import expand_path

OWN = "_mates"  # folder of what is ours; files in it are never inputs
PARQUET, JSON_LINES, TEXT = "parquet", "jsonl", "text"
KINDS = {PARQUET: "Parquet", JSON_LINES: "JSON Lines", TEXT: "text"}
_ENDINGS = {".parquet": PARQUET, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".json": JSON_LINES, ".txt": TEXT}
_PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_SIGNS = "*?["


class Format(NamedTuple):
    """What a file holds.

    Attributes:
        kind: `"parquet"`, `"jsonl"` or `"text"`.
        packed: `"gzip"`, `"zstd"`, `"bz2"` or None, of a file of lines.
    """

    kind: str
    packed: str | None


def format_of(name: str) -> Format | None:
    """What a file holds and how it is packed, by its name's ending; None where it is another one."""
    stem, ending = os.path.splitext(name.lower())
    packed = _PACKED.get(ending)
    kind = _ENDINGS.get(os.path.splitext(stem)[1] if packed else ending)
    return None if kind is None or (packed and kind == PARQUET) else Format(kind, packed)


@dataclasses.dataclass(frozen=True)
class Listing:
    """Files that one name stands for.

    Attributes:
        given: The name.
        fs: The `fsspec` file system.
        base: The folder that the files' names are counted from.
        how: What it is the name of: `"file"`, `"folder"`, which is searched whole, or `"pattern"`.
        found: What the file system says of each file, by its path, in their order.
    """

    given: str
    fs: Any
    base: str
    how: str
    found: Mapping[str, dict[str, Any]]

    def inputs(self) -> dict[str, dict[str, Any]]:
        """The files that are meant: none of ours, and of a folder those with a known ending that are not hidden."""
        return {path: info for path, info in self.found.items() if self._is_meant(path)}

    def _is_meant(self, path: str) -> bool:
        words = posixpath.relpath(path, self.base).split("/")
        if self.how != "folder":
            return OWN not in words
        hidden = any(word[:1] in ("_", ".") for word in words)
        return not hidden and not path.lower().endswith(".json") and format_of(path) is not None


def list_files(given: str, name: str) -> Listing | None:
    """The files that a name stands for.

    Args:
        given: A path, a pattern with `*`, `?` or `[`, a folder, or an `fsspec` URL of one of these.
        name: What it is called in errors, such as `inputs`.

    Returns:
        The files; None where nothing of that name is there, and it is no pattern.

    Raises:
        FileNotFoundError: a pattern matches no file.
        ImportError: a package for the URL is not installed.
        ValueError: no file system is known for the URL.
    """
    fs, path = located(given if "://" in given else str(expand_path(given)))
    path = path.rstrip("/") or path
    if fs.isdir(path):
        return Listing(given, fs, path, "folder", _sorted(fs.find(path, detail=True)))
    if fs.exists(path):  # also one with a sign of a pattern in its name
        return Listing(given, fs, posixpath.dirname(path), "file", {path: fs.info(path)})
    if not any(sign in path for sign in _SIGNS):
        return None
    matches = {one: info for one, info in fs.glob(path, detail=True).items() if info["type"] != "directory"}
    listing = Listing(given, fs, _before_pattern(path), "pattern", _sorted(matches))
    if not listing.inputs():
        raise FileNotFoundError(
            f"`{name}` must name files that are there, and nothing matches `{given}`. Put a pattern in quotes, and "
            "check the path."
        )
    return listing


def _sorted(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {path: found[path] for path in sorted(found)}


def _before_pattern(path: str) -> str:
    """The folder above the first part of a path that has a sign of a pattern."""
    words = path.split("/")
    first = next(i for i, word in enumerate(words) if any(sign in word for sign in _SIGNS))
    return "/".join(words[:first])


def located(path_or_url: str, fs: Any = None) -> tuple[Any, str]:
    """The `fsspec` file system of a path or URL, and the path there.

    Args:
        path_or_url: A path or a URL.
        fs: The file system; None finds it by the URL.

    Returns:
        The file system and the path.

    Raises:
        ImportError: a package for the URL is not installed.
        ValueError: no file system is known for the URL.
    """
    if fs is not None:
        return fs, fs._strip_protocol(path_or_url)
    if ":" not in path_or_url:  # a path of this machine, without the way through all protocols
        from fsspec.implementations.local import LocalFileSystem

        fs = LocalFileSystem()
        return fs, fs._strip_protocol(path_or_url)
    from fsspec.core import url_to_fs

    try:
        found, path = url_to_fs(path_or_url)
    except ImportError as error:
        raise ImportError(f"`{path_or_url}` cannot be read: {error}") from error
    return found, path


def is_local(fs: Any) -> bool:
    """True for this machine's disks."""
    return "file" in _protocols(fs)


def place_of(fs: Any) -> str:
    """What paths of a file system are told apart by from those of another."""
    return str(_protocols(fs)[0])


def url_of(fs: Any, path: str) -> str:
    """What a path of a file system is opened by."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def _protocols(fs: Any) -> tuple[str, ...]:
    return tuple(fs.protocol) if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
