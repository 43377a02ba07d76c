# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf"]
# ///
"""What an influence label agrees with: one real batch, and 10 to 1,000 steps on the rows it prefers.

    python benchmarks/fidelity.py --data DATA_DIR             # about an hour on two cores
    python benchmarks/fidelity.py --quick                     # two minutes, on text of the Python installation
    python benchmarks/fidelity.py --check                     # recompute the page from the JSON

Place in the flow: it freezes the definition of the label and the selection defaults on evidence. Five parts, in units
that run in processes of their own and are kept one by one, so that a killed run goes on where it stopped:

- `in_batch`: labels against the change of the reference loss when a candidate replaces one row of a real batch.
- `cost`: seconds that each kind of label takes for 1,000 candidates.
- `horizon`: development loss after training on sets of rows chosen by predicted influence.
- `rounds`: labels of the same candidates from round to round (what selecting by them gains is in `selection.py`).
- `fit`: held-out rank correlation of the n-gram influence model by kind and number of labels.

Trade-off: one small model on one corpus; every figure has its learning rate, seed and interval beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from pathlib import Path
from typing import Any

import torch
from fidelity_one_step import cost, in_batch
from fidelity_setup import BATCH_ROWS, LR, QUICK, WINDOW, Paths, Sizes
from fidelity_tables import write_tables
from fidelity_training import ARMS, LABEL_KINDS, SETS, fit, horizon, rounds
from lab import Lab, build_model, load_lab, rounded
from units import (
    end,
    keep,
    opened,
    parser_of,
    plain,
    read_results,
    read_units,
    run_units,
    say,
    take_over,
    unit_path,
    write_results,
)

DIGITS = 5
FUNCTIONS = {"in_batch": in_batch, "cost": cost, "horizon": horizon, "rounds": rounds, "fit": fit}
Unit = tuple[str, str, dict[str, Any], float]
QUICK_UNITS = (
    "in_batch/late", "in_batch/many lengths", "cost/late", "fit/all tokens, averaged", "horizon/random/random",
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
    units += [("cost/late", "cost", {}, 400)]
    units += [("fit/all tokens, averaged", "fit", {"kind": "all tokens, averaged"}, 30)]
    units += [(f"rounds/{arm}", "rounds", {"arm": arm}, 25) for arm in ARMS]
    units += [
        (f"horizon/{kind}/{which}", "horizon", {"kind": kind, "which": which}, 45)
        for kind, names in SETS.items()
        for which in names
    ]
    return units if sizes.everything else [unit for unit in units if unit[0] in QUICK_UNITS]


def settings_of(unit: Unit) -> dict[str, Any]:
    """What a unit was made with, so far as the sizes do not say it."""
    _, part, arguments, _ = unit
    return {"part": part, **arguments, "label": LABEL_KINDS.get(arguments.get("kind", ""), {})}


def recover(paths: Paths, sizes: Sizes, page: Path, units: list[Unit]) -> int:
    """Take over units of an earlier JSON, if it was made at these sizes and with settings as they are now.

    A size that the JSON does not know is of a part that it does not have.
    """
    document, now = read_results(page), plain(dataclasses.asdict(sizes))
    if document is None or any(document["settings"].get(name, value) != value for name, value in now.items()):
        return 0
    return take_over(paths.work, document["units"], {unit[0]: settings_of(unit) for unit in units})


def run_unit(paths: Paths, sizes: Sizes, unit: Unit) -> tuple[str, float]:
    """Run one unit and keep its result; name and seconds."""
    name, part, arguments, _ = unit
    torch.set_num_threads(1)
    logging.getLogger("mates_hf").setLevel(logging.ERROR)
    started = time.perf_counter()
    lab = open_lab(paths, sizes)
    result = FUNCTIONS[part](lab, sizes, paths, **arguments)
    seconds = time.perf_counter() - started
    keep(unit_path(paths.work, name), rounded({**result, "settings": settings_of(unit), "seconds": seconds}, DIGITS))
    return name, seconds


def main() -> None:
    """Run what is missing, then write the JSON and the tables."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="units whose names begin with one of these")
    bench = opened(parser, "fidelity", write_tables)
    sizes = QUICK if bench.options.quick else Sizes()
    paths = Paths(data=bench.data, work=bench.work)
    lab = open_lab(paths, sizes)
    say(f"{len(lab.rows)} rows in {len(lab.domain_names)} domains; {lab.overlap}")

    units = all_units(sizes)
    say(f"{recover(paths, sizes, bench.page, units)} of {len(units)} units taken over from the JSON")
    calls = {unit[0]: (paths, sizes, unit) for unit in units if unit[0].startswith(tuple(bench.options.only))}
    left = run_units(bench, run_unit, calls, {unit[0]: unit[3] for unit in units})

    results = read_units(paths.work, (unit[0] for unit in units))
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
    write_results(bench.page, document, write_tables, DIGITS)
    end(left)


if __name__ == "__main__":
    main()
