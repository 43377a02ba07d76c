"""A small laboratory for the benchmarks: real text in domains, a small model, and a plain training loop.

Place in the flow: `benchmarks/*.py` import it and nothing else of one another; it composes the public parts of
`mates_hf` and knows no Trainer, so that a benchmark of a label or of a selection measures just that.

Trade-off: models of half a million parameters on rows of 64 tokens. What is found here is a lead for larger ones, and
is cheap enough to repeat over seeds and to check against brute force.

The data folder holds `corpus.jsonl.gz` (rows with `text` and `domain`) and `eval/`, of which a reference task reads
its own files: `lambada/test_a.jsonl` (rows with `context` and `target`), or `arc_easy` and `boolq`, `train.jsonl` and
a validation file of multiple choice. `domain` is read for reports and by arms that are told it, never to select.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mates_hf.data.corpus import builtin_corpus
from mates_hf.data.overlap import find_overlap
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.engine.averaging import WeightAverage
from mates_hf.influence.passes import mean_loss_gradient, token_losses
from mates_hf.prediction.judge import fit_report

FloatArray = npt.NDArray[np.float64]

CHARACTERS_PER_TOKEN = 5  # read of a document, to be sure of its tokens
TOKENIZER_DOCUMENTS = 4_000
PASSAGE_TOKENS = 128
TOKENS_PER_BATCH = 512  # 8 rows of 64: larger batches fall out of the cache of a processor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lab:
    """What every experiment reads.

    Attributes:
        rows: N rows of the candidate pool, all of one length.
        domain: (N,) int64, index into `domain_names`; for reports only.
        document: (N,) int64, the document each row is a piece of.
        domain_names: names of the domains.
        tokenizer: byte-level BPE, trained on the corpus.
        reference: passages that influence is measured on, by `loss_on`: `"all"` tokens, or the last word
            (`"completion"`). Both have the same rows.
        development: disjoint passages that results are read from, alike.
        test: passages disjoint from both, to be read once, at the end; empty unless asked for.
        overlap: how many documents of the pool were dropped for sharing a 13-gram with a passage, and how many
            development passages for sharing one with a reference passage.
    """

    rows: TokenRows
    domain: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    domain_names: tuple[str, ...]
    tokenizer: PreTrainedTokenizerFast
    reference: dict[str, ReferenceTask]
    development: dict[str, ReferenceTask]
    test: dict[str, ReferenceTask]
    overlap: dict[str, int]

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return len(self.tokenizer)


def load_lab(
    data_dir: Path,
    cache_dir: Path,
    *,
    vocab_size: int = 2_048,
    row_tokens: int = 64,
    pieces: int = 4,
    num_reference: int = 256,
    num_development: int = 256,
    num_test: int = 0,
    num_documents: int | None = None,
    task: str = "lambada",
) -> Lab:
    """Read and tokenise the corpus, once for each setting; later calls read what the first one wrote.

    Args:
        data_dir: folder of the data.
        cache_dir: where tokenizer and token ids are kept.
        vocab_size: of the tokenizer.
        row_tokens: tokens in every row.
        pieces: rows cut from one document at most; its remainder is dropped.
        num_reference: passages drawn from the first half of the reference file.
        num_development: passages drawn from the second half.
        num_test: passages after those.
        num_documents: read the first documents only; None reads all.
        task: what the passages are of: `lambada`, `arc_easy` (questions with their right answers) or `boolq`
            (its passages). Where there is a training split, that is the first half.
    """
    with gzip.open(data_dir / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        documents = [json.loads(line) for _, line in zip(range(num_documents or 10**9), file, strict=False)]
    first, second = _PASSAGES[task](data_dir / "eval" / task)
    first, second = first[:num_reference], second[: num_development + num_test]
    shared = set(find_overlap([p["text"] for p in second], [p["text"] for p in first]).tolist())
    development = [passage for i, passage in enumerate(second[:num_development]) if i not in shared]
    test = [passage for i, passage in enumerate(second) if i >= num_development and i not in shared]
    known = set(find_overlap([p["text"] for p in test], [p["text"] for p in development]).tolist())
    test = [passage for i, passage in enumerate(test) if i not in known]
    names = tuple(sorted({document["domain"] for document in documents}))

    limit = row_tokens * pieces * CHARACTERS_PER_TOKEN
    texts = [document["text"][:limit] for document in documents]
    tag = f"{vocab_size}-{row_tokens}-{pieces}-{num_reference}-{num_development}-{len(texts)}"
    if num_test or task != "lambada":
        tag += f"-{num_test}-{task}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(texts, vocab_size, cache_dir / f"tokenizer-{vocab_size}-{len(texts)}.json")
    path = cache_dir / f"rows-{tag}.npz"
    if not path.exists():
        dropped = find_overlap(texts, [p["text"] for p in (*first, *development, *test)])
        kept = np.setdiff1d(np.arange(len(texts)), dropped)
        ids = tokenizer([texts[i] for i in kept], add_special_tokens=False)["input_ids"]
        cut = [
            (row[start : start + row_tokens], i)
            for row, i in zip(ids, kept, strict=True)
            for start in range(0, min(len(row), row_tokens * pieces) - row_tokens + 1, row_tokens)
        ]
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        values, document = np.array([row for row, _ in cut], np.int32), np.array([i for _, i in cut], np.int64)
        np.savez(temporary, values=values, document=document, dropped=len(dropped))
        temporary.replace(path)
    stored = np.load(path)
    values, document = stored["values"], stored["document"]
    return Lab(
        rows=TokenRows(values=values.ravel(), offsets=np.arange(len(values) + 1, dtype=np.int64) * row_tokens),
        domain=np.array([names.index(documents[i]["domain"]) for i in document], np.int64),
        document=document,
        domain_names=names,
        tokenizer=tokenizer,
        reference=_tasks(first, tokenizer, "reference"),
        development=_tasks(development, tokenizer, "development"),
        test=_tasks(test, tokenizer, "test") if test else {},
        overlap={
            "documents_dropped": int(stored["dropped"]),
            "development_passages_dropped": len(shared.intersection(range(num_development))),
        },
    )


Passage = dict[str, str]


def write_built_in(folder: Path) -> Path:
    """A data folder made of text that every Python installation carries: to see that a benchmark runs, not to report.

    Args:
        folder: to write to; what is there is kept.

    Returns:
        The folder, with a corpus and passages of the language manual in the place of LAMBADA's.
    """
    corpus_path, passages_path = folder / "corpus.jsonl.gz", folder / "eval" / "lambada" / "test_a.jsonl"
    if not passages_path.exists():
        corpus = builtin_corpus()
        passages_path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(corpus_path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": row["text"], "domain": row["kind"]}) + "\n" for row in corpus.pool)
        num = min(len(corpus.reference), len(corpus.development))
        cut = [text.rsplit(" ", 1) for text in (*corpus.reference[:num], *corpus.development[:num])]
        rows = [{"context": begin, "target": end, "text": f"{begin} {end}"} for begin, end in cut]
        passages_path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _lambada(folder: Path) -> tuple[list[Passage], list[Passage]]:
    """Halves of the cased test passages: `context`, and `target`, their last word."""
    passages = _read_lines(folder / "test_a.jsonl")
    half = len(passages) // 2
    return passages[:half], passages[half:]


def _arc_easy(folder: Path) -> tuple[list[Passage], list[Passage]]:
    """Questions with their right answer as target."""

    def passage(row: dict[str, Any]) -> Passage:
        context, target = f"Question: {row['question']}\nAnswer:", row["choices"][row["label"]]
        return {"context": context, "target": target, "text": f"{context} {target}"}

    return tuple([passage(row) for row in _read_lines(folder / f"{name}.jsonl")] for name in ("train", "validation"))  # type: ignore[return-value]


def _boolq(folder: Path) -> tuple[list[Passage], list[Passage]]:
    """Passages without their questions, each once; their last word is the target."""

    def passages(name: str) -> list[Passage]:
        texts = dict.fromkeys(row["context"].strip() for row in _read_lines(folder / f"{name}.jsonl"))
        parts = [(text, text.rsplit(" ", 1)) for text in texts if " " in text]
        return [{"context": context, "target": target, "text": text} for text, (context, target) in parts]

    return passages("train"), passages("validation_a")


_PASSAGES = {"lambada": _lambada, "arc_easy": _arc_easy, "boolq": _boolq}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _tasks(passages: Sequence[dict[str, Any]], tokenizer: Any, name: str) -> dict[str, ReferenceTask]:
    columns: dict[str, Any] = {"prompt_column": "context", "completion_column": "target"}
    return {
        loss_on: ReferenceTask.from_dataset(
            passages, tokenizer, **columns, loss_on=loss_on, max_length=PASSAGE_TOKENS, name=name
        )
        for loss_on in ("all", "completion")
    }


def _tokenizer(texts: Sequence[str], vocab_size: int, path: Path) -> PreTrainedTokenizerFast:
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts[:TOKENIZER_DOCUMENTS], trainer)
        temporary = path.with_suffix(f".{os.getpid()}.json")
        tokenizer.save(str(temporary))
        temporary.replace(path)
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")


# --- model and training ---


def build_model(
    vocab_size: int, *, width: int = 96, layers: int = 2, seed: int = 0, family: str = "gpt_neox"
) -> PreTrainedModel:
    """A GPT-NeoX (Pythia's architecture), or a Llama, with fresh weights, embedding and head tied, without dropout."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=2 * PASSAGE_TOKENS,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]


def build_optimizer(model: nn.Module, *, lr: float, beta2: float = 0.95) -> torch.optim.AdamW:
    """AdamW with the paper's momentum and weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=0.1)


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: TokenRows,
    order: npt.NDArray[np.int64],
    *,
    batch_rows: int,
    lr: float,
    max_grad_norm: float | None = 1.0,
    warm_up: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train on `order`, `batch_rows` rows a step: token-weighted loss, clipping, constant rate after a linear warm-up.

    Args:
        model: trained in place, in the mode it is in.
        optimizer: stepped in place.
        rows: the pool.
        order: pool rows in training order; a remainder below one batch is not trained on.
        batch_rows: rows in one step.
        lr: learning rate.
        max_grad_norm: clipping threshold; None is off.
        warm_up: steps over which the rate rises from 0.
        on_step: called after each step with the number of steps taken.
    """
    for step in range(len(order) // batch_rows):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, warm_up))
        batch = rows.take(order[step * batch_rows : (step + 1) * batch_rows])
        mean_loss_gradient(model, batch, tokens_per_batch=TOKENS_PER_BATCH)
        if max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step + 1)


class Averager:
    """Mean of the weights over the last `window` of `num_steps` steps: pass `update` as `on_step`."""

    def __init__(self, model: nn.Module, num_steps: int, window: int) -> None:
        self.average = WeightAverage(model)
        self._start = num_steps - window

    def update(self, step: int) -> None:
        """Take the weights in where the step is inside the window."""
        if step > self._start:
            self.average.update()


def task_losses(model: nn.Module, tasks: dict[str, ReferenceTask]) -> dict[str, float]:
    """Mean loss over all tokens and over the last words, nats/token, from one pass over the passages."""
    losses = token_losses(model, tasks["all"].rows, tokens_per_batch=TOKENS_PER_BATCH)
    last_word = tasks["completion"].rows.target_mask[tasks["all"].rows.target_mask]
    return {"all": float(losses.mean(dtype=np.float64)), "completion": float(losses[last_word].mean(dtype=np.float64))}


# --- statistics ---


def spearman(label: npt.ArrayLike, truth: npt.ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Rank correlation of two (N,) arrays with a 95 % bootstrap interval over candidates."""
    report = fit_report(np.asarray(label), np.asarray(truth), num_labels=0, seed=seed)
    return {"spearman": report.spearman, "interval": list(report.interval)}


def without_group_means(values: npt.ArrayLike, group: npt.NDArray[np.int64]) -> FloatArray:
    """(N,) values minus the mean of their group: what is left to rank within groups."""
    values = np.asarray(values, np.float64)
    counts = np.bincount(group)
    return values - (np.bincount(group, weights=values) / np.maximum(counts, 1))[group]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of a few paired values and half the width of its 95 % t interval; nan for a single one."""
    from scipy.stats import t

    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    width = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(width)


def rounded(value: Any, digits: int = 5) -> Any:
    """Plain JSON with floats of a few significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, np.ndarray):
        return rounded(value.tolist(), digits)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{digits}g}")
    return int(value) if isinstance(value, np.integer) else value
