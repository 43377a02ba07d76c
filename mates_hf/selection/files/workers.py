"""Several processes that score and write bundles, or this one alone.

Where it is used: `file_scoring` has all bundles scored by it, and then all written. Trade-off: processes are started
afresh (spawned), which takes a second or two each, because a process that is forked after numba or a tokenizer ran on
threads can hang. Several workers share the cores, so each uses one thread.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mates_hf.errors import MatesError

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
_AHEAD = 2  # bundles a worker that are handed out before it asks

Job = Callable[..., Any]
_work: Any = None  # of this worker process


@contextlib.contextmanager
def workers(work: Any, num: int) -> Iterator[Callable[[Job, Sequence[tuple[Any, ...]]], Iterator[Any]]]:
    """A function that does a job with each of many arguments, and gives what comes of each as it is done.

    Args:
        work: First argument of every job; sent to each process once.
        num: Number of processes; 1 is this one, without another.

    Yields:
        The function. The first error ends it.
    """
    if num == 1:
        yield lambda job, arguments: (job(work, *one) for one in arguments)
        return
    with _inherited(_ONE_THREAD):
        pool = ProcessPoolExecutor(
            num, multiprocessing.get_context("spawn"), initializer=_start, initargs=(work,)
        )  # fmt: skip
        try:
            yield lambda job, arguments: _done_by(pool, num, job, arguments)
        finally:
            _end(pool)


@contextlib.contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for the processes that are started inside; here they were read long ago."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _done_by(pool: Executor, num: int, job: Job, arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    todo = iter(arguments)
    running: set[Future[Any]] = set()
    try:
        while True:
            for one in todo:
                running.add(pool.submit(_do, job, one))
                if len(running) >= num * _AHEAD:
                    break
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise MatesError(
            "A worker process was ended from outside, as happens where memory runs out. What is done is kept: run the "
            "same again, with fewer `workers` if it was memory."
        ) from error


def _end(pool: ProcessPoolExecutor) -> None:
    """End the pool at once, also where jobs run whose outcome nobody wants any more."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    busy = sys.exc_info()[0] is not None
    pool.shutdown(wait=not busy, cancel_futures=True)
    if busy:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _do(job: Job, arguments: tuple[Any, ...]) -> Any:
    return job(_work, *arguments)


def _start(work: Any) -> None:
    """Set a worker process up: one thread, and an end when the process that started it has one."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = work
    import pyarrow as pa

    pa.set_cpu_count(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    """A worker waits for work for ever, and a parent that is killed gives none."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
