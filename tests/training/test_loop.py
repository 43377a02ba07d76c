"""`MatesRounds`: the rows and weights of the Trainer with the callback; exact resumes; what is refused."""

from __future__ import annotations

import gc
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.fsdp
import transformers
from torch import nn
from transformers import Trainer, default_data_collator

from mates_hf import MatesCallback, MatesConfig, MatesRounds, load_round
from mates_hf.cli import main
from mates_hf.errors import MatesError, RoundMismatchError, UnsupportedSettingError
from mates_hf.training.lock import LOCK_FILE
from mates_hf.training.verify import verify_run
from tests.launch import free_port, start_processes
from tests.training.kit import make_arguments, make_model, make_pool, make_reference, run, small_config

BATCH, STEPS = 4, 20  # rounds at steps 6 and 12, in effect 3 steps later; the averaging window is 3 steps


def make_rounds(output_dir: Path, pool: Any = None, config: MatesConfig | None = None, **changes: Any) -> MatesRounds:
    settings = {"output_dir": output_dir, "collate_fn": default_data_collator, "progress": False, **changes}
    config = config or small_config(switch_lead_steps=3)
    return MatesRounds(make_reference(), make_pool() if pool is None else pool, config, **settings)


class Training:
    """A loop of one's own, which takes its steps as the Trainer does: model, optimizer, scheduler, batches."""

    def __init__(self, folder: Path, max_steps: int = STEPS) -> None:
        self.model = make_model()
        args = make_arguments(folder, max_steps=max_steps)
        trainer = Trainer(model=self.model, args=args)  # whose optimizer and scheduler are taken
        trainer.create_optimizer_and_scheduler(max_steps)
        self.optimizer, self.lr_scheduler = trainer.optimizer, trainer.lr_scheduler
        self.pool, self.rows, self.steps = make_pool(), [], []

    def step(self, rows: np.ndarray) -> None:
        batch = default_data_collator([self.pool[int(i)] for i in rows])
        count = (batch["labels"][:, 1:] != -100).sum()
        self.model.train()
        self.model(**batch, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()

    def order(self, rounds: MatesRounds, **changes: Any) -> Any:
        settings = {"batch_size": BATCH, "max_steps": STEPS, "lr_scheduler": self.lr_scheduler, "max_grad_norm": 1.0}
        return rounds.order(self.model, self.optimizer, **{**settings, **changes})

    def train(
        self,
        rounds: MatesRounds,
        each: Callable[[int], None] = lambda step: None,
        stop: int | None = None,
        **changes: Any,
    ) -> None:
        """Until `stop`, inside whose step the loop is left."""
        for step, rows in self.order(rounds, **changes):
            self.rows += rows.tolist()
            self.steps.append(step)
            self.step(rows)
            each(step)
            if step == stop:
                break

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "lr_scheduler")}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Training, dict[int, Path]]:
    """A run, and a checkpoint of each of its steps in a file."""
    folder = tmp_path_factory.mktemp("whole")
    training, rounds, saved = Training(folder), make_rounds(folder), {}
    assert "not begun, step 0" in repr(rounds)
    assert rounds.state_dict() == {"version": 2, "step": 0}

    def save(step: int) -> None:
        assert ("mates/round" in rounds.new_metrics()) == (step in (7, 13))  # of a checkpoint's step, told at the next
        saved[step] = folder / f"{step}.pt"
        torch.save({"rounds": json.loads(json.dumps(rounds.state_dict())), "rest": training.state()}, saved[step])

    training.train(rounds, save)
    assert "step 20" in repr(rounds)
    assert rounds.state_dict()["step"] == STEPS
    return folder, training, saved


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, value), found in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, found), name


def test_the_rows_and_weights_of_a_trainer_with_the_callback(tmp_path, whole, capsys):
    folder, training, _ = whole
    trained = run(make_arguments(tmp_path), [MatesCallback(make_reference(), small_config(switch_lead_steps=3))])
    assert training.rows == trained.rows
    assert training.steps == list(range(1, STEPS + 1))
    # The Trainer of transformers 4 divides a sum of losses by the tokens of the batch: the last bits are others there.
    tolerance = 0.0 if int(transformers.__version__.split(".")[0]) >= 5 else 1e-3
    for ours, theirs in zip(training.model.parameters(), trained.trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 100)
    for number in (1, 2):
        ours, theirs = (load_round(path / "_mates" / f"round-000{number}") for path in (folder, tmp_path))
        np.testing.assert_array_equal(ours.selection, theirs.selection)
        np.testing.assert_allclose(ours.labels.influence, theirs.labels.influence, rtol=10 * tolerance, atol=tolerance)
        assert ours.info["guard"]["decision"] == theirs.info["guard"]["decision"]
        assert ours.info["fidelity"].keys() == theirs.info["fidelity"].keys()
    assert main(["verify", str(folder)]) == 0
    assert main(["round", str(folder / "_mates" / "round-0001")]) == 0
    assert main(["cost", str(folder)]) == 0
    assert "round 2: ok, select" in capsys.readouterr().out
    assert not (folder / "_mates" / LOCK_FILE).exists()


@pytest.mark.quick("5", "6", "8", "11")
@pytest.mark.parametrize("step", [1, 5, 6, 8, 9, 11, 12, 15, 20])
def test_it_resumes_bit_for_bit(tmp_path, whole, step):
    # Before the window, inside it, at the boundary, in the lead, inside the second window, at the end.
    folder, first, saved = whole
    checkpoint = torch.load(saved[step], weights_only=True)
    rest, rounds = Training(tmp_path), make_rounds(folder)
    rest.load(checkpoint["rest"])
    rounds.load_state_dict(checkpoint["rounds"])
    before = {path: path.stat().st_mtime_ns for path in folder.glob("_mates/round-*/round.json")}
    rest.train(rounds)
    assert rest.steps == list(range(step + 1, STEPS + 1))
    assert rest.rows == first.rows[step * BATCH :]
    assert_same_weights(rest.model, first.model)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("_mates/round-*/round.json")} == before


@pytest.mark.slow
def test_a_loop_that_is_left_lets_go_and_a_new_one_continues(tmp_path, whole):
    _, first, _ = whole
    training, rounds, kept = Training(tmp_path), make_rounds(tmp_path), {}

    def save(step: int) -> None:
        if step == 5:  # inside the averaging window
            kept.update(rounds=rounds.state_dict(), rest=torch.load(_saved(tmp_path, training), weights_only=True))

    training.train(rounds, save, stop=7)  # the round of step 6 is under way, beside training
    assert not (tmp_path / "_mates" / LOCK_FILE).exists()
    assert rounds._session is None
    assert (tmp_path / "_mates" / "round-0001").exists()
    with pytest.raises(MatesError, match="left at step 7.*before `break`"):
        rounds.state_dict()
    with pytest.raises(MatesError, match="`order` must be called once"):
        training.order(rounds)
    with pytest.raises(MatesError, match="before `order`"):
        rounds.load_state_dict(kept["rounds"])
    rest, again = Training(tmp_path), make_rounds(tmp_path)
    rest.load(kept["rest"])
    again.load_state_dict(kept["rounds"])
    rest.train(again)
    assert rest.rows == first.rows[5 * BATCH :]
    assert_same_weights(rest.model, first.model)


def _saved(folder: Path, training: Training) -> Path:
    torch.save(training.state(), folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def test_a_loop_that_is_never_asked_or_fails_lets_go(tmp_path):
    training, rounds = Training(tmp_path), make_rounds(tmp_path)
    order = training.order(rounds)
    assert (tmp_path / "_mates" / LOCK_FILE).exists()
    del order
    assert not (tmp_path / "_mates" / LOCK_FILE).exists()
    rounds = make_rounds(tmp_path)
    with pytest.raises(ZeroDivisionError):
        training.train(rounds, lambda step: 1 / 0)
    gc.collect()
    assert not (tmp_path / "_mates" / LOCK_FILE).exists()


def test_passes_in_the_own_order_are_whole_batches_and_a_run_without_rounds_is_told_of(tmp_path, caplog):
    training = Training(tmp_path)
    config, pool = small_config(random_rounds=99), make_pool(10)
    rounds = make_rounds(tmp_path / "a", pool, config)
    training.pool = pool
    states: dict[int, Any] = {}
    training.train(rounds, lambda step: states.update({step: rounds.state_dict()}), max_steps=7)
    assert "No round takes effect" in caplog.text
    assert "the run ends at step 7" in caplog.text
    rows = np.array(training.rows).reshape(7, BATCH)
    for start in (0, 3):  # three steps a pass; the first rows fill the last batch
        one_pass = rows[start : start + 3].ravel().tolist()
        assert sorted(one_pass[:10]) == list(range(10))
        assert one_pass[10:] == one_pass[:2]
    assert rows[:3].tolist() != rows[3:6].tolist()
    for step in (2, 3, 4):
        rest, again = Training(tmp_path), make_rounds(tmp_path / "b", pool, config)
        state = {**states[step], "weights": {}}
        again.load_state_dict(state)
        assert [found.tolist() for _, found in rest.order(again, max_steps=7)] == rows[step:].tolist()


def _other(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(make_model().parameters())


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"max_steps": None}, TypeError, "`max_steps`, the optimizer steps of the whole run"),
        ({"max_steps": 0}, ValueError, "`max_steps` must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.5}, ValueError, "`batch_size` must be a whole number"),
        ({"batch_size": True}, ValueError, "`batch_size` must be a whole number"),
        ({"seed": -1}, ValueError, "`seed` must be a whole number of at least 0"),
        ({"max_grad_norm": -1.0}, ValueError, "`max_grad_norm` must be None or a number of at least 0"),
        ({"max_steps": 900}, ValueError, "largest `max_steps` that fits is"),
        ({"optimizer": _other}, MatesError, "`optimizer` must move the parameters of the `model`"),
        ({"optimizer": lambda model: "adam"}, MatesError, "`optimizer` must be a torch.optim.Optimizer"),
        ({"model": nn.DataParallel}, UnsupportedSettingError, "nn.DataParallel splits a batch"),
        ({"model": lambda model: "llama"}, TypeError, "`model` must be a torch module"),
        (
            {"compute_loss": lambda m, batch: m(**batch).loss * len(batch["labels"])},
            UnsupportedSettingError,
            "be a mean",
        ),
    ],
)
def test_what_is_refused_before_the_first_step_leaves_no_file_and_order_may_be_called_again(
    tmp_path, changes, error, said
):
    training, rounds = Training(tmp_path), make_rounds(tmp_path / "run")
    model = changes.get("model", lambda model: model)(training.model)
    optimizer = changes.get("optimizer", lambda model: training.optimizer)(training.model)
    settings = {"batch_size": BATCH, "max_steps": STEPS, **changes}
    settings.pop("model", None)
    settings.pop("optimizer", None)
    with pytest.raises(error, match=said):
        rounds.order(model, optimizer, **settings)
    assert not (tmp_path / "run").exists()
    training.order(rounds).close()


class Logits(nn.Module):
    """A model without a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return self.inner(input_ids=input_ids).logits


def test_a_loss_that_nobody_knows_is_refused_and_one_that_is_given_is_measured(tmp_path):
    model = Logits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def compute_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        logits = model(batch["input_ids"])
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    rounds, pool = make_rounds(tmp_path), make_pool()
    with pytest.raises(UnsupportedSettingError, match="Logits returns none.*`MatesRounds.order"):
        rounds.order(model, optimizer, batch_size=BATCH, max_steps=10)
    for _, rows in rounds.order(model, optimizer, batch_size=BATCH, max_steps=10, compute_loss=compute_loss):
        compute_loss(model, default_data_collator([pool[int(i)] for i in rows])).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = load_round(tmp_path / "_mates" / "round-0001").info["loss"]
    assert (found["loss"], found["candidates"]) == ("`compute_loss`", "shifted")


def test_a_model_that_does_not_train_is_refused_at_the_first_boundary(tmp_path):
    training, rounds = Training(tmp_path), make_rounds(tmp_path)
    with pytest.raises(MatesError, match=r"none of its weights changed in steps 1 to 6.*`optimizer\.step\(\)` once"):
        for _ in training.order(rounds):
            pass
    assert not (tmp_path / "_mates" / LOCK_FILE).exists()
    assert not list((tmp_path / "_mates").glob("round-*"))


def test_a_model_whose_parameters_were_replaced_is_refused_at_a_boundary(tmp_path):
    training, rounds = Training(tmp_path), make_rounds(tmp_path)

    def swap(step: int) -> None:
        if step == 4:
            training.model.lm_head.weight = nn.Parameter(training.model.lm_head.weight.detach().clone())

    with pytest.raises(MatesError, match="1 of its .* are none of that model's"):
        training.train(rounds, swap)


def test_a_resume_of_another_run_is_refused_by_name(tmp_path, whole, caplog):
    folder, _, saved = whole
    state = torch.load(saved[8], weights_only=True)["rounds"]
    training = Training(tmp_path)
    for change, error, said in (
        ({"version": 1}, MatesError, "must be of version 2, got 1"),
        ({"own_start": None}, ValueError, "which has `own_start`"),
    ):
        bad = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(error, match=said):
            make_rounds(folder).load_state_dict(bad)
    with pytest.raises(TypeError, match="got str"):
        make_rounds(folder).load_state_dict("state")
    for other, said in (
        (make_rounds(folder, config=small_config(switch_lead_steps=3, num_probes=41)), "num_probes: checkpoint 40"),
        (make_rounds(folder, make_pool(401)), "must have the pool it was started with"),
    ):
        other.load_state_dict(state)
        with pytest.raises(RoundMismatchError, match=said):
            training.order(other)
    rounds = make_rounds(folder)
    rounds.load_state_dict(state)
    with pytest.raises(MatesError, match="must resume with the weights of its checkpoint"):
        training.order(rounds)
    training.load({"model": torch.load(saved[8], weights_only=True)["rest"]["model"]})
    with pytest.raises(MatesError, match="order of rows that it was in.*`seed`"):
        training.train(rounds, seed=7)
    rounds = make_rounds(folder)
    rounds.load_state_dict(state)
    training.order(rounds).close()
    assert "the optimizer has none now" in caplog.text


@pytest.mark.slow
def test_with_keep_rounds_the_last_two_checkpoints_can_be_resumed(tmp_path):
    config = small_config(switch_lead_steps=3, keep_rounds=2)
    training, rounds, saved = Training(tmp_path, 40), make_rounds(tmp_path, config=config), {}

    def save(step: int) -> None:
        if step in (5, 11, 23, 29):  # each inside a window
            saved[step] = rounds.state_dict()
            torch.save(training.state(), tmp_path / f"{step}.pt")

    training.train(rounds, save, max_steps=40)
    mates = tmp_path / "_mates"
    assert sorted(path.name for path in mates.glob("round-????")) == [f"round-000{i}" for i in range(2, 7)]
    assert sorted(path.name for path in mates.glob("average-*")) == [
        "average-23.safetensors",
        "average-29.safetensors",
    ]
    for step in (29, 23):
        rest, again = Training(tmp_path, 40), make_rounds(tmp_path, config=config)
        rest.load(torch.load(tmp_path / f"{step}.pt", weights_only=True))
        again.load_state_dict(saved[step])
        rest.train(again, max_steps=40)
        assert rest.rows == training.rows[step * BATCH :]
        assert_same_weights(rest.model, training.model)


def start(folder: Path, size: int, **settings: Any) -> tuple[list[int], list[str], list[Any]]:
    """Exit codes, errors and results of a loop in real processes."""
    port = free_port()
    given = {"output_dir": str(folder / "run"), "result": str(folder / port), **settings}
    processes = start_processes(["tests/training/loop_worker.py", json.dumps(given)], size, port)
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    paths = [folder / f"{port}-{rank}.json" for rank in range(size)]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [process.returncode for process in processes], errors, found


@pytest.mark.slow
def test_two_processes_share_the_batches_of_one_and_go_on_after_a_kill(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    codes, errors, (one,) = start(tmp_path / "one", 1)
    assert codes == [0], errors
    codes, errors, _ = start(tmp_path / "two", 2, kill_at=11)  # inside the averaging window of round 2
    assert codes == [-signal.SIGKILL] * 2, errors
    codes, errors, found = start(tmp_path / "two", 2, resume=11)
    assert codes == [0, 0], errors
    assert found[0] == found[1]
    assert "so that each of the 2 gets as many, got 7. Set it to a multiple of 2" in found[0]["refused"]
    assert found[0]["rows"] == one["rows"][11:]
    assert main(["verify", str(tmp_path / "two" / "run")]) == 0
    codes, errors, (again,) = start(tmp_path / "one", 1, resume=7)
    assert again == {**one, "rows": one["rows"][7:]}


@pytest.mark.slow
def test_weights_that_the_loop_shards_itself_train_on_the_rows_of_one_process(tmp_path):
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("FSDP2 is not public in this torch")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    _, errors, (one,) = start(tmp_path / "one", 1)
    codes, errors, found = start(tmp_path / "two", 2, fsdp2=True)
    assert codes == [0, 0], errors
    assert found[0]["rows"] == found[1]["rows"] == one["rows"]
    assert found[0]["weights"] == pytest.approx(one["weights"], abs=1e-4)  # sums of weights that Adam moved


@pytest.mark.slow
def test_another_batch_size_at_a_resume_goes_on_with_the_next_row(tmp_path, whole):
    folder, first, saved = whole
    shutil.copytree(folder, tmp_path / "run")
    checkpoint = torch.load(saved[10], weights_only=True)
    rest, rounds = Training(tmp_path), make_rounds(tmp_path / "run")
    rest.load(checkpoint["rest"])
    rounds.load_state_dict(checkpoint["rounds"])
    rest.train(rounds, batch_size=2)
    assert rest.steps == list(range(11, STEPS + 1))
    assert rest.rows[:10] == first.rows[40:50]  # up to the selection of step 12, in effect from step 15
    assert verify_run(tmp_path / "run").problem is None
