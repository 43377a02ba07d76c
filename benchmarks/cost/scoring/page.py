"""The page of `scoring`: raw seconds and bytes to medians, spreads and whether a target is met."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.lab.tables import is_met, named, table, target, title, verdict

TYPES = ("int32", "int64")  # of the token ids in a column

Result = dict[str, Any]
# Part, what, values of the turns (none: not installed), unit, target: at least this, or at most what is below 0.
Line = tuple[str, str, Sequence[float], str, float | None]


def ratios(a: Sequence[float], b: Sequence[float], factor: float = 1.0) -> list[float]:
    """`factor * a / b`, turn by turn."""
    return [factor * x / y for x, y in zip(a, b, strict=True)]


def column_lines(result: Result) -> list[Line]:
    """Rows of the table about the column."""
    seconds, billion = result["seconds"], result["tokens"] / 1e9
    counts = sorted({int(name.split()[2]) for name in seconds})
    most = counts[-1]
    lines: list[Line] = []
    for kind in TYPES:
        for num in counts:
            score, add = seconds[f"score {kind} {num}"], seconds[f"sum {kind} {num}"]
            threads = f"{num} thread{'s' * (num > 1)}"
            lines.append(("column", f"{kind}: time / `numpy.sum`, {threads} each", ratios(score, add), "x", -8.0))
            lines.append(("column", f"{kind}: ns/token, {threads}", [x / billion for x in score], "ns", None))
        if most > 1:
            score, one = seconds[f"score {kind} {most}"], seconds[f"sum {kind} 1"]
            lines.append(
                ("column", f"{kind}: time of {most} threads / `numpy.sum` of one", ratios(score, one), "x", None)
            )
            gain = ratios(seconds[f"score {kind} 1"], score)
            goal = 1.6 if most == 2 else None
            lines.append(("column", f"{kind}: {most} threads against one", gain, "x", goal))
    return lines


def map_lines(result: Result) -> list[Line]:
    """Rows of the table about `map`."""
    lines: list[Line] = []
    for kind, found in result.items():
        seconds, size = found["seconds"], f"{found['tokens'] / 1e6:.0f} M tokens, {kind.replace('quarter', 'int32')}"
        score = seconds["score"]
        scale = found["tokens"] / found["row tokens"]
        goal = -1.3 if kind == "int32" else None
        lines += [
            ("map", f"{size}: scoring / identity, batched", ratios(score, seconds["identity"]), "x", goal),
            ("map", f"{size}: scoring / identity, Arrow tables", ratios(score, seconds["identity arrow"]), "x", None),
            ("map", f"{size}: scoring / identity, row by row", ratios(score, seconds["rows"], 1 / scale), "x", None),
            (
                "map", f"{size}: scoring, then `save_to_disk` / identity, then the same",
                ratios(seconds["score, saved"], seconds["identity, saved"]), "x", None,
            ),
            ("map", f"{size}: scoring", score, "s", None),
            ("map", f"{size}: identity, batched", seconds["identity"], "s", None),
        ]  # fmt: skip
    return lines


def memory_lines(memory: dict[str, Result]) -> list[Line]:
    """Rows of the table about memory."""
    lines: list[Line] = []
    for name, found in memory.items():
        what = f"{name.split()[2]}, {found['tokens'] / 1e6:.0f} M tokens"
        added = (found["own_peak"] - found["own_before"]) / 2**20
        lines.append(("memory", f"{what}: own memory added at its peak", [added], "MiB", None))
        lines.append(("memory", f"{what}: resident memory at its peak, mapped pages of the column included",
                      [found["resident_peak"] / 2**20], "MiB", None))  # fmt: skip
    return lines


def rate_lines(rivals: Result, encoder: Result) -> list[Line]:
    """Rows of the table about rivals."""
    seconds, tokens = rivals["seconds"], rivals["tokens"]
    lines: list[Line] = []
    rates = {name: [tokens[name] / x for x in found] for name, found in seconds.items()}
    pipelines = [name for name in rates if "pipeline" in name]
    best = max(pipelines, key=lambda name: statistics.median(rates[name]))
    for rival, name, goal in (
        ("DSIR",) * 2 + (100.0,),
        ("fastText",) * 2 + (10.0,),
        ("bert-base pipeline", best, 5000.0),
    ):
        for ours, least in (("tokens", goal), ("documents", None), ("texts", None)):
            found = ratios(rates[f"n-gram model, {ours}"], rates[name]) if name in rates else []
            lines.append(("rivals", f"n-gram model, {ours} / {rival}", found, "x", least))
    lines += [
        ("rivals", f"{name}: thousand tokens/s", [x / 1e3 for x in found], "", None) for name, found in rates.items()
    ]
    found = encoder.get("seconds", {})
    others = [name for name in found if name.startswith("pipeline")]
    quickest = min(others, key=lambda name: statistics.median(found[name]), default="pipeline")
    for ours in [name for name in found if name not in others] or ["encoder"]:
        for name in others or [quickest]:
            gain = ratios(found[name], found[ours]) if found else []
            goal, note = (3.0, ", its quickest") if name == quickest else (None, "")
            what = ours.replace("encoder", "`EncoderInfluenceModel`")
            lines.append(("encoder", f"{what} / {name}{note}", gain, "x", goal))
    for name, values in found.items():
        lines.append(
            ("encoder", f"{name}: thousand tokens/s", [encoder["tokens"] / x / 1e3 for x in values], "", None)
        )
    return lines


def page(document: Result) -> str:
    """Medians over the turns, with the lowest and the highest."""
    raw, rows = document["raw"], []
    memory = {name: found for name, found in raw.items() if name.startswith("memory")}
    lines = [*column_lines(raw["column"]), *map_lines(raw["map"]), *memory_lines(memory)]
    for part, what, values, unit, goal in [*lines, *rate_lines(raw["rivals"], raw["encoder"])]:
        if not values:
            rows.append([part, what, "not installed", "", "", ""])
            continue
        median, goals = statistics.median(values), {}
        if goal is not None:
            goals = {"least": goal} if goal > 0 else {"most": -goal}
        spread = f"{min(values):.4g} to {max(values):.4g}" if len(values) > 1 else ""
        rows.append([part, what, f"{median:.4g} {unit}", spread, target(**goals), verdict(is_met(median, **goals))])
    head = [
        title("scoring", document["quick"]), named(document["hardware"]), f"Settings: {named(document['settings'])}"
    ]  # fmt: skip
    return "\n\n".join([*head, table(["part", "what", "median", "lowest to highest", "target", "met"], rows)])
