# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf"]
# ///
"""Which linear response of Muon ranks candidates as training does: the whole derivative, the frozen form, or none.

    python benchmarks/muon_response.py            # writes benchmarks/results/muon_response.{json,md}
    python benchmarks/muon_response.py --quick    # prints, writes nothing unless --out is given

The truth is brute force: a candidate replaces one row of a real batch of 16, Muon (matrices of the blocks) and AdamW
(the rest) take a step, and the reference loss falls by so much more or less, averaged over batches. Beside it the
one-step oracle, which trains on the candidate alone.

Trade-off: a model of 0.3 M parameters after 300 steps, rows of 32 tokens, so that brute force is affordable. Figures
are rank correlations; they hold for the learning rates stated.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from probe_speed import VOCAB, figure, start, text_rows, write_results
from scipy.stats import spearmanr
from torch import Tensor

from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.influence.optimizer import muon_step
from mates_hf.influence.passes import mean_loss, mean_loss_gradient
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.influence.test_optimizers import frozen_change  # noqa: E402

LENGTH, BATCH = 32, 16
MUON_LR, ADAM_LR = 0.02, 1e-3
RATES = {"both at the training rates": (MUON_LR, ADAM_LR), "Muon alone, a quarter of its rate": (MUON_LR / 4, 0.0)}


class Together(torch.optim.Optimizer):
    """Muon and AdamW, one after the other (docs/optimizers.md has it with checkpoints)."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers

    def __getstate__(self) -> dict[str, Any]:
        """All of it, so that a deep copy steps."""
        return self.__dict__

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step each."""
        for optimizer in self.optimizers:
            optimizer.step()


def identity(matrix: Tensor, change: Tensor, coefficients: Any, num_steps: int, eps: float) -> Tensor:
    """No preconditioner but the size of the momentum."""
    return change / matrix.norm()


RESPONSES: dict[str, Callable[..., Tensor]] = {
    "whole derivative": muon_step.orthogonalise_change,
    "frozen": frozen_change,
    "none": identity,
}


def train(pool: TokenRows, seed: int, num_steps: int) -> tuple[Any, Together]:
    """A small Llama after some steps on random rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
            eos_token_id=None,
        )
    )  # fmt: skip
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    optimizer = Together(
        torch.optim.Muon(hidden, lr=MUON_LR), torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.1)
    )
    generator = np.random.default_rng(seed)
    for _ in range(num_steps):
        mean_loss_gradient(model, pool.take(generator.integers(len(pool), size=BATCH)))
        optimizer.step()
    return model, optimizer


def swapped_in(
    model: Any, optimizer: Together, pool: TokenRows, reference: TokenRows, candidates: TokenRows, num_batches: int
) -> np.ndarray:
    """(N,) minus the reference loss after a step on a batch in which the candidate replaces a row."""
    losses = np.zeros(len(candidates))
    generator = np.random.default_rng(99)
    for _ in range(num_batches):
        others = pool.take(generator.integers(len(pool), size=BATCH - 1))
        kept = [others.row(i)[0] for i in range(len(others))]
        for i in range(len(candidates)):
            copied, stepper = copy.deepcopy((model, optimizer))
            mean_loss_gradient(copied, TokenRows.from_lists([candidates.row(i)[0], *kept]))
            stepper.step()
            losses[i] += mean_loss(copied, reference) / num_batches
    return -losses


def main() -> None:
    """Run and report."""
    arguments = start(__doc__ or "")
    seeds = range(1 if arguments.quick else 4)
    num_steps, num_candidates, num_batches = (40, 12, 1) if arguments.quick else (300, 48, 8)
    pool, passages = text_rows(LENGTH)
    reference = passages.take(np.arange(16))
    found: dict[str, dict[str, list[float]]] = {name: {} for name in RATES}
    for seed in seeds:
        model, optimizer = train(pool, seed, num_steps)
        candidates = pool.take(np.random.default_rng(1000 + seed).choice(len(pool), num_candidates, replace=False))
        for name, rates in RATES.items():
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            truth = swapped_in(model, optimizer, pool, reference, candidates, num_batches)
            task = ReferenceTask(name="held-out text", rows=reference)
            labels = {"one-step oracle": OneStepProbe().measure(model, optimizer, task, candidates).influence}
            for response, change in RESPONSES.items():
                with patch.object(muon_step, "orthogonalise_change", change):
                    labels[response] = DirectionalProbe().measure(model, optimizer, task, candidates).influence
            for label, values in labels.items():
                found[name].setdefault(label, []).append(float(spearmanr(values, truth).statistic))
        for group, rate in zip(optimizer.param_groups, (MUON_LR, ADAM_LR), strict=True):
            group["lr"] = rate
    figures = [
        figure(f"{name}: {label}, mean over seeds (lowest {min(values):.3f})", float(np.mean(values)), "Spearman")
        for name, by_label in found.items()
        for label, values in by_label.items()
    ]
    settings = {
        "learning rates": f"Muon {MUON_LR}, AdamW {ADAM_LR}",
        "batch": BATCH,
        "tokens a row": LENGTH,
        "steps before": num_steps,
        "candidates": num_candidates,
        "batches averaged": num_batches,
        "seeds": len(seeds),
    }
    write_results("muon_response", arguments, settings, figures, found)


if __name__ == "__main__":
    main()
