"""What a start, a resume and `keep_rounds` do to rounds that are there: nothing finished is lost, no run ends."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainerState

from mates_hf import MatesCallback, MatesConfig, load_round
from mates_hf.disk import write_json
from mates_hf.errors import MatesError
from mates_hf.training import rounds_on_disk
from mates_hf.training.disk_errors import DiskError
from mates_hf.training.lock import LOCK_FILE, LockedError, RoundsLock
from mates_hf.training.opening import run_folders
from mates_hf.training.order import load_order
from tests.training.kit import Stop, make_arguments, make_reference, run, small_config

SAVES = {"save_strategy": "steps", "save_steps": 5}
DiskUsage = namedtuple("DiskUsage", "total used free")


def mates(**changes: object) -> MatesCallback:
    return MatesCallback(make_reference(), small_config(**{"switch_lead_steps": 3, **changes}))


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Started(TrainerCallback):
    """Counts the steps that begin."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps += 1


# ---- starts


@pytest.mark.slow
def test_two_starts_by_mistake_lose_nothing_and_the_advice_brings_the_run_back(tmp_path, caplog):
    whole = run(make_arguments(tmp_path, **SAVES), [mates()], dropout=0.1)
    rounds_dir = tmp_path / "_mates"
    first = {name: content(rounds_dir / name) for name in ("round-0001", "round-0002")}
    checkpoints = content(tmp_path / "checkpoint-15")
    for _ in range(2):
        caplog.clear()
        run(make_arguments(tmp_path, learning_rate=1e-3, save_strategy="no"), [mates(), Stop(8)])
        assert f"resume_from_checkpoint='{tmp_path}/checkpoint-20'" in caplog.text
    for name, files in first.items():
        assert content(rounds_dir / f"{name}.stale") == files
    assert (rounds_dir / "round-0001.stale-2").is_dir()
    resume = str(tmp_path / "checkpoint-15")
    with pytest.raises(MatesError, match=r"round-0002\.stale` holds: another start"):
        run(make_arguments(tmp_path, **SAVES), [mates()], dropout=0.1, resume=resume)
    (rounds_dir / "round-0001").rename(tmp_path / "away")
    for name in first:
        (rounds_dir / f"{name}.stale").rename(rounds_dir / name)
    rest = run(make_arguments(tmp_path, **SAVES), [mates()], dropout=0.1, resume=resume)
    assert rest.rows == whole.rows[60:]
    assert rest.losses == whole.losses
    assert content(tmp_path / "checkpoint-15") == checkpoints
    assert not (rounds_dir / LOCK_FILE).exists()


def test_a_live_run_is_refused_before_anything_moves(tmp_path):
    run(make_arguments(tmp_path), [mates(), Stop(8)])
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        lock = RoundsLock(tmp_path / "_mates", threading.current_thread())
        held.set()
        release.wait()
        lock.release()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    before, steps = content(tmp_path), Started()
    try:
        with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
            run(make_arguments(tmp_path), [mates(), steps])
    finally:
        release.set()
        other.join()
    assert steps.steps == 0
    assert content(tmp_path).items() >= {k: v for k, v in before.items() if LOCK_FILE not in k}.items()


@pytest.mark.slow
def test_training_again_after_an_error_is_not_locked_out(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    callback = mates()
    for with_it in (callback, mates()):
        with pytest.raises(ZeroDivisionError):
            run(make_arguments(tmp_path), [with_it, Breaks()])
        assert (tmp_path / "_mates" / LOCK_FILE).exists()  # nobody tells a callback of an error
    run(make_arguments(tmp_path), [callback, Stop(8)])
    assert not (tmp_path / "_mates" / LOCK_FILE).exists()


@pytest.mark.slow
def test_running_means_stay_with_their_checkpoints(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 20}
    run(make_arguments(tmp_path, **settings), [mates(average_steps=3), Stop(5)], dropout=0.1)
    rounds_dir = tmp_path / "_mates"
    mean = rounds_dir / "average-5.safetensors"
    for name in ("average-4.safetensors", "average-5.safetensors.tmp"):
        shutil.copy(mean, rounds_dir / name)
    saved = mean.read_bytes()
    run(make_arguments(tmp_path, save_strategy="no"), [mates(average_steps=3), Stop(7)], dropout=0.2)
    assert [path.read_bytes() for path in rounds_dir.glob("average-*")] == [saved]
    # Another run with the same `rounds_dir` and an `output_dir` of its own.
    elsewhere = make_arguments(tmp_path / "elsewhere", save_strategy="no")
    run(elsewhere, [mates(average_steps=3, rounds_dir=str(rounds_dir)), Stop(7)], dropout=0.2)
    assert mean.read_bytes() == saved
    whole = run(make_arguments(tmp_path / "whole"), [mates(average_steps=3)], dropout=0.1)
    rest = run(make_arguments(tmp_path), [mates(average_steps=3)], dropout=0.1, resume=str(tmp_path / "checkpoint-5"))
    assert rest.losses == whole.losses
    assert rest.rows == whole.rows[20:]


# ---- foreseen


@pytest.mark.parametrize("kind", ["below-a-file", "no-room", "write-fails"])
def test_where_rounds_go_is_tried_before_the_first_step(tmp_path, monkeypatch, kind):
    steps, rounds_dir = Started(), tmp_path / "rounds"
    if kind == "below-a-file":
        (tmp_path / "file").touch()
        rounds_dir = tmp_path / "file" / "rounds"
    elif kind == "no-room":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2**40, 2**40 - 70_000, 70_000))
    else:

        def fails(handle: int) -> None:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr(os, "fsync", fails)
    said = {"below-a-file": "Not a directory", "no-room": r"64\.\d MiB free.*labels \d.*got 68.4 KiB"}
    with pytest.raises(DiskError, match=said.get(kind, "quota exceeded.*rounds_dir")):
        run(make_arguments(tmp_path), [mates(rounds_dir=str(rounds_dir)), steps])
    assert steps.steps == 0


def test_rounds_that_will_fill_the_disk_are_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2**40, 0, 100 * 2**20))
    run(make_arguments(tmp_path), [mates(), Stop(1)])
    assert "the 2 rounds that will be there take about 128." in caplog.text
    caplog.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2**40, 0, 200 * 2**20))
    run(make_arguments(tmp_path), [mates(), Stop(1)])
    assert "that will be there" not in caplog.text


class Search:
    """A Trainer in a hyperparameter search."""

    def __init__(self, trial: object, name: str) -> None:
        self._trial, self.name = trial, name

    def _get_output_dir(self, trial: object) -> str:
        return f"out/{self.name}"


@pytest.mark.parametrize(
    ("trainer", "trial_name", "checkpoints", "rounds"),
    [
        (Search(object(), "run-3"), None, "out/run-3", "run-3"),
        (Search(object(), "a b/../.c"), None, "out/a b/../.c", "c"),
        (Search(object(), "round-0001"), None, "out/round-0001", "run-round-0001"),
        (None, "lr=1", "out/lr=1", "lr_1"),
        (Search(None, "-"), None, "out", ""),
    ],
)
@pytest.mark.parametrize("rounds_dir", [None, "elsewhere"])
def test_trials_have_folders_of_their_own(trainer, trial_name, checkpoints, rounds, rounds_dir):
    state = TrainerState(is_hyper_param_search=True, trial_name=trial_name)
    args, config = SimpleNamespace(output_dir="out"), MatesConfig(rounds_dir=rounds_dir)
    base = Path(rounds_dir or "out/_mates")
    assert run_folders(args, state, config, trainer) == (Path(checkpoints), base / rounds)
    assert run_folders(args, TrainerState(), config, trainer) == (Path("out"), base)


# ---- a power cut


@pytest.mark.parametrize("beside", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_round_whose_last_rename_was_lost_is_finished_by_a_resume(tmp_path, beside):
    whole = run(make_arguments(tmp_path, **SAVES), [mates()], dropout=0.1)
    path = tmp_path / "_mates" / "round-0002"
    path.rename(path.with_suffix(".partial"))
    if beside:  # what another attempt had left under its name, moved aside by a rename that was lost as well
        shutil.copytree(tmp_path / "_mates" / "round-0001", path)
    rest = run(make_arguments(tmp_path, **SAVES), [mates()], dropout=0.1, resume=str(tmp_path / "checkpoint-15"))
    assert rest.rows == whole.rows[60:]
    assert path.is_dir()
    assert path.with_suffix(".stale").exists() is beside


@pytest.mark.slow
def test_a_round_that_is_not_whole_is_not_finished_by_its_name(tmp_path):
    run(make_arguments(tmp_path, **SAVES), [mates(), Stop(15)], dropout=0.1)
    path = (tmp_path / "_mates" / "round-0002").rename(tmp_path / "_mates" / "round-0002.partial")
    (path / "scores.npy").write_bytes((path / "scores.npy").read_bytes()[:-1])
    with pytest.raises(MatesError, match="is not there"):
        run(make_arguments(tmp_path, **SAVES), [mates()], dropout=0.1, resume=str(tmp_path / "checkpoint-15"))


# ---- pruning


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["rmtree", "replace", "state", "unlink"])
def test_pruning_that_fails_ends_no_run(tmp_path, monkeypatch, caplog, fails):
    def stale(path, *args, **kwargs):
        if kwargs.get("ignore_errors") or (args and args[0] is True):
            return
        raise OSError(errno.ESTALE if fails == "rmtree" else errno.EACCES, "a file server's answer", str(path))

    replace = os.replace

    def only_rounds(source, target):
        return stale(source) if str(target).endswith(".deleted") else replace(source, target)

    settings = {"max_steps": 30, **SAVES}
    whole = run(make_arguments(tmp_path / "whole", **settings), [mates()])
    with monkeypatch.context() as patch:
        if fails == "rmtree":
            patch.setattr(rounds_on_disk.shutil, "rmtree", stale)
        elif fails == "replace":
            patch.setattr(os, "replace", only_rounds)
        elif fails == "unlink":
            patch.setattr(os, "rmdir", stale)  # what is left where `.nfs` files are in a directory
        else:
            patch.setattr(rounds_on_disk, "last_complete_checkpoint", stale)
        args = make_arguments(tmp_path / "part", **settings)
        kept = run(args, [mates(keep_rounds=2), Stop(27)])
    assert kept.rows == whole.rows[: 27 * 4]
    assert "a file server's answer" in caplog.text
    # A later try clears up what an earlier one left.
    run(args, [mates(keep_rounds=2)], resume=str(tmp_path / "part" / "checkpoint-20"))
    left = {path.name for path in (tmp_path / "part" / "_mates").iterdir()}
    assert not {name for name in left if name.endswith(".deleted")}
    assert "round-0001" not in left


def test_the_order_in_training_outlives_its_file(tmp_path):
    run(make_arguments(tmp_path), [mates(), Stop(8)])
    path = tmp_path / "_mates" / "round-0001"
    order = load_order(path)
    before = order.rows.copy()
    with open(path / "selection.npy", "r+b") as file:
        file.truncate(128)  # as on a file server where another host deleted it: reading what is mapped is a SIGBUS
    assert np.array_equal(order.rows, before)
    assert not isinstance(order.rows, np.memmap)


def make_round(path: Path, order: str) -> Path:
    path.mkdir(parents=True)
    write_json(
        path / "round.json", {"number": int(path.name[6:10]), "order_sha256": order, "guard": {"decision": "select"}}
    )
    (path / "influence_model").mkdir()
    return path


def test_rounds_set_aside_are_pruned_unless_a_checkpoint_was_trained_on_one(tmp_path):
    rounds_dir = tmp_path / "_mates"
    for number in range(1, 9):
        make_round(rounds_dir / f"round-{number:04d}", f"new-{number}")
    for name in ("round-0001.stale", "round-0002.stale-2", "round-0008.stale"):
        make_round(rounds_dir / name, f"old-{name}")
    (rounds_dir / "round-0003.deleted").mkdir()
    state = {
        "global_step": 5,
        "stateful_callbacks": {"mates_hf": {"last_round": {"order_sha256": "old-round-0002.stale-2"}}},
    }
    (tmp_path / "checkpoint-5").mkdir()
    write_json(tmp_path / "checkpoint-5" / "trainer_state.json", state)
    rounds_on_disk.prune_rounds(rounds_dir, tmp_path, 8, 2)
    stale = {path.name for path in rounds_dir.glob("*.stale*")}
    assert stale == {"round-0001.stale", "round-0002.stale-2", "round-0008.stale"}
    assert {path.name for path in rounds_dir.glob("round-????")} == {"round-0007", "round-0008"}
    shutil.rmtree(tmp_path / "checkpoint-5")
    rounds_on_disk.prune_rounds(rounds_dir, tmp_path, 8, 2)
    assert {path.name for path in rounds_dir.iterdir()} == {"round-0007", "round-0008", "round-0008.stale"}


# ---- stages measured otherwise


class OtherRate(TrainerCallback):
    """Raises the learning rate at a boundary, before the round looks at it."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= 2


@pytest.mark.parametrize("what", ["learning-rate", pytest.param("clipping", marks=pytest.mark.slow)])
def test_a_round_killed_in_fit_is_measured_again_with_other_settings(tmp_path, monkeypatch, what, caplog):
    class Killed(BaseException):
        pass

    def dies(*args: object, **kwargs: object) -> None:
        raise Killed

    args = {"max_grad_norm": 1e9, **SAVES}
    with monkeypatch.context() as patch:
        patch.setattr("mates_hf.training.rounds.fitted_model", dies)
        with pytest.raises(Killed):
            run(make_arguments(tmp_path, **args), [mates()])
    kept = (tmp_path / "_mates" / "round-0001.partial" / "probes.parquet").stat().st_mtime_ns
    others = [OtherRate()] if what == "learning-rate" else []
    if what == "clipping":
        args["max_grad_norm"] = 2e9  # clips nothing, so the weights are the same
    resume = str(tmp_path / "checkpoint-5")
    rest = run(make_arguments(tmp_path, **args), [*others, mates()], resume=resume)
    assert rest.trainer.state.global_step == 20
    stale = tmp_path / "_mates" / "round-0001.stale" / "probes.parquet"
    assert stale.stat().st_mtime_ns == kept
    assert load_round(tmp_path / "_mates" / "round-0001").info["num_probed"] == 40
    assert ("max_grad_norm: checkpoint 1000000000.0" in caplog.text) is (what == "clipping")


@pytest.mark.slow
def test_a_killed_run_is_taken_up_by_another_process_with_the_same_outcome(tmp_path):
    whole = run(make_arguments(tmp_path / "whole", **SAVES), [mates()], dropout=0.1)
    pid = os.fork()
    if not pid:

        class Dies(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 8:
                    os.kill(os.getpid(), 9)

        torch.set_num_threads(1)
        run(make_arguments(tmp_path / "part", **SAVES), [mates(), Dies()], dropout=0.1)
    os.waitpid(pid, 0)
    assert (tmp_path / "part" / "_mates" / LOCK_FILE).exists()
    rest = run(make_arguments(tmp_path / "part", **SAVES), [mates()], dropout=0.1, resume=True)
    assert rest.losses == whole.losses
    assert rest.rows == whole.rows[20:]
