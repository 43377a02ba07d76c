"""A small run that is watched: a pool whose rows carry their number, a model of two layers, and what a run leaves.

Trade-off: seconds long, so that hundreds of them can be broken on purpose.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from benchmarks.lab.corpus import as_dataset
from benchmarks.lab.models import llama, trainer_of
from mates_hf.config import MatesConfig
from mates_hf.data.reference import ReferenceTask

VOCAB, LENGTH = 64, 12
BASE = 32  # the first two tokens of a row are its number in this base


def make_pool(num_rows: int = 400) -> Dataset:
    """Rows of one length; the last tokens of every third row count up, as the reference does."""
    rng = np.random.default_rng(0)
    rows = rng.integers(BASE, VOCAB, (num_rows, LENGTH))
    rows[::3, 2:] = BASE + (rng.integers(0, 8, (len(rows[::3]), 1)) + np.arange(LENGTH - 2)) % 8
    rows[:, 0], rows[:, 1] = np.divmod(np.arange(num_rows), BASE)
    return as_dataset(rows)


def make_reference(num: int = 24) -> ReferenceTask:
    """Passages that count up."""
    rows = [(BASE + (i + np.arange(LENGTH)) % 8).tolist() for i in range(num)]
    return ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": rows}), input_ids_column="input_ids")


def small_config(**changes: Any) -> MatesConfig:
    """Rounds of six steps."""
    settings = {"update_steps": 6, "num_probes": 40, "selection_ratio": 0.5, "on_weak_signal": "select"}
    return MatesConfig(**{**settings, **changes})


class Watch(TrainerCallback):
    """Rows trained on, in order, and the random streams seen at each step."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.streams: list[int] = []

    def watch(self, model: torch.nn.Module) -> None:
        """Take down the rows that the model is trained on."""

        def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                ids = kwargs["input_ids"]
                self.rows.extend((ids[:, 0] * BASE + ids[:, 1]).tolist())

        model.register_forward_pre_hook(see, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take down the random streams."""
        self.streams.append(int(torch.get_rng_state().sum()))


@functools.cache
def leave_modules_to_themselves() -> None:
    """Each `train()` collects garbage; going through all that is imported would take longer than these runs."""
    gc.collect()
    gc.freeze()


def run(
    output_dir: Path,
    callback: TrainerCallback,
    *,
    resume: str | None = None,
    dropout: float = 0.0,
    prepare: Callable[[Trainer], None] = lambda trainer: None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train the small model, from the checkpoint `resume` where it is given, and watch it; what it left.

    `prepare` is given the Trainer before it trains.
    """
    leave_modules_to_themselves()
    settings: dict[str, Any] = {
        "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "lr_scheduler_type": "linear",
        "logging_strategy": "steps", "logging_steps": 1, **arguments,
    }  # fmt: skip
    steps, batch = settings.pop("max_steps"), settings.pop("per_device_train_batch_size")
    model = llama(VOCAB, width=32, inner=64, layers=2, heads=2, length=32, tied=False, attention_dropout=dropout)
    watch = Watch()
    watch.watch(model)
    trainer = trainer_of(model, make_pool(), output_dir, steps, batch, [callback, watch], **settings)
    prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": trainer.optimizer.state_dict()["state"],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rows": watch.rows,
        "streams": watch.streams,
    }


def shard_with_fsdp2(trainer: Trainer, layer: str = "LlamaDecoderLayer") -> None:
    """What accelerate does for `fsdp` on an accelerator; on a CPU it leaves `fsdp` out, so it is switched on here."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    state = trainer.accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    trainer.is_fsdp_enabled = True


def fork(work: Callable[[], Any], log_path: Path, environment: dict[str, str]) -> int:
    """Do `work` in a forked process that writes to a log; its process id.

    Importing torch and transformers takes longer than a small run, so runs are forked from a process that has imported
    them and built nothing. It ends as any Python process does: with code 0, 1 after an error, or a signal.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(environment)
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid
