"""How long `NgramInfluenceModel` takes to fit, against probing its labels, and how fast it scores an Arrow column.

Fitting is timed on the labels of a round, and on 40,000 made-up ones, nearer to what a large run has, where sorting no
longer fits a cache: `overhead` predicts with that. Scoring runs in processes of its own that take turns, because the
number of threads is fixed once the kernel has been compiled; compilation is timed apart.

Trade-off: the column is the built-in corpus over and over in a shuffled order, so that its ids are as frequent as in
text; the kernel is also timed on uniform ids of a large vocabulary, where every table look-up misses the cache.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lab.corpus import as_column, as_reference, made_up_labels, text_rows
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import alternate, in_its_own_process, median_ratio, seconds_of, temporary_folder
from benchmarks.lab.models import trained
from benchmarks.lab.tables import figure
from mates_hf.data.pool import CandidatePool
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.prediction.ngram.kernels import score_rows
from mates_hf.prediction.ngram_model import NgramInfluenceModel

LENGTH = 256
NUM_LABELS = 2000
NUM_MANY = 40_000
MANY = "fitting many candidates"
CHUNK = 65_536  # candidates read and scored at a time, as in a round


def measure_fit(quick: bool) -> dict[str, Any]:
    """Seconds of probing and of fitting the candidates of a round, and the fitted model."""
    pool, reference_rows = text_rows()
    reference, rows = as_reference(reference_rows), pool.take(np.arange(200, 200 + NUM_LABELS // (20 if quick else 1)))
    model, optimizer = trained(pool, 4 if quick else 20)
    begin = time.perf_counter()
    labels = DirectionalProbe().measure(model, optimizer, reference, rows)
    probing = time.perf_counter() - begin
    few = np.arange(100)
    compiling = seconds_of(lambda: NgramInfluenceModel().fit(rows.take(few), labels.take(few)))
    predictor = NgramInfluenceModel()
    fits = alternate({"fit": lambda: predictor.fit(rows, labels)}, 2 if quick else 5)["fit"]
    many = pool.take(np.random.default_rng(1).integers(0, len(pool), NUM_MANY // (10 if quick else 1)))
    return {
        "pool": pool,
        "many": len(many.values) / seconds_of(lambda: NgramInfluenceModel().fit(many, made_up_labels(many))),
        "num_many": len(many),
        "predictor": predictor,
        "probing": probing,
        "num_labels": len(rows),
        "fits": fits,
        "compiling": compiling,
    }


def score_worker(place: str, repeats: int) -> dict[str, Any]:
    """Seconds of scoring the column whole and in parts, in this process's number of threads."""
    from datasets import load_from_disk

    folder = Path(place)
    dataset = load_from_disk(str(folder / "column"))
    predictor = NgramInfluenceModel.from_pretrained(folder / "model")
    rows = CandidatePool(dataset).token_rows()
    rng = np.random.default_rng(0)
    token, previous = rng.random((2, 50_257), dtype=np.float32)
    tables = (token, previous, rng.random(2**20, dtype=np.float32))
    uniform = rng.integers(0, 50_257, len(rows.values), dtype=np.int32)

    def from_column() -> None:
        pool = CandidatePool(dataset)
        for chunk in pool.chunks(None, CHUNK):
            predictor.predict(chunk)

    arms: dict[str, Any] = {
        "column": from_column,
        "predict": lambda: predictor.predict(rows),
        "kernel": lambda: score_rows(rows.values, rows.offsets, None, tables),
        "uniform": lambda: score_rows(uniform, rows.offsets, None, tables),
        "sum": lambda: rows.values.sum(),
    }
    compiling = seconds_of(lambda: predictor.predict(rows.take(np.arange(8))))
    for arm in arms.values():
        arm()
    return {"tokens": len(rows.values), "compiling": compiling, "seconds": alternate(arms, repeats)}


def run_workers(folder: Path, turns: int, repeats: int) -> dict[int, dict[str, Any]]:
    """`score_worker` in processes of 1 thread and of 2, in turn; their repeats together."""
    found: dict[int, dict[str, Any]] = {}
    for turn in range(turns):
        for threads in (1, 2)[:: -1 if turn % 2 else 1]:
            result = in_its_own_process(score_worker, str(folder), repeats, threads=threads)
            known = found.setdefault(threads, {**result, "seconds": {name: [] for name in result["seconds"]}})
            for name, seconds in result["seconds"].items():
                known["seconds"][name] += seconds
    return found


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    torch.set_num_threads(bench.options.threads)
    quick = bench.quick
    fitted = measure_fit(quick)
    pool, num_rows = fitted["pool"], (8_000_000 if quick else 64_000_000) // LENGTH
    drawn = pool.take(np.random.default_rng(0).integers(0, len(pool), num_rows))
    with temporary_folder(bench.work) as folder:
        as_column(drawn.values.astype(np.int32), LENGTH).save_to_disk(str(folder / "column"))
        fitted["predictor"].save_pretrained(folder / "model")
        scored = run_workers(folder, *((1, 3) if quick else (2, 5)))

    def rate(threads: int, arm: str) -> float:
        result = scored[threads]
        return float(result["tokens"] / statistics.median(result["seconds"][arm]) / 1e6)

    def against_sum(threads: int, arm: str) -> float:
        seconds = scored[threads]["seconds"]
        return median_ratio(seconds["sum"], seconds[arm])

    fit_seconds, probing = statistics.median(fitted["fits"]), fitted["probing"]
    labels = f"{fitted['num_labels']:,} candidates"
    arms = (
        ("column", "Arrow column through CandidatePool and `predict`", 100.0),
        ("predict", "`predict` of rows in memory", None),
        ("kernel", "kernel alone, text", 100.0),
        ("uniform", "kernel alone, uniform ids of 50,257", None),
        ("sum", "`numpy.sum` of the ids", None),
    )
    figures = [
        figure(f"seconds of fitting / of probing {labels} (measured)", fit_seconds / probing, most=0.1),
        figure(f"fitting {labels}", fit_seconds, "s"),
        figure(f"probing {labels}, measured", probing, "s"),
        figure(f"M labelled tokens/s, {MANY}", fitted["many"] / 1e6),
        figure("first fit of a process (100 candidates), compilation included", fitted["compiling"], "s"),
        *(
            figure(f"M tokens/s, {label}, {name}", rate(threads, arm), least=goal if threads == 2 else None)
            for threads, name in ((2, "2 threads"), (1, "1 thread"))
            for arm, label, goal in arms
        ),
        figure("tokens/s of the kernel, text, 2 threads / `numpy.sum`", against_sum(2, "kernel"), "x"),
        figure("tokens/s of the kernel, text, 1 thread / `numpy.sum`", against_sum(1, "kernel"), "x"),
        figure("first `predict` of a process, compilation included", scored[2]["compiling"], "s"),
    ]
    settings = {
        "labels": f"{fitted['num_labels']} x {LENGTH} tokens",
        "held-out Spearman": f"{fitted['predictor'].report.spearman:.3f}",
        "column": f"{scored[1]['tokens']:,} tokens, memory-mapped int32 lists of {LENGTH}",
        "fits": len(fitted["fits"]), "many candidates": f"{fitted['num_many']:,}",
        "scorings": len(scored[1]["seconds"]["sum"]),
    }  # fmt: skip
    raw = {
        "probing": fitted["probing"],
        "fits": fitted["fits"],
        "scored": {str(threads): result for threads, result in scored.items()},
    }
    return bench.figures(settings, figures, raw)
