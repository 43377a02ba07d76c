"""The runs of `kills`: one that is left alone for each setting, one for each point, and what differs between them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lab.machine import as_launched, free_port
from benchmarks.lab.small_run import fork, make_reference, small_config
from benchmarks.lab.small_run import run as train_small
from benchmarks.reliability.kills.dying import PHASES, TRAINING, Journal, LineKiller, cut_power
from mates_hf import MatesCallback
from mates_hf.prediction.ngram_model import NgramInfluenceModel  # noqa: F401  (imported before forking)
from mates_hf.training.checkpoints import last_complete_checkpoint

POWER_LOSS_EVERY = 5  # points: a fifth of the kills
PATIENCE_SECONDS = 5.0  # that a process may outlive another that was killed
OTHER = "in the other process: "  # begins the phases of a process that is not the main one
KEPT = ("probes.parquet", "audit.json", "sentinel.json", "influence_model/config.json", "round.json")


def draw_setting(generator: np.random.Generator, number: int, num_processes: int) -> dict[str, dict[str, Any]]:
    """Settings of one run: arguments of the Trainer and of `MatesConfig`, with equal rows in a step."""

    def pick(*values: Any) -> Any:
        return values[int(generator.integers(len(values)))]

    arguments: dict[str, Any] = {
        "max_steps": 32,
        "save_strategy": "steps",
        "save_steps": pick(2, 3, 5, 8, 13),
        "save_total_limit": pick(None, 1, 2),
    }
    if pick(True, False):
        arguments |= {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1}
    if pick(True, False):
        arguments |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if num_processes > 1:
        arguments["per_device_train_batch_size"] = arguments.get("per_device_train_batch_size", 4) // num_processes
    config = {
        "switch_lead_steps": pick(3, 4),
        "candidate_scope": pick("slice", "pool"),
        "keep_rounds": pick(None, 2) if number else 2,
        "average_steps": pick(None, None, 0, 5),
        "drift_check_steps": pick(None, None, 5),
        "random_share": pick(0.0, 0.0, 0.3),
        **pick({}, {"on_weak_signal": "own_order", "min_spearman": 0.5}),
    }
    if pick(True, False):  # rounds that grow, and are looked at inside: one of 8 steps has rows enough for it
        config |= {"first_round_steps": 2, "update_steps": 8, "switch_lead_steps": 2, "average_steps": pick(None, 0)}
        config["drift_check_steps"] = pick(None, None, 3)
    return {"arguments": arguments, "config": config}


def in_children(work: Callable[[int], None], log_path: Path, size: int) -> int:
    """Run `work(rank)` in `size` forked processes; the first exit code that is not 0, negative for a signal.

    Where one was killed it is that one's: what then becomes of the others is its consequence.
    """
    port = free_port()
    pids = {fork(lambda rank=rank: work(rank), log_path, as_launched(rank, size, port)): rank for rank in range(size)}
    codes: list[int] = []
    deadline = None
    while pids:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del pids[pid]
                codes.append(os.waitstatus_to_exitcode(status))
                deadline = deadline or (time.monotonic() + PATIENCE_SECONDS if codes[-1] else None)
        if deadline is not None and time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGTERM if time.monotonic() < deadline + 2 else signal.SIGKILL)
        time.sleep(0.005)
    return next((code for code in codes if code), 0)


def train(
    setting: Mapping[str, Any],
    folder: Path,
    size: int,
    *,
    resume: bool = False,
    kill: tuple[str, int] | None = None,
    count: bool = False,
) -> int:
    """Run to the end, which leaves a `result-0.pt` a process, or to the kill, which leaves `killed.json`; exit code.

    With `resume` the run goes on from the last complete checkpoint, if there is one. `kill` is the phase and the
    number of the line to die at. `count` leaves a `lines-0.json` a process.
    """
    output_dir = folder / "run"
    for name in ("killed.json", "journal.txt"):
        (folder / name).unlink(missing_ok=True)

    def work(rank: int) -> None:
        if rank == 0 and kill is not None:
            Journal(folder / "journal.txt", output_dir).start()
        killer = LineKiller(kill, folder / "killed.json", OTHER if rank else "")
        callback = MatesCallback(make_reference(), small_config(**setting["config"]))
        checkpoint = last_complete_checkpoint(output_dir) if resume else None
        if kill is not None or count:
            killer.start()
        found = train_small(output_dir, callback, dropout=0.1, resume=checkpoint, **setting["arguments"])
        sys.settrace(None)
        start = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
        torch.save({**found, "start": start}, folder / f"result-{rank}.pt")
        if count:
            (folder / f"lines-{rank}.json").write_text(json.dumps(killer.counts))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    return in_children(work, folder / "log.txt", size)


def selections(output_dir: Path) -> dict[str, str]:
    """SHA-256 of the order that each finished round left."""
    found = {}
    for path in sorted((output_dir / "_mates").glob("round-????")):
        files = [path / name for name in ("selection.npy", "own_order.npy") if (path / name).exists()]
        found[path.name] = " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return found


def finished_stages(output_dir: Path) -> dict[str, int]:
    """When each finished stage of each round was written, nanoseconds."""
    return {
        f"{path.name.removesuffix('.partial')}/{name}": (path / name).stat().st_mtime_ns
        for path in sorted((output_dir / "_mates").glob("round-*"))
        for name in KEPT
        if ".stale" not in path.name and (path / name).exists()
    }


def compare(whole: Path, folder: Path, before: Mapping[str, int], size: int) -> tuple[int, list[str]]:
    """The step that a killed run was resumed from, and what differs between it and the one that was left alone.

    `before` has the `finished_stages` when it was resumed; none where it was started again.
    """
    starts, differs = zip(*(_compare_process(whole, folder, rank) for rank in range(size)), strict=True)
    found = [line for lines in differs for line in lines]
    theirs = selections(folder / "run")
    found += [f"selection of {n}" for n, digest in selections(whole / "run").items() if theirs.get(n) != digest]
    after = finished_stages(folder / "run")
    found += [f"{name} made again" for name, at in before.items() if after.get(name, at) != at]
    return starts[0], found


def _compare_process(whole: Path, folder: Path, rank: int) -> tuple[int, list[str]]:
    """The step that a process was resumed from, and what differs of what it saw and holds."""
    expected, got = (torch.load(path / f"result-{rank}.pt", weights_only=True) for path in (whole, folder))
    start, num_steps = got["start"], len(expected["streams"])
    per_step = len(expected["rows"]) // num_steps
    differs = [
        name
        for name, same in {
            "losses": expected["losses"] == got["losses"],
            "rows": expected["rows"][start * per_step :] == got["rows"],
            "random streams": expected["streams"][start:] == got["streams"],
            "weights": _same(expected["weights"], got["weights"]),
            "optimizer state": _same(expected["optimizer"], got["optimizer"]),
        }.items()
        if not same
    ]
    return start, [f"{name} of process {rank}" for name in differs] if rank else differs


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def run_point(document: Mapping[str, Any], counted: list[dict[str, int]], work: Path, point: int) -> dict[str, Any]:
    """Kill, resume, maybe kill again and resume again, and compare; what the JSON holds of the point.

    Its number and the document's seed decide everything. `counted` has the lines of each setting's run by phase;
    `work` holds the folders of the runs that were left alone, by number, and those of the points.
    """
    generator, size = np.random.default_rng([document["seed"], point]), document["processes"]
    phases = sorted({phase for counts in counted for phase in counts})
    phase = phases[point % len(phases)]
    number = int(generator.choice([n for n, counts in enumerate(counted) if counts.get(phase)]))
    setting, lines, folder = document["settings"][number], counted[number], work / f"point-{point}"
    deaths: list[dict[str, Any]] = []
    loses_power = document["power_loss"] and point % POWER_LOSS_EVERY == POWER_LOSS_EVERY - 1
    before: dict[str, int] = {}

    def die(phase: str, line: int, *, resume: bool) -> int:
        """Run up to a line. A death there is written down, cuts the power, and says which stages must stay."""
        nonlocal before
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        code = train(setting, folder, size, resume=resume, kill=(phase, line))
        if code == -signal.SIGKILL:
            deaths.append({"phase": phase, **json.loads((folder / "killed.json").read_text())})
            if loses_power:
                deaths[-1]["undone"] = cut_power(folder)
            before = finished_stages(folder / "run") if last_complete_checkpoint(folder / "run") else {}
        return code

    line = int(generator.integers(1, lines[phase] + 1))
    code = die(phase, line, resume=False)
    while code == 0 and line > 1:  # threads that wait execute now more lines, now fewer
        line //= 2
        code = die(phase, line, resume=False)
    if point % 3 == 2:  # again, anywhere in the first half of what a whole run does
        again = phases[int(generator.integers(len(phases)))]
        code = die(again, int(generator.integers(1, lines.get(again, 1) // 2 + 2)), resume=True)
    if code == -signal.SIGKILL:
        code = train(setting, folder, size, resume=True)
    if code == 0:
        start, differs = compare(work / f"whole-{number}", folder, before, size)
    else:
        error = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        start, differs = None, [f"does not resume: {' '.join(error)}"]
    if not deaths:
        differs.append("was not killed: it has fewer lines than the run that counted them")
    found = {"point": point, "setting": number, "deaths": deaths, "resumed_from": start, "differs": differs}
    return {**found, "power_loss": loses_power}


def count_lines(settings: list[dict[str, Any]], work: Path, size: int, code: str) -> list[dict[str, int]]:
    """Run each setting to its end, in a folder under `work`, and count its lines by phase.

    Runs of the same `code`, a digest of the library's sources, are taken from there.
    """
    lines: list[dict[str, int]] = []
    for number, setting in enumerate(settings):
        folder = work / f"whole-{number}"
        about = json.dumps([code, setting, size])
        if not (folder / "about.json").exists() or (folder / "about.json").read_text() != about:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if train(setting, folder, size, count=True):
                log = (folder / "log.txt").read_text()
                raise RuntimeError(f"The run that is left alone failed:\n{log}\n{setting}")
            (folder / "about.json").write_text(about)
        counts: dict[str, int] = {}
        for rank in range(size):
            counts |= json.loads((folder / f"lines-{rank}.json").read_text())
        lines.append(counts)
    wanted = {*PHASES.values(), TRAINING} - {"assisting in a round"}
    missing = wanted - {phase for counts in lines for phase in counts}
    if missing:
        raise RuntimeError(f"No line of {sorted(missing)} was ever reached: have the functions in PHASES moved?")
    return lines
