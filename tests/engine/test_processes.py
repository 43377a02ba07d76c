"""What processes know of one another: failures that travel, silence that is noticed, work that is left in peace.

Most tests are of threads that share a store; `python -m benchmarks faults` breaks real processes, its quick run is
here.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import pickle
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from mates_hf.engine import watch
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.engine.watch import ProcessError, Watch
from mates_hf.influence.probe import RunSettings
from tests.launch import free_port, start_processes

FROZEN = 0.6  # twelve times the time between two signs of life, so that healthy threads are never that late


class Cut:
    """A store whose connection can be cut, or that no longer answers."""

    def __init__(self, store: Any) -> None:
        self.store, self.is_cut, self.blocks = store, False, threading.Event()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if self.is_cut:
                raise RuntimeError("Connection reset by peer")
            if self.blocks.is_set():
                threading.Event().wait()
            return getattr(self.store, name)(*args)

        return call


@pytest.fixture
def make_watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Watch]]]:
    """Watches that share a store; those of ranks in `asleep` give no sign of life."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(watch, "FROZEN_SECONDS", FROZEN)
    monkeypatch.setattr(watch, "LOST_SECONDS", 0.5)
    monkeypatch.setattr(watch, "LINGER_SECONDS", 1.0)
    monkeypatch.setattr(watch, "FOLLOW_SECONDS", 0.0)
    made: list[Watch] = []

    def make(size: int = 3, asleep: tuple[int, ...] = ()) -> list[Watch]:
        store = dist.HashStore()
        store.set_timeout(datetime.timedelta(seconds=5))
        store.set("main", '{"beat": "0", "silent": {}}')
        store.set("failed", "-")
        for rank in range(size):
            store.set(f"beat/{rank}", "0")
        stores = [Cut(store) for _ in range(size)]
        hosts = [f"host{rank}" for rank in range(size)]
        watches = [Watch(lambda store=store: store, rank, hosts) for rank, store in enumerate(stores)]
        for each in watches:
            if each.rank not in asleep:
                each.start()
                made.append(each)
        return watches

    yield make
    for each in made:
        each._stop.set()
        if each in watch._open:
            watch._open.remove(each)


def failure_of(each: Watch, seconds: float = 4.0) -> str:
    """What a watch's main thread raises while it waits."""
    deadline = time.monotonic() + seconds
    with each.inside():
        while each.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
    with pytest.raises(ProcessError) as raised:
        each.look()
    return str(raised.value)


class Pending:
    """A collective that the others never come to."""

    def is_completed(self) -> bool:
        return False


def test_the_first_failure_is_raised_everywhere_by_name_and_heard_before_its_process_leaves(
    make_watches,
) -> None:
    watches = make_watches()
    main, last = (Processes(rank, 3, watch=watches[rank]) for rank in (0, 2))
    heard: list[str] = []

    def wait() -> None:
        with pytest.raises(ProcessError) as raised, main.together():
            main._finish(lambda async_op: Pending())
        heard.append(str(raised.value))

    thread = threading.Thread(target=wait)
    thread.start()
    with pytest.raises(OSError, match=r"^\[Errno 28\] disk full$"), last.together():  # its own error, as it was
        raise OSError(28, "disk full")
    assert watches[1].failure is not None
    thread.join()
    assert heard == [watches[1].failure]
    assert heard[0].startswith("Process 2 of 3 (on host2) stopped this run: OSError: [Errno 28] disk full.")
    with pytest.raises(ProcessError, match="disk full"), Processes(1, 3, watch=watches[1]).together():
        pytest.fail("entered")  # one that comes later does not begin
    assert all(each.raised for each in watches)


def test_who_is_in_no_hook_of_ours_is_told_in_the_log_and_left_alone(make_watches, caplog) -> None:
    watches = make_watches(2)
    with pytest.raises(KeyboardInterrupt), Processes(0, 2, watch=watches[0]).together():
        raise KeyboardInterrupt
    assert "Process 0 of 2 (on host0) stopped this run: KeyboardInterrupt" in caplog.text
    assert not watches[1].raised


@pytest.mark.parametrize("asleep", [0, 2])
def test_a_silent_process_is_named_by_those_who_wait_and_by_nobody_else(make_watches, asleep: int) -> None:
    watches = [each for each in make_watches(asleep=(asleep,)) if each.rank != asleep]
    time.sleep(1.2 * FROZEN)
    assert [each.failure for each in watches] == [None, None]  # nobody needs it yet
    for each in watches:
        assert failure_of(each).startswith(f"Process {asleep} of 3 (on host{asleep}) died or is frozen")


def test_a_lost_connection_is_explained_by_the_failure_or_the_silence_behind_it(make_watches, monkeypatch) -> None:
    monkeypatch.setattr(watch, "FROZEN_SECONDS", 100.0)  # silence alone would not tell
    watches = make_watches(asleep=(1,))
    with pytest.raises(ProcessError, match=r"^Process 1 of 3 \(on host1\) died"):
        watches[2].find_lost()
    watches = make_watches(2)

    def reset(async_op: bool) -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(ProcessError, match="Process 0 of 2 lost the others: .*Connection closed by peer"):
        Processes(0, 2, watch=watches[0])._finish(reset)


def test_a_process_at_work_for_long_is_not_accused_nor_one_whose_connection_was_cut_once(make_watches) -> None:
    watches = make_watches(2)
    healthy = watches[1]._store.store
    watches[1]._connect = lambda: healthy
    watches[1]._store.is_cut = True
    with watches[0].inside(), watches[1].inside():
        time.sleep(2 * FROZEN)
    assert [each.failure for each in watches] == [None, None]


@pytest.mark.parametrize("how", ["cut", "blocks"])
def test_a_store_that_dies_or_freezes_with_the_main_process_is_its_death(make_watches, how: str) -> None:
    watches = make_watches(2)
    time.sleep(0.2)
    for each in watches:
        each._store.is_cut = how == "cut"
        if how == "blocks":
            each._store.blocks.set()
    assert failure_of(watches[1]).startswith("Process 0 of 2 (on host0) died or is frozen")
    assert failure_of(watches[0]).startswith("The launcher that holds the store")


def test_leaving_takes_no_time_and_is_no_failure(make_watches) -> None:
    watches = make_watches(3)
    started = time.monotonic()
    for each in watches[::-1]:
        each.close()
    assert time.monotonic() - started < 0.9
    assert not any(thread.is_alive() for each in watches for thread in each._threads[:1])
    assert [each.failure for each in watches] == [None] * 3


def test_who_left_is_named_at_once_where_others_wait_for_it(make_watches) -> None:
    watches = make_watches(3)
    watches[2].close()
    started = time.monotonic()
    assert "Process 2 of 3 (on host2) died" in failure_of(watches[0])
    assert time.monotonic() - started < FROZEN


def test_copies_are_the_same_and_a_pickle_is_alone(make_watches) -> None:
    processes = Processes(1, 2, watch=make_watches(2)[1])
    settings = RunSettings(processes=processes)
    assert copy.deepcopy(settings).processes is copy.copy(processes) is processes
    assert dataclasses.asdict(settings)["processes"] is processes
    assert pickle.loads(pickle.dumps(settings)).processes is ALONE
    assert ALONE.sum(np.ones(2)).tolist() == [1, 1]


SCRIPT = """
import os, sys, time, torch, numpy as np, torch.distributed as dist
from mates_hf.engine import watch
from mates_hf.engine.processes import Processes, ProcessError

watch.GRACE_SECONDS = 8.0
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")

def fails(body, sign, own=None):
    started = time.time()
    try:
        processes = Processes.of_run()
        with processes.together():
            body(processes)
            processes.meet()
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        assert (own or sign) in told if rank in broken else sign in told, told
        assert time.time() - started < 20
        return
    raise AssertionError("nothing was raised")

def raise_there(processes):
    if rank in broken:
        raise ValueError(f"planted in {rank}")
    processes.agree(1.0)

# No way to reach one another, on all: said with the way out. Nothing is left behind by any of these.
broken = [0, 1, 2, 3]
os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
fails(lambda processes: None, "GLOO_SOCKET_IFNAME")
del os.environ["GLOO_SOCKET_IFNAME"]
first = Processes.of_run()
assert first is Processes.of_run() and first.sum(np.ones(3)).tolist() == [4, 4, 4]
for broken in ([0], [3], [0, 1, 2, 3]):
    fails(raise_there, f"Process {broken[0]} of 4 (", "ValueError: planted in")
    assert Processes.of_run() is not first
    assert Processes.of_run().sum(np.ones(1)).tolist() == [4]

# Gradients that some have and others have not.
parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
for number, parameter in enumerate(parameters[:2]):
    parameter.grad = torch.full((3,), rank + 1.0) if number or rank == 2 else None
Processes.of_run().sum_gradients(parameters)
assert [None if p.grad is None else p.grad.tolist() for p in parameters] == [[3.0] * 3, [10.0] * 3, None]

# Groups taken down and made anew, at once.
dist.destroy_process_group()
os.environ["MASTER_PORT"] = sys.argv[1]
dist.init_process_group("gloo")
processes = Processes.of_run()
assert processes.sum(np.ones(1)).tolist() == [4]

# One alone is where it cannot look: it is ended by name once the failure of another one is known.
with processes.together():
    if rank == 3:
        raise ValueError("planted at the end")
    if rank == 1:
        time.sleep(1000)
    processes.meet()
"""


@pytest.mark.slow
def test_four_processes_fail_together_begin_anew_and_end(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    processes = start_processes([str(tmp_path / "script.py"), free_port()], 4, free_port())
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [1, 1, 1, 1], "".join(errors)[-6000:]
    for error in (errors[0], errors[2]):
        assert "ProcessError: Process 3 of 4 (" in error
        assert "ValueError: planted at the end" in error
    assert "Process 1 of 4 is ended: Process 3 of 4 (" in errors[1]
    assert errors[3].rstrip().splitlines()[-1].endswith("ValueError: planted at the end")


@pytest.mark.slow
def test_a_run_that_ends_well_says_nothing_of_stores_and_sockets(tmp_path: Path) -> None:
    script = """
import os, time, numpy as np, torch.distributed as dist
from mates_hf.engine.processes import Processes
dist.init_process_group("gloo")
assert Processes.of_run().sum(np.ones(1)).tolist() == [2]
if os.environ["RANK"] == "0":
    dist.destroy_process_group()  # one that tidies up and goes first, one that does neither
else:
    time.sleep(3)
"""
    (tmp_path / "script.py").write_text(script)
    processes: list[subprocess.Popen[str]] = start_processes([str(tmp_path / "script.py")], 2, free_port())
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert errors == ["", ""]
