"""Beyond text: are labels of images, sounds and pairs right, and does choosing by them pay?

Three parts, in units that run in processes of their own and are kept one by one; half an hour on two cores,
and no data.

- `labels`: Spearman of the directional labels, and of the one-step oracle's, with the change of the reference loss
  when a candidate takes the place of a row of real batches; five kinds of models.
- `speed`: candidates a second of both, and of gradients taken for each candidate, in turns on one thread.
- `training`: in three set-ups a fifth of the pool's labels are wrong, and the reference is of half of the kinds of
  examples; in two more, labels are wrong and nothing else. Rows chosen by influence against random ones and against
  those of lowest or highest loss, at equal steps and at equal FLOPs. The learning rate (best for random rows) and the
  better of the two ways to choose by loss come from seeds of their own.

Trade-off: models of some ten thousand parameters, and examples where it is planted what should be left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
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


def mean_loss(found: dict[str, Any], names: list[str]) -> float:
    """Mean of the losses that tuning runs ended with; not a number where one is missing."""
    ends = [float(found[name]["curve"][-1]["loss"]) if name in found else math.nan for name in names]
    return sum(ends) / len(ends)


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

    def tuned(arm: str, setup: str, lr: float) -> list[str]:
        return [f"tune/{setup}/{arm}/{lr:g}/{seed}" for seed in sizes.tuning_seeds]

    def best(arms: dict[str, tuple[str, ...]], rates: dict[str, tuple[float, ...]]) -> dict[str, tuple[str, float]]:
        """Of each set-up, the arm and the rate with the lowest loss over the tuning seeds, where all of them ran."""
        tried = {setup: list(itertools.product(arms[setup], rates[setup])) for setup in rates}
        calls = {
            name: (setup, arm, lr, seed)
            for setup, pairs in tried.items()
            for arm, lr in pairs
            for seed, name in zip(sizes.tuning_seeds, tuned(arm, setup, lr), strict=True)
        }
        found = done("tune", calls)
        losses = {
            setup: {(arm, lr): mean_loss(found, tuned(arm, setup, lr)) for arm, lr in pairs}
            for setup, pairs in tried.items()
        }
        return {
            setup: min(own, key=own.__getitem__)
            for setup, own in losses.items()
            if not any(map(math.isnan, own.values()))
        }

    random_rows = best(dict.fromkeys(sizes.setups, (RANDOM,)), dict.fromkeys(sizes.setups, sizes.rates))
    chosen = {setup: lr for setup, (_, lr) in random_rows.items()}
    by_loss = best(dict.fromkeys(chosen, (LOW, HIGH)), {setup: (lr,) for setup, lr in chosen.items()})
    rivals = {setup: arm for setup, (arm, _) in by_loss.items()}
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
