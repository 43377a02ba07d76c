"""What a round takes in memory beside the run: bytes of tensors at a boundary of a real `Trainer` run, stage by stage.

Figures are in units of the trainable parameters' bytes, on top of the parameters and the optimizer's state, which
training holds anyway; the gradients of a training step are gone by then. The running mean of the weights is among
them. A micro-batch of the probe is given apart, for it does not grow with the model.

Trade-off: bytes are counted on the CPU, temporaries of kernels included; what a device's allocator holds back is not.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.lab.boundary import LENGTH, MOST, ROWS_PER_BATCH, measure
from benchmarks.lab.harness import Bench
from benchmarks.lab.tables import figure


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    torch.set_num_threads(bench.options.threads)
    width = 128 if bench.quick else 384
    raw = {
        "float32, AdamW": measure(width),
        "bfloat16 weights, AdamW": measure(width, torch.bfloat16),
        "float32, Adafactor": measure(width, optim="adafactor"),
    }
    figures = []
    for name, found in raw.items():
        for stage in ("average", "digest", "probe", "audit", "boundary"):
            # In the window the mean of 16-bit weights is in float32.
            what, most = f"{name}: {stage}, beside the run", found["limit"]
            figures.append(figure(what, found[stage], "x trainable bytes", most=most))
        figures.append(figure(f"{name}: a micro-batch", found["micro_batch"], "x trainable bytes"))
    settings = {
        "width": width,
        "layers": 6,
        "tokens a micro-batch": ROWS_PER_BATCH * LENGTH,
        "limit": f"{MOST} + a micro-batch",
    }
    return bench.figures(settings, figures, raw)
