"""Small models of many kinds, each with the rows, the collator and the loss that people train it with.

`KINDS` is what `test_model_kinds` goes through. A kind says which reading of its loss is right, so a test of it fails
where another one is taken. What a version of transformers does not have is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    default_data_collator,
)

from mates_hf.data.reference import ReferenceTask
from mates_hf.engine.model_traits import accepts
from mates_hf.errors import UnsupportedSettingError

VOCAB, PAD, BOS, EOS, MASK = 64, 0, 1, 2, 3
IMAGE = VOCAB - 1
NUM_ROWS = 32
SMALL = {
    "vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": BOS,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embedding_size": 32, "lru_width": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "d_kv": 8, "rotary_dim": 8, "sliding_window": 4,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "dff": 48, "ffn_hidden_size": 48, "d_ff": 48, "d_inner": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "hidden_dim": 48, "shared_expert_intermediate_size": 24,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "state_size": 8, "attention_window_size": 8,
}  # fmt: skip
"""What configs call the sizes of a model; each takes those it knows."""

Model = Callable[[], Any]
Columns = Callable[[], dict[str, Any]]


def build(name: str, config: str = "", /, **changes: Any) -> Any:
    """A model of a class of transformers, small in whatever its config knows; `...` leaves a size as it is."""
    kind = getattr(transformers, name, None)
    if kind is None or (config and not hasattr(transformers, config)):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config_class = getattr(transformers, config) if config else kind.config_class
    default, renamed = config_class(), getattr(config_class, "attribute_map", {})
    known = {key for key in SMALL.keys() - changes.keys() if _takes(default, key)}
    settings = {key: SMALL[key] for key in known if renamed.get(key) not in known | changes.keys()} | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config_class(**{key: value for key, value in settings.items() if value is not ...}))


def _takes(config: Any, key: str) -> bool:
    """True where a config has a size of that name that can be set."""
    try:
        return hasattr(config, key) and not isinstance(getattr(type(config), key, 0), property)
    except ValueError:  # a size of each layer
        return False


@functools.cache
def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    names = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<mask>": MASK} | {f"w{i}": i for i in range(4, VOCAB)}
    words = Tokenizer(models.WordLevel(names, unk_token="<s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>",
        padding_side=side,
    )  # fmt: skip


def texts(num: int = NUM_ROWS, low: int = 12, high: int = 12, seed: int = 0) -> list[list[int]]:
    """Rows of `low` to `high` tokens; every third counts up, as the reference does."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        length = int(rng.integers(low, high + 1))
        counting = 5 + (rng.integers(0, 8) + np.arange(length)) % 8
        rows.append((counting if i % 3 == 0 else rng.integers(5, VOCAB - 2, length)).tolist())
    return rows


def even() -> dict[str, Any]:
    rows = texts()
    return {"input_ids": rows, "labels": rows}


def ragged() -> dict[str, Any]:
    return {"input_ids": texts(low=8, high=16)}


def unlabelled() -> dict[str, Any]:
    return {"input_ids": texts()}


def shifted() -> dict[str, Any]:
    """Labels that are shifted in the dataset, for a loss that does not."""
    rows = texts(low=13, high=13)
    return {"input_ids": [row[:-1] for row in rows], "labels": [row[1:] for row in rows]}


def pairs() -> dict[str, Any]:
    rows = texts(low=10, high=16)
    return {"input_ids": [row[:5] for row in rows], "labels": [[*row[5:], EOS] for row in rows]}


def with_column(name: str, value: Callable[[int, int], int], columns: Columns = even) -> Columns:
    """One number more a token: `value(row, position)`."""

    def made() -> dict[str, Any]:
        found = columns()
        return {**found, name: [[value(i, j) for j in range(len(r))] for i, r in enumerate(found["input_ids"])]}

    return made


def reference(num: int = 8) -> ReferenceTask:
    rows = [[5 + (i + j) % 8 for j in range(12)] for i in range(num)]
    return ReferenceTask.from_dataset(Dataset.from_dict({"ids": rows}), input_ids_column="ids")


def labelled_reference(label: Callable[[list[int], int], int]) -> Callable[[], ReferenceTask]:
    def made() -> ReferenceTask:
        rows = reference().rows
        ids = [rows.row(i)[0].tolist() for i in range(len(rows))]
        labels = [[label(row, i) for i in range(len(row))] for row in ids]
        columns = Dataset.from_dict({"ids": ids, "labels": labels})
        return ReferenceTask.from_dataset(columns, input_ids_column="ids", labels_column="labels")

    return made


completions = labelled_reference(lambda row, i: -100 if i < 5 else row[i])


def lm_collator(model: Any, side: str = "right", **changes: Any) -> Any:
    return DataCollatorForLanguageModeling(tokenizer(side), mlm=False, **changes)


def masking(model: Any) -> Any:
    """Without the mask of the padding where the model's forward takes none."""
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm=True, mlm_probability=0.4)
    if accepts(model, "attention_mask"):
        return collate
    return lambda rows: {key: value for key, value in collate(rows).items() if key != "attention_mask"}


def for_pairs(model: Any) -> Any:
    """With decoder inputs that the model makes of the labels."""
    return DataCollatorForSeq2Seq(tokenizer(), model=model)


def plain(model: Any) -> Any:
    return default_data_collator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A model, what it is trained on, and which reading of its loss is right.

    Attributes:
        model: makes it, the same each time.
        columns: of the dataset.
        collator: made for the model.
        reading: what the record says of the candidates' loss; `"row by row"` for the run's own.
        reference: passages.
        refused: what the refusal says; empty where the run is supported.
        error: of the refusal.
        trains_first: a row's first token is trained, too (a virtual one predicts it).
        trainer: its class.
        given: further arguments of the Trainer.
        args: of `TrainingArguments`.
        attach: whether the callback is told its Trainer.
        made_by_trainer: the loss is the Trainer's and not the model's.
        without: inputs of the model in the comparison: router losses off.
        probe: settings of the probe.
        slow: left to the longer lane.
    """

    model: Model
    columns: Columns = even
    collator: Callable[[Any], Any] = plain
    reading: str = "shifted"
    reference: Callable[[], ReferenceTask] = reference
    refused: str = ""
    error: type[Exception] = UnsupportedSettingError
    trains_first: bool = False
    trainer: type[Trainer] = Trainer
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    attach: bool = False
    made_by_trainer: bool = False
    without: dict[str, Any] = dataclasses.field(default_factory=dict)
    probe: dict[str, Any] = dataclasses.field(default_factory=dict)
    slow: bool = False


KINDS: dict[str, Kind] = {}


def add(name: str, model: Model, **settings: Any) -> None:
    assert name not in KINDS, name
    KINDS[name] = Kind(model=model, **settings)


def add_each(names: str | dict[str, dict[str, Any]], suffix: str, **settings: Any) -> None:
    """Kinds of the classes `names + suffix`; those of a dict with changes of their configs, `config` its class."""
    for name, changes in (names if isinstance(names, dict) else dict.fromkeys(names.split(), {})).items():
        rest = {key: value for key, value in changes.items() if key not in ("config", "head")}
        kind = name + changes.get("head", suffix)
        add(kind, functools.partial(build, kind, changes.get("config", ""), **rest), **settings)
