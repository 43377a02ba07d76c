"""What a round says of groups, counted again from the groups of its candidates.

Where it is used: under `replay`. Trade-off: which group a row is of only the pool knows, so the file's checksum stands
for that; the counts and the bounds are recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.groups import Groups, shares_by_group
from mates_hf.records import IntArray
from mates_hf.round_files import GROUPS_FILE, ROUND_FILE, STRATA_FILE
from mates_hf.selection.choose import GroupOf
from mates_hf.training.replay.reader import RoundReader


def read_groups_of(reader: RoundReader, info: Mapping[str, Any], num_candidates: int) -> Groups:
    """The groups of a round's candidates.

    Args:
        reader: Reader of the round's directory.
        info: Its `round.json`, which names them.
        num_candidates: Number M of candidates.

    Returns:
        The groups.

    Raises:
        WrongError: the file is damaged, or has groups without a name.
    """
    names = sorted(_counted(reader, info))
    return Groups(_codes(reader, GROUPS_FILE, num_candidates, len(names)), names)


def _codes(reader: RoundReader, file: str, num_rows: int, num_groups: int) -> npt.NDArray[np.int32]:
    """(N,) groups of rows, each of which has a name."""
    codes = np.asarray(reader.array(file, np.int32, num_rows))
    known = not len(codes) or 0 <= codes.min() <= codes.max() < num_groups
    reader.require(known, file, f"groups below {num_groups}, as round.json names", f"{codes.max(initial=-1)}")
    return codes


def strata_of(reader: RoundReader, info: Mapping[str, Any]) -> GroupOf | None:
    """The groups of the rows that a round's probes were drawn from.

    Args:
        reader: Reader of the round's directory.
        info: Its `round.json`, which names them.

    Returns:
        What `Ledger.draw` asks; None where probes were not drawn group by group.

    Raises:
        WrongError: the file is damaged, or has groups without a name.
    """
    if "strata" not in info:
        return None
    names = info["strata"]
    told = isinstance(names, list) and all(isinstance(name, str) for name in names)
    reader.require(told, ROUND_FILE, "`strata` as a list of names", repr(names))

    def group_of(rows: IntArray) -> IntArray:
        return _codes(reader, STRATA_FILE, len(rows), len(names)).astype(np.int64)

    return group_of


def check_groups(
    reader: RoundReader, info: Mapping[str, Any], groups: Groups, candidates: IntArray, rows: IntArray
) -> None:
    """Candidates and chosen rows by group are those that `round.json` says.

    Args:
        reader: Reader of the round's directory.
        info: Its `round.json`.
        groups: Groups of the candidates.
        candidates: (M,) int64 pool rows.
        rows: (k,) int64 pool rows that were chosen.

    Raises:
        WrongError: they are not.
    """
    found = shares_by_group(groups, candidates, rows)
    reader.same(ROUND_FILE, _counted(reader, info), found, f"{GROUPS_FILE} and the selection give")


def _counted(reader: RoundReader, info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `round.json` counts of each group that has a candidate; the others are there by their probes alone."""
    told = reader.mapping(info, "groups", ROUND_FILE)
    return {
        name: {key: facts.get(key) for key in ("candidates", "chosen")}
        for name, facts in told.items()
        if isinstance(facts, dict) and "candidates" in facts
    }
