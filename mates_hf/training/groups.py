"""What a round knows of the groups of its rows: the bounds of its choice, and what each group got and lost.

Where it is used: under `rounds`; `replay` recomputes both from `groups.npy`. Trade-off: the loss of a group is that of
its probes, which were not trained on in this pass; with few probes a group it is noisy, so their number stands beside
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.groups import Groups, read_groups
from mates_hf.disk import write_array
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.round_files import GROUPS_FILE, STRATA_FILE
from mates_hf.selection.choose import GroupOf
from mates_hf.training.run import Run


def candidate_groups(run: Run, path: Path, candidates: IntArray) -> Groups | None:
    """The groups of a round's candidates, which its directory keeps; None where rows have no group.

    Args:
        run: the run's state.
        path: the round's directory.
        candidates: (M,) int64 pool rows.

    Returns:
        The groups.
    """
    if run.config.group_column is None:
        return None
    found = read_groups(run.pool.dataset, run.config.group_column, candidates)
    write_array(path / GROUPS_FILE, found.codes)
    return found


def probe_strata(run: Run, path: Path) -> tuple[GroupOf | None, dict[str, Any]]:
    """How a round's probes are drawn group by group, where rows have a group.

    Args:
        run: the run's state.
        path: the round's directory, which keeps the groups of the rows that probes are drawn from.

    Returns:
        What `Ledger.draw` asks, and what `round.json` says of it once it was asked: `strata`, the names by which the
        groups in the directory are numbered.
    """
    column, told = run.config.group_column, dict[str, Any]()
    if column is None:
        return None, told

    def group_of(rows: IntArray) -> IntArray:
        found = read_groups(run.pool.dataset, column, rows)
        write_array(path / STRATA_FILE, found.codes)
        told["strata"] = found.names
        return found.codes.astype(np.int64)

    return group_of, told


def group_facts(
    run: Run, labels: InfluenceLabels, shares: Mapping[str, Mapping[str, int]] | None
) -> dict[str, dict[str, dict[str, Any]]]:
    """What `round.json` says of groups; nothing where rows have none.

    Args:
        run: the run's state.
        labels: Labels of the round's probes.
        shares: `shares_by_group` of a round that selects.

    Returns:
        `groups`, by name: `candidates` and `chosen` rows where the round selects; `probes`, how many were probed;
        `loss` in nats/token, the mean over their trained `tokens` before the round, with its standard error
        `loss_error`, None with fewer than two probes; and `influence`, theirs on average.
    """
    if run.config.group_column is None:
        return {}
    found: dict[str, dict[str, Any]] = {name: dict(counts) for name, counts in (shares or {}).items()}
    probed = read_groups(run.pool.dataset, run.config.group_column, labels.candidate_id)
    for code, name in enumerate(probed.names):
        mine = probed.codes == code
        found.setdefault(name, {})
        found[name] |= {
            "probes": int(mine.sum()),
            **_loss(labels.loss[mine].astype(np.float64), labels.num_tokens[mine].astype(np.float64)),
            "influence": float(labels.influence[mine].mean(dtype=np.float64)),
        }
    return {"groups": dict(sorted(found.items()))}


def _loss(losses: npt.NDArray[np.float64], tokens: npt.NDArray[np.float64]) -> dict[str, float | int | None]:
    """Mean of the losses over tokens, and its standard error, as of rows that were drawn at random."""
    total = float(tokens.sum())
    if not total:
        return {"tokens": 0, "loss": None, "loss_error": None}
    mean, num = float(losses @ tokens / total), len(losses)
    squares = float((tokens * (losses - mean)) @ (tokens * (losses - mean)))
    error = math.sqrt(squares * num / (num - 1)) / total if num > 1 else None
    return {"tokens": int(total), "loss": mean, "loss_error": error}
