"""Tokens/s of the probe's passes, of two plain forward passes, and of training, in bf16, in turns."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

from benchmarks.lab.models import build_optimizer, train_steps
from benchmarks.reliability.gpu.device import TRAIN_TOKENS, Task, bf16, device, device_seconds, seconds_left
from mates_hf.influence.probe_directional import DirectionalProbe

TURNS = 5


def run(task: Task) -> dict[str, Any]:
    """Measure in turns, one at least and five at most."""
    lab, size = task.lab(), task.model
    model = size.build()
    optimizer = build_optimizer(model)
    num = min(len(lab.rows), 24 if task.quick else 2_048) // size.batch_rows * size.batch_rows
    rows = lab.rows.take(np.arange(num))
    order, few = np.arange(num), np.arange(3 * size.batch_rows) % num
    probe = DirectionalProbe(tokens_per_batch=TRAIN_TOKENS)
    ids = torch.from_numpy(rows.values.astype(np.int64)).view(num, -1)
    batch = max(1, TRAIN_TOKENS // size.row_tokens)

    def train(which: Any = order) -> None:
        train_steps(model, optimizer, rows, which, batch_rows=size.batch_rows, tokens_per_batch=TRAIN_TOKENS)

    def plain_twice() -> None:
        model.eval()
        with torch.no_grad():
            for start in [*range(0, num, batch), *range(0, num, batch)]:
                given = ids[start : start + batch].to(device())
                logits = model(input_ids=given, use_cache=False).logits[:, :-1]
                torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), given[:, 1:].flatten())

    with bf16():
        train(few)
        direction = probe.compute_direction(model, optimizer, lab.reference["all"].subset(16), rows)
        arms = {
            "probe": lambda: probe.directional_derivatives(model, direction, rows, 3e-3),
            "two forward passes": plain_twice,
            "training": train,
        }
        for name in ("probe", "two forward passes"):
            arms[name]()  # warms up
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(1 if task.quick else TURNS):
            if turn and seconds_left(task) < 1.2 * sum(found[-1] for found in seconds.values()):
                break
            for name, arm in arms.items():
                seconds[name].append(device_seconds(arm))
    tokens = num * size.row_tokens

    def ratio(name: str) -> float:
        pairs = zip(seconds[name], seconds["probe"], strict=True)
        return statistics.median(other / probe_seconds for other, probe_seconds in pairs)

    return {
        "done": True, "parameters": sum(p.numel() for p in model.parameters()), "rows": num,
        "turns": len(seconds["probe"]),
        "tokens_a_second": {name: tokens / statistics.median(found) for name, found in seconds.items()},
        "probe_against_two_forwards": ratio("two forward passes"), "probe_against_training": ratio("training"),
        "raw": seconds,
    }  # fmt: skip
