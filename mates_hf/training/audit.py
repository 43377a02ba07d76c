"""A round's audit: does the derivative agree with a real step of the optimizer, on a few candidates?

Where it is used: behind the probe in `rounds.run_round`; both probes run on the same few passages (`measure`).

Trade-off: it is never fatal, and it is the machinery that is audited. Path labels are not meant to agree with one
step; how far they do is recorded beside it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.config import NUM_AUDIT_PASSAGES, NUM_AUDITED
from mates_hf.disk import read_json, unless_disk_fails, write_json
from mates_hf.engine.weight_store import engine_optimizer
from mates_hf.evaluation.agreement import bootstrap_interval, rank_correlation
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.records import FloatArray, InfluenceLabels
from mates_hf.selection.choose import stage_seed
from mates_hf.training.measure import measure_audit
from mates_hf.training.run import Run

logger = logging.getLogger(__name__)


def audit_round(run: Run, path: Path, labels: InfluenceLabels, number: int) -> dict[str, Any]:
    """Give a few candidates both probes on a few passages, and write how far they agree, unless that is there.

    Args:
        run: the run's state; the model has the weights that the round probes.
        path: the round's directory.
        labels: the round's.
        number: Number of the round.

    Returns:
        JSON values: `spearman` of derivatives with real steps and its `interval`, `labels_spearman` of the round's
        labels with real steps; `not_audited` with the reason where it failed; nothing where there is no derivative to
        be audited, or fewer than 16 labels.
    """
    audit_path = path / "audit.json"
    if audit_path.exists():
        return read_json(audit_path)
    if not isinstance(run.probe, DirectionalProbe) or len(labels) < NUM_AUDITED:
        return {}
    if engine_optimizer(run.optimizer) is not None:
        return {"not_audited": "DeepSpeed's engine takes real steps alone"}
    seed = stage_seed(run.config.selection_seed, number, "audit")
    picked = np.sort(np.random.default_rng(seed).choice(len(labels), NUM_AUDITED, replace=False))
    found = measure_audit(run, labels.candidate_id[picked], epsilon=labels.info["epsilon"], seed=seed)
    if isinstance(found, str):
        # What it takes is less than the probe took. Where it fails all the same, the labels are as good as before.
        logger.warning("Round %d is not audited: %s", number, found)
        audit: dict[str, Any] = {"not_audited": found}
    else:
        audit = _agreement(*found, labels.influence[picked], seed)
        audit["num_passages"] = min(NUM_AUDIT_PASSAGES, len(run.reference))
    with unless_disk_fails("the audit, which a rerun of this round measures again"):
        write_json(audit_path, audit)
    return audit


def _agreement(fast: InfluenceLabels, oracle: InfluenceLabels, influence: FloatArray, seed: int) -> dict[str, Any]:
    """How far derivatives agree with real steps, and how far the round's labels of the same candidates do."""
    try:
        slope, intercept = np.polyfit(fast.influence.astype(np.float64), oracle.influence.astype(np.float64), 1)
    except (np.linalg.LinAlgError, ValueError) as error:
        return {"not_audited": f"{type(error).__name__}: {error}"}
    return {
        "truth": "one optimizer step on the candidate alone, clipped as the run clips",
        "num_candidates": len(fast),
        "spearman": rank_correlation(fast.influence, oracle.influence),
        "interval": list(bootstrap_interval(fast.influence, oracle.influence, seed)),
        "labels_spearman": rank_correlation(influence, oracle.influence),
        "slope": float(slope),
        "intercept": float(intercept),
        "flops": float(fast.info.get("flops", 0.0)) + float(oracle.info.get("flops", 0.0)),
    }
