"""The settings of `horizon`: which pool, what the model knows already, and what it should get better at.

The data folder holds `corpus.jsonl.gz`, `large/corpus.jsonl.gz` (a second pool; documents of both are taken once) and
`eval/`. Rows of the pool are 128 tokens long. `domain` is read for reports, for what a setting is made of, and by arms
that are told it.

Trade-off: a tokenizer of 2,048 tokens makes rows short texts and models small, so that a training of 4,000 steps takes
minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from benchmarks.lab.corpus import END, byte_bpe
from benchmarks.lab.statistics import Ids
from mates_hf.data.overlap import find_overlap
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows

VOCAB, ROW_TOKENS, PIECES = 2_048, 128, 8
CHARACTERS_PER_TOKEN = 5  # read of a document, to be sure of its tokens
TOKENIZER_DOCUMENTS = 6_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is about."""

    parts: tuple[str, ...]  # what the reference is made of, in equal shares: tasks of `eval/`, or domains of the pool
    outside: tuple[str, ...] = ()  # tasks that are not in the reference, and that results are read from as well
    known: tuple[str, ...] = ()  # domains of the warm start; empty: all of the pool
    passages: int = 256  # reference passages of each part
    mixed: bool = False  # whether every arm trains on the passages too
    about: str = ""  # in a table


SETTINGS: dict[str, Setting] = {
    "style": Setting(parts=("lambada",), about="one style: passages of LAMBADA"),
    "tasks": Setting(
        parts=("arc_easy", "boolq", "openbookqa", "piqa", "winogrande"),
        outside=("arc_challenge", "hellaswag", "logiqa", "sciq"),
        passages=200,
        mixed=True,
        about="questions with their right answers, five tasks; every arm trains on these passages four times",
    ),
    "continued": Setting(
        parts=("fiction_classic", "news", "science_textbook", "legal_terms"),
        known=("fiction_classic", "news", "wikipedia"),
        passages=64,
        about="continued pretraining: two known and two new domains",
    ),
    "broad": Setting(
        parts=(
            "academic_tex", "blogs", "fiction_modern", "humanities_textbook", "medical_qa", "tech_docs", "us_law",
            "wikipedia",
        ),
        passages=32,
        about="eight domains, an eighth each",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lab:
    """A setting's data.

    Attributes:
        rows: The pool, N rows of 128 tokens.
        domain: (N,) int64, index into `domain_names`.
        document: (N,) int64, the document each row is a piece of.
        domain_names: Names of the domains.
        tokenizer: A byte-level BPE trained on the pool.
        reference: The passages that influence is measured on, all parts; by `loss_on`.
        judged: By half (`development`, `test`): tasks by name that losses are read from: each part of the reference
            by other passages, and each task outside of it. `NAME: answers` counts the right answers only.
    """

    rows: TokenRows
    domain: Ids
    document: Ids
    domain_names: tuple[str, ...]
    tokenizer: PreTrainedTokenizerFast
    reference: dict[str, ReferenceTask]
    judged: dict[str, dict[str, ReferenceTask]]


def _documents(data: Path, num: int | None) -> list[dict[str, Any]]:
    """Documents of both pools, each once, in an order of their own."""
    found: dict[str, dict[str, Any]] = {}
    for path in (data / "corpus.jsonl.gz", data / "large" / "corpus.jsonl.gz"):
        if path.exists():
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for i, line in zip(range(num or 10**9), file, strict=False):
                    row = json.loads(line)
                    found.setdefault(str(row.get("id", f"{path.parent.name}-{i}")), row)
    documents = list(found.values())
    return [documents[i] for i in np.random.default_rng(7).permutation(len(documents))]


def _task_passages(data: Path, task: str, split: str, loss_on: Any, tokenizer: Any) -> ReferenceTask:
    if task == "lambada":
        lines = (data / "eval" / task / "test_a.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        half = len(rows) // 2
        rows = rows[:half] if split == "train" else rows[half:]
        columns: dict[str, Any] = {"prompt_column": "context", "completion_column": "target"}
        return ReferenceTask.from_dataset(
            rows, tokenizer, **columns, loss_on=loss_on, max_length=ROW_TOKENS, name=task
        )
    # The harness calls what is evaluated `test`, whatever the file's name is.
    return ReferenceTask.from_lm_eval(
        f"mates_{task}_local", tokenizer, max_length=ROW_TOKENS, loss_on=loss_on, split=split,
        metadata={"data_dir": str(data / "eval")},
    )  # type: ignore[arg-type]  # fmt: skip


def _joined(tasks: Sequence[ReferenceTask], name: str) -> ReferenceTask:
    """One task of the passages of several."""
    rows = [[task.rows.row(i) for i in range(len(task))] for task in tasks]
    flat = [row for part in rows for row in part]
    joined = TokenRows.from_lists([ids for ids, _ in flat], [labels for _, labels in flat])
    return ReferenceTask(name=name, rows=joined, loss_on=tasks[0].loss_on)


def _halves(task: ReferenceTask, most: int) -> tuple[ReferenceTask, ReferenceTask]:
    """Two disjoint parts of a task, of at most so many passages each."""
    order = np.random.default_rng(11).permutation(len(task))
    size = min(most, len(task) // 2)
    return tuple(  # type: ignore[return-value]
        dataclasses.replace(task, rows=task.rows.take(np.sort(part)))
        for part in (order[:size], order[size : 2 * size])
    )


@functools.lru_cache(maxsize=1)
def open_lab(data: Path, cache: Path, name: str, num_documents: int | None = None, judged: int = 160) -> Lab:
    """The data of a setting; what takes long is kept in `cache`.

    Args:
        data: Folder of the data.
        cache: Folder for tokenizer and token ids.
        name: The setting's.
        num_documents: How many documents of each pool are read. None reads all.
        judged: Passages of each task that losses are read from, at most, in each half.
    """
    for logger in ("mates_hf", "lm_eval"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    setting = SETTINGS[name]
    documents = _documents(data, num_documents)
    names = tuple(sorted({row["domain"] for row in documents}))
    limit = ROW_TOKENS * PIECES * CHARACTERS_PER_TOKEN
    texts = [row["text"][:limit] for row in documents]
    tokenizer = _tokenizer(texts, cache / f"tokenizer-{len(texts)}.json")
    num_passages = setting.passages
    # Of a reference that is made of the pool's own domains, whole documents are set aside.
    aside: dict[str, list[int]] = {}
    if setting.parts[0] in names:
        for part in setting.parts:
            of_part = [i for i, row in enumerate(documents) if row["domain"] == part]
            aside[part] = of_part[: num_passages + 2 * judged]
    reference, halves = {}, {"development": {}, "test": {}}  # type: ignore[var-annotated]
    for loss_on in ("all", "completion"):
        tasks = []
        for part in (*setting.parts, *setting.outside):
            key = part if loss_on == "all" else f"{part}: answers"
            if part in aside:
                if loss_on == "completion":
                    continue
                passages = [texts[i] for i in aside[part]]
                ids = tokenizer(passages, add_special_tokens=False)["input_ids"]
                whole = TokenRows.from_lists([row[:ROW_TOKENS] for row in ids])
                task = ReferenceTask(name=part, rows=whole, loss_on="all")
                train = dataclasses.replace(task, rows=whole.take(np.arange(num_passages)))
                items = dataclasses.replace(task, rows=whole.take(np.arange(num_passages, len(whole))))
            else:
                items = _task_passages(data, part, "test", loss_on, tokenizer)
                train = None if part in setting.outside else _task_passages(data, part, "train", loss_on, tokenizer)
            halves["development"][key], halves["test"][key] = _halves(items, judged)
            if train is not None and part in setting.parts:
                tasks.append(train.subset(num_passages, seed=0))
        if tasks:
            reference[loss_on] = _joined(tasks, name)
    reference.setdefault("completion", reference["all"])
    document, values = _rows(texts, tokenizer, cache / f"rows-{len(texts)}.npz")
    tasks = [*reference.values(), *(task for half in halves.values() for task in half.values())]
    closed = {i for part in aside.values() for i in part}
    kept = ~np.isin(document, [*closed, *_shared(texts, tokenizer, tasks, cache / f"shared-{name}-{len(texts)}.npy")])
    document, values = document[kept], values[kept]
    domain_of = np.array([names.index(row["domain"]) for row in documents], np.int64)
    return Lab(
        rows=TokenRows(values=values.ravel(), offsets=np.arange(len(values) + 1, dtype=np.int64) * ROW_TOKENS),
        domain=domain_of[document],
        document=document,
        domain_names=names,
        tokenizer=tokenizer,
        reference=reference,
        judged=halves,
    )


def _rows(texts: list[str], tokenizer: Any, path: Path) -> tuple[Ids, Any]:
    """The documents' numbers and (N, 128) int16 token ids of all rows that documents are cut into."""
    if not path.exists():
        values, document = [], []
        for start in range(0, len(texts), 4_000):
            block = tokenizer(texts[start : start + 4_000], add_special_tokens=False)["input_ids"]
            for i, ids in enumerate(block, start):
                num = min(len(ids) // ROW_TOKENS, PIECES)
                values.append(np.array(ids[: num * ROW_TOKENS], np.int16).reshape(num, ROW_TOKENS))
                document += [i] * num
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, values=np.concatenate(values), document=np.array(document, np.int64))
        temporary.replace(path)
    stored = np.load(path)
    return stored["document"], stored["values"]


def _shared(texts: list[str], tokenizer: Any, tasks: Sequence[ReferenceTask], path: Path) -> Ids:
    """The documents that share a 13-gram with a passage; they are left out of the pool."""
    if not path.exists():
        passages = [tokenizer.decode(task.rows.row(i)[0].tolist()) for task in tasks for i in range(len(task))]
        temporary = path.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary, find_overlap(texts, passages))
        temporary.replace(path)
    found: Ids = np.load(path)
    return found


def _tokenizer(texts: list[str], path: Path) -> PreTrainedTokenizerFast:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.json")
        byte_bpe(texts[:TOKENIZER_DOCUMENTS], VOCAB).save(str(temporary))
        temporary.replace(path)
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END)
