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
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from benchmarks.lab.checkpoint import LOSSES
from benchmarks.lab.corpus import (
    CHARACTERS_PER_TOKEN,
    Pool,
    as_rows,
    as_tasks,
    cut_rows,
    kept_tokenizer,
    lambada,
    read_documents,
)
from benchmarks.lab.machine import written_once
from benchmarks.lab.statistics import Ids
from mates_hf.data.overlap import find_overlap
from mates_hf.data.passages import LossOn
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows

ROW_TOKENS, PIECES = 128, 8
TOKENIZER_DOCUMENTS = 6_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the model of a setting is, and how long it trains where that is not what `Sizes` says."""

    vocab: int = 2_048
    width: int = 96
    layers: int = 3
    tokens_per_batch: int = 1_024  # of training and probes; logits stay below 32 MB
    sizes: tuple[tuple[str, Any], ...] = ()  # fields of `Sizes` that are others


# A larger vocabulary leaves rows longer texts. Fewer steps: a unit takes half an hour of one core.
LARGER, LARGEST = (
    Scale(
        vocab=8_192,
        width=width,
        layers=layers,
        tokens_per_batch=512,
        sizes=(("warm", warm), ("steps", steps), ("branches", ()), ("marks", (100, 250, steps * 9 // 10))),
    )
    for width, layers, warm, steps in ((192, 5, 400, 800), (288, 8, 250, 500))
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is about."""

    parts: tuple[str, ...]  # what the reference is made of, in equal shares: tasks of `eval/`, or domains of the pool
    outside: tuple[str, ...] = ()  # tasks that are not in the reference, and that results are read from as well
    known: tuple[str, ...] = ()  # domains of the warm start; empty: all of the pool
    passages: int = 256  # reference passages of each part
    mixed: bool = False  # whether every arm trains on the passages too
    about: str = ""  # in a table
    scale: Scale = Scale()


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
SETTINGS |= {
    f"{name}, {size}": dataclasses.replace(
        SETTINGS[name], scale=scale, about=f"{SETTINGS[name].about}; a model of {size} parameters"
    )
    for size, scale in (("4 million", LARGER), ("10 million", LARGEST))
    for name in ("tasks", "continued")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is run; the defaults are the full run."""

    documents: int | None = None  # read of each pool; None is all
    warm: int = 1_000  # steps of the warm start, the same for every arm of a seed
    steps: int = 4_000  # that every arm goes on for, the last tenth of them in a decay
    branches: tuple[int, ...] = (1_000, 2_000)  # steps at which a decay of a tenth, begun before, would have ended
    marks: tuple[int, ...] = (
        10, 25, 50, 100, 150, 200, 300, 400, 500, 700, 1_000, 1_400, 1_800, 2_200, 2_600, 3_000, 3_600,
    )  # fmt: skip
    judged: int = 160  # passages of each task, at most
    reserved: int = 12_000  # rows that probes are drawn from and no arm trains on
    watched: int = 500  # rows that a watched arm probes again and again
    held: int = 16  # rows of each domain that no arm trains on, to see what choosing unlearns


QUICK = Sizes(
    documents=3_000, warm=40, steps=60, branches=(20,), marks=(10, 20, 54), judged=24, reserved=800, watched=60, held=4
)


def sizes_of(setting: str, sizes: Sizes) -> Sizes:
    """What is run of a setting: less where its model is larger, and as it is in a quick run."""
    return sizes if sizes == QUICK else dataclasses.replace(sizes, **dict(SETTINGS[setting].scale.sizes))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lab(Pool):
    """A setting's data: rows of 128 tokens, the reference over all its parts, and what losses are read from."""

    # by half (`development`, `test`), task and `loss_on`: other passages of each part of the reference, and those of
    # each task outside of it. `completion` counts the right answers only.
    judged: dict[str, dict[str, dict[str, ReferenceTask]]]
    tokens_per_batch: int

    def by_domain(self, rows: Ids, values: Any) -> tuple[Any, Any]:
        """Mean value of each domain, and how many of these pool rows are of it."""
        domain, size = self.domain[rows], len(self.domain_names)
        counts = np.bincount(domain, minlength=size)
        return np.bincount(domain, values, size) / np.maximum(counts, 1), counts


def _documents(data: Path, num: int | None) -> list[dict[str, Any]]:
    """Documents of both pools, each once, in an order of their own."""
    found: dict[str, dict[str, Any]] = {}
    for path in (data / "corpus.jsonl.gz", data / "large" / "corpus.jsonl.gz"):
        for i, row in enumerate(read_documents(path, num) if path.exists() else []):
            found.setdefault(str(row.get("id", f"{path.parent.name}-{i}")), row)
    documents = list(found.values())
    return [documents[i] for i in np.random.default_rng(7).permutation(len(documents))]


def _passages_of(
    data: Path, task: str, split: str, tokenizer: Any, losses: Sequence[LossOn] = LOSSES
) -> dict[LossOn, ReferenceTask]:
    """Passages of a task of `eval/`, by `loss_on`."""
    # The harness calls what is evaluated `test`, whatever the file's name is.
    settings: dict[str, Any] = {"max_length": ROW_TOKENS, "split": split, "metadata": {"data_dir": str(data / "eval")}}
    return {
        loss_on: ReferenceTask.from_lm_eval(f"mates_{task}_local", tokenizer, loss_on=loss_on, **settings)
        for loss_on in losses
    }


def _reference_of(data: Path, task: str, num: int, tokenizer: Any) -> ReferenceTask:
    """What influence is measured on: of questions the answers count as much as everything."""
    if task == "lambada":
        return as_tasks(lambada(data / "eval" / task)[0], tokenizer, task)["all"].subset(num, seed=0)
    return _passages_of(data, task, "train", tokenizer, ["both"])["both"].subset(num, seed=0)


def _beginnings(name: str, texts: list[str], tokenizer: Any) -> ReferenceTask:
    """The first tokens of documents as passages."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ReferenceTask(name=name, rows=TokenRows.from_lists([row[:ROW_TOKENS] for row in ids]), loss_on="all")


@functools.lru_cache(maxsize=1)
def open_lab(data: Path, cache: Path, name: str, num_documents: int | None = None, judged: int = 160) -> Lab:
    """The data of a setting; tokenizer and token ids are kept in the folder `cache`.

    Of each pool `num_documents` are read (None reads all), of each half of a task `judged` passages at most.
    """
    for logger in ("mates_hf", "lm_eval"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    setting = SETTINGS[name]
    documents = _documents(data, num_documents)
    names = tuple(sorted({row["domain"] for row in documents}))
    domain_of = np.array([names.index(row["domain"]) for row in documents], np.int64)
    limit = ROW_TOKENS * PIECES * CHARACTERS_PER_TOKEN
    texts = [row["text"][:limit] for row in documents]
    vocab = setting.scale.vocab
    kind = f"{len(texts)}" if vocab == Scale().vocab else f"{len(texts)}-{vocab}"
    tokenizer = kept_tokenizer(texts[:TOKENIZER_DOCUMENTS], vocab, cache / f"tokenizer-{kind}.json")
    reference: list[ReferenceTask] = []
    halves: dict[str, dict[str, dict[str, ReferenceTask]]] = {"development": {}, "test": {}}
    closed: list[int] = []  # documents that are set aside, because the reference is made of the pool's own domains
    for part in (*setting.parts, *setting.outside):
        if setting.parts[0] in names:
            aside = np.flatnonzero(domain_of == names.index(part))[: setting.passages + 2 * judged].tolist()
            closed += aside
            whole = _beginnings(part, [texts[i] for i in aside], tokenizer)
            reference.append(whole.take(np.arange(setting.passages)))
            read = {"all": whole.take(np.arange(setting.passages, len(whole)))}
        else:
            if part in setting.parts:
                reference.append(_reference_of(data, part, setting.passages, tokenizer))
            if part == "lambada":
                read = as_tasks(lambada(data / "eval" / part)[1], tokenizer, part)
            else:
                read = _passages_of(data, part, "test", tokenizer)
        num = len(read["all"])
        order, size = np.random.default_rng(11).permutation(num), min(judged, num // 2)
        for half, passages in (("development", order[:size]), ("test", order[size : 2 * size])):
            halves[half][part] = {loss_on: task.take(np.sort(passages)) for loss_on, task in read.items()}
    joined = ReferenceTask.mixture(reference, name=name) if len(reference) > 1 else reference[0]
    document, values = _rows(texts, tokenizer, cache / f"rows-{kind}.npz")
    told = [joined, *(tasks["all"] for half in halves.values() for tasks in half.values())]
    shared = _shared(texts, tokenizer, told, cache / f"shared-{name}-{len(texts)}.npy".replace(" ", "_"))
    kept = ~np.isin(document, [*closed, *shared])
    document = document[kept]
    return Lab(
        rows=as_rows(values[kept], ROW_TOKENS),
        domain=domain_of[document],
        document=document,
        domain_names=names,
        tokenizer=tokenizer,
        reference={"all": joined},
        judged=halves,
        tokens_per_batch=setting.scale.tokens_per_batch,
    )


def _rows(texts: list[str], tokenizer: Any, path: Path) -> tuple[Ids, Any]:
    """The documents' numbers and (N, 128) int16 token ids of all rows that documents are cut into."""

    def write(file: BinaryIO) -> None:
        values, document = cut_rows(texts, tokenizer, ROW_TOKENS, PIECES, np.int16)
        np.savez(file, values=values, document=document)

    stored = np.load(written_once(path, write))
    return stored["document"], stored["values"]


def _shared(texts: list[str], tokenizer: Any, tasks: Sequence[ReferenceTask], path: Path) -> Ids:
    """The documents that share a 13-gram with a passage; they are left out of the pool."""

    def write(file: BinaryIO) -> None:
        passages = [tokenizer.decode(task.rows.row(i)[0].tolist()) for task in tasks for i in range(len(task))]
        np.save(file, find_overlap(texts, passages))

    found: Ids = np.load(written_once(path, write))
    return found
