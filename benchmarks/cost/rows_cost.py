"""What the order of rows costs a run: time of each row that the sampler hands out, and memory of a very large pool.

Times are of draining the sampler as the dataloader does, in every process of a run and for the rows of all of them:
rows of the Trainer's own order, rows of a selection that lies in a memory-mapped file, and rows that a resumed run
skips; beside them torch's own `RandomSampler`. Memory is of a process that opens a shuffled dataset of three
columns, draws the Trainer's own order, compares its hash and draws a round, one step after the other. The dataset is
made up (four tokens a row) and lies in a temporary folder under `--work` that is deleted at the end.

Trade-off: a dataset on a fast disk that fits the page cache; three minutes on two cores and 3 GB of disk.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import in_its_own_process, num_cores, seconds_of, temporary_folder, versions
from benchmarks.lab.memory import Meter, stage_table, status
from benchmarks.lab.tables import markdown, table, title

NUM_PROBES, NUM_SELECTED, RATIO = 2_000, 200_000, 0.2
TIMED_ROWS, REPEATS, BATCH = 2_000_000, 5, 512
COLUMNS = ("input_ids", "labels", "attention_mask")
CHUNK, ROW_TOKENS = 2_000_000, 4


def write_dataset(work: Path, num_rows: int) -> None:
    """Rows of four tokens in three columns, in one Arrow file, and the row numbers that shuffling it leaves."""
    import datasets
    import pyarrow as pa

    kind = pa.list_(pa.uint8(), ROW_TOKENS)
    schema = pa.schema({name: kind for name in COLUMNS})
    rng = np.random.default_rng(0)
    with pa.OSFile(str(work / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as out:
        for start in range(0, num_rows, CHUNK):
            size = min(CHUNK, num_rows - start)
            tokens = pa.array(rng.integers(2, 250, ROW_TOKENS * size, dtype=np.uint8))
            ones = pa.array(np.ones(ROW_TOKENS * size, np.uint8))
            parts = [pa.FixedSizeListArray.from_arrays(values, ROW_TOKENS) for values in (tokens, tokens, ones)]
            out.write_batch(pa.record_batch(parts, schema=schema))
    dataset = datasets.Dataset.from_file(str(work / "rows.arrow"))
    dataset.shuffle(seed=42, indices_cache_file_name=str(work / "indices.arrow"))


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks rows of one length, as a run's collator would."""
    return {name: np.array([row[name] for row in rows], np.int64) for name in COLUMNS}


def measure_memory(folder: str, num_rows: int) -> dict[str, Any]:
    """The steps in which a run holds something for each row of its pool."""
    import datasets
    from accelerate.data_loader import SeedableRandomSampler

    from mates_hf.data.pool import CandidatePool
    from mates_hf.selection.ledger import Ledger
    from mates_hf.training.clock import RowClock
    from mates_hf.training.sampler import ScheduledSampler

    work = Path(folder)
    datasets.disable_progress_bars()
    own, mapped = status("RssAnon", "RssFile")
    meter = Meter()
    indices = datasets.Dataset.from_file(str(work / "indices.arrow"))
    shuffled = datasets.Dataset.from_file(str(work / "rows.arrow"))
    shuffled = datasets.Dataset(shuffled.data, indices_table=indices.data)  # as from the cache of `shuffle`
    with meter.stage("1,024 rows read by `datasets` alone, at random"):
        for i in np.random.default_rng(1).integers(num_rows, size=1_024).tolist():
            shuffled[i]
    with meter.stage("open the pool: its label rule, its identity"):
        pool = CandidatePool(shuffled, collate)
        pool.identity()
    clock = RowClock(batches_per_epoch=num_rows // BATCH, accumulation=1, batch_rows=BATCH)
    sampler = ScheduledSampler(SeedableRandomSampler(range(num_rows), data_seed=0), clock, num_rows=num_rows)
    rows = iter(sampler)
    with meter.stage("first row: the Trainer's own order"):
        next(rows)
    ledger = Ledger(num_rows, 0)
    with meter.stage("first step: hash and shuffled pool, in threads"):
        ledger.prepare()
        assert sampler.own_state["own_sha256"]
    with meter.stage("boundary: what is left of the shuffle, mark the own order"):
        assert len(ledger.shuffled) == num_rows
        ledger.mark_trained(sampler.own_rows[:NUM_SELECTED])
    with meter.stage("draw candidates and probes"):
        draw = ledger.draw(
            round_number=1, num_selected=NUM_SELECTED, selection_ratio=RATIO, candidate_scope="slice",
            num_probes=NUM_PROBES,
        )  # fmt: skip
    with meter.stage("read the candidates' tokens"):
        for _ in pool.chunks(draw.candidates, 65_536, max_tokens=1 << 22):
            pass
    return {"stages": meter.stages, "start_own": own, "start_mapped": mapped}


def drained(make: Callable[[], Iterable[int]], num_rows: int, *, batched: bool) -> list[float]:
    """Microseconds a row, of each repeat."""
    from torch.utils.data import BatchSampler

    found = []
    for _ in range(REPEATS):
        rows = make()
        taken: Iterable[Any] = BatchSampler(rows, BATCH, drop_last=False) if batched else rows  # type: ignore[arg-type]
        found.append(seconds_of(functools.partial(collections.deque, taken, maxlen=0)) / num_rows * 1e6)
    return found


def measure_times(work: Path, num_rows: int) -> dict[str, list[float]]:
    """Microseconds a row of each kind."""
    from torch.utils.data import RandomSampler

    from mates_hf.training.clock import RowClock
    from mates_hf.training.sampler import ScheduledSampler

    num_rows -= num_rows % BATCH
    np.save(work / "selection.npy", np.random.default_rng(0).permutation(num_rows))
    selection = np.load(work / "selection.npy", mmap_mode="r")

    def scheduled(**at: int) -> ScheduledSampler:
        clock = RowClock(batches_per_epoch=num_rows // BATCH, accumulation=1, batch_rows=BATCH, **at)
        return ScheduledSampler(RandomSampler(range(num_rows)), clock, num_rows=num_rows)

    def selected() -> ScheduledSampler:
        sampler = scheduled()
        sampler.append(0, selection)
        return sampler

    skipped = {"start_step": num_rows // BATCH, "start_position": num_rows}
    kinds: dict[str, Callable[[], Iterable[int]]] = {
        "torch's RandomSampler": lambda: RandomSampler(range(num_rows)),
        "own order": scheduled,
        "selected rows": selected,
        "skipped rows": lambda: scheduled(**skipped),
    }
    times = {name: drained(make, num_rows, batched=False) for name, make in kinds.items()}
    return times | {f"{name}, in batches": drained(make, num_rows, batched=True) for name, make in kinds.items()}


def page(document: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, memory, times = document["settings"], document["memory"], document["microseconds"]
    own = max(stage["peak_own"] for stage in memory["stages"])
    total = max(stage["peak_own"] + stage["peak_mapped"] for stage in memory["stages"])
    num = settings["rows"]
    rows = [
        [name] + [
            f"{float(np.median(found)):.3f} ({min(found):.3f} to {max(found):.3f})"
            for found in (times[name], times[f"{name}, in batches"])
        ]
        for name in times
        if not name.endswith(", in batches")
    ]  # fmt: skip
    start = {"stage": "imports", "seconds": 0.0, "peak_own": memory["start_own"], "held_own": memory["start_own"],
             "peak_mapped": memory["start_mapped"]}  # fmt: skip
    return markdown(
        title("rows_cost", settings["quick"]),
        f"{settings['cpu_count']} cores shared with other work, Python {settings['python']}, torch "
        f"{settings['torch']}.",
        f"Microseconds a row that the sampler hands out, {settings['timed_rows']:,} rows, median of {REPEATS} "
        "(least to most). The draw of the order is part of it. In batches: through torch's `BatchSampler` of "
        f"{BATCH} rows, as a dataloader does.",
        table(["rows", "one by one", "in batches"], rows),
        f"Memory with {num:,} rows, a shuffled dataset of {len(COLUMNS)} columns. Own memory at most "
        f"**{own / 1e9:.2f} GB**, {(own - memory['start_own']) / num:.1f} bytes a row beyond what the imports hold; "
        "with the mapped pages of the dataset and its indices that were touched (8 bytes a row and more, which the "
        "system may drop, and of which reading 1,024 rows at random by `datasets` alone touches "
        f"{memory['stages'][0]['peak_mapped'] / 1e9:.2f} GB) {total / 1e9:.2f} GB.",
        stage_table([start, *memory["stages"]]),
    )


def run(bench: Bench) -> dict[str, Any]:
    """Make the dataset, measure, delete the dataset."""
    num_rows, timed = (2_000_000, 200_000) if bench.quick else (100_000_000, TIMED_ROWS)
    with temporary_folder(bench.work) as work:
        microseconds = measure_times(work, timed)
        write_dataset(work, num_rows)
        memory = in_its_own_process(measure_memory, str(work), num_rows, steady=False)
    settings = {"quick": bench.quick, "rows": num_rows, "timed_rows": timed, "cpu_count": num_cores()}
    return {"settings": {**settings, **versions("torch")}, "microseconds": microseconds, "memory": memory}
