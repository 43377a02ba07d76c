"""Break one of two processes anywhere in a run: do all of them end, how soon, and by a message that names it?

A fault is a place (a function of this library that is wrapped in the process under test), who meets it (the main
process, the last one, or all), and what happens there: an error is raised, a disk is full, the process gets SIGKILL,
or SIGSTOP. Two real processes train a small model over gloo, and one of them is broken at the place. What counts is
the time until every other process has ended (after an error: every process), and whether the output of each says which
process it was. A frozen process is thawed once the others have ended, and must then end by itself.

The processes' logs stay under `--work`.

Trade-off: importing torch and transformers takes longer than the run, so processes are forked from one that has
imported them and built nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import itertools
import os
import pkgutil
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import as_launched, free_port
from benchmarks.lab.small_run import fork, make_reference, shard_with_fsdp2, small_config
from benchmarks.lab.small_run import run as train_small
from benchmarks.lab.tables import markdown, table
from benchmarks.lab.units import Result, keep, plain, read_units, take_over, unit_path
from benchmarks.reliability.faults.places import ALL, ERROR, FULL, KILL, SIZE, STOP, Fault, all_faults
from mates_hf import MatesCallback
from mates_hf.engine import watch
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.training import measure
from mates_hf.training.session import Session

LIMITS = {ERROR: 30.0, FULL: 30.0, KILL: 90.0, STOP: 90.0}  # seconds
GIVE_UP_SECONDS = 150.0
PLANTED = "planted here"
DIGITS = 3
WHOLE = Fault(place="whole", target="", who=ALL, what=ERROR)  # a run without one
QUICK = {"rounds set aside: main, error", "labels: last, error", "audit: last, error", "labels: last, SIGKILL",
         "gap check: last, error", "sum: main, SIGSTOP"}  # fmt: skip


# --- one process under test ---


def plant(fault: Fault, folder: Path, rank: int) -> None:
    """Wrap the function where the fault is, in this process."""
    entered, calls = {"start"}, itertools.count(1)

    def break_down() -> None:
        if fault.since in entered and next(calls) == fault.call and rank in fault.ranks:
            (folder / f"fault-{rank}").write_text(str(time.time()))
            _happen(fault.what)

    _wrap(Session, "_look", lambda: entered.add("_look"))
    _wrap(measure, "_audit", lambda: entered.add("_audit"))
    module, _, path = fault.target.partition(":")
    owner, _, name = path.rpartition(".")
    _wrap(pkgutil.resolve_name(f"{module}:{owner}"), name, break_down)


def _wrap(owner: Any, name: str, first: Callable[[], None]) -> None:
    """Have a function do something else first."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first()
        return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def _happen(what: str) -> None:
    if what == ERROR:
        raise RuntimeError(PLANTED)
    if what == FULL:
        raise OSError(errno.ENOSPC, f"No space left on device ({PLANTED})")
    os.kill(os.getpid(), signal.SIGKILL if what == KILL else signal.SIGSTOP)


class SlowModel(NgramInfluenceModel):
    """Fits for long."""

    seconds = 0.0

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As always, but late."""
        time.sleep(SlowModel.seconds)
        return super().fit(*args, **kwargs)


def train(folder: Path, fault: Fault, rank: int) -> None:
    """One process of the run, with the fault planted."""
    if fault is not WHOLE:
        plant(fault, folder, rank)
    output_dir = folder / "run"
    config = small_config(num_probes=32, average_steps=3, drift_check_steps=3, switch_lead_steps=2, keep_rounds=2)
    if fault.beside:
        config = dataclasses.replace(config, drift_check_steps=None, switch_lead_steps=4)
    if fault.grows:  # rounds of 2 and 4 steps, at steps 8 and 10; the second is looked at at step 12
        sizes = {"update_steps": 8, "first_round_steps": 2, "average_steps": 2, "drift_check_steps": 2}
        config = dataclasses.replace(config, **sizes)
    SlowModel.seconds = fault.fit_seconds
    callback = MatesCallback(
        make_reference(8),
        config,
        probe=DirectionalProbe(path_steps=2),
        influence_model=SlowModel() if SlowModel.seconds else None,
    )
    train_small(
        output_dir,
        callback,
        resume=str(output_dir / "checkpoint-8") if fault.resumes else None,
        prepare=shard_with_fsdp2 if fault.sharded else lambda trainer: None,
        max_steps=10 if fault is WHOLE else 16,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=4,
    )


# --- the processes of a fault ---


class Running:
    """The processes of one fault, and what was seen of them.

    The folder of its run is emptied first; a run that is `resumed` is copied there.
    """

    def __init__(self, fault: Fault, folder: Path, resumed: Path | None = None) -> None:
        self.fault, self.folder = fault, folder
        self.ended: dict[int, tuple[int, float]] = {}  # exit code and time, by rank
        self.thawed_at: float | None = None
        self.began = time.time()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if resumed is not None:
            shutil.copytree(resumed, folder / "run")
        port = free_port()
        self.pids = [
            fork(functools.partial(train, folder, fault, rank), folder / f"log-{rank}", as_launched(rank, SIZE, port))
            for rank in range(SIZE)
        ]

    def look(self) -> bool:
        """Take note of the processes that have ended; true when there is nothing more to wait for."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.ended[rank] = (os.waitstatus_to_exitcode(status), time.time())
        left = set(range(SIZE)) - set(self.ended)
        if self.fault.what == STOP and left == set(self.fault.ranks) and self.thawed_at is None:
            self.thawed_at = time.time()
            os.kill(self.pids[self.fault.ranks[0]], signal.SIGCONT)
        if left and time.time() - self.began > GIVE_UP_SECONDS:
            for rank in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[rank], signal.SIGKILL)
        return not left

    def result(self) -> Result:
        """What the JSON holds of the fault."""
        fault = self.fault
        marks = [float(path.read_text()) for path in self.folder.glob("fault-*")]
        outputs = {rank: (self.folder / f"log-{rank}").read_text(errors="replace") for rank in range(SIZE)}
        broken = set(fault.ranks) if fault.what in (KILL, STOP) else set()
        others = [rank for rank in range(SIZE) if rank not in broken]
        said = (f"Process {fault.ranks[0]} of {SIZE} (", *([PLANTED] if fault.what in (ERROR, FULL) else []))
        seconds = max(self.ended[rank][1] for rank in others) - min(marks) if marks else None
        found: Result = {
            "settings": plain(dataclasses.asdict(fault)),
            "happened": bool(marks),
            "seconds": seconds,
            "codes": [self.ended[rank][0] for rank in range(SIZE)],
            "named": all(any(words in outputs[rank] for words in said) for rank in others),
        }
        if self.thawed_at is not None:
            found["thawed_seconds"] = self.ended[fault.ranks[0]][1] - self.thawed_at
        return found


def whole_run(bench: Bench) -> Path:
    """A run with a checkpoint inside the averaging window, that others resume."""
    folder = bench.work / "whole"
    if not (folder / "run" / "checkpoint-8").exists():
        running = Running(WHOLE, folder)
        while not running.look():
            time.sleep(0.1)
        assert not any(code for code, _ in running.ended.values()), (folder / "log-0").read_text()
    return folder / "run"


def break_all(bench: Bench, faults: list[Fault]) -> int:
    """Run the faults that are not kept yet, some side by side; how many are left."""
    whole = whole_run(bench) if any(fault.resumes for fault in faults) else None
    todo = [fault for fault in faults if not unit_path(bench.work, fault.name).exists()]
    places = [fault.place for fault in faults]
    turn = {fault.name: places[:number].count(fault.place) for number, fault in enumerate(faults)}
    # Frozen ones wait, and cost nothing meanwhile; then one fault at each place, and so on.
    todo.sort(key=lambda fault: (fault.what != STOP, turn[fault.name]))
    running: list[Running] = []
    say(f"{len(todo)} faults to plant")
    while running or (todo and time.monotonic() < bench.deadline):
        busy = sum(each.fault.what != STOP for each in running)
        free = len(running) < 4 * bench.options.workers and busy < bench.options.workers
        if todo and free and time.monotonic() < bench.deadline:
            fault = todo.pop(0)
            folder = bench.work / f"fault-{faults.index(fault)}"
            running.append(Running(fault, folder, whole if fault.resumes else None))
        for each in [each for each in running if each.look()]:
            running.remove(each)
            found = each.result()
            keep(unit_path(bench.work, each.fault.name), found)
            say(f"{each.fault.name}: {shown(found)}")
        time.sleep(0.05)
    return len(todo)


def is_well(found: Result) -> bool:
    """Whether a fault ended the run as it is to end."""
    settings = found["settings"]
    if not found["happened"] or found["seconds"] is None:
        return False
    if settings["goes_on"]:
        return found["codes"] == [0] * SIZE
    in_time = found["seconds"] <= LIMITS[settings["what"]] and found.get("thawed_seconds", 0.0) <= 90
    return bool(in_time and found["named"] and all(found["codes"]))


def shown(found: Result) -> str:
    """A fault in a few words."""
    if not found["happened"]:
        return "did not happen"
    if found["settings"]["goes_on"] and found["codes"] == [0] * SIZE:
        return "the run continued"
    return f"{found['seconds']:.1f} s, {'named' if found['named'] else 'NOT NAMED'}, exit codes {found['codes']}"


def page(document: Result) -> str:
    """The page."""
    units = document["units"]
    num_places = len({found["settings"]["place"] for found in units.values()})
    ends = [found for found in units.values() if not found["settings"]["goes_on"]]
    about = (
        f"`python -m benchmarks faults`: {len(units)} faults at {num_places} places. Two real processes (gloo, CPU, a "
        'model of two layers), one of them broken ("all": both). Seconds from the fault until the others have ended; '
        'after an error, until all have. "Named": the output of each of them says which process it was, and after an '
        "error what happened there. A process is taken for frozen after a minute. When the others have ended it is "
        'thawed; "thawed" is how long it then takes to end by itself.'
    )
    rows: list[list[Any]] = []
    for what, limit in LIMITS.items():
        here = [found for found in ends if found["settings"]["what"] == what]
        if here:
            seconds = sorted(found["seconds"] or 0.0 for found in here)
            slowest, median = f"{seconds[-1]:.1f}", f"{seconds[len(seconds) // 2]:.1f}"
            named, well = sum(found["named"] for found in here), sum(map(is_well, here))
            rows.append([what, len(here), f"{limit:.0f}", slowest, median, named, well])
    kinds = table(["what happens", "faults", "limit, s", "slowest, s", "median, s", "named", "within its limit"], rows)
    rows = []
    for found in units.values():
        settings, thawed = found["settings"], found.get("thawed_seconds")
        went_on = settings["goes_on"] and is_well(found)
        rows.append([
            settings["place"], settings["who"], settings["what"],
            "the run continues" if went_on else f"{found['seconds'] or 0.0:.1f}",
            "" if went_on else "yes" if found["named"] else "**no**", "" if thawed is None else f"{thawed:.1f}",
        ])  # fmt: skip
    every = table(["place", "process", "what happens", "seconds", "named", "thawed, s"], rows)
    return markdown("# A fault anywhere ends every process, by name", about, kinds, every)


def differences(document: Result) -> list[str]:
    """Faults that did not end the run as they are to."""
    return [f"{name}: {shown(found)}" for name, found in document["units"].items() if not is_well(found)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """How many side by side."""
    parser.set_defaults(workers=3)


def run(bench: Bench) -> Result:
    """Plant the faults that are not in the results yet."""
    faults = all_faults()
    if bench.quick:
        # A minute of silence is what the full run is for.
        watch.FROZEN_SECONDS = 12.0
        faults = [fault for fault in faults if fault.name in QUICK]
        assert len(faults) == len(QUICK)
    settings = {fault.name: dataclasses.asdict(fault) for fault in faults}
    assert len(settings) == len(faults)
    recorded = bench.earlier()
    if recorded is not None:
        well = {name: found for name, found in recorded["units"].items() if is_well(found)}
        take_over(bench.work, well, settings)
    bench.left = break_all(bench, faults)
    found = read_units(bench.work, settings)
    document: Result = {"units": {name: found[name] for name in settings if name in found}}
    wrong = differences(document)
    say("\n".join(wrong) if wrong else f"{len(found)} faults: every process ended in time, by name")
    bench.wrong = bool(wrong)
    return document
