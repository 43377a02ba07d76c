"""Break one of two processes anywhere in a run: do all of them end, how soon, and by a message that names it?

A fault is a place (a function of this library that is wrapped in the process under test), who meets it (the main
process, the last one, or all), and what happens there: an error is raised, a disk is full, the process gets SIGKILL,
or SIGSTOP. Two real processes train a small model over gloo, and one of them is broken at the place. What counts is
the time until every other process has ended (after an error: every process), and whether the output of each says which
process it was. A frozen process is thawed once the others have ended, and must then end by itself.

`--only forward` plants the faults whose name has this, and prints the processes' logs.

Trade-off: importing torch and transformers takes longer than the run, so processes are forked from one that has
imported them and built nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import importlib
import os
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
from benchmarks.lab.tables import table_lines
from benchmarks.lab.units import Result, keep, plain, read_units, take_over, unit_path
from mates_hf import MatesCallback
from mates_hf.engine import watch
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.training.session import Session

SIZE = 2
LIMITS = {"error": 30.0, "full disk": 30.0, "SIGKILL": 90.0, "SIGSTOP": 90.0}
GIVE_UP_SECONDS = 150.0
PLANTED = "planted here"
MAIN, LAST, ALL = "main", "last", "all"
ERROR, FULL, KILL, STOP = LIMITS
DIGITS = 3
QUICK = {"rounds set aside: main, error", "labels: last, error", "audit: last, error", "labels: last, SIGKILL",
         "sum: main, SIGSTOP"}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault."""

    place: str  # what the page calls it
    target: str  # `module:function` or `module:Class.method` that is wrapped
    who: str  # meets it
    what: str  # happens there
    call: int = 1  # the number of the call it happens at, from 1, counted once the run is in `since`
    since: str = "start"  # `start`, or the function of `Session` or `measure` that must have been entered
    resumes: bool = False  # whether the run resumes from the checkpoint of an earlier one
    sharded: bool = False  # whether weights are sharded by FSDP2
    fit_seconds: float = 0.0  # how long the main process fits
    # whether the run is to continue, because an audit is never fatal, and a file that only speeds up a rerun is not
    # either
    goes_on: bool = False
    beside: bool = False  # whether fit, score and select run beside training

    @property
    def name(self) -> str:
        """What its unit is called."""
        return f"{self.place}: {self.who}, {self.what}"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The processes that meet it."""
        return {MAIN: (0,), LAST: (SIZE - 1,), ALL: tuple(range(SIZE))}[self.who]


def all_faults() -> list[Fault]:
    """Every fault, in the order of a run."""
    found: list[Fault] = []

    def at(place: str, target: str, *faults: tuple[str, str], **details: Any) -> None:
        found.extend(Fault(place=place, target=target, who=who, what=what, **details) for who, what in faults)

    callback, session, rounds = (f"mates_hf.training.{name}:" for name in ("callback", "session", "rounds"))
    disk, measure, start = (f"mates_hf.training.{name}:" for name in ("rounds_on_disk", "measure", "start"))
    average = "mates_hf.engine.averaging:"
    opening, scoring, audit = (f"mates_hf.training.{name}:" for name in ("opening", "scoring", "audit"))
    processes, ngram = "mates_hf.engine.processes:", "mates_hf.prediction.ngram_model:NgramInfluenceModel."
    directional, losses = "mates_hf.influence.probe_directional:", "mates_hf.influence.passes:"
    in_round = {"since": "_look"}
    # The start.
    at("run is checked", callback + "check_run", (MAIN, ERROR), (LAST, ERROR), (ALL, ERROR))
    at("loss is read", start + "read_given", (MAIN, ERROR), (LAST, ERROR))
    at("connections are opened", processes + "_new_group", (LAST, ERROR), (LAST, KILL))
    at("config is compared", processes + "Processes.require_same", (MAIN, KILL), (LAST, ERROR))
    at("sampler is made", start + "ScheduledSampler", (LAST, ERROR))
    at("lock is taken", opening + "RoundsLock", (MAIN, ERROR))
    at("folder is tried", opening + "written_whole", (MAIN, FULL))
    at("rounds set aside", opening + "set_earlier_run_aside", (MAIN, ERROR), (MAIN, KILL), (MAIN, STOP))
    at("round is found again", disk + "require_round", (MAIN, ERROR), resumes=True)
    at("orders are received", session + "Session._restore_rounds", (LAST, ERROR), (LAST, KILL), resumes=True)
    at("running mean is read", average + "WeightAverage.load", (LAST, ERROR), (MAIN, ERROR), resumes=True)
    # Averaging and checkpoints.
    at("step of the averaging window", average + "WeightAverage.update", (MAIN, ERROR), (LAST, ERROR))
    at("running mean is written", "safetensors.torch:save_file", (MAIN, FULL), (MAIN, KILL))
    at("running means are pruned", disk + "prune_averages", (MAIN, ERROR))
    at("running mean of the last process", session + "Session.save_average", (LAST, ERROR))
    at("marks of the weights", session + "weight_marks", (LAST, ERROR), (ALL, ERROR))
    # A round.
    at("averaged weights put in", average + "WeightAverage._put_in", (LAST, ERROR))
    at("digest", measure + "weights_digest", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL))
    at("first file of the round", rounds + "write_array", (MAIN, FULL))
    at("rows are drawn", "mates_hf.selection.ledger:Ledger.draw", (MAIN, ERROR))
    at("labels", measure + "_labels", (MAIN, ERROR), (LAST, ERROR), (ALL, ERROR), (MAIN, KILL), (LAST, KILL),
       (MAIN, STOP), (LAST, STOP))  # fmt: skip
    at("gradient of a share", directional + "add_gradient_of_sum", (LAST, ERROR), (MAIN, ERROR))
    at("forward pass", losses + "batch_losses", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL), call=2, **in_round)
    at("gradients are added up", processes + "Processes.sum_gradients", (LAST, ERROR), (MAIN, KILL), **in_round)
    at("sum", processes + "Processes.sum", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL), (MAIN, STOP), (LAST, STOP),
       call=4, **in_round)  # fmt: skip
    at("agreement on a step", processes + "Processes.agree", (LAST, ERROR), (MAIN, KILL), **in_round)
    at("publish", processes + "Processes.publish", (MAIN, ERROR), (MAIN, STOP), call=2, **in_round)
    at("receive", processes + "Processes.receive", (LAST, ERROR), (LAST, STOP), call=2, **in_round)
    at("shard of the probe is written", "mates_hf.influence.shards:write_array", (MAIN, FULL), goes_on=True)
    at("labels are written", rounds + "write_labels", (MAIN, FULL), (MAIN, KILL))
    at("stage is recorded", "mates_hf.training.run:write_json", (MAIN, FULL), goes_on=True)
    at("audit", measure + "_audit_labels", (MAIN, ERROR), (LAST, ERROR), (ALL, ERROR), goes_on=True)
    at("audit", measure + "_audit_labels", (LAST, KILL), (LAST, STOP))
    at("audit is written", audit + "write_json", (MAIN, FULL), goes_on=True)
    at("sentinel", measure + "_sentinel", (MAIN, ERROR), (LAST, ERROR), (ALL, ERROR), (LAST, KILL), (MAIN, STOP))
    at("sentinel is written", "mates_hf.training.drift:write_json", (MAIN, FULL))
    at("fit", ngram + "fit", (MAIN, ERROR), (MAIN, KILL), (MAIN, STOP))
    at("while the main process fits", processes + "Processes.receive", (LAST, ERROR), (LAST, KILL), (LAST, STOP),
       call=6, fit_seconds=600, **in_round)  # fmt: skip
    at("influence model is written", rounds + "write_round_model", (MAIN, FULL))
    at("guard", rounds + "decide", (MAIN, ERROR))
    at("score", ngram + "predict", (MAIN, ERROR), since="_look")
    at("share of the candidates is scored", scoring + "_predict", (LAST, ERROR), (LAST, KILL))
    at("scores are written", scoring + "write_array", (MAIN, FULL), call=2)
    at("select", rounds + "select_rows", (MAIN, ERROR), (MAIN, KILL))
    at("decision is written", rounds + "write_json", (MAIN, FULL))
    at("round is finished", "mates_hf.round_writer:RoundWriter.finish", (MAIN, FULL), (MAIN, KILL))
    at("rounds are pruned", session + "Session._prune", (MAIN, ERROR))
    at("round is released", session + "release", (MAIN, ERROR), (MAIN, STOP))
    at("order is told", session + "share_order", (MAIN, ERROR), (MAIN, STOP))
    at("order is scheduled", session + "Session._schedule", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL), **in_round)
    at("metrics are reported", callback + "MatesCallback._report", (MAIN, ERROR), (LAST, ERROR))
    at("drift check", session + "check_drift", (MAIN, ERROR))
    # What runs beside training.
    beside: dict[str, Any] = {"beside": True, **in_round}
    at("fit, beside", ngram + "fit", (MAIN, ERROR), (MAIN, KILL), **beside)
    at("candidates received, beside", processes + "Processes.receive", (LAST, ERROR), (LAST, STOP), call=5, **beside)
    at("share of the candidates, beside", scoring + "_predict", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL), **beside)
    at("scores are written, beside", scoring + "write_array", (MAIN, FULL), call=2, **beside)
    at("round is finished, beside", "mates_hf.round_writer:RoundWriter.finish", (MAIN, FULL), (MAIN, KILL), **beside)
    at("order is told, beside", session + "share_order", (MAIN, ERROR), (MAIN, STOP), **beside)
    at("round is settled", session + "Session.settle", (MAIN, ERROR), (LAST, ERROR), **beside)
    # Weights sharded by FSDP2, whose collectives are not ours.
    sharded = {"sharded": True, "call": 2, **in_round}
    at("forward pass, sharded", losses + "batch_losses", (MAIN, ERROR), (LAST, ERROR), (MAIN, KILL), (LAST, STOP),
       **sharded)  # fmt: skip
    at("audit, sharded", losses + "batch_losses", (LAST, ERROR), sharded=True, call=2, since="_audit")
    at("audit, sharded", measure + "_audit_labels", (ALL, ERROR), sharded=True, goes_on=True)
    return found


# --- one process under test ---


def plant(fault: Fault, folder: Path, rank: int) -> None:
    """Wrap the function where the fault is, in this process."""
    owner, name = _owner(fault.target)
    inner, calls = getattr(owner, name), 0
    entered = {"start"}

    def note_entry(holder: Any, entry: str) -> None:
        function = getattr(holder, entry)

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            entered.add(entry)
            return function(*args, **kwargs)

        setattr(holder, entry, noted)

    note_entry(Session, "_look")
    note_entry(importlib.import_module("mates_hf.training.measure"), "_audit")
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if fault.since in entered:
            calls += 1
            if calls == fault.call and rank in fault.ranks:
                (folder / f"fault-{rank}").write_text(str(time.time()))
                _happen(fault.what)
        return inner(*args, **kwargs)

    setattr(owner, name, broken)


def _happen(what: str) -> None:
    if what == ERROR:
        raise RuntimeError(PLANTED)
    if what == FULL:
        raise OSError(errno.ENOSPC, f"No space left on device ({PLANTED})")
    os.kill(os.getpid(), signal.SIGKILL if what == KILL else signal.SIGSTOP)


def _owner(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    return owner, name


class SlowModel(NgramInfluenceModel):
    """Fits for long."""

    seconds = 0.0

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As always, but late."""
        time.sleep(SlowModel.seconds)
        return super().fit(*args, **kwargs)


def train(output_dir: Path, *, fault: Fault | None, resumes: bool, sharded: bool) -> None:
    """One process of the run."""
    config = small_config(num_probes=32, average_steps=3, drift_check_steps=3, switch_lead_steps=2, keep_rounds=2)
    if fault is not None and fault.beside:
        config = dataclasses.replace(config, drift_check_steps=None, switch_lead_steps=4)
    SlowModel.seconds = fault.fit_seconds if fault is not None else 0.0
    callback = MatesCallback(
        make_reference(8),
        config,
        probe=DirectionalProbe(path_steps=2),
        influence_model=SlowModel() if SlowModel.seconds else None,
    )
    train_small(
        output_dir,
        callback,
        resume=str(output_dir / "checkpoint-8") if resumes else None,
        prepare=shard_with_fsdp2 if sharded else lambda trainer: None,
        max_steps=10 if fault is None else 16,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=4,
    )


# --- the processes of a fault ---


class Running:
    """The processes of one fault, and what was seen of them.

    Args:
        fault: the fault.
        folder: of its run; emptied first.
    """

    def __init__(self, fault: Fault, folder: Path) -> None:
        self.fault, self.folder = fault, folder
        self.ended: dict[int, tuple[int, float]] = {}  # exit code and time, by rank
        self.thawed_at: float | None = None
        self.began = time.time()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.pids: list[int] = []

    def start(self, body: Callable[[int], None]) -> None:
        """Fork the processes."""
        port = free_port()
        for rank in range(SIZE):
            log = self.folder / f"log-{rank}"
            self.pids.append(fork(functools.partial(body, rank), log, as_launched(rank, SIZE, port)))

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
        names = {
            rank: PLANTED in text or f"Process {fault.ranks[0]} of {SIZE} (" in text if fault.what in (ERROR, FULL)
            else f"Process {fault.ranks[0]} of {SIZE} (" in text
            for rank, text in outputs.items()
        }  # fmt: skip
        seconds = max(self.ended[rank][1] for rank in others) - min(marks) if marks else None
        found: Result = {
            "settings": plain(dataclasses.asdict(fault)),
            "happened": bool(marks),
            "seconds": seconds,
            "codes": [self.ended[rank][0] for rank in range(SIZE)],
            "named": all(names[rank] for rank in others),
        }
        if self.thawed_at is not None:
            found["thawed_seconds"] = self.ended[fault.ranks[0]][1] - self.thawed_at
        return found


def whole_run(bench: Bench) -> Path:
    """A run with a checkpoint inside the averaging window, that others resume."""
    folder = bench.work / "whole"
    if not (folder / "run" / "checkpoint-8").exists():
        fault = Fault(place="whole", target="", who=ALL, what=ERROR)
        running = Running(fault, folder)
        running.start(lambda rank: train(folder / "run", fault=None, resumes=False, sharded=False))
        while not running.look():
            time.sleep(0.1)
        assert not any(code for code, _ in running.ended.values()), (folder / "log-0").read_text()
    return folder / "run"


def break_all(bench: Bench, faults: list[Fault]) -> int:
    """Run the faults that are not kept yet, some side by side; how many are left."""
    whole = whole_run(bench) if any(fault.resumes for fault in faults) else bench.work
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
            each = Running(fault, bench.work / f"fault-{faults.index(fault)}")
            if fault.resumes:
                shutil.copytree(whole, each.folder / "run")
            each.start(functools.partial(under_test, fault, each.folder))
            running.append(each)
        for each in [each for each in running if each.look()]:
            running.remove(each)
            found = each.result()
            keep(unit_path(bench.work, each.fault.name), found)
            say(f"{each.fault.name}: {shown(found)}")
        time.sleep(0.05)
    return len(todo)


def under_test(fault: Fault, folder: Path, rank: int) -> None:
    """What a process of a fault does."""
    plant(fault, folder, rank)
    train(folder / "run", fault=fault, resumes=fault.resumes, sharded=fault.sharded)


# --- the page ---


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
    lines = [
        "# A fault anywhere ends every process, by name",
        "",
        f"`python -m benchmarks faults`: {len(units)} faults at {num_places} places. Two real processes (gloo, CPU, a "
        'model of two layers), one of them broken ("all": both). Seconds from the fault until the others have ended; '
        'after an error, until all have. "Named": the output of each of them says which process it was, and after an '
        "error what happened there. A process is taken for frozen after a minute. When the others have ended it is "
        'thawed; "thawed" is how long it then takes to end by itself.',
        "",
    ]
    rows: list[list[Any]] = []
    for what, limit in LIMITS.items():
        here = [found for found in ends if found["settings"]["what"] == what]
        if here:
            seconds = sorted(found["seconds"] or 0.0 for found in here)
            slowest, median = f"{seconds[-1]:.1f}", f"{seconds[len(seconds) // 2]:.1f}"
            named, well = sum(found["named"] for found in here), sum(map(is_well, here))
            rows.append([what, len(here), f"{limit:.0f}", slowest, median, named, well])
    heads = ["what happens", "faults", "limit, s", "slowest, s", "median, s", "named", "within its limit"]
    lines += [*table_lines(heads, rows), ""]
    rows = []
    for found in units.values():
        settings, thawed = found["settings"], found.get("thawed_seconds")
        went_on = settings["goes_on"] and is_well(found)
        rows.append([
            settings["place"], settings["who"], settings["what"],
            "the run continues" if went_on else f"{found['seconds'] or 0.0:.1f}",
            "" if went_on else "yes" if found["named"] else "**no**", "" if thawed is None else f"{thawed:.1f}",
        ])  # fmt: skip
    lines += table_lines(["place", "process", "what happens", "seconds", "named", "thawed, s"], rows)
    return "\n".join([*lines, ""])


def differences(document: Result) -> list[str]:
    """Faults that did not end the run as they are to."""
    return [f"{name}: {shown(found)}" for name, found in document["units"].items() if not is_well(found)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which faults."""
    parser.set_defaults(workers=3)
    parser.add_argument("--only", help="faults whose name has this, printed and not recorded")


def run(bench: Bench) -> Result | None:
    """Plant the faults that are not in the results yet."""
    only, faults = bench.options.only, all_faults()
    if bench.quick:
        # A minute of silence is what the full run is for.
        watch.FROZEN_SECONDS = 12.0
        faults = [fault for fault in faults if fault.name in QUICK]
        assert len(faults) == len(QUICK)
    if only:
        faults = [fault for fault in faults if only in fault.name]
        for fault in faults:
            unit_path(bench.work, fault.name).unlink(missing_ok=True)
    settings = {fault.name: {**dataclasses.asdict(fault)} for fault in faults}
    assert len(settings) == len(faults)
    recorded = bench.earlier()
    if recorded is not None and not only:
        well = {name: found for name, found in recorded["units"].items() if is_well(found)}
        take_over(bench.work, well, settings)
    bench.left = break_all(bench, faults)
    found = read_units(bench.work, settings)
    if only:
        for path in sorted(bench.work.glob("fault-*/log-*")):
            say(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}")
        return None
    document: Result = {"units": {name: found[name] for name in settings if name in found}}
    wrong = differences(document)
    say("\n".join(wrong) if wrong else f"{len(found)} faults: every process ended in time, by name")
    bench.wrong = bool(wrong)
    return document
