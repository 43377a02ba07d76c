"""What can be known before the first optimizer step: settings that would break the data order, by name.

Place in the flow: `MatesCallback.on_train_begin` calls `check_run` before any step is taken and any file is written.
Trade-off: fail closed. A setting whose order of rows was not proven is refused, with the way out, rather than tried.
"""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import IterableDataset

from mates_hf.config import MatesConfig
from mates_hf.records import UnsupportedSettingError


def look_ahead_batches(dataloader: Any) -> int:
    """Batches drawn beyond the one in training: workers x prefetch, and the one accelerate holds back."""
    workers = dataloader.num_workers
    return workers * (dataloader.prefetch_factor or 2) + 1 if workers else 1


def look_ahead_steps(dataloader: Any, accumulation: int) -> int:
    """Optimizer steps that `switch_lead_steps` must cover at least."""
    return math.ceil(look_ahead_batches(dataloader) / accumulation)


def refusals(args: Any, dataloader: Any) -> list[str]:
    """Reasons why this run cannot have its data order scheduled, each naming the setting and the way out."""
    found: list[str] = []
    if isinstance(getattr(dataloader, "dataset", None), IterableDataset):
        found.append(
            "a streaming pool (`train_dataset` is an IterableDataset) cannot be re-indexed: use a map-style dataset, "
            "or filter the stream before training"
        )
        return found
    if args.world_size > 1:
        found.append(f"more than one process (`world_size` is {args.world_size}) is not supported yet: run one")
    if args.n_gpu > 1:
        found.append(
            f"nn.DataParallel (`n_gpu` is {args.n_gpu}) splits each batch behind the sampler: make one GPU visible"
        )
    if getattr(args, "deepspeed", None):
        found.append("DeepSpeed (`deepspeed`) shards the weights a probe has to move: train without it")
    if getattr(args, "fsdp", None):
        found.append("FSDP (`fsdp`) shards the weights a probe has to move and is not supported yet: train without it")
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance":
        found.append("`train_sampling_strategy='batch_rebalance'` has no sampler: use another strategy")
    if getattr(args, "dataloader_in_order", True) is False:
        found.append("`dataloader_in_order=False` lets workers reorder batches: set it to True")
    accelerator = args.accelerator_config
    if getattr(accelerator, "dispatch_batches", None):
        found.append("`accelerator_config.dispatch_batches=True` reads batches in another process: set it to False")
    if getattr(dataloader, "use_stateful_dataloader", False):
        found.append("`use_stateful_dataloader=True` replays its own order on resume: set it to False")
    if not found and not (hasattr(dataloader, "set_sampler") and hasattr(dataloader, "get_sampler")):
        found.append(
            f"the training dataloader ({type(dataloader).__name__}) has no `set_sampler`: use the one that "
            "`Trainer.get_train_dataloader` makes"
        )
    elif not found and dataloader.get_sampler() is None:
        found.append("the training dataloader has no sampler that could be replaced: give it a map-style dataset")
    return found


def check_run(args: Any, dataloader: Any, config: MatesConfig) -> None:
    """Refuse a run whose data order this library could not keep, before its first step.

    Args:
        args: the run's `TrainingArguments`.
        dataloader: its prepared training dataloader.
        config: the run's `MatesConfig`.

    Raises:
        UnsupportedSettingError: names every setting that stands in the way, and what to set instead.
        ValueError: `switch_lead_steps` does not cover what the dataloader fetches ahead; says the number that would.
    """
    found = refusals(args, dataloader)
    if found:
        raise UnsupportedSettingError(f"MatesCallback cannot keep the data order of this run: {'; '.join(found)}.")
    needed = look_ahead_steps(dataloader, args.gradient_accumulation_steps)
    if config.lead_steps < needed:
        raise ValueError(
            f"`switch_lead_steps` must be at least {needed} to cover the {look_ahead_batches(dataloader)} batches the "
            f"dataloader fetches ahead ({dataloader.num_workers} workers), got {config.lead_steps}. Set "
            f"`switch_lead_steps={needed}` (and `update_steps` to at least that), or lower "
            "`dataloader_num_workers` or `dataloader_prefetch_factor`."
        )


def context_length(model: Any) -> int | None:
    """Most positions the model takes, or None where its config does not say."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(getattr(model, "config", None), name, None)
        if isinstance(value, int):
            return value
    return None


def vocabulary_size(model: Any) -> int | None:
    """Rows of the model's input embedding, or None where it has none."""
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if get is not None else None
    return getattr(embedding, "num_embeddings", None)
