"""Models of the benchmarks, how they are trained by hand and by the Trainer, and what losses are read of them.

Trade-off: models of half a million parameters, so that a figure can be repeated over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from benchmarks.lab.corpus import PASSAGE_TOKENS, VOCAB
from benchmarks.lab.statistics import FloatArray
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.engine.averaging import WeightAverage
from mates_hf.influence.difference import row_means
from mates_hf.influence.passes import mean_loss_gradient, token_losses

TOKENS_PER_BATCH = 512  # 8 rows of 64: larger batches fall out of the cache of a processor
LR = 1e-3  # unless said otherwise


def llama(
    vocab_size: int = VOCAB,
    *,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    inner: int | None = None,
    length: int = 256,
    tied: bool = True,
    seed: int = 0,
    **changes: Any,
) -> LlamaForCausalLM:
    """A Llama with fresh weights; 1.3 M parameters as it stands.

    A block is `inner` wide inside; None is 43/16 of the width. `tied` is whether embedding and head are one matrix,
    `changes` are other settings of `LlamaConfig`.
    """
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, **changes}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=inner or width * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=length,
            tie_word_embeddings=tied,
            **settings,
        )
    )


def trainer_of(
    model: Any,
    rows: Any,
    folder: Path,
    steps: int,
    batch: int,
    callbacks: Sequence[Any] = (),
    *,
    tokenizer: Any = None,
    **changes: Any,
) -> Trainer:
    """A Trainer of a quiet run on the CPU: `steps` of `batch` rows at a constant rate, without checkpoints.

    `changes` are other `TrainingArguments`.
    """
    settings: dict[str, Any] = {
        "learning_rate": LR, "lr_scheduler_type": "constant", "logging_strategy": "no", "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    settings |= {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": batch, **changes}
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def train_on(
    model: nn.Module,
    optimizer: Any,
    pool: TokenRows,
    num_steps: int,
    *,
    batch: int = 8,
    seed: int = 0,
    max_grad_norm: float | None = None,
) -> None:
    """Train in place on batches of random rows."""
    order = np.random.default_rng(seed).integers(len(pool), size=num_steps * batch)
    train_steps(model, optimizer, pool, order, batch_rows=batch, max_grad_norm=max_grad_norm)


def trained(pool: TokenRows, num_steps: int, model: Any = None, batch: int = 8) -> tuple[Any, torch.optim.Optimizer]:
    """A model, and AdamW after a few steps on the rows, so that its state is a real one."""
    model = llama() if model is None else model
    optimizer = build_optimizer(model)
    train_on(model, optimizer, pool, num_steps, batch=batch)
    return model, optimizer


def build_model(
    vocab_size: int, *, width: int = 96, layers: int = 2, seed: int = 0, family: str = "gpt_neox", tied: bool = True
) -> PreTrainedModel:
    """A GPT-NeoX (Pythia's architecture), or a Llama, with fresh weights, without dropout."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=2 * PASSAGE_TOKENS,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]


def build_optimizer(model: nn.Module, *, lr: float = LR, beta2: float = 0.95) -> torch.optim.AdamW:
    """AdamW with the paper's momentum and weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=0.1)


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: TokenRows,
    order: npt.NDArray[np.int64],
    *,
    batch_rows: int,
    max_grad_norm: float | None = 1.0,
    warm_up: int = 0,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train on `order`, `batch_rows` rows a step: token-weighted loss, clipping, constant rate after a linear warm-up.

    The model is trained in place, in the mode and at the rates that it and the optimizer have; a remainder below one
    batch is not trained on. `max_grad_norm` None is off. `on_step` is called with the number of steps taken.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(len(order) // batch_rows):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / max(1, warm_up))
        batch = rows.take(order[step * batch_rows : (step + 1) * batch_rows])
        mean_loss_gradient(model, batch, tokens_per_batch=tokens_per_batch)
        if max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step + 1)


def row_losses(model: nn.Module, rows: TokenRows, tokens_per_batch: int = TOKENS_PER_BATCH) -> FloatArray:
    """(N,) mean loss of each row, nats/token."""
    return row_means(rows, token_losses(model, rows, tokens_per_batch=tokens_per_batch))


class Averager:
    """Mean of the weights over the last `window` of `num_steps` steps: pass `update` as `on_step`."""

    def __init__(self, model: nn.Module, num_steps: int, window: int) -> None:
        self.average = WeightAverage(model)
        self._start = num_steps - window

    def update(self, step: int) -> None:
        """Take the weights in where the step is inside the window."""
        if step > self._start:
            self.average.update()


def passage_losses(
    model: nn.Module, tasks: dict[str, ReferenceTask], tokens_per_batch: int = TOKENS_PER_BATCH
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Of each `loss_on`: (N,) sum of the losses of each passage in nats, and (N,) tokens they are of; one pass."""
    read = tasks["all"].rows
    losses = token_losses(model, read, tokens_per_batch=tokens_per_batch)
    passage = np.repeat(np.arange(len(read)), read.num_targets)
    masks = {loss_on: task.rows.target_mask[read.target_mask] for loss_on, task in tasks.items()}
    return {
        loss_on: (
            np.bincount(passage[mask], losses[mask], len(read)),
            np.bincount(passage[mask], minlength=len(read)).astype(np.float64),
        )
        for loss_on, mask in masks.items()
    }


def task_losses(
    model: nn.Module, tasks: dict[str, ReferenceTask], tokens_per_batch: int = TOKENS_PER_BATCH
) -> dict[str, float]:
    """Mean loss over the tokens of each `loss_on`, nats/token, from one pass over the passages."""
    found = passage_losses(model, tasks, tokens_per_batch)
    return {loss_on: float(sums.sum() / tokens.sum()) for loss_on, (sums, tokens) in found.items()}
