"""Whether a path stays down under every optimizer at a large batch, and how its labels agree with one real step.

Each optimizer trains the same small model on batches of 128 rows, the last of them in a decay to a fiftieth of its
rate as well. Then a path of 32 points is walked, as long as a round of 100 steps at that rate. What is reported of it
is the change of each point's loss from the loss of the same passages at the start. The truth of the labels is brute
force: a candidate joins a real batch, a copy of the model takes a step of a copy of the optimizer, and the reference
loss is compared with that after the same step without the candidate.

Trade-off: a model of 0.3 M parameters and rows of 32 tokens, so that brute force is affordable. One step is the truth
of a one-step label; a path label is meant for many, so its agreement is lower by design.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.lab.brute_force import worth_in_batch
from benchmarks.lab.corpus import VOCAB, text_rows
from benchmarks.lab.harness import Bench
from benchmarks.lab.models import llama, train_on
from benchmarks.lab.tables import figure
from mates_hf.data.reference import ReferenceTask
from mates_hf.influence.passes import mean_loss
from mates_hf.influence.probe_directional import DirectionalProbe

LENGTH, BATCH, ROUND = 32, 128, 100


def adafactor(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As `optim="adafactor"` makes it."""
    from transformers import Adafactor

    return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95)),
    "AdamW, beta1 0": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, betas=(0.0, 0.95)),
    "Adafactor": adafactor,
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
}


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    torch.set_num_threads(bench.options.threads)
    num_steps, num_candidates, seeds = (8, 12, 1) if bench.quick else (30, 64, 2)
    pool, passages = text_rows(LENGTH)
    reference = passages.take(np.arange(min(len(passages), 256)))
    task = ReferenceTask(name="held-out text", rows=reference)
    raw: dict[str, list[dict[str, Any]]] = {}

    def losses(model: Any) -> list[float]:
        return [mean_loss(model, reference)]

    for name, make in OPTIMIZERS.items():
        for seed in range(seeds):
            model = llama(VOCAB, width=64, inner=128, layers=2, length=LENGTH, seed=seed)
            optimizer = make(list(model.parameters()))
            train_on(model, optimizer, pool, num_steps, batch=BATCH, seed=seed, max_grad_norm=1.0)
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            candidates = pool.take(np.random.default_rng(1000 + seed).choice(len(pool), num_candidates, replace=False))
            others = pool.take(np.random.default_rng(99).integers(len(pool), size=BATCH - 1))
            truth = worth_in_batch(model, optimizer, losses, candidates, [others], clip=1.0, joins=True)[0, 0]
            one = DirectionalProbe().measure(model, optimizer, task, candidates)
            for label, share in (("full rate", 1.0), ("a fiftieth of the rate", 0.02)):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["initial_lr"], group["lr"] = rate, rate * share
                probe = DirectionalProbe(path_steps=32, batch_rows=BATCH, max_grad_norm=1.0, rate_steps=ROUND)
                path = probe.measure(model, optimizer, task, candidates)
                changes = np.array(path.info["path_losses"]) - np.array(path.info["path_start_losses"])
                raw.setdefault(f"{name}, {label}", []).append(
                    {
                        "changes": [round(float(change), 4) for change in changes],
                        "points": path.info["path_points"],
                        "stopped": path.info["path_stopped"],
                        "stride": path.info["path_stride"],
                        "check": path.info["path_check"],
                        "path_with_truth": float(spearmanr(path.influence, truth).statistic),
                        "one_step_with_truth": float(spearmanr(one.influence, truth).statistic),
                        "path_with_one_step": float(spearmanr(path.influence, one.influence).statistic),
                    }
                )
    figures = []
    for name, runs in raw.items():
        highest, fewest = max(max(found["changes"]) for found in runs), min(found["points"] for found in runs)
        late = float(np.mean([np.mean(found["changes"][-max(1, len(found["changes"]) // 4) :]) for found in runs]))
        figures += [
            figure(f"{name}: highest change along the path", highest, "nats/token", most=0.1),
            figure(f"{name}: change at the last quarter of the points", late, "nats/token", most=0.0),
            figure(f"{name}: points used, fewest", float(fewest), "points"),
        ]
        for what in ("path_with_truth", "one_step_with_truth", "path_with_one_step"):
            mean = float(np.mean([found[what] for found in runs]))
            figures.append(figure(f"{name}: Spearman of {what.replace('_', ' ')}", mean, "Spearman"))
    settings = {
        "batch": BATCH, "tokens a row": LENGTH, "steps before": num_steps, "steps of the round": ROUND,
        "candidates": num_candidates, "passages": len(reference), "seeds": seeds,
    }  # fmt: skip
    return bench.figures(settings, figures, raw)
