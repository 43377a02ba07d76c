"""Geometry of the plots: from plain values to lines, bars, dots and words at places, which a template draws as SVG.

Own drawing, so that the page needs no library of plots and its colours follow the reader's light or dark. Plots are
400 units wide, which is about a phone; a wider page puts them next to each other. Trade-off: of many rounds only so
many are drawn, evenly spaced, and the plot says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mates_hf.reporting.page.groups import OTHERS
from mates_hf.reporting.page.rounds import Facts, selects

WIDTH = 400
MAX_DRAWN = 160  # rounds in a plot
NUM_COLOURS = 7  # of groups; the last is that of all others
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 24, 34
_MAX_LABEL = 18  # characters of a group's name


@dataclasses.dataclass
class Picture:
    """A plot: primitives in drawing order, each with the class that gives it a colour.

    Attributes:
        name: Name of the plot, which makes its ids.
        title: What it shows, for a screen reader.
        text: What can be seen in it, in words and numbers.
        height: Height in units.
        rects: Rectangles, with `x`, `y`, `width`, `height` and `kind`.
        areas: Filled outlines, with `points` and `kind`.
        lines: Lines, with `x1`, `y1`, `x2`, `y2` and `kind`.
        dots: Circles, with `x`, `y`, `r` and `kind`.
        words: Texts, with `x`, `y`, `text`, `anchor` and `kind`.
        legend: Pairs of a class and its meaning, shown below.
    """

    name: str
    title: str
    text: str
    height: int = 240
    rects: list[Facts] = dataclasses.field(default_factory=list)
    areas: list[Facts] = dataclasses.field(default_factory=list)
    lines: list[Facts] = dataclasses.field(default_factory=list)
    dots: list[Facts] = dataclasses.field(default_factory=list)
    words: list[Facts] = dataclasses.field(default_factory=list)
    legend: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Add a line."""
        self.lines.append({"x1": _r(x1), "y1": _r(y1), "x2": _r(x2), "y2": _r(y2), "kind": kind})

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Add a rectangle."""
        self.rects.append({"x": _r(x), "y": _r(y), "width": _r(width), "height": _r(height), "kind": kind})

    def dot(self, x: float, y: float, r: float, kind: str) -> None:
        """Add a circle."""
        self.dots.append({"x": _r(x), "y": _r(y), "r": _r(r), "kind": kind})

    def word(self, x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> None:
        """Add a text."""
        self.words.append({"x": _r(x), "y": _r(y), "text": text, "anchor": anchor, "kind": kind})


class Axis:
    """A linear scale from values to places.

    Args:
        low: Lowest value.
        high: Highest value.
        start: Place of the lowest value.
        end: Place of the highest value.
    """

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        wide = max(0.5, abs(low) * 0.01)
        self.low, self.high = (low, high) if high - low > 1e-9 * abs(low) else (low - wide, high + wide)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        """The place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, num: int = 4) -> list[float]:
        """Round values inside of the scale."""
        raw = (self.high - self.low) / num
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * each for each in (1, 2, 5, 10) if unit * each >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def signal_plot(rows: Sequence[Facts]) -> Picture | None:
    """Held-out rank correlation of each round with its interval, against the guard."""
    known = [row for row in rows if row["spearman"] is not None]
    if not known:
        return None
    drawn = _some(known)
    low = min([-0.1, *(row["low"] for row in drawn if row["low"] is not None)])
    x, y = _x_of_rounds(drawn), Axis(low, 1.0, 240 - _BOTTOM, _TOP)
    last, kept = known[-1], sum(map(selects, known))
    picture = Picture(
        "signal",
        "Signal of each round: held-out Spearman correlation with its 95% interval",
        f"{len(known)} rounds, {kept} of which selected. "
        f"Spearman is {last['spearman']:.2f} in round {last['number']}; "
        f"lowest {min(r['spearman'] for r in known):.2f}, highest {max(r['spearman'] for r in known):.2f}."
        + _left_out(drawn, known),
        legend=[("s-select", "selected"), ("s-refused", "refused"), ("s-guard", "guard")],
    )
    _frame(picture, y, [(tick, f"{tick:.1f}") for tick in y.ticks()], "Spearman")
    _ticks_of_rounds(picture, drawn, x)
    least = last["min_spearman"]
    if least is not None:
        picture.line(_LEFT, y(least), WIDTH - _RIGHT, y(least), "s-guard")
    for row in drawn:
        kind = "s-select" if selects(row) else "s-refused"
        if row["low"] is not None and row["high"] is not None:
            picture.line(x(row["number"]), y(row["low"]), x(row["number"]), y(row["high"]), kind)
        picture.dot(x(row["number"]), y(row["spearman"]), 4 if len(drawn) < 60 else 2, kind)
    return picture


def calibration_plot(info: Mapping[str, Any], fit: Mapping[str, Any], refused: bool) -> Picture | None:
    """Whether the prediction is true: mean label of each tenth of the held-out predictions."""
    pairs = [pair for pair in fit.get("calibration") or () if isinstance(pair, (list, tuple)) and len(pair) == 2]
    points = [(float(a), float(b)) for a, b in pairs if _finite(a) and _finite(b)]
    if len(points) < 2:
        return None
    deviation = fit.get("label_std")
    unit = float(deviation) if isinstance(deviation, (int, float)) and _finite(deviation) and deviation > 0 else 1.0
    middle = sum(b for _, b in points) / len(points)
    scaled = [((a - middle) / unit, (b - middle) / unit) for a, b in points]
    values = [value for pair in scaled for value in pair]
    low, high = min(values), max(values)
    x = Axis(min(a for a, _ in scaled), max(a for a, _ in scaled), _LEFT + 10, WIDTH - _RIGHT - 10)
    y = Axis(low, high, 240 - _BOTTOM - 6, _TOP + 6)
    num = fit.get("num_held_out")
    kind = "c-refused" if refused else "c-point"
    picture = Picture(
        "calibration",
        f"Is the prediction true? Held-out labels of round {info.get('number')} by tenths of the prediction",
        f"The lowest tenth has a mean label of {scaled[0][1]:+.2f} standard deviations, the highest "
        f"{scaled[-1][1]:+.2f}, "
        f"on {num if isinstance(num, int) else 'the'} held-out labels. A perfect prediction lies on the line."
        + (" The guard refused this fit." if refused else ""),
        legend=[(kind, "a tenth of the held-out labels"), ("c-line", "prediction equals label")],
    )
    _frame(picture, y, [(tick, f"{tick:+.1f}") for tick in y.ticks()], "mean label, sd")
    for tick in x.ticks():
        picture.word(x(tick), 240 - _BOTTOM + 14, f"{tick:+.2g}")
    picture.word((_LEFT + WIDTH) / 2, 236, "mean prediction, sd", kind="axis")
    a, b = max(x.low, y.low), min(x.high, y.high)
    if b > a:
        picture.line(x(a), y(a), x(b), y(b), "c-line")
    for (x1, y1), (x2, y2) in zip(scaled, scaled[1:], strict=False):
        picture.line(x(x1), y(y1), x(x2), y(y2), f"{kind}-path")
    for a, b in scaled:
        picture.dot(x(a), y(b), 4, kind)
    return picture


def groups_plot(groups: Mapping[str, Any]) -> Picture | None:
    """Where the compute went: share of each group, from the candidates over the rounds, stacked."""
    bought = groups["shares"]
    if not bought:
        return None
    drawn = [bought[i] for i in _spread(len(bought), MAX_DRAWN)]
    columns = [drawn[0]["pool"] or drawn[0]["shares"], *(each["shares"] for each in drawn)]
    names = [group["name"] for group in groups["named"]]
    names = sorted(names, key=lambda name: -sum(column.get(name, 0.0) for column in columns))
    shown = names if len(names) < NUM_COLOURS else names[: NUM_COLOURS - 1]
    stacks = [[column.get(name, 0.0) for name in shown] for column in columns]
    rest = [max(0.0, 1 - sum(stack)) for stack in stacks]
    if max(rest) > 1e-9:
        shown, stacks = [*shown, OTHERS], [[*stack, left] for stack, left in zip(stacks, rest, strict=True)]
    x, y = Axis(0, len(columns) - 1, _LEFT, WIDTH - _RIGHT), Axis(0, 1, 240 - _BOTTOM, _TOP)
    last, pool = columns[-1], columns[0]
    picture = Picture(
        "groups",
        "Where the compute went: share of each group in the candidates and in each round",
        "; ".join(f"{n}: {pool.get(n, 0.0):.0%} of the candidates, {last.get(n, 0.0):.0%} of the newest selection"
                  for n in shown if n != OTHERS) + "." + _left_out(drawn, bought),
        legend=[(f"g{i}", name) for i, name in enumerate(shown)],
    )  # fmt: skip
    for i in range(len(shown)):
        under = [(x(c), y(sum(stack[:i]))) for c, stack in enumerate(stacks)]
        over = [(x(c), y(sum(stack[: i + 1]))) for c, stack in enumerate(stacks)]
        points = " ".join(f"{_r(a)},{_r(b)}" for a, b in [*over, *reversed(under)])
        picture.areas.append({"points": points, "kind": f"g{i}"})
    _frame(picture, y, [(tick, f"{tick:.0%}") for tick in (0.0, 0.25, 0.5, 0.75, 1.0)], "share")
    picture.word(_LEFT, 240 - _BOTTOM + 14, "pool", "start")
    picture.word(WIDTH - _RIGHT, 240 - _BOTTOM + 14, f"round {drawn[-1]['round']}", "end")
    if len(drawn) > 1:
        picture.word(x(1), 240 - _BOTTOM + 14, f"{drawn[0]['round']}")
    return picture


def losses_plot(groups: Mapping[str, Any]) -> Picture | None:
    """Who gains and who pays: change of each group's loss since the first round that probed it."""
    changed = [group for group in groups["named"] if group["loss_change"] is not None]
    changed = sorted(changed, key=lambda group: group["loss_change"])
    if not changed:
        return None
    if len(changed) > 14:
        changed = [*changed[:7], *changed[-7:]]
    height = 40 + 16 * len(changed)
    values = [group["loss_change"] for group in changed]
    x = Axis(min(0.0, *values), max(0.0, *values), 130, WIDTH - 52)
    best, worst = changed[0], changed[-1]
    picture = Picture(
        "losses",
        "Change of loss by group since the first round, nats/token; left of the line is better",
        f"Most gained: {best['name']}, {best['loss_change']:+.3f}. "
        f"Least: {worst['name']}, {worst['loss_change']:+.3f}.",
        height=height,
        legend=[("l-better", "loss fell"), ("l-worse", "loss rose"), ("l-few", "few probes: noisy")],
    )
    for i, group in enumerate(changed):
        value, at = group["loss_change"], 12 + 16 * i
        kind = "l-few" if group["probes"] < 20 else "l-better" if value <= 0 else "l-worse"
        picture.rect(min(x(0), x(value)), at, max(abs(x(value) - x(0)), 0.5), 11, kind)
        picture.word(124, at + 9, _short(group["name"]), "end")
        picture.word(max(x(0), x(value)) + 4, at + 9, f"{value:+.2f}", "start")
    picture.line(x(0), 8, x(0), height - 24, "frame")
    return picture


def timeline_plot(course: Mapping[str, Any]) -> Picture | None:
    """The wall-clock of a run as blocks: training, the stages of rounds, and devices that wait."""
    blocks = course["blocks"]
    total = max((block["start"] + block["seconds"] for block in blocks), default=0.0)
    if not total:
        return None
    x = Axis(0, total, 8, WIDTH - 8)
    sums: dict[str, float] = {}
    for block in blocks:
        kind = _block_kind(block)
        sums[kind] = sums.get(kind, 0.0) + block["seconds"]
    meanings = {"t-training": "training", "t-device": "probe and checks", "t-idle": "devices wait for the CPU"}
    picture = Picture(
        "timeline",
        "Timeline of the run: what the wall-clock went to",
        ", ".join(f"{meanings[kind]}: {seconds:.1f} s" for kind, seconds in sums.items()) + "."
        + (" Only the newest rounds are drawn." if course["cut"] else "")
        + ("" if course["step_seconds"] is not None else " Training was not timed, so only rounds are drawn."),
        height=120,
        legend=[(kind, meanings[kind]) for kind in meanings if kind in sums],
    )  # fmt: skip
    begun: set[Any] = set()
    last_at = -float(WIDTH)
    for block in blocks:
        left, right = x(block["start"]), x(block["start"] + block["seconds"])
        picture.rect(left, 30, max(right - left, 0.4), 46, _block_kind(block))
        if block["stage"] != "training" and block["round"] not in begun:
            begun.add(block["round"])
            if left - last_at > 18:
                picture.word(left, 22, str(block["round"]), "start")
                last_at = left
    for tick in x.ticks(5):
        picture.line(x(tick), 76, x(tick), 81, "frame")
        picture.word(min(max(x(tick), 14), WIDTH - 18), 94, _seconds(tick))
    picture.word(8, 10, "round", "start", "axis")
    return picture


def curves_plot(
    curves: Sequence[Sequence[Sequence[float]]], names: Sequence[str], metric: str, unit: str
) -> Picture | None:
    """The course of a metric in two runs."""
    values = [y for curve in curves for _, y in curve]
    if any(len(curve) < 2 for curve in curves):
        return None
    places = [x for curve in curves for x, _ in curve]
    x = Axis(min(places), max(places), _LEFT + 6, WIDTH - _RIGHT - 6)
    y = Axis(min(values), max(values), 240 - _BOTTOM - 6, _TOP + 6)
    ends = [
        f"{letter} ({name}) ends at {curve[-1][1]:.4f}"
        for letter, name, curve in zip("AB", names, curves, strict=True)
    ]
    picture = Picture(
        "curves",
        f"Course of {metric} in both runs",
        f"{'; '.join(ends)}.",
        legend=[(f"{letter}-line", f"{letter.upper()}: {name}") for letter, name in zip("ab", names, strict=True)],
    )
    _frame(picture, y, [(tick, f"{tick:.3g}") for tick in y.ticks()], metric[:40])
    for tick in x.ticks():
        picture.word(min(x(tick), WIDTH - 14), 240 - _BOTTOM + 14, f"{tick:.3g}")
    picture.word((_LEFT + WIDTH) / 2, 236, unit, kind="axis")
    for letter, curve in zip("ab", curves, strict=True):
        drawn = [curve[i] for i in _spread(len(curve), MAX_DRAWN)]
        for (x1, y1), (x2, y2) in zip(drawn, drawn[1:], strict=False):
            picture.line(x(x1), y(y1), x(x2), y(y2), f"{letter}-line")
    return picture


def _block_kind(block: Mapping[str, Any]) -> str:
    if block["stage"] == "training":
        return "t-training"
    return "t-idle" if block["idle"] else "t-device"


def _seconds(value: float) -> str:
    if value >= 2 * 3600:
        return f"{value / 3600:.3g} h"
    return f"{value / 60:.3g} min" if value >= 120 else f"{value:.3g} s"


def _frame(picture: Picture, y: Axis, ticks: Sequence[tuple[float, str]], label: str) -> None:
    """The axes on the left and below, with grid lines at the ticks."""
    for value, text in ticks:
        picture.line(_LEFT, y(value), WIDTH - _RIGHT, y(value), "grid")
        picture.word(_LEFT - 5, y(value) + 4, text, "end")
    picture.line(_LEFT, 240 - _BOTTOM, WIDTH - _RIGHT, 240 - _BOTTOM, "frame")
    picture.word(2, 11, label, "start", "axis")


def _x_of_rounds(rows: Sequence[Facts]) -> Axis:
    numbers = [row["number"] or 0 for row in rows]
    return Axis(min(numbers), max(numbers), _LEFT + 14, WIDTH - _RIGHT - 14)


def _ticks_of_rounds(picture: Picture, rows: Sequence[Facts], x: Axis) -> None:
    for i in _spread(len(rows), 6):
        picture.word(x(rows[i]["number"]), 240 - _BOTTOM + 14, str(rows[i]["number"]))
    picture.word((_LEFT + WIDTH) / 2, 236, "round", kind="axis")


def _some(rows: Sequence[Facts]) -> list[Facts]:
    return [rows[i] for i in _spread(len(rows), MAX_DRAWN)]


def _spread(num: int, size: int) -> list[int]:
    """Up to `size` evenly spaced places, the first and the last among them."""
    if num <= size:
        return list(range(num))
    return sorted({round(i * (num - 1) / (size - 1)) for i in range(size)})


def _left_out(drawn: Sequence[Any], known: Sequence[Any]) -> str:
    return "" if len(drawn) == len(known) else f" {len(drawn)} of {len(known)} rounds are drawn, evenly spaced."


def _short(name: str) -> str:
    return name if len(name) <= _MAX_LABEL else name[: _MAX_LABEL - 1] + "…"


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _r(value: float) -> float:
    return round(value, 1)
