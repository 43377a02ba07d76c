"""Device seconds of each stage of a round in a real `Trainer`, against those of its steps, and what it allocates."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from benchmarks.lab.boundary import stages_wrapped
from benchmarks.lab.corpus import as_dataset
from benchmarks.lab.machine import temporary_folder
from benchmarks.lab.models import trainer_of
from benchmarks.reliability.gpu.device import TRAIN_TOKENS, Task, device, device_seconds, peak_bytes
from mates_hf import MatesCallback, MatesConfig


class Steps(TrainerCallback):
    """Seconds of each step, and the most that is allocated in one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak = 0
        self._event: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock starts."""
        self._begin = _now()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock stops where the optimizer has stepped: what callbacks do at the end of a step is not of it."""
        self.seconds.append(_now() - self._begin)
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())


def _now() -> float:
    import time

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(task: Task) -> dict[str, Any]:
    """One round of a short run."""
    lab, size = task.lab(), task.model
    seconds: dict[str, float] = {}
    peaks: dict[str, int | None] = {}

    def wrap(work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run_stage(*args: Any, **kwargs: Any) -> Any:
            found: list[Any] = []

            def timed() -> None:
                peaks[name] = peak_bytes(lambda: found.append(work(*args, **kwargs)))

            seconds[name] = seconds.get(name, 0.0) + device_seconds(timed)
            return found[0]

        return run_stage

    steps = 6 if task.quick else 24
    config = MatesConfig(
        update_steps=steps // 2, num_probes=16 if task.quick else 512, average_steps=2, on_weak_signal="select",
        selection_ratio=0.5, probe_tokens_per_batch=TRAIN_TOKENS,
    )  # fmt: skip
    model, watched = size.build(), Steps()
    num = min(len(lab.rows), 6 * steps * size.batch_rows)
    with temporary_folder(None) as folder, stages_wrapped(wrap):
        on_card = device().type == "cuda"
        trainer = trainer_of(
            model, as_dataset(lab.rows.take(np.arange(num))), folder, steps, size.batch_rows, [watched],
            use_cpu=not on_card, bf16=on_card,
        )  # fmt: skip
        MatesCallback(lab.reference["all"].subset(16 if task.quick else 64), config).attach(trainer)
        trainer.train()
        rounds = len(list(folder.glob("_mates/round-*/round.json")))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    step = statistics.median(watched.seconds[2:])
    return {
        "done": True, "parameters": sum(p.numel() for p in model.parameters()), "rounds": rounds,
        "probes": config.num_probes,
        "seconds_a_step": step, "stage_seconds": seconds, "round_in_steps": seconds["boundary"] / step,
        "peak_of_a_step": watched.peak / weights if watched.peak else None,
        "peak_of_stages": {name: None if peak is None else peak / weights for name, peak in peaks.items()},
    }  # fmt: skip
