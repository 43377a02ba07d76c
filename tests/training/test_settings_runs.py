"""What goes on around the steps: data and samplers, evaluation, checkpoints, other callbacks, several trainings."""

from __future__ import annotations

import dataclasses
import json
import types
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from torch.utils.data import SubsetRandomSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from mates_hf import DirectionalProbe
from mates_hf.influence.micro_batches import ProbeMemoryError
from tests.training.kit import OLD_TRAINER, assert_same, make_model, make_pool
from tests.training.settings import (
    FROM_STEP,
    NO_TRACE,
    ORDER,
    STEPS,
    Setup,
    assert_selected,
    case,
    check,
    mates,
    pad,
    proves,
    ragged_pool,
    rounds_of,
)

SAVES = {"save_strategy": "steps", "save_steps": 4}


def evaluates() -> dict[str, Any]:
    return {"eval_dataset": make_pool(8, seed=1)}


# ---- data and samplers


class Texts(torch.utils.data.Dataset):
    """A plain torch dataset of texts."""

    def __init__(self) -> None:
        self.texts = [" ".join(map(str, row)) for row in make_pool(200)["input_ids"]]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict[str, str]:
        return {"text": self.texts[i]}


def tokenise(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[int(word) for word in row["text"].split()] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


class PartTrainer(Trainer):
    """Samples from a part of the pool."""

    def _get_train_sampler(self, train_dataset=None):
        return SubsetRandomSampler(range(0, 200, 2))


def texts() -> Dataset:
    return Dataset.from_dict({"text": Texts().texts})


DATA = [
    case('`train_sampling_strategy="group_by_length"`',
         Setup(args={"train_sampling_strategy": "group_by_length"}, pool=ragged_pool, collator=pad),
         note="the order before the first selection; selected rows are shuffled"),
    case('`train_sampling_strategy="group_by_length"`',
         Setup(args={"train_sampling_strategy": "group_by_length"},
               pool=lambda: ragged_pool(with_lengths=True), collator=pad)),
    case("`dataloader_drop_last`", Setup(args={"dataloader_drop_last": True}, pool=lambda: make_pool(203))),
    case("a last batch that is not full", Setup(pool=lambda: make_pool(203))),
    case("rows of several lengths, padded by the collator", Setup(pool=ragged_pool, collator=pad)),
    case("`remove_unused_columns=False` and a tokenising collator",
         Setup(args={"remove_unused_columns": False}, pool=texts, collator=tokenise)),
    case("a plain torch dataset of texts",
         Setup(args={"remove_unused_columns": False}, pool=Texts, collator=tokenise)),
    case("columns that the model does not take",
         Setup(pool=lambda: make_pool(200).add_column("source", ["web"] * 200))),
    case("a sampler over a part of the pool", Setup(trainer_class=PartTrainer),
         note="selection draws from the whole pool"),
]  # fmt: skip


@pytest.mark.quick("*by-length1", "a-last*", "rows-of*", "remove*", "a-sampler*")
@pytest.mark.parametrize(("setting", "setup"), DATA)
def test_data(tmp_path, setting, setup):
    check(tmp_path, setup)


# ---- evaluation and what is loaded at the end


EVALUATION = [
    case("`eval_on_start`", {"eval_on_start": True}),
    case("evaluation during the run (`eval_strategy`)", {"eval_strategy": "steps", "eval_steps": 2}),
]


@pytest.mark.parametrize(("setting", "args"), EVALUATION)
def test_evaluation(tmp_path, setting, args):
    ours, _ = check(tmp_path, Setup(args=args, trainer=evaluates))
    assert any("eval_loss" in entry for entry in ours.trainer.state.log_history)


@proves("`load_best_model_at_end`", NO_TRACE)
@proves("`load_best_model_at_end`", "the weights at the end are those of the best checkpoint")
def test_load_best_model_at_end(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 2}
    setup = Setup(args={"eval_strategy": "steps", "eval_steps": 4, **SAVES, **best}, trainer=evaluates)
    ours, _ = check(tmp_path, setup)
    from safetensors.torch import load_file

    saved = load_file(f"{ours.trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(ours.weights[name], value) for name, value in saved.items())


# ---- other callbacks


class Saves(TrainerCallback):
    """Asks for a checkpoint that no other callback could know of."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or state.global_step in (5, 7, 10)


class Evaluates(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step in (3, 5, 9)


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 11


OTHERS = "other callbacks, before or after (`EarlyStoppingCallback`, ones that save, evaluate, stop)"


@pytest.mark.slow
@proves(OTHERS, "the order of callbacks changes nothing; checkpoints that only a later one asked for resume exactly")
@proves(OTHERS, ORDER)
def test_other_callbacks_in_any_order(tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss", **SAVES}
    args["load_best_model_at_end"] = True
    setup = Setup(args=args, trainer=evaluates)

    def others():
        return [EarlyStoppingCallback(early_stopping_patience=9), Saves(), Evaluates(), Stops()]

    before = setup.run(tmp_path / "before", [*others(), mates()])
    after = setup.run(tmp_path / "after", [mates(), *others()])
    assert before.rows == after.rows
    assert_same(before, after)
    for result, name in ((before, "before"), (after, "after")):
        assert len(result.rows) == 11 * 4
        record = rounds_of(tmp_path / name)[0]
        assert result.rows[FROM_STEP * 4 :] == np.asarray(record.selection)[: 3 * 4].tolist()
    for step in (4, 5, 7, 10):  # 8 is the one that is loaded at the end
        where = str(tmp_path / "after" / f"checkpoint-{step}")
        rest = setup.run(tmp_path / "after", [mates(), *others()], resume=where)
        assert rest.rows == after.rows[step * 4 :], step


@proves('a checkpoint at an epoch\'s end (`save_strategy="epoch"`)', "resumes exactly")
@proves('a checkpoint at an epoch\'s end (`save_strategy="epoch"`)', ORDER)
@pytest.mark.parametrize(
    ("epoch", "steps", "config"),
    [
        pytest.param(20, 28, {"update_steps": 22, "switch_lead_steps": 2, "num_probes": 20}, id="before-the-round"),
        pytest.param(12, 16, {"update_steps": 10, "switch_lead_steps": 3, "num_probes": 10}, id="in-the-lead"),
    ],
)
def test_a_checkpoint_at_an_epochs_end(tmp_path, epoch, steps, config):
    setup = Setup(pool=lambda: make_pool(epoch * 4), args={"save_strategy": "epoch", "max_steps": steps})
    whole = setup.run(tmp_path, [mates(**config)])
    (record,) = rounds_of(tmp_path)
    assert whole.rows[record.info["from_position"] :] == np.asarray(record.selection).tolist()
    assert len(whole.rows) == steps * 4
    assert np.isfinite(record.labels.influence).all()
    rest = setup.run(tmp_path, [mates(**config)], resume=str(tmp_path / f"checkpoint-{epoch}"))
    assert rest.rows == whole.rows[epoch * 4 :]
    assert rest.losses == whole.losses


# ---- resuming


RESUME = [
    case("`ignore_data_skip`", {"ignore_data_skip": True}, what="rows go on where the checkpoint stopped"),
    case("`restore_callback_states_from_checkpoint`", {"restore_callback_states_from_checkpoint": True},
         what="resumes exactly"),
    case("`save_only_model`", {"save_only_model": True}, what="rows go on where the checkpoint stopped",
         note="the optimizer starts afresh, so later rounds select otherwise"),
]  # fmt: skip


@pytest.mark.quick("ignore*")
@pytest.mark.parametrize(("setting", "args"), RESUME)
def test_resume(tmp_path, setting, args):
    setup = Setup(args=SAVES)
    whole = setup.run(tmp_path / "whole", [mates()])
    assert_selected(whole, tmp_path / "whole")
    changed = dataclasses.replace(setup, args={**SAVES, **args})
    part = changed.run(tmp_path / "part", [mates()])
    assert part.rows == whole.rows
    for step in (8, 4):  # the later one first: going on from the earlier one writes the later anew
        rest = changed.run(tmp_path / "part", [mates()], resume=str(tmp_path / "part" / f"checkpoint-{step}"))
        # Without the optimizer's state the round after step 5 selects otherwise.
        until = FROM_STEP if setting == "`save_only_model`" and step < 5 else STEPS
        assert rest.rows[: (until - step) * 4] == whole.rows[step * 4 : until * 4]


# ---- several trainings


@proves("a second `train()` on the same Trainer", ORDER, note="earlier rounds are set aside as `.stale`")
@proves("a second `train()` on the same Trainer", "its first round is in the Trainer's own order again")
def test_a_second_train(tmp_path):
    trainer = Setup().build(tmp_path, [mates()])
    loader = trainer.get_train_dataloader()
    for time in (1, 2):
        trainer.seen_rows = []
        trainer.train()
        assert_selected(types.SimpleNamespace(rows=trainer.seen_rows), tmp_path)
        assert len(set(trainer.seen_rows)) == STEPS * 4, time
    assert len(list((tmp_path / "_mates").glob("round-0001.stale*"))) == 1
    assert type(loader.get_sampler()).__name__ == "SeedableRandomSampler"


class OneLoader(Trainer):
    """Makes its dataloader once and keeps it."""

    def get_train_dataloader(self):
        self.loader = getattr(self, "loader", None) or super().get_train_dataloader()
        return self.loader


@proves("a Trainer that keeps its dataloader", ORDER)
@proves("a Trainer that keeps its dataloader", "the dataloader has its own sampler again after training")
def test_a_dataloader_that_is_kept(tmp_path):
    trainer = Setup(trainer_class=OneLoader).build(tmp_path, [mates()])
    own = trainer.get_train_dataloader().get_sampler()
    for _ in range(2):
        trainer.seen_rows = []
        trainer.train()
        assert_selected(types.SimpleNamespace(rows=trainer.seen_rows), tmp_path)
        assert trainer.get_train_dataloader().get_sampler() is own


class Trial(dict):
    """Hyperparameters, and what the Trainer asks of an optuna trial."""

    def __init__(self, number: int, **values: float) -> None:
        super().__init__(values)
        self.number, self.params = number, values


@proves("`hyperparameter_search`", ORDER)
@proves("`hyperparameter_search`", "each trial selects with its own rounds; equal trials are equal to the bit",
        note="tested with a backend made by hand; each trial has a folder in `_mates`")  # fmt: skip
def test_hyperparameter_search(tmp_path, monkeypatch):
    from transformers import hyperparameter_search
    from transformers.trainer_utils import BestRun, HPSearchBackend

    trials: list[Any] = []

    class ByHand(hyperparameter_search.HyperParamSearchBackendBase):
        name, pip_package = "optuna", "optuna"

        @staticmethod
        def is_available():
            return True

        def run(self, trainer, n_trials, direction, **kwargs):
            for number, rate in enumerate((1e-3, 3e-3, 1e-3)):
                trainer.seen_rows = []
                trainer.train(trial=Trial(number, learning_rate=rate))
                trial_dir = tmp_path / f"trial-{number}"
                trial_dir.mkdir()
                (tmp_path / "_mates" / f"run-{number}").rename(trial_dir / "_mates")
                record = assert_selected(types.SimpleNamespace(rows=trainer.seen_rows), trial_dir)
                trials.append((trainer.seen_rows, record.labels.influence))
            return BestRun("0", 0.0, {})

        def default_hp_space(self, trial):
            return dict(trial)

    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # it knows the classes of backends alone
    monkeypatch.setitem(hyperparameter_search.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, ByHand)
    setup = Setup(trainer=lambda: {"model_init": lambda: make_model(), **evaluates()})
    trainer = setup.build(tmp_path, [mates()])
    trainer.hyperparameter_search(backend="optuna", n_trials=3)
    assert len(trials) == 3
    assert not list((tmp_path / "_mates").iterdir())
    assert trials[0][0] == trials[2][0]
    assert np.array_equal(trials[0][1], trials[2][1])
    assert not np.array_equal(trials[0][1], trials[1][1])


# ---- memory


class SmallMemory(Trainer):
    """Runs out of memory in a step with more than 4 rows."""

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 4 and self.state.global_step >= 6:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().training_step(model, inputs, *args, **kwargs)


AUTO = "`auto_find_batch_size`"


@proves(AUTO, ORDER)
@proves(AUTO, "training starts again with a smaller batch, and so do the rounds", note="after a round has run, too")
def test_auto_find_batch_size(tmp_path):
    setup = Setup(
        args={"auto_find_batch_size": True, "per_device_train_batch_size": 5},
        trainer_class=SmallMemory, pool=lambda: make_pool(240),
    )  # fmt: skip
    result = setup.run(tmp_path, [mates()])
    assert result.trainer._train_batch_size == 4
    last_try = types.SimpleNamespace(rows=result.rows[-STEPS * 4 :])
    assert assert_selected(last_try, tmp_path).info["from_position"] == FROM_STEP * 4
    assert (tmp_path / "_mates" / "round-0001.stale").exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hungry(DirectionalProbe):
    def measure(self, model, optimizer, reference, candidates):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@proves(AUTO, "a probe's own lack of memory ends the run by name, and never starts it again")
def test_a_probes_lack_of_memory_is_not_the_runs(tmp_path):
    setup = Setup(args={"auto_find_batch_size": True})
    trainer = setup.build(tmp_path, [mates(probe=Hungry())])
    with pytest.raises(ProbeMemoryError, match="probe_tokens_per_batch"):
        trainer.train()
    assert trainer._train_batch_size == 4
    assert len(trainer.seen_rows) == 5 * 4  # the first try, up to the round


# ---- the hub


class Hub:
    """Takes down what would be uploaded."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        return types.SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path, ignore_patterns=None, path_in_repo="", **kwargs: Any) -> Any:
        from pathlib import Path

        folder = Path(folder_path)
        paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        kept = list(filter_repo_objects(paths, ignore_patterns=ignore_patterns))
        for path in kept:
            if path.endswith(".json"):
                json.loads((folder / path).read_text())
        self.files += [f"{path_in_repo}/{path}" for path in kept]
        return types.SimpleNamespace(is_done=lambda: True, wait_until_done=lambda: None, done=lambda: True)


@pytest.mark.quick("checkpoint")
@proves("`push_to_hub`", ORDER)
@proves("`push_to_hub`", "nothing of `_mates` is in the list of uploaded files, with any `hub_strategy`")
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_push_to_hub(tmp_path, monkeypatch, strategy):
    hub = Hub()
    if OLD_TRAINER:
        monkeypatch.setattr("transformers.trainer.create_repo", hub.create_repo)
        monkeypatch.setattr("transformers.trainer.upload_folder", hub.upload_folder)
    else:
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.trainer.Trainer.create_model_card", lambda self, **kwargs: None)
    setup = Setup(args={"push_to_hub": True, "hub_model_id": "me/model", "hub_strategy": strategy, **SAVES})
    result = setup.run(tmp_path, [mates()])
    assert_selected(result, tmp_path)
    result.trainer.push_to_hub()
    assert "/model.safetensors" in hub.files
    assert (tmp_path / "_mates" / "round-0001" / "probes.parquet").exists()
    uploaded = [path for path in hub.files if "_mates" in path or "parquet" in path or "round-" in path]
    assert uploaded == []
    assert any("checkpoint" in path for path in hub.files) is ("checkpoint" in strategy)
