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
import collections
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch

from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import ROOT, as_launched, free_port
from benchmarks.lab.small_run import fork, make_reference, small_config
from benchmarks.lab.small_run import run as train_small
from benchmarks.lab.tables import table_lines
from mates_hf import MatesCallback
from mates_hf.prediction.ngram_model import NgramInfluenceModel  # noqa: F401  (imported before forking)
from mates_hf.training.checkpoints import last_complete_checkpoint

NUM_SETTINGS = 10
FORMAT = 2
POWER_LOSS_EVERY = 5  # points: a fifth of the kills
PATIENCE_SECONDS = 5.0  # that a process may outlive another that was killed
OTHER = "in the other process: "  # begins the phases of a process that is not the main one
# Where a line belongs: the innermost function on the stack that is listed here (None: any function of the file).
PHASES = {
    ("mates_hf/disk.py", None): "write of a file",
    ("mates_hf/training/lock.py", None): "lock",
    ("mates_hf/engine/averaging.py", None): "averaging window",
    ("mates_hf/training/rounds.py", "_probe"): "probe",
    ("mates_hf/training/audit.py", None): "audit",
    ("mates_hf/training/rounds.py", "_fit"): "fit",
    ("mates_hf/training/scoring.py", None): "score",
    ("mates_hf/training/rounds.py", "_select"): "select",
    ("mates_hf/round_writer.py", "finish"): "rename of the round",
    ("mates_hf/training/session.py", "_prune"): "prune rounds",
    ("mates_hf/training/callback.py", "on_train_begin"): "start",
    ("mates_hf/training/measure.py", "assist"): "assisting in a round",
    ("transformers/trainer.py", "_save_checkpoint"): "checkpoint",
    ("torch/serialization.py", "_save"): "file of a checkpoint",
}
TRAINING = "training"
TRACED = {  # files beside the library's own whose lines are points (None: all of the file)
    "transformers/trainer.py": None,
    "transformers/trainer_callback.py": ("save_to_json",),
    "transformers/modeling_utils.py": ("save_pretrained",),
    "torch/serialization.py": ("save", "_save", "persistent_id"),
    "/shutil.py": None,
}
KEPT = ("probes.parquet", "audit.json", "sentinel.json", "influence_model/config.json", "round.json")


class LineKiller:
    """Counts executed lines by phase, and kills the process at one of them.

    Args:
        kill: phase and number of the line in it, from 1; None counts only.
        note_path: where the line is written to before the process dies.
        prefix: of all phases of this process.
    """

    def __init__(self, kill: tuple[str, int] | None, note_path: Path, prefix: str = "") -> None:
        self.prefix = prefix
        self.counts: collections.Counter[str] = collections.Counter()
        self.kill = kill
        self.note_path = note_path
        self._pid = os.getpid()
        self._traced: dict[CodeType, bool] = {}
        self._phases: dict[CodeType, str | None] = {}

    def start(self) -> None:
        """Count from here on, in this thread and in those that it starts."""
        threading.settrace(self._on_call)
        sys.settrace(self._on_call)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        traced = self._traced.get(code)
        if traced is None:
            traced = self._traced[code] = _is_traced(code)
        return self._line_counter(self._phase_of(frame)) if traced else None

    def _line_counter(self, phase: str) -> Callable[..., Any]:
        """What the interpreter calls at each line of one frame: a frame stays in one phase as long as it runs."""

        def on_line(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
            if event == "line":
                self.counts[phase] += 1
                if self.kill == (phase, self.counts[phase]) and os.getpid() == self._pid:
                    self._die(frame)
            return on_line

        return on_line

    def _phase_of(self, frame: FrameType | None) -> str:
        while frame is not None:
            code = frame.f_code
            if code not in self._phases:
                self._phases[code] = _listed_phase(code)
            phase = self._phases[code]
            if phase is not None:
                return self.prefix + phase
            frame = frame.f_back
        return self.prefix + TRAINING

    def _die(self, frame: FrameType | None) -> None:
        sys.settrace(None)
        here = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else ""
        step = None
        while frame is not None and step is None:
            state = getattr(frame.f_locals.get("self"), "state", None)
            step = getattr(state, "global_step", None)
            frame = frame.f_back
        self.note_path.write_text(json.dumps({"line": here, "step": step}))
        os.kill(os.getpid(), signal.SIGKILL)


def _is_traced(code: CodeType) -> bool:
    if "/mates_hf/" in code.co_filename:
        return True
    for ending, names in TRACED.items():
        if code.co_filename.endswith(ending):
            return names is None or code.co_name in names
    return False


def _listed_phase(code: CodeType) -> str | None:
    for (ending, name), phase in PHASES.items():
        if code.co_filename.endswith(ending) and name in (None, code.co_name):
            return phase
    return None


class Journal:
    """Takes down which names a process renames and which folders it flushes, so that a power cut can be made up.

    Args:
        path: of the journal.
        folder: what lies outside is not taken down.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.folder = str(folder)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def start(self) -> None:
        """Watch from here on."""
        replace, rename, fsync = os.replace, os.rename, os.fsync

        def renamed(real: Callable[..., None]) -> Callable[..., None]:
            def call(source: Any, target: Any, **kwargs: Any) -> None:
                real(source, target, **kwargs)
                self._note(["rename", os.path.abspath(source), os.path.abspath(target)])

            return call

        def flushed(handle: int) -> None:
            fsync(handle)
            self._note(["flush", os.readlink(f"/proc/self/fd/{handle}")])

        os.replace, os.rename, os.fsync = renamed(replace), renamed(rename), flushed

    def _note(self, entry: list[str]) -> None:
        if entry[1].startswith(self.folder):
            os.write(self._handle, json.dumps(entry).encode() + b"\n")


def cut_power(folder: Path) -> list[str]:
    """Undo what a power cut takes back: renames that were not flushed, and the last one that finished a round.

    Args:
        folder: of the run that was killed.

    Returns:
        The names that are gone.
    """
    path = folder / "journal.txt"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    undone: list[str] = []
    flushed: set[str] = set()
    last_round = False
    for what, *paths in reversed(entries):
        if what == "flush":
            flushed.add(paths[0])
            continue
        source, target = map(Path, paths)
        finishes = source.name == target.name + ".partial" and not last_round
        last_round = last_round or finishes
        if (str(target.parent) not in flushed or finishes) and target.exists() and not source.exists():
            os.rename(target, source)
            undone.append(target.name)
    return undone


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
        **pick({}, {"on_weak_signal": "own_order", "min_spearman": 0.5}),
    }
    return {"arguments": arguments, "config": config}


def in_children(work: Callable[[int], None], log_path: Path, size: int) -> int:
    """Run `work` in forked processes; the first exit code that is not 0, negative for a signal.

    Args:
        work: called with the rank.
        log_path: what they print.
        size: how many there are.

    Returns:
        Of the one that was killed, where one was: what then becomes of the others is its consequence.
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
    *,
    resume: bool,
    kill: tuple[str, int] | None,
    size: int,
    count: bool = False,
) -> int:
    """Run to the end, which leaves a `result-0.pt` a process, or to the kill, which leaves `killed.json`.

    Args:
        setting: of the run.
        folder: holds the run's `output_dir`, its log and what it leaves.
        resume: go on from the last complete checkpoint, if there is one.
        kill: phase and number of the line to die at.
        size: processes that train together.
        count: leave a `lines-0.json` a process.

    Returns:
        Exit code, negative for a signal.
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
    found = {}
    for path in sorted((output_dir / "_mates").glob("round-*")):
        if ".stale" not in path.name:
            for name in KEPT:
                if (path / name).exists():
                    found[f"{path.name.removesuffix('.partial')}/{name}"] = (path / name).stat().st_mtime_ns
    return found


def compare(whole: Path, folder: Path, before: Mapping[str, int], size: int) -> tuple[int, list[str]]:
    """What differs between a run that was killed and resumed and the one that was not.

    Args:
        whole: folder of the run that was left alone.
        folder: of the other.
        before: `finished_stages` when it was resumed; empty where it was started again.
        size: processes that train together.

    Returns:
        The step it was resumed from, and what differs.
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


def run_point(
    point: int,
    seed: int,
    settings: list[dict[str, Any]],
    lines: list[dict[str, int]],
    work: Path,
    *,
    size: int,
    power_loss: bool,
) -> dict[str, Any]:
    """Kill, resume, maybe kill again and resume again, and compare.

    Args:
        point: its number; with `seed` it decides everything.
        seed: of the points.
        settings: the settings that runs have.
        lines: lines of each setting's run, by phase.
        work: holds the folders of the runs left alone, by number, and the one of this point.
        size: processes that train together.
        power_loss: every fifth point loses power.

    Returns:
        What `kills.json` holds of the point.
    """
    generator = np.random.default_rng([seed, point])
    phases = sorted({phase for counts in lines for phase in counts})
    phase = phases[point % len(phases)]
    fitting = [number for number, counts in enumerate(lines) if counts.get(phase)]
    number = int(generator.choice(fitting))
    folder = work / f"point-{point}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    setting = settings[number]
    deaths: list[dict[str, Any]] = []
    loses_power = power_loss and point % POWER_LOSS_EVERY == POWER_LOSS_EVERY - 1

    def note_death(phase: str) -> dict[str, int]:
        """Write the death down, cut the power, and say which stages must not be made again."""
        deaths.append({"phase": phase, **json.loads((folder / "killed.json").read_text())})
        if loses_power:
            deaths[-1]["undone"] = cut_power(folder)
        return finished_stages(folder / "run") if last_complete_checkpoint(folder / "run") else {}

    before: dict[str, int] = {}
    line = int(generator.integers(1, lines[number][phase] + 1))
    code = train(setting, folder, resume=False, kill=(phase, line), size=size)
    while code == 0 and line > 1:  # threads that wait execute now more lines, now fewer
        shutil.rmtree(folder)
        folder.mkdir()
        line //= 2
        code = train(setting, folder, resume=False, kill=(phase, line), size=size)
    if code == -signal.SIGKILL:
        before = note_death(phase)
    if point % 3 == 2:  # again, anywhere in the first half of what a whole run does
        again = phases[int(generator.integers(len(phases)))]
        line = int(generator.integers(1, lines[number].get(again, 1) // 2 + 2))
        code = train(setting, folder, resume=True, kill=(again, line), size=size)
        if code == -signal.SIGKILL:
            before = note_death(again)
    if code == -signal.SIGKILL:
        code = train(setting, folder, resume=True, kill=None, size=size)
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
    """Run each setting to its end and count its lines by phase.

    Args:
        settings: the settings.
        work: gets a folder for each; those of the same code are taken from there.
        size: processes that train together.
        code: digest of the library's sources.

    Returns:
        Lines by phase.

    Raises:
        RuntimeError: a run failed, or no run ever entered a phase.
    """
    lines: list[dict[str, int]] = []
    for number, setting in enumerate(settings):
        folder = work / f"whole-{number}"
        about = json.dumps([code, setting, size])
        if not (folder / "about.json").exists() or (folder / "about.json").read_text() != about:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if train(setting, folder, resume=False, kill=None, count=True, size=size):
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


def page(document: Mapping[str, Any]) -> str:
    """Points by the phase of their first kill."""
    points = document["points"]
    first = [(point["deaths"][0]["phase"], point) for point in points if point["deaths"]]
    rows = [
        [phase, *_counts([p for name, p in first if name == phase])] for phase in sorted({name for name, _ in first})
    ]
    size, power_loss = document.get("processes", 1), document.get("power_loss", False)
    command = f"python -m benchmarks kills --points {len(points)} --seed {document['seed']}"
    command += " --power-loss" * power_loss + f" --processes {size}" * (size > 1)
    num_undone = sum(bool(death.get("undone")) for point in points for death in point["deaths"])
    lost = sum(p.get("power_loss", False) for p in points)
    power = (
        f" {lost} of the points lost power: renames that were not flushed, and the last one that finished a round, "
        f"were undone before the run was resumed, if there were any; {num_undone} kills had some."
    )
    heads = ["killed in", "points", "killed a second time", "lost power", "no checkpoint yet: started again", "differ"]
    return "\n".join(
        [
            "# Killed anywhere, resumed exactly",
            "",
            f"`{command}`: {'one process' if size == 1 else f'{size} processes (gloo)'} a run, SIGKILL at a random "
            "executed line, resumed from the last complete checkpoint, compared to the bit with the run that was left "
            f"alone (CPU, float32, dropout 0.1; {len(document['settings'])} settings of workers, accumulation, "
            "checkpoints, scope, averaging, guard, drift checks and kept rounds, in the JSON file)."
            f"{power if power_loss else ''}",
            "",
            *table_lines(heads, [*rows, ["**all**", *_counts(points)]]),
            "",
        ]
    )


def _counts(points: list[dict[str, Any]]) -> list[int]:
    return [
        len(points), sum(len(p["deaths"]) > 1 for p in points), sum(p.get("power_loss", False) for p in points),
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
    sources = hashlib.sha256()
    for path in sorted((ROOT / "mates_hf").rglob("*.py")):
        sources.update(path.read_bytes())
    results: dict[str, Any] = {
        "format": FORMAT,
        "seed": options.seed,
        "code": sources.hexdigest()[:16],
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
        found = run_point(
            point, options.seed, settings, lines, work, size=options.processes, power_loss=options.power_loss
        )
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
