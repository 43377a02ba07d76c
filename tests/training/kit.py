"""What the training tests share: a pool whose rows carry their number, a small model, a run that is watched."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from mates_hf.config import MatesConfig
from mates_hf.data.reference import ReferenceTask
from mates_hf.influence import micro_batches, output_head, passes
from mates_hf.influence.probe_directional import DirectionalProbe

OLD_TRAINER = transformers.__version__.startswith("4.")
OLD_DATASETS = int(datasets.__version__.split(".")[0]) < 4
VOCAB = 64
DIGITS = 32  # the first two tokens of a row are its number in this base
LENGTH = 12


def make_pool(num_rows: int = 400, seed: int = 0) -> Dataset:
    """Rows of one length; the last tokens of every third row count up, as the reference does."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        body = rng.integers(32, VOCAB, LENGTH - 2)
        if i % 3 == 0:
            body = 32 + (rng.integers(0, 8) + np.arange(LENGTH - 2)) % 8
        rows.append([i // DIGITS, i % DIGITS, *body.tolist()])
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def make_reference(num: int = 24) -> ReferenceTask:
    rows = [(32 + (i + np.arange(LENGTH)) % 8).tolist() for i in range(num)]
    return ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": rows}), input_ids_column="input_ids")


def make_model(seed: int = 0, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


def small_config(**changes: Any) -> MatesConfig:
    settings: dict[str, Any] = {
        "update_steps": 6, "first_round_steps": None, "num_probes": 40, "selection_ratio": 0.5, "random_share": 0.0,
        "on_weak_signal": "select", "max_passes": 1,
    }  # fmt: skip
    return MatesConfig(**{**settings, **changes})


def make_arguments(output_dir: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    unknown = changes.keys() - TrainingArguments.__dataclass_fields__.keys()
    if unknown and OLD_TRAINER:  # in the newest one it is a mistake
        pytest.skip(f"transformers {transformers.__version__} has no {', '.join(sorted(unknown))}")
    return TrainingArguments(output_dir=str(output_dir), **{**settings, **changes})


class Watch(TrainerCallback):
    """Rows trained on, in order, and the random streams seen at each step."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.streams: list[int] = []

    def watch(self, model: torch.nn.Module) -> None:
        def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                ids = kwargs["input_ids"]
                self.rows.extend((ids[:, 0] * DIGITS + ids[:, 1]).tolist())

        model.register_forward_pre_hook(see, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.streams.append(int(torch.get_rng_state().sum()))


class Stop(TrainerCallback):
    """Ends training after a step, as a job's time limit does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@functools.cache
def leave_modules_to_themselves() -> None:
    """Each `train()` collects garbage; going through all that is imported would take longer than these runs."""
    gc.collect()
    gc.freeze()


class Result:
    """A finished run: its Trainer, the rows it trained on, its losses."""

    def __init__(self, trainer: Trainer, watch: Watch) -> None:
        self.trainer = trainer
        self.rows = watch.rows
        self.streams = watch.streams
        self.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        self.optimizer = trainer.optimizer.state_dict()


def run(
    args: TrainingArguments,
    callbacks: list[TrainerCallback],
    pool: Any = None,
    *,
    resume: str | bool | None = None,
    dropout: float = 0.0,
    attach: bool = False,
    collator: Any = default_data_collator,
    prepare: Callable[[Trainer], None] = lambda trainer: None,
) -> Result:
    """Train the small model and watch it; `prepare` is given the Trainer before it trains."""
    leave_modules_to_themselves()
    watch = Watch()
    model = make_model(dropout=dropout)
    watch.watch(model)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=make_pool() if pool is None else pool,
        data_collator=collator,
        callbacks=[*callbacks, watch],
    )
    if attach:
        callbacks[0].attach(trainer)
    prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return Result(trainer, watch)


def assert_same(a: Result, b: Result) -> None:
    """Bit-identical weights, optimizer state, losses and random streams."""
    assert a.losses == b.losses
    assert a.streams == b.streams
    for name, value in a.weights.items():
        assert torch.equal(value, b.weights[name]), name
    for one, other in zip(a.optimizer["state"].values(), b.optimizer["state"].values(), strict=True):
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def labels_in_chunks(model: Any, optimizer: Any, processes: Any) -> tuple[list[float], list[float]]:
    """Labels without chunks of the output head, and with; far from the present weights, so that rounding is small."""
    rates = tuple(3e-3 for _ in optimizer.param_groups)  # a schedule ends at 0
    probe = DirectionalProbe(processes=processes, path_steps=3, epsilon=3e-2, learning_rates=rates, progress=False)

    def measured() -> list[float]:
        return probe.measure(model, optimizer, make_reference(), make_pool(48)).influence.tolist()

    whole = measured()
    limits = [(micro_batches, "_MAX_LOGITS_BYTES_CPU", 1), (output_head, "CHUNK_BYTES_CPU", 4 * VOCAB * 5)]
    before = [getattr(module, name) for module, name, _ in limits]
    for module, name, value in limits:
        setattr(module, name, value)
    plain, passes.logits_of_batch = passes.logits_of_batch, None  # type: ignore[assignment]  # all logits never exist
    try:
        return whole, measured()
    finally:
        passes.logits_of_batch = plain
        for (module, name, _), value in zip(limits, before, strict=True):
            setattr(module, name, value)
