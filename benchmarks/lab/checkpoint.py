"""What the parts of `fidelity.py` share: its sizes, its constants, and the checkpoint that training branches from.

Place in the flow: between `lab` and the parts. Trade-off: the checkpoint is trained once and read back from disk by
every unit, so units can run in any process and in any order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from lab import TOKENS_PER_BATCH, Averager, Lab, build_model, build_optimizer, task_losses, train_steps
from torch import nn

from mates_hf.engine.averaging import WeightAverage
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.records import InfluenceLabels

Ids = npt.NDArray[np.int64]

LOSSES = ("all", "completion")
LR = 1e-3
BATCH_ROWS = 16
WINDOW = 32  # steps of averaged weights before a boundary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; the defaults are the full run."""

    documents: int | None = None
    early: int = 40
    long: int = 1_000
    warm: int = 300
    per_domain: int = 7
    truth_batches: int = 3
    truth_passages: int = 48
    large_batch: int = 128
    large_batch_steps: int = 60
    horizons: tuple[int, ...] = (10, 100, 1000)
    set_probes: int = 1200
    round_steps: int = 40
    rounds: int = 5
    oracle_probes: int = 600
    oracle_passages: int = 64
    round_probes: int = 500
    fixed: int = 300
    fit_sizes: tuple[int, ...] = (250, 500, 1000, 2000)
    fit_test: int = 1000
    fit_repeats: int = 3
    cost_candidates: int = 1000
    cost_oracle: int = 40
    everything: bool = True


QUICK = Sizes(
    documents=3000, early=20, long=80, warm=60, per_domain=3, truth_batches=2, truth_passages=16, large_batch=32,
    large_batch_steps=20, horizons=(5, 20, 40), set_probes=300, round_steps=10, rounds=2, oracle_probes=50,
    oracle_passages=8, round_probes=150, fixed=60, fit_sizes=(100, 250), fit_test=200, fit_repeats=1,
    cost_candidates=50, cost_oracle=4, everything=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paths:
    """Where the data is and where unfinished work goes."""

    data: Path
    work: Path


def one_a_document(lab: Lab, ids: Ids) -> Ids:
    """The first row of each document, in the order of `ids`."""
    return ids[np.sort(np.unique(lab.document[ids], return_index=True)[1])]


@dataclasses.dataclass(kw_only=True)
class Point:
    """A model in training.

    Attributes:
        model: at its live weights.
        optimizer: with its state.
        average: mean of the weights over the last steps.
        rest: pool rows not trained on, in a random order.
        lab: the laboratory.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage
    rest: Ids
    lab: Lab

    def train(self, ids: Ids, **settings: Any) -> None:
        """Train on these pool rows at the constant learning rate."""
        train_steps(self.model, self.optimizer, self.lab.rows, ids, batch_rows=BATCH_ROWS, lr=LR, **settings)

    def weights(self, averaged: bool) -> contextlib.AbstractContextManager[None]:
        """The averaged weights (they are used up by it) or the live ones."""
        return self.average.swapped_in() if averaged else contextlib.nullcontext()

    def measure(self, ids: Ids, loss_on: str = "all", parameters: Any = "all", path_steps: int = 1) -> InfluenceLabels:
        """Labels of pool rows at the present weights."""
        probe = DirectionalProbe(tokens_per_batch=TOKENS_PER_BATCH, parameters=parameters, path_steps=path_steps)
        return probe.measure(self.model, self.optimizer, self.lab.reference[loss_on], self.lab.rows.take(ids))

    def development(self) -> dict[str, float]:
        """Loss on the development passages, nats/token."""
        return task_losses(self.model, self.lab.development)


def warm_point(lab: Lab, sizes: Sizes, paths: Paths, seed: int, **shape: int) -> Point:
    """The state after `sizes.warm` random steps; trained once and read back from then on. `shape` is the model's."""
    order = np.random.default_rng([seed, 2]).permutation(len(lab.rows))
    used = sizes.warm * BATCH_ROWS
    model = build_model(lab.vocab_size, seed=seed, **shape)
    optimizer = build_optimizer(model, lr=LR)
    point = Point(model=model, optimizer=optimizer, average=WeightAverage(model), rest=order[used:], lab=lab)
    path = paths.work / f"warm-{seed}-{sizes.warm}.pt"
    mean_path = path.with_suffix(".safetensors")
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            averager = Averager(model, sizes.warm, WINDOW)
            point.train(order[:used], warm_up=20, on_step=averager.update)
            averager.average.save(mean_path)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
            temporary.replace(path)
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    point.average.load(mean_path)
    return point
