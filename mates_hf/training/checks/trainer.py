"""What can be known before the first optimizer step: settings that would break the data order, by name.

Where it is used: `MatesCallback.on_train_begin` calls `check_run` before any step is taken and any file is written.
Trade-off: fail closed. A setting whose order of rows was not proven is refused, with the way out, rather than tried.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from accelerate.utils.memory import should_reduce_batch_size
from torch.utils.data import IterableDataset

from mates_hf.config import MatesConfig
from mates_hf.data.collated import Collator, collate, drawn_row, forked_rng, name_of, read_row
from mates_hf.data.pool import CandidatePool
from mates_hf.data.segments import ONE_DOCUMENT_A_ROW, is_packing_key
from mates_hf.engine.model_traits import vocabulary_size
from mates_hf.engine.processes import Processes
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.micro_batches import ProbeMemoryError
from mates_hf.paths import expand_path
from mates_hf.training.checks.parallel import loader_refusals, parallel_refusals
from mates_hf.training.own_order import find_sampler
from mates_hf.training.sampler import ScheduledSampler

P = ParamSpec("P")
T = TypeVar("T")


def look_ahead_batches(dataloader: Any) -> int:
    """Batches drawn beyond the one in training: workers x prefetch, and the one accelerate holds back."""
    workers = dataloader.num_workers
    return workers * (dataloader.prefetch_factor or 2) + 1 if workers else 1


def look_ahead_steps(dataloader: Any, accumulation: int) -> int:
    """Optimizer steps that `switch_lead_steps` must cover at least."""
    return math.ceil(look_ahead_batches(dataloader) / accumulation)


def refusals(args: Any, dataloader: Any, model: Any, config: MatesConfig) -> list[str]:
    """Reasons why this run cannot have its data order scheduled, each naming the setting and the way out."""
    found: list[str] = []
    if isinstance(getattr(dataloader, "dataset", None), IterableDataset):
        found.append(
            "a streaming pool (`train_dataset` is an IterableDataset) must be wrapped, as "
            "`train_dataset=MatesStream(dataset)`"
        )
        return found
    found += parallel_refusals(args, model)
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance":
        found.append("`train_sampling_strategy='batch_rebalance'` has no sampler: use another strategy")
    if getattr(args, "dataloader_in_order", True) is False:
        found.append("`dataloader_in_order=False` lets workers reorder batches: set it to True")
    accelerator = args.accelerator_config
    if getattr(accelerator, "dispatch_batches", None):
        found.append(
            "`accelerator_config.dispatch_batches=True` has one process read for all and hides the batch size: set it "
            "to False"
        )
    if getattr(dataloader, "use_stateful_dataloader", False):
        found.append("`use_stateful_dataloader=True` replays its own order on resume: set it to False")
    if not found and not (hasattr(dataloader, "set_sampler") and hasattr(dataloader, "get_sampler")):
        found.append(
            f"the training dataloader ({type(dataloader).__name__}) has no `set_sampler`: use the one that "
            "`Trainer.get_train_dataloader` makes"
        )
    elif not found:
        found += loader_refusals(dataloader) + _sampler_refusals(find_sampler(dataloader))
    found += _upload_refusals(args, config)
    return found


def _sampler_refusals(sampler: Any) -> list[str]:
    """What is wrong with the sampler that the schedule would replace."""
    if sampler is None:
        return [
            "the training dataloader has no sampler that could be replaced: let `Trainer.get_train_dataloader` make "
            "it from a map-style dataset, without a `batch_sampler` of your own"
        ]
    if isinstance(sampler, ScheduledSampler):
        return ["a run must have one MatesCallback, and another one has scheduled its rows already: give it one"]
    # WeightedRandomSampler and RandomSampler tell; any other that repeats rows is found at its first pass.
    if getattr(sampler, "replacement", False):
        return [
            f"a sampler with replacement ({type(sampler).__name__}) trains on rows more than once: use one without, "
            "and leave it to the selection to prefer some rows"
        ]
    return []


def _upload_refusals(args: Any, config: MatesConfig) -> list[str]:
    """Round directories hold users' tokens; a hub upload takes all of `output_dir` but names that begin with `_`."""
    if not args.push_to_hub or config.rounds_dir is None:
        return []
    output_dir, rounds_dir = Path(args.output_dir).resolve(), expand_path(config.rounds_dir).resolve()
    if rounds_dir.is_relative_to(output_dir) and not rounds_dir.relative_to(output_dir).as_posix().startswith("_"):
        return [
            f"`push_to_hub` would upload `rounds_dir` ({config.rounds_dir}), which lies in `output_dir` under a name "
            "that does not begin with `_`: leave `rounds_dir` out, or put it elsewhere"
        ]
    return []


def check_run(args: Any, dataloader: Any, model: Any, config: MatesConfig) -> None:
    """Refuse a run whose data order this library could not keep, or whose text it could not, before its first step.

    Args:
        args: the run's `TrainingArguments`.
        dataloader: its prepared training dataloader.
        model: the model that trains, unwrapped.
        config: the run's `MatesConfig`.

    Raises:
        UnsupportedSettingError: names every setting that stands in the way, and what to set instead.
    """
    found = refusals(args, dataloader, model, config)
    if found:
        raise UnsupportedSettingError(f"MatesCallback cannot select data in this run: {'; '.join(found)}.")


def check_look_ahead(args: Any, dataloader: Any, config: MatesConfig) -> None:
    """Refuse a selection that would take effect behind rows that the dataloader has fetched already.

    Args:
        args: the run's `TrainingArguments`.
        dataloader: the prepared training dataloader.
        config: what the run goes by, which is what it began with.

    Raises:
        ValueError: `switch_lead_steps` does not cover what the dataloader fetches ahead; says the number that would.
    """
    needed = look_ahead_steps(dataloader, args.gradient_accumulation_steps)
    if config.lead_steps < needed:
        raise ValueError(
            f"`switch_lead_steps` must be at least {needed} to cover the {look_ahead_batches(dataloader)} batches the "
            f"dataloader fetches ahead ({dataloader.num_workers} workers), got {config.lead_steps}. Set "
            f"`switch_lead_steps={needed}` (and `update_steps` to at least that), or lower "
            "`dataloader_num_workers` or `dataloader_prefetch_factor`."
        )


def check_pool(pool: CandidatePool, model: Any) -> None:
    """Refuse a pool whose rows are not what the model would be trained on one by one.

    Args:
        pool: everything that may be trained on.
        model: the model that trains.

    Raises:
        UnsupportedSettingError: the collator packs rows into one without a word of where they begin.
        ValueError: a token id of a few fixed rows is not in the model's vocabulary; names the row and the id.
    """
    if pool.collate_fn is not None:
        batch = _first_twice(pool, pool.collate_fn)
        num = len(batch.get("input_ids", "ab"))
        if num != 2 and not (num == 1 and any(is_packing_key(key) for key in batch)):
            raise UnsupportedSettingError(
                "A collator must make one row of the batch from one row of the dataset, or say where rows begin in "
                f"the one that it makes of several, got {num} from 2 by `{name_of(pool.collate_fn)}` and nothing that "
                "says so. Use one that gives `position_ids` that begin anew (`DataCollatorWithFlattening`), or one "
                f"that pads (`DataCollatorForLanguageModeling`). {ONE_DOCUMENT_A_ROW}"
            )
    if not pool.has_text:
        return
    size = vocabulary_size(model)
    for i in np.unique(np.linspace(0, len(pool) - 1, 64).astype(np.int64)).tolist():
        given = drawn_row(pool.dataset, i)
        with forked_rng(i):
            row = read_row(given, pool.collate_fn, f"pool row {i}", same_length=False)
        values = row.input_ids
        if size is not None and len(values) and (values.max() >= size or values.min() < 0):
            raise ValueError(
                f"Token ids must be in the model's vocabulary of {size}, got {int(values.max())} in pool row "
                f"{i}. The pool was tokenised with another tokenizer, or the embedding was not resized."
            )


def _first_twice(pool: CandidatePool, collate_fn: Collator) -> Mapping[str, Any]:
    """What the collator makes of the first row, given twice; refused by name where rows are no text and it fails."""
    try:
        return collate(pool.dataset, collate_fn, [0, 0])
    except Exception as error:
        row = drawn_row(pool.dataset, 0)
        if isinstance(row, Mapping) and "input_ids" not in row and not {"text", "messages"} & set(row):
            raise UnsupportedSettingError(
                f"The collator `{name_of(collate_fn)}` must make a batch of pool rows, got {type(error).__name__} for "
                f"row 0 with the keys {sorted(map(str, row))}: {error}. Let a processor make `pixel_values` or "
                "`input_features`, and `labels`, of each row, or use the collator that does."
            ) from error
        raise


def resume_caveats() -> list[str]:
    """What the installed versions get wrong when a run goes on inside an epoch; to be told before the first step.

    transformers 4 tells the dataloader its epoch before it skips the batches that were trained on, and accelerate
    before 1.15 forgets it there. The latter is found by trying.
    """
    from accelerate.data_loader import DataLoaderShard, skip_first_batches

    dataloader = DataLoaderShard(range(2))
    dataloader.set_epoch(1)
    if int(version("transformers").split(".")[0]) >= 5 or skip_first_batches(dataloader, 1).iteration == 1:
        return []
    return [
        f"accelerate {version('accelerate')} forgets the epoch where it skips the batches that a run was trained on "
        "before it stopped, so a run that resumes inside its second or a later epoch shuffles as in its first. "
        "MatesCallback keeps the order of its own run exact; a run without it, such as the control of a comparison, "
        "repeats some rows and leaves out others. Upgrade to accelerate 1.15 or transformers 5."
    ]


def own_memory(hook: Callable[P, T]) -> Callable[P, T]:
    """What runs out of memory in a hook is told as this library's: `auto_find_batch_size` must not start again.

    What goes wrong in the hook in one process ends it in all of them.

    Args:
        hook: Hook of the callback, or what stands for one in a loop without a Trainer.

    Returns:
        The same; it raises `ProbeMemoryError` in place of torch's error, by whose text accelerate knows it.
    """

    @functools.wraps(hook)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        with Processes.of_run().together():
            try:
                return hook(*args, **kwargs)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                raise ProbeMemoryError(
                    "A round must find memory beside the run, but memory ran out. Lower `probe_tokens_per_batch` or "
                    "`average_steps`, or the batch size of the run: a probe needs 2 to 3 times the trainable "
                    "parameters' bytes on top of it."
                ) from error

    return guarded
