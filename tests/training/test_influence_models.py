"""Influence models that read text or the training model's states: in the Trainer, stopped, resumed, told too late."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Trainer

from mates_hf import MatesCallback, MatesError, MatesSelector, load_round
from mates_hf.engine.model_traits import hub_name
from mates_hf.prediction.encoder_model import EncoderInfluenceModel
from mates_hf.prediction.hidden_states import HiddenStateInfluenceModel
from tests.training.kit import (
    VOCAB,
    Stop,
    make_arguments,
    make_model,
    make_pool,
    make_reference,
    run,
    small_config,
)


def make_encoder(encoder_tokenizer: Any, /, **settings: Any) -> EncoderInfluenceModel:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
        encoder = BertModel(config)
    return EncoderInfluenceModel((encoder, encoder_tokenizer), **settings)


@pytest.mark.quick("encoder")
@pytest.mark.parametrize("kind", ["hidden states", "encoder", "fine-tuned encoder"])
def test_a_stopped_run_goes_on_exactly(tmp_path, kind, tiny_tokenizer) -> None:
    def build() -> Any:
        if kind == "hidden states":
            return HiddenStateInfluenceModel()
        settings = {"head_only": kind == "encoder", "max_tokens": 32, "chunk_tokens": 32, "num_epochs": 1}
        return make_encoder(tiny_tokenizer, **settings)

    def give(trainer: Trainer) -> None:
        trainer.processing_class = tiny_tokenizer
        trainer.callback_handler.processing_class = tiny_tokenizer

    def callback(**changes: Any) -> MatesCallback:
        return MatesCallback(make_reference(), small_config(num_probes=60, **changes), influence_model=build())

    saving = {"save_strategy": "steps", "save_steps": 8, "max_steps": 16}
    whole = run(make_arguments(tmp_path / "whole", **saving), [callback()], prepare=give, dropout=0.1)
    run(make_arguments(tmp_path / "run", **saving), [Stop(8), callback()], prepare=give, dropout=0.1)
    resumed = run(make_arguments(tmp_path / "run", **saving), [callback()], prepare=give, dropout=0.1, resume=True)
    assert resumed.losses == whole.losses
    for name, value in whole.weights.items():
        assert torch.equal(resumed.weights[name], value), name
    assert resumed.rows == whole.rows[8 * 4 :]
    record = load_round(tmp_path / "whole" / "_mates" / "round-0001")
    assert record.selection is not None
    assert record.info["fit"]["num_held_out"] > 0


def test_fitting_on_hidden_states_changes_no_bit_of_training(tmp_path) -> None:
    """Until a selection is trained on: the same steps, with and without the round between them."""
    plain = run(make_arguments(tmp_path / "plain"), [], dropout=0.1)
    callback = MatesCallback(make_reference(), small_config(), influence_model=HiddenStateInfluenceModel())
    watched = run(make_arguments(tmp_path / "mates"), [callback], dropout=0.1)
    boundary, lead = 6, 1  # a round runs after step 6 and takes effect one step later
    same = boundary + lead
    assert watched.rows[: 4 * same] == plain.rows[: 4 * same]
    assert watched.rows[4 * same :] != plain.rows[4 * same :]
    assert watched.losses[:same] == plain.losses[:same]
    assert watched.streams == plain.streams


def test_what_an_influence_model_lacks_is_told_before_the_first_step(tmp_path, tiny_tokenizer) -> None:
    callback = MatesCallback(
        make_reference(), small_config(), influence_model=make_encoder(tiny_tokenizer, max_tokens=32, chunk_tokens=32)
    )
    trainer = Trainer(
        model=make_model(), args=make_arguments(tmp_path), train_dataset=make_pool(), callbacks=[callback]
    )
    with pytest.raises(ValueError, match="must have the training tokenizer"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "_mates").exists()


def tokenizer_of(num_ids: int) -> Any:
    """A tokenizer of words `w0`, `w1`, ... with one id each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(num_ids)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


def round_of_a_run(folder: Path, processing_class: Any) -> Path:
    def give(trainer: Trainer) -> None:
        trainer.processing_class = processing_class
        trainer.callback_handler.processing_class = processing_class

    run(make_arguments(folder), [MatesCallback(make_reference(), small_config())], prepare=give)
    return folder / "_mates" / "round-0001"


def test_a_round_filters_texts_without_its_run(tmp_path) -> None:
    path = round_of_a_run(tmp_path / "run", tokenizer_of(VOCAB))
    shutil.copytree(path, tmp_path / "alone")
    shutil.rmtree(tmp_path / "run")
    selector = MatesSelector.from_pretrained(tmp_path / "alone")
    ids = [[3, 7, 9, 1], [5, 5, 2], [8, 1, 4]]
    texts = Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in ids]})
    found = selector.map(texts)["influence"]
    assert found == selector.map(Dataset.from_dict({"input_ids": ids}))["influence"]
    assert len(set(found)) == 3
    file = tmp_path / "alone" / "influence_model" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("w9", "w_"))
    with pytest.raises(MatesError, match="must hold the files whose SHA-256"):
        MatesSelector.from_pretrained(tmp_path / "alone")


class _Unsavable(PreTrainedTokenizerFast):
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError("a tokenizer of this machine alone")


@pytest.mark.quick("*1-None", "*3-*")
@pytest.mark.parametrize(
    ("processing_class", "warning"),
    [
        (None, None),
        (object(), None),
        (tokenizer_of(8), "the pool has ids up to"),
        (_Unsavable(tokenizer_object=tokenizer_of(64).backend_tokenizer, unk_token="w0"), "cannot be saved: a tok"),
    ],
)
def test_a_round_does_not_fail_for_a_processing_class(tmp_path, caplog, processing_class, warning) -> None:
    path = round_of_a_run(tmp_path, processing_class)
    assert load_round(path).info["guard"]["decision"] == "select"
    assert ("processing_class" in caplog.text) == (warning is not None)
    assert (warning or "") in caplog.text
    selector = MatesSelector.from_pretrained(path)
    assert selector.tokenizer is None
    assert len(selector.map(Dataset.from_dict({"input_ids": [[3, 7, 9]]}))) == 1


def test_a_round_says_which_model_it_probed(tmp_path) -> None:
    run(make_arguments(tmp_path), [MatesCallback(make_reference(), small_config())])
    info = load_round(tmp_path / "_mates" / "round-0001").info
    assert info["model"] == {"name": "LlamaForCausalLM", "num_parameters": make_model().num_parameters()}


@pytest.mark.parametrize(
    ("given", "name"),
    [("EleutherAI/pythia-410m", "EleutherAI/pythia-410m"), ("gpt2", "gpt2"), ("", "LlamaForCausalLM")],
)
def test_a_model_is_called_as_on_the_hub_and_never_by_its_folder(tmp_path, given, name) -> None:
    model = make_model()
    model.config._name_or_path = given
    assert hub_name(model) == name
    model.config._name_or_path = str(tmp_path)
    assert hub_name(model) == "LlamaForCausalLM"
