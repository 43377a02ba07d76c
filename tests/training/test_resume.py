"""The rules of going on: what must be the same, what may change, what is refused. Rows are compared in order.

A run with a checkpoint at each step is made once; each test goes on from one of them, in a copy that holds what was on
disk at that step and nothing later.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from mates_hf import DirectionalProbe, MatesCallback, OneStepProbe, load_round
from mates_hf.errors import MatesError
from mates_hf.influence import probe_directional as directional
from mates_hf.influence import shards as shards_module
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from tests.training.kit import OLD_TRAINER, Result, make_arguments, make_pool, make_reference, run, small_config

batch_may_change = pytest.mark.skipif(
    OLD_TRAINER, reason="transformers 4 resumes with the batch size of the checkpoint, whatever the arguments say"
)


class Killed(BaseException):
    """Stands for a kill that the test survives."""


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
# Two passes over a ragged pool (162 rows, 41 steps with a short last batch) before the first selection.
LONG = {"update_steps": 50, "num_probes": 10, "switch_lead_steps": 2}


def mates(**changes: object) -> MatesCallback:
    return MatesCallback(make_reference(), small_config(**{"switch_lead_steps": 3, **changes}))


def as_of(whole_dir: Path, to: Path, step: int) -> Path:
    """A copy of a run's folder as it was when the checkpoint at `step` was complete; returns that checkpoint."""
    for path in sorted(whole_dir.glob("checkpoint-*")):
        if int(path.name.split("-")[1]) == step:
            shutil.copytree(path, to / path.name)
    for path in sorted((whole_dir / "_mates").glob("*")) if (whole_dir / "_mates").exists() else []:
        if path.name == f"average-{step}.safetensors":
            (to / "_mates").mkdir(exist_ok=True)
            shutil.copy(path, to / "_mates" / path.name)
        elif path.name.startswith("round-") and path.suffix == "" and load_round(path).info["step"] <= step:
            shutil.copytree(path, to / "_mates" / path.name)
    return to / f"checkpoint-{step}"


def assert_goes_on(rest: Result, whole: Result, step: int, rows_per_step: int = 4) -> None:
    assert rest.rows == whole.rows[step * rows_per_step :]
    assert rest.losses == whole.losses
    assert rest.streams == whole.streams[step:]
    for name, value in whole.weights.items():
        assert torch.equal(value, rest.weights[name]), name


def decided(step: int) -> int:
    """Up to which step the rows of the short run are decided at a step."""
    return 9 if step < 6 else 15 if step < 12 else 20


def probes_written(output_dir: Path) -> dict[str, int]:
    return {
        path.name: (path / "probes.parquet").stat().st_mtime_ns for path in (output_dir / "_mates").glob("round-????")
    }


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[Path, Result]:
    """20 steps; rounds at steps 6 and 12, each in effect 3 steps later."""
    output_dir = tmp_path_factory.mktemp("short")
    return output_dir, run(make_arguments(output_dir, **EVERY_STEP), [mates()], dropout=0.1)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> tuple[Path, Result]:
    """60 steps over a ragged pool; the first round is in its second pass, at step 50, in effect at 52."""
    output_dir = tmp_path_factory.mktemp("ragged")
    args = make_arguments(output_dir, max_steps=60, **EVERY_STEP)
    return output_dir, run(args, [mates(**LONG)], make_pool(162), dropout=0.1)


# What must not matter.


@pytest.mark.quick("30", "51")
@pytest.mark.parametrize(
    "step", [30, 41, 45, 51, 55]
)  # inside a pass, at its end, in the next, in the lead, behind it
def test_a_ragged_pool_and_later_epochs(tmp_path, ragged, step):
    where, whole = ragged
    checkpoint = as_of(where, tmp_path, step)
    args = make_arguments(tmp_path, max_steps=60, **EVERY_STEP)
    rest = run(args, [mates(**LONG)], make_pool(162), dropout=0.1, resume=str(checkpoint))
    assert rest.rows == whole.rows[len(whole.rows) - len(rest.rows) :]
    assert len(rest.rows) == (60 - step) * 4 - (2 if step < 41 else 0)
    assert rest.losses == whole.losses
    assert whole.rows[162 + 11 * 4 :] == make_numbers(load_round(tmp_path / "_mates" / "round-0001").selection)


def make_numbers(rows: np.ndarray) -> list[int]:
    """`make_pool` numbers its rows in order."""
    return np.asarray(rows).tolist()


@pytest.mark.quick("25", "27")
@pytest.mark.parametrize("step", [24, 25, 26, 27, 30])
def test_an_epoch_that_ends_between_a_boundary_and_its_switch(tmp_path_factory, tmp_path, step):
    pool = make_pool(100)  # 25 steps an epoch; boundary at 24, in effect from 27
    config = {"update_steps": 24, "num_probes": 10, "switch_lead_steps": 3}
    where = tmp_path_factory.getbasetemp() / "crossing"
    args = {"max_steps": 34, **EVERY_STEP}
    if not where.exists():
        where.mkdir()
        whole = run(make_arguments(where, **args), [mates(**config)], pool)
        (where / "rows.json").write_text(json.dumps(whole.rows))
    rows = json.loads((where / "rows.json").read_text())
    assert sorted(rows[:100]) == list(range(100))
    assert len(set(rows[100:])) == 36  # what the lead took of the next pass is not selected
    rest = run(make_arguments(tmp_path, **args), [mates(**config)], pool, resume=str(as_of(where, tmp_path, step)))
    assert rest.rows == rows[step * 4 :]


@pytest.mark.quick("45")
@pytest.mark.parametrize("step", [30, 40, 45, 55])
def test_a_sampler_that_is_not_seeded_by_epoch(tmp_path_factory, tmp_path, step):
    # The Trainer alone resumes such a run with other rows once the first epoch is over.
    where, pool = tmp_path_factory.getbasetemp() / "not-seedable", make_pool(160)
    args = {"max_steps": 60, "accelerator_config": {"use_seedable_sampler": False}, **EVERY_STEP}
    if not where.exists():
        where.mkdir()
        whole = run(make_arguments(where, **args), [mates(**LONG)], pool)
        (where / "rows.json").write_text(json.dumps(whole.rows))
    rows = json.loads((where / "rows.json").read_text())
    rest = run(make_arguments(tmp_path, **args), [mates(**LONG)], pool, resume=str(as_of(where, tmp_path, step)))
    assert rest.rows == rows[step * 4 :]


@pytest.mark.quick("8")
@pytest.mark.parametrize("step", [5, 8, 14])
def test_more_workers_than_before(tmp_path, short, step):
    where, whole = short
    args = make_arguments(tmp_path, dataloader_num_workers=2, dataloader_prefetch_factor=1, **EVERY_STEP)
    rest = run(args, [mates()], dropout=0.1, resume=str(as_of(where, tmp_path, step)))
    assert_goes_on(rest, whole, step)


@pytest.mark.quick("8")
@batch_may_change
@pytest.mark.parametrize("step", [5, 8, 14])
def test_another_accumulation_at_equal_total_batch_takes_the_same_rows(tmp_path, short, step):
    where, whole = short
    args = make_arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **EVERY_STEP)
    rest = run(args, [mates()], dropout=0.1, resume=str(as_of(where, tmp_path, step)))
    until = decided(step)  # selections not yet made see sums in another order
    assert rest.rows[: (until - step) * 4] == whole.rows[step * 4 : until * 4]
    assert len(rest.rows) == (20 - step) * 4


@pytest.mark.quick("8", "14")
@pytest.mark.parametrize("step", [5, 8, 14])
def test_without_the_trainers_skip_no_row_comes_twice(tmp_path, short, step):
    where, whole = short
    args = make_arguments(tmp_path, ignore_data_skip=True, **EVERY_STEP)
    rest = run(args, [mates()], dropout=0.1, resume=str(as_of(where, tmp_path, step)))
    until = decided(step)  # dropout draws other numbers: the Trainer restores its streams at another moment then
    assert rest.rows[: (until - step) * 4] == whole.rows[step * 4 : until * 4]
    together = whole.rows[: step * 4] + rest.rows
    assert len(set(together)) == len(together) == 80


def test_without_the_trainers_skip_a_pass_goes_on_past_its_end(tmp_path, ragged):
    where, whole = ragged
    args = make_arguments(tmp_path, max_steps=60, ignore_data_skip=True, **EVERY_STEP)
    rest = run(args, [mates(**LONG)], make_pool(162), resume=str(as_of(where, tmp_path, 30)))
    assert rest.trainer.state.global_step == 60
    assert rest.rows[: 162 - 120] == whole.rows[120:162]  # the rest of the pass, then a fresh one, no row of it twice
    assert len(set(rest.rows[44:])) == len(rest.rows[44:]) == 19 * 4


# What may change, and what it does.


@pytest.mark.quick("10")
@batch_may_change
@pytest.mark.parametrize("step", [8, 10, 14])  # in the lead, in the first selection, just before the second
def test_a_smaller_batch_goes_on_where_the_rows_stopped(tmp_path, short, step):
    where, whole = short
    args = make_arguments(tmp_path, per_device_train_batch_size=2, **EVERY_STEP)
    rest = run(args, [mates()], dropout=0.1, resume=str(as_of(where, tmp_path, step)))
    # The second selection takes effect at its planned step, or, where it was already decided, at its position.
    before = (15 - step) * 2 if step < 12 else 60 - step * 4
    assert rest.rows[:before] == whole.rows[step * 4 : step * 4 + before]
    assert rest.trainer.state.global_step == 20
    record = load_round(tmp_path / "_mates" / "round-0002")
    assert (record.info["step"], record.info["from_step"]) == (12, 15)
    selection = make_numbers(record.selection)
    assert rest.rows[before:] == selection[: len(rest.rows) - before]
    together = whole.rows[: step * 4] + rest.rows
    assert len(set(together)) == len(together)


@pytest.mark.quick("8", "14")
@batch_may_change
@pytest.mark.parametrize("step", [5, 8, 10, 14])
def test_a_larger_batch_goes_on_where_the_rows_stopped_and_does_not_run_out(tmp_path, short, step, caplog):
    where, whole = short
    args = make_arguments(tmp_path, per_device_train_batch_size=8, **EVERY_STEP)
    rest = run(args, [mates()], dropout=0.1, resume=str(as_of(where, tmp_path, step)))
    assert rest.trainer.state.global_step == 20
    assert len(rest.rows) == (20 - step) * 8
    same = (decided(step) - step) * 4
    assert rest.rows[:same] == whole.rows[step * 4 : step * 4 + same]
    together = whole.rows[: step * 4] + rest.rows
    assert len(set(together)) == len(together)
    assert ("unused rows of the pool follow" in caplog.text) is (step != 5)
    assert load_round(tmp_path / "_mates" / "round-0002").info["step"] == 12
    # Again, from a checkpoint among the rows that were added: they are the same ones.
    again = run(args, [mates()], dropout=0.1, resume=str(tmp_path / f"checkpoint-{max(step + 1, 13)}"))
    assert again.rows == rest.rows[(max(step + 1, 13) - step) * 8 :]


@pytest.mark.slow
def test_more_steps_than_planned_go_on_without_a_gap(tmp_path, short):
    where, whole = short
    checkpoint = as_of(where, tmp_path, 20)  # the second selection was cut to 20 steps; a third was not planned
    args = make_arguments(tmp_path, max_steps=36, **EVERY_STEP)
    rest = run(args, [mates()], dropout=0.1, resume=str(checkpoint))
    assert rest.trainer.state.global_step == 36
    together = whole.rows + rest.rows
    assert len(set(together)) == len(together) == 36 * 4
    assert [path.name for path in sorted((tmp_path / "_mates").glob("round-????"))] == [
        "round-0001",
        "round-0002",
        "round-0003",  # a boundary that the shorter run passed over takes no number
        "round-0004",
    ]
    for step in (22, 25, 29):  # in the gap, in the lead behind it, in the next selection
        again = run(args, [mates()], dropout=0.1, resume=str(tmp_path / f"checkpoint-{step}"))
        assert again.rows == rest.rows[(step - 20) * 4 :]


@pytest.mark.quick("18*", "22*")
@pytest.mark.parametrize(("max_steps", "rounds"), [(18, 2), (21, 2), (22, 3)])
def test_no_round_whose_selection_could_not_be_trained_on(tmp_path, max_steps, rounds):
    result = run(make_arguments(tmp_path, max_steps=max_steps), [mates()])
    assert len(list((tmp_path / "_mates").glob("round-????"))) == rounds
    assert len(set(result.rows)) == max_steps * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_finished_run_starts_no_round_and_takes_no_step(tmp_path, short, workers):
    where, whole = short
    checkpoint = as_of(where, tmp_path, 20)
    before = probes_written(tmp_path)
    loader = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1} if workers else {}
    again = run(make_arguments(tmp_path, **loader), [mates()], dropout=0.1, resume=str(checkpoint))
    assert again.trainer.state.global_step == 20  # the Trainer alone takes one more
    assert_goes_on(again, whole, 20)
    assert probes_written(tmp_path) == before
    assert {path.name for path in (tmp_path / "_mates").glob("round-*")} == {"round-0001", "round-0002"}


def test_a_run_that_finished_in_a_later_epoch_takes_no_step(tmp_path, ragged):
    where, whole = ragged
    checkpoint = as_of(where, tmp_path, 60)
    args = make_arguments(tmp_path, max_steps=60)
    again = run(args, [mates(**LONG)], make_pool(162), dropout=0.1, resume=str(checkpoint))
    assert again.trainer.state.global_step == 60
    assert not again.rows
    assert again.losses == whole.losses


def test_a_checkpoint_without_optimizer_state_goes_on_with_a_warning(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 10, "save_only_model": True}
    whole = run(make_arguments(tmp_path, **settings), [mates()], dropout=0.1)
    before = probes_written(tmp_path)
    rest = run(make_arguments(tmp_path, **settings), [mates()], dropout=0.1, resume=str(tmp_path / "checkpoint-10"))
    assert "no optimizer state" in caplog.text
    assert rest.trainer.state.global_step == 20
    assert rest.rows[:20] == whole.rows[40:60]  # the selection in effect; the next one sees other weights
    after = probes_written(tmp_path)
    assert after["round-0001"] == before["round-0001"]
    assert after["round-0002"] != before["round-0002"]
    assert (tmp_path / "_mates" / "round-0002.stale").exists()


# Earlier checkpoints and rounds of other attempts.


@pytest.mark.parametrize("step", [4, 8])
def test_an_earlier_checkpoint_loads_the_rounds_that_are_there(tmp_path, short, step):
    where, whole = short
    shutil.copytree(where, tmp_path / "run")
    before = probes_written(tmp_path / "run")
    args = make_arguments(tmp_path / "run", **EVERY_STEP)
    rest = run(args, [mates()], dropout=0.1, resume=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert_goes_on(rest, whole, step)
    assert probes_written(tmp_path / "run") == before
    assert not list((tmp_path / "run" / "_mates").glob("*.stale"))


def test_rounds_of_other_weights_are_set_aside_and_run_again(tmp_path, short):
    where, _ = short
    shutil.copytree(where, tmp_path / "run")
    rounds_dir = tmp_path / "run" / "_mates"
    before = load_round(rounds_dir / "round-0001").info["weights"]
    args = make_arguments(tmp_path / "run", **EVERY_STEP)
    # Without dropout the steps from here on give other weights.
    run(args, [mates()], dropout=0.0, resume=str(tmp_path / "run" / "checkpoint-4"))
    for number in (1, 2):
        record = load_round(rounds_dir / f"round-{number:04d}")
        stale = load_round(rounds_dir / f"round-{number:04d}.stale")
        assert record.info["weights"] != stale.info["weights"]
        assert not np.array_equal(record.labels.influence, stale.labels.influence)
    assert load_round(rounds_dir / "round-0001.stale").info["weights"] == before


def test_a_callback_that_was_dropped_for_a_while_counts_anew(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 20}
    run(make_arguments(tmp_path, **settings), [mates(), Until(10)])
    run(make_arguments(tmp_path, **settings), [Until(15)], resume=str(tmp_path / "checkpoint-10"))
    caplog.clear()
    settings["max_steps"] = 30
    rest = run(make_arguments(tmp_path, **settings), [mates()], resume=str(tmp_path / "checkpoint-15"))
    assert "no state of MatesCallback" in caplog.text
    assert rest.trainer.state.global_step == 30
    assert load_round(tmp_path / "_mates" / "round-0001").info["step"] == 15 + 6
    assert (tmp_path / "_mates" / "round-0001.stale").exists()


class Until(TrainerCallback):
    """Stops the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class Crash(TrainerCallback):
    """Ends the run with an error after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.slow
@pytest.mark.parametrize("weak", [False, True], ids=["selects", "guard-refuses-later"])
def test_keep_rounds_spares_what_the_last_checkpoint_needs(tmp_path, weak):
    # The checkpoint at 13 needs round 2, and the last round that passed the guard; by step 31 five rounds are done.
    settings = {"save_strategy": "steps", "save_steps": 13, "max_steps": 36}
    config = {"keep_rounds": 2}

    def callback() -> MatesCallback:
        if not weak:
            return mates(**config)
        model = FirstPasses()
        return MatesCallback(
            make_reference(),
            small_config(switch_lead_steps=3, on_weak_signal="own_order", **config),
            influence_model=model,
        )

    whole = run(make_arguments(tmp_path / "whole", **settings), [callback()], dropout=0.1)
    with pytest.raises(Killed):
        run(make_arguments(tmp_path / "part", **settings), [callback(), Crash(25)], dropout=0.1)
    rest = run(
        make_arguments(tmp_path / "part", **settings),
        [callback()],
        dropout=0.1,
        resume=str(tmp_path / "part" / "checkpoint-13"),
    )
    assert_goes_on(rest, whole, 13)
    last = load_round(tmp_path / "whole" / "_mates" / "round-0005")
    assert last.info["guard"]["decision"] == ("keep_previous" if weak else "select")
    kept = sorted(int(path.name[-4:]) for path in (tmp_path / "whole" / "_mates").glob("round-????"))
    assert kept == ([1, 3, 4, 5] if weak else [3, 4, 5])
    shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "_mates" / "round-0005")
    args = make_arguments(tmp_path / "copy", **settings)
    rest = run(args, [callback()], dropout=0.1, resume=str(tmp_path / "copy" / "checkpoint-26"))
    assert_goes_on(rest, whole, 26)


@pytest.mark.slow
def test_a_round_that_was_deleted_in_part_is_run_again_where_it_is_needed(tmp_path, monkeypatch):
    delete = shutil.rmtree

    def dies(path, *args, **kwargs):
        if not (Path(path) / "round.json").exists():
            return delete(path, *args, **kwargs)
        (Path(path) / "round.json").unlink()
        raise Killed

    args = make_arguments(tmp_path, max_steps=30, **EVERY_STEP)
    with monkeypatch.context() as patch:
        patch.setattr("mates_hf.training.rounds_on_disk.shutil.rmtree", dies)
        with pytest.raises(Killed):  # at step 24, where round 1 is no longer needed
            run(args, [mates(keep_rounds=2)], dropout=0.1)
    whole = run(make_arguments(tmp_path / "whole", max_steps=30), [mates()], dropout=0.1)
    rest = run(args, [mates(keep_rounds=2)], dropout=0.1, resume=str(tmp_path / "checkpoint-5"))
    assert_goes_on(rest, whole, 5)


class FirstPasses(NgramInfluenceModel):
    """Passes the guard when it is fitted without earlier labels and when it is kept, and fails it otherwise."""

    def fit(self, candidates, labels, *args, **kwargs):
        fitted = super().fit(candidates, labels, *args, **kwargs)
        if kwargs.get("previous") is not None:
            fitted._report = dataclasses.replace(fitted.report, spearman=-0.9, interval=(-1.0, -0.5))
        else:
            fitted._report = dataclasses.replace(fitted.report, spearman=0.9, interval=(0.5, 1.0))
        return fitted

    def evaluate(self, candidates, labels, *args, **kwargs):
        report = super().evaluate(candidates, labels, *args, **kwargs)
        return dataclasses.replace(report, spearman=0.9, interval=(0.5, 1.0))


def test_an_influence_model_that_was_saved_in_part_is_fitted_again(tmp_path, short, monkeypatch):
    where, whole = short
    checkpoint = as_of(where, tmp_path, 5)
    save = NgramInfluenceModel.save_pretrained

    def dies(self, path):
        save(self, path)
        (Path(path) / "config.json").unlink()  # which vouches for the others, and is written last
        raise Killed

    args = make_arguments(tmp_path, **EVERY_STEP)
    with monkeypatch.context() as patch:
        patch.setattr(NgramInfluenceModel, "save_pretrained", dies)
        with pytest.raises(Killed):
            run(args, [mates()], dropout=0.1, resume=str(checkpoint))
    probes = tmp_path / "_mates" / "round-0001.partial" / "probes.parquet"
    written = probes.stat().st_mtime_ns
    rest = run(args, [mates()], dropout=0.1, resume=str(checkpoint))
    assert_goes_on(rest, whole, 5)
    assert probes_written(tmp_path)["round-0001"] == written
    assert not list((tmp_path / "_mates" / "round-0001").glob("*.partial"))


@pytest.mark.quick("argument*")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"probe": OneStepProbe()}, "OneStepProbe"),
        ({"probe": DirectionalProbe(path_steps=2)}, "'path_steps': 2"),
        ({"influence_model": NgramInfluenceModel(num_buckets=64)}, "'num_buckets': 64"),
    ],
    ids=["probe", "argument-of-the-probe", "influence-model"],
)
def test_a_stage_measured_otherwise_is_redone_and_told_of_and_the_run_goes_on(
    tmp_path, short, changes, named, caplog, monkeypatch
):
    where, _ = short
    checkpoint = as_of(where, tmp_path, 5)

    def dies(*args, **kwargs):
        raise Killed

    args = make_arguments(tmp_path, **EVERY_STEP)
    with monkeypatch.context() as patch:
        patch.setattr("mates_hf.training.rounds.score_candidates", dies)
        with pytest.raises(Killed):
            run(args, [mates()], dropout=0.1, resume=str(checkpoint))
    probes = tmp_path / "_mates" / "round-0001.partial" / "probes.parquet"
    kept = probes.stat().st_mtime_ns
    other = MatesCallback(make_reference(), small_config(switch_lead_steps=3), **changes)
    run(args, [other], dropout=0.1, resume=str(checkpoint))
    assert "Labels from here on are made with something else" in caplog.text
    assert named in caplog.text
    assert (tmp_path / "_mates" / "round-0001.stale").is_dir()
    assert probes_written(tmp_path)["round-0001"] != kept
    info = load_round(tmp_path / "_mates" / "round-0001").info
    assert named in repr(info["measured_with"])


def test_digests_of_an_earlier_version_redo_a_stage_and_end_no_run(tmp_path, short, caplog):
    where, whole = short
    checkpoint = as_of(where, tmp_path, 8)
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["mates_hf"]
    saved["weights"] = {name: "0123456789abcdef" for name in saved["weights"]}
    del saved["measured_with"]
    path.write_text(json.dumps(state))
    rest = run(make_arguments(tmp_path, **EVERY_STEP), [mates()], dropout=0.1, resume=str(checkpoint))
    assert "marks of the weights are of an earlier version" in caplog.text
    assert "something else" not in caplog.text
    assert_goes_on(rest, whole, 8)


# What is proven, and refused.


@pytest.mark.parametrize("step", [5, 8])  # before the first round, and in its lead
def test_another_own_order_is_refused_while_its_rows_are_still_to_come(tmp_path, short, step):
    where, _ = short
    args = make_arguments(tmp_path, data_seed=7, **EVERY_STEP)
    before = probes_written(tmp_path)
    with pytest.raises(MatesError, match=r"order of rows that it was in.*`data_seed`"):
        run(args, [mates()], dropout=0.1, resume=str(as_of(where, tmp_path, step)))
    assert probes_written(tmp_path).keys() - before.keys() <= {"round-0001"}


def test_another_own_order_behind_it_changes_no_row(tmp_path, short, caplog):
    where, whole = short
    args = make_arguments(tmp_path, data_seed=7, **EVERY_STEP)
    rest = run(args, [mates()], dropout=0.1, resume=str(as_of(where, tmp_path, 10)))
    assert "own order is another one" in caplog.text
    assert_goes_on(rest, whole, 10)


def test_a_checkpoint_that_another_callback_asks_for(tmp_path):
    class AsksLate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_save or state.global_step in (5, 11)

    settings = {"save_strategy": "steps", "save_steps": 4}
    whole = run(make_arguments(tmp_path, **settings), [mates(), AsksLate()], dropout=0.1)
    for step in (5, 11):  # outside of the averaging window and inside it
        args = make_arguments(tmp_path, **settings)
        rest = run(args, [mates(), AsksLate()], dropout=0.1, resume=str(tmp_path / f"checkpoint-{step}"))
        assert_goes_on(rest, whole, step)


def test_what_the_trainer_left_unrestored_is_restored_from_the_checkpoint(tmp_path, short, monkeypatch, caplog):
    from transformers import Trainer

    where, whole = short
    load = Trainer._load_from_checkpoint

    def forgetful(self, *args, **kwargs):
        load(self, *args, **kwargs)
        torch.nn.init.normal_(self.model.lm_head.weight)

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", forgetful)
    checkpoint = as_of(where, tmp_path, 10)
    rest = run(make_arguments(tmp_path, **EVERY_STEP), [mates()], dropout=0.1, resume=str(checkpoint))
    assert "lm_head.weight unrestored" in caplog.text
    assert_goes_on(rest, whole, 10)


def test_what_nobody_can_restore_ends_the_run_before_its_first_step(tmp_path, short, monkeypatch):
    from safetensors.torch import load_file, save_file

    where, _ = short
    checkpoint = as_of(where, tmp_path, 10)
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    steps: list[int] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    with pytest.raises(MatesError, match=r"1 parameters differ \(lm_head\.weight\)"):
        run(make_arguments(tmp_path), [mates(), Steps()], dropout=0.1, resume=str(checkpoint))
    assert not steps


def test_a_probe_killed_on_its_way_goes_on_behind_what_it_has_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_ROWS", 10)  # 40 probes: four shards
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12}
    whole = run(make_arguments(tmp_path / "whole", **settings), [mates()], dropout=0.1)
    measured: list[int] = []
    inner = directional.DirectionalProbe.directional_derivatives

    def counted(self, model, direction, rows, epsilon):
        if self.shards_dir is not None and len(rows) == 10:  # not the few that choose epsilon
            measured.append(1)
            if len(measured) == 3:
                raise Killed
        return inner(self, model, direction, rows, epsilon)

    monkeypatch.setattr(directional.DirectionalProbe, "directional_derivatives", counted)
    with pytest.raises(Killed):
        run(make_arguments(tmp_path / "part", **settings), [mates()], dropout=0.1)
    shards = tmp_path / "part" / "_mates" / "round-0001.partial" / "probe_shards"
    assert len(list(shards.glob("*.npy"))) == 2
    rest = run(make_arguments(tmp_path / "part", **settings), [mates()], dropout=0.1, resume=True)
    assert len(measured) == 3 + 2
    assert not list((tmp_path / "part").rglob("probe_shards"))
    assert rest.losses == whole.losses
    assert rest.rows == whole.rows[20:]
