"""How fast texts are scored inside of datatrove, and what of that time is the engine's own.

Parquet files of texts are read and scored by a distilled text model, with one thread, arms taking turns: straight from
pyarrow, as an actor of Ray Data does with its tables, and in datatrove's reader and `MatesScorer`. datatrove's second
pass, reading and keeping a fifth, is next to them, and so is its reader alone.

Time is the processor's, so that other work on the machine counts little. Trade-off: files are in the page cache and
nothing is written, so a real disk and a writer come on top. datatrove's steps are called without an executor, which
adds seconds a task. What Ray Data itself takes is not measured.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.corpus import read_documents
from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import num_cores, temporary_folder, versions
from benchmarks.lab.tables import markdown, table, title
from mates_hf.prediction.text_model import TextInfluenceModel
from mates_hf.prediction.threads import at_most_threads
from mates_hf.selection.selector import MatesSelector
from mates_hf.selection.table_scorer import TableScorer

DATA = False
BATCH = 1_000
ALONE, READ, SCORED = "pyarrow, read and score", "datatrove, read", "datatrove, read and score"
KEPT = "datatrove, read and keep a fifth"


def write_files(texts: list[str], folder: Path, num_files: int) -> list[Path]:
    """Parquet files without compression, each of all texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    files = [folder / f"{number:03d}.parquet" for number in range(num_files)]
    for number, file in enumerate(files):
        ids = [f"{number}-{i}" for i in range(len(texts))]
        pq.write_table(pa.table({"id": ids, "text": texts}), file, compression="none", row_group_size=10_000)
    return files


def pyarrow_arms(selector: str, files: list[Path]) -> dict[str, Callable[[], Any]]:
    """Reading and scoring without an engine."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scorer = TableScorer(selector, "text")

    def alone() -> None:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=["text"], use_threads=False):
                scorer.score(pa.Table.from_batches([batch]))

    return {ALONE: alone}


def datatrove_arms(selector: str, files: list[Path], work: Path) -> dict[str, Callable[[], Any]]:
    """Datatrove's reader, and behind it the steps of either pass."""
    if not importlib.util.find_spec("datatrove"):
        return {}
    from datatrove.pipeline.readers import ParquetReader
    from loguru import logger

    from mates_hf.integrations.datatrove import MatesFilter, MatesScorer

    logger.disable("datatrove")
    scorer = MatesScorer(selector, str(work / "scores"), batch_size=BATCH)

    def through(*steps: Any) -> None:
        documents: Any = ParquetReader(str(files[0].parent)).run(None, 0, 1)
        for step in steps:
            documents = step.run(documents, 0, 1)
        collections.deque(documents, maxlen=0)

    through(scorer)
    keep = MatesFilter(str(work / "scores"), 0.2)
    return {READ: through, SCORED: lambda: through(scorer), KEPT: lambda: through(keep)}


def processor_seconds(arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of the processor that each arm takes in each turn; every other turn goes through the arms backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            begin = time.process_time()
            arms[name]()
            seconds[name].append(time.process_time() - begin)
    return seconds


def run(bench: Bench) -> dict[str, Any]:
    """Distil a model of something that is quick to compute, and take times."""
    large = bench.data / "large" / "corpus.jsonl.gz"
    path = large if large.exists() else bench.data / "corpus.jsonl.gz"
    texts = [document["text"] for document in read_documents(path, 1_000 if bench.quick else 40_000)]
    values = np.array([text.count("e") / max(1, len(text)) for text in texts])
    model = TextInfluenceModel.distil(values[:5_000], texts[:5_000])
    num_files = 2 if bench.quick else 5
    with temporary_folder(bench.work) as work, at_most_threads(1):
        MatesSelector(model).save_pretrained(work / "selector")
        files = write_files(texts, work / "files", num_files)
        selector = str(work / "selector")
        arms = {**pyarrow_arms(selector, files), **datatrove_arms(selector, files, work)}
        say(f"{len(texts) * num_files:,} texts")
        seconds = processor_seconds(arms, 1 if bench.quick else 5)
    engines = ["datatrove"] if importlib.util.find_spec("datatrove") else []
    return {
        "settings": {
            "quick": bench.quick, "texts": len(texts) * num_files, "files": num_files,
            "bytes": num_files * sum(len(text.encode()) for text in texts), "cores": num_cores(),
            "load_before": os.getloadavg()[0], **versions("pyarrow", *engines),
        },
        "seconds": seconds,
    }  # fmt: skip


def page(document: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, seconds = document["settings"], document["seconds"]
    rows = []
    for name, times in seconds.items():
        taken = float(np.median(times))
        speed = settings["bytes"] / taken
        rows.append([name, f"{settings['texts'] / taken:,.0f}", f"{speed / 1e6:,.1f}", f"{speed * 3_600 / 1e9:,.0f}"])
    engine = f"datatrove {settings['datatrove']}" if "datatrove" in settings else "no engine"
    return markdown(
        title("engine_speed", settings["quick"]),
        f"{settings['cores']} cores (load before: {settings['load_before']:.1f}), Python {settings['python']}, "
        f"{engine}. {settings['texts']:,} texts, {settings['bytes'] / 1e6:,.0f} MB, in {settings['files']} files; "
        "one thread scores.",
        "Medians over turns, of the processor's time. Nothing is written.",
        table(["what", "texts a second", "MB a second", "GB an hour"], rows),
    )
