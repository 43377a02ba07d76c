# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf"]
# ///
"""What the averaging window costs a training step in memory, and what a boundary takes, in one process and in two.

    python benchmarks/averaging_cost.py            # writes benchmarks/results/averaging_cost.{json,md}
    python benchmarks/averaging_cost.py --quick    # prints, writes nothing unless --out is given
    python benchmarks/averaging_cost.py --check    # the committed page follows from the committed JSON

- **held**: bytes a trainable parameter that stay between two steps of the window.
- **update**: the most that is held while the weights of a step are taken in.
- **swap**: the most that is held while mean and weights trade places, in bytes a parameter.
- **boundary**: the most that a round of a real `Trainer` run holds beside the run, in copies of what trains.

Two processes (gloo) hold whole copies of the weights, as under DDP. With the mean on the host, blocks of host memory
are left out of the count: what remains is what a device would hold. No GPU was at hand: the copies between device and
host and the side stream they run on are not measured, neither their time nor their memory.

Trade-off: bytes are counted on the CPU, temporaries of kernels included; what a device's allocator holds back is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boundary_memory import make_model, measure
from probe_speed import RESULTS, figure, page_of, start, write_results
from torch.profiler import ProfilerActivity, profile

from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.pieces import HostMemory
from mates_hf.engine.processes import Processes

NAME = "averaging_cost"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST = 4.1  # bytes a trainable parameter
WORKER = "MATES_AVERAGING_COST"


def levels(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of tensor memory that `work` held at most and at its end, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    found = np.cumsum([0, *(change for _, change in changes)])
    return int(found.max()), int(found[-1])


def window(width: int, dtype: torch.dtype, processes: Processes, on_host: bool) -> dict[str, float]:
    """Bytes a parameter of the window, and its time."""
    model = make_model(width, dtype, 6)
    num = sum(parameter.numel() for parameter in model.parameters())
    blocks: list[int] = []
    allocate = HostMemory._allocate

    def noted(memory: HostMemory, num_bytes: int) -> torch.Tensor:
        blocks.append(num_bytes)
        return allocate(memory, num_bytes)

    HostMemory._allocate = noted  # type: ignore[method-assign]
    average = WeightAverage(model, processes, on_host=on_host)
    _, held = levels(average.update)
    beside, _ = levels(average.update)
    held -= sum(blocks)
    started = time.perf_counter()
    for _ in range(3):
        average.update()
    seconds = (time.perf_counter() - started) / 3

    def swap() -> None:
        with average.swapped_in():
            pass

    swapped, _ = levels(swap)
    HostMemory._allocate = allocate  # type: ignore[method-assign]
    return {
        "parameters": float(num),
        "held": held / num,
        "update": (held + beside) / num,
        "swap": (held + swapped) / num,
        "update_ns": seconds / num * 1e9,
    }


def measure_all(quick: bool) -> dict[str, Any]:
    """What one process sees, alone or with others."""
    processes = Processes.of_run()
    width = 128 if quick else 256
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        found[name] = {
            "window": window(width, dtype, processes, on_host=False),
            "on_host": window(width, dtype, processes, on_host=True),
        }
    for name, dtype in DTYPES.items():
        if not quick or name == "float32":
            found[name]["boundary"] = measure(width, dtype)
    return found


def in_two_processes(quick: bool, threads: int) -> list[dict[str, Any]]:
    """The same in each of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        port = str(20_000 + os.getpid() % 20_000)
        shared = {
            **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true", WORKER: json.dumps({"folder": folder, "quick": quick}),
            "OMP_NUM_THREADS": str(max(1, threads // 2)),
        }  # fmt: skip
        workers = [
            subprocess.Popen([sys.executable, __file__], env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        if any([worker.wait(timeout=600) for worker in workers]):
            raise RuntimeError("a process failed")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


def work(settings: dict[str, Any]) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = measure_all(settings["quick"])
    rank = torch.distributed.get_rank()
    (Path(settings["folder"]) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then end a process that is done


def check() -> None:
    """Raise where the page is not that of the JSON."""
    payload = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    if page_of(NAME, payload) != (RESULTS / f"{NAME}.md").read_text(encoding="utf-8"):
        raise SystemExit(f"{NAME}.md does not follow from {NAME}.json")
    print(f"{NAME}.md follows from {NAME}.json")


def main() -> None:
    """Measure, print and write."""
    if WORKER in os.environ:
        work(json.loads(os.environ[WORKER]))
    if "--check" in sys.argv:
        check()
        return
    arguments = start(__doc__ or "")
    raw = {"one": [measure_all(arguments.quick)], "two": in_two_processes(arguments.quick, arguments.threads)}
    figures = []
    for size, (name, ranks) in enumerate(raw.items(), start=1):
        for dtype in DTYPES:
            what = f"{name} process{'es' if size > 1 else ''}, {dtype} weights"
            for key in ("held", "update"):
                value = max(rank[dtype]["window"][key] for rank in ranks)
                figures.append(figure(f"{what}: {key}", value, "bytes a parameter", most=MOST / size))
            value = max(rank[dtype]["window"]["swap"] for rank in ranks)
            figures.append(figure(f"{what}: swap", value, "bytes a parameter"))
            value = max(rank[dtype]["on_host"]["held"] for rank in ranks)
            figures.append(figure(f"{what}, mean on the host: held on the device", value, "bytes a parameter", most=0))
            value = max(rank[dtype]["on_host"]["update"] for rank in ranks)
            figures.append(figure(f"{what}, mean on the host: update, on the device", value, "bytes a parameter"))
            value = float(np.median([rank[dtype]["window"]["update_ns"] for rank in ranks]))
            figures.append(figure(f"{what}: time of an update", value, "ns a parameter"))
            if "boundary" in ranks[0][dtype]:
                worst = max((rank[dtype]["boundary"] for rank in ranks), key=lambda found: found["boundary"])
                figures.append(
                    figure(f"{what}: boundary, beside the run", worst["boundary"], "copies", most=worst["limit"])
                )
    settings = {
        "width": 128 if arguments.quick else 256,
        "parameters": int(raw["one"][0]["float32"]["window"]["parameters"]),
        "a micro-batch of a boundary is allowed on top of": "3.2 copies",
        "not measured": "a GPU (time and memory of its copies to and from the host)",
    }
    write_results(NAME, arguments, settings, figures, raw)


if __name__ == "__main__":
    main()
