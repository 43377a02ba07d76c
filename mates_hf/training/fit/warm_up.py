"""The warm-up of a fit: some hundred steps of a plain `transformers.Trainer` on the pool, in checkpoints.

Where it is used: `selector_fit`. A public checkpoint has no optimizer state, and influence is measured along what the
optimizer would do. So the model is trained a little, as people pretrain: AdamW, clipping, weight decay, a constant
rate. The last steps' mean of the weights is kept too, since labels are steadier there (`engine/averaging`).

The probe is a second Trainer, which resumes the last checkpoint and measures before its first step. So a fit that was
killed measures the same weights and moments, bit for bit, also on a device whose training is not repeatable. The
weights are thrown away afterwards; the folder of the model is never written to.

Trade-off: a model is loaded twice and a checkpoint written and read, which is seconds next to the steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mates_hf.data.rows import IGNORED
from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.digest import weight_marks
from mates_hf.engine.model_traits import accepts, unwrap
from mates_hf.engine.processes import Processes
from mates_hf.errors import MatesError
from mates_hf.records import STATE_KEY
from mates_hf.training import resume
from mates_hf.training.checkpoints import last_complete_checkpoint, num_random_states
from mates_hf.training.checks.trainer import own_memory
from mates_hf.training.fit.settings import FitSettings

logger = logging.getLogger(__name__)

AVERAGE_FILE = "average.safetensors"
_NUM_SAVES = 4  # checkpoints on the way, of which the last two are kept
_LEAST_BETWEEN = 25  # steps between two of them

Measure = Callable[[nn.Module, Any, WeightAverage, TrainingArguments], Any]
"""Measures the model with its optimizer; called in all processes, before a step is taken."""


def training_arguments(settings: FitSettings, folder: Path) -> TrainingArguments:
    """The Trainer's arguments. Making them connects the processes of a launch.

    Args:
        settings: How the selector is fitted.
        folder: Where checkpoints go; it is not made yet.

    Returns:
        The arguments.

    Raises:
        ValueError: the batch cannot be shared out over the processes, or the device has no bfloat16.
    """
    fields = TrainingArguments.__dataclass_fields__
    recompute = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    further: dict[str, Any] = {recompute: True} if settings.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.warm_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warm_steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=settings.device == "cpu" or not _has_accelerator(),
        bf16=_computes_in_bfloat16(settings),
        save_strategy="no",  # the callback below says when
        save_total_limit=2,
        logging_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,  # our own bar says what is going on, and nothing is written to stdout
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **further,
    )
    if arguments.n_gpu > 1:  # one process would wrap the model in DataParallel; `accelerate launch` takes them all
        arguments._n_gpu = 1
    size = arguments.world_size
    if settings.batch_size % size:
        raise ValueError(
            f"`batch_size` must be a multiple of the number of processes, got {settings.batch_size} and {size}. Set "
            f"`batch_size={-(-settings.batch_size // size) * size}`."
        )
    each = settings.batch_size // size
    at_once = max(num for num in range(1, min(each, settings.micro_batch_size) + 1) if each % num == 0)
    arguments.per_device_train_batch_size = at_once
    arguments.gradient_accumulation_steps = each // at_once
    return arguments


def _has_accelerator() -> bool:
    """Whether there is a device other than the CPU."""
    if hasattr(torch, "accelerator"):  # from torch 2.6 on
        return bool(torch.accelerator.is_available())
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _computes_in_bfloat16(settings: FitSettings) -> bool:
    if settings.dtype != "auto":
        return settings.dtype == "bfloat16"
    return settings.device == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


class PadRows:
    """The collator: rows of one batch padded on the right, without a tokenizer.

    Args:
        model: Says whether it takes a mask.
    """

    def __init__(self, model: nn.Module) -> None:
        self._masks = accepts(unwrap(model), "attention_mask")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Ids, labels and, where the model takes one, the mask, each (B, L) int64."""
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.zeros((len(rows), longest), dtype=torch.int64),
            "labels": torch.full((len(rows), longest), IGNORED, dtype=torch.int64),
            "attention_mask": torch.zeros((len(rows), longest), dtype=torch.int64),
        }
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = torch.as_tensor(row["input_ids"])
            batch["labels"][i, :length] = torch.as_tensor(row["labels"])
            batch["attention_mask"][i, :length] = 1
        if not self._masks:
            del batch["attention_mask"]
        return batch


def is_warm(settings: FitSettings, folder: Path) -> bool:
    """Whether the last checkpoint of the warm-up is there, with the mean of its weights."""
    found = last_complete_checkpoint(folder)
    return found == str(folder / f"checkpoint-{settings.warm_steps}") and (folder / AVERAGE_FILE).exists()


def warm_up(
    model: nn.Module, dataset: Any, arguments: TrainingArguments, settings: FitSettings, *, progress: bool
) -> None:
    """Train on some rows of the pool, from the last checkpoint on where there is one. All processes must call it.

    Args:
        model: The model, which is changed.
        dataset: A `datasets.Dataset` of the rows to train on.
        arguments: The Trainer's arguments.
        settings: How the selector is fitted.
        progress: Whether to show a progress bar.
    """
    folder = Path(str(arguments.output_dir))
    callback = _WarmUp(settings, folder, progress)
    start = last_complete_checkpoint(folder)
    _trainer(model, dataset, arguments, callback).train(resume_from_checkpoint=start)


def measured(
    model: nn.Module, dataset: Any, arguments: TrainingArguments, settings: FitSettings, measure: Measure
) -> Any:
    """What `measure` finds at the end of the warm-up. All processes must call it.

    Args:
        model: The model as it was before the warm-up; it is changed.
        dataset: A `datasets.Dataset` of the rows that were trained on.
        arguments: The Trainer's arguments.
        settings: How the selector is fitted.
        measure: Called once, with the model and the optimizer of the last checkpoint.

    Returns:
        What `measure` returned.
    """
    folder = Path(str(arguments.output_dir))
    arguments.max_steps = settings.warm_steps + 1  # a Trainer that has nothing to do resumes nothing
    arguments.ignore_data_skip = True
    callback = _Measure(measure, folder / AVERAGE_FILE)
    checkpoint = str(folder / f"checkpoint-{settings.warm_steps}")
    _trainer(model, dataset, arguments, callback).train(resume_from_checkpoint=checkpoint)
    return callback.found


def _trainer(model: nn.Module, dataset: Any, arguments: TrainingArguments, callback: TrainerCallback) -> Trainer:
    trainer = Trainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=PadRows(model), callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Resumes(TrainerCallback):
    """Proves that the Trainer restored every parameter of the checkpoint that it resumes."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the weights with their marks; put back what the Trainer left out."""
        saved = state.stateful_callbacks.get(STATE_KEY) if state.global_step else None
        if state.global_step and not saved:
            raise MatesError(
                f"The checkpoint at step {state.global_step} in `{args.output_dir}` must be of this fit, and was "
                "written by something else. Delete that folder, and fit again."
            )
        if saved:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            resume.check_weights(unwrap(kwargs["model"]), saved["weights"], folder)


class _WarmUp(_Resumes):
    """Averages the last weights, says when a checkpoint is written, and shows how far the warm-up is.

    Args:
        settings: How the selector is fitted.
        folder: Where checkpoints go.
        progress: Whether to show a progress bar.
    """

    def __init__(self, settings: FitSettings, folder: Path, progress: bool) -> None:
        self._end, self._window, self._folder, self._progress = (
            settings.warm_steps, settings.window_steps, folder, progress,
        )  # fmt: skip
        self._average: WeightAverage | None = None
        self._bar: Any = None

    @own_memory
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the weights with those of the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        shown = self._progress and state.is_world_process_zero
        self._bar = tqdm(total=self._end, initial=state.global_step, desc="warm-up", disable=not shown, leave=False)

    @own_memory
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the weights into the mean inside the window; ask for a checkpoint where one is due."""
        step, model, processes = state.global_step, unwrap(kwargs["model"]), Processes.of_run()
        self._bar.update()
        if step > self._end - self._window:
            if self._average is None:
                self._average = WeightAverage(model, processes)
            self._average.update()
        if step == self._end:
            assert self._average is not None
            self._average.save(self._folder / AVERAGE_FILE, processes)
        # None inside the window: a mean that is half done is not kept, so it is begun anew.
        every = max(self._end // _NUM_SAVES, _LEAST_BETWEEN)
        if step == self._end or (step % every == 0 and step <= self._end - self._window):
            num = num_random_states(args.world_size, args.save_on_each_node)
            marks = weight_marks(model, processes)
            state.stateful_callbacks[STATE_KEY] = {
                "version": resume.STATE_VERSION, "step": step, "weights": marks, "num_random_states": num,
            }  # fmt: skip
            control.should_save = True
            processes.meet()  # a disk that is full fails the main process alone

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the mean and the bar."""
        self._average = None
        self._bar.close()


class _Measure(_Resumes):
    """Measures the model that was resumed, before a step is taken.

    Args:
        measure: What to do with the model and its optimizer.
        average_path: The mean of the last weights.

    Attributes:
        found: What it returned.
    """

    def __init__(self, measure: Measure, average_path: Path) -> None:
        self._measure, self._average_path = measure, average_path
        self.found: Any = None

    @own_memory
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the mean of the weights, and measure."""
        super().on_train_begin(args, state, control, **kwargs)
        model, processes = unwrap(kwargs["model"]), Processes.of_run()
        average = WeightAverage(model, processes, on_host=torch.cuda.is_available())
        if not average.load(self._average_path, processes):
            raise MatesError(
                f"`{self._average_path}` must hold the mean of the weights, and is gone. Delete "
                f"`{self._average_path.parent}`, and fit again."
            )
        self.found = self._measure(model, kwargs["optimizer"], average, args)
        processes.meet()
