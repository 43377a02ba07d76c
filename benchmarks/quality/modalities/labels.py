"""Labels of images, sounds and pairs against real batches, and how fast they are taken.

Trade-off: the truth is brute force, an optimizer step and a pass over the reference examples for each candidate and
batch, so there are some tens of candidates.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.lab.statistics import FloatArray, spearman
from benchmarks.quality.modalities.setup import BANK_PAIRS, KINDS, Batch, Kind, Sizes, Split
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe

BATCH = 32
CHUNK = 64  # examples whose gradients are taken at once
Loss = Callable[[nn.Module, Batch], torch.Tensor]


def warmed(kind: Kind, split: Split, steps: int, seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model after some steps on random rows of the pool, in training mode."""
    model = kind.build(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=kind.lr)
    model.train()
    rng = np.random.default_rng([seed, 4])
    for _ in range(steps):
        step(kind.own_loss, model, optimizer, split.pool.batch(rng.choice(len(split.pool), BATCH, replace=False)))
    return model, optimizer


def step(loss: Loss, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step."""
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()


def reference_loss(kind: Kind, split: Split, model: nn.Module) -> float:
    """Mean loss of the reference examples in eval mode, each against the bank where pairs are compared."""
    model.eval()
    batch = split.reference.batch(np.arange(len(split.reference)))
    with torch.no_grad():
        if not kind.contrastive:
            return float(kind.own_loss(model, batch))
        bank, num = split.judged.batch(np.arange(BANK_PAIRS)), len(split.reference)
        similar = model(**{name: torch.cat([batch[name], bank[name]]) for name in batch}).logits_per_text
        first = torch.zeros(num, dtype=torch.int64)
        sides = [torch.cat([side.diagonal()[:num, None], side[:num, num:]], 1) for side in (similar, similar.T)]
        return float(sum(nn.functional.cross_entropy(side, first) for side in sides)) / 2


def in_batches(
    kind: Kind, split: Split, model: nn.Module, optimizer: Any, ids: Any, batches: Any
) -> dict[str, FloatArray]:
    """(N,) minus the reference loss after a real step with each candidate in the place of a row, mean over batches.

    The model trains as a run would train it. With batch norm the truth is also taken with the running statistics that
    it had before the step, and with those in the step, too.
    """
    ways = {"": (True, False)}
    buffers = dict(model.named_buffers())
    if any("running_mean" in name for name in buffers):
        ways |= {"running statistics held": (True, True), "running statistics in the step": (False, True)}
    tensors = [*model.parameters(), *buffers.values()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    saved = [value.detach().clone() for value in tensors]
    held = {name: value.detach().clone() for name, value in buffers.items()}
    found = {way: np.zeros((len(batches), len(ids))) for way in ways}
    for way, (trains, holds) in ways.items():
        for i, j in np.ndindex(len(batches), len(ids)):
            model.train(trains)
            step(kind.own_loss, model, optimizer, split.pool.batch([ids[j], *batches[i][1:]]))
            with torch.no_grad():
                if holds:
                    for name, value in model.named_buffers():
                        value.copy_(held[name])
                found[way][i, j] = -reference_loss(kind, split, model)
                for value, before in zip(tensors, saved, strict=True):
                    value.copy_(before)
    return {way: values.mean(0) for way, values in found.items()}


def agreement(sizes: Sizes, name: str, seed: int) -> dict[str, Any]:
    """Spearman of both probes' labels with real batches."""
    kind = KINDS[name]
    split = kind.split(2000, sizes.label_reference, 64, seed)
    model, optimizer = warmed(kind, split, sizes.label_steps, seed)
    rng = np.random.default_rng([seed, 5])
    ids = np.sort(rng.choice(len(split.pool), sizes.candidates, replace=False))
    batches = [rng.choice(len(split.pool), BATCH, replace=False) for _ in range(sizes.truth_batches)]
    loss = kind.probe_loss(split)
    labels = {
        which: probe.measure(model, optimizer, split.task(), split.pool.pool(ids)).influence.astype(np.float64)
        for which, probe in (
            ("directional", DirectionalProbe(loss=loss, reference_loss=loss)),
            ("one_step", OneStepProbe(loss=loss, reference_loss=loss)),
        )
    }
    truths = in_batches(kind, split, model, optimizer, ids, batches)
    return {
        "kind": name, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()), "candidate": ids,
        "wanted": split.planted[ids].astype(int), "labels": labels, "truth": truths,
        "agreement": {
            way: {label: spearman(values, truth) for label, values in labels.items()} for way, truth in truths.items()
        },
    }  # fmt: skip


# --- speed ---


def speed(sizes: Sizes, name: str) -> dict[str, Any]:
    """Seconds of each way to label, in turns, one thread."""
    kind = KINDS[name]
    split = kind.split(2000, sizes.label_reference, 64, 0)
    model, optimizer = warmed(kind, split, 20, 0)
    task, loss = split.task(), kind.probe_loss(split)
    nums = {"directional": sizes.speed, "one_step": sizes.speed_oracle, "gradients": sizes.speed // 4}
    arms: dict[str, Callable[[], Any]] = {
        which: functools.partial(probe.measure, model, optimizer, task, split.pool.pool(np.arange(nums[which])))
        for which, probe in (
            ("directional", DirectionalProbe(loss=loss, reference_loss=loss)),
            ("one_step", OneStepProbe(loss=loss, reference_loss=loss)),
        )
    }
    each = loss or kind.own_loss
    arms["gradients"] = functools.partial(
        by_gradients, each, model, optimizer, split, nums["gradients"], 1 if kind.contrastive else CHUNK
    )
    if not kind.contrastive:
        nums["gradients at once"] = sizes.speed
        arms["gradients at once"] = functools.partial(at_once, each, model, optimizer, split, sizes.speed)
        try:
            at_once(each, model, optimizer, split, 4)
        except (RuntimeError, ValueError, TypeError) as error:
            del arms["gradients at once"], nums["gradients at once"]
            refused: str | None = f"{type(error).__name__}: {error}".split("\n", 1)[0][:120]
        else:
            refused = None
    else:
        refused = "the loss of a pair reads a bank"
    return {"kind": name, "num": nums, "turns": in_turns(arms, sizes.turns), "at_once_refused": refused}


def in_turns(arms: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of each arm in each turn: one thread, so that other work on the machine counts little."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(turns):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            begun = time.process_time()
            arms[name]()
            seconds[name].append(time.process_time() - begun)
    return seconds


def direction(loss: Loss, model: nn.Module, optimizer: Any, split: Split, size: int) -> list[torch.Tensor]:
    """The reference gradient, `size` examples at once, times Adam's scale; a tensor a parameter."""
    model.eval()
    model.zero_grad()
    for part in np.array_split(np.arange(len(split.reference)), max(1, len(split.reference) // size)):
        loss(model, split.reference.batch(part)).backward()
    found = [
        torch.zeros_like(p) if p.grad is None else p.grad / (optimizer.state[p]["exp_avg_sq"].sqrt() + 1e-8)
        for p in model.parameters()
        if p.requires_grad
    ]
    model.zero_grad()
    return found


def by_gradients(loss: Loss, model: nn.Module, optimizer: Any, split: Split, num: int, size: int) -> FloatArray:
    """(num,) product of each candidate's own gradient with the direction, one backward pass after the other."""
    along, found = direction(loss, model, optimizer, split, size), np.zeros(num)
    own = [p for p in model.parameters() if p.requires_grad]
    for i in range(num):
        grads = torch.autograd.grad(loss(model, split.pool.batch([i])), own, allow_unused=True)
        found[i] = sum(float((g * u).sum()) for g, u in zip(grads, along, strict=True) if g is not None)
    return found


def at_once(loss: Loss, model: nn.Module, optimizer: Any, split: Split, num: int) -> FloatArray:
    """The same by `torch.func`: the gradients of some candidates at once."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    along = dict(zip(weights, direction(loss, model, optimizer, split, CHUNK), strict=True))

    def product(weights: dict[str, torch.Tensor], row: Batch) -> torch.Tensor:
        def one(own: dict[str, torch.Tensor]) -> torch.Tensor:
            batch = {name: value[None] for name, value in row.items()}
            output = torch.func.functional_call(model, own, args=(), kwargs=batch)
            return output.loss

        grads = torch.func.grad(one)(weights)
        return torch.stack([(grads[name] * u).sum() for name, u in along.items()]).sum()

    many = torch.func.vmap(product, in_dims=(None, 0))
    parts = np.array_split(np.arange(num), max(1, num // CHUNK))
    return np.concatenate([many(weights, split.pool.batch(part)).numpy() for part in parts])
