"""Labels in bf16 against what real optimizer steps in float32 do: Spearman over candidates, as many as fit.

A candidate's truth is the reference loss after a real step without it minus that after the step with it, averaged over
batches. Trade-off: a step and a reading of a few passages for each candidate and batch.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.lab.brute_force import worth_in_batch
from benchmarks.lab.models import build_optimizer, task_losses, train_steps
from benchmarks.lab.statistics import spearman
from benchmarks.reliability.gpu.device import TRAIN_TOKENS, Task, bf16, seconds_left
from mates_hf.influence.probe_directional import DirectionalProbe

GROUP = 8  # candidates whose gradients are held at once


def run(task: Task) -> dict[str, Any]:
    """Train a little, measure labels, then the truth until the time is used."""
    lab, size = task.lab(), task.model
    rng = np.random.default_rng(0)
    order = rng.permutation(len(lab.rows))
    warm, num, passages, most = (4, 4, 6, 2) if task.quick else (150, 64, 64, 8)
    model, rows = size.build(), lab.rows
    optimizer = build_optimizer(model)
    begun = time.monotonic()
    with bf16():
        for start in range(warm):  # one step at a time, so that none is begun too late
            if seconds_left(task) < 0.6 * task.seconds:
                warm = start
                break
            at = np.arange(start * size.batch_rows, (start + 1) * size.batch_rows) % (len(order) // 2)
            train_steps(model, optimizer, rows, order[at], batch_rows=size.batch_rows, tokens_per_batch=TRAIN_TOKENS)
    trained = time.monotonic() - begun
    if warm < 2:
        return {"done": False, "reason": "no time to train"}
    model.eval()
    reference = lab.reference["all"].subset(passages)
    rest = order[len(order) // 2 :]
    candidates = rows.take(rest[:num])
    probe = DirectionalProbe(tokens_per_batch=TRAIN_TOKENS, batch_rows=size.batch_rows)
    with bf16():
        found = {
            "one step, bf16": probe.measure(model, optimizer, reference, candidates),
            "path, bf16": DirectionalProbe(
                tokens_per_batch=TRAIN_TOKENS, batch_rows=size.batch_rows, path_steps=8
            ).measure(model, optimizer, reference, candidates),
        }
    found["one step, float32"] = probe.measure(model, optimizer, reference, candidates)
    batches = [rest[num + i * size.batch_rows :][: size.batch_rows] for i in range(most)]
    worth: list[np.ndarray] = []
    longest = 0.0
    for batch in batches:
        if worth and seconds_left(task) < 1.2 * longest:
            break
        begun = time.monotonic()
        groups = []
        for start in range(0, len(candidates), GROUP):
            if not worth and start and seconds_left(task) < 1.2 * (time.monotonic() - begun) / start * GROUP:
                break
            some = candidates.take(np.arange(start, min(start + GROUP, len(candidates))))
            groups.append(
                worth_in_batch(
                    model, optimizer, lambda copied: [task_losses(copied, {"all": reference}, TRAIN_TOKENS)["all"]],
                    some, [rows.take(batch)], clip=1.0,
                )[0, 0]
            )  # fmt: skip
        worth.append(np.concatenate(groups))
        if len(worth) == 1:
            candidates = candidates.take(np.arange(len(worth[0])))
        longest = max(longest, time.monotonic() - begun)
    truth = np.mean(worth, 0)
    few = len(truth)
    labels = {name: label.influence_per_token.astype(np.float64)[:few] for name, label in found.items()}
    between = [spearman(worth[i], worth[k])["spearman"] for i in range(len(worth)) for k in range(i)]
    return {
        "done": True, "parameters": sum(p.numel() for p in model.parameters()), "warm_steps": warm,
        "seconds_a_step": trained / warm, "candidates": few, "batches": len(worth), "passages": passages,
        "agreement": {name: spearman(label, truth) for name, label in labels.items()},
        "bf16_with_float32": spearman(labels["one step, bf16"], labels["one step, float32"])["spearman"],
        "truth_between_batches": float(np.mean(between)) if between else None,
        "epsilon_agreement": {name: label.info["epsilon_agreement"] for name, label in found.items()},
    }  # fmt: skip
