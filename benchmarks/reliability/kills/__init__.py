"""Kill a run at random points, resume it, compare it with the run that was left alone: how many differ?

Called again, it continues; `--only 17 --seed 0` is one point again, its folder kept.

A point is one executed line: of this library, of the Trainer's loop, or of what writes and deletes its checkpoints.
A first run of each setting counts its lines, phase by phase (probe, fit, inside the write of a file, inside the save
of a checkpoint, ...). For a point, a phase and one of its lines are drawn; the run sends itself SIGKILL there. It is
then resumed as a user would resume it, from `last_complete_checkpoint`, or started again where there is none yet;
every third one may be killed a second time on the way. The end must have the same weights, optimizer state, losses,
random streams, rows in the same order and the same selections, to the bit, and no stage that was finished may be run
again.

With `--power-loss` every fifth kill takes the machine with it. What was not flushed is gone then: every rename whose
folder was not flushed since is undone before the run is resumed. So is the last rename of a round to its final name,
flushed or not, as by a file server that says more than it does.

With `--processes 2` two processes train together and one of them, the main one or the other, is killed; whatever is
left of the other is killed five seconds later, as a launcher does.

Trade-off: importing torch and transformers takes longer than the run, so runs are forked from a process that has
imported them and built nothing. They are real processes, with real dataloader workers, and die of a real SIGKILL.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import ROOT
from benchmarks.lab.tables import markdown, table
from benchmarks.reliability.kills.runs import count_lines, draw_setting, run_point

NUM_SETTINGS = 10
FORMAT = 2


def page(document: Mapping[str, Any]) -> str:
    """Points by the phase of their first kill."""
    points = document["points"]
    first = [(point["deaths"][0]["phase"], point) for point in points if point["deaths"]]
    rows = [
        [phase, *_counts([p for name, p in first if name == phase])] for phase in sorted({name for name, _ in first})
    ]
    size, power_loss = document["processes"], document["power_loss"]
    command = f"python -m benchmarks kills --points {len(points)} --seed {document['seed']}"
    command += " --power-loss" * power_loss + f" --processes {size}" * (size > 1)
    num_undone = sum(bool(death.get("undone")) for point in points for death in point["deaths"])
    lost = sum(p["power_loss"] for p in points)
    power = (
        f" {lost} of the points lost power: renames that were not flushed, and the last one that finished a round, "
        f"were undone before the run was resumed, if there were any; {num_undone} kills had some."
    )
    heads = ["killed in", "points", "killed a second time", "lost power", "no checkpoint yet: started again", "differ"]
    return markdown(
        "# Killed anywhere, resumed exactly",
        f"`{command}`: {'one process' if size == 1 else f'{size} processes (gloo)'} a run, SIGKILL at a random "
        "executed line, resumed from the last complete checkpoint, compared to the bit with the run that was left "
        f"alone (CPU, float32, dropout 0.1; {len(document['settings'])} settings of workers, accumulation, "
        "checkpoints, scope, averaging, guard, drift checks and kept rounds, in the JSON file)."
        f"{power if power_loss else ''}",
        table(heads, [*rows, ["**all**", *_counts(points)]]),
    )


def _counts(points: list[dict[str, Any]]) -> list[int]:
    return [
        len(points), sum(len(p["deaths"]) > 1 for p in points), sum(p["power_loss"] for p in points),
        sum(p["resumed_from"] == 0 for p in points), sum(bool(p["differs"]) for p in points),
    ]  # fmt: skip


def differences(document: Mapping[str, Any]) -> list[str]:
    """Runs that differ."""
    return [
        f"point {point['point']}: {'; '.join(point['differs'])}" for point in document["points"] if point["differs"]
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which points."""
    parser.add_argument("--points", type=int, default=100, help="how many (quick: 2)")
    parser.add_argument("--seed", type=int, default=0, help="decides the points")
    parser.add_argument("--only", type=int, help="one point, printed and not recorded; its folder is kept")
    parser.add_argument("--power-loss", action="store_true", help="cut the power with every fifth kill")
    parser.add_argument("--processes", type=int, default=1, help="that train together in each run")
    parser.add_argument("--settings", type=int, default=NUM_SETTINGS, help="different settings of runs")


def variant(options: argparse.Namespace) -> str:
    """Runs of several processes have pages of their own."""
    names = {1: "", 2: "two_processes"}
    return names.get(options.processes, f"{options.processes}_processes")


def run(bench: Bench) -> None:
    """Run the points that are not in the results yet; write after each; say how many runs differ."""
    options, work = bench.options, bench.work
    if bench.quick:
        options.points, options.settings = min(options.points, 2), min(options.settings, 2)
    generator = np.random.default_rng(options.seed)
    settings = [draw_setting(generator, number, options.processes) for number in range(options.settings)]
    sources = b"".join(path.read_bytes() for path in sorted((ROOT / "mates_hf").rglob("*.py")))
    results: dict[str, Any] = {
        "format": FORMAT,
        "seed": options.seed,
        "code": hashlib.sha256(sources).hexdigest()[:16],
        "processes": options.processes,
        "power_loss": options.power_loss,
        "settings": settings,
        "points": [],
    }
    earlier = bench.earlier()
    if earlier is not None and {**earlier, "points": []} == results:
        results["points"] = earlier["points"]
    lines = count_lines(settings, work, options.processes, results["code"])
    done = {point["point"] for point in results["points"]}
    todo = [point for point in range(options.points) if point not in done]
    for point in todo if options.only is None else [options.only]:
        if time.monotonic() > bench.deadline:
            bench.left = options.points - len(results["points"])
            break
        found = run_point(results, lines, work, point)
        where = ", then ".join(f"{d['phase']} ({d['line']}, step {d['step']})" for d in found["deaths"])
        verdict = "differs: " + "; ".join(found["differs"]) if found["differs"] else "the same"
        say(f"{point:4d} {where}; from step {found['resumed_from']}: {verdict}")
        if options.only is not None:
            say(f"its folder: {work / f'point-{point}'}\n{json.dumps(settings[found['setting']])}")
            return
        results["points"].append(found)
        bench.write(results, aloud=False)
        if not found["differs"]:
            shutil.rmtree(work / f"point-{point}")
    num_differing = sum(bool(point["differs"]) for point in results["points"])
    bench.wrong = bool(num_differing)
    say(f"{len(results['points'])} points, runs that differ: {num_differing}")
