"""Beyond text: are labels of images, sounds and pairs right, and does choosing by them pay?

Three parts, in units that run in processes of their own and are kept one by one; a quarter of an hour on two cores,
and no data.

- `labels`: Spearman of the directional labels, and of the one-step oracle's, with the change of the reference loss
  when a candidate takes the place of a row of real batches; five kinds of models.
- `speed`: candidates a second of both, and of gradients taken for each candidate, in turns on one thread.
- `training`: three set-ups with wrong labels in the pool and a clean reference. Rows chosen by influence against
  random ones and against those of lowest or highest loss, at equal steps and at equal FLOPs. The learning rate (best
  for random rows) and the better of the two ways to choose by loss come from a seed of their own.

Trade-off: models of some ten thousand parameters, and examples where it is planted what should be left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import versions
from benchmarks.lab.units import run_units
from benchmarks.quality.modalities.labels import agreement, speed
from benchmarks.quality.modalities.page import page
from benchmarks.quality.modalities.setup import QUICK, Sizes
from benchmarks.quality.modalities.training import HIGH, LOW, RANDOM, compare, tune

__all__ = ["page", "run"]
DIGITS = 6
FUNCTIONS = {"labels": agreement, "speed": speed, "tune": tune, "training": compare}
Calls = dict[str, tuple[Any, ...]]


def run_unit(part: str, sizes: Sizes, *arguments: Any) -> dict[str, Any]:
    """Run one unit; its result."""
    return {"part": part, **FUNCTIONS[part](sizes, *arguments)}


def last_loss(found: dict[str, Any]) -> float:
    """Loss that a tuning run ended with."""
    return float(found["curve"][-1]["loss"])


def run(bench: Bench) -> dict[str, Any]:
    """Run what is missing; the JSON document of what is done so far."""
    sizes = QUICK if bench.quick else Sizes()
    units: dict[str, Any] = {}
    left = 0

    def done(part: str, calls: Calls) -> dict[str, Any]:
        nonlocal left
        found = run_units(bench, run_unit, {name: (part, sizes, *arguments) for name, arguments in calls.items()})
        units.update(found)
        left += bench.left
        return found

    seed = sizes.tuning_seed
    rates = {(setup, lr): f"tune/{setup}/{RANDOM}/{lr:g}" for setup in sizes.setups for lr in sizes.rates}
    found = done("tune", {name: (setup, RANDOM, lr, seed) for (setup, lr), name in rates.items()})
    chosen = {
        setup: min(sizes.rates, key=lambda lr, setup=setup: last_loss(found[rates[setup, lr]]))
        for setup in sizes.setups
        if all(rates[setup, lr] in found for lr in sizes.rates)
    }
    ways = {(setup, arm): f"tune/{setup}/{arm}" for setup in chosen for arm in (LOW, HIGH)}
    found = done("tune", {name: (setup, arm, chosen[setup], seed) for (setup, arm), name in ways.items()})
    rivals = {
        setup: min((LOW, HIGH), key=lambda arm, setup=setup: last_loss(found[ways[setup, arm]]))
        for setup in chosen
        if all(ways[setup, arm] in found for arm in (LOW, HIGH))
    }
    done("labels", {
        f"labels/{kind}/{i}": (kind, i) for i in range(sizes.label_seeds) for kind in sizes.kinds
    })  # fmt: skip
    done("training", {
        f"training/{setup}/{i}": (setup, chosen[setup], rivals[setup], i)
        for i in range(sizes.seeds) for setup in rivals
    })  # fmt: skip
    done("speed", {f"speed/{kind}": (kind,) for kind in sizes.kinds})
    bench.left = left
    return {
        "settings": {
            "quick": bench.quick, "sizes": dataclasses.asdict(sizes), "learning_rates": chosen, "rivals": rivals,
            "missing": left, **versions("torch", "transformers"),
        },
        "units": units,
    }  # fmt: skip
