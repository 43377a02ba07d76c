# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf"]
# ///
"""What an influence label agrees with: one real batch, and 10 to 1,000 steps on the rows it prefers.

    python benchmarks/fidelity.py --data DATA_DIR             # about 20 minutes on two cores
    python benchmarks/fidelity.py --quick                     # two minutes, on text of the Python installation
    python benchmarks/fidelity.py --check                     # recompute the page from the JSON

Place in the flow: it freezes the definition of the label and the selection defaults on evidence. Four parts, in units
that run in processes of their own and are kept one by one, so that a killed run goes on where it stopped:

- `in_batch`: labels against the change of the reference loss when a candidate replaces one row of a real batch.
- `horizon`: development loss after training on sets of rows chosen by predicted influence.
- `rounds`: labels of the same candidates from round to round (what selecting by them gains is in `selection.py`).
- `fit`: held-out rank correlation of the n-gram influence model by kind and number of labels.

Trade-off: one small model on one corpus; every figure has its learning rate, seed and interval beside it.
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

import torch
from fidelity_one_step import in_batch
from fidelity_setup import BATCH_ROWS, LR, QUICK, WINDOW, Paths, Sizes
from fidelity_tables import write_tables
from fidelity_training import ARMS, SETS, fit, horizon, rounds
from lab import Lab, build_model, keep, load_lab, rounded, side_by_side, write_built_in

FUNCTIONS = {"in_batch": in_batch, "horizon": horizon, "rounds": rounds, "fit": fit}
Unit = tuple[str, str, dict[str, Any], float]
QUICK_UNITS = (
    "in_batch/late", "in_batch/many lengths", "fit/all tokens, averaged", "horizon/random/random",
    "horizon/all tokens, averaged/deciles", "horizon/all tokens, averaged/top", "rounds/random",
    "rounds/averaged, pooled",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def open_lab(paths: Paths, sizes: Sizes) -> Lab:
    """The laboratory, once a process."""
    return load_lab(paths.data, paths.work, num_documents=sizes.documents)


def all_units(sizes: Sizes) -> list[Unit]:
    """(name, part, arguments, rough cost in seconds) of everything there is to do, in the order of worth."""
    late, early = sizes.warm, sizes.early
    configurations = {
        "late": {"steps": late},
        "early": {"steps": early},
        "β2 0.999": {"steps": late, "beta2": 0.999},
        "clipping off": {"steps": late, "clip": None},
        "many lengths": {"steps": late, "many_lengths": True},
        "large batch": {"steps": sizes.large_batch_steps, "batch_rows": sizes.large_batch},
        "1,000 steps": {"steps": sizes.long},
        "rate 3e-3": {"steps": late, "lr": 3e-3},
        "Llama": {"steps": late, "family": "llama"},
        "1 M parameters": {"steps": late, "width": 128, "layers": 4},
        "labels in bf16": {"steps": late, "bf16": True},
        "seed 1": {"steps": late, "seed": 1},
    }
    units: list[Unit] = [(f"in_batch/{name}", "in_batch", settings, 60) for name, settings in configurations.items()]
    units += [("fit/all tokens, averaged", "fit", {"kind": "all tokens, averaged"}, 30)]
    units += [(f"rounds/{arm}", "rounds", {"arm": arm}, 25) for arm in ARMS]
    units += [
        (f"horizon/{kind}/{which}", "horizon", {"kind": kind, "which": which}, 45)
        for kind, names in SETS.items()
        for which in names
    ]
    return units if sizes.everything else [unit for unit in units if unit[0] in QUICK_UNITS]


def unit_path(paths: Paths, name: str) -> Path:
    """Where the result of a unit is kept."""
    return paths.work / "units" / (name.replace("/", "--").replace(" ", "_") + ".json")


def run_unit(paths: Paths, sizes: Sizes, unit: Unit) -> tuple[str, float]:
    """Run one unit and keep its result; name and seconds."""
    name, part, settings, _ = unit
    torch.set_num_threads(1)
    logging.getLogger("mates_hf").setLevel(logging.ERROR)
    started = time.perf_counter()
    lab = open_lab(paths, sizes)
    result = FUNCTIONS[part](lab, sizes, paths, **settings)
    seconds = time.perf_counter() - started
    keep(unit_path(paths, name), rounded({**result, "seconds": seconds}))
    return name, seconds


def say(text: str) -> None:
    """One line to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run what is missing, then write the JSON and the tables."""
    parser = argparse.ArgumentParser(description="Measure what influence labels agree with.")
    parser.add_argument("--data", type=Path, help="folder with corpus.jsonl.gz and eval/; --quick needs none")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="for the JSON and tables")
    parser.add_argument("--work", type=Path, default=Path("runs/fidelity"), help="for units already done")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--only", nargs="+", default=[""], help="units whose names begin with one of these")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no unit after this many")
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that everything runs")
    parser.add_argument("--check", action="store_true", help="recompute the page from the JSON, and compare")
    arguments = parser.parse_args()
    page = arguments.out / ("fidelity-quick.md" if arguments.quick else "fidelity.md")
    if arguments.check:
        document = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
        raise SystemExit(0 if write_tables(document) == page.read_text(encoding="utf-8") else "The page differs.")
    if arguments.data is None and not arguments.quick:
        parser.error("--data must name the folder of the data")
    logging.basicConfig(level=logging.ERROR)
    sizes = QUICK if arguments.quick else Sizes()
    work = arguments.work / ("quick" if arguments.quick else "full")
    data = arguments.data or write_built_in(work / "built-in")
    paths = Paths(data=data.resolve(), work=work.resolve())
    lab = open_lab(paths, sizes)
    say(f"{len(lab.rows)} rows in {len(lab.domain_names)} domains; {lab.overlap}")

    units = all_units(sizes)
    asked = [unit for unit in units if unit[0].startswith(tuple(arguments.only))]
    todo = [unit for unit in asked if not unit_path(paths, unit[0]).exists()]
    cost = {name: seconds for name, _, _, seconds in todo}
    started, done, number = time.perf_counter(), 0.0, 0
    for number, (name, seconds) in enumerate(
        side_by_side(
            run_unit, ((paths, sizes, unit) for unit in todo), arguments.workers, started + 60 * arguments.minutes
        ),
        1,
    ):
        done += cost.pop(name)
        left = (time.perf_counter() - started) * sum(cost.values()) / done
        say(f"[{number}/{len(todo)}] {name}: {seconds:.0f} s, about {left / 60:.0f} min left")

    found = {name: unit_path(paths, name) for name, *_ in units}
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}
    model = build_model(lab.vocab_size)
    document = {
        "settings": {
            **dataclasses.asdict(sizes), "learning_rate": LR, "batch_rows": BATCH_ROWS, "window": WINDOW,
            "parameters": sum(p.numel() for p in model.parameters()), "vocab_size": lab.vocab_size,
            "row_tokens": int(lab.rows.lengths[0]), "pool_rows": len(lab.rows), "domains": lab.domain_names,
            "reference_passages": len(lab.reference["all"]), "development_passages": len(lab.development["all"]),
            "torch": torch.__version__, "missing": len(units) - len(results), **lab.overlap,
        },
        "units": results,
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(document), ensure_ascii=False, separators=(",", ":")) + "\n"
    page.with_suffix(".json").write_text(text, encoding="utf-8")
    tables = write_tables(json.loads(text))
    page.write_text(tables, encoding="utf-8")
    say(tables)
    if number < len(todo):
        say(f"{len(todo) - number} units are left; the same command goes on")
        sys.exit(3)


if __name__ == "__main__":
    main()
