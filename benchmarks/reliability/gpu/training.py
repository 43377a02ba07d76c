"""Random rows, rows that a tuned fastText likes, and rows that the run selects: as many steps as fit, kept on disk.

Arms take turns of one round each. After a turn an arm's weights, optimizer, order and losses are written, whole or not
at all, so that the next call, or one after a kill, goes on behind it. All arms begin with the same random round.

Trade-off: one seed, rounds as in the laboratory (labels along a path, token tables, 30 % random rows), not the
`Trainer`; a pool that is used up begins anew.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lab.corpus import Lab
from benchmarks.lab.models import build_optimizer, row_losses, task_losses, train_steps
from benchmarks.lab.rivals import pieces_of, text_ranking
from benchmarks.reliability.gpu.device import TRAIN_TOKENS, Task, bf16, device, seconds_left
from mates_hf.disk import written_whole
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel

ARMS = ("random", "fastText", "ours")
TUNED = "6,000 negatives, 5 epochs"  # of `rivals.SETTINGS_TRIED`, chosen on other seeds
RATIO, RANDOM_SHARE = 0.2, 0.3
HELD_ROWS = 64  # at the pool's end, never trained on


class Arm:
    """One training, as far as it is kept."""

    def __init__(self, name: str, task: Task, lab: Lab) -> None:
        self.name, self.task, self.lab = name, task, lab
        self.path = Path(task.work, f"training-{name}-{task.size}.pt")
        self.model = task.model.build()
        self.optimizer = build_optimizer(self.model)
        self.step, self.position, self.points, self.seconds = 0, 0, list[dict[str, float]](), 0.0
        if self.path.exists():
            state = torch.load(self.path, map_location=device(), weights_only=False)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.position, self.points, self.seconds = (
                state[key] for key in ("step", "position", "points", "seconds")
            )
        self.turn_steps, self.probes = (4, 16) if task.quick else (100, 256)

    def turn(self) -> None:
        """One round: choose, train, judge, keep."""
        begun = time.monotonic()
        wanted = self.turn_steps * self.task.model.batch_rows
        chosen = self._chosen(wanted)
        with bf16():
            train_steps(
                self.model, self.optimizer, self.lab.rows, chosen, batch_rows=self.task.model.batch_rows,
                warm_up=0 if self.step else min(20, self.turn_steps), tokens_per_batch=TRAIN_TOKENS,
            )  # fmt: skip
            self.step += self.turn_steps
            held = self.lab.rows.take(np.arange(len(self.lab.rows) - HELD_ROWS, len(self.lab.rows)))
            self.points.append(
                {
                    "step": self.step,
                    "reference": task_losses(self.model, self.lab.development, TRAIN_TOKENS)["all"],
                    "pool": float(row_losses(self.model, held, TRAIN_TOKENS).mean()),
                }
            )
        self.seconds += time.monotonic() - begun
        with written_whole(self.path) as file:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
            torch.save({**state, "position": self.position, "points": self.points, "seconds": self.seconds}, file)

    def _chosen(self, wanted: int) -> Any:
        """Pool rows of a round, in the order of training."""
        rng = np.random.default_rng([1, self.step])
        if self.name == "random" or not self.step:
            return rng.permutation(self._next(wanted))
        slice_ids = self._next(round(wanted / RATIO))
        at_random = rng.permutation(slice_ids)
        num_random = round(RANDOM_SHARE * wanted)
        rest = at_random[num_random:]
        best = rest[np.argsort(-self._values(rest, rng), kind="stable")[: wanted - num_random]]
        return rng.permutation(np.concatenate([at_random[:num_random], best]))

    def _next(self, num: int) -> Any:
        """The next rows of the shuffled pool; behind its end it begins anew, in another order."""
        pool = len(self.lab.rows) - HELD_ROWS
        found = []
        while num:
            order = np.random.default_rng([0, self.position // pool]).permutation(pool)
            part = order[self.position % pool :][:num]
            found.append(part)
            self.position, num = self.position + len(part), num - len(part)
        return np.concatenate(found)

    def _values(self, ids: Any, rng: np.random.Generator) -> Any:
        rows = self.lab.rows
        if self.name == "fastText":
            rank = text_ranking(
                "fastText",
                TUNED,
                self.lab.tokenizer,
                rows,
                pieces_of(self.lab.reference["all"].rows, rows.lengths[0]),
                0,
            )
            return rank(rows.take(ids))
        probed = rows.take(rng.choice(len(rows) - HELD_ROWS, self.probes, replace=False))
        probe = DirectionalProbe(
            tokens_per_batch=TRAIN_TOKENS,
            path_steps=4 if self.task.quick else 16,
            batch_rows=self.task.model.batch_rows,
        )
        with bf16():
            labels = probe.measure(self.model, self.optimizer, self.lab.reference["all"], probed)
        return NgramInfluenceModel().fit(probed, labels).predict(rows.take(ids))


def run(task: Task) -> dict[str, Any]:
    """Turn by turn until the time, or the steps, are used."""
    lab = task.lab()
    names = [name for name in ARMS if name != "fastText" or importlib.util.find_spec("fasttext") is not None]
    arms = [Arm(name, task, lab) for name in names]
    longest = dict.fromkeys(names, 0.0)
    while any(arm.step < task.steps for arm in arms):
        arm = min(arms, key=lambda arm: arm.step)
        guess = longest[arm.name] or max(longest.values(), default=0.0)
        if seconds_left(task) < 1.3 * guess or (not guess and seconds_left(task) < task.least_seconds):
            break
        begun = time.monotonic()
        arm.turn()
        longest[arm.name] = max(longest[arm.name], time.monotonic() - begun)
    return {
        "done": all(arm.step >= task.steps for arm in arms), "steps": task.steps, "rows": len(lab.rows),
        "parameters": sum(p.numel() for p in arms[0].model.parameters()),
        "left_out": [name for name in ARMS if name not in names],
        "arms": {arm.name: {"points": arm.points, "seconds": arm.seconds} for arm in arms},
    }  # fmt: skip
