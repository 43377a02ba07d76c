"""What the averaging window costs a training step in memory, and what a boundary takes, in one process and in two.

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

import statistics
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.lab.boundary import make_model, measure
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import alternate, in_processes
from benchmarks.lab.memory import levels
from benchmarks.lab.tables import figure
from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.pieces import HostMemory
from mates_hf.engine.processes import Processes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST = 4.1  # bytes a trainable parameter


def window(width: int, dtype: torch.dtype, processes: Processes, on_host: bool) -> dict[str, float]:
    """Bytes a parameter of the window, and its time."""
    model = make_model(width, dtype, 6)
    num = sum(parameter.numel() for parameter in model.parameters())

    def swap() -> None:
        with average.swapped_in():
            pass

    allocate = HostMemory._allocate
    with patch.object(HostMemory, "_allocate", autospec=True, side_effect=allocate) as allocated:
        average = WeightAverage(model, processes, on_host=on_host)
        _, held = levels(average.update)
        beside, _ = levels(average.update)
        held -= sum(call.args[1] for call in allocated.call_args_list)
        seconds = statistics.mean(alternate({"update": average.update}, 3)["update"])
        swapped, _ = levels(swap)
    return {
        "parameters": float(num),
        "held": held / num,
        "update": (held + beside) / num,
        "swap": (held + swapped) / num,
        "update_ns": seconds / num * 1e9,
    }


def measure_all(quick: bool) -> dict[str, Any]:
    """What one process sees, alone or with others."""
    processes, width = Processes.of_run(), 128 if quick else 256
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        found[name] = {
            "window": window(width, dtype, processes, on_host=False),
            "on_host": window(width, dtype, processes, on_host=True),
        }
        if not quick or name == "float32":
            found[name]["boundary"] = measure(width, dtype)
    return found


def one_of_two(quick: bool) -> dict[str, Any]:
    """What one of two processes sees."""
    torch.distributed.init_process_group("gloo")
    found = measure_all(quick)
    torch.distributed.barrier()
    return found


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    torch.set_num_threads(bench.options.threads)
    raw = {"one": [measure_all(bench.quick)], "two": in_processes(one_of_two, bench.quick, size=2)}
    figures = []
    for size, (name, ranks) in enumerate(raw.items(), start=1):
        for dtype in DTYPES:
            what = f"{name} process{'es' if size > 1 else ''}, {dtype} weights"
            for where, key, called, most in (
                ("window", "held", ": held", MOST / size),
                ("window", "update", ": update", MOST / size),
                ("window", "swap", ": swap", None),
                ("on_host", "held", ", mean on the host: held on the device", 0),
                ("on_host", "update", ", mean on the host: update, on the device", None),
            ):
                value = max(rank[dtype][where][key] for rank in ranks)
                figures.append(figure(f"{what}{called}", value, "bytes a parameter", most=most))
            value = float(np.median([rank[dtype]["window"]["update_ns"] for rank in ranks]))
            figures.append(figure(f"{what}: time of an update", value, "ns a parameter"))
            if "boundary" in ranks[0][dtype]:
                worst = max((rank[dtype]["boundary"] for rank in ranks), key=lambda found: found["boundary"])
                figures.append(
                    figure(f"{what}: boundary, beside the run", worst["boundary"], "copies", most=worst["limit"])
                )
    settings = {
        "width": 128 if bench.quick else 256, "parameters": int(raw["one"][0]["float32"]["window"]["parameters"]),
        "a micro-batch of a boundary is allowed on top of": "3.2 copies",
        "not measured": "a GPU (time and memory of its copies to and from the host)",
    }  # fmt: skip
    return bench.figures(settings, figures, raw)
