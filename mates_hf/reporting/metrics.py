"""What a round says of itself to loggers: `mates/...` metrics.

Where it is used: `training/session` makes them of a `round.json`, and the callback gives them to the reporters. None
of them is an influence in nats/token: the default probe's path labels are an order, whose zero and scale mean nothing.
So `mates/spearman` and its kin compare ranks, and no share of candidates "above 0" is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The names there are, and what each says; the table in docs/monitoring.md is this one.
METRICS = {
    "mates/round": "number of the round",
    "mates/selected": "1 where the round selected, 0 where the guard kept the Trainer's own order",
    "mates/spearman": "held-out rank correlation of predicted and measured influence",
    "mates/spearman_low": "lower end of its 95% interval",
    "mates/spearman_high": "upper end of its 95% interval",
    "mates/previous_spearman": "the same of the previous round's influence model, on the fresh labels",
    "mates/reversed": "1 where the fresh labels contradict the previous influence model",
    "mates/gap": "what the last round chose against the rest, in standard deviations of the fresh labels",
    "mates/check_gap": "the same, of a check inside the round",
    "mates/drift_spearman": "rank correlation of a check's labels with those at the round (`drift_check_steps`)",
    "mates/early": "1 where a check started the round before its time",
    "mates/reference_loss": "loss of the reference task at the null step, nats/token",
    "mates/reference_rise": "by how much that loss rose since the boundary before, nats/token",
    "mates/fidelity": "rank correlation of a few candidates' labels with real steps on them",
    "mates/num_candidates": "rows that the round chose from",
    "mates/num_probed": "candidates that were probed",
    "mates/num_rows": "rows of its order",
    "mates/round_steps": "length of the round in optimizer steps, where rounds find their length",
    "mates/repeated_share": "share of the candidates whose text an earlier candidate has too",
    "mates/reference_overlap": "share of the selected rows that share a run of tokens with the reference task",
    "mates/seconds": "wall-clock of all stages",
    "mates/digest_seconds": "of that, the digest of the weights",
    "mates/probe_seconds": "of that, the probe",
    "mates/audit_seconds": "of that, the audit by real steps",
    "mates/sentinel_seconds": "of that, the labels that later checks compare with (`drift_check_steps`)",
    "mates/fit_seconds": "of that, the fit of the influence model",
    "mates/guard_seconds": "of that, what the guard asks the previous model",
    "mates/score_seconds": "of that, the prediction for every candidate",
    "mates/select_seconds": "of that, the choice",
    "mates/waited_seconds": "how long training waited for a round that ran next to it",
}


def round_metrics(info: Mapping[str, Any]) -> dict[str, float]:
    """`mates/...` metrics of a round, from its `round.json`."""
    metrics: dict[str, float] = {
        "mates/round": info["number"],
        "mates/spearman": info["guard"]["spearman"],
        "mates/spearman_low": info["guard"]["interval"][0],
        "mates/spearman_high": info["guard"]["interval"][1],
        "mates/selected": float(info["guard"]["decision"] != "own_order"),
        "mates/reversed": float(info["guard"].get("reversed", False)),
        "mates/num_rows": info["num_rows"],
        "mates/num_candidates": info["num_candidates"],
        "mates/num_probed": info["num_probed"],
        "mates/seconds": sum(stage["seconds"] for stage in info["stages"].values()),
    }
    if "round_steps" in info:
        metrics["mates/round_steps"] = info["round_steps"]
    if info.get("gap"):
        metrics["mates/gap"] = info["gap"]["gap"]
    if info.get("rise"):
        metrics["mates/reference_rise"] = info["rise"]["rise"]
    if "early" in info:
        metrics["mates/early"] = 1.0
    if "previous_spearman" in info["guard"]:
        metrics["mates/previous_spearman"] = info["guard"]["previous_spearman"]
    if "reference_overlap" in info:
        metrics["mates/repeated_share"] = info["repeated_share"]
        metrics["mates/reference_overlap"] = info["reference_overlap"]["share"]
    if "reference_loss" in info["probe"]:
        metrics["mates/reference_loss"] = info["probe"]["reference_loss"]
    if "spearman" in info["fidelity"]:
        metrics["mates/fidelity"] = info["fidelity"]["spearman"]
    for name, stage in info["stages"].items():
        metrics[f"mates/{name}_seconds"] = stage["seconds"]
    return metrics
