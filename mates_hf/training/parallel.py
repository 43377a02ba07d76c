"""Which ways of training on several devices are supported: one model in every process, or FSDP2. The others by name.

Place in the flow: part of what `checks` refuses before the first step. Trade-off: a probe needs plain forward passes
of the live model at weights it wrote, and the optimizer's state parameter by parameter; where an engine keeps either
in buffers of its own, it is refused rather than probed wrongly.
"""

from __future__ import annotations

from typing import Any

from torch import nn

DATA_PARALLEL = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU",
                 "MULTI_HPU", "FSDP")  # fmt: skip


def parallel_refusals(args: Any, model: nn.Module) -> list[str]:
    """Reasons why a probe could not run in this arrangement of processes and devices, each with the way out.

    Args:
        args: the run's `TrainingArguments`.
        model: the model that trains, unwrapped.

    Returns:
        One text a reason, none where it is supported.
    """
    from accelerate.state import AcceleratorState

    found = []
    if args.n_gpu > 1:
        found.append(
            f"nn.DataParallel (`n_gpu` is {args.n_gpu}) splits each batch behind the sampler: make one GPU visible, "
            "or start one process a GPU with `accelerate launch`"
        )
    state = AcceleratorState._shared_state
    kind = getattr(state.get("distributed_type"), "name", "NO")
    if getattr(args, "deepspeed", None) or kind == "DEEPSPEED":
        found.append(
            "DeepSpeed (`deepspeed`) keeps weights and optimizer state in flat buffers of its own, which a probe "
            "cannot move or read by parameter: train with FSDP2 (`fsdp`) or DDP"
        )
    elif kind not in DATA_PARALLEL:
        found.append(f"accelerate's {kind} is not supported: train with DDP or FSDP2")
    modules = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in modules or "XlaFullyShardedDataParallel" in modules:
        found.append(
            "FSDP1 flattens the parameters that a probe has to move one by one: use FSDP2 (`fsdp_config` with "
            "`version: 2`, `fully_shard`)"
        )
    sharded = [name for name, parameter in model.named_parameters() if hasattr(parameter, "to_local")]
    if sharded and not any(hasattr(module, "unshard") for module in model.modules()):
        found.append(
            f"tensor parallelism (`{sharded[0]}` is a DTensor that FSDP2 did not make) is not supported: train with "
            "DDP or FSDP2"
        )
    parallelism = state.get("parallelism_config")
    if parallelism is not None and getattr(parallelism, "non_data_parallel_size", 1) > 1:
        found.append(
            "`parallelism_config` with tensor, context or sequence parallelism splits a row over processes: set "
            "those sizes to 1"
        )
    return found
