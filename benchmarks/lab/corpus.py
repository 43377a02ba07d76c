"""Text for the benchmarks: rows of a corpus with domains, reference and development passages, and made-up labels.

Trade-off: rows of 64 tokens, cheap enough to repeat over seeds and to check against brute force. What is found on them
is a lead for larger ones.

The data folder holds `corpus.jsonl.gz` (rows with `text` and `domain`) and `eval/`, of which a reference task reads
its own files: `lambada/test_a.jsonl` (rows with `context` and `target`), or `arc_easy` and `boolq`, `train.jsonl` and
a validation file of multiple choice. `domain` is read for reports and by arms that are told it, never to select.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.lab.machine import written_once
from mates_hf.data.corpus import builtin_corpus
from mates_hf.data.overlap import find_overlap
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.records import InfluenceLabels

CHARACTERS_PER_TOKEN = 5  # read of a document, to be sure of its tokens
TOKENIZER_DOCUMENTS = 4_000
PASSAGE_TOKENS = 128
VOCAB = 4096  # of the built-in corpus


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Rows to choose from, and passages to measure their influence on."""

    rows: TokenRows  # N rows of the candidate pool, all of one length
    domain: npt.NDArray[np.int64]  # (N,) int64, index into `domain_names`; for reports only
    document: npt.NDArray[np.int64]  # (N,) int64, the document each row is a piece of
    domain_names: tuple[str, ...]  # names of the domains
    tokenizer: PreTrainedTokenizerFast  # byte-level BPE, trained on the corpus
    # passages that influence is measured on, by `loss_on`: `"all"` tokens, or the last word (`"completion"`). Both
    # have the same rows.
    reference: dict[str, ReferenceTask]

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return len(self.tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lab(Pool):
    """What most experiments read."""

    development: dict[str, ReferenceTask]  # disjoint passages that results are read from, alike
    test: dict[str, ReferenceTask]  # passages disjoint from both, to be read once, at the end; empty unless asked for
    # how many documents of the pool were dropped for sharing a 13-gram with a passage, and how many development
    # passages for sharing one with a reference passage
    overlap: dict[str, int]


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

    A document (the first `num_documents`; None is all) is cut into `pieces` rows at most, its remainder dropped.
    Reference passages are of the first half of the task's file, development passages and, after them, test passages of
    the second; where there is a training split, that is the first half.
    """
    documents = read_documents(data_dir / "corpus.jsonl.gz", num_documents)
    first, second = _PASSAGES[task](data_dir / "eval" / task)
    first, drawn = first[:num_reference], second[:num_development]
    development = _apart(drawn, first)
    test = _apart(_apart(second[num_development : num_development + num_test], first), development)
    names = tuple(sorted({document["domain"] for document in documents}))

    limit = row_tokens * pieces * CHARACTERS_PER_TOKEN
    texts = [document["text"][:limit] for document in documents]
    tag = f"{vocab_size}-{row_tokens}-{pieces}-{num_reference}-{num_development}-{len(texts)}"
    if num_test or task != "lambada":
        tag += f"-{num_test}-{task}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    tokenizer_path = cache_dir / f"tokenizer-{vocab_size}-{len(texts)}.json"
    tokenizer = kept_tokenizer(texts[:TOKENIZER_DOCUMENTS], vocab_size, tokenizer_path)

    def cut(file: BinaryIO) -> None:
        dropped = find_overlap(texts, [p["text"] for p in (*first, *development, *test)])
        kept = np.setdiff1d(np.arange(len(texts)), dropped)
        values, owner = cut_rows([texts[i] for i in kept], tokenizer, row_tokens, pieces)
        np.savez(file, values=values, document=kept[owner], dropped=len(dropped))

    stored = np.load(written_once(cache_dir / f"rows-{tag}.npz", cut))
    document = stored["document"]
    return Lab(
        rows=as_rows(stored["values"], row_tokens),
        domain=np.array([names.index(documents[i]["domain"]) for i in document], np.int64),
        document=document,
        domain_names=names,
        tokenizer=tokenizer,
        reference=as_tasks(first, tokenizer, "reference"),
        development=as_tasks(development, tokenizer, "development"),
        test=as_tasks(test, tokenizer, "test") if test else {},
        overlap={
            "documents_dropped": int(stored["dropped"]),
            "development_passages_dropped": len(drawn) - len(development),
        },
    )


def read_documents(path: Path, num: int | None = None) -> list[dict[str, Any]]:
    """The first `num` documents of a corpus; None reads all."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, num)]


def cut_rows(
    texts: Sequence[str], tokenizer: Any, row_tokens: int, pieces: int, dtype: Any = np.int32
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """(N, `row_tokens`) token ids of the rows that texts are cut into, so many of each at most; (N,) of which text."""
    values, owner = [], []
    for start in range(0, len(texts), 4_000):  # lists of tokens take much memory
        block = tokenizer(texts[start : start + 4_000], add_special_tokens=False)["input_ids"]
        for i, ids in enumerate(block, start):
            num = min(len(ids) // row_tokens, pieces)
            values.append(np.array(ids[: num * row_tokens], dtype).reshape(num, row_tokens))
            owner += [i] * num
    return np.concatenate(values), np.array(owner, np.int64)


Passage = dict[str, str]


def write_built_in(folder: Path) -> Path:
    """A data folder made of text that every Python installation carries: to see that a benchmark runs, not to report.

    Passages of the language manual are in the place of LAMBADA's. What is there is kept.
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


def lambada(folder: Path) -> tuple[list[Passage], list[Passage]]:
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


_PASSAGES = {"lambada": lambada, "arc_easy": _arc_easy, "boolq": _boolq}


def _apart(passages: list[Passage], others: list[Passage]) -> list[Passage]:
    """Those that share no 13-gram with the others."""
    shared = set(find_overlap([p["text"] for p in passages], [p["text"] for p in others]).tolist())
    return [passage for i, passage in enumerate(passages) if i not in shared]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_tasks(passages: Sequence[dict[str, Any]], tokenizer: Any, name: str) -> dict[str, ReferenceTask]:
    """Passages by `loss_on`."""
    columns: dict[str, Any] = {"prompt_column": "context", "completion_column": "target"}
    return {
        loss_on: ReferenceTask.from_dataset(
            passages, tokenizer, **columns, loss_on=loss_on, max_length=PASSAGE_TOKENS, name=name
        )
        for loss_on in ("all", "completion")
    }


def kept_tokenizer(texts: Sequence[str], vocab_size: int, path: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained on texts where it is not kept at `path` yet."""
    written_once(path, lambda file: file.write(byte_bpe(texts, vocab_size).to_str().encode()))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END)


END = "<|endoftext|>"


def byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on texts."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, min_frequency=0, special_tokens=[END], show_progress=False)
    return Tokenizer.from_str(tokenizer.to_str())


# --- without a data folder ---


def as_rows(values: npt.NDArray[Any], length: int) -> TokenRows:
    """Token ids, one after the other, as rows of one length; a remainder is dropped."""
    num = values.size // length
    return TokenRows(values=values.reshape(-1)[: num * length], offsets=np.arange(num + 1, dtype=np.int64) * length)


def text_rows(length: int = 256) -> tuple[TokenRows, TokenRows]:
    """The built-in corpus in a byte-level BPE of its own, cut to rows of one length: candidates, reference rows."""
    corpus = builtin_corpus(seed=0)
    texts = [row["text"] for row in corpus.pool]
    tokenizer = byte_bpe(texts, VOCAB)

    def cut(parts: list[str]) -> TokenRows:
        ids = [np.asarray(found.ids, np.int32) for found in tokenizer.encode_batch(parts)]
        return as_rows(np.concatenate(ids), length)

    return cut(texts), cut(corpus.reference)


def together(rows: TokenRows, more: TokenRows) -> TokenRows:
    """Rows, then more rows, of which all tokens are trained; of the first as well where they have no labels."""
    return TokenRows(
        values=np.concatenate([rows.values, more.values]),
        offsets=np.concatenate([rows.offsets, rows.offsets[-1] + more.offsets[1:]]),
        labels=None if rows.labels is None else np.concatenate([rows.labels, more.values]),
    )


def as_reference(rows: TokenRows, num: int = 64) -> ReferenceTask:
    """The first `num` rows as a reference task."""
    return ReferenceTask(name="built-in text", rows=rows.take(np.arange(min(num, len(rows)))))


def as_dataset(rows: TokenRows | npt.NDArray[Any]) -> Dataset:
    """Rows of one length as a pool that every collator reads."""
    ids = rows if isinstance(rows, np.ndarray) else rows.values.reshape(len(rows), -1)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def as_column(values: npt.NDArray[Any], length: int, names: Sequence[str] = ("input_ids",)) -> Dataset:
    """Token ids, one after the other, as columns of lists of one length, as `datasets` keeps a tokenised corpus."""
    import pyarrow as pa
    from datasets.table import InMemoryTable

    borders = pa.array(np.arange(values.size // length + 1, dtype=np.int32) * length)
    column = pa.ListArray.from_arrays(borders, pa.array(values))
    return Dataset(InMemoryTable(pa.table(dict.fromkeys(names, column))))


def made_up_labels(rows: TokenRows, ids: npt.NDArray[np.int64] | None = None, noise: float = 3.0) -> InfluenceLabels:
    """Labels of a made-up effect of each token and much noise, as a fit gets them from a probe."""
    rng = np.random.default_rng(0)
    effects = rng.normal(size=int(rows.values.max()) + 1)
    values = effects[rows.values[rows.target_mask]]
    derivatives = (values + rng.normal(0, noise, len(values))).astype(np.float32)
    starts = np.cumsum(rows.num_targets) - rows.num_targets
    means = (np.add.reduceat(derivatives, starts) / rows.num_targets).astype(np.float32)
    return InfluenceLabels(
        candidate_id=np.arange(len(rows)) if ids is None else ids,
        influence=1e-3 * means,
        influence_per_token=means,
        loss=np.full(len(rows), 5.0, np.float32),
        num_tokens=rows.num_targets,
        probe=np.full(len(rows), "directional"),
        step_size=1e-3,
        token_derivatives=derivatives,
    )
