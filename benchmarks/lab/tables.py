"""Pages: Markdown tables, figures with their targets, and what a cell looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lab.statistics import mean_interval


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table that ends with a line break."""
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (heads, ["---"] * len(heads), *rows))


def markdown(*blocks: str) -> str:
    """A page of these blocks with an empty line between two; empty ones are left out."""
    return "\n\n".join(block.rstrip("\n") for block in blocks if block) + "\n"


def title(name: str, quick: bool = False) -> str:
    """The first line of a page."""
    return f"# {name}{' (quick, not to be reported)' if quick else ''}"


def named(values: Mapping[str, Any]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items()) + "."


def interval(values: Sequence[float], digits: int = 4) -> str:
    """Mean of paired differences and half its interval."""
    if not len(values):
        return ""
    mean, half = mean_interval(values)
    return f"{mean:+.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def target(least: float | None = None, most: float | None = None) -> str:
    """What a figure must reach."""
    return f"≥ {least:g}" if least is not None else "" if most is None else f"≤ {most:g}"


def is_met(value: float, least: float | None = None, most: float | None = None) -> bool | None:
    """Whether it does; None where there is no target."""
    if least is None and most is None:
        return None
    return bool(value >= least if least is not None else value <= (most or 0.0))


def verdict(met: bool | None) -> str:
    """The same in a table."""
    return "" if met is None else "yes" if met else "**no**"


def figure(
    what: str, value: float, unit: str = "", *, least: float | None = None, most: float | None = None
) -> dict[str, Any]:
    """One line of a result, with its target where it has one."""
    met = is_met(value, least, most)
    return {"what": what, "value": value, "unit": unit, "least": least, "most": most, "met": met}


def figures_page(name: str, document: Mapping[str, Any]) -> str:
    """The page of a benchmark whose result is a list of figures."""
    rows = []
    for line in document["figures"]:
        goal, met = target(line["least"], line["most"]), verdict(line["met"])
        rows.append([line["what"], f"{line['value']:.4g} {line['unit']}", goal, met])
    return settings_page(name, document, table(["what", "measured", "target", "met"], rows))


def settings_page(name: str, document: Mapping[str, Any], *blocks: str) -> str:
    """A page that begins with the hardware and the settings."""
    about = f"Settings: {named(document['settings'])}"
    return markdown(title(name, document["quick"]), named(document["hardware"]), about, *blocks)
