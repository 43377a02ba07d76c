"""Training with rows chosen by influence, by loss, or at random, for as many steps or as many FLOPs.

FLOPs: torch counts a training step and a forward pass as they run (`FlopCounterMode`); probes and fits say their own
(`labels.info`, `report.flops`), by a rule that counts positions so as to agree with such a pass.

Trade-off: a loop of its own with the library's stages, so that all arms share each line that is not about choosing.
`MatesCallback` adds guard, audit and records.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality.modalities.setup import KINDS, TRAINED, Choice, Ids, Sizes, Split
from mates_hf.engine.averaging import WeightAverage
from mates_hf.flops import PATH_STEPS
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.prediction.feature_model import FeatureInfluenceModel

RANDOM, LOW, HIGH, OURS = "random", "lowest loss", "highest loss", "ours"
WARM_UP, CLIP, EVERY, AVERAGED = 20, 1.0, 20, 0.95
MOST = 4  # times the steps that an arm may take to spend its FLOPs


def counted(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its FLOPs."""
    with FlopCounterMode(display=False) as counter:
        found = work()
    return found, float(counter.get_total_flops())


Start = tuple[dict[str, Any], list[dict[str, Any]]]


class Run:
    """One model that trains on a pool whose rows are each offered once."""

    def __init__(
        self, sizes: Sizes, setup: str, arm: str, lr: float, seed: int, split: Split, choice: Choice | None = None
    ) -> None:
        later = TRAINED[setup].later
        self.first, self.steps = sizes.first + later, sizes.steps + later
        self.kind, self.sizes, self.arm, self.lr, self.split = KINDS[TRAINED[setup].kind], sizes, arm, lr, split
        self.choice = choice or Choice()
        self.model = self.kind.build(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.mean = copy.deepcopy(self.model).eval()  # of the weights, for judging
        self.rng = np.random.default_rng([seed, 6])
        self.flops = {"train": 0.0, "choose": 0.0}
        self.step, self.offered, self.queue = 0, 0, np.zeros(0, np.int64)
        self.planted: list[int] = []
        self.rounds: list[dict[str, float]] = []
        self.fitted: FeatureInfluenceModel | None = None
        self.average = WeightAverage(self.model)
        self._task = split.task()
        self._per_step = self._per_scored = 0.0

    def next_rows(self, num: int) -> Ids:
        """The next rows of the pool."""
        if self.offered + num > len(self.split.pool):
            raise ValueError(f"The pool must have {self.offered + num} rows for this run, got {len(self.split.pool)}.")
        self.offered += num
        return np.arange(self.offered - num, self.offered)

    def chosen(self) -> Ids:
        """The rows of the next step."""
        batch = self.sizes.batch
        if self.arm == RANDOM or self.step < self.first:
            return self.next_rows(batch)
        if self.arm != OURS:
            rows = self.next_rows(round(batch / self.choice.share))
            losses = self.losses(rows)
            self.flops["choose"] += self._per_scored * len(rows)
            return rows[np.argsort(losses if self.arm == LOW else -losses, kind="stable")[:batch]]
        if not len(self.queue):
            with self.average.swapped_in() if self.average.num_steps else contextlib.nullcontext():
                self.queue = self.round()
            self.average = WeightAverage(self.model)
        rows, self.queue = np.split(self.queue, [batch])
        return rows

    def losses(self, rows: Ids) -> Any:
        """(N,) loss of each row by the live model, mean over its labels."""
        batch = self.split.pool.batch(rows)
        shift = "input_ids" in self.split.pool.columns  # a label belongs to the position before it

        def work() -> Any:
            self.model.eval()
            with torch.no_grad():
                logits, labels = self.model(**batch).logits.float(), batch["labels"]
            if shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            found = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
            own = (labels != -100).reshape(len(rows), -1)
            return (found.reshape(len(rows), -1) * own).sum(1) / own.sum(1)

        if not self._per_scored:
            found, flops = counted(work)
            self._per_scored = flops / len(rows)
        else:
            found = work()
        return found.numpy()

    def round(self) -> Ids:
        """The rows of a round: probe some of its slice, fit, score the slice, take the best in random order."""
        sizes, choice = self.sizes, self.choice
        num = choice.round * sizes.batch
        slice_rows = self.next_rows(round(num / choice.share))
        probed = np.sort(self.rng.choice(slice_rows, choice.probes, replace=False))
        probe = DirectionalProbe(
            path_steps=PATH_STEPS, rate_steps=choice.round, max_grad_norm=CLIP, batch_rows=sizes.batch
        )

        pool = self.split.pool.pool(probed)
        labels = probe.measure(self.model, self.optimizer, self._task, pool)
        self.fitted = FeatureInfluenceModel(choice.features, model=self.model).fit(pool, labels, previous=self.fitted)
        scores = self.fitted.predict(self.split.pool.pool(slice_rows))
        fitting = float(self.fitted.report.flops or 0.0)
        each = fitting / len(probed)  # features of inputs cost as much to score as to fit
        if choice.features != "inputs":
            if not self._per_scored:
                self.losses(slice_rows[: sizes.batch])
            each = self._per_scored
        flops = float(labels.info["flops"]) + fitting + each * len(slice_rows)
        self.flops["choose"] += flops
        order = np.argsort(-scores, kind="stable")
        at_random = round(num * choice.random_share)
        best = order[: num - at_random]
        best = slice_rows[np.concatenate([best, self.rng.choice(order[len(best) :], at_random, replace=False)])]
        self.rounds.append({
            "step": self.step, "flops": flops, "spearman": self.fitted.report.spearman,
            "wanted": float(self.split.planted[best].mean()),
        })  # fmt: skip
        return self.rng.permutation(best)

    def take_step(self) -> None:
        """One step on rows that the arm chooses."""
        rows = self.chosen()
        self.planted.append(int(self.split.planted[rows].sum()))
        batch = self.split.pool.batch(rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.step + 1) / WARM_UP)

        def work() -> None:
            self.optimizer.zero_grad()
            self.kind.own_loss(self.model, batch).backward()

        self.model.train()
        if not self._per_step:
            _, self._per_step = counted(work)
        else:
            work()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.flops["train"] += self._per_step
        self.step += 1
        if self.arm == OURS and self.sizes.window:
            left = max(self.first - self.step, len(self.queue) // self.sizes.batch)
            if left < self.sizes.window:
                self.average.update()
        keep = min(AVERAGED, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.mean.parameters()), list(self.model.parameters()), 1 - keep)

    def spent(self) -> float:
        """FLOPs so far."""
        return sum(self.flops.values())

    def judge(self) -> dict[str, float]:
        """Loss on the judged examples, at the mean of the last weights."""
        rows = np.arange(len(self.split.judged))
        with torch.no_grad():
            loss = float(self.kind.own_loss(self.mean, self.split.judged.batch(rows)))
        return {"step": self.step, "flops": self.spent(), "loss": loss}

    def begin(self) -> Start:
        """Take the random steps that all arms share; what another arm goes on from."""
        while self.step < self.first:
            self.take_step()
        parts = {name: getattr(self, name) for name in ("flops", "step", "offered", "planted", "_per_step")}
        states = [part.state_dict() for part in (self.model, self.optimizer, self.mean)]
        return copy.deepcopy((parts, states))

    def go_on(self, start: Start) -> None:
        """Be where another arm was after its random steps."""
        parts, states = copy.deepcopy(start)
        vars(self).update(parts)
        for part, state in zip((self.model, self.optimizer, self.mean), states, strict=True):
            part.load_state_dict(state)

    def train(self, steps: int, budget: float = 0.0) -> dict[str, Any]:
        """Train until so many steps are taken, and on until the FLOPs are spent; the result."""
        curve = [self.judge()]
        while self.step < steps or (self.spent() < budget and self.step < MOST * self.steps):
            self.take_step()
            if self.step % EVERY == 0 or self.step == self.steps:
                curve.append(self.judge())
        if curve[-1]["step"] != self.step:
            curve.append(self.judge())
        return {
            "lr": self.lr, "steps": self.steps, "flops": self.flops, "curve": curve, "rounds": self.rounds,
            "wanted": sum(self.planted[self.first : self.steps])
            / ((self.steps - self.first) * self.sizes.batch),
        }  # fmt: skip


def split_of(sizes: Sizes, setup: str, seed: int) -> Split:
    """The examples of a run, enough for the longest one."""
    least = min(choice.share for choice in (*sizes.choices, *sizes.by_loss))
    num = round(MOST * (sizes.steps + TRAINED[setup].later) * sizes.batch / least)
    return TRAINED[setup].split(num, sizes.reference, sizes.judged, seed)


def tune(sizes: Sizes, setup: str, arm: str, choice: Choice, lr: float, seed: int) -> dict[str, Any]:
    """One arm until it has spent what random rows take for `tuned` times the steps, on a seed that no result has."""
    run = Run(sizes, setup, arm, lr, seed, split_of(sizes, setup, seed), choice)
    run.begin()
    steps = sizes.tuned * sizes.steps + TRAINED[setup].later
    found = run.train(0, steps * run.flops["train"] / run.step)
    return {"setup": setup, "arm": arm, "choice": choice.name, "seed": seed, **found}


def compare(sizes: Sizes, setup: str, lr: float, choice: Choice, rival: str, by: Choice, seed: int) -> dict[str, Any]:
    """The arms from one start on one pool; each spends at least the FLOPs that ours took."""
    split = split_of(sizes, setup, seed)
    ours = Run(sizes, setup, OURS, lr, seed, split, choice)
    start = ours.begin()
    arms = {OURS: ours.train(ours.steps)}
    for arm in (RANDOM, rival):
        run = Run(sizes, setup, arm, lr, seed, split, by)
        run.go_on(start)
        arms[arm] = run.train(run.steps, ours.spent())
    return {"setup": setup, "seed": seed, "arms": arms}
