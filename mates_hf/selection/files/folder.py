"""The output folder: what it is of, the scores of each bundle, and a mark for each bundle that is written.

Where it is used: the plan is recorded here before anything is scored, so that another selector, other inputs or
another column are refused and not mixed in. Trade-off: the record lists every input, a hundred bytes each, so that the
refusal can say which one differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from mates_hf.allow import Allow
from mates_hf.data.listing import OWN, located
from mates_hf.disk import json_bytes
from mates_hf.errors import MatesError, RoundMismatchError
from mates_hf.selection.files.plan import RECORD, Bundle, Part
from mates_hf.selection.score_file import read_facts, written_whole_at

_FORMAT = 1  # of what is written here; raised when an older one cannot be continued


@dataclasses.dataclass(frozen=True)
class Folder:
    """An output folder.

    Attributes:
        url: A path or URL.
    """

    url: str

    def part(self, part: Part) -> str:
        """Where a part is written."""
        return f"{self._root}/{part.name}"

    def scores(self, bundle: Bundle) -> str:
        """Where the scores of a bundle are."""
        return f"{self._root}/{OWN}/scores/{bundle.number:06d}.parquet"

    def groups(self, bundle: Bundle, column: str) -> str:
        """Where the groups of a bundle's rows are, by a column: this with `.parquet`, and their names with `.json`."""
        name = hashlib.sha256(column.encode()).hexdigest()[:12]
        return f"{self._root}/{OWN}/groups/{name}/{bundle.number:06d}"

    def mark(self, bundle: Bundle) -> str:
        """Where it is said that a bundle is written."""
        return f"{self._root}/{OWN}/written/{bundle.number:06d}.json"

    @property
    def summary(self) -> str:
        """Where what came of it all is."""
        return f"{self._root}/{OWN}/summary.json"

    @property
    def _root(self) -> str:
        return self.url.rstrip("/")

    def claim(self, selector: str, column: str, parts: Sequence[Part], allow: Allow | None = None) -> None:
        """Record what the folder is of, or check that it is of the same.

        Args:
            selector: Digest of what scores.
            column: Name of the scored column.
            parts: All parts.
            allow: Entries of rows that may be used, by column; None allows all.

        Raises:
            RoundMismatchError: it holds the work of another selector, column, input or `allow`.
            ValueError: it holds other files.
        """
        wanted = {
            "format": _FORMAT,
            "selector": selector,
            "column": column,
            "allow": allow,
            "parts": [[part.name, part.url, part.size, part.version] for part in parts],
        }
        path = f"{self._root}/{OWN}/{RECORD}"
        found = read_object(path)
        if found is None:
            self._refuse_other_files()
            write_object(path, wanted)
        else:
            self._refuse_other_work(found, wanted)

    def _refuse_other_files(self) -> None:
        fs, path = located(self.url)
        names = [name.rstrip("/").split("/")[-1] for name in fs.ls(path, detail=False)] if fs.isdir(path) else []
        others = sorted(set(names) - {OWN})
        if others or fs.isfile(path):
            what = f"holds `{others[0]}`" if others else "is a file"
            raise ValueError(
                f"`out` must be a new or empty folder, or one that this command began, and `{self.url}` {what}. "
                "Choose another folder."
            )

    def _refuse_other_work(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name, what in (("format", "format"), ("selector", "selector"), ("column", "column")):
            if found.get(name) != wanted[name]:
                raise RoundMismatchError(
                    f"`out` must be a folder of this {what}, and `{self.url}` was begun with another one: "
                    f"{str(found.get(name))[:12]}, not {str(wanted[name])[:12]}. Choose another folder, or delete it."
                )
        if found.get("allow") != wanted["allow"]:
            raise RoundMismatchError(
                f"`out` must be a folder of this `allow`, and `{self.url}` was begun with {found.get('allow')}, not "
                f"{wanted['allow']}: other rows were scored. Choose another folder, or delete it."
            )
        had = {name: rest for name, *rest in found.get("parts", [])}
        have = {name: rest for name, *rest in wanted["parts"]}
        if had == have:
            return
        different = sorted(name for name in {**had, **have} if had.get(name) != have.get(name))
        first = different[0]
        what = "is new" if first not in had else "is gone" if first not in have else "was changed"
        raise RoundMismatchError(
            f"`out` must be a folder of the same inputs, and since `{self.url}` was begun `{first}` {what} "
            f"({len(different)} in all). Choose another folder, or delete it."
        )

    def score_facts(self, bundle: Bundle, selector: str) -> dict[str, Any] | None:
        """What is recorded with the scores of a bundle; None where they are not there, or damaged."""
        try:
            facts = read_facts(self.scores(bundle))
        except (FileNotFoundError, MatesError):
            return None
        return facts if (facts["selector"], facts["source"]) == (selector, bundle.source) else None


def read_object(url: str) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Args:
        url: Where it is.

    Returns:
        The object.

    Raises:
        MatesError: it is damaged.
    """
    fs, path = located(url)
    try:
        content = fs.cat_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = json.loads(content)
    except ValueError as error:
        raise MatesError(f"`{url}` must be a JSON object, and is damaged ({error}). Delete it.") from error
    if not isinstance(found, dict):
        raise MatesError(f"`{url}` must be a JSON object, got {type(found).__name__}. Delete it.")
    return found


def write_object(url: str, value: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    with written_whole_at(url) as local:
        local.write_bytes(json_bytes(value))
