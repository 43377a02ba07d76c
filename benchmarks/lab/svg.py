"""SVG written by hand: axes, bands, bars and labels, the same bytes whatever is installed.

Every colour is one that can be read on white and on black, and text is grey. Trade-off: no library places anything, so
a label that would lie on another is moved by `spread`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

GREY = "#7d8590"  # text and axes; readable on white and on black

Pairs = Sequence[tuple[float, float]]


class Frame(NamedTuple):
    """A rectangle of a picture, and the ranges that its axes show."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Pixels from the left of the picture."""
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Pixels from its top."""
        low, high = self.y_range
        return self.top + self.height * (high - value) / (high - low)


def text(x: float, y: float, words: str, *, anchor: str = "start", extra: str = "") -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def coloured(x: float, y: float, words: str, colour: str, anchor: str = "start") -> str:
    """One line of text in the colour of what it names."""
    return text(x, y, words, anchor=anchor, extra=f' style="fill:{colour}"')


def axes(frame: Frame, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> Iterator[str]:
    """Lines of an x and a y axis, with their ticks and a grid."""
    bottom, right = frame.top + frame.height, frame.left + frame.width
    grid = "".join(f"M{frame.left:.1f} {frame.y(value):.1f}H{right:.1f}" for value, _ in y_ticks)
    yield f'<path class="grid" d="{grid}"/>'
    yield f'<path class="axis" d="M{frame.left:.1f} {frame.top:.1f}V{bottom:.1f}H{right:.1f}"/>'
    yield from (text(frame.left - 7, frame.y(value) + 4, name, anchor="end") for value, name in y_ticks)
    yield from (text(frame.x(value), bottom + 17, name, anchor="middle") for value, name in x_ticks)


def line(frame: Frame, points: Pairs, colour: str, width: float = 2) -> str:
    """A line through points."""
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
    return f'<path fill="none" stroke="{colour}" stroke-width="{width:g}" d="M{path}"/>'


def band(frame: Frame, low: Pairs, high: Pairs, colour: str) -> str:
    """The area between two lines."""
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in [*low, *reversed(high)])
    return f'<path fill="{colour}" opacity=".2" d="M{path}z"/>'


def whisker(x: float, low: float, high: float, colour: str) -> str:
    """A vertical interval, in pixels."""
    return f'<path stroke="{colour}" stroke-width="1.5" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'


def spread(places: Sequence[float], least: float, bottom: float = math.inf) -> list[float]:
    """Places of labels, in pixels, moved apart until each is `least` from the next; their order stays.

    Args:
        places: Pixels from the top.
        least: Pixels between two.
        bottom: Where the last one may be.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = list(places)
    for before, after in zip(order, order[1:], strict=False):
        found[after] = max(found[after], found[before] + least)
    for after in reversed(order):  # and back up from the bottom
        found[after] = min(found[after], bottom)
        bottom = found[after] - least
    return found


def picture(width: int, height: int, title: str, alt: str, lines: Sequence[str]) -> str:
    """The text of an SVG file."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title><desc>{escape(alt)}</desc>",
        f"<style>text{{fill:{GREY}}}.small{{font-size:11px}}.axis,.grid,.zero{{fill:none;stroke:{GREY}}}"
        ".grid{opacity:.25}.zero{stroke-dasharray:5 4}</style>",
    ]
    return "\n".join([*head, *lines, "</svg>"]) + "\n"
