"""What a run trains is what its probes measure: models, inputs and losses that the plain way would get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from mates_hf import MatesCallback, load_round
from mates_hf.data.batches import Reading
from mates_hf.data.pool import CandidatePool
from mates_hf.engine.reporters import find_trainer
from tests.training.kit import LENGTH, VOCAB, make_arguments, make_model, make_pool, make_reference
from tests.training.settings import NO_FILE, Setup, assert_refused, mates, proves

TINY = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32}  # fmt: skip


def trained(tmp_path: Path, model: Any, pool: Any, collator: Any = default_data_collator) -> tuple[Any, Any]:
    """A short run with one round, and which arguments the model was given in training and in eval mode."""
    torch.manual_seed(0)
    keys: dict[bool, set[str]] = {True: set(), False: set()}
    model.register_forward_pre_hook(lambda m, args, kwargs: keys[m.training].update(kwargs), with_kwargs=True)
    args = make_arguments(tmp_path, max_steps=13)
    Trainer(model, args, train_dataset=pool, data_collator=collator, callbacks=[mates(average_steps=0)]).train()
    return load_round(tmp_path / "_mates" / "round-0001"), keys


@proves(
    "masked language models (`DataCollatorForLanguageModeling(mlm=True)`)",
    "what is probed is what is trained",
    note="a row is masked as its number says, the same in every pass; measured a row at a time",
)
def test_a_masked_language_model(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.mask_token = tiny_tokenizer.mask_token or tiny_tokenizer.eos_token
    collator = DataCollatorForLanguageModeling(tiny_tokenizer, mlm=True, mlm_probability=0.3)
    pool = Dataset.from_dict({"input_ids": make_pool(200)["input_ids"]})
    record, _ = trained(tmp_path, BertForMaskedLM(BertConfig(**TINY)), pool, collator)
    assert record.info["loss"]["candidates"] == record.info["loss"]["reference"] == "unshifted"
    assert record.info["loss"]["own_loss"] == pytest.approx(record.info["loss"]["read_loss"], abs=1e-4)
    assert record.labels.num_tokens.max() <= LENGTH


@proves("decoders whose loss does not shift (the Bart family)", "what is probed is what is trained")
def test_a_decoder_whose_loss_does_not_shift(tmp_path: Path) -> None:
    rows = make_pool(200)["input_ids"]
    pool = Dataset.from_dict({"input_ids": [row[:-1] for row in rows], "labels": [row[1:] for row in rows]})
    config = BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
                        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)  # fmt: skip
    record, _ = trained(tmp_path, BartForCausalLM(config), pool)
    assert set(record.labels.num_tokens.tolist()) == {LENGTH - 1}
    assert record.info["loss"]["candidates"] == "unshifted"


@proves(
    "further model inputs (`token_type_ids`, `position_ids`, `pixel_values`, ...)",
    "every input that training gets reaches the probe",
)
def test_token_types(tmp_path: Path) -> None:
    pool = make_pool(200).add_column("token_type_ids", [[0] * LENGTH] * 200)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64,
                                       bos_token_id=2, eos_token_id=2))  # fmt: skip
    _, keys = trained(tmp_path, model, pool)
    assert "token_type_ids" in keys[True]
    assert "token_type_ids" in keys[False]


class Masked(LlamaForCausalLM):
    """Takes a mask of the loss."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, loss_mask=None, num_items_in_batch=None, **kw):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kw)
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            nll = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
            mask = loss_mask[:, 1:].flatten().float()
            output["loss"] = (nll * mask).sum() / mask.sum().clamp(min=1)
        return output


@proves("a mask of the loss that the model's forward takes", "what is probed is what is trained")
def test_rows_whose_loss_is_masked_are_not_preferred(tmp_path: Path) -> None:
    pool = make_pool(400).add_column("loss_mask", [[int(i % 3 != 0)] * LENGTH for i in range(400)])
    model = make_model()
    model.__class__ = Masked
    record, keys = trained(tmp_path, model, pool)
    assert "loss_mask" in keys[False]
    assert record.info["loss"]["mask"] == "loss_mask"
    assert record.info["num_skipped"] > 0
    assert np.mean(np.asarray(record.selection) % 3 == 0) < 1 / 3  # those rows are as the reference is


class Contrastive(Trainer):
    """A row's loss depends on the rows beside it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss * len(inputs["input_ids"])
        return (loss, outputs) if return_outputs else loss


@proves("a loss of a batch that is no mean over its rows (contrastive ones)", NO_FILE, outcome="refused",
        note="both numbers are in the message; pass `DirectionalProbe(loss=...)`")  # fmt: skip
def test_a_loss_that_rows_do_not_make_up(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, Setup(trainer_class=Contrastive), r"together is \d.*one by one \d.*DirectionalProbe\(loss"
    )


class Doubled(LlamaForCausalLM):
    """Counts the reference's tokens twice."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None and bool((input_ids[:, 0] >= 32).any()):
            output.loss = output.loss * 2
        return output


def doubled() -> Any:
    model = make_model()
    model.__class__ = Doubled
    return model


@proves("a model whose own loss of the reference task is no likelihood of its tokens", NO_FILE, outcome="refused",
        note="both numbers are in the message; pass `DirectionalProbe(reference_loss=...)`")  # fmt: skip
def test_a_reference_whose_loss_is_another_one(tmp_path: Path) -> None:
    assert_refused(tmp_path, Setup(model=doubled), r"reference task must be the model's own.*\d\.\d+.*\d\.\d+")


def test_the_trainer_that_calls_is_found_and_another_loop_is_refused(tmp_path: Path) -> None:
    found = []

    class Asks(MatesCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(find_trainer(self))

    trainer = Setup().build(tmp_path, [Asks(make_reference())])
    trainer.train()
    assert found == [trainer]
    assert find_trainer(MatesCallback(make_reference())) is None

    class Loop(TrainerCallback):
        """Calls the hooks of a callback that its Trainer does not have."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            mates().on_train_begin(args, state, control, **kwargs)

    assert_refused(tmp_path / "loop", Setup(), r"no `transformers.Trainer`.*attach", callbacks=lambda: [Loop()])


@pytest.mark.parametrize("attach", [False, True])
def test_preference_training_is_refused_by_its_name(tmp_path: Path, attach: bool) -> None:
    class DPOTrainer(Trainer):
        """As TRL's is called."""

    assert_refused(
        tmp_path,
        Setup(trainer_class=DPOTrainer, attach=attach),
        r"\(a `DPOTrainer`\) has a loss that is over chosen and rejected",
    )


def test_the_record_says_what_was_compared(tmp_path: Path) -> None:
    trained(tmp_path, make_model(), make_pool(200))
    loss = json.loads((tmp_path / "_mates" / "round-0001" / "round.json").read_text())["loss"]
    assert loss["candidates"] == loss["reference"] == "shifted"
    assert loss["fed"] == "padded"
    assert loss["own_loss"] == pytest.approx(loss["read_loss"], abs=1e-4)
    assert loss["weighs"] == "tokens"


def test_rounds_go_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    Setup().run(tmp_path / "run", [mates(rounds_dir="~/rounds")])
    assert (tmp_path / "home" / "rounds" / "round-0001" / "round.json").exists()
    assert not (tmp_path / "~").exists()
    assert load_round("~/rounds/round-0001").labels.num_tokens.max() == LENGTH - 1


def test_a_view_of_a_pool_keeps_its_reading() -> None:
    pool = CandidatePool(make_pool(20), default_data_collator)
    pool.reading = Reading(likelihood="unshifted")
    assert pool.select([1, 2]).reading is pool.reading
