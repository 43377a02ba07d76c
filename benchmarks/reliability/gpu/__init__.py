"""Does all of it hold on a GPU, and what does it cost there?

A kit for whoever has a card, for as many minutes as there are: `python -m benchmarks gpu --minutes 8`. Its parts are

- `tests`: the tests marked `gpu` (bf16, fp16 with a scaler, memory, NCCL, compiled models, attention kernels, stops);
- `fidelity`: labels in bf16 against real optimizer steps in float32, at 30 M and 125 M parameters;
- `speed`: tokens/s of the probe against two plain forward passes and against training;
- `overhead`: device seconds of each stage of a round in a real `Trainer`, and what it allocates;
- `training`: as many steps as fit of random rows, rows that a tuned fastText likes, and rows that the run selects.

Each part runs in a process of its own and leaves its JSON under `--work` as it ends; the same command goes on with
what is left, and `training` with the steps after those that were saved. Nothing is begun that the time left does not
allow. Text is that of the Python installation, or of `--data`.

`--wheels DIR` first installs what is missing from a folder of wheels, on a machine without an index. One command makes
the folder, on a machine with an index, the same Python and the same platform:

    python -m pip wheel -w wheels ".[report]" pytest filelock fasttext-wheel

Leave out `fasttext-wheel` where it cannot be built; its arm is then left out as well. Delete `torch-*`, `nvidia_*` and
`triton-*` from the folder where the card's machine has its own torch.

Trade-off: minutes, one seed, and without a card tiny sizes on the processor, which only show that everything runs. No
card was at hand when this was written: there is no result of it yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import time
from typing import Any

from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import hardware
from benchmarks.lab.units import keep, read_units, unit_path
from benchmarks.reliability.gpu.device import MODELS, Task, card
from benchmarks.reliability.gpu.isolated import in_child
from benchmarks.reliability.gpu.page import page as page

PARTS = "benchmarks.reliability.gpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One call of the kit."""

    call: str  # a function of a module, which takes a task and gives a result with `done`
    size: str  # of the model
    share: float  # of the time


def add_options(parser: argparse.ArgumentParser) -> None:
    """Wheels, and how far to train."""
    parser.add_argument("--wheels", help="folder of wheels to install what is missing from, without an index")
    parser.add_argument("--steps", type=int, default=4_000, help="of each arm of `training`, over all calls")


def parts_of(quick: bool) -> dict[str, Part]:
    """All parts by name, in the order of worth."""
    first, second = ("tiny", None) if quick else ("30M", "125M")
    found = {
        "tests": Part(call="card_tests:run", size=first, share=0.3),
        f"fidelity {first}": Part(call="fidelity:run", size=first, share=0.15),
        f"speed {first}": Part(call="speed:run", size=first, share=0.05),
        "overhead": Part(call="overhead:run", size=first, share=0.1),
        "training": Part(call="training:run", size=first, share=0.25),
    }
    if second:
        found[f"fidelity {second}"] = Part(call="fidelity:run", size=second, share=0.1)
        found[f"speed {second}"] = Part(call="speed:run", size=second, share=0.05)
    return found


def run(bench: Bench) -> dict[str, Any]:
    """Run what is left, part by part."""
    parts = parts_of(bench.quick)
    done: dict[str, dict[str, Any]] = read_units(bench.work, parts)
    data = bench.data
    for name, part in parts.items():
        if done.get(name, {}).get("done"):
            continue
        later = [other for other in list(parts)[list(parts).index(name) :] if not done.get(other, {}).get("done")]
        share = part.share / sum(parts[other].share for other in later)
        seconds = share * (bench.deadline - time.monotonic())
        task = Task(
            part=name, size=part.size, seconds=seconds, quick=bench.quick, data=str(data), work=str(bench.work),
            steps=bench.options.steps if not bench.quick else 12, threads=bench.options.threads,
        )  # fmt: skip
        if seconds < task.least_seconds:
            say(f"{name}: no time left")
            continue
        say(f"{name}: " + ("" if seconds == float("inf") else f"up to {seconds:.0f} s"))
        found = _measured(f"{PARTS}.{part.call}", task)
        keep(unit_path(bench.work, name), found)
        done[name] = found
        bench.wrong |= bool(found.get("error"))
        if not bench.quick:
            bench.write(_document(bench, parts, done), aloud=False)
    bench.left = sum(not done.get(name, {}).get("done") for name in parts)
    return _document(bench, parts, done)


def _measured(call: str, task: Task) -> dict[str, Any]:
    begun = time.monotonic()
    if task.quick:  # a process of its own takes longer to begin than a tiny part
        module, _, name = call.partition(":")
        found: dict[str, Any] = getattr(importlib.import_module(module), name)(task)
    else:
        found = in_child(call, task)
    return {**found, "seconds": time.monotonic() - begun}


def _document(bench: Bench, parts: dict[str, Part], done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    settings = {name: MODELS[part.size].about() for name, part in parts.items() if name in ("tests", *done)}
    return {
        "quick": bench.quick, "hardware": {"card": card(), **hardware(bench.options.threads)},
        "settings": {"data": "given" if bench.options.data else "built in"}, "models": settings,
        "parts": {name: done.get(name) for name in parts},
    }  # fmt: skip
