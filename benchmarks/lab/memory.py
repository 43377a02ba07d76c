"""Memory: of a process, stage by stage, as the system counts it; and of tensors, as torch's profiler counts it.

Own memory is `RssAnon`; pages of mapped files (`RssFile`) are counted apart, because the system drops them when it
needs the room.

Trade-off: memory of a process is read every few milliseconds, not at each allocation. Bytes of tensors are counted on
the CPU, temporaries of kernels included; what a device's allocator holds back is not.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.lab.tables import table

MIB = 2**20


def status(*names: str) -> list[int]:
    """Fields of this process's memory status, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(fields[name].split()[0]) * 1024 for name in names]


class Meter:
    """Seconds, and peak and held memory, of each stage."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self._peak = [0, 0]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._peak = [max(*pair) for pair in zip(self._peak, status("RssAnon", "RssFile"), strict=True)]
            time.sleep(0.003)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        self._peak = status("RssAnon", "RssFile")
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        peak = [max(*pair) for pair in zip(self._peak, status("RssAnon", "RssFile"), strict=True)]
        held = status("RssAnon")[0]
        self.stages.append(
            {"stage": name, "seconds": seconds, "peak_own": peak[0], "held_own": held, "peak_mapped": peak[1]}
        )
        print(f"{name}: {seconds:.1f} s, {peak[0] / MIB:.0f} MiB own at most, {held / MIB:.0f} held", file=sys.stderr)


def stage_table(stages: Sequence[dict[str, Any]]) -> str:
    """A table of what a `Meter` found."""
    heads = ["stage", "seconds", "own memory at most, MB", "held after, MB", "mapped file pages at most, MB"]
    sizes = ("peak_own", "held_own", "peak_mapped")
    rows = [
        [stage["stage"], f"{stage['seconds']:.2f}", *(f"{stage[name] / 1e6:,.0f}" for name in sizes)]
        for stage in stages
    ]
    return table(heads, rows)


def levels(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of tensor memory that `work` held at most and at its end, beyond what was there."""
    import numpy as np
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    found = np.cumsum([0, *(change for _, change in changes)])
    return int(found.max()), int(found[-1])


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of tensor memory that `work` held at once, beyond what was there; temporaries of kernels included."""
    return levels(work)[0]


def micro_batch_bytes(model: Any, ids: Any) -> int:
    """Peak of one micro-batch as a training step accumulates it: the gradients it is added to are there already."""
    import torch

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return peak_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
