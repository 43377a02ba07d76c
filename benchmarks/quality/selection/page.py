"""The page and the plot of `selection.py`, made from its JSON and nothing else.

Place in the flow: right of the trainings. Trade-off: every figure is recomputed from curves and costs in the JSON, so
that a reader can recompute it too.

Signs: a difference of losses below 0 means that the arm named first is better. Multiples are of what the arm took from
the warm start on: above 1, random needs more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lab import mean_interval
from selection_arms import ABLATIONS, ARMS, FRUGAL, OURS, PUBLISHED, RANDOM, STATIC

Document = dict[str, Any]
Result = dict[str, Any]
LOSSES = ("all", "completion")
TITLES = {"lambada": "LAMBADA", "arc_easy": "ARC-Easy", "boolq": "passages of BoolQ"}


class Setting:
    """The trainings of one reference task and pool, by arm and seed."""

    def __init__(self, document: Document, task: str, filtered: bool) -> None:
        self.task, self.filtered = task, filtered
        self.num_steps = document["settings"]["sizes"]["steps"]
        self.results: dict[tuple[str, int], Result] = {
            (result["arm"], result["seed"]): result
            for result in document["units"]
            if (result["task"], result["filtered"]) == (task, filtered)
        }

    def seeds(self, *arms: str) -> list[int]:
        """Seeds that all these arms have, from one warm start."""
        found = []
        for seed in sorted({seed for _, seed in self.results}):
            units = [self.results.get((arm, seed)) for arm in arms]
            # One warm start: what it scores on the development passages tells, since training is deterministic.
            if (
                all(unit is not None for unit in units)
                and len({unit["curve"][0]["all"] for unit in units if unit}) == 1
            ):
                found.append(seed)
        return found

    def at_end(self, arm: str, seed: int) -> Result:
        """Development losses after the steps that all arms have."""
        return next(e for e in self.results[arm, seed]["curve"] if e["step"] == self.num_steps)

    def paired(self, arm: str, other: str, value: Callable[[str, int], float]) -> list[float]:
        """Arm minus other, seed by seed."""
        return [value(arm, seed) - value(other, seed) for seed in self.seeds(arm, other)]

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

    def flops(self, arm: str, seed: int, *, overhead: bool = True) -> float:
        """FLOPs from the warm start to the end, with everything that choosing took, or of training alone."""
        costs = self.results[arm, seed]["costs"]
        return sum(entry["flops"] for stage, entry in costs.items() if overhead or stage == "train")

    def random_steps(self, arm: str, seed: int, key: str) -> tuple[float, bool]:
        """Steps after which random has an arm's final loss, and whether it gets there at all; else how far it went."""
        curve, loss = self.results[RANDOM, seed]["curve"], self.at_end(arm, seed)[key]
        for before, after in zip(curve, curve[1:], strict=False):
            if after[key] <= loss:
                share = (before[key] - loss) / max(before[key] - after[key], 1e-12)
                return before["step"] + min(max(share, 0.0), 1.0) * (after["step"] - before["step"]), True
        return float(curve[-1]["step"]), False

    def multiples(self, arm: str, key: str, *, of_flops: bool) -> tuple[list[float], bool]:
        """What random needs as a multiple of what the arm took, seed by seed, and whether all are reached."""
        found, reached = [], True
        for seed in self.seeds(arm, RANDOM):
            steps, there = self.random_steps(arm, seed, key)
            share = self.flops(arm, seed) / self.flops(arm, seed, overhead=False) if of_flops else 1.0
            found.append(steps / self.num_steps / share)
            reached &= there
        return found, reached

    def at_equal_flops(self, arm: str, key: str) -> list[float]:
        """Arm's final loss minus random's after as many FLOPs as the arm took in all."""
        found = []
        for seed in self.seeds(arm, RANDOM):
            steps = self.num_steps * self.flops(arm, seed) / self.flops(arm, seed, overhead=False)
            curve = self.results[RANDOM, seed]["curve"]
            if steps <= curve[-1]["step"]:
                there = np.interp(steps, [e["step"] for e in curve], [e[key] for e in curve])
                found.append(self.at_end(arm, seed)[key] - float(there))
        return found


def write_page(document: Document) -> str:
    """The Markdown page."""
    settings = document["settings"]
    lines = ["# selection" + (" (quick, not to be reported)" if settings["quick"] else ""), "", *_about(document)]
    for task, filtered in (("lambada", False), ("arc_easy", False), ("boolq", False), ("lambada", True)):
        setting = Setting(document, task, filtered)
        if setting.results:
            lines += ["", *_setting_lines(setting, document)]
    return "\n".join(lines) + "\n"


def _about(document: Document) -> list[str]:
    settings = document["settings"]
    sizes = settings["sizes"]
    parameters = document["units"][0]["parameters"] if document["units"] else 0
    lines = [
        f"GPT-NeoX of {parameters:,} parameters, {sizes['warm']} random steps of {settings['batch_rows']} rows of 64 "
        f"tokens, then {sizes['steps']} steps in each arm ({sizes['random_steps']:,} in the random one) at constant "
        f"learning rate {settings['learning_rate']:g}; AdamW, betas 0.9 and 0.95, weight decay 0.1, clipping at 1.0. "
        f"Losses in nats/token at weights averaged over the last {settings['window']} steps. Paired by seed; ± and "
        "brackets: 95 % t interval over seeds. Python "
        f"{settings['python']}, torch {settings['torch']}, transformers {settings['transformers']}.",
        "",
    ]
    for name, lab in document["labs"].items():
        lines.append(
            f"- {name}: pool of {lab['rows']:,} rows; {lab['reference']} reference, {lab['development']} development "
            f"and {lab['test']} test passages; dropped for a shared 13-gram: {lab['documents_dropped']} documents, "
            f"{lab['development_passages_dropped']} development passages."
        )
    if settings["missing"]:
        lines += ["", f"**Not finished: {settings['missing']} trainings are left.**"]
    return lines


def _setting_lines(setting: Setting, document: Document) -> list[str]:
    pool = "the half of the pool that a fastText quality filter keeps" if setting.filtered else "the mixed pool"
    arms = [arm for arm in ARMS if setting.seeds(arm, RANDOM) and arm != RANDOM]
    lines = [f"## {TITLES[setting.task]}, {pool}", "", "### Against random", ""]
    lines += _table(
        [
            "arm", "seeds", "all tokens", "last word", "test, all tokens", "test, last word", "pool",
            "random needs: tokens", "random needs: tokens, last word", "FLOPs of the arm", "random needs: FLOPs",
            "all tokens at equal FLOPs",
        ],
        [_against_random(setting, arm) for arm in arms],
    )  # fmt: skip
    for one, title, rivals in (
        (OURS, "Ours minus each other arm", [arm for arm in arms if arm != OURS]),
        (FRUGAL, "Ours, frugal, minus static filters", [arm for arm in arms if arm in STATIC]),
    ):
        others = [arm for arm in rivals if setting.seeds(one, arm)]
        if others:
            lines += ["", f"### {title}", ""]
            lines += _table(
                ["other arm", "seeds", "all tokens", "last word", "test, all tokens", "test, last word"],
                [
                    [arm, str(len(setting.seeds(one, arm))), *(
                        interval(setting.paired(one, arm, value)) for value in _four_losses(setting, one)
                    )]
                    for arm in others
                ],
            )  # fmt: skip
    lines += _zero_shot(setting, arms)
    lines += _costs(setting, [RANDOM, *arms])
    lines += _rounds(setting, document)
    ablations = [arm for arm in ABLATIONS if setting.seeds(arm, OURS)]
    if ablations:
        lines += ["", "### One thing changed", "", "Difference to `ours`; above 0 the change is worse.", ""]
        lines += _table(
            [
                "change", "seeds", "all tokens", "last word", "pool", "FLOPs of the arm", "random needs: tokens",
                "random needs: tokens, last word",
            ],
            [
                [arm, str(len(setting.seeds(arm, OURS))), *(
                    interval(setting.paired(arm, OURS, value))
                    for value in (setting.development("all"), setting.development("completion"), setting.final("pool"))
                ), f"{_share(setting, arm):.2f} x", *(
                    multiple(*setting.multiples(arm, key, of_flops=False)) for key in LOSSES
                )]
                for arm in ablations
            ],
        )  # fmt: skip
    return lines


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
    shares = [setting.flops(arm, s) / setting.flops(arm, s, overhead=False) for s in setting.seeds(arm)]
    return float(np.mean(shares))


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
    return ["", "### Nine zero-shot tasks, minus random", "", *_table(heads, rows)]


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
        probed = {**ARMS, **ABLATIONS}[arm].probed
        rows.append([arm, *cells, f"{np.mean(idle) / np.mean(whole):.1%}" if probed else ""])
    heads = [
        "arm", "train, s", "train, FLOPs", *(f"{stage}, s (FLOPs of training)" for stage in stages),
        "devices idle, of all seconds",
    ]  # fmt: skip
    about = "Means over seeds, from the warm start on. Idle: fit, score and select, which run on the CPU."
    return ["", "### What it cost", "", about, "", *_table(heads, rows)]


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
    return ["", f"### What `ours` chose (seed {seeds[0]})", "", *_table(heads, rows)]


def interval(values: Sequence[float], digits: int = 4) -> str:
    """Mean of paired differences and half its interval."""
    if not len(values):
        return ""
    mean, half = mean_interval(values)
    return f"{mean:+.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def multiple(values: Sequence[float], reached: bool) -> str:
    """Geometric mean of multiples and its interval; a lower bound where a seed did not get there."""
    if not values:
        return ""
    if min(values) == 0:  # an arm that ends no better than it began
        return "0 x"
    mean, half = mean_interval(np.log(values).tolist())
    bounds = "" if math.isnan(half) else f" [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"
    return f"{'' if reached else '> '}{math.exp(mean):.2f} x{bounds}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def plot(document: Document, path: Path) -> None:
    """Development loss over steps: mean of the seeds that all drawn arms of a setting have."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = [Setting(document, *key) for key in (("lambada", False), ("arc_easy", False), ("boolq", False))]
    settings = [setting for setting in settings if setting.seeds(RANDOM)]
    if not settings:
        return
    figure, axes = plt.subplots(1, len(settings), figsize=(5 * len(settings), 4), squeeze=False)
    for axis, setting in zip(axes[0], settings, strict=True):
        arms = [arm for arm in (RANDOM, OURS, FRUGAL, PUBLISHED, *STATIC) if setting.seeds(arm, RANDOM)]
        for arm in arms:
            seeds = setting.seeds(arm, RANDOM)
            curves = [setting.results[arm, seed]["curve"] for seed in seeds]
            steps = [entry["step"] for entry in curves[0]]
            loss = np.mean([[entry["all"] for entry in curve] for curve in curves], axis=0)
            axis.plot(steps, loss, label=f"{arm} ({len(seeds)})", linewidth=2 if arm == OURS else 1)
        axis.set_title(TITLES[setting.task])
        axis.set_xlabel("steps after the warm start")
        axis.set_ylabel("development loss, nats/token")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
