"""A lock that keeps two runs out of one folder of rounds, and lets go by itself when its run is dead.

Where it is used: the main process takes it in `on_train_begin`, after every check and before anything is moved, and
gives it back in `on_train_end`, at an error of ours, and when the interpreter exits. A run that was killed cannot give
it back, so the next one looks whether it still lives: on the same host by its process, elsewhere by its heartbeat.

Trade-off: a file and a thread that touches it. It works on any file system that several hosts see, without a lock
daemon; in exchange a run that died on another host is told from a live one only by waiting for a heartbeat. Ages are
compared by the file server's clock alone: with the time that a file written now gets in the same folder.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mates_hf.disk import sync_directory
from mates_hf.errors import MatesError

logger = logging.getLogger(__name__)

LOCK_FILE = "lock.json"
BEAT_SECONDS = 15.0
STALE_SECONDS = 180.0  # a heartbeat this old is of a dead run; caches of a file server show it up to a minute late
_POLL_SECONDS = 1.0
_TRIES = 100  # of taking a lock that others take at the same moment


class LockedError(MatesError):
    """Another run that still lives writes its rounds to the same folder, or has taken it over from this one."""


class RoundsLock:
    """The right to write to a folder of rounds, held until `release`, or until its owner or the interpreter is gone.

    Args:
        rounds_dir: the folder, which must be there.
        owner: who holds it; the lock is given back when that is collected as garbage.

    Raises:
        LockedError: a live run holds it; names its host, process and start, and the way out.
        OSError: the folder cannot be written to.
    """

    def __init__(self, rounds_dir: Path, owner: Any) -> None:
        self.path = rounds_dir / LOCK_FILE
        self._about = {**_place(), "started": _now(), "nonce": uuid.uuid4().hex}
        self._take()
        self._beat = _Beat(self.path, str(self._about["nonce"]))
        self._finalizer = weakref.finalize(owner, _give_back, self._beat, os.getpid())

    def check(self) -> None:
        """Refuse to go on where another run has taken the folder over: this one was taken for dead.

        Raises:
            LockedError: names that run.
            OSError: the lock cannot be read.
        """
        found, mark = _look(self.path)
        if mark is None and self._make():
            logger.warning("`%s` was deleted while this run held it, and is there again.", self.path)
            return
        found = found or _read(self.path) or {}
        if found.get("nonce") != self._about["nonce"]:
            raise LockedError(
                f"This run must hold `{self.path}`, but {_described(found)} has it. This run was stopped for so long "
                "that it was taken for dead, or its lock was deleted. Resume it from its last checkpoint once no "
                "other run uses the folder, or give each run its own `rounds_dir`."
            )

    def release(self) -> None:
        """Give the folder back. What others have taken over since stays theirs."""
        self._finalizer()

    def _take(self) -> None:
        for _ in range(_TRIES):
            if self._make():
                break
            found, marked = _look(self.path)
            if found is None and marked is None:
                continue  # given back this moment
            self._require_dead(found or {})
            self._clear_away(found)
        else:
            raise LockedError(f"`{self.path}` must be free to take, but other runs take it at the same moment.")
        for left in self.path.parent.glob(f".{LOCK_FILE}-*"):  # of runs that were killed while they took it
            left.unlink(missing_ok=True)

    def _make(self) -> bool:
        """The lock file, with all that it says, unless there is one."""
        content = json.dumps(self._about).encode()
        temporary = self.path.with_name(f".{LOCK_FILE}-{self._about['nonce']}")
        _write_new(temporary, content)
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except FileNotFoundError:  # another run has just taken it, and cleared away what it took for leftovers
            return False
        except OSError:  # a file system without hard links
            try:
                _write_new(self.path, content)
            except FileExistsError:
                return False
        finally:
            temporary.unlink(missing_ok=True)
        try:
            sync_directory(self.path.parent)
        except OSError:  # nobody holds what this one could not take
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _require_dead(self, found: dict[str, Any]) -> None:
        """Return where the run that holds the lock is dead, if need be after watching its heartbeat.

        Raises:
            LockedError: it lives.
        """
        alive = _lives_here(found)
        if alive is None:
            alive = self._beats(found)
        if alive:
            raise LockedError(
                f"`{self.path.parent}` must not be written to by two runs, and is in use by {_described(found)}. Wait "
                "until that run ends or stop it, or give this run another `output_dir` or `rounds_dir`. If that "
                f"process is no training any more, delete `{self.path}`."
            )
        if found.get("pid") != os.getpid():
            logger.warning("Taking over `%s` from %s, which is dead.", self.path.parent, _described(found))

    def _beats(self, found: dict[str, Any]) -> bool:
        """Whether the heartbeat of a lock moves before it is too old, or was watched for that long."""
        first: float | None = None
        told = False
        begun = time.monotonic()  # the stamp may be of the future: clocks of servers are set back
        while True:
            now, (other, mark) = self._file_time(), _look(self.path)
            if mark is None or (other or {}).get("nonce") != found.get("nonce"):
                return False  # given back, or taken over by another: the next try sees it
            if first is not None and mark != first:
                return True
            if now - mark > STALE_SECONDS or time.monotonic() - begun > STALE_SECONDS:
                return False
            first = mark
            if not told:
                told = True
                logger.warning(
                    "`%s` is in use by %s: looking for up to %d seconds whether that run still lives.",
                    self.path.parent, _described(found), max(1, int(STALE_SECONDS - (now - mark))),
                )  # fmt: skip
            time.sleep(_POLL_SECONDS)

    def _file_time(self) -> float:
        """The time by the clock that stamps files in the folder, which may be another host's."""
        path = self.path.with_name(f".{LOCK_FILE}-{self._about['nonce']}")
        try:
            return _write_new(path, b"now")
        finally:
            path.unlink(missing_ok=True)

    def _clear_away(self, found: dict[str, Any] | None) -> None:
        """Take away the lock of a dead run, and no other: one that another run has just put there is put back."""
        away = self.path.with_name(f".{LOCK_FILE}-{self._about['nonce']}")
        dead = (found or {}).get("nonce")
        if (_read(self.path) or {}).get("nonce") != dead:
            return
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, away)
            if (_read(away) or {}).get("nonce") != dead:
                try:
                    os.link(away, self.path)
                except FileExistsError:
                    pass
                except OSError:  # a file system without hard links
                    os.rename(away, self.path)
            away.unlink(missing_ok=True)


class _Beat:
    """Touches a lock file from a thread of its own, as long as it is this run's, until it is told to stop."""

    def __init__(self, path: Path, nonce: str) -> None:
        self.path, self.nonce = path, nonce
        self._stop = threading.Event()
        _held[nonce] = threading.current_thread()
        self._thread = threading.Thread(target=self._run, name="mates-hf heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        _held.pop(self.nonce, None)
        self._stop.set()
        self._thread.join(timeout=BEAT_SECONDS)

    def is_ours(self) -> bool:
        return (_read(self.path) or {}).get("nonce") == self.nonce

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a server that is away comes back; the next beat will do
                if self.is_ours():
                    os.utime(self.path)  # without a time: the clock of whoever stores the file


_held: dict[str, threading.Thread] = {}  # by nonce: the threads of this process that hold a lock


def _give_back(beat: _Beat, pid: int) -> None:
    """Delete a lock file that is still ours. A forked child, which has no thread that beats, leaves it alone."""
    if os.getpid() != pid:
        return
    beat.stop()
    with contextlib.suppress(OSError):
        if beat.is_ours():
            beat.path.unlink(missing_ok=True)


def _lives_here(found: dict[str, Any]) -> bool | None:
    """Whether the run that holds a lock lives, as far as this host's processes tell; None where they do not.

    A lock of this process is of a run that broke off, unless another thread of it still trains.
    """
    place = _place()
    same = ("host", "boot", "processes")
    if not found or any(found.get(name) != place[name] for name in same):
        return None
    if found.get("pid") == place["pid"] and found.get("born") == place["born"]:
        holder = _held.get(str(found.get("nonce")))
        return holder is not None and holder is not threading.current_thread() and holder.is_alive()
    pid = found.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return None
    if place["born"] is None:  # no /proc
        return _lives_by_signal(pid)
    born, state = _born(pid)
    return born is not None and born == found.get("born") and state not in ("Z", "X")


def _lives_by_signal(pid: int) -> bool | None:
    """Without /proc: False where no process has that number. Where one has it, it may be another."""
    if os.name == "nt":  # where this call would end the process
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return None


def _place() -> dict[str, Any]:
    """Host and process; what tells one start of a host, and one numbering of its processes, from others."""
    boot = processes = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        processes = os.readlink("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot,
        "processes": processes,
        "pid": os.getpid(),
        "born": _born(os.getpid())[0],
    }


def _born(pid: int) -> tuple[int | None, str]:
    """When a process was started, in clock ticks since the host was, and its state; None where it is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # its name may hold anything
        return int(fields[19]), fields[0].decode()
    except (OSError, IndexError, ValueError):
        return None, ""


def _look(path: Path) -> tuple[dict[str, Any] | None, float | None]:
    """What a lock file says and when it was touched last; opening it makes a file server tell the truth."""
    try:
        with open(path, "rb") as file:
            return _parsed(file.read(1 << 16)), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None, None


def _read(path: Path) -> dict[str, Any] | None:
    return _look(path)[0]


def _parsed(content: bytes) -> dict[str, Any] | None:
    """The JSON object in a lock file; None for one that was cut short, whose heartbeat alone tells."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _write_new(path: Path, content: bytes) -> float:
    """Make a file that must not be there, and say when it was written by the clock of whoever stores it."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def _described(found: dict[str, Any]) -> str:
    """A run by what its lock says, for a sentence."""
    if not found:
        return "a run that its lock does not name"
    return f"the run of process {found.get('pid')} on {found.get('host')}, started {found.get('started')}"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def lock_for_one(folder: Path, owner: object, what: str, way_out: str) -> RoundsLock:
    """The lock of a working folder that is not a run's, with an error that says whose folder it is.

    Args:
        folder: it, which must be there.
        owner: whoever holds the lock; it goes when that goes.
        what: `fit` or `pilot`.
        way_out: what else a user may do than wait.

    Returns:
        The lock, taken.

    Raises:
        LockedError: another process that lives has it.
    """
    try:
        return RoundsLock(folder, owner)
    except LockedError as error:
        raise LockedError(
            f"`{folder}` must be written to by one {what}, and another one that lives has it. Wait until it is done, "
            f"or {way_out}. If no {what} runs any more, delete `{folder / LOCK_FILE}`."
        ) from error


@contextlib.contextmanager
def released_on_error(lock: RoundsLock | None) -> Iterator[None]:
    """Give a lock back where what is done inside ends the run, though its process may live on, in a notebook, say."""
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.release()
        raise


@contextlib.contextmanager
def withdrawn_on_error(lock: RoundsLock | None) -> Iterator[None]:
    """As `released_on_error`, for what is refused before the first step: an empty folder goes as well.

    Args:
        lock: this process's; None where it has none.
    """
    try:
        with released_on_error(lock):
            yield
    except BaseException:
        if lock is not None:
            with contextlib.suppress(OSError):  # there is something in it
                lock.path.parent.rmdir()
        raise
