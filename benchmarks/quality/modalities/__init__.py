"""Beyond text: are labels of images, sounds and pairs right, and does choosing by them pay?

Three parts, in units that run in processes of their own and are kept one by one; half an hour on two cores,
and no data.

- `labels`: Spearman of the directional labels, and of the one-step oracle's, with the change of the reference loss
  when a candidate takes the place of a row of real batches; five kinds of models.
- `speed`: candidates a second of both, and of gradients taken for each candidate, in turns on one thread.
- `training`: in three set-ups a fifth of the pool's labels are wrong, and the reference is of half of the kinds of
  examples; in two more, labels are wrong and nothing else. Rows chosen by influence against random ones and against
  those of lowest or highest loss, at equal steps and at equal FLOPs. The learning rate (best for random rows), and how
  ours and the rows by loss are chosen, come from seeds of their own.

Trade-off: models of some ten thousand parameters, and examples where it is planted what should be left out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import versions
from benchmarks.lab.units import run_units
from benchmarks.quality.modalities.docs import tables
from benchmarks.quality.modalities.labels import agreement, speed
from benchmarks.quality.modalities.page import page
from benchmarks.quality.modalities.setup import QUICK, TRAINED, Choice, Sizes
from benchmarks.quality.modalities.training import HIGH, LOW, OURS, RANDOM, compare, tune

__all__ = ["page", "run", "tables"]
DIGITS = 6
FUNCTIONS = {"labels": agreement, "speed": speed, "tune": tune, "training": compare}
Calls = dict[str, tuple[Any, ...]]
Try = tuple[str, Choice, float]  # an arm, how it chooses, and the learning rate


def run_unit(part: str, sizes: Sizes, *arguments: Any) -> dict[str, Any]:
    """Run one unit; its result."""
    return {"part": part, **FUNCTIONS[part](sizes, *arguments)}


def way(one: Try) -> str:
    """How an arm chooses, in names."""
    return one[0] if one[0] == RANDOM else f"{one[0]}, {one[1].name}"


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

    def best(tries: dict[str, list[Try]]) -> dict[str, Try]:
        """Of each set-up, what has the lowest loss over the tuning seeds, where all of it ran."""
        names = {
            (setup, one): [f"tune/{setup}/{way(one)}, {one[2]:g}/{seed}" for seed in sizes.tuning_seeds]
            for setup, some in tries.items()
            for one in some
        }
        found = done("tune", {
            name: (setup, *one, seed)
            for (setup, one), own in names.items() for seed, name in zip(sizes.tuning_seeds, own, strict=True)
        })  # fmt: skip
        losses = {key: mean_loss(found, own) for key, own in names.items()}
        return {
            setup: min(some, key=lambda one, setup=setup: losses[setup, one])
            for setup, some in tries.items()
            if not any(math.isnan(losses[setup, one]) for one in some)
        }

    at_random = best({setup: [(RANDOM, Choice(), lr) for lr in sizes.rates] for setup in sizes.setups})
    rates = {setup: lr for setup, (_, _, lr) in at_random.items()}
    by_loss = best({
        setup: [(arm, choice, lr) for arm in (LOW, HIGH) for choice in sizes.by_loss] for setup, lr in rates.items()
    })  # fmt: skip
    ours = best({setup: [(OURS, choice, lr) for choice in sizes.choices] for setup, lr in rates.items()})
    ready = {
        setup: (lr, ours[setup][1], *by_loss[setup][:2])
        for setup, lr in rates.items()
        if setup in ours and setup in by_loss
    }
    done("labels", {
        f"labels/{kind}/{i}": (kind, i) for i in range(sizes.label_seeds) for kind in sizes.kinds
    })  # fmt: skip
    done("training", {
        f"training/{setup}/{sizes.first_seed + i}": (setup, *settings, sizes.first_seed + i)
        for setup, settings in ready.items()
        for i in range(sizes.seeds_only_wrong if TRAINED[setup].only_wrong else sizes.seeds)
    })  # fmt: skip
    done("speed", {f"speed/{kind}": (kind,) for kind in sizes.kinds})
    bench.left = left
    return {
        "settings": {
            "quick": bench.quick, "sizes": dataclasses.asdict(sizes), "missing": left,
            "chosen": {
                setup: {
                    "later": TRAINED[setup].later, "learning rate": lr, "ours": choice.name,
                    "rival": way((rival, by, lr)),
                }
                for setup, (lr, choice, rival, by) in ready.items()
            },
            **versions("torch", "transformers"),
        },
        "units": units,
    }  # fmt: skip
