"""What a run says of itself where people look: reporters, and alerts, with the real trackers, offline."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import Trainer

from mates_hf import MatesCallback, MatesConfig
from mates_hf.reporting.alerts import round_alerts, send_alert, weak_rounds_before
from mates_hf.training.run import order_config
from tests.training.kit import LENGTH, VOCAB, make_arguments, make_reference, run, small_config
from tests.training.settings import Setup

EACH = MatesConfig(alert_weak_rounds=1)
REFUSING = {
    "alert_weak_rounds": 1,
    "alert_idle_share": None,
    "on_weak_signal": "own_order",
    "min_spearman": 0.99,
    "switch_lead_steps": 3,
}


def noise(num_rows: int = 400) -> Dataset:
    """Rows that a model of this size learns nothing from: no round finds a signal."""
    rng = np.random.default_rng(0)
    rows = [[i // 32, i % 32, *rng.integers(32, VOCAB, LENGTH - 2)] for i in range(num_rows)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


@pytest.mark.parametrize(
    ("info", "title"),
    [
        ({"guard": {"decision": "own_order"}}, "MATES round 3 refused: weak signal"),
        ({"guard": {"decision": "own_order", "failed": "used_up"}}, "MATES round 3 refused: used up"),
        ({"guard": {"decision": "own_order", "failed": "loss_rose"}}, "MATES round 3 refused: reference loss rose"),
        ({"guard": {"decision": "keep_previous"}}, "MATES round 3 kept the model before"),
        ({"guard": {"decision": "select", "reversed": True}}, "MATES round 3: influence reversed"),
        ({"guard": {"decision": "select"}, "early": {"round": 2}}, "MATES round 3 early: choice used up"),
        ({"guard": {"decision": "select", "reversed": False}}, None),
        ({}, None),
    ],
)
def test_what_is_worth_an_alert(info: dict[str, Any], title: str | None) -> None:
    alerts = round_alerts({"number": 3, "step": 10, **info}, EACH)
    assert [alert.title for alert in alerts] == ([] if title is None else [title])
    for alert in alerts:
        assert len(alert.title) < 64  # what W&B takes
        assert "round 3 at step 10" in alert.text
        words = {"bought_most": [{"token_id": 7, "text": "court"}]}
        assert round_alerts({"number": 3, "step": 10, **info, **words}, EACH) == alerts  # no word of the pool is sent


GROUPS = {"law": {"candidates": 60, "chosen": 5}, "code": {"candidates": 40, "chosen": 15}}  # code: 1.875 times


@pytest.mark.parametrize(
    ("field", "info", "given", "below", "above"),
    [
        ("alert_weak_rounds", {"guard": {"decision": "keep_previous"}}, {"weak_before": 2}, 4, 3),
        ("alert_weak_rounds", {"guard": {"decision": "own_order"}}, {}, 2, 1),
        ("alert_idle_share", {}, {"idle_share": 0.2}, 0.2, 0.19),
        ("alert_idle_share", {}, {"idle_share": 0.2}, None, 0.01),
        ("alert_reference_overlap", {"reference_overlap": {"share": 0.1}}, {}, 0.1, 0.09),
        ("alert_reference_overlap", {"reference_overlap": {"share": 0.1}}, {}, None, 1e-9),
        ("alert_group_boost", {"groups": GROUPS}, {}, 1.875, 1.87),
        ("alert_group_boost", {"groups": GROUPS}, {}, None, 1.0),
    ],
)
def test_a_threshold_decides_what_is_worth_an_alert(
    field: str, info: dict[str, Any], given: dict[str, Any], below: Any, above: Any
) -> None:
    """`below`: a threshold that is not passed, `above`: one that is."""
    counts = [len(round_alerts({"number": 3, **info}, MatesConfig(**{field: x}), **given)) for x in (below, above)]
    assert counts == [0, 1]


def test_what_the_guard_saw_is_said_at_once_and_next_to_other_alerts() -> None:
    for guard in ({"decision": "own_order", "failed": "loss_rose"}, {"decision": "keep_previous", "reversed": True}):
        assert len(round_alerts({"number": 3, "guard": guard}, MatesConfig(alert_weak_rounds=9))) == 1
    info = {"number": 3, "guard": {"decision": "own_order"}, "reference_overlap": {"share": 1.0}, "groups": GROUPS}
    config = MatesConfig(alert_weak_rounds=1, alert_group_boost=1.5)
    titles = [alert.title for alert in round_alerts(info, config, idle_share=1.0)]
    assert len(set(titles)) == 4
    assert max(map(len, titles)) < 64


def test_weak_rounds_in_a_row_are_counted_on_disk(tmp_path: Path) -> None:
    for number, decision in enumerate(["own_order", "select", "keep_previous", "own_order"], start=1):
        (tmp_path / f"round-{number:04d}").mkdir()
        text = json.dumps({"number": number, "guard": {"decision": decision}})
        (tmp_path / f"round-{number:04d}" / "round.json").write_text(text)
    assert [weak_rounds_before(tmp_path, number) for number in range(1, 7)] == [0, 1, 0, 1, 2, 0]
    (tmp_path / "round-0003" / "round.json").write_text("{")
    assert weak_rounds_before(tmp_path, 5) == 1  # what cannot be read ends the count, and no run


@pytest.mark.parametrize("attach", [False, True])
def test_the_trainers_own_log_stays_as_it_is(tmp_path: Path, attach: bool) -> None:
    """A round reports where the Trainer is about to log: that step keeps its loss, and what was summed up."""
    setup = Setup(trainer_class=Summing, attach=attach)
    plain = Setup(trainer_class=Summing).run(tmp_path / "plain", [])
    ours = setup.run(tmp_path / "ours", [MatesCallback(make_reference(), small_config(random_rounds=99))])
    rounds = setup.run(tmp_path / "rounds", [MatesCallback(make_reference(), small_config(update_steps=4))])

    def logged(result: Any) -> list[Any]:
        history = result.trainer.state.log_history
        return [(entry["step"], entry["num_summed"]) for entry in history if "loss" in entry]

    assert logged(plain) == logged(ours) == logged(rounds) == [(step, 1) for step in range(1, len(logged(plain)) + 1)]
    assert [entry for entry in rounds.trainer.state.log_history if "mates/round" in entry]


class Summing(Trainer):
    """Logs what it summed up since it logged last, as TRL's trainers do."""

    summed = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.summed += 1
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "num_summed": self.summed}, *args, **kwargs)
        self.summed = 0


class Tracker(types.ModuleType):
    """Stands for a tracker's module; `fails` is what its alerts raise."""

    def __init__(self, name: str, fails: Exception | None = None, running: bool = True) -> None:
        super().__init__(name)
        self.sent: list[dict[str, Any]] = []
        self.fails = fails
        self.run = self if running else None
        self.AlertLevel = types.SimpleNamespace(WARN="warn")
        self.context_vars = types.SimpleNamespace(current_run=types.SimpleNamespace(get=lambda: self.run))

    def alert(self, **given: Any) -> None:
        if self.fails is not None:
            raise self.fails
        self.sent.append(given)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("state", ["running", "not begun", "failing", "not imported", "a version without alerts"])
def test_an_alert_reaches_the_tracker_and_harms_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, state: str
) -> None:
    for other in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    tracker = Tracker(name, OSError("no network") if state == "failing" else None, running=state != "not begun")
    if state == "a version without alerts":
        tracker.alert = None  # type: ignore[assignment,method-assign]
    if state != "not imported":
        monkeypatch.setitem(sys.modules, name, tracker)
    (alert,) = round_alerts({"number": 0, "guard": {"decision": "own_order"}}, EACH)
    send_alert(alert)
    assert [sent["title"] for sent in tracker.sent] == [alert.title] * (state == "running")
    assert ("took no alert" in caplog.text) is (state in ("failing", "a version without alerts"))


def test_a_refused_round_alerts_once_and_a_good_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    run(make_arguments(tmp_path / "noise"), [MatesCallback(make_reference(), small_config(**REFUSING))], noise())
    titles = [sent["title"] for sent in tracker.sent]
    assert titles
    assert titles == [f"MATES round {i} refused: weak signal" for i in range(1, len(titles) + 1)]
    quiet = {"alert_idle_share": None, "alert_reference_overlap": None}
    good = small_config(switch_lead_steps=3, **quiet)
    run(make_arguments(tmp_path / "good"), [MatesCallback(make_reference(), good)])
    assert len(tracker.sent) == len(titles)
    idle = small_config(switch_lead_steps=3, alert_idle_share=1e-12, alert_reference_overlap=None)
    run(make_arguments(tmp_path / "idle"), [MatesCallback(make_reference(), idle)])
    assert {sent["title"].partition(": ")[2] for sent in tracker.sent[len(titles) :]} == {"devices idle"}


SCRIPT = """
import sys
from pathlib import Path
from mates_hf import MatesCallback
from tests.training.kit import make_arguments, make_reference, run, small_config
from tests.training.test_trackers import REFUSING, noise

folder, name = Path(sys.argv[1]), sys.argv[2]
settings = {"report_to": [name], "run_name": "tried", "logging_strategy": "no"}
run(make_arguments(folder, **settings), [MatesCallback(make_reference(), small_config(**REFUSING))], noise())
"""


def tracked(folder: Path, name: str, **variables: str) -> None:
    """A run with one reporter in a process of its own, which trackers end with."""
    import os

    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(folder), name]
    done = subprocess.run(
        command, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variables", "files", "words"),
    [
        ("tensorboard", {"TENSORBOARD_LOGGING_DIR": "events"}, "events.out.tfevents*", ["train/mates/selected"]),
        ("wandb", {"WANDB_MODE": "offline", "WANDB_DIR": ".", "WANDB_SILENT": "true"}, "*.wandb",
         ["MATES round 1 refused: weak signal"]),
    ],
)  # fmt: skip
def test_a_tracker_of_files_has_the_metrics_and_the_alert(
    tmp_path: Path, name: str, variables: dict[str, str], files: str, words: list[str]
) -> None:
    pytest.importorskip(name)
    folders = {key: str(tmp_path / value) if key.endswith("DIR") else value for key, value in variables.items()}
    tracked(tmp_path / "run", name, **folders)
    found = b"".join(file.read_bytes() for file in tmp_path.rglob(files))
    for word in ("train/mates/spearman", *words):
        assert word.encode() in found


@pytest.mark.slow
def test_trackio_has_the_metrics_and_the_alert(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    tracked(tmp_path / "run", "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    tables: dict[str, str] = {}
    for file in tmp_path.rglob("*.db"):
        with sqlite3.connect(file) as database:
            for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
                rows = database.execute(f"select * from {table}").fetchall()
                tables[table] = tables.get(table, "") + json.dumps([[str(cell) for cell in row] for row in rows])
    everything = " ".join(tables.values())
    assert "mates/spearman" in everything
    assert "MATES round 1 refused: weak signal" in everything


def test_thresholds_of_alerts_choose_no_data() -> None:
    """A resumed run may have others: what it must agree in with its checkpoint does not hold them."""
    other = MatesConfig(alert_weak_rounds=7, alert_idle_share=None, alert_reference_overlap=0.5, alert_group_boost=3.0)
    assert order_config(other) == order_config(MatesConfig())
    assert order_config(MatesConfig(num_probes=77)) != order_config(MatesConfig())
