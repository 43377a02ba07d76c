"""Tables of `README.md` and `docs/` on thousands of steps, made from the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.tables import table
from benchmarks.quality.horizon.arms import ARMS as EVERY
from benchmarks.quality.horizon.arms import OURS, RANDOM, REPORTED_SEEDS, TUNING_SEEDS
from benchmarks.quality.horizon.frontier import SHARES, point_of, points_of
from benchmarks.quality.horizon.page import (
    ADDED,
    AHEAD,
    BASE,
    LONGER,
    PRIOR,
    differences_of,
    pairs_of,
    reaches,
    reference_loss,
    units_of,
)
from benchmarks.quality.horizon.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[3]
HEADLINE, FILTER, ALONE = "tasks", "DSIR, 30 % random", "log-odds, 30 % random"
ARMS = {
    LONGER: "**ours**", AHEAD: "ours, `probe=LossReductionProbe()`",
    BASE: "ours, `update_steps=200`", PRIOR: "the same, `evidence_weight=0`",
    ADDED: "the same, DSIR's scores as `score_column`", ALONE: "ours without labels: log-odds alone",
    FILTER: "DSIR, tuned", "fastText, 30 % random": "fastText, tuned",
    "ours, one round's model, 30 % random": "ours, the first round's model for all rounds",
    "domain means, 30 % random": "domains by the mean of our labels",
    "stratified by domain": "as many rows of each domain",
    "similarity, 30 % random": "similarity of embeddings",
    "mixer, 30 % random": "an online mixer of domains, by our labels",
    "mixer": "an online mixer of domains, no random rows",
    "distilled, 30 % random": "a classifier of our first labels",
    "distilled": "a classifier of our first labels, no random rows", "CoLoR, 30 % random": "CoLoR-Filter",
    "MATES, small encoder, 30 % random": "MATES at this scale: an encoder fitted to one-step labels",
    "own domains, known, 30 % random": "rows of the reference's own domains, if one knew them",
}  # fmt: skip
LARGER = {
    **ARMS,
    **{f"{arm}, 60 % random": f"{ARMS[f'{arm}, 30 % random']}, 60% random rows" for arm in ("DSIR", "log-odds")},
}
OTHERS = {
    "broad": "eight domains at once", "continued": "continued: two known domains, two new",
    "style": "one style of text",
}  # fmt: skip
Pairs = list[tuple[Mapping[str, Any], Mapping[str, Any]]]
NAMES = {HEADLINE: "questions of five tasks, which every arm trains on too", **OTHERS}


def _times(pairs: Pairs, setting: str) -> tuple[float, float]:
    """How many times an arm's steps and FLOPs random rows take to where they end; NaN where it never gets there."""
    shares = [np.nan if (share := reaches(own, random, setting)) is None else share for own, random in pairs]
    steps = float(1 / np.mean(shares))
    return steps, steps / _flops(pairs)


def _flops(pairs: Pairs) -> float:
    """Everything that training and choosing took, as a multiple of the other arm's."""
    return float(np.mean([own["decayed"][-1]["flops"] / random["decayed"][-1]["flops"] for own, random in pairs]))


def _cells(pairs: Pairs, setting: str) -> list[str]:
    """What an arm ends at, minus the other: text like the reference, other tasks where there are some, the pool."""
    ends = [(own["decayed"][-1], other["decayed"][-1]) for own, other in pairs]
    return [cell.replace("-", "−") for cell in differences_of(setting, ends)]


def rows(document: Mapping[str, Any], setting: str) -> list[list[str]]:
    """The lines of a setting: arm, seeds, differences to random rows, how many times its steps those need, FLOPs."""
    units, found = units_of(document, setting), []
    for arm, name in ARMS.items():
        pairs = pairs_of(units, arm, RANDOM)
        if not pairs:
            continue
        cells = _cells(pairs, setting)
        label = [name] if setting == HEADLINE else [OTHERS[setting], name]
        steps = "never" if np.isnan(steps := _times(pairs, setting)[0]) else f"{steps:.1f}"
        found.append([*label, str(len(pairs)), *cells, steps, f"{_flops(pairs):.2f}"])
    return found


def against(document: Mapping[str, Any]) -> list[list[str]]:
    """What ours ends at, minus rivals, by setting; below 0 is better."""
    found = []
    for setting, name in NAMES.items():
        units = units_of(document, setting)
        for arm in (FILTER, ALONE):
            pairs = pairs_of(units, LONGER, arm)
            if pairs:
                found.append([name, ARMS[arm], str(len(pairs)), *_three(pairs, setting)])
    return found


def _three(pairs: Pairs, setting: str) -> list[str]:
    """As `_cells`, with an empty cell where a setting has no other tasks."""
    cells = _cells(pairs, setting)
    return cells if len(cells) > 2 else [cells[0], "", cells[1]]


def larger(document: Mapping[str, Any]) -> list[list[str]]:
    """The lines of larger models: reference and size, method, seeds, differences to random rows, FLOPs."""
    found = []
    for setting in SETTINGS:
        of, _, size = setting.partition(", ")
        units = units_of(document, setting) if size else {}
        for arm, name in LARGER.items():
            pairs = pairs_of(units, arm, RANDOM)
            if pairs:
                cells = _three(pairs, setting)
                found.append([f"{NAMES[of]}; {size}", name, str(len(pairs)), *cells, f"{_flops(pairs):.2f}"])
    return found


def shares(document: Mapping[str, Any]) -> list[list[str]]:
    """The lines on shares of random rows: what each method gains and gives up on the first seed.

    The last line of a setting is what a method would gain where it gives up as much as ours does at the default: read
    off between two of its shares, on logarithmic scales. A straight line would be below the curve of a rival, since
    each further step gains less, and favour ours.
    """
    found = []
    for setting, name in NAMES.items():
        points = points_of(document, setting, reference_loss, REPORTED_SEEDS[:1])
        methods = [points.get(method, {}) for method in (OURS, "DSIR", "log-odds")]
        for share in SHARES:
            cells = [of_method.get(share) for of_method in methods]
            if any(cells):
                texts = [f"−{cell[1]:.3f} / {cell[0]:+.3f}".replace("-", "−") if cell else "" for cell in cells]
                found.append([name, share, *texts])
        given = methods[0]["30%"][0]
        gains = [_gain_at(given, of_method) for of_method in methods]
        if any(gain is not None for gain in gains[1:]):
            texts = ["" if gain is None else f"−{gain:.3f} / {given:+.3f}" for gain in gains]
            found.append([name, "where as much is given up", *texts])
    return found


def _gain_at(given: float, shares: Mapping[str, list[float]]) -> float | None:
    """What a method gains where it gives up so much, between its points; None outside of them."""
    points = sorted((cell[0], cell[1]) for cell in shares.values())
    up, gained = np.log(np.maximum(points, 1e-4)).T if points else np.zeros((2, 0))
    known = len(points) > 1 and points[0][0] <= given <= points[-1][0]
    return float(np.exp(np.interp(np.log(given), up, gained))) if known else None


def changes(document: Mapping[str, Any]) -> list[list[str]]:
    """Of the tasks, on tuning seeds: what is changed, and differences to ours with `update_steps=200`.

    Below 0 is better. The last column but one is the difference on items where ours gives up as much, whose gains are
    read off between its shares of random rows, as in `shares`.
    """
    units, found = units_of(document, HEADLINE, TUNING_SEEDS), []
    own_shares = points_of(document, HEADLINE, reference_loss, TUNING_SEEDS).get(OURS, {})
    for arm in EVERY:
        pairs = [] if arm == BASE else pairs_of(units, arm, BASE)
        if not pairs:
            continue
        cells = _cells(pairs, HEADLINE)
        name = "no random rows" if arm == OURS else arm.removeprefix(f"{OURS}, ")
        drawn = arm == RANDOM or "random" in name  # what most arms have goes without saying
        name = name.removesuffix(", 30 % random") if drawn else f"{name}, no random rows"
        there = _behind(pairs_of(units, arm, RANDOM), own_shares)
        found.append([name.replace(" %", "%"), *cells, there.replace("-", "−"), f"{_flops(pairs):.2f}"])
    return found


def _behind(pairs: Pairs, shares: Mapping[str, list[float]]) -> str:
    """How much less is gained over random rows than a method gains that gives up as much; empty outside its shares."""
    given, gained, *_ = point_of(pairs, HEADLINE, reference_loss)
    there = _gain_at(given, shares)
    return "" if there is None else f"{there - gained:+.3f}"


def front_row(document: Mapping[str, Any], setting: str) -> list[str]:
    """A line of the README: steps and FLOPs of random rows, for ours and for DSIR, and what is given up in nats."""
    units = units_of(document, setting)
    ours, theirs = (pairs_of(units, arm, RANDOM) for arm in (LONGER, FILTER))
    times = [*_times(ours, setting), _times(theirs, setting)[0]]  # DSIR's FLOPs are none
    lost = [
        np.mean([a["decayed"][-1]["pool"] - b["decayed"][-1]["pool"] for a, b in pairs]) for pairs in (ours, theirs)
    ]
    return [NAMES[setting], *(f"{n:.1f}×" for n in times), *(f"{x:.2f}" for x in lost)]


def tables(document: Mapping[str, Any]) -> dict[Path, list[str]]:
    """All of them, by page."""
    ends = ["the pool's own text", "steps", "FLOPs"]
    asked = ["items of five tasks", "right answers of four other tasks", "the pool's own text"]
    front = ["reference", "steps: ours", "FLOPs: ours", "steps and FLOPs: DSIR", "lost: ours", "lost: DSIR"]
    return {
        ROOT / "README.md": [table(front, [front_row(document, setting) for setting in NAMES])],
        ROOT / "docs" / "results.md": [
            table(["method", "seeds", *asked[:2], *ends], rows(document, HEADLINE)),
            table(
                ["reference", "method", "seeds", "text like the reference", *ends],
                [row for setting in OTHERS for row in rows(document, setting)],
            ),
            table(
                ["reference", "ours minus", "seeds", "text like the reference", "answers of other tasks", ends[0]],
                against(document),
            ),
            table(["reference", "random rows", "ours", "DSIR, tuned", "log-odds alone"], shares(document)),
            table(
                [
                    "reference; parameters",
                    "method",
                    "seeds",
                    "text like the reference",
                    "answers of other tasks",
                    *ends[::2],
                ],
                larger(document),
            ),
        ],
        ROOT / "docs" / "ablations.md": [
            table(["change", *asked, "items, where as much is given up", "FLOPs"], changes(document))
        ],
    }
