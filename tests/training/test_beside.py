"""Rounds beside training: the same run to the bit, waited for where it must be, and never in the way of its end."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle
import threading
import time
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from mates_hf import DirectionalProbe, MatesCallback, NgramInfluenceModel, load_round
from mates_hf.data.pool import CandidatePool
from mates_hf.errors import MatesError
from mates_hf.prediction.hidden_states import HiddenStateInfluenceModel
from mates_hf.training import rounds, scoring
from mates_hf.training.beside import Beside, CheckpointState, may_run_beside
from tests.training.kit import Stop, assert_same, make_arguments, make_pool, make_reference, run, small_config

LEAD, BOUNDARY = 4, 6
DUE = BOUNDARY + LEAD - 1  # the dataloader is a batch ahead


class Attended(NgramInfluenceModel):
    """The same, while training waits."""

    runs_beside_training = False


def mates(**more: Any) -> MatesCallback:
    return MatesCallback(make_reference(), small_config(switch_lead_steps=LEAD), **more)


class At(TrainerCallback):
    """Does something at the end of a step, after ours."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what(control)


def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Scoring waits for the event, and so does the round."""
    event, score = threading.Event(), scoring.score_candidates

    def wait(*args: Any) -> Any:
        assert event.wait(20), "training waited for the round that waits for training"
        return score(*args)

    monkeypatch.setattr(rounds, "score_candidates", wait)
    return event


@pytest.fixture(scope="module")
def attended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("attended")
    return folder, run(make_arguments(folder), [mates(influence_model=Attended())], dropout=0.1)


def selection(folder: Path, number: int) -> list[int]:
    return np.asarray(load_round(folder / f"_mates/round-{number:04d}").selection).tolist()


def test_training_goes_on_and_ends_in_the_same_bits(tmp_path, monkeypatch, attended) -> None:
    event = hold(monkeypatch)
    result = run(make_arguments(tmp_path), [mates(), At(DUE - 1, lambda control: event.set())], dropout=0.1)
    assert result.rows == attended[1].rows
    assert_same(result, attended[1])
    assert selection(tmp_path, 1) == selection(attended[0], 1)
    (first, *_) = (entry for entry in result.trainer.state.log_history if "mates/round" in entry)
    assert first["step"] == DUE
    assert first["mates/waited_seconds"] >= 0
    steps = [entry["step"] for entry in attended[1].trainer.state.log_history if "mates/round" in entry]
    assert steps == [BOUNDARY, 2 * BOUNDARY]


def test_a_checkpoint_that_nobody_saw_coming_names_the_round(tmp_path, monkeypatch, attended) -> None:
    event = hold(monkeypatch)

    def save(control: Any) -> None:
        event.set()
        control.should_save = True

    run(make_arguments(tmp_path / "a"), [mates(), At(BOUNDARY + 1, save), Stop(BOUNDARY + 2)], dropout=0.1)
    checkpoint = tmp_path / f"a/checkpoint-{BOUNDARY + 1}"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["mates_hf"]
    assert saved["last_round"]["number"] == 1
    rest = run(make_arguments(tmp_path / "a"), [mates()], resume=str(checkpoint), dropout=0.1)
    assert rest.rows == attended[1].rows[(BOUNDARY + 1) * 4 :]
    assert rest.losses == attended[1].losses


@pytest.mark.parametrize("what", ["should_evaluate", "should_save"])
def test_it_is_waited_for_before_what_starts_processes_or_writes(tmp_path, what) -> None:
    def give(trainer: Any) -> None:
        trainer.eval_dataset = make_pool(8)

    ask = At(BOUNDARY + 1, lambda control: setattr(control, what, True))
    result = run(make_arguments(tmp_path), [ask, mates(), Stop(DUE)], prepare=give)
    steps = [entry["step"] for entry in result.trainer.state.log_history if "mates/round" in entry]
    assert steps == [BOUNDARY + 1]


def test_a_round_says_in_one_line_what_it_did_where_the_trainer_prints(tmp_path, capsys) -> None:
    run(make_arguments(tmp_path, disable_tqdm=False), [mates(), Stop(DUE)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"round 1 at step {BOUNDARY}, 40 probed, held-out Spearman")


def test_a_run_that_ends_before_has_the_round_and_its_metrics(tmp_path) -> None:
    result = run(make_arguments(tmp_path), [mates(), Stop(BOUNDARY + 1)])
    assert len(selection(tmp_path, 1)) > 0
    assert any("mates/round" in entry for entry in result.trainer.state.log_history)


def test_what_fails_beside_training_ends_it_by_its_own_name(tmp_path, monkeypatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    steps: list[int] = []
    count = At(0, None)
    monkeypatch.setattr(count, "on_step_end", lambda args, state, control, **kwargs: steps.append(state.global_step))
    callback = mates()

    def until_it_failed(control: Any) -> None:
        pending = callback._session._pending
        for _ in range(2_000):
            if pending.failed:
                return
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "score_candidates", full)
        with pytest.raises(MatesError, match="No space left"):
            run(make_arguments(tmp_path), [At(BOUNDARY + 1, until_it_failed), callback, count])
    assert steps[-1] == BOUNDARY, "it is told at the next step and not when the order is due"
    assert not (tmp_path / "_mates/round-0001").exists()
    again = run(make_arguments(tmp_path), [callback])  # the callback, and the folder, are fit for another run
    assert len(again.rows) == 80


def test_a_run_that_breaks_off_leaves_no_writer_behind(tmp_path, monkeypatch) -> None:
    event = hold(monkeypatch)

    def fail(control: Any) -> None:
        raise InterruptedError

    callback = mates()
    with pytest.raises(InterruptedError):
        run(make_arguments(tmp_path), [callback, At(BOUNDARY + 1, fail)])
    threading.Timer(0.3, event.set).start()
    callback.on_train_end(None, types.SimpleNamespace(log_history=[], epoch=0, global_step=7, max_steps=7), None)
    assert not [thread for thread in threading.enumerate() if thread.name == "mates-round"]


def test_only_what_leaves_model_devices_and_random_streams_alone(make_tiny_model) -> None:
    def asked(influence_model: Any, pool: CandidatePool) -> bool:
        return may_run_beside(types.SimpleNamespace(influence_model=influence_model, pool=pool))

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": torch.where(torch.rand(ids.shape) < 0.5, ids, -100)}

    assert asked(NgramInfluenceModel(), CandidatePool(make_pool(70)))
    assert not asked(NgramInfluenceModel(), CandidatePool(make_pool(70), collate))
    assert not asked(HiddenStateInfluenceModel(), CandidatePool(make_pool(70)))
    assert not asked(Attended(), CandidatePool(make_pool(70)))


def test_shares_of_all_processes_add_up_to_the_whole(tmp_path) -> None:
    pool = CandidatePool(make_pool(200))
    run(make_arguments(tmp_path), [mates(), Stop(DUE)])
    model = NgramInfluenceModel.from_pretrained(tmp_path / "_mates/round-0001/influence_model")
    ids = np.arange(3, 197)
    about = {"pool": pool, "copy_marks": None, "tokenizer": None, "model": None, "config": small_config()}
    whole = scoring._predict(types.SimpleNamespace(**about), model, ids, shared=False)
    parts = []
    for rank in range(3):
        side = types.SimpleNamespace(rank=rank, size=3, sum=lambda values: values)
        parts.append(scoring._predict(types.SimpleNamespace(**about, side=side), model, ids, shared=True))
    for one, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.count_nonzero(np.array(shares), axis=0).max() == 1
        assert np.array_equal(one, sum(shares))


def test_a_saved_state_is_read_when_it_is_written_and_copied_as_plain_values() -> None:
    asked: list[int] = []
    state = CheckpointState(lambda: asked.append(1))
    state["round"] = 3

    @dataclasses.dataclass
    class Holder:
        state: Any

    assert json.loads(json.dumps(dataclasses.asdict(Holder(state)))) == {"state": {"round": 3}}
    assert asked
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert type(other) is dict
        assert other == {"round": 3}


def test_nothing_of_a_finished_run_is_kept_alive(tmp_path) -> None:
    result = run(make_arguments(tmp_path), [mates(probe=DirectionalProbe()), Stop(DUE)])
    state, model = result.trainer.state, weakref.ref(result.trainer.model)
    assert json.dumps(state.stateful_callbacks["mates_hf"])
    del result
    gc.collect()
    assert model() is None


def test_an_error_is_that_of_the_work() -> None:
    def fail() -> None:
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        Beside(fail, 1).result()
    Beside(fail, 1).abandon()
