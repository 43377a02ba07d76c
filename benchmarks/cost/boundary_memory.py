# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf"]
# ///
"""What a round takes in memory beside the run: bytes of tensors at a boundary of a real `Trainer` run, stage by stage.

    python benchmarks/boundary_memory.py            # writes benchmarks/results/boundary_memory.{json,md}
    python benchmarks/boundary_memory.py --quick    # prints, writes nothing unless --out is given

Figures are in units of the trainable parameters' bytes, on top of the parameters and the optimizer's state, which
training holds anyway; the gradients of a training step are gone by then. The running mean of the weights is among
them. A micro-batch of the probe is given apart, for it does not grow with the model.

Trade-off: bytes are counted on the CPU, temporaries of kernels included; what a device's allocator holds back is not.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from probe_speed import figure, peak_bytes, start, write_results
from torch.profiler import ProfilerActivity, profile, record_function

from mates_hf import MatesCallback, MatesConfig, ReferenceTask

LENGTH, VOCAB, ROWS_PER_BATCH = 32, 1024, 2
MOST = 3.2
STAGES = {
    "mates_hf.training.session.WeightAverage.update": "average",
    "mates_hf.training.measure.weights_digest": "digest",
    "mates_hf.training.rounds.measure_labels": "probe",
    "mates_hf.training.audit.measure_audit": "audit",
    "mates_hf.training.session.Session._look": "boundary",
}


@contextlib.contextmanager
def stages_recorded() -> Iterator[None]:
    """Name the stages in the profiler's events."""
    import importlib

    with contextlib.ExitStack() as stack:
        for path, name in STAGES.items():
            module_name, _, attribute = path.rpartition(".")
            try:
                owner: Any = importlib.import_module(module_name)
            except ModuleNotFoundError:
                module_name, _, kind = module_name.rpartition(".")
                owner = getattr(importlib.import_module(module_name), kind)
            stack.enter_context(patch.object(owner, attribute, _named(getattr(owner, attribute), name)))
        yield


def _named(work: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"stage:{name}"):
            return work(*args, **kwargs)

    return run


def make_model(width: int, dtype: torch.dtype, layers: int) -> Any:
    """A Llama whose parameters outweigh what a micro-batch takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=None,
            eos_token_id=None,
        )
    ).to(dtype)  # fmt: skip


def rows(count: int, seed: int) -> Dataset:
    """Random rows of one length."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (count, LENGTH)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def measure(
    width: int, dtype: torch.dtype = torch.float32, optim: str = "adamw_torch", layers: int = 6
) -> dict[str, float]:
    """Peak bytes of each stage of a round, in units of the trainable parameters' bytes, and what `limit` is.

    In each of several processes that call it together, those of the process.
    """
    from transformers import Trainer, TrainingArguments

    model = make_model(width, dtype, layers)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    config = MatesConfig(
        update_steps=3, num_probes=32, selection_ratio=0.5, average_steps=2, on_weak_signal="select",
        probe_tokens_per_batch=ROWS_PER_BATCH * LENGTH,
    )  # fmt: skip
    reference = ReferenceTask.from_dataset(rows(16, 1).remove_columns("labels"), input_ids_column="input_ids")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=5, per_device_train_batch_size=ROWS_PER_BATCH, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=True, logging_strategy="no", optim=optim,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows(200, 0))
        MatesCallback(reference, config).attach(trainer)
        with stages_recorded(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.train()
        if trainer.args.process_index == 0 and not list(Path(folder).glob("_mates/round-*/round.json")):
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
    # One micro-batch as a training step accumulates it: the gradients it is added to are there already.
    ids = torch.tensor(rows(ROWS_PER_BATCH, 2)["input_ids"])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    micro = peak_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward()) / size
    return {"trainable_bytes": float(size), **found, "micro_batch": micro, "limit": MOST + micro}


def main() -> None:
    """Measure, print and write."""
    arguments = start(__doc__ or "")
    width = 128 if arguments.quick else 384
    raw = {
        "float32, AdamW": measure(width),
        "bfloat16 weights, AdamW": measure(width, torch.bfloat16),
        "float32, Adafactor": measure(width, optim="adafactor"),
    }
    figures = []
    for name, found in raw.items():
        for stage in ("average", "digest", "probe", "audit", "boundary"):
            # In the window the mean of 16-bit weights is in float32.
            figures.append(
                figure(f"{name}: {stage}, beside the run", found[stage], "x trainable bytes", most=found["limit"])
            )
        figures.append(figure(f"{name}: a micro-batch", found["micro_batch"], "x trainable bytes"))
    settings = {
        "width": width,
        "layers": 6,
        "tokens a micro-batch": ROWS_PER_BATCH * LENGTH,
        "limit": f"{MOST} + a micro-batch",
    }
    write_results("boundary_memory", arguments, settings, figures, raw)


if __name__ == "__main__":
    main()
