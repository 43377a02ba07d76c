"""The files of a round directory, read with distrust: what is wrong is raised by the name of its file.

Where it is used: under `replay`, which knows what the files must hold. Trade-off: each entry is looked at before it
is used, so that a tampered file ends in a sentence and not in a traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.disk import read_array, read_json
from mates_hf.errors import MatesError
from mates_hf.records import IntArray


class WrongError(Exception):
    """A check failed: file, what it must hold, what it holds."""


def is_whole(value: Any) -> bool:
    """Whether an entry is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


class RoundReader:
    """Reads the files of one round directory.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def require(ok: bool, file: str, expected: str, found: str) -> None:
        """Raise what is wrong unless `ok`."""
        if not ok:
            raise WrongError(file, expected, found if len(found) <= 300 else found[:300] + " ...")

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        try:
            return read_json(self.path / name)
        except (OSError, MatesError) as error:
            raise WrongError(name, "a whole JSON object", str(error)) from error

    def array(self, name: str, dtype: npt.DTypeLike, length: int) -> npt.NDArray[Any]:
        """An array of one type and length."""
        try:
            array = read_array(self.path / name, dtype)
        except (OSError, MatesError) as error:
            raise WrongError(name, f"{length} entries of {np.dtype(dtype)}", str(error)) from error
        self.require(array is not None, name, f"{length} entries of {np.dtype(dtype)}", "no such file")
        assert array is not None
        self.require(len(array) == length, name, f"{length} entries", str(len(array)))
        return array

    def numbers(self, values: Mapping[str, Any], name: str, dtype: npt.DTypeLike, file: str) -> npt.NDArray[Any]:
        """An entry that must be a list of finite numbers, as an array of one type."""
        found = values.get(name)
        ok = isinstance(found, list) and all(type(each) in (int, float) and abs(each) < 2**63 for each in found)
        self.require(ok, file, f"`{name}` as a list of numbers", repr(found))
        return np.asarray(found, dtype)

    def mapping(self, values: Mapping[str, Any], name: str, file: str) -> Mapping[str, Any]:
        """An entry that must be an object."""
        found = values.get(name)
        self.require(isinstance(found, dict), file, f"`{name}` as an object", repr(found))
        assert isinstance(found, dict)
        return found

    def same(self, file: str, found: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
        """Raise the first entry of a file that is not as in another."""
        for name in sorted({*found, *expected}):
            what = f"`{name}` {expected.get(name)!r}, as {source}"
            self.require(found.get(name) == expected.get(name), file, what, repr(found.get(name)))


def first_of(rows: IntArray) -> str:
    """How many rows, and the first of them."""
    return f"{len(rows)} rows, first row {int(rows[0])}," if len(rows) else "none"
