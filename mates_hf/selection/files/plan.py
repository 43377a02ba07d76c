"""Which files are scored: the parts, what each is called in the output folder, and which are handled together.

Where it is used: once at the start. All that follows is a function of the plan, so a second start finds what the first
one left, whatever its number of workers. Trade-off: every input is listed before the first is read, so that another
input is noticed before it has changed what is kept.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mates_hf.data.listing import (
    JSON_LINES,
    OWN,
    PARQUET,
    Listing,
    format_of,
    list_files,
    located,
    place_of,
    url_of,
)

RECORD = "score.json"  # in our folder of an output folder: what the output folder is of
# What a file system knows a version of a file by, the surest first.
_VERSIONS = (
    "ETag", "etag", "md5Hash", "md5", "content_hash", "checksum", "blob_id", "generation", "mtime", "LastModified",
    "last_modified", "modified", "created",
)  # fmt: skip
_BUNDLE_BYTES, _BUNDLE_FILES = 8 * 2**20, 256


@dataclasses.dataclass(frozen=True)
class Part:
    """One file.

    Attributes:
        url: What it is opened by.
        name: What it is called below the output folder.
        kind: `"parquet"` or `"jsonl"`.
        packed: `"gzip"`, `"zstd"` or None, of a JSON Lines file.
        size: Bytes.
        version: What its file system says of this version of it.
    """

    url: str
    name: str
    kind: str
    packed: str | None
    size: int
    version: str

    def now(self) -> Part:
        """The part as the file is at this moment."""
        fs, path = located(self.url)
        fs.invalidate_cache()
        info = fs.info(path)
        by = self.version.partition("=")[0]  # a look at one file may know more than a listing
        return dataclasses.replace(self, size=int(info["size"]), version=_version(info, by))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One part, or several small ones that are handled together.

    Attributes:
        number: Which of all bundles it is.
        parts: The parts.
    """

    number: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of all its parts."""
        return sum(part.size for part in self.parts)

    @property
    def source(self) -> str:
        """Identity of what is scored."""
        content = "\n".join(f"{part.name}\t{part.size}\t{part.version}" for part in self.parts)
        return hashlib.sha256(content.encode()).hexdigest()


def find_parts(inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], out: str) -> list[Part]:
    """The files that are scored, in the order of their names in the output folder.

    Args:
        inputs: Paths, URLs, patterns with `*`, or folders, which are searched whole.
        out: The output folder; what lies in it is never read.

    Returns:
        The parts.

    Raises:
        FileNotFoundError: an input is not there, or there is no file to read at all.
        ValueError: a file has another format, two would be written to one file, or a folder holds the output of an
            earlier run.
    """
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    found: dict[str, tuple[Any, str, dict[str, Any]]] = {}
    bases: dict[str, list[str]] = {}
    for one in [os.fspath(path) for path in given]:
        listing = list_files(one, "inputs")
        if listing is None:
            raise FileNotFoundError(f"`inputs` must name files or folders that are there, and `{one}` is not.")
        fs = listing.fs
        bases.setdefault(place_of(fs), []).append(listing.base)
        for path, info in _read_of(listing, _below(out, fs)).items():
            found[url_of(fs, path)] = fs, path, info
    parts: dict[str, Part] = {}
    for url, (fs, path, info) in found.items():
        part = _part(url, posixpath.relpath(path, _common(bases[place_of(fs)])), info)
        if part.name in parts or part.name.split("/")[0] == OWN:
            other = parts[part.name].url if part.name in parts else OWN
            raise ValueError(
                f"Each input must have an output file of its own, and `{url}` and `{other}` would share "
                f"`{part.name}`. Score them into two output folders."
            )
        parts[part.name] = part
    if not parts:
        words = ", ".join(map(str, given)) or "nothing"
        raise FileNotFoundError(f"`inputs` must name at least one file ending in {_known()}, got {words}.")
    return [parts[name] for name in sorted(parts)]


def bundles_of(parts: Sequence[Part]) -> list[Bundle]:
    """The parts in bundles: each large one alone, small neighbours together."""
    bundles: list[Bundle] = []
    held: list[Part] = []
    for part in parts:
        if held and (sum(one.size for one in held) + part.size > _BUNDLE_BYTES or len(held) == _BUNDLE_FILES):
            bundles.append(Bundle(len(bundles), tuple(held)))
            held = []
        held.append(part)
    return [*bundles, Bundle(len(bundles), tuple(held))]


def _read_of(listing: Listing, out: str | None) -> dict[str, dict[str, Any]]:
    """The files of a listing that are read: those outside of the output folder."""
    if listing.how == "folder":
        _refuse_outputs(listing, [path for path in listing.found if path.endswith(f"/{OWN}/{RECORD}")], out)
    elif "**" in listing.given:
        _refuse_outputs(listing, _records(listing.fs, listing.base, listing.found), out)
    elif listing.how == "file" and any(_inside(path, out) for path in listing.found):
        raise ValueError(
            f"`inputs` must not lie in the output folder, and `{listing.given}` does. Choose another one."
        )
    return {path: info for path, info in listing.inputs().items() if not _inside(path, out)}


def _records(fs: Any, base: str, found: Iterable[str]) -> list[str]:
    """Records of earlier runs in the folders of some files, below a folder."""
    folders = {posixpath.dirname(name) for name in found}
    folders |= {str(above) for folder in folders for above in Path(folder).parents}
    return [name for folder in folders if folder.startswith(base) and fs.exists(name := f"{folder}/{OWN}/{RECORD}")]


def _refuse_outputs(listing: Listing, records: Iterable[str], out: str | None) -> None:
    """Raise where a folder below a listing's base is the output of an earlier run, other than this one's."""
    for name in records:
        folder = name.removesuffix(f"/{OWN}/{RECORD}")
        if folder != listing.base and folder != out:
            raise ValueError(
                f"`{listing.given}` holds `{folder}`, which is the output of an earlier run and would be read again. "
                "Move that folder, or name the files that are meant by a pattern."
            )


def _part(url: str, name: str, info: dict[str, Any]) -> Part:
    found = format_of(url)
    if found is None or found.kind not in (PARQUET, JSON_LINES):
        raise ValueError(f"Files must end in {_known()}, and `{url}` does not. Name the others by a pattern.")
    return Part(url, name, *found, size=int(info["size"]), version=_version(info))


def _known() -> str:
    return "`.parquet`, or `.jsonl`, `.ndjson` or `.json`, also with `.gz`, `.zst` or `.bz2`"


def _version(info: dict[str, Any], by: str = "") -> str:
    name = next((name for name in (by, *_VERSIONS) if info.get(name) is not None), None)
    value = None if name is None else info[name]
    if isinstance(value, datetime.datetime):  # a listing may have seconds where a look at one file has a date
        value = value.timestamp()
    return "" if name is None else f"{name}={value}"


def _common(bases: Sequence[str]) -> str:
    """The folder that all of them lie in."""
    return posixpath.commonpath(bases) if len(set(bases)) > 1 else bases[0]


def _below(out: str, fs: Any) -> str | None:
    """Path of the output folder, where it lies in this file system."""
    other, path = located(out)
    return path.rstrip("/") if place_of(other) == place_of(fs) else None


def _inside(name: str, folder: str | None) -> bool:
    return folder is not None and (name == folder or name.startswith(folder + "/"))
