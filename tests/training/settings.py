"""The settings matrix: what a row is, how its run is checked, and the table in the docs made from the tests' results.

    python -m tests.training.settings docs/settings.md

runs the tests of all rows, the slow ones too, and writes the table if each row's tests passed; a row whose tests fail
or are skipped has no place in it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.metadata
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer, TrainerCallback, default_data_collator

from mates_hf import MatesCallback, load_round
from mates_hf.errors import UnsupportedSettingError
from tests.training.kit import (
    DIGITS,
    Result,
    Watch,
    assert_same,
    leave_modules_to_themselves,
    make_arguments,
    make_model,
    make_pool,
    make_reference,
    small_config,
)

Test = TypeVar("Test", bound=Callable[..., Any])

MODULES = (
    "test_settings.py",
    "test_settings_runs.py",
    "test_settings_losses.py",
    "test_readings.py",
    "test_settings_refused.py",
    "test_models.py",
    "test_modalities.py",
    "test_parallel.py",
    "test_processes.py",
    "test_whole_rows.py",
    "test_deepspeed.py",
    "test_samplers.py",
    "test_passes.py",
    "test_fitting.py",
    "test_mixed_in.py",
    "test_packing.py",
    "test_groups.py",
    "test_score_column.py",
    "test_allow.py",
    "test_stream.py",
)
LAUNCHERS = ("test_axolotl.py", "test_launchers.py")  # of `tests/integrations`
ORDER = "order"
NO_TRACE = "order, no trace"
NO_FILE = "no step, no file"

STEPS, BATCH, FROM_STEP = 13, 4, 8  # one round, after step 5; its rows are trained on from step 8 to the end


@dataclasses.dataclass
class Row:
    """One row of the table: a setting, `supported` or `refused`, what its tests prove, and a note."""

    setting: str
    outcome: str
    proves: list[str]
    note: str


ROWS: dict[str, Row] = {}


def declare(setting: str, outcome: str, proves: str, note: str = "") -> str:
    """Enter a row, or add to what is proven of it; returns its name."""
    known = ROWS.setdefault(setting, Row(setting, outcome, [], ""))
    assert known.outcome == outcome, f"{setting} is {known.outcome} and {outcome}"
    if proves not in known.proves:
        known.proves.append(proves)
    known.note = known.note or note
    return setting


def proves(setting: str, what: str, *, outcome: str = "supported", note: str = "") -> Callable[[Test], Test]:
    """Decorate a test with the row it belongs to."""
    declare(setting, outcome, what, note)

    def mark(test: Test) -> Test:
        test.settings = (*getattr(test, "settings", ()), setting)  # type: ignore[attr-defined]
        return test

    return mark


def case(
    setting: str, *values: Any, outcome: str = "supported", what: str = NO_TRACE, note: str = "", marks: Any = ()
) -> Any:
    """A parameter set of a test whose first argument is `setting`."""
    name = re.sub(r"[^a-z0-9]+", "-", setting.lower()).strip("-")
    return pytest.param(declare(setting, outcome, what, note), *values, id=name, marks=marks)


def mates(*, probe: Any = None, **changes: Any) -> MatesCallback:
    settings = {"update_steps": 5, "switch_lead_steps": 3, **changes}
    return MatesCallback(make_reference(8), small_config(**settings), probe=probe)


class Rows(Watch):
    """Watches the random streams; the rows are seen by the Trainer (`watched`)."""


class Replaced(Trainer):
    """Samples with replacement."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return RandomSampler(self.train_dataset, replacement=True)


class Stateful(Trainer):
    """Has its dataloader as accelerate prepares it with torchdata."""

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        loader.use_stateful_dataloader = True
        return loader


class PlainLoader(Trainer):
    """Has a dataloader that accelerate has not prepared."""

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=4, shuffle=True, collate_fn=self.data_collator)


class OwnBatches(Trainer):
    """Makes batches without a sampler."""

    def get_train_dataloader(self) -> Any:
        batches = [list(range(start, start + 4)) for start in range(0, len(self.train_dataset), 4)]
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class FullyShardedDataParallel(nn.Module):
    """Has the name by which FSDP1's wrapper is known."""


@functools.cache
def watched(trainer_class: type[Trainer]) -> type[Trainer]:
    """The Trainer, noting the rows of each batch it trains on; the same under any wrapping of the model."""

    class Watched(trainer_class):  # type: ignore[misc, valid-type]
        def training_step(self, model, inputs, *args, **kwargs):
            ids = inputs["input_ids"]
            self.seen_rows = [*getattr(self, "seen_rows", ()), *(ids[:, 0] * DIGITS + ids[:, 1]).tolist()]
            return super().training_step(model, inputs, *args, **kwargs)

    return Watched


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a run is made; what is left out is the small model on the small pool."""

    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    pool: Callable[[], Any] = lambda: make_pool(200)
    model: Callable[[], Any] = make_model
    collator: Any = default_data_collator
    trainer_class: type[Trainer] = Trainer
    trainer: Callable[[], dict[str, Any]] = dict
    attach: bool = False

    def build(self, output_dir: Path, callbacks: list[TrainerCallback], **changes: Any) -> Trainer:
        leave_modules_to_themselves()
        torch.manual_seed(0)
        # Copied, because the Trainer writes into some dicts it is given.
        args = make_arguments(output_dir, **copy.deepcopy({"max_steps": STEPS, **self.args, **changes}))
        given = {"model": self.model(), "data_collator": self.collator, **self.trainer()}
        if "model_init" in given:
            del given["model"]
        trainer = watched(self.trainer_class)(args=args, train_dataset=self.pool(), callbacks=callbacks, **given)
        if self.attach:
            next(one for one in callbacks if isinstance(one, MatesCallback)).attach(trainer)
        return trainer

    def run(self, output_dir: Path, callbacks: list[TrainerCallback], *, resume: Any = None, **changes: Any) -> Result:
        watch = Rows()
        trainer = self.build(output_dir, [*callbacks, watch], **changes)
        trainer.train(resume_from_checkpoint=resume)
        watch.rows = trainer.seen_rows
        return Result(trainer, watch)


def rounds_of(output_dir: Path) -> list[Any]:
    """The records of a run's rounds, in order."""
    paths = sorted(path for path in (output_dir / "_mates").glob("round-*") if path.suffix == "")
    return [load_round(path) for path in paths]


def assert_selected(result: Result, output_dir: Path, *, skipped: int = 0) -> Any:
    """A round ran and selected; what was trained on after the switch is its selection, in order; labels are finite."""
    records = rounds_of(output_dir)
    assert records
    for record in records:
        labels, begin = record.labels, record.info["from_position"] - skipped
        assert record.selection is not None
        trained = result.rows[begin : begin + len(record.selection)]
        assert trained == np.asarray(record.selection).tolist()
        for values in (labels.influence, labels.influence_per_token, labels.loss):
            assert np.isfinite(values).all()
        assert np.std(labels.influence) > 0
        assert not set(labels.candidate_id) & set(result.rows)
    return records[0]


def assert_no_trace(plain: Result, ours: Result, steps: int, rows: int) -> None:
    """Until the switch (`steps` steps, `rows` rows) the run is the one without the callback, to the bit."""
    assert len(plain.rows) > rows
    assert ours.rows[:rows] == plain.rows[:rows]
    assert ours.rows[rows:] != plain.rows[rows:]
    assert ours.losses[:steps] == plain.losses[:steps]
    assert ours.streams[:steps] == plain.streams[:steps]


def check(tmp_path: Path, setup: Setup, *, steps: int = FROM_STEP) -> tuple[Result, Any]:
    """`order` and `no trace` of a setting: the run that selects and its first round's record."""
    plain = setup.run(tmp_path / "plain", [])
    never = setup.run(tmp_path / "never", [mates(random_rounds=99)])
    ours = setup.run(tmp_path / "ours", [mates()])
    assert_same(plain, never)
    assert never.rows == plain.rows
    assert not (tmp_path / "never" / "_mates").exists()
    record = assert_selected(ours, tmp_path / "ours")
    assert_no_trace(plain, ours, steps, record.info["from_position"])
    return ours, record


class Steps(TrainerCallback):
    """Counts optimizer steps begun."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1


def assert_refused(
    tmp_path: Path,
    setup: Setup,
    match: str,
    *,
    error: type[Exception] = UnsupportedSettingError,
    callbacks: Callable[[], list[TrainerCallback]] = lambda: [mates()],
) -> None:
    """The run is refused by name before a step is taken or a file is written."""
    steps = Steps()
    trainer = setup.build(tmp_path / "run", [*callbacks(), steps])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(error, match=match):
        trainer.train()
    assert steps.count == 0
    # What shows only when the first batch is drawn is refused with the lock taken, which goes with the process.
    assert {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()} <= {"lock.json"}
    assert (tmp_path / "run" / "_mates" / "lock.json").exists() or not (tmp_path / "run" / "_mates").exists()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def ragged_pool(num_rows: int = 200, *, with_lengths: bool = False) -> Dataset:
    """Rows of 8 to 12 tokens, so that they can be grouped by length."""
    pool = make_pool(num_rows)
    rows = [row[: 8 + i % 5] for i, row in enumerate(pool["input_ids"])]
    columns = {"input_ids": rows, "labels": rows}
    return Dataset.from_dict({**columns, "length": [len(row) for row in rows]} if with_lengths else columns)


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of a ragged pool as one batch, masked."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([list(row[key]) + [value] * (longest - len(row[key])) for row in rows])

    labels = filled("labels", -100)
    return {"input_ids": filled("input_ids", 0), "labels": labels, "attention_mask": (labels != -100).long()}


def read_table(path: Path) -> list[str]:
    """The lines of a written table, whose rows' tests passed when it was written."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


NO_PARAMETERS = types.SimpleNamespace(params={})


class Outcomes:
    """A pytest plugin: which rows' tests passed."""

    def __init__(self) -> None:
        self.results: dict[str, set[str]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = (yield).get_result()
        if report.when != "call" and report.outcome == "passed":
            return
        settings = set(getattr(item.function, "settings", ()))
        parameters = getattr(item, "callspec", NO_PARAMETERS).params
        settings |= {value for name, value in parameters.items() if name == "setting"}
        for setting in settings:
            self.results.setdefault(setting, set()).add(report.outcome)


HEAD = """# Settings: supported or refused

Every setting below is one of two: **supported**, with a test that a run with it selects; or **refused** by name in
`on_train_begin`, with a test that no step was taken and no file written. This table is written from those tests' own
results by `python -m tests.training.settings docs/settings.md`, on a CPU; one process where a row names no others.

What the tests prove:

- **order**: a round ran and selected; the rows trained on after the switch are exactly those of `selection.npy`, in
  that order; all labels are finite, and no probed row was trained on.
- **no trace**: up to the switch, losses, rows and random streams are those of the same run without the callback, to
  the bit, probing included; a run that never selects is that run to its end, weights and optimizer state too.
- **no step, no file**: the error names the setting and the way out; the model, and the folder, are as they were.

"""


def table_lines() -> list[str]:
    """The table as it is written: supported rows first, then by name."""
    lines = ["| setting | outcome | what the test proves | note |", "| --- | --- | --- | --- |"]
    for row in sorted(ROWS.values(), key=lambda row: (row.outcome == "refused", row.setting.lower())):
        lines.append(f"| {row.setting} | {row.outcome} | {'; '.join(row.proves)} | {row.note} |")
    return lines


def write_table(path: Path, results: dict[str, set[str]]) -> None:
    """Write the table; refuses where a row has no passed test, or one that did not pass."""
    wrong = {name: sorted(results.get(name, {"not run"})) for name in ROWS if results.get(name) != {"passed"}}
    if wrong:
        raise SystemExit(f"not written, these rows did not pass: {wrong}")
    names = ("torch", "transformers", "accelerate", "peft", "trl")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEAD + "\n".join(table_lines()) + f"\n\nTested with {versions}.\n", encoding="utf-8")


def main(path: str) -> None:
    outcomes = Outcomes()
    here = Path(__file__).parent
    files = [*(here / name for name in MODULES), *(here.parent / "integrations" / name for name in LAUNCHERS)]
    pytest.main(["-q", *map(str, files)], plugins=[outcomes])
    # The tests registered their rows in the module of this name, not in `__main__`.
    from tests.training import settings

    settings.write_table(Path(path), outcomes.results)


if __name__ == "__main__":
    main(*sys.argv[1:])
