"""Over thousands of steps: is the run's own selection ahead of the best static filter, and what does it take away?

A model of half a million parameters takes 1,000 steps of a warm start; from there each arm goes on for 4,000 steps
of 16 rows of 128 tokens, the last tenth of them in a decay of the learning rate to 0. Decays that would have ended
after 1,000 and 2,000 steps are branched off and gone back from, so that each arm is compared at three lengths. There
are four settings: one style of text, questions of five tasks, continued pretraining, and eight domains at once. Two
of them are there again with models of 4 and 10 million parameters, which take fewer steps and are run where they are
named.

Losses are read from passages that no arm has seen: of each part of the reference, of tasks that are not in it, and of
the pool's own text by domain. Seeds from 10 on are for choosing settings and read other passages than the reported
seeds 0 to 2 do.

Every arm and seed is a unit of 10 to 20 minutes that is kept under `--work`; a run finds finished units in the newest
JSON, made by arms as they are now. Without `--arms` nothing but `random`, `ours` and `fastText` is run.

Trade-off: small models. FLOPs are 6 (training) and 2 (reading) for each parameter and token, plus what probes say
of themselves; of static filters, those that look words up count as none.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import versions
from benchmarks.lab.units import recover, run_units
from benchmarks.quality.horizon.arms import ARMS, RANDOM, REPORTED_SEEDS, Arm, Unit
from benchmarks.quality.horizon.docs import tables
from benchmarks.quality.horizon.frontier import pictures
from benchmarks.quality.horizon.page import page
from benchmarks.quality.horizon.settings import QUICK, SETTINGS, Scale, Sizes
from benchmarks.quality.horizon.training import run_unit

__all__ = ["add_options", "page", "pictures", "run", "tables"]
DATA, DIGITS = True, 6
FIRST_ARMS = (RANDOM, "ours", "fastText")
FIRST_SETTINGS = [name for name, setting in SETTINGS.items() if setting.scale == Scale()]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which units to run."""
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], metavar="ARM", default=FIRST_ARMS, help="these arms")
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS], default=FIRST_SETTINGS, help="these settings")
    parser.add_argument("--seeds", nargs="+", type=int, default=[*REPORTED_SEEDS], help="these; from 10 on for tuning")


def run(bench: Bench) -> dict[str, Any]:
    """Run what is missing; the JSON document of what is done so far."""
    options, sizes = bench.options, QUICK if bench.quick else Sizes()
    names = options.settings
    if bench.quick:  # the built-in text has none of the domains that other settings are made of
        names = ["style", "continued"] if options.data else ["style"]
    units = [
        Unit(setting=setting, arm=arm, seed=seed)
        for seed in ([10] if bench.quick else options.seeds)
        for setting in names
        for arm in options.arms
        if ARMS[arm].installed
    ]
    earlier = recover(bench, sizes, Unit, ARMS, Arm())
    done = run_units(bench, run_unit, {unit.name: (bench.data, bench.work, sizes, unit) for unit in units})
    found = {**earlier, **done}
    return {
        "settings": {"quick": bench.quick, "sizes": dataclasses.asdict(sizes), **versions("torch", "transformers")},
        "units": list(found.values()),
    }
