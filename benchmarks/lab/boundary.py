"""Memory of a round beside the run: bytes of tensors at a boundary of a real `Trainer` run, stage by stage."""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.lab.corpus import as_dataset
from benchmarks.lab.machine import temporary_folder
from benchmarks.lab.memory import micro_batch_bytes
from benchmarks.lab.models import llama, trainer_of
from mates_hf import MatesCallback, MatesConfig, ReferenceTask

LENGTH, VOCAB, ROWS_PER_BATCH = 32, 1024, 2
MOST = 3.2
STAGES = {
    "mates_hf.training.session.WeightAverage.update": "average",
    "mates_hf.training.measure.weights_digest": "digest",
    "mates_hf.training.stages.measure_labels": "probe",
    "mates_hf.training.audit.measure_audit": "audit",
    "mates_hf.training.session.Session._look": "boundary",
}


def stages_recorded() -> contextlib.AbstractContextManager[None]:
    """Name the stages in the profiler's events."""
    return stages_wrapped(_named)


@contextlib.contextmanager
def stages_wrapped(wrap: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> Iterator[None]:
    """Put what `wrap` makes of a stage's function and name in the function's place."""
    with contextlib.ExitStack() as stack:
        for path, name in STAGES.items():
            stack.enter_context(patch(path, wrap(pkgutil.resolve_name(path), name)))
        yield


def _named(work: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"stage:{name}"):
            return work(*args, **kwargs)

    return run


def make_model(width: int, dtype: torch.dtype, layers: int) -> Any:
    """A Llama whose parameters outweigh what a micro-batch takes."""
    return llama(VOCAB, width=width, inner=2 * width, layers=layers, length=LENGTH, tied=False).to(dtype)


def rows(count: int, seed: int) -> Dataset:
    """Random rows of one length."""
    return as_dataset(np.random.default_rng(seed).integers(3, VOCAB, (count, LENGTH)))


def measure(
    width: int, dtype: torch.dtype = torch.float32, optim: str = "adamw_torch", layers: int = 6
) -> dict[str, float]:
    """Peak bytes of each stage of a round, in units of the trainable parameters' bytes, and what `limit` is.

    In each of several processes that call it together, those of the process.
    """
    model = make_model(width, dtype, layers)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    config = MatesConfig(
        update_steps=3, num_probes=32, selection_ratio=0.5, average_steps=2, on_weak_signal="select",
        probe_tokens_per_batch=ROWS_PER_BATCH * LENGTH,
    )  # fmt: skip
    reference = ReferenceTask.from_dataset(rows(16, 1).remove_columns("labels"), input_ids_column="input_ids")
    with temporary_folder(None) as folder:
        trainer = trainer_of(model, rows(200, 0), folder, 5, ROWS_PER_BATCH, optim=optim)
        MatesCallback(reference, config).attach(trainer)
        with stages_recorded(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.train()
        if trainer.args.process_index == 0 and not list(folder.glob("_mates/round-*/round.json")):
            raise RuntimeError("no round was run")
    changes: list[tuple[int, int]] = []
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in STAGES.values()}
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if name == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif name.startswith("stage:"):
            ranges[name.removeprefix("stage:")].append((event.start_ns(), event.end_ns()))
    changes.sort()
    times, levels = np.array([time for time, _ in changes]), np.cumsum([change for _, change in changes])
    # Before the window opens: parameters are older than the profiler, the optimizer's state is in the level.
    base = levels[np.searchsorted(times, min(ranges["average"])[0]) - 1]

    def peak(name: str) -> float:
        spans = [np.searchsorted(times, span) for span in ranges[name]]
        return float((max(levels[max(0, begin - 1) : end + 1].max() for begin, end in spans) - base) / size)

    found = {name: peak(name) for name in STAGES.values() if ranges[name]}  # the main process has all of them
    micro = micro_batch_bytes(model, torch.tensor(rows(ROWS_PER_BATCH, 2)["input_ids"])) / size
    return {"trainable_bytes": float(size), **found, "micro_batch": micro, "limit": MOST + micro}
