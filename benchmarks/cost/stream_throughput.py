"""How fast a streamed pool comes through its sampler, with scoring and without, against reading it and doing nothing.

The stream is Parquet shards on the local disk, read again for each figure in turns, so that all see the same machine.
Reading alone is `for row in stream`, which is what a dataloader without a sampler does. Reading tables alone is the
sampler's own reader of buffers, which makes no Python object of a row. The sampler reads tables, scores, chooses,
writes down and spools.

Trade-off: no model trains meanwhile, which leaves a core to the thread that reads; on a busy machine both share one.
The rows are random tokens, whose n-grams are spread over all of a vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import load_dataset

from benchmarks.lab.corpus import as_column
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import temporary_folder
from benchmarks.lab.models import llama
from benchmarks.lab.tables import figure
from mates_hf import MatesConfig, MatesStream, NgramInfluenceModel
from mates_hf.data.spool import Spool
from mates_hf.data.stream_pool import StreamPool
from mates_hf.data.stream_reader import BufferReader
from mates_hf.engine.processes import ALONE
from mates_hf.records import InfluenceLabels
from mates_hf.selection.stream_buffers import BufferSizes, sizes_for
from mates_hf.selection.stream_ledger import StreamLedger
from mates_hf.training.clock import RowClock
from mates_hf.training.duplicates import CopyMarks
from mates_hf.training.stream.maker import BufferMaker
from mates_hf.training.stream.rules import Rule
from mates_hf.training.stream.sampler import StreamSampler

LENGTH, VOCAB, NUM_LABELS, SHARDS, BATCH, LEAST = 256, 8_192, 500, 8, 512, 0.9


def write_shards(folder: Path, num_rows: int) -> list[str]:
    """Random rows of one length in Parquet files."""
    files = []
    for shard in range(SHARDS):
        values = np.random.default_rng(shard).integers(3, VOCAB, num_rows // SHARDS * LENGTH, dtype=np.int32)
        files.append(str(folder / f"shard-{shard}.parquet"))
        as_column(values, LENGTH, ("input_ids",)).to_parquet(files[-1])
    return files


def fitted(pool: StreamPool) -> NgramInfluenceModel:
    """An influence model of some made-up labels."""
    rng = np.random.default_rng(0)
    per_token = rng.normal(size=NUM_LABELS).astype(np.float32)
    num_tokens = np.full(NUM_LABELS, LENGTH - 1, np.int32)
    labels = InfluenceLabels(
        candidate_id=np.arange(NUM_LABELS),
        influence=per_token,
        influence_per_token=per_token,
        loss=np.ones(NUM_LABELS, np.float32),
        num_tokens=num_tokens,
        probe=np.array(["directional"] * NUM_LABELS),
        step_size=1.0,
    )
    return NgramInfluenceModel().fit(pool, labels)


def make_sampler(files: list[str], folder: Path, most_rows: int, rule: Rule | None) -> StreamSampler:
    """The sampler of a run, without one."""
    stream = MatesStream(load_dataset("parquet", data_files=files, split="train", streaming=True), most_rows)
    config, pool = MatesConfig(update_steps=10_000, first_round_steps=None), StreamPool(stream)
    run: Any = SimpleNamespace(
        config=config, pool=pool, ledger=StreamLedger(0), processes=ALONE, rounds_dir=folder, tokenizer=None,
        model=llama(VOCAB, width=16, inner=32, layers=1, heads=2, length=LENGTH, tied=False),
    )  # fmt: skip
    run.copy_marks = CopyMarks(run)
    sizes = sizes_for(most_rows, config, BATCH)
    clock = RowClock(batches_per_epoch=2**40, accumulation=1, batch_rows=BATCH)
    maker = BufferMaker(run, sizes, Spool(folder / "spool", sizes.rows))
    sampler = StreamSampler(maker, clock, None, step_rows=BATCH)
    sampler.begin()
    if rule is not None:
        sampler.select_by(rule)
    return sampler


def read_alone(files: list[str], sizes: BufferSizes) -> tuple[float, int]:
    """Seconds and rows of the sampler's reader alone."""
    stream = MatesStream(load_dataset("parquet", data_files=files, split="train", streaming=True))
    reader = BufferReader(stream.source, 0, stream.source.beginning, sizes.rows)
    begin, num = time.perf_counter(), 0
    while True:
        buffer = reader.next()
        num += len(buffer.table)
        if buffer.is_last:
            return time.perf_counter() - begin, num


def iterate(files: list[str]) -> tuple[float, int]:
    """Seconds and rows of `for row in stream`."""
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
    begin = time.perf_counter()
    num = sum(1 for _ in stream)
    return time.perf_counter() - begin, num


def sample(sampler: StreamSampler) -> tuple[float, int]:
    """Seconds that a whole stream takes through its sampler, and rows that it handed out."""
    begin = time.perf_counter()
    num = sum(1 for _ in sampler)
    return time.perf_counter() - begin, num


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    num_rows, most_rows, times = (40_000, 8_192, 1) if bench.quick else (131_072, 16_384, 3)
    names = ("reading alone", "reading tables alone", "sampler, own order", "sampler, scoring")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with temporary_folder(None) as folder:
        files = write_shards(folder, num_rows)
        first = make_sampler(files, folder / "first", most_rows, None)
        assert isinstance(first.maker.run.pool, StreamPool)
        rule = Rule(1, 0, fitted(first.maker.run.pool), 1.0, 1.0)
        handed = {}
        for turn in range(times + 1):  # the first warms files and kernels
            found = {
                "reading alone": iterate(files),
                "reading tables alone": read_alone(files, first.maker.sizes),
                "sampler, own order": sample(make_sampler(files, folder / "own", most_rows, None)),
                "sampler, scoring": sample(make_sampler(files, folder / "scoring", most_rows, rule)),
            }
            handed = {name: num for name, (_, num) in found.items()}
            for name, (taken, _) in found.items():
                seconds[name] += [taken] if turn else []
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    alone, scoring = medians["reading alone"], medians["sampler, scoring"]
    figures = [
        figure("rows of the stream", num_rows, "rows"),
        *(figure(f"{name}, rows read a second", num_rows / taken, "rows/s") for name, taken in medians.items()),
        figure("sampler in the own order, of reading alone", alone / medians["sampler, own order"], "x"),
        figure("sampler with scoring, of reading alone", alone / scoring, "x", least=LEAST),
        figure("sampler with scoring, of reading tables alone", medians["reading tables alone"] / scoring, "x"),
        figure("rows that scoring kept, of those it chose from", handed["sampler, scoring"] / num_rows, "x"),
    ]
    settings = {"tokens a row": LENGTH, "vocabulary": VOCAB, **dataclasses.asdict(_Sizes(*first.maker.sizes))}
    return bench.figures(settings, figures, {"seconds": seconds, "handed out": handed})


@dataclasses.dataclass
class _Sizes:
    """What a page says of buffers."""

    buffer_rows: int
    set_aside: int
    kept: int
