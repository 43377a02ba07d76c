# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf"]
# ///
"""Score and select from 100 million candidates in 4 GB: seconds and memory of every stage of a round.

    python benchmarks/large_pool.py            # 100 million; writes benchmarks/results/large_pool.{json,md}
    python benchmarks/large_pool.py --quick    # 2 million; prints, writes nothing unless --out is given

The candidates are made up (8 to 16 token ids of a Zipf-like vocabulary) and lie as Arrow files, 30 bytes each, in a
temporary folder under `--work` that is deleted at the end. The stages are the library's own (`CandidatePool`,
`Ledger`, `score_candidates`, `select_rows`), in a process whose private writable memory the system limits
(`RLIMIT_DATA`) to 4 GB beyond what it had reserved without using it (thread stacks, allocators), so a run that ends
has proved the figure. Labels are made up too: probes cost the same in any pool.

Trade-off: memory is read from the system every few milliseconds, not at each allocation. Own memory is `RssAnon`.
Pages of mapped files (`RssFile`: the Arrow files, and what the round wrote) are counted apart, because the system
drops them when it needs the room.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from memory_meter import Meter, status

RESULTS = Path(__file__).parent / "results"
LIMIT_BYTES = 4 * 10**9
NUM_PROBES = 2_000
RATIO = 0.2
TEMPERATURE = 0.5
VOCABULARY = 16_384
SHORTEST, LONGEST = 8, 16
BATCH_ROWS, SHARDS = 500_000, 10
SCOPES = ("slice", "pool")
_WORKER = "MATES_HF_LARGE_POOL_WORKER"


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


def made_up_labels(pool: Any, probes: npt.NDArray[np.int64]) -> Any:
    """Labels of a made-up effect of each token, with noise, as a probe would have measured them."""
    from mates_hf.records import InfluenceLabels

    rng = np.random.default_rng(1)
    effects = rng.normal(size=VOCABULARY)
    rows = pool.token_rows(probes)
    derivatives = effects[rows.values[rows.target_mask]] + rng.normal(size=int(rows.num_targets.sum()))
    starts = np.concatenate([[0], np.cumsum(rows.num_targets)[:-1]])
    means = (np.add.reduceat(derivatives, starts) / rows.num_targets).astype(np.float32)
    return InfluenceLabels(
        candidate_id=probes,
        influence=1e-3 * means,
        influence_per_token=means,
        loss=np.full(len(rows), 5.0, np.float32),
        num_tokens=rows.num_targets,
        probe=np.full(len(rows), "directional"),
        step_size=1e-3,
        token_derivatives=derivatives.astype(np.float32),
    )


def measure_rounds(work: Path) -> dict[str, Any]:
    """The stages of a round for both scopes, under the limit."""
    import datasets

    from mates_hf.config import MatesConfig
    from mates_hf.data.pool import CandidatePool
    from mates_hf.engine.processes import ALONE
    from mates_hf.prediction.ngram_model import NgramInfluenceModel
    from mates_hf.selection.ledger import Ledger
    from mates_hf.selection.select_stage import select_rows
    from mates_hf.training.scoring import score_candidates

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
            draw = ledger.draw(
                round_number=1,
                num_selected=num_selected,
                selection_ratio=RATIO,
                candidate_scope=scope,
                num_probes=NUM_PROBES,
            )
        labels = made_up_labels(pool, draw.probes)
        with meter.stage(f"{scope}: fit"):
            model = NgramInfluenceModel().fit(pool, labels)
        config = MatesConfig(candidate_scope=scope, selection_ratio=RATIO, temperature=TEMPERATURE)
        run, path = (
            SimpleNamespace(
                pool=pool, config=config, side=ALONE, copy_marks=None, tokenizer=None, model=None, reference=None
            ),
            work / scope,
        )
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
            "probed_and_selected": int(ledger.consumed[draw.probes].sum()),
            "mean_predicted_influence_selected": means[0],
            "mean_predicted_influence_candidates": means[1],
        }
        assert int(picked.sum()) == num_selected
        assert not checks[scope]["probed_and_selected"]
        assert means[0] > means[1]
        ledger.start_new_pass()
        del draw, scored, chosen, picked
    return {
        "stages": meter.stages,
        "checks": checks,
        "max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


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


def in_its_own_process(what: str, work: Path, num_rows: int) -> dict[str, Any]:
    """Run one of the measurements in a fresh process."""
    environment = {**os.environ, _WORKER: what, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, __file__, "--work", str(work), "--candidates", str(num_rows)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(stages: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of a Markdown table."""
    head = ["| stage | seconds | own memory at most, MB | held after, MB | mapped file pages at most, MB |"]
    rows = [
        f"| {stage['stage']} | {stage['seconds']:.1f} | "
        + " | ".join(f"{stage[name] / 1e6:,.0f}" for name in ("peak_own", "held_own", "peak_mapped"))
        + " |"
        for stage in stages
    ]
    return [*head, "|---|---|---|---|---|", *rows]


def report(settings: dict[str, Any], measured: dict[str, Any], sampler: dict[str, Any]) -> str:
    """The Markdown page."""
    peak = max(stage["peak_own"] for stage in measured["stages"])
    lines = [
        f"# large_pool{' (quick, not to be reported)' if settings['quick'] else ''}",
        "",
        f"{settings['candidates']:,} candidates, {settings['arrow_bytes'] / 1e9:.1f} GB of Arrow files, "
        f"{settings['probes']:,} probes, ratio {RATIO}, temperature {TEMPERATURE}, {settings['cpu_count']} cores, "
        f"Python {settings['python']}.",
        "",
        f"Own memory at most: **{peak / 1e9:.2f} GB**; limit set for the process: {LIMIT_BYTES / 1e9:.2f} GB.",
        "",
        *table(measured["stages"]),
        "",
        "What was selected, of how many, and predicted influence of the selected against all (> 0 helps):",
        "",
        "| scope | candidates | selected | mean of the selected | mean of all |",
        "|---|---|---|---|---|",
    ]
    for scope, check in measured["checks"].items():
        means = (check["mean_predicted_influence_selected"], check["mean_predicted_influence_candidates"])
        lines.append(
            f"| {scope} | {check['candidates']:,} | {check['selected']:,} | {means[0]:.3g} | {means[1]:.3g} |"
        )
    lines += [
        "",
        "Not in these figures: the Trainer's own sampler. `RandomSampler` (and accelerate's `SeedableRandomSampler`, "
        "which derives from it) makes a Python list of all rows, with or without this library, in every process:",
        "",
        *table(sampler["stages"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the pool, measure, report, delete the pool."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--candidates", type=int, default=None, help="rows of the pool (100 million; quick: 2 million)"
    )
    parser.add_argument("--quick", action="store_true", help="a small pool; too short to report")
    parser.add_argument("--work", type=Path, default=None, help="where the temporary folder of the pool goes")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the results; a quick run has none of its own"
    )
    arguments = parser.parse_args()
    worker = os.environ.get(_WORKER)
    if worker == "rounds":
        print(json.dumps(measure_rounds(arguments.work)))
        return
    if worker == "sampler":
        print(json.dumps(measure_sampler(arguments.candidates)))
        return
    num_rows = arguments.candidates or (2_000_000 if arguments.quick else 100_000_000)
    work = Path(tempfile.mkdtemp(prefix="large-pool-", dir=arguments.work))
    try:
        settings = {
            "quick": arguments.quick,
            "candidates": num_rows,
            "arrow_bytes": write_pool(work, num_rows),
            "probes": NUM_PROBES,
            "ratio": RATIO,
            "temperature": TEMPERATURE,
            "limit_bytes": LIMIT_BYTES,
            "cpu_count": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        }
        measured = in_its_own_process("rounds", work, num_rows)
        sampler = in_its_own_process("sampler", work, num_rows)
    finally:
        shutil.rmtree(work)
    text = report(settings, measured, sampler)
    print(text)
    out = arguments.out or (None if arguments.quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        payload = {"settings": settings, **measured, "sampler": sampler}
        (out / "large_pool.json").write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
        (out / "large_pool.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
