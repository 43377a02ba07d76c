"""Between rounds: do the labels of the last round still hold for the model as it is now?

Where it is used: with `drift_check_steps` set, a round also measures a sentinel, a few of its candidates on a share
of the reference task, and `session` has the same measured again every so many steps, at weights averaged the same way.
Where the two no longer rank the candidates alike, the next round starts at once: `update_steps` is a maximum then.

Trade-off: the sentinel is compared with itself and not with the round's labels, which are on all passages: how well
the two agree is recorded in the round, and not held against the model. A check costs 2 x 128 candidates forward and an
eighth of the reference task forward and backward.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from mates_hf.config import NUM_SENTINELS
from mates_hf.disk import read_json, write_json
from mates_hf.errors import InfluenceError
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.records import InfluenceLabels
from mates_hf.selection.choose import stage_seed
from mates_hf.training.measure import measure_sentinel
from mates_hf.training.run import Run

logger = logging.getLogger(__name__)

SENTINEL_FILE = "sentinel.json"


def set_sentinel(run: Run, path: Path, labels: InfluenceLabels, number: int) -> float | None:
    """Measure the sentinel of a round and write it into the round's directory, unless it is there.

    Args:
        run: the run's state; the model has the weights that the round probes.
        path: the round's directory.
        labels: Labels of the round.
        number: the round.

    Returns:
        FLOPs it took, whenever that was; None where they are not known.
    """
    if (path / SENTINEL_FILE).exists():
        flops = read_json(path / SENTINEL_FILE).get("flops")
        return None if flops is None else float(flops)
    seed = stage_seed(run.config.selection_seed, number, "sentinel")
    picked = np.sort(np.random.default_rng(seed).permutation(len(labels))[:NUM_SENTINELS])
    epsilon = labels.info.get("epsilon")
    try:
        found = measure_sentinel(run, labels.candidate_id[picked], epsilon=epsilon, seed=seed)
    except InfluenceError as error:
        logger.warning("Round %d gets no drift checks: its sentinel cannot be ranked (%s).", number, error)
        write_json(path / SENTINEL_FILE, {"candidate_id": []})
        return None
    sentinel = {
        "candidate_id": found.candidate_id.tolist(),
        "influence_per_token": found.influence_per_token.tolist(),
        "epsilon": epsilon,
        "seed": seed,
        "flops": found.info.get("flops"),
        "spearman_with_labels": rank_correlation(found.influence_per_token, labels.influence_per_token[picked]),
    }
    write_json(path / SENTINEL_FILE, sentinel)
    return None if sentinel["flops"] is None else float(sentinel["flops"])


def check_drift(run: Run, path: Path) -> float:
    """Measure the sentinel of the last round again.

    Args:
        run: the run's state; the model has the weights that a round would probe now.
        path: directory of the last round.

    Returns:
        Spearman of its influence now with what it was at the round; 0 where nothing can be ranked any more, 1 where
        the round has no sentinel.
    """
    file = path / SENTINEL_FILE
    sentinel = read_json(file) if file.exists() else {"candidate_id": []}
    if not sentinel["candidate_id"]:
        return 1.0
    ids = np.array(sentinel["candidate_id"], np.int64)
    try:
        now = measure_sentinel(run, ids, epsilon=sentinel["epsilon"], seed=sentinel["seed"])
    except InfluenceError as error:
        logger.warning("Drift check: the sentinel cannot be ranked any more (%s).", error)
        return 0.0
    return rank_correlation(now.influence_per_token, np.array(sentinel["influence_per_token"], np.float32))
