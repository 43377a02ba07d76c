"""What is seen where nobody sets anything up: a line a round, a run without rounds, metrics that reach nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from mates_hf import DirectionalProbe, MatesCallback
from tests.launch import ROOT, run_script
from tests.training.kit import make_reference, small_config
from tests.training.settings import Setup

SCRIPT = """
import sys
from pathlib import Path
from mates_hf import MatesCallback, MatesConfig
from tests.training.kit import make_arguments, make_reference, run, small_config

folder, kind = Path(sys.argv[1]), sys.argv[2]
settings = {"disable_tqdm": kind == "without bars", "logging_strategy": "no"}
config = MatesConfig(num_probes=40, selection_ratio=0.5) if kind == "no round" else small_config(switch_lead_steps=3)
run(make_arguments(folder, **settings), [MatesCallback(make_reference(), config)])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["with bars", "without bars", "no round"])
def test_a_run_is_seen_without_any_set_up(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("round ")]
    rounds = len(list((tmp_path / "run" / "_mates").glob("round-*")))
    assert len(lines) == rounds
    assert rounds == (0 if kind == "no round" else 2)
    assert all(", 40 probed, held-out Spearman " in line and line.endswith(" s") for line in lines)
    assert done.stderr.count("No round takes effect") == (kind == "no round")
    if kind == "no round":
        assert "Set `update_steps=" in done.stderr


TWO = """
import sys
from pathlib import Path
from mates_hf import MatesCallback, MatesConfig
from tests.training.kit import make_arguments, make_reference, run

import logging
import torch.distributed as dist

records = []


class Kept(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())


logging.getLogger("mates_hf").addHandler(Kept())
trainer = run(make_arguments(Path(sys.argv[1])), [MatesCallback(make_reference(), MatesConfig())])
said = [message for message in records if message.startswith("No round takes effect")]
assert len(said) == (dist.get_rank() == 0), (dist.get_rank(), records)
"""


@pytest.mark.slow
def test_of_two_processes_one_warns(tmp_path: Path) -> None:
    run_script(tmp_path, TWO, str(tmp_path / "run"))


class Wrapping(TrainerCallback):
    """Calls the hooks of a callback that its Trainer does not have."""

    def __init__(self, inner: MatesCallback) -> None:
        self.inner = inner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.inner.on_train_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.inner.on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.inner.on_step_end(args, state, control, **kwargs)


def model_loss(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch).loss


@pytest.mark.parametrize(
    ("report_to", "attach", "is_warned"), [(["Mine"], False, True), (["Mine"], True, False), ([], False, False)]
)
def test_metrics_that_reach_no_reporter_are_hinted_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, report_to: list[str], attach: bool, is_warned: bool
) -> None:
    callback = MatesCallback(
        make_reference(), small_config(switch_lead_steps=3, num_probes=10), probe=DirectionalProbe(loss=model_loss)
    )
    trainer = Setup().build(tmp_path, [Wrapping(callback)])
    trainer.args.report_to = report_to
    if attach:
        callback._trainer = trainer  # what `attach` keeps, without having the Trainer call the hooks as well
    trainer.train()
    hints = [text for text in caplog.messages if "`report_to` (Mine) gets none" in text]
    assert len(hints) == is_warned
    assert all("`callback.attach(trainer)`" in hint for hint in hints)
    assert any("mates/round" in entry for entry in trainer.state.log_history)
