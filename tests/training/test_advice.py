"""What a run is refused for before its first step, and each way out that the error names: the run then starts.

Refusals that have such a test of their own are not here: packed rows, DeepSpeed, small pools, streams, whole rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer, default_data_collator

from mates_hf import MatesCallback, MatesConfig, MatesRounds, MatesStream, ReferenceTask
from tests.training.kit import (
    DIGITS,
    LENGTH,
    OLD_DATASETS,
    OLD_TRAINER,
    VOCAB,
    Stop,
    make_arguments,
    make_model,
    make_pool,
    make_reference,
    small_config,
)


class Replaced(Trainer):
    """Samples with replacement."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return RandomSampler(self.train_dataset, replacement=True)


class PlainLoader(Trainer):
    """Has a dataloader that accelerate has not prepared."""

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=4, shuffle=True, collate_fn=self.data_collator)


class OwnBatches(Trainer):
    """Makes batches without a sampler."""

    def get_train_dataloader(self) -> Any:
        batches = [list(range(start, start + 4)) for start in range(0, 400, 4)]
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def evaluated(split: str | None) -> ReferenceTask:
    """A task as lm-eval describes one, made of a split."""
    return dataclasses.replace(make_reference(), description={"split": split})


def streamed() -> Any:
    return make_pool().to_iterable_dataset()


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run, as far as it is not the usual one."""

    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    pool: Callable[[], Any] = make_pool
    reference: Callable[[], ReferenceTask] = make_reference
    trainer: type[Trainer] = Trainer
    vocabulary: int = VOCAB
    num_callbacks: int = 1

    def start(self, folder: Path) -> None:
        """Train a step."""
        model = make_model()
        if self.vocabulary != VOCAB:
            model.resize_token_embeddings(self.vocabulary)
        config = small_config(**self.config)
        callbacks = [MatesCallback(self.reference(), config) for _ in range(self.num_callbacks)]
        trainer = self.trainer(
            model=model, args=make_arguments(folder, **self.args), train_dataset=self.pool(),
            data_collator=default_data_collator, callbacks=[Stop(1)],
        )  # fmt: skip
        for callback in callbacks:
            callback.attach(trainer)
        trainer.train()
        assert trainer.state.global_step == 1


def other_vocabulary() -> Dataset:
    rows = np.tile(np.arange(LENGTH), (400, 1))
    rows[:, 0], rows[:, 1], rows[:, 5] = np.arange(400) // DIGITS, np.arange(400) % DIGITS, VOCAB + 3
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


ONE_ROW = {"per_device_train_batch_size": 1}
PASSAGES = {"reference_passes": 1}
CASES: dict[str, tuple[Setup, str, list[Setup]]] = {
    "one row a step": (
        Setup(args=ONE_ROW, config=PASSAGES),
        "must have 2 rows at least",
        [
            Setup(args={"per_device_train_batch_size": 2}, config=PASSAGES),
            Setup(args={**ONE_ROW, "gradient_accumulation_steps": 2}, config=PASSAGES),
            Setup(args=ONE_ROW, config={"reference_passes": 0}),
        ],
    ),
    "passages that are evaluated": (
        Setup(config=PASSAGES, reference=lambda: evaluated("test")),
        "which lm-eval evaluates",
        [
            Setup(config=PASSAGES, reference=lambda: evaluated("train")),
            Setup(config=PASSAGES),
            Setup(config={"reference_passes": 0}, reference=lambda: evaluated("test")),
        ],
    ),
    "a stream": (Setup(pool=streamed), "must be wrapped", [Setup(pool=lambda: MatesStream(streamed(), 64))]),
    "batches that one process reads": (
        Setup(args={"accelerator_config": {"dispatch_batches": True}}),
        "dispatch_batches",
        [Setup(args={"accelerator_config": {"dispatch_batches": False}})],
    ),
    "workers out of order": (
        Setup(args={"dataloader_in_order": False}), "in_order", [Setup(args={"dataloader_in_order": True})],
    ),
    "another strategy": (
        Setup(args={"train_sampling_strategy": "batch_rebalance"}),
        "batch_rebalance",
        [Setup(args={"train_sampling_strategy": name}) for name in ("random", "sequential")],
    ),
    "a loader that was not prepared": (Setup(trainer=PlainLoader), "no `set_sampler`", [Setup()]),
    "batches without a sampler": (Setup(trainer=OwnBatches), "no sampler that could be replaced", [Setup()]),
    "a sampler with replacement": (Setup(trainer=Replaced), "with replacement", [Setup()]),
    "two callbacks": (Setup(num_callbacks=2), "must have one MatesCallback", [Setup()]),
    "a lead that is too short": (
        Setup(args={"dataloader_num_workers": 2}, config={"switch_lead_steps": 2}),
        "Set `switch_lead_steps=5`",
        [
            Setup(args={"dataloader_num_workers": 2}, config={"switch_lead_steps": 5}),
            Setup(args={"dataloader_num_workers": 0}, config={"switch_lead_steps": 2}),
            Setup(
                args={"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}, config={"switch_lead_steps": 2}
            ),
        ],
    ),
    "tokens of another vocabulary": (
        Setup(pool=other_vocabulary),
        "the embedding was not resized",
        [Setup(pool=other_vocabulary, vocabulary=VOCAB + 4), Setup()],
    ),
}  # fmt: skip
NEW = ("another strategy",)  # settings that old versions of transformers do not have


@pytest.mark.parametrize("name", CASES)
def test_each_way_out_starts(tmp_path: Path, name: str) -> None:
    refused, match, ways = CASES[name]
    if OLD_TRAINER and name in NEW:
        pytest.skip("this transformers has no such setting")
    if OLD_DATASETS and name == "a stream":
        pytest.skip("streams need datasets 4.0")
    with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
        refused.start(tmp_path / "refused")
    for number, way in enumerate(ways):
        way.start(tmp_path / str(number))


def test_a_loop_takes_the_ways_out_of_its_numbers(tmp_path: Path) -> None:
    pool, model = make_pool(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rounds = MatesRounds(make_reference(), pool, MatesConfig(update_steps=6, num_probes=40), output_dir=tmp_path)
    with pytest.raises(TypeError, match=r"math.ceil\(len\(pool\) / batch_size\)"):
        next(iter(rounds.order(model, optimizer, batch_size=4)))
    step, rows = next(iter(rounds.order(model, optimizer, batch_size=4, max_steps=-(-len(pool) // 4))))
    assert (step, len(rows)) == (1, 4)
