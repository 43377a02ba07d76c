"""The checkpoint that trainings branch from: a small model after some random steps, and what goes on from there.

Trade-off: the checkpoint is trained once and read back from disk by every unit, so units can run in any process and in
any order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from benchmarks.lab.corpus import Lab
from benchmarks.lab.machine import written_once
from benchmarks.lab.models import TOKENS_PER_BATCH, Averager, build_model, build_optimizer, task_losses, train_steps
from benchmarks.lab.statistics import Ids
from mates_hf.engine.averaging import WeightAverage
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.records import InfluenceLabels

LOSSES = ("all", "completion")
BATCH_ROWS = 16
WINDOW = 32  # steps of averaged weights before a boundary


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
    """A model in training."""

    model: nn.Module  # at its live weights
    optimizer: torch.optim.Optimizer  # with its state
    average: WeightAverage  # mean of the weights over the last steps
    rest: Ids  # pool rows not trained on, in a random order
    lab: Lab  # the laboratory

    def train(self, ids: Ids, **settings: Any) -> None:
        """Train on these pool rows at the constant learning rate."""
        train_steps(self.model, self.optimizer, self.lab.rows, ids, batch_rows=BATCH_ROWS, **settings)

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


def warm_point(lab: Lab, warm: int, work: Path, seed: int, **shape: int) -> Point:
    """The state after `warm` random steps; trained once and read back from then on. `shape` is the model's."""
    order = np.random.default_rng([seed, 2]).permutation(len(lab.rows))
    used = warm * BATCH_ROWS
    model = build_model(lab.vocab_size, seed=seed, **shape)
    optimizer = build_optimizer(model)
    point = Point(model=model, optimizer=optimizer, average=WeightAverage(model), rest=order[used:], lab=lab)
    path = work / f"warm-{seed}-{warm}.pt"
    mean_path = path.with_suffix(".safetensors")

    def train() -> None:
        averager = Averager(model, warm, WINDOW)
        point.train(order[:used], warm_up=20, on_step=averager.update)
        averager.average.save(mean_path)

    train_once(path, model, optimizer, train)
    point.average.load(mean_path)
    return point


def train_once(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, train: Callable[[], None]) -> None:
    """Bring model and optimizer to the state at `path`; where nothing is kept there yet, `train` makes it."""

    def write(file: BinaryIO) -> None:
        train()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    state = torch.load(written_once(path, write))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def losses_along(
    point: Point, ids: Ids, horizons: list[int], reference: bool = False
) -> dict[int, dict[str, dict[str, float]]]:
    """Development losses after each of `horizons` steps, at the live weights and averaged over the last third.

    With `reference` the averaged weights are read on the reference passages as well.
    """
    averagers = {h: Averager(point.model, h, max(1, h // 3)) for h in horizons}
    losses: dict[int, dict[str, dict[str, float]]] = {}

    def on_step(step: int) -> None:
        for h, averager in averagers.items():
            if step <= h:
                averager.update(step)
        if step in averagers:
            live = point.development()
            with averagers[step].average.swapped_in():
                losses[step] = {"live": live, "averaged": point.development()}
                if reference:
                    losses[step]["reference"] = task_losses(point.model, point.lab.reference)

    point.train(ids, on_step=on_step)
    return losses
