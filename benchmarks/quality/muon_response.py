"""Which linear response of Muon ranks candidates as training does: the whole derivative, the frozen form, or none.

The truth is brute force: a candidate replaces one row of a real batch of 16, Muon (matrices of the blocks) and AdamW
(the rest) take a step, and the reference loss falls by so much more or less, averaged over batches. Beside it the
one-step oracle, which trains on the candidate alone.

Trade-off: a model of 0.3 M parameters after 300 steps, rows of 32 tokens, so that brute force is affordable. Figures
are rank correlations; they hold for the learning rates stated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.lab.brute_force import worth_in_batch
from benchmarks.lab.corpus import VOCAB, text_rows
from benchmarks.lab.harness import Bench
from benchmarks.lab.models import llama, train_on
from benchmarks.lab.tables import figure
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.engine.combined_optimizer import CombinedOptimizer
from mates_hf.influence.optimizer import muon_step
from mates_hf.influence.passes import mean_loss
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe

LENGTH, BATCH = 32, 16
MUON_LR, ADAM_LR = 0.02, 1e-3
RATES = {"both at the training rates": (MUON_LR, ADAM_LR), "Muon alone, a quarter of its rate": (MUON_LR / 4, 0.0)}


def identity(matrix: Tensor, change: Tensor, coefficients: Any, num_steps: int, eps: float) -> Tensor:
    """No preconditioner but the size of the momentum."""
    return change / matrix.norm()


def frozen_change(matrix: Tensor, change: Tensor, coefficients: Any, num_steps: int, eps: float) -> Tensor:
    """OPUS's form: the polynomial in A = XXᵀ as it is at the momentum, from the left."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x, tangent = (matrix.T, change.T) if tall else (matrix, change)
    norm = x.norm().clamp(min=eps)
    x = x / norm
    for _ in range(num_steps):
        gram = x @ x.T
        polynomial = a * torch.eye(len(gram), dtype=gram.dtype) + b * gram + c * gram @ gram
        x, tangent = polynomial @ x, polynomial @ tangent
    return (tangent.T if tall else tangent) / norm


RESPONSES: dict[str, Callable[..., Tensor]] = {
    "whole derivative": muon_step.orthogonalise_change,
    "frozen": frozen_change,
    "none": identity,
}


def train(pool: TokenRows, seed: int, num_steps: int) -> tuple[Any, CombinedOptimizer]:
    """A small Llama after some steps on random rows."""
    model = llama(VOCAB, width=64, inner=128, layers=2, length=LENGTH, seed=seed)
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    optimizer = CombinedOptimizer(
        torch.optim.Muon(hidden, lr=MUON_LR), torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.1)
    )
    train_on(model, optimizer, pool, num_steps, batch=BATCH, seed=seed)
    return model, optimizer


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    torch.set_num_threads(bench.options.threads)
    seeds = range(1 if bench.quick else 4)
    num_steps, num_candidates, num_batches = (40, 12, 1) if bench.quick else (300, 48, 8)
    pool, passages = text_rows(LENGTH)
    reference = passages.take(np.arange(16))
    found: dict[str, dict[str, list[float]]] = {name: {} for name in RATES}
    for seed in seeds:
        model, optimizer = train(pool, seed, num_steps)
        candidates = pool.take(np.random.default_rng(1000 + seed).choice(len(pool), num_candidates, replace=False))
        for name, rates in RATES.items():
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            drawn = np.random.default_rng(99).integers(len(pool), size=(num_batches, BATCH))
            worth = worth_in_batch(
                model, optimizer, lambda copied: [mean_loss(copied, reference)], candidates, [*map(pool.take, drawn)]
            )
            truth = worth[:, 0].mean(0)
            task = ReferenceTask(name="held-out text", rows=reference)
            labels = {"one-step oracle": OneStepProbe().measure(model, optimizer, task, candidates).influence}
            for response, change in RESPONSES.items():
                with patch.object(muon_step, "orthogonalise_change", change):
                    labels[response] = DirectionalProbe().measure(model, optimizer, task, candidates).influence
            for label, values in labels.items():
                found[name].setdefault(label, []).append(float(spearmanr(values, truth).statistic))
    figures = [
        figure(f"{name}: {label}, mean over seeds (lowest {min(values):.3f})", float(np.mean(values)), "Spearman")
        for name, by_label in found.items()
        for label, values in by_label.items()
    ]
    settings = {
        "learning rates": f"Muon {MUON_LR}, AdamW {ADAM_LR}", "batch": BATCH, "tokens a row": LENGTH,
        "steps before": num_steps, "candidates": num_candidates, "batches averaged": num_batches, "seeds": len(seeds),
    }  # fmt: skip
    return bench.figures(settings, figures, found)
