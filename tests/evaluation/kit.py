"""What the evaluation tests share: a tokenizer of bytes, a small model, and the benchmarks as files made here.

`write_local` writes a folder for the local tasks; `write_hub_cache` puts the same kinds of items, in the Hub's own
columns, where `datasets` keeps what it has downloaded, so that the Hub's tasks load offline as they would for a user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.arrow_writer import ArrowWriter
from datasets.utils.file_utils import hash_url_to_filename
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mates_hf.evaluation.benchmarks import LOGIQA_FILES

NINE = ("sciq", "arc_easy", "arc_challenge", "logiqa", "openbookqa", "boolq", "hellaswag", "piqa", "winogrande")
LENGTH = 24  # tokens of a training row
END = 256  # the tokenizer has one id for each byte, and this one
WORDS = "the cat sat on a red mat while rain fell over slow green hills and birds sang of bread, salt and iron".split()


def make_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """One token a byte, so that lengths in bytes and tokens agree."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{letter: i for i, letter in enumerate(alphabet)}, "<end>": END}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # merges, once trained, end at words
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<end>", **changes})


def make_model(seed: int = 0, *, double: bool = True, **changes: Any) -> LlamaForCausalLM:
    """A model whose choices differ clearly; in float64, where equal means equal."""
    settings = {
        "vocab_size": END + 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": END,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    return model.double() if double else model


def text(seed: int, num_words: int) -> str:
    """Words that depend on the seed."""
    return " ".join(WORDS[(seed * 7 + i * (seed % 5 + 1)) % len(WORDS)] for i in range(num_words))


def make_pool(num_rows: int = 400) -> datasets.Dataset:
    """Rows to train on, of one length."""
    tokenizer = make_tokenizer()
    rows = [tokenizer.encode(f"{i} {text(i, 12)}")[:LENGTH] for i in range(num_rows)]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def local_rows(benchmark: str, num: int = 6) -> list[dict[str, Any]]:
    """Rows of a local file."""
    rows = []
    for i in range(num):
        if benchmark == "lambada":
            rows.append({"id": str(i), "context": text(i, 12), "target": WORDS[i]})
            continue
        number = 2 if benchmark in ("boolq", "piqa", "winogrande") else 4
        choices = [text(10 * i + j, 2 + (i + j) % 3) for j in range(number)]
        question = f"{text(i, 4)} _ {text(i + 1, 3)}." if benchmark == "winogrande" else f"{text(i + 2, 6)}?"
        row = {"context": text(i + 3, 10), "question": question, "choices": choices, "label": (i * 3) % number}
        rows.append({"id": str(i), **row, **({"choices": ["no", "yes"]} if benchmark == "boolq" else {})})
    return rows


def write_local(folder: Path, split: str = "validation", num: int = 6) -> Path:
    """A folder with every benchmark."""
    for benchmark in (*NINE, "lambada"):
        write_rows(folder / benchmark / f"{split}.jsonl", local_rows(benchmark, num))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _hub_rows(name: str, num: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(num):
        choices = [text(10 * i + j, 2 + (i + j) % 3) for j in range(4)]
        question = f"{text(i + 2, 6)}?"
        listed = {"text": choices, "label": list("ABCD")}
        rows.append(
            {
                "sciq": {
                    "question": question,
                    "distractor1": choices[0],
                    "distractor2": choices[1],
                    "distractor3": choices[2],
                    "correct_answer": choices[3],
                    "support": f" {text(i + 3, 10)}" if i % 2 else "",
                },
                "arc": {"id": str(i), "question": question, "choices": listed, "answerKey": "ABCD"[i % 4]},
                "openbookqa": {"question_stem": text(i, 5), "choices": listed, "answerKey": "DCBA"[i % 4]},
                "boolq": {"question": text(i, 5), "passage": text(i + 1, 14), "idx": i, "label": i % 2},
                "hellaswag": {
                    "ctx_a": f"{text(i, 6)}. [substeps]  {text(i, 2)}",
                    "ctx_b": text(i + 1, 3),
                    "activity_label": f"Making {WORDS[i]} [title] {WORDS[i + 1]}",
                    "endings": [f"{choice} [step] twice." for choice in choices],
                    "label": str(i % 4),
                },
                "piqa": {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": i % 2},
                "winogrande": {
                    "sentence": f"{text(i, 4)} _ {text(i + 1, 3)}.",
                    "option1": choices[0],
                    "option2": choices[1],
                    "answer": str(1 + i % 2),
                },
                "lambada": {"text": f"{text(i, 12)} {WORDS[i]}"},
            }[name]
        )
    return rows


_HUB = {  # dataset, config, columns, splits: as they are on the Hub
    "sciq": ("allenai/sciq", "default", "sciq", ("train", "validation", "test")),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "arc", ("train", "validation", "test")),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "arc", ("train", "validation", "test")),
    "openbookqa": ("allenai/openbookqa", "main", "openbookqa", ("train", "validation", "test")),
    "boolq": ("aps/super_glue", "boolq", "boolq", ("train", "validation", "test")),
    "hellaswag": ("Rowan/hellaswag", "default", "hellaswag", ("train", "validation", "test")),
    "piqa": ("baber/piqa", "default", "piqa", ("train", "validation")),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "winogrande", ("train", "validation", "test")),
    "lambada": ("EleutherAI/lambada_openai", "default", "lambada", ("test",)),
}


def write_hub_cache(cache_dir: Path, num: int = 6) -> Path:
    """The Hub's datasets as `datasets` caches them, and LogiQA's files as it caches downloads."""
    for name, config, columns, splits in _HUB.values():
        _cache_dataset(cache_dir, name, config, {split: _hub_rows(columns, num) for split in splits})
    for file in ("Train.txt", "Eval.txt", "Test.txt"):
        path = cache_dir / "downloads" / hash_url_to_filename(f"{LOGIQA_FILES}/{file}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(logiqa_text(num), encoding="utf-8")
    return cache_dir


def logiqa_text(num: int) -> str:
    """LogiQA as its authors wrote it down; sentences are joined without a space."""
    rows = []
    for i in range(num):
        options = [f"{letter}{'.' if i % 2 else ' '}{text(10 * i + j, 4)}" for j, letter in enumerate("ABCD")]
        rows.append(
            "\n".join(["", "abcd"[i % 4], f"{text(i, 6)}.{text(i + 1, 4)}", f"{text(i, 5)}?", *options]) + "\n"
        )
    return "".join(rows)


def _cache_dataset(cache_dir: Path, name: str, config: str, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    short = name.split("/")[-1]
    folder = cache_dir / name.replace("/", "___") / config / "0.0.0" / "00000000"
    folder.mkdir(parents=True)
    features = datasets.Dataset.from_list(next(iter(rows.values()))).features
    splits = datasets.SplitDict(dataset_name=short)
    for split, entries in rows.items():
        with ArrowWriter(features=features, path=str(folder / f"{short}-{split}.arrow")) as writer:
            for entry in entries:
                writer.write(entry)
            num_examples, num_bytes = writer.finalize()
        splits.add(datasets.SplitInfo(split, num_bytes=num_bytes, num_examples=num_examples, dataset_name=short))
    info = datasets.DatasetInfo(
        features=features, splits=splits, config_name=config, dataset_name=short, builder_name="parquet"
    )
    info.write_to_directory(str(folder))
