"""What a round says of itself to loggers: `mates/...` metrics.

Where it is used: `training/session` makes them of a `round.json`, and the callback gives them to the reporters. None
of them is an influence in nats/token: the default probe's path labels are an order, whose zero and scale mean nothing.
So `mates/spearman` and its kin compare ranks, and no share of candidates "above 0" is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
