"""Does selecting pay? From one warm start, every way of choosing rows that a user might take instead.

A model of a million parameters takes 300 random steps; from there each arm goes on for 200 steps at the same constant
rate, on rows that it chooses itself from the same pool in the same order; the random arm for 1,000, to see when it
gets as far. Losses are read at weights averaged over the last 32 steps, in every arm. Arms of one seed share weights,
warm-up, optimizer state and the order of the pool. Reference passages (labels), development passages (curves) and test
passages (read once, at the end) are disjoint, and documents that share a 13-gram with any are dropped from the pool.
Settings: LAMBADA as reference, on the mixed pool and on the half that a fastText quality filter keeps; ARC-Easy and
passages of BoolQ.

Every arm and seed is a unit that is kept under `--work`: a killed run goes on where it stopped, and so does one that
finds finished units in the newest JSON, made at the same sizes by arms as they are now. About five hours on two cores
for all that the committed page has.

Static filters are run at the settings of their packages, and tuned: two or three settings each are tried on seeds
10 and 11, which no other table reports, and the one that ends lowest is run on the others.

Trade-off: one small model and one small corpus. FLOPs are 6 (training) and 2 (reading, an encoder too) for each
parameter and token, plus what probes say of themselves and the audit that the library makes each round; fitting
tables, and filters that look words up, run on a CPU and count in seconds only.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.lab.checkpoint import BATCH_ROWS, WINDOW
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import versions
from benchmarks.lab.models import LR
from benchmarks.lab.units import read_units, recover, run_units
from benchmarks.quality.selection import arms as known
from benchmarks.quality.selection.arms import ARMS, EVERY_ARM, OURS, RANDOM, SETTINGS, TUNING, Arm, Unit
from benchmarks.quality.selection.page import page, plot
from benchmarks.quality.selection.training import QUICK, Sizes, open_lab, run_unit

__all__ = ["add_options", "page", "plot", "run"]
DATA, DIGITS = True, 7
QUICK_ARMS = (RANDOM, OURS, "stratified by domain", "fastText", "random, passages mixed in", "ours, random mixed in")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which units to run."""
    parser.add_argument("--arms", nargs="+", choices=[*EVERY_ARM], metavar="ARM", help="these arms only")
    parser.add_argument("--tasks", nargs="+", choices=["lambada", "arc_easy", "boolq"], help="these references only")
    parser.add_argument("--seeds", nargs="+", type=int, help="these only, such as 5 to 9, which chose nothing")


def all_units(quick: bool, seeds: Sequence[int] | None) -> list[Unit]:
    """What there is to do, in the order of worth; arms whose package is missing are left out."""
    if quick:
        return [Unit(task="lambada", filtered=False, arm=arm, seed=0) for arm in QUICK_ARMS if ARMS[arm].installed]
    units = [
        Unit(task=task, filtered=filtered, arm=arm, seed=seed)
        for (task, filtered), (arms, num_seeds) in SETTINGS.items()
        for seed in (seeds or range(num_seeds))
        for arm in arms
        if ARMS[arm].installed and (seeds or seed < known.DEAR.get(arm, num_seeds))
    ]
    # What takes long comes after what does not, and ablations last.
    units.sort(key=lambda unit: unit.arm in known.SLOW)
    return units + [
        Unit(task="lambada", filtered=False, arm=arm, seed=seed)
        for seed in (seeds or range(known.ABLATION_SEEDS))
        for arm in known.ABLATIONS
    ]


def tuning_units(units: list[Unit]) -> list[Unit]:
    """What must be known before the tuned filters among the units are run."""
    return [
        Unit(task=task, filtered=filtered, arm=arm, seed=seed)
        for task, filtered, rank in dict.fromkeys(
            (unit.task, unit.filtered, EVERY_ARM[unit.arm].rank)
            for unit in units
            if EVERY_ARM[unit.arm].setting == "tuned"
        )
        for arm in TUNING
        if TUNING[arm].rank == rank
        for seed in known.TUNING_SEEDS
    ]


def run(bench: Bench) -> dict[str, Any]:
    """Run what is missing; the JSON document of what is done so far."""
    options, sizes = bench.options, QUICK if bench.quick else Sizes()
    units = all_units(bench.quick, options.seeds)
    wanted = [
        unit
        for unit in units
        if unit.arm in (options.arms or [unit.arm]) and unit.task in (options.tasks or [unit.task])
    ]
    before = tuning_units(wanted)
    if options.arms:
        before += [unit for unit in tuning_units(units) if unit.arm in options.arms and unit not in before]
    earlier = recover(bench, sizes, Unit, EVERY_ARM, Arm())
    paths = bench.paths
    run_units(bench, run_unit, {unit.name: (paths, sizes, unit) for unit in before})
    if not bench.left:
        run_units(bench, run_unit, {unit.name: (paths, sizes, unit) for unit in wanted})
    names = dict.fromkeys([*earlier, *(unit.name for unit in [*tuning_units(units), *units])])
    found = {**earlier, **read_units(bench.work, names)}
    missing = {unit.name for unit in all_units(bench.quick, None)} - found.keys()
    labs = {}
    for task, filtered in dict.fromkeys((result["task"], result["filtered"]) for result in found.values()):
        lab = open_lab(paths, sizes, task, filtered)
        labs[f"{task}{' filtered' if filtered else ''}"] = {
            "rows": len(lab.rows), "reference": len(lab.reference["all"]), "test": len(lab.test["all"]),
            "development": len(lab.development["all"]), "domains": lab.domain_names, **lab.overlap,
        }  # fmt: skip
    return {
        "settings": {
            "quick": bench.quick, "sizes": dataclasses.asdict(sizes), "learning_rate": LR, "batch_rows": BATCH_ROWS,
            "window": WINDOW, "missing": len(missing),
            **versions("torch", "transformers"),
        },
        "labs": labs,
        "units": list(found.values()),
    }  # fmt: skip
