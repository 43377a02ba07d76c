"""How much of the rest is given up for how much gain, at 60% and 30% random rows, as far as they were run.

The picture `docs/frontier.svg`: a panel for each setting, and one for the tasks that are not in the reference. Up: how
much lower the loss is than with random rows on what was asked for. Right: how much higher on the pool's own text. A
line joins one method's shares of random rows, where there are two. Means are over the seeds that a method and random
rows both have; of some there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import svg
from benchmarks.lab.plots import COLOURS
from benchmarks.lab.statistics import mean_interval
from benchmarks.lab.svg import Frame, text
from benchmarks.quality.horizon.arms import RANDOM, REPORTED_SEEDS
from benchmarks.quality.horizon.page import outside_loss, pairs_of, reference_loss, units_of

PICTURE = Path(__file__).resolve().parents[3] / "docs" / "frontier.svg"
SHARES = {"60%": ", 60 % random", "30%": ", 30 % random", "0%": ""}  # of random rows; what it is called in an arm
DRAWN = ("60%", "30%")  # without any, several times as much is given up: a picture of both would show neither
METHODS = {
    "ours": "ours", "DSIR": "DSIR, tuned", "fastText": "fastText, tuned", "ours and DSIR": "ours and DSIR, added",
    "log-odds": "log-odds alone",
}  # fmt: skip
DASHED = "ours and DSIR"
Losses = Mapping[str, Any]
PANELS: tuple[tuple[str, str, Callable[[Losses, str], float]], ...] = (
    ("tasks", "items of five tasks", reference_loss),
    ("tasks", "answers of four other tasks", outside_loss),
    ("continued", "continued pretraining", reference_loss),
    ("style", "one style of text", reference_loss),
    ("broad", "eight domains at once", reference_loss),
)
WIDTH, PANEL, COLUMNS, COLUMN, ROW = 860, (220, 170), 3, 280, 255

Points = dict[str, dict[str, list[float]]]  # by method and share: given up, gained, half its interval, seeds


def points_of(
    document: Mapping[str, Any],
    setting: str,
    loss_of: Callable[[Losses, str], float],
    seeds: Sequence[int] = REPORTED_SEEDS,
) -> Points:
    """What each method gains and gives up in one panel, over these seeds."""
    units = units_of(document, setting, seeds)
    found: Points = {}
    for method in METHODS:
        for share, name in SHARES.items():
            pairs = pairs_of(units, f"{method}{name}", RANDOM)
            if pairs:
                found.setdefault(method, {})[share] = point_of(pairs, setting, loss_of)
    return found


def point_of(
    pairs: Sequence[tuple[Losses, Losses]], setting: str, loss_of: Callable[[Losses, str], float]
) -> list[float]:
    """What an arm gives up against random rows, what it gains, half the interval of that, and the number of seeds."""
    ends = [(own["decayed"][-1], random["decayed"][-1]) for own, random in pairs]
    given = float(np.mean([own["pool"] - random["pool"] for own, random in ends]))
    mean, half = mean_interval([loss_of(random, setting) - loss_of(own, setting) for own, random in ends])
    return [given, mean, 0.0 if len(ends) == 1 else half, len(ends)]


def _ends(values: list[float]) -> tuple[float, float]:
    """A range from 0, or a little below it, to a little above the largest value."""
    most, least = max([0.02, *values]), min([0.0, *values])
    return least - 0.06 * (most - least), most + 0.1 * (most - least)


def _ticks(ends: tuple[float, float]) -> list[tuple[float, str]]:
    """Three to six round numbers."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if (ends[1] - ends[0]) / step <= 6)
    return [(i * step, f"{i * step:g}") for i in range(int(ends[0] / step), int(ends[1] / step) + 1)]


def panel(points: Points, title: str, left: float, top: float) -> Iterator[str]:
    """One setting: axes, random rows at the corner, a line for each method."""
    points = {
        method: {share: shares[share] for share in DRAWN if share in shares} for method, shares in points.items()
    }
    cells = [cell for shares in points.values() for cell in shares.values()]
    x_range = _ends([cell[0] for cell in cells])
    y_range = _ends([cell[1] + sign * cell[2] for cell in cells for sign in (-1, 1)])
    frame = Frame(left, top, *PANEL, x_range, y_range)
    yield text(left, top - 12, title, extra=' font-weight="bold"')
    yield from svg.axes(frame, _ticks(x_range), _ticks(y_range))
    yield f'<circle cx="{frame.x(0):.1f}" cy="{frame.y(0):.1f}" r="4" fill="{COLOURS[RANDOM]}"/>'
    for method, shares in points.items():
        colour = _colour(method)
        if len(shares) > 1:  # of one share nobody knows how the line bends
            yield svg.line(frame, [(0.0, 0.0), *((cell[0], cell[1]) for cell in shares.values())], colour, 1.5)
        for share, (given, gain, half, _) in shares.items():
            x, y = frame.x(given), frame.y(gain)
            fill = "none" if method == DASHED else colour
            yield svg.whisker(x, frame.y(gain - half), frame.y(gain + half), colour)
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
            if method == "ours":
                yield text(x + 7, y + 14, share, extra=' class="small"')


def _colour(method: str) -> str:
    return COLOURS["ours" if method == DASHED else method]


def draw(document: Mapping[str, Any]) -> str:
    """The picture as the text of an SVG file."""
    found = [(title, points_of(document, setting, loss_of)) for setting, title, loss_of in PANELS]
    shown = [(title, points) for title, points in found if points]
    lines: list[str] = []
    for place, (title, points) in enumerate(shown):
        lines += panel(points, title, 60 + place % COLUMNS * COLUMN, 40 + place // COLUMNS * ROW)
    bottom = 40 + (len(shown) - 1) // COLUMNS * ROW + PANEL[1]
    lines.append(text(WIDTH / 2, bottom + 42, "given up: loss on the pool's own text above that of random rows, "
                      "nats/token", anchor="middle"))  # fmt: skip
    middle = (40 + bottom) / 2
    turned = f' transform="rotate(-90 14 {middle:.1f})"'
    lines.append(text(14, middle, "gained: loss below that of random rows, nats/token", anchor="middle", extra=turned))
    drawn = [method for method in METHODS if any(method in points for _, points in shown)]
    for number, method in enumerate(drawn):
        x, y = 60 + 160 * number, bottom + 68
        fill = "none" if method == DASHED else _colour(method)
        lines.append(
            f'<circle cx="{x}" cy="{y - 4:.1f}" r="4.5" fill="{fill}" stroke="{_colour(method)}" stroke-width="2"/>'
        )
        lines.append(text(x + 10, y, METHODS[method]))
    note = (
        "Grey: random rows alone. Numbers beside ours: share of random rows (random_share). "
        "Intervals where there are seeds for them."
    )
    lines.append(text(60, bottom + 92, note, extra=' class="small"'))
    alt = "What each method gains against what it gives up, at the shares of random rows that were run."
    return svg.picture(WIDTH, int(bottom + 106), "What is given up for the gain", alt, lines)


def pictures(document: Mapping[str, Any]) -> dict[Path, str]:
    """The picture, by its path."""
    return {PICTURE: draw(document)}
