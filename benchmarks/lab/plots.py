"""The style of all pictures: one size, one colour for each method, whichever others are drawn beside it.

Trade-off: a method that is not in `COLOURS` is refused, so that no two pictures can disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = {  # each can be read on white and on black
    "random": "#7d8590",
    "ours": "#2f81f7",
    "ours, frugal": "#17998a",
    "one round's influence": "#6f7df2",
    "ours and fastText": "#5a9e1e",
    "ours, frugal, and fastText": "#2da44e",
    "ours, random mixed in": "#2f81f7",
    "ours, labels of the one-step oracle": "#3a94b8",
    "labels of one step, rounds of 40 steps": "#3a94b8",
    "fastText": "#e0700b",
    "fastText, tuned": "#e0700b",
    "DSIR": "#a9713b",
    "DSIR, tuned": "#a9713b",
    "similarity": "#d6409f",
    "similarity, tuned": "#d6409f",
    "log-odds": "#9b7bd8",
    "low loss": "#a58a10",
    "domain means": "#7d8590",
    "stratified by domain": "#8c8377",
    "random, passages mixed in": "#8c8377",
    "top-k of labels, every step": "#c46fd6",
    "one-step oracle, n-gram tables": "#e5534b",
    "one-step oracle, small encoder": "#e5534b",
    "cheap labels, n-gram tables": "#b3636b",
}
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "legend.frameon": False, "svg.hashsalt": "mates", "figure.constrained_layout.use": True,
}  # fmt: skip


@contextmanager
def panels(path: Path, num: int) -> Iterator[Any]:
    """A row of axes that is written to `path` at the end, the same bytes for the same drawing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, num, figsize=(4.2 * num, 3.6), squeeze=False)
        yield axes[0]
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def curve(axis: Any, method: str, x: Any, mean: Any, half: Any) -> None:
    """A line of a method, with its interval as a band."""
    colour, ours = COLOURS[method], method.startswith("ours")
    dashes = "--" if method.endswith("tuned") else "-"
    axis.plot(x, mean, dashes, color=colour, label=method, linewidth=2 if ours else 1.2, zorder=3 if ours else 2)
    axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def legend(axes: Any) -> None:
    """One legend for a row of axes, beside the last: every method that any shows, in the order of `COLOURS`."""
    shown = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [name for name in COLOURS if name in shown]
    axes[-1].legend([shown[name] for name in names], names, loc="upper left", bbox_to_anchor=(1.0, 1.0))
