"""What does a gain cost, method by method?

The picture of the README, `docs/gain_against_cost.svg`, of every method that `selection` has measured. Up: how many
times the trained tokens of a method random data needs for the same reference loss (geometric mean and 95% t interval
over seeds). Right: FLOPs of a method, with everything that choosing took, as a multiple of training alone. On the
dashed line random data does as well for the same FLOPs; above it, choosing pays.

It reads the newest committed result of `selection` and trains nothing. SVG is written by hand, so that the picture is
the same to the byte whatever is installed, and each colour can be read on white and on black.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lab import harness
from benchmarks.lab.plots import COLOURS
from benchmarks.lab.statistics import mean_interval, steps_to_reach
from benchmarks.lab.svg import GREY, text
from benchmarks.lab.tables import markdown, table

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "gain_against_cost.svg"

Unit = dict[str, Any]


class Style(NamedTuple):
    """How a method is drawn, and what the legend calls it."""

    marker: str
    label: str


# By the arm's name in the JSON; the order is that of the legend.
FEWEST_SEEDS = 3  # of a point, as on the page of `selection`
STYLES = {
    "ours": Style("circle", "ours: 500 probes each 100 steps"),
    "ours, frugal": Style("circle", "ours, frugal: 200 probes, once"),
    "one round's influence": Style("circle", "ours, first round kept"),
    "ours and fastText": Style("diamond", "ours + fastText"),
    "ours, frugal, and fastText": Style("diamond", "frugal + fastText"),
    "ours, random mixed in": Style("diamond", "ours, half of the rows random"),
    "labels of one step, rounds of 40 steps": Style("diamond", "one-step labels"),
    "fastText, tuned": Style("square", "fastText, tuned"),
    "DSIR, tuned": Style("square", "DSIR, tuned"),
    "fastText": Style("hollow", "fastText, untuned"),
    "DSIR": Style("hollow", "DSIR, untuned"),
    "similarity": Style("hollow", "similarity (encoder), untuned"),
    "random, passages mixed in": Style("triangle", "random, a fifth of it the passages"),
    "low loss": Style("triangle", "lowest loss"),
    "domain means": Style("triangle", "domain means of our labels"),
    "stratified by domain": Style("triangle", "equal share of each domain"),
    "top-k of labels, every step": Style("triangle", "every candidate, every step"),
    "one-step oracle, n-gram tables": Style("cross", "one-step oracle, last word"),
    "one-step oracle, small encoder": Style("cross", "the same, small encoder"),
    "ours, labels of the one-step oracle": Style("cross", "ours, one-step oracle"),
    "cheap labels, n-gram tables": Style("cross", "the same labels, cheap probe"),
}
PANELS = (
    ("lambada", False, "LAMBADA passages, mixed pool"),
    ("lambada", True, "LAMBADA passages, filtered pool"),
    ("boolq", False, "BoolQ passages, mixed pool"),
    ("arc_easy", False, "ARC-Easy questions, mixed pool*"),
)
NOTE = "* Mostly the format of the questions: random rows with the reference passages mixed in end lower still."

WIDTH, PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP = 860, 372, 200, 50, 30
COLUMN, ROW = PANEL_WIDTH + 60, PANEL_HEIGHT + 74
X_RANGE, Y_RANGE = (0.88, 18.0), (0.52, 4.8)
X_TICKS, Y_TICKS = (1, 2, 4, 8, 16), (1, 2, 3, 4)
LEGEND_COLUMNS, LEGEND_ROW = 3, 19


def random_steps(unit: Unit, random: Unit, steps: int) -> float:
    """Steps after which random data has a unit's final loss on all tokens; all it made where it never gets there."""
    loss = next(entry["all"] for entry in unit["curve"] if entry["step"] == steps)
    reached = steps_to_reach(random["curve"], "all", loss)
    return float(random["curve"][-1]["step"] if reached is None else reached)


def flops_share(unit: Unit) -> float:
    """FLOPs of training and choosing over those of training."""
    return float(sum(stage["flops"] for stage in unit["costs"].values()) / unit["costs"]["train"]["flops"])


class Point(NamedTuple):
    """A method in a setting: cost, gain, its interval, seeds."""

    cost: float
    gain: float
    low: float
    high: float
    num_seeds: int


def points_of(document: dict[str, Any], task: str, filtered: bool) -> dict[str, Point]:
    """Every method of a setting that was paired with random data, by the arm's name."""
    steps = document["settings"]["sizes"]["steps"]
    units = {(u["arm"], u["seed"]): u for u in document["units"] if (u["task"], u["filtered"]) == (task, filtered)}
    found = {}
    for arm in STYLES:
        seeds = [seed for name, seed in sorted(units) if name == arm and ("random", seed) in units]
        if len(seeds) < FEWEST_SEEDS:
            continue
        logs = np.log([random_steps(units[arm, seed], units["random", seed], steps) / steps for seed in seeds])
        mean, half = mean_interval(logs)
        low, middle, high = (math.exp(mean + sign * half) for sign in (-1, 0, 1))
        cost = float(np.mean([flops_share(units[arm, seed]) for seed in seeds]))
        found[arm] = Point(cost, middle, low, high, len(seeds))
    return found


def x_of(cost: float) -> float:
    """Pixels from the left of a panel."""
    low, high = map(math.log, X_RANGE)
    return PANEL_WIDTH * (math.log(cost) - low) / (high - low)


def y_of(gain: float) -> float:
    """Pixels from the top of a panel; what is outside stands at its edge."""
    low, high = map(math.log, Y_RANGE)
    return PANEL_HEIGHT * (high - min(max(math.log(gain), low), high)) / (high - low)


def marker(arm: str, x: float, y: float) -> str:
    """A mark of about 10 pixels."""
    shapes = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
        "square": f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>',
        "hollow": f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="none" stroke-width="2"/>',
        "diamond": f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>',
        "triangle": f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 10h-11z"/>',
        "cross": f'<path d="M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0 -9l-9 9" stroke-width="2.5"/>',
    }
    return f'<g fill="{COLOURS[arm]}" stroke="{COLOURS[arm]}">{shapes[STYLES[arm].marker]}</g>'


def panel(points: dict[str, Point], title: str, place: int) -> Iterator[str]:
    """One setting: axes, the line of random data, then the methods."""
    yield f'<g transform="translate({LEFT + place % 2 * COLUMN},{TOP + place // 2 * ROW})">'
    seeds = max((point.num_seeds for point in points.values()), default=0)
    yield text(0, -10, f"{title} ({seeds} seeds)", extra=' font-weight="bold"')
    right, bottom = x_of(X_RANGE[1]), PANEL_HEIGHT
    corner = x_of(Y_RANGE[1])
    yield f'<path class="pays" d="M0 0H{corner:.1f}L{x_of(X_RANGE[0]):.1f} {y_of(X_RANGE[0]):.1f}H0z"/>'
    ticks = "".join(f"M0 {y_of(tick):.1f}H{right:.1f}" for tick in Y_TICKS)
    yield f'<path class="grid" d="{ticks}"/><path class="axis" d="M0 0V{bottom}H{right:.1f}"/>'
    yield f'<path class="random" d="M{x_of(X_RANGE[0]):.1f} {y_of(X_RANGE[0]):.1f}L{corner:.1f} 0"/>'
    yield text(corner + 5, 12, "random, same FLOPs", extra=' class="small"')
    yield from (text(-7, y_of(tick) + 4, f"{tick}×", anchor="end") for tick in Y_TICKS)
    yield from (text(x_of(tick), bottom + 16, f"{tick}×", anchor="middle") for tick in X_TICKS)
    for arm, point in reversed(points.items()):  # what the legend names first lies on top
        x = x_of(point.cost)
        interval = f"M{x:.1f} {y_of(point.low):.1f}V{y_of(point.high):.1f}"
        yield f'<path stroke="{COLOURS[arm]}" stroke-width="1.5" d="{interval}"/>'
        yield marker(arm, x, y_of(point.gain))
    yield "</g>"


def draw(document: dict[str, Any]) -> str:
    """The picture as the text of an SVG file."""
    settings = [{arm: Point(*point) for arm, point in found.items()} for found in document["settings"]]
    drawn = [arm for arm in STYLES if any(arm in points for points in settings)]
    legend_top = TOP + 2 * ROW + 4
    rows = math.ceil(len(drawn) / LEGEND_COLUMNS)
    height = legend_top + rows * LEGEND_ROW + 26
    alt = (
        "Four panels, one a setting. Up: how many times the tokens random data needs. Right: FLOPs with everything "
        "that choosing took. A filter by words stands as high above the line of random data as our best form, or "
        "higher, in all panels but the one of ARC-Easy."
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="sans-serif" font-size="13">',
        f"<title>Gain against cost</title><desc>{escape(alt)}</desc>",
        f"<style>text{{fill:{GREY}}}.small{{font-size:11px}}.axis,.grid,.random{{fill:none;stroke:{GREY}}}"
        ".grid{opacity:.25}.random{stroke-dasharray:5 4}.pays{fill:#2da44e;opacity:.1}</style>",
    ]
    for place, (points, (_, _, title)) in enumerate(zip(settings, PANELS, strict=True)):
        lines += panel(points, title, place)
    for row in (0, 1):
        middle = TOP + row * ROW + PANEL_HEIGHT / 2
        turned = f' transform="rotate(-90 14 {middle:.1f})"'
        lines.append(text(14, middle, "tokens random data needs", anchor="middle", extra=turned))
    for column in (0, 1):
        x = LEFT + column * COLUMN + PANEL_WIDTH / 2
        lines.append(text(x, TOP + ROW + PANEL_HEIGHT + 35, "FLOPs, choosing included", anchor="middle"))
    for number, arm in enumerate(drawn):
        x = LEFT + number // rows * (WIDTH - LEFT) / LEGEND_COLUMNS
        y = legend_top + number % rows * LEGEND_ROW
        lines += [marker(arm, x, y - 4.5), text(x + 12, y, STYLES[arm].label)]
    lines.append(text(LEFT - 5, height - 8, NOTE, extra=' class="small"'))
    return "\n".join([*lines, "</svg>"]) + "\n"


def run(bench: harness.Bench) -> harness.Document:
    """Points of all methods in all settings."""
    source = harness.newest("selection")
    found = [points_of(source, task, filtered) for task, filtered, _ in PANELS]
    return {"settings": [{arm: list(point) for arm, point in points.items()} for points in found]}


def page(document: harness.Document) -> str:
    """A table for each setting."""
    blocks = ["# gain_against_cost", "Points of `docs/gain_against_cost.svg`, from the page of `selection`."]
    for (_, _, title), points in zip(PANELS, document["settings"], strict=True):
        rows = [
            [STYLES[arm].label, seeds, f"{gain:.2f} [{low:.2f}, {high:.2f}]", f"{cost:.2f}", f"{gain / cost:.2f}"]
            for arm, (cost, gain, low, high, seeds) in points.items()
        ]
        head = ["method", "seeds", "tokens random needs", "FLOPs, choosing included", "gain in FLOPs"]
        blocks += [f"## {title}", table(head, rows)]
    return markdown(*blocks, NOTE)


def differences(document: harness.Document) -> Iterator[str]:
    """Whether points are those of the committed result of `selection`."""
    source = harness.newest("selection")
    for (task, filtered, title), points in zip(PANELS, document["settings"], strict=True):
        known = {arm: list(point) for arm, point in points_of(source, task, filtered).items()}
        if known.keys() != points.keys() or any(not np.allclose(known[arm], points[arm], rtol=1e-6) for arm in known):
            yield f"{title}: the points are not those of `selection`"


def pictures(document: harness.Document) -> dict[Path, str]:
    """The picture, by its path."""
    return {PICTURE: draw(document)}
