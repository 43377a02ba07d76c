"""What the processes of a run know of one another beside their collectives: who failed, and who still answers.

Where it is used: under `processes`, whose collectives look here while they wait. Two threads a process keep it up.
One speaks to the store of torch.distributed, through a connection of its own: a sign of life every two seconds, and
what failed. The other only reads the clock and memory, because the first one blocks where the process that holds the
store is frozen. The main process reads all signs of life and says who is silent; the others watch the main one.

A process is accused of being frozen only by one that needs it (inside a hook or a collective of ours), after a minute
that the accuser itself was awake. Where the main thread cannot look, because it sits in a collective that is not ours
or fits a model, the process is ended once a failure has been known for a while: nobody would ever come to meet it.

Trade-off: a healthy process whose interpreter lock is held by one call for a minute is taken for a frozen one.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import functools
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from mates_hf.errors import MatesError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 2.0  # between two signs of life
FROZEN_SECONDS = 60.0  # silence after which a process is taken for frozen
LOST_SECONDS = 6.0  # silence that tells which process it was, where a connection is gone
GRACE_SECONDS = 15.0  # the main thread may stay this long where it cannot look, once a failure is known
LINGER_SECONDS = 5.0  # a process that failed waits this long for the others to hear it: it may hold the store
FOLLOW_SECONDS = 1.0  # the others end this much later: launchers report the first one that ends as the cause
_LEFT = "left"  # in place of a sign of life: the process ended of its own accord
_NOTHING = "-"  # in place of what failed
_ADVICE = "The run can be resumed from its last complete checkpoint."
_OPENING = datetime.timedelta(minutes=30)
_FOR_EVER = datetime.timedelta(days=30)


class ProcessError(MatesError):
    """Another process of the run failed, or is not in the same state as this one."""


class Watch:
    """Who failed and who still answers, in a run of several processes.

    Args:
        connect: opens a connection to the store that all processes share, under a prefix of this watch's own.
        rank: number of this process.
        hosts: Hosts of all processes, by rank.
        store: a connection that is there already; None opens one.
    """

    def __init__(self, connect: Callable[[], Any], rank: int, hosts: list[str], store: Any = None) -> None:
        self.rank, self.size, self.hosts = rank, len(hosts), hosts
        self.failure: str | None = None  # the first one, as every process is to say it
        self.raised = False  # this process has ended by it, or by its own error
        self._connect, self._store = connect, connect() if store is None else store
        self._pid = os.getpid()
        self._inside = 0  # hooks and collectives that the main thread is in
        self._silent: dict[int, float] = {}  # seconds by rank, of those that are late
        self._clock = 0.0  # seconds that this process was awake
        self._beats: dict[int, tuple[str, float]] = {}  # the last one of those this process watches, and when it came
        self._trip_at = 0.0  # when the store last answered
        self._num_heard = self._count = 0
        self._said = self._heard = self._lingered = self._store_is_gone = self._leaves = False
        self._kept: list[Any] = []
        self._lock = threading.Lock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"mates_hf {work.__name__}", daemon=True)
            for work in (self._talk, self._judge)
        ]

    @classmethod
    def open(cls, rank: int, size: int, name: str) -> Watch:
        """Meet the other processes in the default store; all must call it at the same point.

        Args:
            rank: number of this process.
            size: how many there are.
            name: Name of this meeting, the same in all processes and used once.

        Returns:
            The watch, at work.

        Raises:
            ProcessError: the others do not come within the default group's time-out, or half an hour.
        """
        import torch.distributed

        dist: Any = torch.distributed
        default: Any = dist.distributed_c10d._get_default_store()
        limit = max(getattr(default, "timeout", _OPENING), _OPENING)
        key, missing = f"mates_hf/{name}", "the main one"
        try:
            # Told by the main process: what an earlier run left in the store has another prefix.
            if rank != 0:
                default.wait([key], limit)
            prefix = uuid.uuid4().hex if rank == 0 else default.get(key).decode()
            connect = functools.partial(_own_connection, default, prefix)
            store = connect()
            store.set(f"host/{rank}", socket.gethostname())
            store.set(f"beat/{rank}", "0")
            if rank == 0:
                store.set("main", json.dumps({"beat": "0", "silent": {}}))
                store.set("failed", _NOTHING)
                default.set(key, prefix)
            names = [f"host/{each}" for each in range(size)]
            missing = "some of them"
            store.wait(names, limit)
            hosts = [host.decode() for host in _read(store, names)]
            watch = cls(connect, rank, hosts, store)
        except (RuntimeError, ValueError, OSError) as error:
            raise ProcessError(
                f"All {size} processes of the run must come to this point within {limit} (`ddp_timeout`, if that is "
                f"longer than half an hour), but process {rank} waited for {missing} in vain ({error}). Look at the "
                "first error that a process printed."
            ) from error
        watch.start()
        return watch

    def start(self) -> None:
        """Begin to give signs of life and to look for those of others."""
        for thread in self._threads:
            thread.start()
        _open.append(self)

    def name(self, rank: int) -> str:
        """A process as errors begin with it."""
        return f"Process {rank} of {self.size} (on {self.hosts[rank]})"

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The main thread does what the others wait for: a failure that it cannot look at ends the process."""
        with self._lock:
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1

    def look(self) -> None:
        """Raise where a failure is known.

        Raises:
            ProcessError: with the first failure.
        """
        if self.failure is not None:
            self.raised = True
            raise ProcessError(self.failure)

    def fail(self, what: str) -> None:
        """Say that this process cannot go on, and wait a moment for the others to hear it.

        Args:
            what: its error; not said where another failure is known already.
        """
        is_first = self._blame(f"{self.name(self.rank)} stopped this run: {what[:4000].rstrip('. ')}. {_ADVICE}")
        self.raised = True
        self._wake.set()
        if self._lingered:
            return
        self._lingered = True
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline:
            all_know = self._said and self._num_heard >= self.size - len(self._silent)
            if all_know or self._store_is_gone or self._clock - self._trip_at > LOST_SECONDS:
                break
            time.sleep(0.02)
        if not is_first:
            time.sleep(FOLLOW_SECONDS)

    def find_lost(self) -> None:
        """A connection is gone: raise with the failure that explains it, or with the process that no longer answers.

        Raises:
            ProcessError: what was found within some seconds.
        """
        deadline = time.monotonic() + 2 * LOST_SECONDS
        with self.inside():
            while time.monotonic() < deadline:
                self._accuse(LOST_SECONDS)
                self.look()
                time.sleep(0.05)

    def keep(self, *groups: Any) -> None:
        """Process groups that must never be taken down once something failed: that would wait for what is pending."""
        self._kept += groups

    def close(self) -> None:
        """Leave, so that the others do not take it for a death; after a failure, so that the process's end comes."""
        _open.remove(self)
        if os.getpid() != self._pid:  # a fork has neither threads nor connections
            return
        if self.failure is not None:
            for group in self._kept:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self._leaves = True
        self._wake.set()
        self._threads[0].join(LINGER_SECONDS / 2)
        self._stop.set()

    # --- the thread that speaks to the store ---

    def _talk(self) -> None:
        try:
            try:
                self._exchange()
            except Exception:
                self._store = self._connect()  # a connection may be cut; whoever holds the store may be gone
                self._exchange()
        except Exception as error:
            logger.debug("The store of torch.distributed is gone: %s", error)
            self._store_is_gone = True

    def _exchange(self) -> None:
        """Give signs of life and look for those of others until it is time to leave."""
        while not self._stop.is_set():
            self._count += 1
            leaves = self._leaves
            self._store.set(f"beat/{self.rank}", _LEFT if leaves else str(self._count))
            self._hear()
            told = self._tell_silent() if self.rank == 0 else self._read_main()
            self._trip_at = self._clock
            if told or (leaves and self.rank) or (self.raised and self._num_heard >= self.size):
                return  # the others know, and whoever holds the store may end
            urgent = leaves or (self.failure is not None and self._num_heard < self.size)
            self._wake.wait(0.1 if urgent else BEAT_SECONDS)
            self._wake.clear()

    def _hear(self) -> None:
        """Say what this process knows to have failed, or hear it."""
        if self.failure is None:
            told = self._store.get("failed").decode()
            if told != _NOTHING:
                self._blame(told)
                self._said = True
                if not self.raised:  # a launcher may end this process before it can raise; training never says why
                    logger.error("%s", self.failure)
        elif not self._said:
            self._store.compare_set("failed", _NOTHING, self.failure)
            self._said = True
        if self._said:
            mine = 0 if self._heard or not (self.raised or not self._inside) else 1
            self._heard = self._heard or bool(mine)
            self._num_heard = int(self._store.add("heard", mine))

    def _tell_silent(self) -> bool:
        """In the main process: read all signs of life, and say who is late; true when it may leave."""
        ranks = range(1, self.size)
        beats = _read(self._store, [f"beat/{rank}" for rank in ranks])
        num_left = 0
        for rank, beat in zip(ranks, beats, strict=True):
            self._note(rank, beat.decode())
            num_left += beat == _LEFT.encode()
        ages = {rank: self._age(rank) for rank in ranks}
        self._silent = {rank: age for rank, age in ages.items() if age > LOST_SECONDS / 2}
        own = _LEFT if self._leaves else str(self._count)
        self._store.set("main", json.dumps({"beat": own, "silent": self._silent}))
        return self._leaves and num_left == self.size - 1

    def _read_main(self) -> bool:
        """In another process: the main one's sign of life, and whom it has not heard of; true where it leaves."""
        main: dict[str, Any] = json.loads(self._store.get("main"))
        self._note(0, main["beat"])
        self._silent = {int(rank): age for rank, age in main["silent"].items() if int(rank) != self.rank}
        if main["beat"] != _LEFT:
            return False
        self._store.set(f"beat/{self.rank}", _LEFT)
        return True

    def _note(self, rank: int, beat: str) -> None:
        if rank not in self._beats or self._beats[rank][0] != beat:
            self._beats[rank] = (beat, self._clock)

    def _age(self, rank: int) -> float:
        """Seconds for which a watched process gave no sign of life, as far as the store says."""
        beat, at = self._beats.get(rank, ("", 0.0))
        return self._clock - at + (FROZEN_SECONDS if beat == _LEFT else 0.0)

    # --- the thread that judges ---

    def _judge(self) -> None:
        before, waited = time.monotonic(), 0.0
        while not self._stop.wait(0.2):
            now = time.monotonic()
            awake, before = min(now - before, 1.0), now  # a process that was frozen itself accuses nobody of it
            self._clock += awake
            if self._inside and self.failure is None:
                self._accuse(FROZEN_SECONDS)
            waited = waited + awake if self.failure is not None else 0.0
            if waited > GRACE_SECONDS and self._inside:
                self._end()

    def _accuse(self, seconds: float) -> None:
        """Name the process that has been silent for so long, if there is one."""
        main_is_silent = self.rank != 0 and (self._store_is_gone or self._age(0) > seconds)
        late = {0: self._age(0)} if main_is_silent else {r: age for r, age in self._silent.items() if age > seconds}
        if late:
            rank = max(late, key=lambda each: late[each])
            self._blame(
                f"{self.name(rank)} died or is frozen: it gave no sign of life for "
                f"{max(late[rank], 1.0):.0f} seconds. {_ADVICE}"
            )
        elif self._store_is_gone or self._clock - self._trip_at > max(seconds, FROZEN_SECONDS):
            self._blame(f"The launcher that holds the store of torch.distributed died or is frozen. {_ADVICE}")

    def _blame(self, failure: str) -> bool:
        """Take this for the run's failure, if it is the first; whether it is."""
        with self._lock:
            is_first = self.failure is None
            if is_first:
                self.failure = failure
        self._wake.set()
        return is_first

    def _end(self) -> None:
        """The main thread cannot be reached, and whom it waits for has failed."""
        logger.error("Process %d of %d is ended: %s", self.rank, self.size, self.failure)
        os._exit(1)


_open: list[Watch] = []


def close_all() -> None:
    """At the end of the process, or where its groups have been taken down."""
    for watch in list(_open):
        watch.close()


def _at_exit() -> None:
    failed = any(watch.failure is not None and watch.raised for watch in _open)
    close_all()
    if failed and hasattr(signal, "alarm"):
        # Taking down groups (NCCL's as well) waits for what is pending; whom it waits for may never end.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(GRACE_SECONDS))


atexit.register(_at_exit)


def _own_connection(store: Any, prefix: str) -> Any:
    """Another connection to the same store, because a thread that waits in one blocks all that use it.

    Args:
        store: the default one.
        prefix: for all keys.

    Returns:
        The store; where it has no connections (files, say), this one.
    """
    import torch.distributed

    dist: Any = torch.distributed
    inner = store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    if not isinstance(inner, dist.TCPStore):
        return dist.PrefixStore(prefix, store)
    socket.create_connection((inner.host, inner.port), LOST_SECONDS).close()  # torch would try for long, and loudly
    limit = datetime.timedelta(seconds=LOST_SECONDS)
    own = dist.TCPStore(inner.host, inner.port, None, False, limit, wait_for_workers=False)
    own.set_timeout(_FOR_EVER)  # who is late is for the clock to say
    return dist.PrefixStore(prefix, own)


def _read(store: Any, keys: list[str]) -> list[bytes]:
    """Values of keys that are all there, at one go where the store can."""
    extended = getattr(store, "has_extended_api", None)
    if extended is not None and extended():
        found: list[bytes] = store.multi_get(keys)
        return found
    return [store.get(key) for key in keys]
