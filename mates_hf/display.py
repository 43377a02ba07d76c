"""How results print: at most ten short lines in a shell, a small table in a notebook, never an array or a passage.

Where it is used: left of every folder, and it imports nothing of the package: whoever owns a result hands over its
name and a few facts as text. Trade-off: what is cut off is marked by an ellipsis and has to be asked for by name.
"""

from __future__ import annotations

import dataclasses
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_LINES = 10
MAX_WIDTH = 100
_MAX_VALUE = 60  # characters of one value among others
_MOST_READ = 1 << 20  # values that a summary of an array looks at


def cut(text: str, width: int) -> str:
    """The text in one line of at most `width` characters, with an ellipsis where something was cut off."""
    line = " ".join(text.split()) if "\n" in text or "\r" in text else text
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= width else f"{line[: width - 1]}…"


def card(title: str, facts: Mapping[str, str]) -> str:
    """A result as text.

    Args:
        title: The first line.
        facts: One line for each, its name first.

    Returns:
        At most ten lines of at most 100 characters.
    """
    widest = max(map(len, facts), default=0)
    lines = [title, *(f"  {name:<{widest}}  {value}" for name, value in facts.items())]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"  … and {len(lines) - MAX_LINES + 1} more"]
    return "\n".join(cut(line, MAX_WIDTH) for line in lines)


def html_card(title: str, facts: Mapping[str, str]) -> str:
    """The same as a table for a notebook; everything in it is escaped.

    Args:
        title: The caption.
        facts: One row for each.

    Returns:
        HTML.
    """
    left = {"style": "text-align:left"}
    table = ElementTree.Element("table")
    ElementTree.SubElement(ElementTree.SubElement(table, "caption", left), "b").text = cut(title, MAX_WIDTH)
    body = ElementTree.SubElement(table, "tbody")
    for name, value in list(facts.items())[: MAX_LINES - 1]:
        row = ElementTree.SubElement(body, "tr")
        ElementTree.SubElement(row, "th", left).text = cut(name, MAX_WIDTH)
        ElementTree.SubElement(row, "td", left).text = cut(value, 2 * MAX_WIDTH)
    return ElementTree.tostring(table, encoding="unicode", method="html")


def call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as text, such as `MatesConfig(update_steps=500)`, wrapped to lines of at most 100 characters.

    Args:
        name: What is called.
        arguments: Its keyword arguments; long values are cut, functions and other objects shown by their name.

    Returns:
        At most ten lines.
    """
    parts = [f"{key}={brief(value)}" for key, value in arguments.items()]
    whole = f"{name}({', '.join(parts)})"
    if len(whole) <= MAX_WIDTH:
        return whole
    lines = [f"{name}("]
    row = "   "
    for part in parts:
        if len(row) + len(part) + 2 > MAX_WIDTH:
            lines.append(row)
            row = "   "
        row += f" {part},"
    lines.append(row)
    if len(lines) > MAX_LINES - 1:
        lines = [*lines[: MAX_LINES - 2], "    …"]
    return "\n".join(cut(line, MAX_WIDTH) for line in [*lines, ")"])


def brief(value: Any) -> str:
    """A value in a few characters: plain ones as they are written, others by the name of their type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return cut(repr(value), _MAX_VALUE)
    if isinstance(value, (tuple, list)) and all(isinstance(part, (bool, int, float, str)) for part in value[:8]):
        return cut(repr(value[:8]), _MAX_VALUE) if len(value) <= 8 else f"<{len(value)} values>"
    if isinstance(value, type) or callable(value):
        return cut(f"<{getattr(value, '__qualname__', type(value).__qualname__)}>", _MAX_VALUE)
    return cut(f"<{type(value).__qualname__}>", _MAX_VALUE)


def changed_fields(value: Any) -> str:
    """The `repr` of a dataclass of settings: the fields that differ from their defaults, as one would write them."""
    given = {}
    for field in dataclasses.fields(value):
        now = getattr(value, field.name)
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        try:
            same = type(now) is type(default) and bool(now == default)
        except (TypeError, ValueError):  # an array, say, where a number belongs
            same = False
        if not same:
            given[field.name] = now
    return call(type(value).__qualname__, given)


def number(value: Any) -> str:
    """A figure in few characters; `-` where there is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def interval(values: Any) -> str:
    """`[0.49, 0.78]`, or nothing where it was not recorded."""
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        return ""
    bounds = [f"{bound:.2f}" if isinstance(bound, (int, float)) else "-" for bound in values]
    return f"[{bounds[0]}, {bounds[1]}]"


def some_of(values_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """All values, or of very many an even sample."""
    return values_N[:: max(1, math.ceil(len(values_N) / _MOST_READ))]


def spread(values_N: npt.NDArray[Any]) -> dict[str, float]:
    """Mean, standard deviation and quantiles of the finite values; empty where there is none."""
    values = np.asarray(some_of(values_N), np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    with np.errstate(all="ignore"):
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
        return {"mean": float(values.mean()), "std": float(values.std()), "q10": low, "median": middle, "q90": high}


def spread_text(values_N: npt.NDArray[Any]) -> str:
    """The same in half a line."""
    found = spread(values_N)
    if not found:
        return "none that is finite" if len(values_N) else "none"
    return (
        f"mean {found['mean']:+.2e}, sd {found['std']:.1e}, "
        f"10% {found['q10']:+.1e}, median {found['median']:+.1e}, 90% {found['q90']:+.1e}"
    )
