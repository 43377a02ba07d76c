"""What an influence label agrees with: one real batch, and 10 to 1,000 steps on the rows it prefers.

Five parts, in units that run in processes of their own and are kept one by one; about an hour on two cores.

- `in_batch`: labels against the change of the reference loss when a candidate replaces one row of a real batch. The
  truth is brute force, in several configurations of step, rate, clipping, batch, lengths, model and precision.
- `cost`: seconds that each kind of label takes for 1,000 candidates, one thread, in turns.
- `horizon`: development loss after training on sets of rows chosen by predicted influence. A label that predicts one
  step well can still choose badly.
- `rounds`: labels of the same candidates from round to round (what selecting by them gains is in `selection`).
- `fit`: held-out rank correlation of the n-gram influence model by kind and number of labels.

Trade-off: one small model on one corpus; every figure has its learning rate, seed and interval beside it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from benchmarks.lab.checkpoint import BATCH_ROWS, WINDOW, Paths
from benchmarks.lab.corpus import Lab, load_lab
from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import versions
from benchmarks.lab.models import LR, build_model
from benchmarks.lab.units import plain, run_units, take_over
from benchmarks.quality.fidelity.one_step import cost, in_batch
from benchmarks.quality.fidelity.page import page
from benchmarks.quality.fidelity.setup import QUICK, Sizes
from benchmarks.quality.fidelity.training import ARMS, LABEL_KINDS, SETS, fit, horizon, rounds

__all__ = ["page", "run"]
DATA = True
DIGITS = 5
FUNCTIONS = {"in_batch": in_batch, "cost": cost, "horizon": horizon, "rounds": rounds, "fit": fit}
Unit = tuple[str, str, dict[str, Any]]
QUICK_UNITS = (
    "in_batch/late", "in_batch/many lengths", "cost/late", "fit/all tokens, averaged", "horizon/random/random",
    "horizon/all tokens, averaged/deciles", "horizon/all tokens, averaged/top", "rounds/random",
    "rounds/averaged, pooled",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def open_lab(paths: Paths, sizes: Sizes) -> Lab:
    """The laboratory, once a process."""
    return load_lab(paths.data, paths.work, num_documents=sizes.documents)


def all_units(sizes: Sizes) -> list[Unit]:
    """(name, part, arguments) of everything there is to do, in the order of worth."""
    late, early = sizes.warm, sizes.early
    configurations = {
        "late": {"steps": late},
        "early": {"steps": early},
        "β2 0.999": {"steps": late, "beta2": 0.999},
        "clipping off": {"steps": late, "clip": None},
        "many lengths": {"steps": late, "many_lengths": True},
        "large batch": {"steps": sizes.large_batch_steps, "batch_rows": sizes.large_batch},
        "1,000 steps": {"steps": sizes.long},
        "rate 3e-3": {"steps": late, "lr": 3e-3},
        "Llama": {"steps": late, "family": "llama"},
        "1 M parameters": {"steps": late, "width": 128, "layers": 4},
        "labels in bf16": {"steps": late, "bf16": True},
        "seed 1": {"steps": late, "seed": 1},
    }
    units: list[Unit] = [(f"in_batch/{name}", "in_batch", settings) for name, settings in configurations.items()]
    units += [("cost/late", "cost", {}), ("fit/all tokens, averaged", "fit", {"kind": "all tokens, averaged"})]
    units += [(f"rounds/{arm}", "rounds", {"arm": arm}) for arm in ARMS]
    units += [
        (f"horizon/{kind}/{which}", "horizon", {"kind": kind, "which": which})
        for kind, names in SETS.items()
        for which in names
    ]
    return units if sizes.everything else [unit for unit in units if unit[0] in QUICK_UNITS]


def settings_of(unit: Unit) -> dict[str, Any]:
    """What a unit was made with, so far as the sizes do not say it."""
    _, part, arguments = unit
    return {"part": part, **arguments, "label": LABEL_KINDS.get(arguments.get("kind", ""), {})}


def run_unit(paths: Paths, sizes: Sizes, unit: Unit) -> dict[str, Any]:
    """Run one unit; its result."""
    _, part, arguments = unit
    return {**FUNCTIONS[part](open_lab(paths, sizes), sizes, paths, **arguments), "settings": settings_of(unit)}


def run(bench: Bench) -> dict[str, Any]:
    """Run what is missing; the JSON document of what is done so far."""
    sizes, paths = QUICK if bench.quick else Sizes(), bench.paths
    lab = open_lab(paths, sizes)
    say(f"{len(lab.rows)} rows in {len(lab.domain_names)} domains; {lab.overlap}")
    units = all_units(sizes)
    document, now = bench.earlier(), plain(dataclasses.asdict(sizes))
    # A size that the JSON does not know is of a part that it does not have.
    if document is not None and all(document["settings"].get(name, value) == value for name, value in now.items()):
        take_over(bench.work, document["units"], {unit[0]: settings_of(unit) for unit in units})
    results = run_units(bench, run_unit, {unit[0]: (paths, sizes, unit) for unit in units})
    return {
        "settings": {
            **dataclasses.asdict(sizes), "learning_rate": LR, "batch_rows": BATCH_ROWS, "window": WINDOW,
            "parameters": build_model(lab.vocab_size).num_parameters(), "vocab_size": lab.vocab_size,
            "row_tokens": int(lab.rows.lengths[0]), "pool_rows": len(lab.rows), "domains": lab.domain_names,
            "reference_passages": len(lab.reference["all"]), "development_passages": len(lab.development["all"]),
            **versions("torch"), "missing": bench.left, **lab.overlap,
        },
        "units": results,
    }  # fmt: skip
