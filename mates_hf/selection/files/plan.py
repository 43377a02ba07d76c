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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mates_hf.selection.score_file import is_local, located

OWN = "_mates"  # folder of what is ours in an output folder; readers of folders pass over such names
RECORD = "score.json"  # in it: what the output folder is of
_ENDINGS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
_PACKED = {".gz": "gzip", ".zst": "zstd"}
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
        return dataclasses.replace(self, size=int(info["size"]), version=_version(info))


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
        fs, path = located(one)
        base, files = _files_of(one, fs, path.rstrip("/") or path, _below(out, fs))
        bases.setdefault(_root_key(fs), []).append(base)
        for name, info in files:
            found[_url(fs, name)] = fs, name, info
    parts: dict[str, Part] = {}
    for url, (fs, path, info) in found.items():
        part = _part(url, posixpath.relpath(path, _common(bases[_root_key(fs)])), info)
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


def _files_of(given: str, fs: Any, path: str, out: str | None) -> tuple[str, Iterator[tuple[str, dict[str, Any]]]]:
    """The folder that an input's names are counted from, and its files."""
    if fs.isdir(path):
        return path, _in_folder(given, path, fs.find(path, detail=True), out)
    if not fs.exists(path) and any(sign in path for sign in "*?["):
        base = _before_pattern(path)
        matches = fs.glob(path, detail=True).items()
        found = {name: info for name, info in matches if info["type"] != "directory" and OWN not in name.split("/")}
        if not found:
            raise FileNotFoundError(f"`inputs` must name files that are there, and nothing matches `{given}`.")
        if "**" in path:
            _refuse_outputs(given, base, _records(fs, base, found), out)
        return base, ((name, info) for name, info in found.items() if not _inside(name, out))
    if not fs.exists(path):
        raise FileNotFoundError(f"`inputs` must name files or folders that are there, and `{given}` is not.")
    if _inside(path, out):
        raise ValueError(f"`inputs` must not lie in the output folder, and `{given}` does. Choose another one.")
    return posixpath.dirname(path), iter([(path, fs.info(path))])


def _in_folder(
    given: str, folder: str, found: dict[str, dict[str, Any]], out: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files of a folder that have a known ending; not hidden ones, plain `.json`, and those of the output folder."""
    _refuse_outputs(given, folder, [name for name in found if name.endswith(f"/{OWN}/{RECORD}")], out)
    for name, info in found.items():
        hidden = any(word[:1] in ("_", ".") for word in posixpath.relpath(name, folder).split("/"))
        is_other = name.lower().endswith(".json") or _format_of(name) is None  # often an index, of no rows
        if not hidden and not _inside(name, out) and not is_other:
            yield name, info


def _records(fs: Any, base: str, found: Iterable[str]) -> list[str]:
    """Records of earlier runs in the folders of some files, below a folder."""
    folders = {posixpath.dirname(name) for name in found}
    folders |= {str(above) for folder in folders for above in Path(folder).parents}
    return [name for folder in folders if folder.startswith(base) and fs.exists(name := f"{folder}/{OWN}/{RECORD}")]


def _refuse_outputs(given: str, base: str, records: Iterable[str], out: str | None) -> None:
    """Raise where one of the folders below `base` is the output of an earlier run, other than this one's."""
    for name in records:
        folder = name.removesuffix(f"/{OWN}/{RECORD}")
        if folder != base and folder != out:
            raise ValueError(
                f"`{given}` holds `{folder}`, which is the output of an earlier run and would be read again. Move "
                "that folder, or name the files that are meant by a pattern."
            )


def _part(url: str, name: str, info: dict[str, Any]) -> Part:
    found = _format_of(url)
    if found is None:
        raise ValueError(f"Files must end in {_known()}, and `{url}` does not. Name the others by a pattern.")
    return Part(url, name, *found, size=int(info["size"]), version=_version(info))


def _format_of(name: str) -> tuple[str, str | None] | None:
    """The kind of a file and how it is packed, by its name's ending; None where it is another one."""
    stem, ending = os.path.splitext(name.lower())
    packed = _PACKED.get(ending)
    kind = _ENDINGS.get(os.path.splitext(stem)[1] if packed else ending)
    return None if kind is None or (packed and kind == "parquet") else (kind, packed)


def _known() -> str:
    return "`.parquet`, or `.jsonl`, `.ndjson` or `.json`, also with `.gz` or `.zst`"


def _version(info: dict[str, Any]) -> str:
    name = next((name for name in _VERSIONS if info.get(name) is not None), None)
    value = None if name is None else info[name]
    if isinstance(value, datetime.datetime):  # a listing may have seconds where a look at one file has a date
        value = value.timestamp()
    return "" if name is None else f"{name}={value}"


def _url(fs: Any, path: str) -> str:
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def _root_key(fs: Any) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else str(fs.protocol[0])


def _common(bases: Sequence[str]) -> str:
    """The folder that all of them lie in."""
    return posixpath.commonpath(bases) if len(set(bases)) > 1 else bases[0]


def _below(out: str, fs: Any) -> str | None:
    """Path of the output folder, where it lies in this file system."""
    other, path = located(out)
    return path.rstrip("/") if _root_key(other) == _root_key(fs) else None


def _inside(name: str, folder: str | None) -> bool:
    return folder is not None and (name == folder or name.startswith(folder + "/"))


def _before_pattern(path: str) -> str:
    """The folder above the first part of a path that has a sign of a pattern."""
    words = path.split("/")
    first = next(i for i, word in enumerate(words) if any(sign in word for sign in "*?["))
    return "/".join(words[:first])
