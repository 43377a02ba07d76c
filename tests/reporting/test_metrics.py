"""The names of metrics: what is logged is in the table, what is in the table is logged, and the docs have it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mates_hf.reporting.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]


def logged_names(source: str) -> set[str]:
    """Names of metrics that a module writes out, and those of the stages that it times."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"mates/\w+", node.value):
            found.add(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "timed":
            found |= {f"mates/{arg.value}_seconds" for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def test_every_metric_is_in_the_table_and_the_table_has_no_other() -> None:
    found: set[str] = set()
    for path in (ROOT / "mates_hf").rglob("*.py"):
        if "fit" in (path.parent.name, path.stem.removeprefix("selector_")):  # times stages, and has no metrics
            continue
        source = path.read_text(encoding="utf-8")
        if path.name == "metrics.py":  # its table is no use of a name
            source = re.sub(r"^METRICS = \{.*?^\}", "", source, flags=re.DOTALL | re.MULTILINE)
        found |= logged_names(source)
    assert found == METRICS.keys()


def test_a_new_name_is_seen() -> None:
    source = 'metrics["mates/new"] = 1\nwith stages.timed("brew"):\n    log("mates/ and more", f"mates/{name}")\n'
    assert logged_names(source) == {"mates/new", "mates/brew_seconds"}


def test_the_page_has_the_table() -> None:
    section = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8").partition("\n## Metrics\n")[2]
    rows = re.findall(r"^\| `(mates/\w+)` \| (.*) \|$", section.partition("\n## ")[0], re.MULTILINE)
    assert rows == list(METRICS.items())


def test_the_page_says_what_to_do_about_metrics_that_there_are() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(mates/\w+)`", text))
    assert named <= METRICS.keys()
