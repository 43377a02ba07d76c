"""The tables of `docs/results.md` on thousands of steps, from the JSON; `--check` compares them with that page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.horizon.arms import RANDOM
from benchmarks.quality.horizon.page import ADDED, DEFAULT, PRIOR, differences_of, pairs_of, reaches, units_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "results.md"
HEADLINE = "tasks"
ARMS = {
    DEFAULT: "**ours**, the default", PRIOR: "ours, `evidence_weight=0`",
    ADDED: "ours with DSIR's scores as `score_column`", "log-odds, 30 % random": "ours without labels: log-odds alone",
    "DSIR, 30 % random": "DSIR, tuned", "fastText, 30 % random": "fastText, tuned",
}  # fmt: skip
OTHERS = {
    "broad": "eight domains at once", "continued": "continued: two known domains, two new",
    "style": "one style of text",
}  # fmt: skip


def rows(document: Mapping[str, Any], setting: str) -> list[str]:
    """The lines of a setting: arm, seeds, differences to random rows, how many times its steps those need, FLOPs."""
    units, found = units_of(document, setting), []
    for arm, name in ARMS.items():
        pairs = pairs_of(units, arm, RANDOM)
        if not pairs:
            continue
        ends = [(own["decayed"][-1], random["decayed"][-1]) for own, random in pairs]
        shares = [share for own, random in pairs if (share := reaches(own, random, setting)) is not None]
        steps = f"{1 / np.mean(shares):.1f}" if len(shares) == len(pairs) else "never"
        flops = f"{np.mean([own['flops'] / random['flops'] for own, random in ends]):.2f}"
        cells = [cell.replace("-", "−") for cell in differences_of(setting, ends)]
        label = name if setting == HEADLINE else f"{OTHERS[setting]} | {name}"
        found.append(f"| {' | '.join([label, str(len(pairs)), *cells, steps, flops])} |")
    return found


def differences(document: Mapping[str, Any]) -> Iterator[str]:
    """Whether the page has the lines of the committed JSON."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for setting in (HEADLINE, *OTHERS):
        for line in rows(document, setting):
            if line not in lines:
                yield f"docs/{PAGE.name} lacks a line on {setting}: {line}"
