"""`LmEvalCallback`: training does not notice it, metrics arrive, and what cannot work is told before any step."""

from __future__ import annotations

import copy
import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from mates_hf import MatesCallback, ReferenceTask
from mates_hf.errors import EvaluationError
from mates_hf.evaluation import Evaluator, LmEvalCallback
from tests.evaluation.kit import LENGTH, make_model, make_pool, make_tokenizer, text, write_local
from tests.training.kit import Stop, make_arguments, small_config

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["mates_sciq_local", "mates_winogrande_local", "mates_lambada_all_tokens_local"]


def make_reference() -> ReferenceTask:
    rows = [{"input_ids": make_tokenizer().encode(text(i, 9))[:LENGTH]} for i in range(16)]
    return ReferenceTask.from_dataset(Dataset.from_list(rows), input_ids_column="input_ids")


@pytest.fixture
def make_callback(tmp_path):
    folder = write_local(tmp_path / "data")

    def build(**arguments: Any) -> LmEvalCallback:
        settings = {"every_steps": 4, "limit": 4, "metadata": {"data_dir": str(folder)}, **arguments}
        return LmEvalCallback(settings.pop("tasks", TASKS), settings.pop("tokenizer", make_tokenizer()), **settings)

    return build


def train(
    output_dir: Path, callbacks: list[TrainerCallback], *, model: Any = None, resume: Any = None, **args: Any
) -> Trainer:
    model = model or make_model(double=False, attention_dropout=0.1)
    settings = {"max_steps": 10, "dataloader_num_workers": 0, **args}
    trainer = Trainer(
        model=model, args=make_arguments(output_dir, **settings), train_dataset=make_pool(), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Streams(TrainerCallback):
    """All random streams, and the mode and gradients of the model, at each step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        modes = [module.training for module in kwargs["model"].modules()]
        drawn = copy.deepcopy(random.getstate())
        self.seen.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), drawn, modes))  # noqa: NPY002


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def evaluations(trainer: Trainer) -> dict[int, dict[str, float]]:
    found = {}
    for entry in trainer.state.log_history:
        if any(name.startswith("lm_eval/") for name in entry):
            assert entry["step"] not in found
            found[entry["step"]] = entry
    return found


@pytest.mark.parametrize("with_mates", [False, True], ids=["alone", "with MatesCallback"])
def test_training_is_bit_identical_with_dropout_on(tmp_path, make_callback, with_mates) -> None:
    runs = []
    for name, added in (("without", []), ("with", [make_callback()])):
        streams = Streams()
        mates = [MatesCallback(make_reference(), small_config(update_steps=4, average_steps=3))] if with_mates else []
        runs.append((train(tmp_path / name, [*mates, *added, streams], save_strategy="steps", save_steps=5), streams))
    (plain, plain_streams), (watched, streams) = runs
    assert losses(watched) == losses(plain)
    assert len(set(losses(plain))) > 5
    assert streams.seen == plain_streams.seen
    for name, value in plain.model.state_dict().items():
        assert torch.equal(watched.model.state_dict()[name], value), name
    ours, theirs = (run.optimizer.state_dict()["state"] for run in (watched, plain))
    for key, state in theirs.items():
        assert all(torch.equal(ours[key][name], value) for name, value in state.items())
    assert sorted(evaluations(watched)) == [4, 8, 10]
    assert not evaluations(plain)


def test_dropout_is_felt_without_the_guard(tmp_path, make_callback, monkeypatch) -> None:
    """The test above can fail: an evaluation that leaves the mode or the streams changed is seen by it."""
    import contextlib

    from mates_hf.evaluation import evaluator

    plain = losses(train(tmp_path / "plain", []))

    @contextlib.contextmanager
    def careless(model: torch.nn.Module) -> Any:
        torch.rand(1)
        yield
        model.train()

    monkeypatch.setattr(evaluator, "undisturbed", careless)
    assert losses(train(tmp_path / "careless", [make_callback()])) != plain


def test_metrics_are_those_of_the_checkpoint_of_the_step(tmp_path, make_callback) -> None:
    trainer = train(tmp_path / "run", [make_callback()], save_strategy="steps", save_steps=4)
    at = evaluations(trainer)
    for step in (4, 8):
        saved = type(trainer.model).from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        found = Evaluator(TASKS, make_tokenizer(), limit=4, metadata={"data_dir": str(tmp_path / "data")}).run(saved)
        assert {f"lm_eval/{name}": value for name, value in found.items()} == {
            name: value
            for name, value in at[step].items()
            if name.startswith("lm_eval/") and name not in ("lm_eval/seconds", "lm_eval/tokens")
        }
    names = {name.removeprefix("lm_eval/") for name in at[4] if name.startswith("lm_eval/")}
    assert {"mates_sciq_local/accuracy", "mates_winogrande_local/choice_prob"} <= names
    assert "mates_lambada_all_tokens_local/bits_per_byte" in names
    assert not any("stderr" in name for name in names)
    assert at[4] != at[8]


@pytest.mark.parametrize("evaluates_first", [True, False])
def test_without_every_steps_it_follows_the_rounds(tmp_path, make_callback, evaluates_first) -> None:
    mates = MatesCallback(make_reference(), small_config(update_steps=4))
    callback = make_callback(every_steps=None)
    order = [callback, mates] if evaluates_first else [mates, callback]
    trainer = train(tmp_path, order, max_steps=14)
    rounds = [
        entry["step"] for entry in trainer.state.log_history if "mates/round" in entry or "mates/spearman" in entry
    ]
    assert rounds
    assert sorted(evaluations(trainer)) == sorted({*rounds, 14})


def test_without_rounds_it_evaluates_at_the_end(tmp_path, make_callback) -> None:
    assert list(evaluations(train(tmp_path, [make_callback(every_steps=None)]))) == [10]


def test_an_early_stop_is_evaluated(tmp_path, make_callback) -> None:
    assert list(evaluations(train(tmp_path, [make_callback(every_steps=5), Stop(7)]))) == [5, 7]


def test_a_resumed_run_has_the_same_metrics_and_repeats_none(tmp_path, make_callback) -> None:
    whole = train(tmp_path / "whole", [make_callback()], save_strategy="steps", save_steps=4)
    train(tmp_path / "run", [make_callback(), Stop(4)], save_strategy="steps", save_steps=4)
    resumed = train(tmp_path / "run", [make_callback()], save_strategy="steps", save_steps=4, resume=True)
    seconds = "lm_eval/seconds"
    for step, entry in evaluations(whole).items():
        again = evaluations(resumed)[step]
        assert {k: v for k, v in again.items() if k != seconds} == {k: v for k, v in entry.items() if k != seconds}
    assert sorted(evaluations(resumed)) == sorted(evaluations(whole))


@pytest.mark.parametrize("attach", [False, True])
def test_metrics_reach_reporters_and_attach_adds_it_once(tmp_path, make_callback, attach: bool) -> None:
    seen: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    callback = make_callback()
    trainer = Trainer(
        model=make_model(double=False),
        args=make_arguments(tmp_path, max_steps=4),
        train_dataset=make_pool(),
        callbacks=[Reporter()] if attach else [Reporter(), callback],
    )
    if attach:
        assert callback.attach(trainer) is callback
        callback.attach(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert [entry for entry in seen if "lm_eval/mates_sciq_local/accuracy" in entry]


def test_the_callers_tokenizer_and_model_stay_as_they_are(tmp_path, make_callback) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    before = copy.deepcopy(tokenizer.init_kwargs)
    model = make_model(double=False)
    model.model.layers[0].eval()  # a part that the user keeps in evaluation mode
    modes = []

    class Modes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            modes.append([module.training for module in kwargs["model"].modules()])

    control = train(tmp_path / "control", [], model=make_model(double=False)).model.config.to_dict()
    level = logging.getLogger("lm_eval").level
    train(tmp_path / "run", [make_callback(tokenizer=tokenizer), Modes()], model=model)
    assert tokenizer.pad_token is None
    assert tokenizer.init_kwargs == before
    assert model.config.to_dict() == control
    assert logging.getLogger("lm_eval").level == level


def test_a_reference_that_is_evaluated_too_is_told(tmp_path, make_callback, caplog) -> None:
    metadata = {"data_dir": str(tmp_path / "data")}
    callback = make_callback(tasks=["mates_sciq_local", "mates_piqa_local"])
    short = {"question": "Why?", "choices": ["It rains.", "It snows."], "label": 0}
    (tmp_path / "data" / "piqa" / "validation.jsonl").write_text(json.dumps(short))
    reference = ReferenceTask.from_lm_eval("mates_sciq_local", make_tokenizer(), metadata=metadata, max_length=512)
    trainer = Trainer(
        model=make_model(double=False),
        args=make_arguments(tmp_path / "run", max_steps=10),
        train_dataset=make_pool(),
        callbacks=[MatesCallback(reference, small_config(update_steps=4))],
    )
    callback.attach(trainer)
    with caplog.at_level(logging.WARNING, "mates_hf"):
        trainer.train()
    told = " ".join(record.getMessage() for record in caplog.records if "mates_hf.evaluation" in record.name)
    assert "The reference task is also evaluated, as `mates_sciq_local`" in told
    assert "1 of 1 texts of `mates_piqa_local` have fewer than 13 words, so what holds them cannot be told." in told


def no_step(tmp_path: Path, callback: LmEvalCallback, error: type[Exception], match: str, model: Any = None) -> None:
    """The error comes before the first step."""
    streams = Streams()
    with pytest.raises(error, match=match):
        train(tmp_path / "run", [callback, streams], model=model)
    assert not streams.seen


def test_what_cannot_work_is_told_before_the_first_step(tmp_path, make_callback) -> None:
    no_step(tmp_path, make_callback(metadata={"data_dir": str(tmp_path)}), FileNotFoundError, "sciq/<split>.jsonl")
    no_step(tmp_path, make_callback(metadata=None), ValueError, "data_dir")
    wrong_split = {"data_dir": str(tmp_path / "data"), "split": "test"}
    no_step(tmp_path, make_callback(metadata=wrong_split), ValueError, r"it has \['validation'\]")
    file = tmp_path / "data" / "sciq" / "validation.jsonl"
    kept = file.read_text()
    file.write_text('{"question": "q", "choices": ["a", "b"], "label": 0}\n')
    no_step(tmp_path, make_callback(), ValueError, r"line 1 must have \['context'\]")
    file.write_text(kept)
    short = make_model(double=False, max_position_embeddings=32)
    no_step(tmp_path, make_callback(), EvaluationError, "longer than the model's context of 32 tokens", short)
    small = make_model(double=False, vocab_size=100)
    no_step(tmp_path, make_callback(), ValueError, "below the model's 100", small)
    broken = make_model(double=False)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    no_step(tmp_path, make_callback(), EvaluationError, "log-likelihoods are NaN", broken)


@pytest.mark.slow  # lm-eval's own index of several thousand files is read
def test_an_unknown_task_is_told_with_those_that_are_close(tmp_path, make_callback) -> None:
    no_step(tmp_path, make_callback(tasks="mates_zero_shott"), ValueError, "Close: mates_zero_shot")
    no_step(tmp_path, make_callback(tasks="gsm8k_cot_zeroshott"), ValueError, "Close: gsm8k_cot_zeroshot")


def test_a_model_that_turns_nan_is_told_at_its_step(tmp_path, make_callback) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                with torch.no_grad():
                    kwargs["model"].lm_head.weight[5] = float("nan")

    with pytest.raises(EvaluationError, match="NaN"):
        train(tmp_path, [Break(), make_callback()])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"every_steps": 0}, "`every_steps`"),
        ({"limit": 0}, "`limit`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"tasks": []}, "`tasks`"),
        ({"tokenizer": make_tokenizer(eos_token=None)}, "`tokenizer` must have an end token"),
        ({"tokenizer": "gpt2"}, "`tokenizer` must be the model's tokenizer, got str"),
        ({"tasks": ["no/such/file.yaml"]}, "existing file"),
    ],
)
def test_arguments_are_checked(tmp_path, make_callback, arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        train(tmp_path, [make_callback(**arguments)])


def test_generated_answers_are_refused(tmp_path, make_callback) -> None:
    task = {
        "task": "told",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data" / "sciq" / "validation.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_target": "context",
        "generation_kwargs": {"until": ["\n"]},
    }
    no_step(tmp_path, make_callback(tasks=[task]), EvaluationError, "answers of `told` are generated")


def test_out_of_memory_is_told_and_does_not_start_the_run_again(tmp_path, make_callback) -> None:
    model = make_model(double=False)

    def full(module: Any, args: Any, kwargs: Any) -> None:
        if not module.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.register_forward_pre_hook(full, with_kwargs=True)
    no_step(tmp_path, make_callback(), EvaluationError, "Lower `batch_size`", model)


@pytest.mark.slow
def test_the_module_is_imported_without_lm_eval() -> None:
    code = "import sys; from mates_hf.evaluation import LmEvalCallback; print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    hidden = (
        "import sys; sys.modules['lm_eval'] = None\nfrom mates_hf.evaluation import LmEvalCallback\n"
        "try:\n    LmEvalCallback('x', None)\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'pip install "mates-hf[eval]"' in done.stdout
