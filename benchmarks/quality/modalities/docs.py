"""The tables of `docs/modalities.md`, made from the JSON of `modalities`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.lab.statistics import mean_interval
from benchmarks.lab.tables import table
from benchmarks.quality.modalities.page import OURS, RANDOM, arm_ends

PAGE = Path(__file__).resolve().parents[3] / "docs" / "modalities.md"
LEFT_OUT = ("ResNet",)  # has a part of the page of its own
Document = dict[str, Any]


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign as a page shows it."""
    found = f"{value:+.{digits}f}"
    return found[1:] if float(found) == 0 else found.replace("-", "−")


def labels_table(document: Document) -> str:
    """Spearman of labels by kind of model, means over seeds."""
    units = [unit for unit in document["units"].values() if unit["part"] == "labels"]
    rows = []
    for kind in dict.fromkeys(unit["kind"] for unit in units):
        if kind not in LEFT_OUT:
            found = [unit["agreement"][""] for unit in units if unit["kind"] == kind]
            means = [statistics.mean(one[label]["spearman"] for one in found) for label in ("directional", "one_step")]
            rows.append([kind, *(f"{mean:.3f}" for mean in means)])
    return table(["model", "directional labels, Spearman", "one-step oracle"], rows)


def training_table(document: Document) -> str:
    """Paired differences by set-up, with intervals."""
    units = [unit for unit in document["units"].values() if unit["part"] == "training"]
    sizes, rows = document["settings"]["sizes"], []
    for setup in dict.fromkeys(unit["setup"] for unit in units):
        own = [unit for unit in units if unit["setup"] == setup]
        for arm in own[0]["arms"]:
            if arm == OURS or (arm == RANDOM and "mislabelled" in setup):
                continue
            pairs = [(arm_ends(unit, OURS, sizes), arm_ends(unit, arm, sizes)) for unit in own]
            cells = []
            for i in range(2):
                mean, half = mean_interval([ours[i] - theirs[i] for ours, theirs in pairs])
                cells.append(f"{signed(mean)} [{signed(mean - half)}, {signed(mean + half)}]")
            name = arm if arm == RANDOM else f"of {arm}"
            rows.append([setup.replace("mislabelled", "mislabelled alone"), name, len(own), *cells])
    return table(["set-up", "ours minus rows that are", "seeds", "equal steps", "equal FLOPs"], rows)


def tables(document: Document) -> dict[Path, list[str]]:
    """Tables of `docs/` that follow from the JSON."""
    return {PAGE: [labels_table(document), training_table(document)]}
