"""The page and the plot of `selection`, made from its JSON and nothing else.

Signs: a difference of losses below 0 means that the arm named first is better. Multiples are of what the arm took from
the warm start on: above 1, random needs more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import plots
from benchmarks.lab.statistics import mean_interval, steps_to_reach
from benchmarks.lab.tables import interval, markdown, table, title
from benchmarks.quality.selection import arms as known
from benchmarks.quality.selection.arms import ARMS, FRUGAL, ORACLE_TABLES, OURS, RANDOM

Document = dict[str, Any]
Result = dict[str, Any]
LOSSES = ("all", "completion")
TITLES = {"lambada": "LAMBADA", "arc_easy": "ARC-Easy", "boolq": "passages of BoolQ"}
NOTES = {
    "cheap labels, n-gram tables": "labels of one step by the directional probe, of the last word at live weights, "
    "whole documents in n-gram tables, temperature 1, rounds of 40 steps",
    ORACLE_TABLES: "the same with 200 labels by the paper's one-step oracle on 64 passages",
    "one-step oracle, small encoder": "the oracle's labels on 64 passages, 500 a round; a fine-tuned MiniLM, "
    "temperature 1, rounds of 100 steps",
    "ours, labels of the one-step oracle": "ours with the oracle's labels instead of those along a path, on 64 "
    "passages; an oracle has labels of documents only, so it is to be read beside the changes `64 passages` and "
    "`document labels`",
}

FEWEST_SEEDS = 3  # of an arm that is reported


class Setting:
    """The trainings of one reference task and pool, by arm and seed; of some seeds where they are given."""

    def __init__(self, document: Document, task: str, filtered: bool, seeds: Sequence[int] | None = None) -> None:
        self.task, self.filtered, self.given = task, filtered, seeds
        self.num_steps = document["settings"]["sizes"]["steps"]
        self.results: dict[tuple[str, int], Result] = {
            (result["arm"], result["seed"]): result
            for result in document["units"]
            if (result["task"], result["filtered"]) == (task, filtered) and (seeds is None or result["seed"] in seeds)
        }
        if not document["settings"]["quick"]:  # an arm that was begun waits until its interval says something
            done = Counter(arm for arm, _ in self.results)
            few = {arm for arm in known.ARMS if done[arm] < FEWEST_SEEDS}
            self.results = {key: result for key, result in self.results.items() if key[0] not in few}

    def seeds(self, *arms: str) -> list[int]:
        """Seeds that all these arms have, from one warm start."""
        found = []
        for seed in sorted({seed for _, seed in self.results}):
            units = [self.results[arm, seed] for arm in arms if (arm, seed) in self.results]
            # One warm start: what it scores on the development passages tells, since training is deterministic.
            if len(units) == len(arms) and len({unit["curve"][0]["all"] for unit in units}) == 1:
                found.append(seed)
        return found

    def at_end(self, arm: str, seed: int) -> Result:
        """Development losses after the steps that all arms have."""
        return next(e for e in self.results[arm, seed]["curve"] if e["step"] == self.num_steps)

    def paired(self, arm: str, other: str, value: Callable[[str, int], float]) -> list[float]:
        """Arm minus other, seed by seed."""
        return [value(arm, seed) - value(other, seed) for seed in self.seeds(arm, other)]

    def curves(self, arm: str) -> tuple[list[int], list[list[float]]]:
        """Steps, and at each the losses on all tokens minus random's, seed by seed."""
        steps = [entry["step"] for entry in self.results[arm, self.seeds(arm, RANDOM)[0]]["curve"]]
        steps = [step for step in steps if step <= self.num_steps]

        def losses(name: str, seed: int) -> dict[int, float]:
            return {entry["step"]: entry["all"] for entry in self.results[name, seed]["curve"]}

        pairs = [(losses(arm, seed), losses(RANDOM, seed)) for seed in self.seeds(arm, RANDOM)]
        return steps, [[ours[step] - theirs[step] for ours, theirs in pairs] for step in steps]

    def development(self, key: str) -> Callable[[str, int], float]:
        """Reads a development loss at the end."""
        return lambda arm, seed: float(self.at_end(arm, seed)[key])

    def final(self, *path: str) -> Callable[[str, int], float]:
        """Reads something else that is known at the end."""

        def read(arm: str, seed: int) -> float:
            found: Any = self.results[arm, seed]["final"]
            for name in path:
                found = found[name]
            return float(found)

        return read

    def flops_share(self, arm: str, seed: int) -> float:
        """FLOPs from the warm start to the end, with everything that choosing took, over those of training alone."""
        costs = self.results[arm, seed]["costs"]
        return float(sum(entry["flops"] for entry in costs.values()) / costs["train"]["flops"])

    def random_steps(self, arm: str, seed: int, key: str) -> tuple[float, bool]:
        """Steps after which random has an arm's final loss, and whether it gets there at all; else how far it went."""
        curve = self.results[RANDOM, seed]["curve"]
        steps = steps_to_reach(curve, key, self.at_end(arm, seed)[key])
        return (float(curve[-1]["step"]), False) if steps is None else (steps, True)

    def multiples(self, arm: str, key: str, *, of_flops: bool) -> tuple[list[float], bool]:
        """What random needs as a multiple of what the arm took, seed by seed, and whether all are reached."""
        found, reached = [], True
        for seed in self.seeds(arm, RANDOM):
            steps, there = self.random_steps(arm, seed, key)
            found.append(steps / self.num_steps / (self.flops_share(arm, seed) if of_flops else 1.0))
            reached &= there
        return found, reached

    def at_equal_flops(self, arm: str, key: str) -> list[float]:
        """Arm's final loss minus random's after as many FLOPs as the arm took in all."""
        found = []
        for seed in self.seeds(arm, RANDOM):
            steps = self.num_steps * self.flops_share(arm, seed)
            curve = self.results[RANDOM, seed]["curve"]
            if steps <= curve[-1]["step"]:
                there = np.interp(steps, [e["step"] for e in curve], [e[key] for e in curve])
                found.append(self.at_end(arm, seed)[key] - float(there))
        return found


def page(document: Document) -> str:
    """The Markdown page."""
    blocks = [title("selection", document["settings"]["quick"]), *_about(document)]
    used = {unit["seed"] for unit in document["units"]} - {*known.DEFAULTS_CHOSEN_ON, *known.TUNING_SEEDS}
    for task, filtered in known.SETTINGS:
        for seeds in (known.DEFAULTS_CHOSEN_ON, sorted(used)):
            setting = Setting(document, task, filtered, seeds)
            if setting.results:
                blocks += _setting_blocks(setting, document)
        blocks += _tuning(Setting(document, task, filtered, known.TUNING_SEEDS))
    return markdown(*blocks)


def _tuning(setting: Setting) -> list[str]:
    """Losses of the settings that were tried of each static filter."""
    rows = []
    for arm in known.TUNING:
        losses = [setting.at_end(arm, seed)["all"] for seed in setting.seeds(arm)]
        if losses:
            rows.append([arm, f"{len(losses)}", f"{np.mean(losses):.4f}"])
    heading = f"### Settings of static filters, tried on seeds {known.TUNING_SEEDS}"
    return [heading, table(["filter: setting", "seeds", "all tokens"], rows)] if rows else []


def _about(document: Document) -> list[str]:
    settings = document["settings"]
    sizes = settings["sizes"]
    parameters = document["units"][0]["parameters"] if document["units"] else 0
    about = (
        f"GPT-NeoX of {parameters:,} parameters, {sizes['warm']} random steps of {settings['batch_rows']} rows of 64 "
        f"tokens, then {sizes['steps']} steps in each arm ({sizes['random_steps']:,} in the random one) at constant "
        f"learning rate {settings['learning_rate']:g}; AdamW, betas 0.9 and 0.95, weight decay 0.1, clipping at 1.0. "
        f"Losses in nats/token at weights averaged over the last {settings['window']} steps. Paired by seed; ± and "
        "brackets: 95 % t interval over seeds. Python "
        f"{settings['python']}, torch {settings['torch']}, transformers {settings['transformers']}."
    )
    labs = [
        f"- {name}: pool of {lab['rows']:,} rows; {lab['reference']} reference, {lab['development']} development "
        f"and {lab['test']} test passages; dropped for a shared 13-gram: {lab['documents_dropped']} documents, "
        f"{lab['development_passages_dropped']} development passages."
        for name, lab in document["labs"].items()
    ]
    seeds = sorted({unit["seed"] for unit in document["units"]} & {*known.DEFAULTS_CHOSEN_ON})
    chosen = f"The library's defaults were chosen by looking at seeds {', '.join(map(str, seeds))}."
    probed = [unit for unit in document["units"] if "probe" in unit["costs"] and unit["settings"]["probes"]]
    without = sum("audit" not in unit["costs"] and unit["settings"]["probe"] == "directional" for unit in probed)
    if without:
        chosen += (
            f" FLOPs of {without} of {len(probed)} trainings that probe leave out the audit that the library makes "
            "each round; they were measured before it was counted."
        )
    missing = f"**Not finished: {settings['missing']} trainings are left.**" if settings["missing"] else ""
    return [about, "\n".join(labs), chosen, missing]


def _setting_blocks(setting: Setting, document: Document) -> list[str]:
    pool = "the half of the pool that a fastText quality filter keeps" if setting.filtered else "the mixed pool"
    arms = [arm for arm in ARMS if setting.seeds(arm, RANDOM) and arm != RANDOM]
    others = "" if setting.given is known.DEFAULTS_CHOSEN_ON else ", seeds on which nothing was chosen"
    heads = [
        "arm", "seeds", "all tokens", "last word", "test, all tokens", "test, last word", "pool",
        "random needs: tokens", "random needs: tokens, last word", "FLOPs of the arm", "random needs: FLOPs",
        "all tokens at equal FLOPs",
    ]  # fmt: skip
    blocks = [
        f"## {TITLES[setting.task]}, {pool}{others}",
        "### Against random",
        table(heads, [_against_random(setting, arm) for arm in arms]),
        "\n".join(f"- {arm}: {note}." for arm, note in NOTES.items() if arm in arms),
    ]
    for one, heading, rivals in (
        (OURS, "Ours minus each other arm", [arm for arm in arms if arm != OURS]),
        (FRUGAL, "Ours, frugal, minus static filters", [arm for arm in arms if arm in known.STATIC]),
    ):
        rows = []
        for arm in (arm for arm in rivals if setting.seeds(one, arm)):
            cells = [interval(setting.paired(one, arm, value)) for value in _four_losses(setting, one)]
            rows.append([arm, len(setting.seeds(one, arm)), *cells])
        heads = ["other arm", "seeds", "all tokens", "last word", "test, all tokens", "test, last word"]
        blocks += [f"### {heading}", table(heads, rows)] if rows else []
    blocks += _zero_shot(setting, arms)
    blocks += _costs(setting, [RANDOM, *arms])
    blocks += _rounds(setting, document)
    return blocks + _ablations(setting)


def _ablations(setting: Setting) -> list[str]:
    """What is changed of ours, one thing at a time."""
    rows = []
    for arm in (arm for arm in known.ABLATIONS if setting.seeds(arm, OURS)):
        values = (*map(setting.development, LOSSES), setting.final("pool"))
        cells = [interval(setting.paired(arm, OURS, value)) for value in values]
        multiples = [multiple(*setting.multiples(arm, key, of_flops=False)) for key in LOSSES]
        rows.append([arm, len(setting.seeds(arm, OURS)), *cells, f"{_share(setting, arm):.2f} x", *multiples])
    heads = [
        "change", "seeds", "all tokens", "last word", "pool", "FLOPs of the arm", "random needs: tokens",
        "random needs: tokens, last word",
    ]  # fmt: skip
    about = "Difference to `ours`; above 0 the change is worse."
    return ["### One thing changed", about, table(heads, rows)] if rows else []


def _four_losses(setting: Setting, arm: str) -> list[Callable[[str, int], float]]:
    found: list[Callable[[str, int], float]] = [setting.development(key) for key in LOSSES]
    if all("test" in setting.results[arm, seed]["final"] for seed in setting.seeds(arm)):
        found += [setting.final("test", key) for key in LOSSES]
    return found


def _against_random(setting: Setting, arm: str) -> list[str]:
    losses = [interval(setting.paired(arm, RANDOM, value)) for value in _four_losses(setting, arm)]
    return [
        arm, str(len(setting.seeds(arm, RANDOM))), *losses, *[""] * (4 - len(losses)),
        interval(setting.paired(arm, RANDOM, setting.final("pool"))),
        multiple(*setting.multiples(arm, "all", of_flops=False)),
        multiple(*setting.multiples(arm, "completion", of_flops=False)),
        f"{_share(setting, arm):.2f} x",
        multiple(*setting.multiples(arm, "all", of_flops=True)),
        interval(setting.at_equal_flops(arm, "all")),
    ]  # fmt: skip


def _share(setting: Setting, arm: str) -> float:
    """FLOPs of an arm as a multiple of those of its training."""
    return float(np.mean([setting.flops_share(arm, seed) for seed in setting.seeds(arm)]))


def _zero_shot(setting: Setting, arms: Sequence[str]) -> list[str]:
    """Likelihood metrics of the nine tasks: the group's mean, arm minus random."""
    names = ("choice_prob", "nll_per_byte")
    rows = []
    for arm in arms:
        seeds = [s for s in setting.seeds(arm, RANDOM) if "zero_shot" in setting.results[arm, s]["final"]]
        if seeds:
            cells = [
                interval([group_mean(setting, arm, s, name) - group_mean(setting, RANDOM, s, name) for s in seeds], 5)
                for name in names
            ]
            rows.append([arm, str(len(seeds)), *cells])
    if not rows:
        return []
    heads = ["arm", "seeds", "probability of the right choice (> 0 better)", "nats/byte of it (< 0 better)"]
    return ["### Nine zero-shot tasks, minus random", table(heads, rows)]


def group_mean(setting: Setting, arm: str, seed: int, metric: str) -> float:
    """Mean of a metric over the tasks."""
    found = setting.results[arm, seed]["final"]["zero_shot"]
    names = [name for name in found if name.endswith(f"/{metric}") and "mates_zero_shot" not in name]
    return float(np.mean([found[name] for name in names]))


def _costs(setting: Setting, arms: Sequence[str]) -> list[str]:
    """Seconds and FLOPs of each stage, as shares of training, and how long devices would wait for the CPU."""
    stages = ("probe", "fit", "score", "select")
    waiting = stages[1:]  # of an arm that probes; static filters are done before, and low loss runs on the device
    rows = []
    for arm in arms:
        costs = [setting.results[arm, seed]["costs"] for seed in setting.seeds(arm)]
        train = {key: np.mean([cost["train"][key] for cost in costs]) for key in ("seconds", "flops")}
        cells = [f"{train['seconds']:.1f}", f"{train['flops']:.2e}"]
        for stage in stages:
            found = [cost.get(stage, {"seconds": 0.0, "flops": 0.0}) for cost in costs]
            seconds, flops = (float(np.mean([entry[key] for entry in found])) for key in ("seconds", "flops"))
            share = f" ({flops / train['flops']:.1%})" if flops else ""
            cells.append(f"{seconds:.1f}{share}" if seconds else "")
        idle = [sum(cost.get(stage, {"seconds": 0.0})["seconds"] for stage in waiting) for cost in costs]
        whole = [sum(entry["seconds"] for entry in cost.values()) for cost in costs]
        probed = known.EVERY_ARM[arm].probed
        rows.append([arm, *cells, f"{np.mean(idle) / np.mean(whole):.1%}" if probed else ""])
    heads = [
        "arm", "train, s", "train, FLOPs", *(f"{stage}, s (FLOPs of training)" for stage in stages),
        "devices idle, of all seconds",
    ]  # fmt: skip
    about = "Means over seeds, from the warm start on. Idle: fit, score and select, which run on the CPU."
    return ["### What it cost", about, table(heads, rows)]


def _rounds(setting: Setting, document: Document) -> list[str]:
    """Held-out Spearman and the domains that ours chose, first seed."""
    seeds = setting.seeds(OURS)
    if not seeds:
        return []
    rounds = setting.results[OURS, seeds[0]]["rounds"]
    names = document["labs"][f"{setting.task}{' filtered' if setting.filtered else ''}"]["domains"]
    rows = []
    for entry in rounds:
        best = np.argsort(-np.array(entry["domains"]))[:4]
        chosen = ", ".join(f"{names[i]} {entry['domains'][i]:.0%}" for i in best)
        rows.append([str(entry["step"]), f"{entry['held_out_spearman']:.3f}", chosen])
    heads = ["step", "held-out Spearman", "domains chosen most"]
    return [f"### What `ours` chose (seed {seeds[0]})", table(heads, rows)]


def multiple(values: Sequence[float], reached: bool) -> str:
    """Geometric mean of multiples and its interval; a lower bound where a seed did not get there."""
    if not values:
        return ""
    if min(values) == 0:  # an arm that ends no better than it began
        return "0 x"
    mean, half = mean_interval(np.log(values).tolist())
    bounds = "" if math.isnan(half) else f" [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"
    return f"{'' if reached else '> '}{math.exp(mean):.2f} x{bounds}"


def plot(document: Document, path: Path) -> None:
    """Development loss minus random's at the same step, over the steps that all arms have, with intervals."""
    settings = [
        Setting(document, task, filtered, known.DEFAULTS_CHOSEN_ON)
        for task, filtered in known.SETTINGS
        if not filtered
    ]
    settings = [setting for setting in settings if setting.seeds(RANDOM)]
    with plots.panels(path, max(1, len(settings))) as axes:
        for axis, setting in zip(axes, settings, strict=False):
            axis.axhline(0, color=plots.COLOURS[RANDOM], linewidth=1.2, label=RANDOM)
            for arm in (arm for arm in ARMS if arm in plots.COLOURS and arm != RANDOM and setting.seeds(arm, RANDOM)):
                steps, differences = setting.curves(arm)
                mean, half = zip(*(mean_interval(values) for values in differences), strict=True)
                plots.curve(axis, arm, steps, np.array(mean), np.nan_to_num(np.array(half)))
            axis.set_title(f"{TITLES[setting.task]}, {len(setting.seeds(OURS, RANDOM))} seeds")
            axis.set_xlabel("steps after the warm start")
        axes[0].set_ylabel("development loss minus random, nats/token")
        plots.legend(axes)
