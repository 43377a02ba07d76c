"""The panels have metrics that there are, and the trackers' own packages read them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mates_hf.reporting.metrics import METRICS
from mates_hf.reporting.panels import PANELS, PREFIX, trackio_plot_order, wandb_workspace, write_tensorboard_layout

SHOWN = {name for panel in PANELS for name in panel.metrics}
# Counts and names that are read in the table of rounds, and parts of a sum that are never large.
NOT_SHOWN = {
    "mates/round", "mates/num_candidates", "mates/num_probed", "mates/num_rows", "mates/repeated_share", "mates/early",
    "mates/previous_spearman", "mates/drift_spearman", "mates/seconds", "mates/digest_seconds", "mates/guard_seconds",
    "mates/sentinel_seconds",
}  # fmt: skip


def test_a_metric_is_in_a_panel_or_left_out_on_purpose() -> None:
    assert SHOWN | NOT_SHOWN == METRICS.keys()
    assert not SHOWN & NOT_SHOWN
    assert all(len(panel.metrics) == 3 for panel in PANELS if panel.is_band)


def test_tensorboard_reads_the_layout(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    write_tensorboard_layout(tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (found,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(found.tensor_proto.string_val[0])
    assert [section.title for section in layout.category] == list(dict.fromkeys(panel.section for panel in PANELS))
    charts = {chart.title: chart for section in layout.category for chart in section.chart}
    for panel in PANELS:
        chart = charts[panel.title]
        if panel.is_band:
            (series,) = chart.margin.series
            assert (series.value, series.lower, series.upper) == tuple(PREFIX + name for name in panel.metrics)
        else:
            assert list(chart.multiline.tag) == [PREFIX + name for name in panel.metrics]


def test_wandb_takes_the_workspace() -> None:
    pytest.importorskip("wandb_workspaces")
    spec = wandb_workspace("me", "mine")._to_model().model_dump(by_alias=True)["spec"]  # what `save` sends
    sections = spec["section"]["panelBankConfig"]["sections"]
    plots = [plot["config"] for section in sections for plot in section["panels"]]
    assert [(plot["chartTitle"], plot["metrics"]) for plot in plots] == [
        (panel.title, [PREFIX + name for name in panel.metrics]) for panel in PANELS
    ]


def test_trackio_orders_its_plots_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("trackio.utils")
    monkeypatch.setenv("TRACKIO_PLOT_ORDER", trackio_plot_order())
    names = sorted(PREFIX + name for name in METRICS)
    _, groups = utils.order_metrics_by_plot_preference(names)
    shown = groups["train"]["subgroups"]["mates"]
    assert shown[: len(SHOWN)] == trackio_plot_order().split(",")
    assert sorted(shown) == names


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("tensorboard", lambda folder: write_tensorboard_layout(folder)),
        ("wandb_workspaces", lambda folder: wandb_workspace("me", "mine")),
    ],
)
def test_without_the_package_the_error_says_what_to_install(
    package: str, call: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=f"pip install {package.replace('_', '-')}"):
        call(tmp_path)  # type: ignore[operator]
