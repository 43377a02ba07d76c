"""Settings that are arguments and nothing more: each selects, and leaves no trace until it does."""

from __future__ import annotations

import pytest
import torch

from tests.training.settings import Setup, case, check

WORKERS = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}

ARGUMENTS = [
    case("defaults", {}),
    case("`train_sampling_strategy=\"sequential\"`", {"train_sampling_strategy": "sequential"}),
    case("`dataloader_num_workers`, `dataloader_prefetch_factor`", WORKERS,
         note="`switch_lead_steps` must cover workers x prefetch; else refused with the number"),
    case("`dataloader_persistent_workers`", {**WORKERS, "dataloader_persistent_workers": True}),
    case("`dataloader_pin_memory=False`", {"dataloader_pin_memory": False}),
    case("`dataloader_multiprocessing_context=\"spawn\"`",
         {**WORKERS, "dataloader_multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
    case("`split_batches`", {"accelerator_config": {"split_batches": True}}),
    case("`use_seedable_sampler=False`", {"accelerator_config": {"use_seedable_sampler": False}}),
    case("`even_batches=False`", {"accelerator_config": {"even_batches": False}}),
    case("`data_seed`", {"data_seed": 7}),
    case("`full_determinism`", {"full_determinism": True}),
    case("`gradient_accumulation_steps`", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    case("`accelerator_config.gradient_accumulation_kwargs`",
         {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}),
    case("`max_grad_norm=0`", {"max_grad_norm": 0}),
    case("`weight_decay`", {"weight_decay": 0.1}),
    case("`num_train_epochs` in place of `max_steps`", {"max_steps": -1, "num_train_epochs": 0.26}),
    case("`lr_scheduler_type=\"cosine\"`, `warmup_steps`", {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    case("`average_tokens_across_devices=False`", {"average_tokens_across_devices": False}),
    case("`include_num_input_tokens_seen`", {"include_num_input_tokens_seen": "all"}),
    case("`skip_memory_metrics=False`", {"skip_memory_metrics": False}),
    case("`torch_empty_cache_steps`", {"torch_empty_cache_steps": 2}),
    case("`use_cache`", {"use_cache": True}),
    case("`logging_nan_inf_filter=False`", {"logging_nan_inf_filter": False}),
    case("bf16 autocast (`bf16`)", {"bf16": True}),
    case("NEFTune (`neftune_noise_alpha`)", {"neftune_noise_alpha": 5.0},
         note="probes run in eval mode, without the noise"),
    case("activation checkpointing, not reentrant",
         {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}),
    case("activation checkpointing, reentrant",
         {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}),
    case("`torch_compile`", {"torch_compile_backend": "eager"}, note="probes run eagerly"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _deterministic_algorithms_off():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.quick("train-sampling*", "dataloader-num-workers*", "split*", "use-seedable*", "even*", "gradient*",
                   "max-grad*", "num-train*", "bf16*", "activation-*-reentrant", "torch-compile")  # fmt: skip
@pytest.mark.parametrize(("setting", "args"), ARGUMENTS)
def test_an_argument(tmp_path, setting, args):
    check(tmp_path, Setup(args=args))
