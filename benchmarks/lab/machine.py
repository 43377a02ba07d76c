"""The machine: what figures were measured on, arms that take turns, and work in processes of its own.

Trade-off: a process of its own takes seconds to import everything; memory peaks and compiled thread counts stay in it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from mates_hf.disk import written_whole

ROOT = Path(__file__).resolve().parents[2]
# Large blocks come from the heap and stay there: glibc otherwise gives each logits tensor back to the kernel, and
# page-faults it in anew, by an amount that depends on its size rather than on the work. Read at process start.
STEADY_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


def with_steady_memory() -> None:
    """Start this process again with `STEADY_MEMORY`, unless it has it."""
    if not STEADY_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **STEADY_MEMORY})


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def tag() -> str:
    """The hardware in the names of results: `cpu2` is two CPU cores; else the name of the accelerator."""
    import torch

    if not torch.cuda.is_available():
        return f"cpu{num_cores()}"
    return "".join(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower()))


def hardware(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        **versions("torch"),
        "load_before": os.getloadavg()[0],
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages, and of Python."""
    return {**{name: importlib.metadata.version(name) for name in packages}, "python": platform.python_version()}


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def alternate(arms: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm in each of `repeats` turns; every other turn goes through the arms backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            seconds[name].append(seconds_of(arms[name]))
    return seconds


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over turns of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


@contextmanager
def temporary_folder(work: Path | None) -> Iterator[Path]:
    """A folder that is deleted at the end, inside `work` where that is given."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=work) as folder:
        yield Path(folder)


def written_once(path: Path, write: Callable[[BinaryIO], Any]) -> Path:
    """A file that is written where it is not there yet; processes that ask for it at once wait for the first."""
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with written_whole(path) as file:
                write(file)
    return path


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def as_launched(rank: int, size: int, port: str) -> dict[str, str]:
    """What a launcher tells one of several processes; nothing where there is one."""
    if size == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def in_processes(
    work: Callable[..., Any], *arguments: Any, size: int = 1, threads: int = 1, steady: bool = True
) -> list[Any]:
    """Call a function of a module in `size` fresh processes that know each other; results by rank.

    Arguments and result must be plain JSON values. `steady` is whether the processes have `STEADY_MEMORY`; what
    measures own memory must not.
    """
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if steady or name not in STEADY_MEMORY}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    with temporary_folder(None) as folder:
        outs = [folder / f"{rank}.json" for rank in range(size)]
        call = [f"{work.__module__}:{work.__qualname__}", json.dumps(arguments)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.lab.child", *call, str(out)],
                env=environment | as_launched(rank, size, port),
            )
            for rank, out in enumerate(outs)
        ]
        if any([process.wait() for process in processes]):
            raise SystemExit(f"A process of `{call[0]}` failed: see above.")
        return [json.loads(out.read_text(encoding="utf-8")) for out in outs]


def in_its_own_process(work: Callable[..., Any], *arguments: Any, threads: int = 1, steady: bool = True) -> Any:
    """Call a function of a module in one fresh process, and return its result."""
    return in_processes(work, *arguments, threads=threads, steady=steady)[0]
