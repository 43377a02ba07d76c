"""Floors for groups of rows: how much of the gain on the reference is left, and what do groups lose without them?

A model of a million parameters takes 300 random steps; from there each arm goes on for 200 steps at a constant rate,
in rounds of 100, and chooses a fifth of the same candidates. `min_group_boost` is 0 (no floor), 0.5 and 1.0, over the
domains of the corpus; another arm draws 30 % of its rows at random, as the library does by default. Arms of one seed
share weights, warm-up, order of the pool, and the labels of the first round. Losses are read once, at the end, at
weights averaged over the last 32 steps: on 512 test passages of LAMBADA, which no label saw, and on rows of each
domain that no arm trains on.

Every arm and seed is a unit that is kept under `--work`: a killed run goes on where it stopped. About a quarter of an
hour on one core.

Trade-off: one small model, one corpus and 200 steps. Domains are coarse: a floor over finer groups takes away more.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.lab.checkpoint import BATCH_ROWS, WINDOW, Paths, one_a_document, warm_point
from benchmarks.lab.corpus import Lab, load_lab
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import versions
from benchmarks.lab.models import LR, TOKENS_PER_BATCH, Averager, row_losses, task_losses
from benchmarks.lab.statistics import Ids, mean_interval
from benchmarks.lab.tables import interval, markdown, table, title
from benchmarks.lab.units import read_units, run_units
from mates_hf.flops import PATH_STEPS
from mates_hf.influence.passes import mean_loss
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.selection.quota import Quota, best_within

DATA, DIGITS = True, 7
RANDOM, FREE = "random", "no floor"
FLOOR: dict[str, float] = {  # `min_group_boost`
    FREE: 0.0,
    "floor 0.5": 0.5,
    "floor 1.0": 1.0,
    "30 % random": 0.0,
}
SHARE = {name: 0.3 * name.startswith("30 %") for name in FLOOR}  # of rows that are drawn at random
ARMS = (RANDOM, *FLOOR)
PROBES, PASSAGES, ROUND_STEPS, RATIO = 200, 64, 100, 0.2
SEEDS = 3
LOST = 0.02  # nats/token by which a group is called worse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is run; the defaults are the full run."""

    documents: int | None = None  # read of the corpus; None is all
    warm: int = 300  # random steps before the first round
    steps: int = 200  # that every arm goes on for
    passages: int = 256  # of the reference, and of the development part
    test: int = 512  # test passages at most
    reserved: int = 1_000  # rows, one a document, that probes are drawn from and no arm trains on
    held: int = 1_200  # rows that no arm trains on, to see what groups lose


QUICK = Sizes(documents=6_000, warm=40, steps=40, passages=32, test=32, reserved=1_000, held=200)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One training."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """In messages and file names."""
        return f"{self.arm}/{self.seed}"


@functools.lru_cache(maxsize=1)
def open_lab(paths: Paths, sizes: Sizes) -> Lab:
    """The laboratory: LAMBADA as the reference, and the corpus with its domains."""
    return load_lab(
        paths.data, paths.work / "lambada", num_documents=sizes.documents, task="lambada",
        num_reference=sizes.passages, num_development=sizes.passages, num_test=sizes.test,
    )  # fmt: skip


class Run:
    """A training whose rounds keep a floor."""

    def __init__(self, paths: Paths, sizes: Sizes, unit: Unit) -> None:
        self.lab, self.sizes, self.unit = open_lab(paths, sizes), sizes, unit
        self.point = warm_point(self.lab, sizes.warm, paths.work / "lambada", unit.seed, width=128, layers=4)
        rest = self.point.rest
        by_document = one_a_document(self.lab, rest)
        self.held, self.reserved, _ = np.split(by_document, [sizes.held, sizes.held + sizes.reserved])
        self.open_rows: Ids = rest[~np.isin(rest, np.concatenate([self.held, self.reserved]))]
        self.rounds: list[dict[str, Any]] = []
        self._fitted: NgramInfluenceModel | None = None

    def train(self) -> dict[str, Any]:
        """Go through all rounds; the result as JSON values."""
        length = min(ROUND_STEPS, self.sizes.steps // 2)
        for number in range(self.sizes.steps // length):
            chosen = self._choose(number, length * BATCH_ROWS)
            chosen = np.random.default_rng([self.unit.seed, 4, number]).permutation(chosen)
            averager = Averager(self.point.model, length, min(WINDOW, length))
            self.point.train(chosen, on_step=averager.update)
            self.point.average = averager.average
        with self.point.average.swapped_in():
            final = self._final()
        parameters = count_multiplied_parameters(self.point.model)
        return {**dataclasses.asdict(self.unit), "parameters": parameters, "final": final, "rounds": self.rounds}

    def _final(self) -> dict[str, Any]:
        """Losses on test passages, on rows that no arm trains on, and on those of each domain."""
        model, held = self.point.model, self.lab.rows.take(self.held)
        domain, size = self.lab.domain[self.held], len(self.lab.domain_names)
        counts = np.bincount(domain, minlength=size)
        return {
            "test": task_losses(model, self.lab.test),
            "pool": mean_loss(model, held, tokens_per_batch=TOKENS_PER_BATCH),
            "groups": (np.bincount(domain, row_losses(model, held), size) / np.maximum(counts, 1)).tolist(),
            "group_rows": counts.tolist(),
        }

    def _choose(self, number: int, k: int) -> Ids:
        """The (k,) rows of a round."""
        lab, arm = self.lab, self.unit.arm
        if arm == RANDOM:
            chosen, self.open_rows = np.split(self.open_rows, [k])
            return chosen
        candidates, self.open_rows = np.split(self.open_rows, [round(k / RATIO)])
        values = self._values(number, candidates)
        quota = Quota(lab.domain[candidates], None, FLOOR[arm])
        limits = quota.limits(k, np.ones(len(candidates), np.bool_))
        by_value = k - round(SHARE[arm] * k)
        seeds = ((self.unit.seed, number), (self.unit.seed, number, 1))
        chosen = candidates[best_within(values, quota.codes, limits, (by_value, k), seeds)]
        size = len(lab.domain_names)
        self.rounds.append({
            "candidates": np.bincount(lab.domain[candidates], minlength=size).tolist(),
            "chosen": np.bincount(lab.domain[chosen], minlength=size).tolist(),
        })  # fmt: skip
        return chosen

    def _values(self, number: int, candidates: Ids) -> Any:
        """(N,) predicted influence of candidates: a round's probe and fit."""
        lab, ids = self.lab, self.reserved[number * PROBES : (number + 1) * PROBES]
        reference = lab.reference["all"].subset(PASSAGES, seed=number)
        probe = DirectionalProbe(tokens_per_batch=TOKENS_PER_BATCH, path_steps=PATH_STEPS, path_rate=0.5)
        with self.point.weights(averaged=True):
            labels = probe.measure(self.point.model, self.point.optimizer, reference, lab.rows.take(ids))
        tables = NgramInfluenceModel(seed=self.unit.seed, labels="token", pool_decay=0.9)
        self._fitted = tables.fit(lab.rows.take(ids), labels, groups=lab.domain[ids], previous=self._fitted)
        return np.asarray(self._fitted.predict(lab.rows.take(candidates)))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which units to run."""
    parser.add_argument("--seeds", nargs="+", type=int, help="these only")


def run_unit(paths: Any, sizes: Sizes, unit: Unit) -> dict[str, Any]:
    """Train one arm of one seed; its result as JSON values."""
    return Run(paths, sizes, unit).train()


def run(bench: Bench) -> dict[str, Any]:
    """Run what is missing; the JSON document of what is done so far."""
    sizes = QUICK if bench.quick else Sizes()
    seeds = bench.options.seeds or range(1 if bench.quick else SEEDS)
    units = [Unit(arm=arm, seed=seed) for seed in seeds for arm in ARMS]
    paths = bench.paths
    run_units(bench, run_unit, {unit.name: (paths, sizes, unit) for unit in units})
    lab = open_lab(paths, sizes)
    return {
        "settings": {
            "quick": bench.quick, "sizes": dataclasses.asdict(sizes), "probes": PROBES, "passages": PASSAGES,
            "learning_rate": LR, "batch_rows": BATCH_ROWS, "window": WINDOW, **versions("torch", "transformers"),
        },
        "domains": lab.domain_names, "test": len(lab.test["all"]),
        "units": list(read_units(bench.work, [unit.name for unit in units]).values()),
    }  # fmt: skip


class Results:
    """What the units say, paired by seed."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.names: list[str] = document["domains"]
        self.units = {(unit["arm"], unit["seed"]): unit for unit in document["units"]}
        self.seeds = sorted({seed for _, seed in self.units if all((arm, seed) in self.units for arm in ARMS)})

    def minus_random(self, arm: str, *path: Any) -> list[float]:
        """A final loss minus that of random rows, seed by seed."""

        def read(name: str, seed: int) -> float:
            found: Any = self.units[name, seed]["final"]
            for key in path:
                found = found[key]
            return float(found)

        return [read(arm, seed) - read(RANDOM, seed) for seed in self.seeds]

    def kept(self, arm: str) -> list[float]:
        """The share of the gain without a floor that an arm keeps, seed by seed."""
        path = ("test", "all")
        pairs = zip(self.minus_random(arm, *path), self.minus_random(FREE, *path), strict=True)
        return [mine / free for mine, free in pairs]

    def group(self, arm: str, number: int) -> list[float]:
        """The change of a group's loss against random rows, seed by seed."""
        return self.minus_random(arm, "groups", number)

    def mean_of_groups(self, arm: str) -> list[float]:
        """The mean over groups of that change, seed by seed."""
        return np.mean([self.group(arm, number) for number in range(len(self.names))], axis=0).tolist()

    def boost(self, arm: str, number: int) -> float:
        """How many times its share of the candidates a group got, over all rounds and seeds."""
        rounds = [one for seed in self.seeds for one in self.units[arm, seed]["rounds"]]
        chosen, offered = (np.sum([one[name] for one in rounds], axis=0) for name in ("chosen", "candidates"))
        return float(chosen[number] / chosen.sum() / (offered[number] / offered.sum()))


def _share(values: list[float]) -> str:
    mean, half = mean_interval(values)
    return f"{mean:.0%}" + ("" if np.isnan(half) else f" ± {half:.0%}")


def page(document: dict[str, Any]) -> str:
    """The Markdown page."""
    found, settings = Results(document), document["settings"]
    sizes = settings["sizes"]
    about = (
        f"GPT-NeoX of {document['units'][0]['parameters']:,} parameters, {sizes['warm']} random steps of "
        f"{settings['batch_rows']} rows of 64 tokens, then {sizes['steps']} steps in each arm. A fifth of the "
        f"candidates is chosen; {settings['probes']} probes and {settings['passages']} passages a round. Seeds: "
        f"{', '.join(map(str, found.seeds))}. Differences to random rows in nats/token, below 0 is better; ± is half "
        f"the 95 % t interval over seeds. Python {settings['python']}, torch {settings['torch']}, transformers "
        f"{settings['transformers']}."
    )
    if not found.seeds:
        return markdown(title("floors", settings["quick"]), about, "Not finished.")
    rows = []
    for arm in FLOOR:
        means = [float(np.mean(found.group(arm, number))) for number in range(len(found.names))]
        worst = int(np.argmax(means))
        rows.append([
            arm, interval(found.minus_random(arm, "test", "all")), "" if arm == FREE else _share(found.kept(arm)),
            interval(found.minus_random(arm, "pool")), interval(found.mean_of_groups(arm)),
            f"{sum(mean > LOST for mean in means)} of {len(means)}", f"{found.names[worst]} {means[worst]:+.3f}",
            f"{min(found.boost(arm, number) for number in range(len(found.names))):.2f}",
        ])  # fmt: skip
    heads = [
        "arm", f"reference ({document['test']} test passages)", "gain kept", "pool's own text", "mean of groups",
        f"groups worse by more than {LOST:g}", "worst group", "least boost of a group",
    ]  # fmt: skip
    counts = found.units[RANDOM, found.seeds[0]]["final"]["group_rows"]
    groups = [
        [
            name,
            counts[number],
            *(f"{interval(found.group(arm, number), 3)} ({found.boost(arm, number):.2f})" for arm in FLOOR),
        ]
        for number, name in enumerate(found.names)
    ]
    return markdown(
        title("floors", settings["quick"]), about, table(heads, rows), "## By group",
        "Loss minus that of random rows, and in brackets how many times its share of the candidates the group got.",
        table(["group", "rows read", *FLOOR], groups),
    )  # fmt: skip
