"""What a run allocates on a card at its first step, in the averaging window and at a boundary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, default_data_collator

from benchmarks.lab.boundary import MOST, ROWS_PER_BATCH, make_model, rows, stages_wrapped
from mates_hf import MatesCallback, MatesConfig, ReferenceTask
from tests.training.kit import make_arguments

ROUNDING = 0.25  # x the weights' bytes: what an allocator rounds up, and cuBLAS keeps


class FirstStep(TrainerCallback):
    """What is allocated before the first step, and at most in it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.peak = torch.cuda.max_memory_allocated()


def test_a_round_keeps_below_its_bound_of_the_weights(cuda: torch.device, tmp_path: Path) -> None:
    found: dict[str, list[int]] = {}

    def wrap(work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            result = work(*args, **kwargs)
            torch.cuda.synchronize()
            found.setdefault(name, []).append(torch.cuda.max_memory_allocated())
            return result

        return run

    model = make_model(512, torch.float32, 6)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    config = MatesConfig(
        update_steps=3, num_probes=32, selection_ratio=0.5, average_steps=2, on_weak_signal="select",
        probe_tokens_per_batch=ROWS_PER_BATCH * 32,
    )  # fmt: skip
    reference = ReferenceTask.from_dataset(rows(16, 1).remove_columns("labels"), input_ids_column="input_ids")
    arguments = make_arguments(tmp_path, use_cpu=False, max_steps=5, per_device_train_batch_size=ROWS_PER_BATCH)
    first = FirstStep()
    with stages_wrapped(wrap):
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows(200, 0), data_collator=default_data_collator,
            callbacks=[first],
        )  # fmt: skip
        MatesCallback(reference, config).attach(trainer)
        trainer.train()
    # A step with AdamW ends with two moments; its gradients and activations are gone at a boundary.
    held = size * 3
    assert first.peak - first.before < size * (4 + ROUNDING)
    assert max(found["average"]) - held < size * (1 + 1 + ROUNDING)  # the mean, and gradients that are not freed yet
    assert max(found["boundary"]) - held < size * (MOST + ROUNDING)
