"""Panels of a run's metrics, ready for TensorBoard, W&B and trackio: which belong together, and in which order.

Where it is used: by a person, once for a project; training does not need it. `PANELS` is the one list, and each
function puts it into the form that a tracker reads. Trade-off: the trackers' own packages build the layouts, so that
each is what the installed version takes; without the package the function says which one to install.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

PREFIX = "train/"  # what the Trainer puts before a metric's name


class Panel(NamedTuple):
    """One plot.

    Attributes:
        section: The heading that it stands under.
        title: What it shows, and what is healthy.
        metrics: Names of the metrics, of `mates_hf.reporting.metrics.METRICS`.
        is_band: Whether they are a value and the lower and upper end of its interval.
    """

    section: str
    title: str
    metrics: tuple[str, ...]
    is_band: bool = False


_BAND = ("mates/spearman", "mates/spearman_low", "mates/spearman_high")
_STAGES = ("probe", "audit", "fit", "score", "select", "waited")
PANELS = (
    Panel("Is it selecting?", "selected: 1 where the round selected", ("mates/selected", "mates/reversed")),
    Panel("Is it selecting?", "signal: healthy where the band is above 0", _BAND, is_band=True),
    Panel("Does it hold?", "gap: healthy above 0", ("mates/gap", "mates/check_gap")),
    Panel("Does it hold?", "length of rounds in steps", ("mates/round_steps",)),
    Panel("Does it help?", "reference loss, nats/token: falls", ("mates/reference_loss",)),
    Panel("Does it help?", "rise of the reference loss: healthy below 0", ("mates/reference_rise",)),
    Panel("Can it be trusted?", "labels against real steps: healthy above 0.8", ("mates/fidelity",)),
    Panel("Can it be trusted?", "reference in what was chosen: near 0", ("mates/reference_overlap",)),
    Panel("What does it cost?", "seconds of each stage", tuple(f"mates/{name}_seconds" for name in _STAGES)),
)


def write_tensorboard_layout(logging_dir: str | os.PathLike[str]) -> None:
    """Write the panels as a layout of TensorBoard's tab "Custom scalars".

    Args:
        logging_dir: The folder that TensorBoard is started on, or one in it. The layout is a small file of its own.

    Raises:
        ImportError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("A layout for TensorBoard needs `tensorboard`: `pip install tensorboard`.") from error
    layout: dict[str, dict[str, list[Any]]] = {}
    for panel in PANELS:
        kind = "Margin" if panel.is_band else "Multiline"
        tags = [f"{PREFIX}{name}" for name in panel.metrics]
        layout.setdefault(panel.section, {})[panel.title] = [kind, tags]
    with SummaryWriter(os.fspath(logging_dir), filename_suffix=".mates-layout") as writer:
        writer.add_custom_scalars(layout)


def wandb_workspace(entity: str, project: str) -> Any:
    """Make a workspace of W&B with the panels; nothing is sent before its `save()` is called.

    Args:
        entity: The user or team that the project belongs to.
        project: The project that runs report to.

    Returns:
        A `wandb_workspaces.workspaces.Workspace`.

    Raises:
        ImportError: wandb-workspaces is not installed.
    """
    try:
        from wandb_workspaces.reports.v2 import LinePlot
        from wandb_workspaces.workspaces import Section, Workspace
    except ImportError as error:
        raise ImportError("A workspace of W&B needs `wandb-workspaces`: `pip install wandb-workspaces`.") from error
    sections = []
    for name in dict.fromkeys(panel.section for panel in PANELS):
        mine = [panel for panel in PANELS if panel.section == name]
        plots = [
            LinePlot(title=each.title, x="Step", y=[f"{PREFIX}{metric}" for metric in each.metrics]) for each in mine
        ]
        sections.append(Section(name=name, panels=plots, is_open=True))
    return Workspace(name="MATES", entity=entity, project=project, sections=sections)


def trackio_plot_order() -> str:
    """The panels as the value of trackio's variable `TRACKIO_PLOT_ORDER`: its dashboard has a plot for each metric.

    Returns:
        Names of metrics with commas between them, the most important first.
    """
    return ",".join(dict.fromkeys(f"{PREFIX}{name}" for panel in PANELS for name in panel.metrics))
