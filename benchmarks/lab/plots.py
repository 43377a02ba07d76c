"""The style of all pictures: one size, one colour for each method, whichever others are drawn beside it.

Trade-off: a method that is not in `COLOURS` is refused, so that no two pictures can disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Told apart by readers who see few colours (Okabe and Ito), random in grey, ours in the strongest.
COLOURS = {
    "random": "#999999",
    "ours": "#d55e00",
    "ours, frugal": "#e69f00",
    "fastText": "#0072b2",
    "fastText, tuned": "#0072b2",
    "DSIR": "#56b4e9",
    "DSIR, tuned": "#56b4e9",
    "similarity": "#009e73",
    "stratified by domain": "#000000",
    "one-step oracle, n-gram tables": "#cc79a7",
    "one-step oracle, small encoder": "#f0e442",
}
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "legend.frameon": False, "svg.hashsalt": "mates", "figure.constrained_layout.use": True,
}  # fmt: skip


@contextmanager
def panels(path: Path, num: int, width: float = 4.2, height: float = 3.6) -> Iterator[Any]:
    """A row of axes that is written to `path` at the end, the same bytes for the same drawing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, num, figsize=(width * num, height), squeeze=False)
        yield axes[0]
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def curve(axis: Any, method: str, x: Any, mean: Any, half: Any = None) -> None:
    """A line of a method, with its interval as a band."""
    colour, ours = COLOURS[method], method.startswith("ours")
    dashes = "--" if method.endswith("tuned") else "-"
    axis.plot(x, mean, dashes, color=colour, label=method, linewidth=2 if ours else 1.2, zorder=3 if ours else 2)
    if half is not None:
        axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def legend(axes: Any) -> None:
    """One legend for a row of axes, beside the last: every method that any shows, in the order of `COLOURS`."""
    shown = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [name for name in COLOURS if name in shown]
    axes[-1].legend([shown[name] for name in names], names, loc="upper left", bbox_to_anchor=(1.0, 1.0))
