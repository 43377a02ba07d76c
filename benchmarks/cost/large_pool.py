"""Score and select from 100 million candidates in 4 GB: seconds and memory of every stage of a round.

The candidates are made up (8 to 16 token ids of a Zipf-like vocabulary) and lie as Arrow files, 30 bytes each, in a
temporary folder under `--work` that is deleted at the end. The stages are the library's own (`CandidatePool`,
`Ledger`, `score_candidates`, `select_rows`), in a process whose private writable memory the system limits
(`RLIMIT_DATA`) to 4 GB beyond what it had reserved without using it (thread stacks, allocators), so a run that ends
has proved the figure. Labels are made up too: probes cost the same in any pool.
Ten minutes on two cores and 5 GB of disk.

Trade-off: rows are read in the shuffled order of the pool, which is cheap while the files fit the page cache.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import in_its_own_process, num_cores, temporary_folder, versions
from benchmarks.lab.memory import Meter, stage_table, status
from benchmarks.lab.tables import markdown, table, title

LIMIT_BYTES = 4 * 10**9
NUM_PROBES = 2_000
RATIO = 0.2
TEMPERATURE = 0.5
VOCABULARY = 16_384
SHORTEST, LONGEST = 8, 16
BATCH_ROWS, SHARDS = 500_000, 10
SCOPES = ("slice", "pool")


def write_pool(work: Path, num_rows: int) -> int:
    """Write the shards, rows of 8 to 16 uint16 ids, and return their bytes."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    ids = (VOCABULARY * rng.random(65_536) ** 4).astype(np.uint16)
    schema = pa.schema({"input_ids": pa.list_(pa.uint16())})
    shard_rows = -(-num_rows // SHARDS)
    for shard, first in enumerate(range(0, num_rows, shard_rows)):
        with pa.OSFile(str(work / f"shard-{shard:02d}.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as out:
            last = min(first + shard_rows, num_rows)
            for start in range(first, last, BATCH_ROWS):
                size = min(BATCH_ROWS, last - start)
                offsets = np.zeros(size + 1, np.int32)
                np.cumsum(rng.integers(SHORTEST, LONGEST, size, np.int32, endpoint=True), out=offsets[1:])
                values = ids[rng.integers(0, 65_536, offsets[-1], np.uint16)]
                rows = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
                out.write_batch(pa.record_batch([rows], schema=schema))
    return sum(path.stat().st_size for path in work.glob("*.arrow"))


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, npt.NDArray[Any]]:
    """Pads a batch, as a run's collator would: the pool has to find that its columns can be read without it."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {name: np.full((len(rows), width), fill) for name, fill in (("input_ids", 0), ("labels", -100))}
    for i, row in enumerate(rows):
        for values in batch.values():
            values[i, : len(row["input_ids"])] = row["input_ids"]
    batch["attention_mask"] = (batch["labels"] != -100).astype(np.int64)
    return batch


def measure_rounds(folder: str) -> dict[str, Any]:
    """The stages of a round for both scopes, under the limit."""
    import datasets

    from benchmarks.lab.corpus import made_up_labels
    from mates_hf.config import MatesConfig
    from mates_hf.data.pool import CandidatePool
    from mates_hf.engine.processes import ALONE
    from mates_hf.prediction.ngram_model import NgramInfluenceModel
    from mates_hf.selection.ledger import Ledger
    from mates_hf.selection.select_stage import select_rows
    from mates_hf.training.scoring import score_candidates

    work = Path(folder)
    data, used = status("VmData", "RssAnon")
    limit = data - used + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    meter, checks = Meter(), {}
    with meter.stage("open the pool, find its label rule, identity"):
        shards = [datasets.Dataset.from_file(str(path)) for path in sorted(work.glob("shard-*.arrow"))]
        pool = CandidatePool(datasets.concatenate_datasets(shards), collate)
        pool.identity()
    num_rows = len(pool)
    with meter.stage("ledger and shuffled order"):
        ledger = Ledger(num_rows, 0)
        _ = ledger.shuffled
    num_selected = int((num_rows - NUM_PROBES) * RATIO)
    for scope in SCOPES:
        with meter.stage(f"{scope}: draw"):
            sizes = {"num_selected": num_selected, "num_probes": NUM_PROBES, "selection_ratio": RATIO}
            draw = ledger.draw(round_number=1, candidate_scope=scope, **sizes)
        labels = made_up_labels(pool.token_rows(draw.probes), draw.probes, noise=1.0)
        with meter.stage(f"{scope}: fit"):
            model = NgramInfluenceModel().fit(pool, labels)
        config = MatesConfig(candidate_scope=scope, selection_ratio=RATIO, temperature=TEMPERATURE)
        unused = dict.fromkeys(("copy_marks", "tokenizer", "model", "reference"))
        run, path = SimpleNamespace(pool=pool, config=config, side=ALONE, **unused), work / scope
        path.mkdir()
        with meter.stage(f"{scope}: score"):
            scored = score_candidates(run, path, model, draw.candidates, 1.0)
        with meter.stage(f"{scope}: select"):
            chosen = select_rows(
                scored.candidates, scored.influence, scored.num_targets, labels, num_selected,
                temperature=TEMPERATURE, selection_seed=0, round_number=1, hashes=scored.hashes, max_copies=1,
            ).rows  # fmt: skip
        with meter.stage(f"{scope}: mark as trained"):
            ledger.mark_trained(chosen)
        picked = ledger.consumed[draw.candidates]
        means = [float(part.mean(dtype=np.float64)) for part in (scored.influence[picked], scored.influence)]
        checks[scope] = {
            "candidates": len(draw.candidates),
            "selected": len(chosen),
            "mean_predicted_influence_selected": means[0],
            "mean_predicted_influence_candidates": means[1],
        }
        assert int(picked.sum()) == num_selected
        assert not ledger.consumed[draw.probes].any()
        assert means[0] > means[1]
        ledger.start_new_pass()
        del draw, scored, chosen, picked
    return {"stages": meter.stages, "checks": checks}


def measure_sampler(num_rows: int) -> dict[str, Any]:
    """What the order of the Trainer's own sampler costs: torch's list of ints, then as an array of this library."""
    from torch.utils.data import RandomSampler

    meter = Meter()
    with meter.stage("first row of `RandomSampler`"):
        rows = iter(RandomSampler(range(num_rows)))
        next(rows)
    with meter.stage("the rest, as an int64 array"):
        np.fromiter(rows, np.int64, count=num_rows - 1)
    return {"stages": meter.stages}


def page(document: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, stages = document["settings"], document["stages"]
    means = [f"mean_predicted_influence_{of}" for of in ("selected", "candidates")]
    rows = [
        [scope, f"{found['candidates']:,}", f"{found['selected']:,}", *(f"{found[mean]:.3g}" for mean in means)]
        for scope, found in document["checks"].items()
    ]
    return markdown(
        title("large_pool", settings["quick"]),
        f"{settings['candidates']:,} candidates, {settings['arrow_bytes'] / 1e9:.1f} GB of Arrow files, "
        f"{settings['probes']:,} probes, ratio {RATIO}, temperature {TEMPERATURE}, {settings['cpu_count']} cores, "
        f"Python {settings['python']}.",
        f"Own memory at most: **{max(stage['peak_own'] for stage in stages) / 1e9:.2f} GB**; limit set for the "
        f"process: {LIMIT_BYTES / 1e9:.2f} GB.",
        stage_table(stages),
        "What was selected, of how many, and predicted influence of the selected against all (> 0 helps):",
        table(["scope", "candidates", "selected", "mean of the selected", "mean of all"], rows),
        "Not in these figures: the Trainer's own sampler. `RandomSampler` (and accelerate's `SeedableRandomSampler`, "
        "which derives from it) makes a Python list of all rows, with or without this library, in every process:",
        stage_table(document["sampler"]["stages"]),
    )


def run(bench: Bench) -> dict[str, Any]:
    """Write the pool, measure, delete the pool."""
    num_rows = 2_000_000 if bench.quick else 100_000_000
    with temporary_folder(bench.work) as work:
        settings = {
            "quick": bench.quick, "candidates": num_rows, "arrow_bytes": write_pool(work, num_rows),
            "probes": NUM_PROBES, "ratio": RATIO, "temperature": TEMPERATURE, "limit_bytes": LIMIT_BYTES,
            "cpu_count": num_cores(), **versions(),
        }  # fmt: skip
        measured = in_its_own_process(measure_rounds, str(work), steady=False)
        sampler = in_its_own_process(measure_sampler, num_rows, steady=False)
    return {"settings": settings, **measured, "sampler": sampler}
