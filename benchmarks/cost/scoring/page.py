"""The page of `scoring`: raw seconds and bytes to medians, spreads and whether a target is met."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.lab.tables import is_met, settings_page, table, target, verdict

TYPES = ("int32", "int64")  # of the token ids in a column

Result = dict[str, Any]


class Line(NamedTuple):
    """A row of the table."""

    part: str
    what: str
    values: Sequence[float]  # of the turns; none where a package is not installed
    unit: str = "x"
    least: float | None = None  # target
    most: float | None = None  # target


def ratios(a: Sequence[float], b: Sequence[float], factor: float = 1.0) -> list[float]:
    """`factor * a / b`, turn by turn."""
    return [factor * x / y for x, y in zip(a, b, strict=True)]


def column_lines(result: Result) -> Iterator[Line]:
    """Rows of the table about the column."""
    seconds, billion = result["seconds"], result["tokens"] / 1e9
    counts = sorted({int(name.split()[2]) for name in seconds})
    most = counts[-1]
    for kind in TYPES:
        for num in counts:
            score, add = seconds[f"score {kind} {num}"], seconds[f"sum {kind} {num}"]
            threads = f"{num} thread{'s' * (num > 1)}"
            yield Line("column", f"{kind}: time / `numpy.sum`, {threads} each", ratios(score, add), most=8.0)
            yield Line("column", f"{kind}: ns/token, {threads}", [x / billion for x in score], "ns")
        if most > 1:
            score, one = seconds[f"score {kind} {most}"], seconds[f"sum {kind} 1"]
            yield Line("column", f"{kind}: time of {most} threads / `numpy.sum` of one", ratios(score, one))
            gain, least = ratios(seconds[f"score {kind} 1"], score), 1.6 if most == 2 else None
            yield Line("column", f"{kind}: {most} threads against one", gain, least=least)


def map_lines(result: Result) -> Iterator[Line]:
    """Rows of the table about `map`."""
    for kind, found in result.items():
        seconds, size = found["seconds"], f"{found['tokens'] / 1e6:.0f} M tokens, {kind.replace('quarter', 'int32')}"
        score, identity = seconds["score"], seconds["identity"]
        rows = ratios(score, seconds["rows"], found["row tokens"] / found["tokens"])
        saved = ratios(seconds["score, saved"], seconds["identity, saved"])
        most = 1.3 if kind == "int32" else None
        yield Line("map", f"{size}: scoring / identity, batched", ratios(score, identity), most=most)
        yield Line("map", f"{size}: scoring / identity, Arrow tables", ratios(score, seconds["identity arrow"]))
        yield Line("map", f"{size}: scoring / identity, row by row", rows)
        yield Line("map", f"{size}: scoring, then `save_to_disk` / identity, then the same", saved)
        yield Line("map", f"{size}: scoring", score, "s")
        yield Line("map", f"{size}: identity, batched", identity, "s")


def memory_lines(raw: Result) -> Iterator[Line]:
    """Rows of the table about memory."""
    for name, found in raw.items():
        if name.startswith("memory"):
            what = f"{name.split()[2]}, {found['tokens'] / 1e6:.0f} M tokens"
            added, resident = (found["own_peak"] - found["own_before"]) / 2**20, found["resident_peak"] / 2**20
            mapped = f"{what}: resident memory at its peak, mapped pages of the column included"
            yield Line("memory", f"{what}: own memory added at its peak", [added], "MiB")
            yield Line("memory", mapped, [resident], "MiB")


def rival_lines(rivals: Result) -> Iterator[Line]:
    """Rows of the table about rivals."""
    rates = {name: [rivals["tokens"][name] / x for x in found] for name, found in rivals["seconds"].items()}
    pipelines = [name for name in rates if "pipeline" in name]
    best = max(pipelines, key=lambda name: statistics.median(rates[name]))
    goals = (("DSIR", "DSIR", 100.0), ("fastText", "fastText", 10.0), ("bert-base pipeline", best, 5000.0))
    for rival, name, goal in goals:
        for ours, least in (("tokens", goal), ("documents", None), ("texts", None)):
            found = ratios(rates[f"n-gram model, {ours}"], rates[name]) if name in rates else []
            yield Line("rivals", f"n-gram model, {ours} / {rival}", found, least=least)
    for name, found in rates.items():
        yield Line("rivals", f"{name}: thousand tokens/s", [x / 1e3 for x in found], "")


def encoder_lines(encoder: Result) -> Iterator[Line]:
    """Rows of the table about the encoder."""
    found = encoder.get("seconds", {})
    others = [name for name in found if name.startswith("pipeline")]
    quickest = min(others, key=lambda name: statistics.median(found[name]), default="pipeline")
    for ours in [name for name in found if name not in others] or ["encoder"]:
        for name in others or [quickest]:
            gain = ratios(found[name], found[ours]) if found else []
            least, note = (3.0, ", its quickest") if name == quickest else (None, "")
            what = ours.replace("encoder", "`EncoderInfluenceModel`")
            yield Line("encoder", f"{what} / {name}{note}", gain, least=least)
    for name, values in found.items():
        yield Line("encoder", f"{name}: thousand tokens/s", [encoder["tokens"] / x / 1e3 for x in values], "")


def page(document: Result) -> str:
    """Medians over the turns, with the lowest and the highest."""
    raw, rows = document["raw"], []
    lines = [*column_lines(raw["column"]), *map_lines(raw["map"]), *memory_lines(raw)]
    lines += [*rival_lines(raw["rivals"]), *encoder_lines(raw["encoder"])]
    for part, what, values, unit, least, most in lines:
        if not values:
            rows.append([part, what, "not installed", "", "", ""])
            continue
        median = statistics.median(values)
        spread = f"{min(values):.4g} to {max(values):.4g}" if len(values) > 1 else ""
        met = verdict(is_met(median, least, most))
        rows.append([part, what, f"{median:.4g} {unit}", spread, target(least, most), met])
    heads = ["part", "what", "median", "lowest to highest", "target", "met"]
    return settings_page("scoring", document, table(heads, rows))
