"""What the tests of a fit without a run share: a small checkpoint, a pool with a good domain, passages."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_WORDS = 64
GOOD = 16  # words of the good domain, which the passages are made of
QUICK = {
    "warm_steps": 40, "learning_rate": 3e-3, "batch_size": 8, "max_length": 32, "num_probes": 200, "pool_rows": 800,
    "device": "cpu",
}  # fmt: skip


@functools.cache
def tokenizer(num_words: int = NUM_WORDS) -> PreTrainedTokenizerFast:
    """Words `w0`, `w1` and so on, after three of its own."""
    names = ["<pad>", "<unk>", "<eos>", *(f"w{i}" for i in range(num_words - 3))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=64
    )


def write_model(folder: Path, kind: str = "llama", vocab: int = NUM_WORDS, with_tokenizer: bool = True) -> Path:
    """A checkpoint as it would be downloaded: weights, config and tokenizer, no optimizer state."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    given: dict[str, Any] = {**sizes, "vocab_size": vocab, "max_position_embeddings": 64, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**given, bos_token_id=None, pad_token_id=0)),
            "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**given, bos_token_id=0)),
        }[kind]()
    made.save_pretrained(folder)
    if with_tokenizer:
        tokenizer(vocab).save_pretrained(folder)
    return folder


def good_text(rng: np.random.Generator, length: int = 24) -> str:
    """Words of the good domain, each one or two behind the one before it, so that hardly any two texts share 13."""
    return " ".join(f"w{i}" for i in (rng.integers(GOOD) + np.cumsum(rng.integers(1, 3, length))) % GOOD)


def other_text(rng: np.random.Generator, length: int = 24) -> str:
    """Words of the rest of the vocabulary, at random."""
    return " ".join(f"w{i}" for i in rng.integers(GOOD, NUM_WORDS - 3, length))


def make_texts(num: int = 800, seed: int = 0) -> list[str]:
    """Every fourth text is of the good domain."""
    rng = np.random.default_rng(seed)
    return [good_text(rng) if i % 4 == 0 else other_text(rng, 20 + i % 8) for i in range(num)]


def noise(num: int, first: int, length: int = 8) -> list[str]:
    """Texts of which none has a word of another one, so that nothing can be learned of one from the others."""
    return [" ".join(f"w{first + i * length + j}" for j in range(length)) for i in range(num)]


def is_good(text: str) -> bool:
    return int(text.split()[0][1:]) < GOOD


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON Lines, compressed by the name."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=100)
    return path


def write_all(folder: Path, *, of_noise: bool = False, kind: str = "llama", num_texts: int = 800) -> dict[str, str]:
    """A model, a pool of two Parquet files with further columns, and passages; arguments of `fit_selector`."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = noise(400, 200) if of_noise else make_texts(num_texts)
    middle = len(texts) // 2
    for i, half in enumerate((texts[:middle], texts[middle:])):
        write_parquet(folder / f"pool-{i}.parquet", {"url": [f"u{j}" for j in range(middle)], "text": half})
    rng = np.random.default_rng(99)
    passages = noise(16, 0) if of_noise else [good_text(rng, 13) for _ in range(32)]
    write_jsonl(folder / "passages.jsonl", [{"text": text, "more": i} for i, text in enumerate(passages)])
    return {
        "model": str(write_model(folder / "model", kind, 4096 if of_noise else NUM_WORDS)),
        "pool": str(folder / "pool-*.parquet"),
        "reference": str(folder / "passages.jsonl"),
        "out": str(folder / "selector"),
    }
