"""Which ways of training on several devices are supported: DDP, FSDP2 and DeepSpeed's ZeRO. The others by name.

Where it is used: part of what `checks` refuses before the first step. Trade-off: a probe needs plain forward passes
of the live model at weights it wrote, and the optimizer's state parameter by parameter; where an engine keeps either
in buffers of its own, it is refused rather than probed wrongly.

Context parallelism of accelerate splits rows in the Trainer's training step and nowhere else. A probe does not enter
it: its rows are whole and go to all processes, as with FSDP2 alone. They must fit into a device (`checks/whole_rows`).
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch import nn

from mates_hf.training.checks.deepspeed import deepspeed_refusals

DATA_PARALLEL = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU",
                 "MULTI_HPU", "FSDP")  # fmt: skip

# Dimensions over which accelerate, transformers and torch make FSDP2's meshes: rows are split along all of them.
DATA_DIMENSIONS = ("dp_shard", "dp_shard_cp", "dp_replicate", "dp", "dp_cp", "fsdp", "efsdp", "hsdp", "ddp", "shard",
                   "replicate", "world")  # fmt: skip
_FP8_PACKAGES = ("transformer_engine", "torchao.float8", "msamp")


def parallel_refusals(args: Any, model: nn.Module) -> list[str]:
    """Reasons why a probe could not run in this arrangement of processes and devices, each with the way out.

    Args:
        args: the run's `TrainingArguments`; None in a loop without a Trainer.
        model: the model that trains, unwrapped.

    Returns:
        One text a reason, none where it is supported.
    """
    from accelerate.state import AcceleratorState

    found = []
    num_gpus = getattr(args, "n_gpu", 1)
    if num_gpus > 1:
        found.append(
            f"nn.DataParallel (`n_gpu` is {num_gpus}) splits each batch behind the sampler: make one GPU visible, "
            "or start one process a GPU with `accelerate launch`"
        )
    state = AcceleratorState._shared_state
    kind = getattr(state.get("distributed_type"), "name", "NO")
    if getattr(args, "deepspeed", None) or kind == "DEEPSPEED":
        found += deepspeed_refusals(args, state, model)
    elif kind not in DATA_PARALLEL:
        found.append(f"accelerate's {kind} is not supported: train with DDP, FSDP2 or DeepSpeed's ZeRO")
    modules = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in modules or "XlaFullyShardedDataParallel" in modules:
        found.append(
            "FSDP1 flattens the parameters that a probe has to move one by one: use FSDP2 (`fsdp_config` with "
            "`version: 2`, `fully_shard`)"
        )
    parallelism = state.get("parallelism_config")
    found += _row_refusals(parallelism) or _context_refusals(args, parallelism, model)
    found += _placement_refusals(model) + _load_time_refusals(model)
    found += _device_refusals(model)
    precision = _fp8(state, args, model)
    if precision is not None:
        found.append(
            f"fp8 ({precision}) scales by what earlier forward passes saw, outside of parameters and buffers, and a "
            "probe's passes would move that: train in bf16 (`bf16=True`)"
        )
    return found


def context_parallel_size() -> int:
    """Number of processes that train on one row together, by accelerate's `cp_size`; 1 where each has its own."""
    from accelerate.state import AcceleratorState

    return getattr(AcceleratorState._shared_state.get("parallelism_config"), "cp_size", None) or 1


def loader_refusals(dataloader: Any) -> list[str]:
    """Whether processes that train on one row together are given the same rows.

    Args:
        dataloader: The prepared training dataloader.

    Returns:
        One text, or none.
    """
    size = context_parallel_size()
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    num_shares = getattr(getattr(dataloader, "batch_sampler", None), "num_processes", 1)
    if size == 1 or num_shares * size == world:
        return []
    return [
        f"with `cp_size={size}` {world} processes must train on {max(1, world // size)} shares of a batch, but the "
        f"training dataloader makes {num_shares}: use the one that `Trainer.get_train_dataloader` makes"
    ]


def _row_refusals(parallelism: Any) -> list[str]:
    """Sizes of accelerate's `ParallelismConfig` by which processes share a row's computation, by their names."""
    sizes = {name: getattr(parallelism, name, None) or 1 for name in ("tp_size", "sp_size")}
    named = [f"`{name}={size}`" for name, size in sizes.items() if size > 1]
    by_context = getattr(parallelism, "cp_size", None) or 1
    if not named and getattr(parallelism, "non_data_parallel_size", 1) > by_context:
        named = [f"`non_data_parallel_size` of {parallelism.non_data_parallel_size}"]
    if not named:
        return []
    return [
        f"`parallelism_config` with {' and '.join(named)} has processes share the computation of a row, also in a "
        "probe: set it to 1, and make `dp_shard_size` as many times larger (FSDP2). Activation checkpointing makes "
        "room for long rows, and so does `cp_size` in training"
    ]


def _context_refusals(args: Any, parallelism: Any, model: nn.Module) -> list[str]:
    """What context parallelism lacks to be one of which only the training step knows."""
    if context_parallel_size() == 1:
        return []
    name = f"`cp_size={parallelism.cp_size}`"
    if args is None:
        return [
            f"{name} is supported in a `transformers.Trainer` alone, of which it is known where it splits rows: train "
            "with `MatesCallback(...).attach(trainer)`, or set it to 1"
        ]
    found = []
    if not _is_by_fsdp2(model):
        found.append(f"{name} is supported with FSDP2 alone: set `fsdp` and `fsdp_config` with `version: 2`")
    backend = getattr(parallelism, "cp_backend", None) or "torch"
    if backend != "torch":
        found.append(f"{name} is supported with torch's ring attention alone, got `cp_backend={backend!r}`: leave it")
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention not in (None, "sdpa"):
        found.append(
            f"{name} splits rows for SDPA alone, and the model's attention is `{attention}`: load it with "
            "`attn_implementation='sdpa'`"
        )
    return found


def _placement_refusals(model: nn.Module) -> list[str]:
    """Parameters that are spread over processes in another way than FSDP2 spreads them over all of the run's."""
    by_fsdp2, managed = _is_by_fsdp2(model), _managed_by_fsdp2(model)
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "to_local"):
            continue
        if not by_fsdp2 or (managed and id(parameter) not in managed):
            return [
                f"tensor parallelism (`{name}` is a DTensor that FSDP2 did not make) is not supported: train with DDP "
                "or FSDP2"
            ]
        why = _strange_placement(parameter)
        if why is not None:
            return [
                f"a mesh for more than data parallelism (`{name}` {why}) is not supported: train with DDP, or with "
                "FSDP2 alone over a mesh whose dimensions are `dp_replicate` and `dp_shard`"
            ]
    return []


def _is_by_fsdp2(model: nn.Module) -> bool:
    return any(hasattr(module, "unshard") for module in model.modules())


def _managed_by_fsdp2(model: nn.Module) -> set[int]:
    """Ids of the parameters that FSDP2 gathers and scatters, as far as this torch tells."""
    asked: list[Any] = [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    states = [module._get_fsdp_state() for module in asked]
    groups = [group for state in states for group in getattr(state, "_fsdp_param_groups", ())]
    groups += [getattr(state, "_fsdp_param_group", None) for state in states]
    parts = [part for group in groups for part in getattr(group, "fsdp_params", ())]
    return {id(getattr(part, "sharded_param", None)) for part in parts}


def _strange_placement(parameter: Any) -> str | None:
    """What of a DTensor's placement is not FSDP2's: shards over all processes, or copies of such shards (HSDP)."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return None
    names = mesh.mesh_dim_names or ()
    other = [name for i, name in enumerate(names) if mesh.size(i) > 1 and name not in DATA_DIMENSIONS]
    if other:
        return f"has the mesh dimension {', '.join(repr(name) for name in other)}"
    kinds = [type(placement).__name__ for placement in parameter.placements]
    kinds = [kind for i, kind in enumerate(kinds) if mesh.size(i) > 1 or kind != "Replicate"]
    if kinds and (kinds[-1] != "Shard" or set(kinds[:-1]) - {"Replicate"}):
        return f"is placed as {', '.join(kinds)}"
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return None if mesh.size() == world else f"is spread over {mesh.size()} of {world} processes"


def _load_time_refusals(model: nn.Module) -> list[str]:
    """What transformers set up when it loaded the model (`tp_plan`, `distributed_config`), which no engine shows."""
    sizes = {"tp": getattr(model, "_tp_size", None) or 1}
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    for name in ("pp", "tp", "ep"):
        asked = config.get(f"{name}_size") if isinstance(config, dict) else getattr(config, f"{name}_size", None)
        sizes[name] = max(sizes.get(name, 1), asked or 1)
    mesh: Any = getattr(model, "_device_mesh", None)
    for i, name in enumerate(getattr(mesh, "mesh_dim_names", None) or ()):
        if name not in DATA_DIMENSIONS:
            sizes[name] = max(sizes.get(name, 1), mesh.size(i))
    more = [f"{name} of {size}" for name, size in sizes.items() if size > 1]
    if any(type(module).__module__.startswith("torch.distributed.pipelining") for module in model.modules()):
        more.append("torch.distributed.pipelining")
    if not more:
        return []
    return [
        f"the model was loaded with tensor, expert or pipeline parallelism ({', '.join(more)}), by which processes "
        "share rows: load it without `tp_plan` and with those sizes of `distributed_config` at 1"
    ]


def _device_refusals(model: nn.Module) -> list[str]:
    """Parameters that are where no probe can read or move them."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            return [
                f"`{name}` is on the `meta` device: its values are offloaded (`device_map` with `cpu` or `disk`) or "
                "were never loaded, and a probe could not move them: load the model without offload, or shard it with "
                "FSDP2 (`fsdp`)"
            ]
        if parameter.device.type == "xla":
            return [f"`{name}` is on an XLA device, which is not supported: train on CPU, CUDA, XPU, NPU or MPS"]
    return []


def _fp8(state: dict[str, Any], args: Any, model: nn.Module) -> str | None:
    """What says that the run computes in fp8, or None."""
    # The environment is what accelerate reads where the run says nothing.
    asked = state.get("_mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if "fp8" in (asked, getattr(args, "mixed_precision", None)):
        return "`mixed_precision='fp8'`"
    for name, module in model.named_modules():
        owner = type(module).__module__
        if owner.startswith(_FP8_PACKAGES):
            return f"`{name}` is a {type(module).__name__} of {owner.split('.')[0]}"
    for name, parameter in model.named_parameters():
        if type(parameter.data).__module__.startswith(_FP8_PACKAGES):
            return f"`{name}` is a {type(parameter.data).__name__}"
    return None
