"""Which rows a user means: by their numbers, by a file of numbers, or by a column of ids in the dataset.

Where it is used: under the commands `where` and `forget`. Trade-off: ids are looked up in the dataset that is named
now, so it is held against the pool that the run recorded; where it cannot be, an answer would be of other rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mates_hf.disk import read_array, require_file
from mates_hf.paths import expand_path
from mates_hf.records import IntArray


def rows_of_argument(given: str) -> IntArray:
    """Row numbers as on a command line.

    Args:
        given: Numbers with commas between them, or the path of a file: `.npy`, a `.json` list, or one number a line.

    Returns:
        (N,) int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold row numbers.
    """
    if all(part.strip().isdigit() for part in given.split(",")):
        return np.array([int(part) for part in given.split(",")], np.int64)
    path = expand_path(given)
    if not path.exists():
        raise FileNotFoundError(f"`--rows` must be numbers with commas between them, or a file, got {given!r}.")
    require_file(path)
    if path.suffix == ".npy":
        found = read_array(path)
        assert found is not None
    else:
        text = path.read_text(encoding="utf-8")
        try:
            found = np.asarray(json.loads(text) if path.suffix == ".json" else [int(word) for word in text.split()])
        except ValueError as error:
            raise ValueError(f"`{path}` must hold row numbers, one a line or as a JSON list ({error}).") from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"`{path}` must hold a list of row numbers, got {found.dtype} of shape {found.shape}.")
    return np.asarray(found, np.int64)


def open_dataset(source: Any) -> Any:
    """The whole dataset that a user names, in the order of its rows.

    Args:
        source: A `datasets.Dataset`, a folder that `save_to_disk` wrote, files, a glob, or a name on the Hub.

    Returns:
        A map-style dataset.

    Raises:
        OSError: there is no such dataset.
        ValueError: it cannot be read.
    """
    from mates_hf.data.files import load_rows

    if not isinstance(source, (str, os.PathLike, list, tuple)):
        return source
    return load_rows(source, list, name="dataset").dataset


class RowsOfIds(NamedTuple):
    """Rows that ids stand for.

    Attributes:
        rows: (N,) int64 rows; several where rows share an id.
        proven: whether the dataset was compared with the run's pool by its tokens.
    """

    rows: IntArray
    proven: bool


def rows_of_ids(dataset: Any, column: str, ids: Sequence[str], pool: Mapping[str, Any]) -> RowsOfIds:
    """The rows whose id is one of some.

    Args:
        dataset: A map-style dataset, which must be the run's pool.
        column: Column with the id of each row.
        ids: The ids, as text.
        pool: What the run recorded of its pool.

    Returns:
        The rows.

    Raises:
        ValueError: there is no such column or id, or the dataset is not the run's pool.
    """
    from mates_hf.data.groups import entries_of

    proven = require_same_pool(dataset, pool)
    entries, places = entries_of(dataset, column, "id_column")
    named = {str(entry): place for place, entry in enumerate(entries) if entry is not None}
    missing = [each for each in ids if each not in named]
    if missing:
        raise ValueError(
            f"`--ids` must be in the column `{column}`, but {len(missing)} of {len(ids)} are not, first {missing[:3]}."
        )
    wanted = [place for place, entry in enumerate(entries) if entry is not None and str(entry) in set(ids)]
    return RowsOfIds(np.flatnonzero(np.isin(places, wanted)).astype(np.int64), proven)


def require_same_pool(dataset: Any, pool: Mapping[str, Any]) -> bool:
    """Hold a dataset against the pool that a run recorded.

    Args:
        dataset: A map-style dataset.
        pool: What the run recorded: `num_rows` and `rows_sha256`.

    Returns:
        Whether its tokens were compared and are those of the pool; False where it has none, or the run's collator
        made them.

    Raises:
        ValueError: it has another number of rows.
    """
    if len(dataset) != pool["num_rows"]:
        raise ValueError(
            f"The dataset must be the pool that the run trained on, of {pool['num_rows']} rows, got one of "
            f"{len(dataset)}. Pass it as the run had it, in its order and before any row was deleted."
        )
    from mates_hf.data.pool import CandidatePool

    names = getattr(dataset, "column_names", None) or []
    if "input_ids" not in names:
        return False
    return bool(CandidatePool(dataset).identity()["rows_sha256"] == pool.get("rows_sha256"))
