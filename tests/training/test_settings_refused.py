"""Settings that are refused by name before the first step, and the table in the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, WeightedRandomSampler
from transformers import Trainer

from mates_hf.errors import UnsupportedSettingError
from tests.training.kit import VOCAB, make_pool
from tests.training.settings import (
    LAUNCHERS,
    MODULES,
    NO_FILE,
    OwnBatches,
    PlainLoader,
    Replaced,
    Setup,
    Stateful,
    assert_refused,
    case,
    mates,
    proves,
    read_table,
    table_lines,
)

DOCS = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(make_pool(40))


class Weighted(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return WeightedRandomSampler([1.0] * 200, 200)


class Twice(Sampler):
    """Repeats rows, and does not say so."""

    def __len__(self):
        return 200

    def __iter__(self):
        return iter([*range(100), *range(100)])


class Repeating(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return Twice()


class Ignoring(BatchSampler):
    """Has a sampler that it does not ask."""

    def __iter__(self):
        return iter([list(range(start, start + 4)) for start in range(0, 200, 4)])


class Bypassing(Trainer):
    def get_train_dataloader(self):
        batches = Ignoring(RandomSampler(self.train_dataset), 4, False)
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        )


def flattened(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows one behind the other, and nothing that would tell."""
    ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    return {"input_ids": ids, "labels": ids.clone()}


def foreign() -> Dataset:
    rows = [[VOCAB + 5] * 12] * 200
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def refused(setting: str, setup: Setup, match: str, error: type[Exception] = UnsupportedSettingError, note: str = ""):
    return case(setting, setup, match, error, outcome="refused", what=NO_FILE, note=note)


WORKERS = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}

REFUSED = [
    refused("a streaming pool (`IterableDataset`)", Setup(pool=Stream), "MatesStream",
            note="wrap it: `MatesStream(dataset)`"),
    refused("a streaming pool (`IterableDataset`)", Setup(pool=lambda: make_pool(200).to_iterable_dataset()),
            "MatesStream"),
    refused('`train_sampling_strategy="batch_rebalance"`', Setup(args={"train_sampling_strategy": "batch_rebalance"}),
            "batch_rebalance", note="it has no sampler"),
    refused("`dataloader_in_order=False`", Setup(args={"dataloader_in_order": False, **WORKERS}), "in_order"),
    refused("`dispatch_batches`", Setup(args={"accelerator_config": {"dispatch_batches": True}}), "dispatch_batches"),
    refused("`use_stateful_dataloader`", Setup(trainer_class=Stateful), "use_stateful_dataloader",
            note="of accelerate; the Trainer does not set it"),
    refused("a sampler with replacement", Setup(trainer_class=Replaced), "with replacement"),
    refused("a sampler with replacement", Setup(trainer_class=Weighted), "WeightedRandomSampler"),
    refused("a dataloader that `get_train_dataloader` did not prepare", Setup(trainer_class=PlainLoader),
            "set_sampler"),
    refused("a `batch_sampler` of one's own", Setup(trainer_class=OwnBatches), "no sampler that could be replaced"),
    refused("rows that a collator puts into one without a word of where they begin", Setup(collator=flattened),
            "flattened", note="give `position_ids` that begin anew, or pad"),
    refused("workers x prefetch beyond `switch_lead_steps`",
            Setup(args={"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4}),
            "must be at least 9", ValueError),
    refused("more steps than one pass has rows for, with `max_passes=1`", Setup(args={"max_steps": 60}),
            "largest `max_steps` that fits", ValueError, note="leave `max_passes` at None"),
    refused("more steps than one pass has rows for, with `max_passes=1`",
            Setup(args={"num_train_epochs": 1, "max_steps": -1}), "largest `max_steps` that fits", ValueError),
    refused("token ids outside of the model's vocabulary", Setup(pool=foreign), "vocabulary", ValueError),
    # Seen at the first batch, which is drawn before the first step.
    refused("a sampler that repeats rows without saying so", Setup(trainer_class=Repeating), "at most once"),
    refused("a dataloader that does not ask its sampler", Setup(trainer_class=Bypassing), "first batch must come"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "setup", "match", "error"), REFUSED)
def test_refused(tmp_path, setting, setup, match, error):
    assert_refused(tmp_path, setup, match, error=error)


@proves("several `MatesCallback`s", NO_FILE, outcome="refused")
@pytest.mark.parametrize("attach", [False, True])
def test_several_callbacks_of_this_kind(tmp_path, attach):
    setup = Setup(attach=attach)
    assert_refused(tmp_path, setup, "one MatesCallback", callbacks=lambda: [mates(), mates(selection_seed=1)])


@proves("`push_to_hub` with `rounds_dir` where it would be uploaded", NO_FILE, outcome="refused")
@pytest.mark.parametrize(
    ("inside", "is_refused"), [("rounds", True), ("rounds/_mates", True), ("_rounds/of/mine", False)]
)
def test_rounds_that_would_be_uploaded(tmp_path, monkeypatch, inside, is_refused):
    monkeypatch.setattr("transformers.trainer.Trainer.init_hf_repo", lambda self, **kwargs: None)
    setup = Setup(args={"push_to_hub": True, "hub_strategy": "end"})
    where = str(tmp_path / "run" / inside)
    if is_refused:
        assert_refused(tmp_path, setup, "rounds_dir", callbacks=lambda: [mates(rounds_dir=where)])
    else:
        setup.run(tmp_path / "run", [mates(rounds_dir=where)])
        assert (Path(where) / "round-0001").exists()


def test_the_table_in_the_docs_has_these_rows():
    import importlib

    for folder, names in (("training", MODULES), ("integrations", LAUNCHERS)):
        for name in names:
            importlib.import_module(f"tests.{folder}.{name.removesuffix('.py')}")
    assert read_table(DOCS) == table_lines()
