"""What `MatesCallback` costs a run between its rounds, and where the time of its rounds goes.

Every figure comes from a real `Trainer`: `on_step_end` is timed in place, tensor operations inside it are counted by a
dispatch mode, and whole runs with and without the callback take turns.

Trade-off: training steps are kept short, which makes every overhead look large; a round's share depends on how many
optimizer steps it is spread over, so it is stated with its settings and says nothing about other ones.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.lab.corpus import as_dataset, as_reference, text_rows
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import alternate, median_ratio, seconds_of, temporary_folder
from benchmarks.lab.models import llama, trainer_of
from benchmarks.lab.operations import CountOperations
from benchmarks.lab.tables import figure
from mates_hf.config import MatesConfig
from mates_hf.data.reference import ReferenceTask
from mates_hf.round_files import load_round
from mates_hf.selection.plan import RunPlan
from mates_hf.training.callback import MatesCallback

LENGTH = 128


class WatchedCallback(MatesCallback):
    """The callback with its `on_step_end` timed, or its operations counted up to the first round, step by step."""

    def __init__(self, reference: ReferenceTask, config: MatesConfig, plan: RunPlan, *, count: bool) -> None:
        super().__init__(reference, config)
        self.plan, self.count = plan, count
        self.seconds: dict[int, float] = {}  # of `on_step_end`, by step
        self.operations: dict[int, Counter[str]] = {}  # in it
        self.lerp_seconds: dict[int, float] = {}  # of one `torch._foreach_lerp_` over all parameters, next to it
        self.train_begin_seconds = 0.0
        self._live: list[torch.Tensor] = []
        self._mean: list[torch.Tensor] = []

    def place(self, step: int) -> str:
        """Where a step lies: "round", "window start" (the mean is made), "window" or "outside"."""
        for planned in self.plan.rounds:
            first = planned.boundary_step - self.config.window_steps + 1
            if step == planned.boundary_step:
                return "round"
            if first <= step < planned.boundary_step:
                return "window start" if step == first else "window"
        return "outside"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Timed."""
        begin = super().on_train_begin
        self.train_begin_seconds = seconds_of(lambda: begin(args, state, control, **kwargs))
        self._live = [p.detach() for p in kwargs["model"].parameters()]
        self._mean = [p.clone() for p in self._live]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Timed or counted, and next to it the one pass over the parameters that it may take inside the window."""
        step, place = state.global_step, self.place(state.global_step)
        if self.count and place != "round":
            with CountOperations() as mode:
                super().on_step_end(args, state, control, **kwargs)
            self.operations[step] = mode.counts
            control.should_training_stop = self.place(step + 1) == "round"
            return
        compare = place == "window" and not self.count
        if compare and step % 2:  # the second of the two finds the parameters in the cache: they take turns
            self.lerp_seconds[step] = self._lerp()
        begin = time.perf_counter()
        super().on_step_end(args, state, control, **kwargs)
        self.seconds[step] = time.perf_counter() - begin
        if compare and not step % 2:
            self.lerp_seconds[step] = self._lerp()

    def _lerp(self) -> float:
        return seconds_of(lambda: torch._foreach_lerp_(self._mean, self._live, 0.1))

    def seconds_at(self, place: str) -> list[float]:
        """Of `on_step_end` at all steps of a place."""
        return [seconds for step, seconds in self.seconds.items() if self.place(step) == place]


class Timed(TrainerCallback):
    """Wall-clock of the training loop alone: from the first step's begin to the last step's end."""

    def __init__(self) -> None:
        self.begin: float | None = None
        self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the first."""
        self.begin = self.begin or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the last so far."""
        self.seconds = time.perf_counter() - (self.begin or 0.0)


def train(rows: Dataset, folder: Path, steps: int, batch: int, callbacks: Sequence[TrainerCallback]) -> float:
    """Seconds of `trainer.train()`, same model and data order every time."""
    return seconds_of(trainer_of(llama(), rows, folder, steps, batch, callbacks).train)


def watch(
    rows: Dataset, reference: ReferenceTask, config: MatesConfig, steps: int, batch: int, *, count: bool
) -> dict[str, Any]:
    """One selecting run, its callback watched; and what its rounds recorded."""
    plan = RunPlan(num_rows=len(rows), batch_rows=batch, max_steps=steps, config=config)
    callback = WatchedCallback(reference, config, plan, count=count)
    with temporary_folder(None) as folder:
        seconds = train(rows, folder, steps, batch, [callback])
        rounds = [load_round(path).info["stages"] for path in sorted((folder / "_mates").glob("round-????"))]
    stages: Counter[str] = Counter()
    for found in rounds:
        stages.update({name: stage["seconds"] for name, stage in found.items()})
    return {"callback": callback, "seconds": seconds, "stages": stages, "num_rounds": len(rounds)}


def paired_runs(
    rows: Dataset, reference: ReferenceTask, steps: int, batch: int, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """Runs without the callback, with one that never selects, and with one whose only round is almost at the end.

    For each arm and turn, `run` has the seconds of `trainer.train()`, and `steps` those from the first step's begin to
    the last one's end, without the round and without what watching it adds.
    """
    never = MatesConfig(update_steps=10, random_rounds=10**6, num_probes=10)
    scheduled = MatesConfig(
        update_steps=steps - 2, switch_lead_steps=1, average_steps=steps // 4, num_probes=16, selection_ratio=1.0,
        on_weak_signal="select",
    )  # fmt: skip
    plan = RunPlan(num_rows=len(rows), batch_rows=batch, max_steps=steps, config=scheduled)
    threads = torch.get_num_threads()
    found: dict[str, list[dict[str, float]]] = {"plain": [], "never selects": [], "scheduled": []}

    def run(name: str) -> None:
        watched = WatchedCallback(reference, scheduled, plan, count=False)
        own: dict[str, TrainerCallback] = {"never selects": MatesCallback(reference, never), "scheduled": watched}
        clock = Timed()
        torch.set_num_threads(threads)  # for the case that a round changes them
        with temporary_folder(None) as folder:
            whole = train(rows, folder, steps, batch, [*([own[name]] if name in own else []), clock])
        left_out = sum(watched.seconds_at("round")) + sum(watched.lerp_seconds.values())
        found[name].append({"run": whole, "steps": clock.seconds - left_out})

    run("plain")
    found["plain"].clear()  # it warmed up
    alternate({name: functools.partial(run, name) for name in found}, repeats)
    return found


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    torch.set_num_threads(bench.options.threads)
    quick = bench.quick
    pool, reference_rows = text_rows(LENGTH)
    rows, reference = as_dataset(pool), as_reference(reference_rows, 16 if quick else 64)
    config = MatesConfig(
        update_steps=14 if quick else 100, average_steps=6 if quick else 20, num_probes=32 if quick else 400,
        selection_ratio=0.25, on_weak_signal="select",
    )  # fmt: skip
    steps, batch = (34, 4) if quick else (260, 8)
    paired_steps, paired_batch, repeats = (12, 4, 2) if quick else (100, 4, 5)
    threads = torch.get_num_threads()
    timed = watch(rows, reference, config, steps, batch, count=False)
    changed = abs(torch.get_num_threads() - threads)
    torch.set_num_threads(threads)
    counted = watch(rows, reference, config, steps, batch, count=True)
    paired = paired_runs(rows, reference, paired_steps, paired_batch, repeats)

    callback: WatchedCallback = timed["callback"]
    most: Counter[str] = Counter()  # tensor operations in a step, by its place
    names: set[str] = set()  # of those inside windows
    for step, operations in counted["callback"].operations.items():
        place = counted["callback"].place(step)
        most[place] = max(most[place], sum(operations.values()))
        names |= operations.keys() if place == "window" else set()
    lerp = list(callback.lerp_seconds.values())
    window = [callback.seconds[step] for step in callback.lerp_seconds]
    total, outside = timed["seconds"], callback.seconds_at("outside")
    rounds, stages = sum(callback.seconds_at("round")), timed["stages"]

    def ratio(name: str, what: str) -> float:
        return median_ratio([turn[what] for turn in paired[name]], [turn[what] for turn in paired["plain"]])

    def share(seconds: float) -> float:
        return float(100 * seconds / total)

    shares = {
        **stages,
        "rest of the rounds (digests, files, weight swap)": rounds - sum(stages.values()),
        "on_train_begin": callback.train_begin_seconds,
        "on_step_end inside windows": sum(callback.seconds_at("window") + callback.seconds_at("window start")),
        "on_step_end outside": sum(outside),
    }
    one_lerp = "`on_step_end` inside a window / one `torch._foreach_lerp_` over the parameters"
    operations_inside = f"most tensor operations but views in a step inside a window ({', '.join(sorted(names))})"
    figures = [
        figure("`on_step_end` outside of windows, median", 1e6 * statistics.median(outside), "µs", most=50.0),
        figure("the same, 99th percentile", 1e6 * float(np.quantile(outside, 0.99)), "µs"),
        figure("most tensor operations in a step outside of windows", most["outside"], most=0),
        figure(operations_inside, most["window"], most=1),
        figure(one_lerp, median_ratio(window, lerp), "x"),
        figure("`on_step_end` inside a window, median", 1e6 * statistics.median(window), "µs"),
        figure("wall-clock of a run that never selects / plain", ratio("never selects", "run"), "x"),
        figure("steps with the schedule and a window, rounds left out / plain", ratio("scheduled", "steps"), "x"),
        figure("threads of torch that a selecting run changes", changed, most=0),
        *(figure(f"share of a selecting run: {name}", share(seconds), "%") for name, seconds in shares.items()),
        figure("share of a selecting run: all of MatesCallback", share(sum(shares.values())), "%"),
    ]
    settings = {
        "parameters": sum(p.numel() for p in llama().parameters()),
        "selecting run": f"{steps} steps of {batch} x {LENGTH} tokens, {timed['num_rounds']} rounds",
        "update_steps": config.update_steps, "average_steps": config.window_steps, "num_probes": config.num_probes,
        "selection_ratio": config.selection_ratio, "reference": f"{len(reference)} x {LENGTH}",
        "paired runs": f"{repeats} turns, {paired_steps} steps of {paired_batch} x {LENGTH} tokens",
    }  # fmt: skip
    raw = {"seconds": total, "shares": shares, "outside": outside, "window": window, "lerp": lerp, "paired": paired}
    return bench.figures(settings, figures, raw)
