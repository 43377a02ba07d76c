"""The page of `horizon`: for each setting arms against random and against ours, and how labels change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.lab.statistics import mean_interval, steps_to_reach
from benchmarks.lab.tables import interval, markdown, table, title
from benchmarks.quality.horizon.arms import GROUPS, OURS, RANDOM, REPORTED_SEEDS
from benchmarks.quality.horizon.settings import SETTINGS
from mates_hf.evaluation.agreement import rank_correlation

BASE, ADDED = f"{OURS}, 30 % random", "ours and DSIR, 30 % random"  # the first is what changes are compared with
PRIOR = f"{OURS}, evidence as prior alone, 30 % random"
LONGER = f"{OURS}, rounds of up to 800, 30 % random"
AHEAD = f"{OURS}, loss reduction, four passes, evidence kept, rounds of up to 800, 30 % random"
WAYS = {
    LONGER: "a run with `update_steps=800`, near the default of 1,000",
    AHEAD: "the same with `probe=LossReductionProbe()`",
    BASE: "a run with `update_steps=200`", PRIOR: "the same with `evidence_weight=0`",
    ADDED: "the same with DSIR's scores as its `score_column`",
}  # fmt: skip
Units = dict[tuple[str, int], Mapping[str, Any]]


def page(document: Mapping[str, Any]) -> str:
    """The page of a document."""
    parts = [
        title("Long horizons: what to train on, over thousands of steps", document["settings"]["quick"]),
        "Differences to random data of the same seed, at the end of the decay, in nats/token: below 0 is better, on "
        "the passages as on the pool's own text. `to random` is the share of random's steps after which an arm is "
        "where random ends. `FLOPs` is everything that training and choosing took, as a multiple of random's. "
        "Intervals of losses on passages are over seeds, where there are two, and over passages: the root of the sum "
        "of both squares.",
    ]
    for name, setting in SETTINGS.items():
        for seeds, of in ((REPORTED_SEEDS, "reported seeds"), (tuple(range(10, 20)), "tuning seeds, other passages")):
            units = units_of(document, name, seeds)
            if units:
                parts.append(f"## {name}: {setting.about} ({of})")
                if any(arm == RANDOM for arm, _ in units):
                    parts += [
                        _table(name, units),
                        *_course(name, units),
                        *(part for arm in WAYS for part in _against(name, units, arm)),
                    ]
                seen = {arm: unit["watched"] for (arm, _), unit in reversed(units.items()) if unit["watched"]}
                parts += [_drift(arm, watched) for arm, watched in reversed(seen.items())]
    return markdown(*parts)


def units_of(document: Mapping[str, Any], setting: str, seeds: Sequence[int] = REPORTED_SEEDS) -> Units:
    """Units of a setting by arm and seed."""
    return {
        (unit["arm"], unit["seed"]): unit
        for unit in document["units"]
        if unit["setting"] == setting and unit["seed"] in seeds
    }


def reference_loss(losses: Mapping[str, Any], setting: str) -> float:
    """Mean loss over the parts of the reference."""
    return float(np.mean([losses[part] for part in SETTINGS[setting].parts]))


def outside_loss(losses: Mapping[str, Any], setting: str) -> float:
    """Mean loss of the right answers of tasks that are not in the reference."""
    return float(np.mean([losses[f"{task}: answers"] for task in SETTINGS[setting].outside]))


def _table(setting: str, units: Units) -> str:
    heads = ["arm", "seeds", *_heads(setting), "worst domain", "to random", "FLOPs"]
    rows, last = [], ""
    for group, arm in ((group, arm) for group, arms in GROUPS.items() for arm in arms):
        pairs = pairs_of(units, arm, RANDOM)
        if not pairs:
            continue
        if group != last:
            rows.append([f"**{group}**", *[""] * (len(heads) - 1)])
            last = group
        ends = [(ours["decayed"][-1], random["decayed"][-1]) for ours, random in pairs]
        worst = np.mean([np.subtract(ours["domains"], random["domains"]) for ours, random in ends], 0).max()
        reached = [reaches(ours, random, setting) for ours, random in pairs]
        rows.append([
            arm, len(pairs), *differences_of(setting, ends), f"{worst:+.2f}",
            f"{np.mean(reached):.2f}" if all(reached) else "",
            f"{np.mean([ours['flops'] / random['flops'] for ours, random in ends]):.2f}",
        ])  # fmt: skip
    return table(heads, rows)


def _course(setting: str, units: Units) -> list[str]:
    """Whether ours was ever above random rows after it had begun, and whether what it bought held its price."""
    rows = []
    for (arm, seed), unit in units.items():
        if arm not in WAYS or (RANDOM, seed) not in units:
            continue
        begun = unit["settings"]["random_first"]
        pairs = zip(unit["curve"], units[RANDOM, seed]["curve"], strict=True)
        above = [
            (reference_loss(own, setting) - reference_loss(random, setting), own["step"])
            for own, random in pairs if own["step"] > begun
        ]  # fmt: skip
        gaps = [found["gap"] for found in unit["rounds"] if found.get("gap") is not None]
        if above and gaps:
            highest, step = max(above)
            rows.append([arm, seed, f"{highest:+.3f}", step, len(gaps), f"{min(gaps):.2f}"])
    if not rows:
        return []
    return [
        "The course: the highest loss on passages minus that of random rows at any measured point once selection has "
        "begun, and the smallest gap at a boundary (labels of what was bought minus the rest, in their standard "
        "deviations; above 0 what was bought is still worth more).",
        table(["arm", "seed", "highest minus random", "at step", "boundaries", "smallest gap"], rows),
    ]


def _against(setting: str, units: Units, ours: str) -> list[str]:
    """One of our forms minus each other arm that is no form of ours."""
    rows = []
    others = [arm for group, arms in GROUPS.items() if not group.startswith("ours") for arm in arms]
    for arm in others:
        pairs = pairs_of(units, ours, arm)
        if not pairs:
            continue
        ends = [(own["decayed"][-1], theirs["decayed"][-1]) for own, theirs in pairs]
        reached = [reaches(own, theirs, setting) for own, theirs in pairs if len(theirs["decayed"]) > 1]
        times = ", ".join("not" if share is None else f"{1 / share:.2f}" for share in reached)
        rows.append([arm, len(pairs), *differences_of(setting, ends), times])
    if not rows:
        return []
    return [
        f"`{ours}`, {WAYS[ours]}, minus each of these. Last column: how many times its steps an arm took to where the "
        "arm ends, seed by seed; `not` where it does not get there, empty where decays of one length were made.",
        table(["minus", "seeds", *_heads(setting), "steps to its end"], rows),
    ]


def pairs_of(units: Units, arm: str, other: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Units of two arms, seed by seed, where there are both."""
    return [
        (unit, units[other, seed]) for (name, seed), unit in units.items() if name == arm and (other, seed) in units
    ]


def _heads(setting: str) -> list[str]:
    return ["passages", *(["answers of other tasks"] if SETTINGS[setting].outside else []), "pool's text"]


def differences_of(setting: str, ends: Sequence[tuple[Any, Any]]) -> list[str]:
    """Mean differences of two arms' last losses, one for each of `_heads`."""
    parts, outside = SETTINGS[setting].parts, [f"{task}: answers" for task in SETTINGS[setting].outside]
    others = [_crossed(ends, outside)] if outside else []
    return [_crossed(ends, parts), *others, interval([ours["pool"] - theirs["pool"] for ours, theirs in ends], 3)]


def _crossed(ends: Sequence[tuple[Any, Any]], parts: Sequence[str]) -> str:
    """Mean difference over parts of the passages, and half its interval over seeds and passages."""
    mean, half = mean_interval([np.mean([ours[part] - random[part] for part in parts]) for ours, random in ends])
    variance = 0.0  # of the mean over other passages
    for part in parts:
        pairs = [[np.array(losses["by_passage"][part]) for losses in pair] for pair in ends]
        lost = np.mean([ours[0] - random[0] for ours, random in pairs], 0)
        tokens = pairs[0][1][1]
        apart = (lost - tokens * lost.sum() / tokens.sum()) / tokens.sum()
        variance += float((apart**2).sum()) * len(apart) / (len(apart) - 1) / len(parts) ** 2
    half = math.hypot(0.0 if math.isnan(half) else half, 1.96 * math.sqrt(variance))
    return f"{mean:+.3f} ± {half:.3f}"


def _drift(arm: str, watched: Sequence[Mapping[str, Any]]) -> str:
    """How labels of the same rows change while a model trains."""
    first, rows = watched[0], []
    asked = np.array(first["asked"], bool)
    heads = ["step", "first labels", "last labels", "log-odds", "own loss", "mean label of its domains, sd"]
    further = [name for name in first if name.startswith("reduction")]
    heads += [f"{name}: {with_what}" for name in further for with_what in ("first", "log-odds")]
    for found in watched:
        labels = np.array(found["label"])
        worth = (labels - labels.mean()) / labels.std()
        others = (watched[0]["label"], watched[-1]["label"], first["log_odds"], found["loss"])
        cells = [_alike(labels, values) for values in others]
        cells.append(f"{worth[asked].mean():+.2f}" if asked.any() else "")
        cells += [_alike(found[name], values) for name in further for values in (first[name], first["log_odds"])]
        rows.append([found["step"], *cells])
    kinds = " and loss reductions by four passes over so many passages" if further else ""
    about = f"Labels of the same rows{kinds}, in a run of `{arm}`: rank correlations (one seed)."
    return f"{about}\n\n{table(heads, rows)}{_few([found['few'] for found in watched[1:] if 'few' in found])}"


def _alike(some: Sequence[float], others: Sequence[float]) -> str:
    return f"{rank_correlation(np.array(some), np.array(others)):.2f}"


def _few(found: Sequence[Any]) -> str:
    """How few labels do, with and without static evidence: means over the points of a run."""
    if not found:
        return ""
    cells = [[int(row[0]), *(f"{value:.2f}" for value in row[1:])] for row in np.mean(found, 0)]
    heads = ["labels", "Spearman", "best fifth, sd", "Spearman with evidence", "best fifth with evidence, sd"]
    about = (
        "Tables fitted on a few of these labels and judged on other rows, without and with log-odds of the reference "
        f"as prior mean: means over {len(found)} points of the run."
    )
    return f"\n\n{about}\n\n{table(heads, cells)}"


def reaches(unit: Mapping[str, Any], random: Mapping[str, Any], setting: str) -> float | None:
    """The share of random's steps after which an arm has random's last loss, between the ends of its decays.

    None where it never has, and where there is one decay, between whose end and the start a line says nothing.
    """
    if len(unit["decayed"]) == 1:
        return None
    goal = reference_loss(random["decayed"][-1], setting)
    curve = [
        {"step": losses["step"], "loss": reference_loss(losses, setting)}
        for losses in (unit["curve"][0], *unit["decayed"])
    ]
    steps = steps_to_reach(curve, "loss", goal)
    return None if steps is None else steps / curve[-1]["step"]
