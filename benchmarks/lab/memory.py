"""Memory of a process, stage by stage, as the system counts it.

Place in the flow: `large_pool.py` and `rows_cost.py` measure by it. Own memory is `RssAnon`; pages of mapped files
(`RssFile`) are counted apart, because the system drops them when it needs the room.

Trade-off: memory is read from the system every few milliseconds, not at each allocation.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
