"""Epochs that a callback ends, several passes over a small pool, and resumes whose batch moves steps against rows."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from transformers import TrainerCallback

from mates_hf import load_round
from mates_hf.errors import MatesError
from mates_hf.records import STATE_KEY
from mates_hf.selection.ledger import Ledger
from mates_hf.training.verify import verify_run
from tests.training.kit import OLD_TRAINER, Stop, make_pool, run
from tests.training.kit import make_arguments as arguments
from tests.training.settings import mates, proves, rounds_of

pytestmark = pytest.mark.slow

STOPPED = "an epoch that a callback ends (`control.should_epoch_stop`)"
PASSES = "several passes over a small pool (`max_passes`)"
SAVES = {"save_strategy": "steps", "save_steps": 5}


class EndsEpoch(TrainerCallback):
    """Ends the epoch after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == self.step


def selected(tmp_path) -> list[int]:
    """The rows of all rounds, in the order in which they are trained on."""
    return np.concatenate([record.selection for record in rounds_of(tmp_path)]).tolist()


# Rounds at steps 5, 10, ..., in effect five later. A run of several epochs that selects in its first goes on in a new
# pass; these stop before it.
ENDED = {"update_steps": 5, "switch_lead_steps": 5, "num_probes": 10, "max_passes": 3}


@proves(STOPPED, "the next epoch goes on with the next row; selections are trained on as if it had not ended")
@pytest.mark.parametrize(("step", "workers"), [(7, 0), (12, 0), (12, 2)], ids=["in-the-lead", "behind-it", "workers"])
def test_an_epoch_that_a_callback_ends_moves_no_row(tmp_path, step, workers):
    pool, config = make_pool(200), ENDED
    settings = {"max_steps": 51, "dataloader_num_workers": workers, **SAVES}  # an epoch is 50 steps
    args = arguments(tmp_path, **settings)
    ended = run(args, [mates(**config), EndsEpoch(step), Stop(20)], pool)
    whole = run(arguments(tmp_path / "whole", **settings), [mates(**config), Stop(20)], pool)
    assert ended.rows == whole.rows
    assert len(set(ended.rows)) == len(ended.rows) == 80
    assert ended.rows[10 * 4 :] == selected(tmp_path)[: 10 * 4]
    assert ended.losses == whole.losses
    assert verify_run(tmp_path).problem is None
    rest = run(args, [mates(**config), Stop(20)], pool, resume=str(tmp_path / "checkpoint-15"))
    assert rest.rows == ended.rows[60:]


@proves(STOPPED, "before the first selection, rows are those of the run without the callback")
def test_an_epoch_ended_in_the_own_order_is_followed_by_a_fresh_pass(tmp_path):
    pool, config = make_pool(200), ENDED
    args = {"max_steps": 51}
    plain = run(arguments(tmp_path / "plain", **args), [EndsEpoch(3), Stop(14)], pool)
    ours = run(arguments(tmp_path, **args), [EndsEpoch(3), mates(**config), Stop(14)], pool)
    assert ours.rows[: 10 * 4] == plain.rows[: 10 * 4]
    assert ours.losses[:10] == plain.losses[:10]
    (first, *_) = rounds_of(tmp_path)
    assert ours.rows[10 * 4 :] == np.asarray(first.selection)[: 4 * 4].tolist()
    assert not set(ours.rows[3 * 4 : 10 * 4]) & set(ours.rows[10 * 4 :])  # each at most once in a pass


def test_an_ended_epoch_whose_steps_are_ragged_is_refused_by_name(tmp_path):
    args = arguments(tmp_path, max_steps=18, gradient_accumulation_steps=3)  # 50 batches: 17 steps an epoch
    with pytest.raises(MatesError, match="`control.should_epoch_stop` at step 4, inside one"):
        run(args, [mates(**ENDED), EndsEpoch(4)], make_pool(200))


# Rounds at steps 6, 12, 18 and 24, in effect from 8, 14, 20 and 26; each chooses 24 rows from 48 and probes 10.
SMALL = {"update_steps": 6, "switch_lead_steps": 2, "selection_ratio": 0.5, "num_probes": 10}


@proves(PASSES, "a row is trained on at most once in a pass; resumes exactly; verifies")
def test_a_small_pool_is_gone_through_several_times(tmp_path):
    pool = make_pool(100)
    args = arguments(tmp_path, max_steps=32, **SAVES)
    with pytest.raises(ValueError, match=r"in new passes \(`max_passes=None`\)"):
        run(args, [mates(**SMALL)], pool)
    with pytest.raises(ValueError, match=r"that `max_passes` \(2\) suffice"):
        run(args, [mates(max_passes=2, **SMALL)], pool)
    config = {"max_passes": 3, **SMALL}
    whole = run(args, [mates(**config)], pool)
    records = rounds_of(tmp_path)
    assert [record.info["pass"] for record in records] == [1, 2, 2, 3]
    assert whole.rows[32:] == selected(tmp_path)
    by_pass = {1: whole.rows[:32], 2: [], 3: []}
    for record in records:
        by_pass[record.info["pass"]] += np.asarray(record.selection).tolist()
    for rows in by_pass.values():
        assert len(set(rows)) == len(rows)
    assert max(np.bincount(whole.rows)) <= 3
    result = verify_run(tmp_path)
    assert (result.problem, len(result.rounds)) == (None, 4)
    for step in (10, 20, 25):  # in the first pass, in the second, in the lead of the third
        rest = run(args, [mates(**config)], pool, resume=str(tmp_path / f"checkpoint-{step}"))
        assert rest.rows == whole.rows[step * 4 :]
        assert rest.losses == whole.losses
    path = tmp_path / "_mates" / "round-0002" / "round.json"
    info, sums = json.loads(path.read_text()), path.with_name("SHA256SUMS")
    for wrong in (1, 3, 4, None):
        path.write_text(json.dumps({**info, "pass": wrong}))
        lines = [line for line in sums.read_text().splitlines() if not line.endswith("round.json")]
        sums.write_text("\n".join([*lines, f"{hashlib.sha256(path.read_bytes()).hexdigest()}  round.json"]) + "\n")
        problem = verify_run(tmp_path).problem
        assert problem is not None
        assert problem.round == "round-0002"
        assert "`pass`" in problem.expected


def test_rounds_of_versions_that_began_each_pass_at_the_start_verify_and_go_on(tmp_path, monkeypatch):
    def from_the_start(ledger):
        ledger.consumed, ledger.cursor, ledger.pass_number = np.zeros(100, bool), 0, ledger.pass_number + 1

    pool, config = make_pool(100), {"max_passes": 3, **SMALL}
    args = arguments(tmp_path, max_steps=38, **SAVES)
    with monkeypatch.context() as before:
        before.setattr(Ledger, "start_new_pass", from_the_start)
        whole = run(args, [mates(**config)], pool)

    def waits() -> list[bool]:
        return ["num_waiting" in record.info for record in rounds_of(tmp_path)]

    assert [record.info["pass"] for record in rounds_of(tmp_path)] == [1, 2, 2, 3, 3]
    assert waits() == [False] * 5
    assert verify_run(tmp_path).problem is None
    for gone, after in ((5, [False] * 5), (4, [False] * 3 + [True] * 2)):  # what a stop in the round leaves
        for number in range(gone, 6):
            shutil.rmtree(tmp_path / f"_mates/round-000{number}")
        rest = run(args, [mates(**config)], pool, resume=str(tmp_path / "checkpoint-15"))  # in the second pass
        from_step = 8 + 6 * (gone - 1)
        assert rest.rows[: (from_step - 15) * 4] == whole.rows[15 * 4 : from_step * 4]
        assert waits() == after
        assert verify_run(tmp_path).problem is None


def test_a_checkpoint_of_a_version_with_one_pass_keeps_it(tmp_path, caplog):
    pool, config = make_pool(200), {"update_steps": 5, "switch_lead_steps": 3, "num_probes": 10}
    args = arguments(tmp_path, max_steps=20, **SAVES)
    whole = run(args, [mates(max_passes=1, **config)], pool)
    path = tmp_path / "checkpoint-10" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"][STATE_KEY]["config"]["max_passes"]
    path.write_text(json.dumps(state))
    rest = run(args, [mates(max_passes=None, **config)], pool, resume=str(path.parent))
    assert rest.rows == whole.rows[40:]
    assert "it began, with `max_passes=1`" in caplog.text


# ---- another batch after a stop

larger_batch = pytest.mark.skipif(OLD_TRAINER, reason="transformers 4 resumes with the batch of the checkpoint")


@larger_batch
def test_an_order_that_a_larger_batch_reaches_sooner_is_trained_on_though_no_round_is_planned(tmp_path):
    config = {"update_steps": 6, "switch_lead_steps": 2}
    run(arguments(tmp_path, max_steps=20, save_strategy="steps", save_steps=6), [mates(**config), Stop(6)])
    record = load_round(tmp_path / "_mates" / "round-0001")
    assert record.info["from_position"] == 32  # step 8 by the old batch; 24 rows are trained on
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=16)
    rest = run(args, [mates(**config)], resume=str(tmp_path / "checkpoint-6"))
    assert rest.rows[8:] == np.asarray(record.selection)[:24].tolist()


@larger_batch
def test_a_larger_batch_for_the_last_steps_needs_rows_for_those_alone(tmp_path):
    config = {"update_steps": 6, "num_probes": 10, "switch_lead_steps": 3}
    first = arguments(tmp_path, max_steps=20, per_device_train_batch_size=2, save_strategy="steps", save_steps=5)
    run(first, [mates(**config), Stop(15)], make_pool(120))
    args = arguments(tmp_path, max_steps=20, per_device_train_batch_size=8)
    rest = run(args, [mates(**config)], make_pool(120), resume=str(tmp_path / "checkpoint-15"))
    assert len(set(rest.rows)) == len(rest.rows) == 40
    longer = arguments(tmp_path, max_steps=30, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=r"Round 3 .*The largest `max_steps` that fits is 2\d \(got 30\)"):
        run(longer, [mates(**config)], make_pool(120), resume=str(tmp_path / "checkpoint-15"))
