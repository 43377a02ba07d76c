"""Pages: Markdown tables, figures with their targets, and what a cell looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lab.statistics import mean_interval


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table that ends with a line break."""
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (heads, ["---"] * len(heads), *rows))


def with_tables(page: str, tables: Sequence[str]) -> str:
    """A page with these tables in the place of its own that have the same heads; how columns are set stays the page's.

    Raises:
        ValueError: the page has no table with the heads of one, or several.
    """
    lines = page.split("\n")
    for wanted in tables:
        own = wanted.rstrip("\n").split("\n")
        starts = [i for i, line in enumerate(lines) if line == own[0]]
        if len(starts) != 1:
            raise ValueError(f"The page has {len(starts)} tables in place of one with these heads: {own[0]}")
        end = next((i for i in range(starts[0], len(lines)) if not lines[i].startswith("|")), len(lines))
        lines[starts[0] + 2 : end] = own[2:]
    return "\n".join(lines)


def stale_tables(page: str, tables: Sequence[str]) -> list[str]:
    """Heads of the tables that a page has otherwise, or not at all."""
    found = []
    for wanted in tables:
        try:
            stale = with_tables(page, [wanted]) != page
        except ValueError:
            stale = True
        found += [wanted.partition("\n")[0]] if stale else []
    return found


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
