"""Preference, reward and sampling Trainers are told by their names; Trainers of texts are not."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from datasets import Dataset
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification, Trainer
from transformers.trainer_utils import RemoveColumnsCollator

from mates_hf.training.checks.preference import preference_refusal

trl = pytest.importorskip("trl")


def fake(name: str, *bases: type) -> Any:
    """An instance of a class of this name, made without its arguments."""
    kind = type(name, bases or (Trainer,), {})
    return kind.__new__(kind)


def real(name: str, model: Any, tokenizer: Any, folder: Any) -> Any:
    pairs = {"prompt": ["w3 w4"] * 4, "chosen": ["w5"] * 4, "rejected": ["w6"] * 4}
    if name == "KTO":
        pairs = {"prompt": ["w3 w4"] * 4, "completion": ["w5"] * 4, "label": [True, False] * 2}
    if name == "Reward":
        model = LlamaForSequenceClassification(type(model.config)(**{**model.config.to_dict(), "num_labels": 1}))
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    given = {
        "model": model,
        "args": arguments,
        "train_dataset": Dataset.from_dict(pairs),
        "processing_class": tokenizer,
    }
    if name != "Reward":
        given["ref_model"] = type(model)(model.config)
    return getattr(trl, f"{name}Trainer")(**given)


@pytest.mark.parametrize("name", ["DPO", "KTO", "Reward"])
def test_trainers_of_trl_are_refused_by_their_name_and_by_their_collator(name, tiny_model, tiny_tokenizer, tmp_path):
    trainer = real(name, tiny_model, tiny_tokenizer, tmp_path)
    found = preference_refusal(trainer, None)
    assert found is not None
    assert f"`{name}Trainer`" in found
    assert "no way" in found
    assert "MatesSelector.filter" in found
    collate_fn = trainer.get_train_dataloader().collate_fn
    alone = preference_refusal(None, collate_fn)
    assert alone is not None
    assert f"`{type(trainer.data_collator).__name__}`" in alone
    wrapped = RemoveColumnsCollator(trainer.data_collator, ["input_ids"])
    assert preference_refusal(None, wrapped) == preference_refusal(None, trainer.data_collator)


@pytest.mark.parametrize(
    "name",
    ["ORPOTrainer", "CPOTrainer", "BCOTrainer", "PPOTrainer", "GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer",
     "AsyncGRPOTrainer", "_DPOTrainer", "XPOTrainer", "NashMDTrainer", "PRMTrainer", "GKDTrainer"],
)  # fmt: skip
def test_other_trainers_are_told_by_name_also_under_a_name_of_ones_own(name):
    found = preference_refusal(fake(name), None)
    assert found is not None
    assert f"`{name}`" in found
    mine = preference_refusal(fake("MyTrainer", type(fake(name))), None)
    assert mine is not None
    assert "`MyTrainer`" in mine


def test_trainers_and_collators_of_texts_pass(tiny_tokenizer):
    for trainer in (
        fake("SFTTrainer"),
        fake("IterativeSFTTrainer"),
        fake("Seq2SeqTrainer"),
        fake("DPOLogger", object),
    ):
        assert preference_refusal(trainer, DataCollatorWithPadding(tiny_tokenizer)) is None
    assert preference_refusal(None, None) is None
    assert preference_refusal(None, lambda rows: rows) is None
    assert preference_refusal(fake("X", trl.SFTTrainer), None) is None


def test_every_trainer_of_trl_but_the_supervised_ones_is_known():
    names = [name for name in dir(importlib.import_module("trl")) if name.endswith("Trainer")]
    passed = {name for name in names if preference_refusal(fake(name), None) is None}
    assert passed <= {"SFTTrainer", "IterativeSFTTrainer", "AlignPropTrainer", "DDPOTrainer"}
