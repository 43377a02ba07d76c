"""What a run is refused for before its first step, and each way out that the error names: the run then starts.

Refusals that have such a test of their own are not here: packed rows, DeepSpeed, small pools, streams, whole rows.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import (
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from mates_hf import MatesCallback, MatesConfig, MatesError, MatesRounds, MatesStream, ReferenceTask
from tests.launch import run_script
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
from tests.training.settings import FullyShardedDataParallel, OwnBatches, PlainLoader, Replaced, Stateful


class Elsewhere(Trainer):
    """Has a dataloader that keeps its dataset where nothing but itself looks."""

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        holder = loader if "dataset" in vars(loader) else loader.base_dataloader
        kept = vars(holder).pop("dataset")
        holder.__class__ = type("Keeping", (type(holder),), {"dataset": property(lambda self: kept)})
        return loader


class Offloading(TrainerCallback):
    """Leaves a weight without values, as `device_map` does."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.extra = nn.Linear(2, 2, device="meta")


def extended(extra: Callable[[], nn.Module]) -> nn.Module:
    """A model that has another module, of which its forward pass knows nothing."""
    model = make_model()
    model.extra = extra()
    return model


def in_fp8() -> nn.Module:
    """A layer of TransformerEngine, as far as its name and its place tell."""
    return type("Linear", (nn.Linear,), {"__module__": "transformer_engine.pytorch.module.linear"})(2, 2)


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
    model: Callable[[], nn.Module] = make_model
    vocabulary: int = VOCAB
    before: type[TrainerCallback] = TrainerCallback
    num_callbacks: int = 1

    def start(self, folder: Path) -> None:
        """Train a step."""
        model: Any = self.model()
        if self.vocabulary != VOCAB:
            model.resize_token_embeddings(self.vocabulary)
        config = small_config(**self.config)
        callbacks = [MatesCallback(self.reference(), config) for _ in range(self.num_callbacks)]
        trainer = self.trainer(
            model=model, args=make_arguments(folder, **self.args), train_dataset=self.pool(),
            data_collator=default_data_collator, callbacks=[self.before(), Stop(1)],
        )  # fmt: skip
        for callback in callbacks:
            callback.attach(trainer)
        trainer.train()
        assert trainer.state.global_step == 1


def other_vocabulary() -> Dataset:
    rows = np.tile(np.arange(LENGTH), (400, 1))
    rows[:, 0], rows[:, 1], rows[:, 5] = np.arange(400) // DIGITS, np.arange(400) % DIGITS, VOCAB + 3
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


def classified() -> Dataset:
    return make_pool().remove_columns("labels").add_column("labels", [i % 2 for i in range(400)])


def classified_reference() -> ReferenceTask:
    return ReferenceTask.from_examples(classified().select(range(24)))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    config: Any = make_model().config
    config.pad_token_id, config.num_labels = 0, 2
    return LlamaForSequenceClassification(config)


def pairing() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))


def completions() -> Dataset:
    """Passages of which a part is given and the rest is asked for."""
    rows = [(32 + (i + np.arange(LENGTH)) % 8).tolist() for i in range(24)]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 4 + row[4:] for row in rows]})


def paired_reference() -> ReferenceTask:
    return ReferenceTask.from_dataset(completions(), input_ids_column="input_ids", labels_column="labels")


def with_passages() -> Dataset:
    """The pool, and rows of the reference as its own."""
    return concatenate_datasets([make_pool(), completions()])


ONE_ROW = {"per_device_train_batch_size": 1}
PASSAGES = {"reference_passes": 1}
PAIRS = Setup(model=pairing, reference=paired_reference)
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
    "a loader that replays its own order": (Setup(trainer=Stateful), "use_stateful_dataloader=True", [Setup()]),
    "a loader that hides its dataset": (
        Setup(trainer=Elsewhere, config=PASSAGES),
        "has its dataset is not known",
        [Setup(config=PASSAGES), Setup(trainer=Elsewhere, config={"reference_passes": 0})],
    ),
    # Real runs with FSDP2, which is the way out, are in `test_processes`.
    "FSDP1": (Setup(model=lambda: extended(FullyShardedDataParallel)), "use FSDP2", [Setup()]),
    "weights without values": (
        Setup(before=Offloading), "load the model without offload", [Setup()],
    ),
    "8 bits": (
        Setup(model=lambda: extended(in_fp8)), r"train in bf16 \(`bf16=True`\)", [Setup(args={"bf16": True}), Setup()],
    ),
    "passages of rows with one label each": (
        Setup(pool=classified, model=classifier, reference=classified_reference, config=PASSAGES),
        "Set `reference_passes=0`",
        [Setup(pool=classified, model=classifier, reference=classified_reference, config={"reference_passes": 0})],
    ),
    "passages of pairs": (
        dataclasses.replace(PAIRS, config=PASSAGES),
        "one with a second sequence",
        [PAIRS, dataclasses.replace(PAIRS, pool=with_passages)],
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


def test_a_disk_without_room_is_left_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, usage = tmp_path / "refused", shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: usage._replace(free=100_000) if full in Path(path).parents else usage
    )
    with pytest.raises(MatesError, match="set `rounds_dir` to a larger disk, or lower `num_probes`"):
        Setup().start(full)
    Setup(config={"rounds_dir": str(tmp_path / "larger")}).start(full)
    assert (tmp_path / "larger").is_dir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    Setup().start(tmp_path / "freed")


def test_a_loop_is_given_the_optimizer_of_the_model_that_trains(tmp_path: Path) -> None:
    pool, model, other = make_pool(), make_model(), make_model()
    settings: dict[str, Any] = {"batch_size": 4, "max_steps": 20}

    def first(folder: str, model: Any, optimizer: Any) -> tuple[int, Any]:
        rounds = MatesRounds(make_reference(), pool, small_config(), output_dir=tmp_path / folder)
        return next(iter(rounds.order(model, optimizer, **settings)))

    with pytest.raises(MatesError, match="both as `accelerator.prepare` returned them"):
        first("refused", model, torch.optim.AdamW(other.parameters(), lr=1e-3))
    assert first("its own", model, torch.optim.AdamW(model.parameters(), lr=1e-3))[0] == 1
    prepared = Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert first("prepared", *prepared)[0] == 1


SHARED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from mates_hf import MatesRounds
from tests.training.kit import make_model, make_pool, make_reference, small_config

dist.init_process_group("gloo")
model = make_model()
rounds = MatesRounds(make_reference(), make_pool(), small_config(), output_dir=Path(sys.argv[1]))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
try:
    next(iter(rounds.order(model, optimizer, batch_size=5, max_steps=20)))
except ValueError as error:
    assert "Set it to a multiple of 2." in str(error), error
else:
    raise AssertionError("five rows for two processes")
step, rows = next(iter(rounds.order(model, optimizer, batch_size=6, max_steps=20)))
assert (step, len(rows)) == (1, 3)
"""


@pytest.mark.slow
def test_a_loop_in_two_processes_shares_whole_rows(tmp_path: Path) -> None:
    run_script(tmp_path, SHARED, str(tmp_path / "run"))
