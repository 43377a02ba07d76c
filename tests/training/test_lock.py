"""A lock is refused while its run lives and taken over once that is dead: real processes, killed and stopped."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mates_hf.training import lock as module
from mates_hf.training.lock import LOCK_FILE, LockedError, RoundsLock
from tests.launch import free_port, start_processes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these processes are forked")


class Owner:
    """Holds a lock."""


OWNER = Owner()


@pytest.fixture(autouse=True)
def fast(monkeypatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "STALE_SECONDS", 0.4)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)


@contextlib.contextmanager
def process(work: Callable[[], None]) -> Iterator[int]:
    """A forked process that has done `work` and then waits to be killed."""
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work()
            os.write(writes, b"!")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writes)
    try:
        assert os.read(reads, 1) == b"!"
        yield pid
    finally:
        os.close(reads)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_live_run_is_refused_by_name_and_a_killed_one_taken_over(tmp_path, caplog):
    with process(lambda: RoundsLock(tmp_path, OWNER)) as pid:
        for sent in (0, signal.SIGSTOP):  # a stopped process has no heartbeat, and lives
            os.kill(pid, sent)
            with pytest.raises(
                LockedError, match=rf"process {pid} on .*, started 20.*`rounds_dir`.*delete `.*\.json`"
            ):
                RoundsLock(tmp_path, OWNER)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while (module._born(pid)[1] or "Z") != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        taken = RoundsLock(tmp_path, OWNER)  # nobody has waited for it yet: a zombie is dead as well
        assert f"process {pid}" in caplog.text
    taken.check()
    taken.release()
    assert not list(tmp_path.iterdir())


def left(path: Path, **changes: object) -> None:
    """The lock of a run that is gone, as one of this host unless told otherwise."""
    about = {**module._place(), "started": "2026-01-01T00:00:00+00:00", "nonce": "theirs", **changes}
    (path / LOCK_FILE).write_text(json.dumps(about))


def test_a_number_that_another_process_has_by_now_is_no_life(tmp_path):
    born = module._born(os.getppid())[0]
    left(tmp_path, pid=os.getppid(), born=born)
    with pytest.raises(LockedError):
        RoundsLock(tmp_path, OWNER)
    left(tmp_path, pid=os.getppid(), born=born - 1)
    RoundsLock(tmp_path, OWNER).release()


@pytest.mark.quick("place0*", "place2*", "None*")
@pytest.mark.parametrize(
    ("place", "age"),
    [
        ({"host": "other"}, 100.0),
        ({"host": "other"}, 0.0),
        ({"host": "other"}, -100.0),
        ({"boot": "other"}, 0.0),
        ({"processes": "pid:[1]"}, 0.0),
        ({"pid": "?"}, 0.0),
        (None, 0.0),
    ],
)
def test_a_run_elsewhere_is_told_by_its_heartbeat(tmp_path, monkeypatch, place, age):
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this host's clock says nothing of the file server's
    left(tmp_path, **(place or {}))
    if place is None:  # cut short by a kill on a file system without hard links
        (tmp_path / LOCK_FILE).write_text('{"host": ')
    path = tmp_path / LOCK_FILE
    at = path.stat().st_mtime - age
    os.utime(path, (at, at))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.03):
            os.utime(path)

    beating = threading.Thread(target=beat)
    begun = time.monotonic()
    RoundsLock(tmp_path, OWNER).release()
    assert (time.monotonic() - begun > 0.25) is (age <= 0)  # a fresh one is watched until it must have moved
    left(tmp_path, **(place or {"host": "other"}))
    beating.start()
    try:
        with pytest.raises(LockedError):
            RoundsLock(tmp_path, OWNER)
    finally:
        stop.set()
        beating.join()


def test_a_held_lock_is_touched(tmp_path):
    held = RoundsLock(tmp_path, OWNER)
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    deadline = time.monotonic() + 5
    while not (tmp_path / LOCK_FILE).stat().st_mtime and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / LOCK_FILE).stat().st_mtime
    num_threads = threading.active_count()
    held.release()
    assert threading.active_count() == num_threads - 1


def test_one_thread_after_another_takes_it_and_two_at_once_do_not(tmp_path):
    first = RoundsLock(tmp_path, OWNER)
    second = RoundsLock(tmp_path, OWNER)  # as a Trainer does that starts again after an error
    with pytest.raises(LockedError, match="taken for dead"):
        first.check()
    first.release()
    second.check()  # what the first has lost it does not give back
    errors: list[BaseException] = []

    def other() -> None:
        try:
            RoundsLock(tmp_path, OWNER)
        except LockedError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1
    second.release()


def test_it_is_given_back_with_its_owner_and_not_by_a_forked_child(tmp_path):
    owner = Owner()
    held = RoundsLock(tmp_path, owner)
    pid = os.fork()
    if not pid:
        held.release()
        os._exit(0)
    os.waitpid(pid, 0)
    held.check()
    del owner
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_deleted_under_its_run_comes_back_and_one_taken_over_ends_it(tmp_path, caplog):
    held = RoundsLock(tmp_path, OWNER)
    (tmp_path / LOCK_FILE).unlink()
    held.check()
    assert "was deleted" in caplog.text
    left(tmp_path, host="other", pid=7)
    with pytest.raises(LockedError, match="process 7 on other"):
        held.check()
    held.release()
    assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_take_over_at_once_one_gets_it(tmp_path, monkeypatch, links):
    if not links:

        def refuses(*args: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuses)
    left(tmp_path, pid=2**22 + 1)
    (tmp_path / f".{LOCK_FILE}-left").touch()
    start = time.monotonic() + 0.2
    pids = []
    for number in range(6):
        pid = os.fork()
        if not pid:
            try:
                while time.monotonic() < start:
                    pass
                held = RoundsLock(tmp_path, OWNER)
                deadline = time.monotonic() + 20
                while len(list(tmp_path.glob("refused-*"))) < 5 and time.monotonic() < deadline:
                    time.sleep(0.01)  # a holder that is gone would be taken over
                held.check()
                (tmp_path / f"got-{number}").touch()
            except LockedError:
                (tmp_path / f"refused-{number}").touch()
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert len(list(tmp_path.glob("got-*"))) == 1
    assert re.fullmatch(r"[^-]*", "".join(path.name for path in tmp_path.glob(".*")))


@pytest.mark.slow
def test_all_processes_of_a_run_hear_that_another_one_lives(tmp_path):
    (tmp_path / "_mates").mkdir()
    held = RoundsLock(tmp_path / "_mates", OWNER)
    given = {"output_dir": str(tmp_path), "result": str(tmp_path / "result")}
    processes = start_processes(["tests/training/worker.py", json.dumps(given)], 2, free_port())
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
        held.release()
    assert all(process.returncode for process in processes)
    for error in errors:
        assert f"is in use by the run of process {os.getpid()}" in error
