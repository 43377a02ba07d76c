"""What a round says of groups, counted again from the groups of its candidates.

Where it is used: under `replay`. Trade-off: which group a row is of only the pool knows, so the file's checksum stands
for that; the counts and the bounds are recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mates_hf.data.groups import Groups, shares_by_group
from mates_hf.records import IntArray
from mates_hf.round_files import GROUPS_FILE, ROUND_FILE
from mates_hf.training.round_reader import RoundReader


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
    codes = np.asarray(reader.array(GROUPS_FILE, np.int32, num_candidates))
    names = sorted(_counted(reader, info))
    known = not len(codes) or 0 <= codes.min() <= codes.max() < len(names)
    reader.require(known, GROUPS_FILE, f"groups below {len(names)}, as round.json names", f"{codes.max(initial=-1)}")
    return Groups(codes, names)


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
