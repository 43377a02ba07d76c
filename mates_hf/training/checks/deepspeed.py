"""Which settings of DeepSpeed are supported: ZeRO 0 to 3, alone and with offload to the host. The others by name.

Where it is used: `parallel` asks, before the first step. Trade-off: the config is read as the user wrote it and as
accelerate completed it, because DeepSpeed's own objects say what they do, but not by which setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

_Found = Callable[[Any], bool]


def _is_on(value: Any) -> bool:
    """True of a flag, or of a section that does not turn itself off."""
    return bool(value.get("enabled", True)) if isinstance(value, Mapping) else bool(value)


def _is_many(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _is_nvme(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("device") == "nvme"


# Path in the config, what is refused there, why, and what works instead.
_REFUSED: tuple[tuple[str, _Found, str, str], ...] = (
    ("zero_optimization.zero_hpz_partition_size", _is_many, "keeps a second partition of the weights in each node, "
     "which a probe does not write", "set it to 1"),
    ("zero_optimization.zero_quantized_weights", _is_on, "rounds weights whenever they are gathered",
     "set it to false"),
    ("zero_optimization.zero_quantized_nontrainable_weights", _is_on, "rounds weights whenever they are gathered",
     "set it to false"),
    ("zero_optimization.zero_quantized_gradients", _is_on, "rounds gradients in a way that a probe's are not",
     "set it to false"),
    ("zero_optimization.offload_optimizer", _is_nvme, "puts optimizer state on NVMe", "set its `device` to `cpu`"),
    ("zero_optimization.offload_param", _is_nvme, "puts weights on NVMe", "set its `device` to `cpu`"),
    ("zero_optimization.offload_optimizer.super_offload", _is_on, "lets another process take the steps",
     "set it to false"),
    ("zero_optimization.zenflow", _is_on, "updates a part of the weights in each step", "leave it out"),
    ("zero_optimization.mics_shard_size", _is_many, "shards weights over a part of the processes", "leave it out"),
    ("compile.deepcompile", _is_on, "compiles the gathering of weights for the run's own passes", "set it to false"),
    ("torch_autocast", _is_on, "is entered by the engine, around which a probe runs the model",
     "set `bf16.enabled` instead"),
    ("tensor_parallel.autotp_size", _is_many, "splits a row over processes (tensor parallelism)", "set it to 1"),
    ("pipeline", lambda value: isinstance(value, Mapping) and _is_many(value.get("stages")),
     "splits the model over processes (pipeline parallelism)", "leave it out"),
    ("sequence_parallel_size", _is_many, "splits a row over processes", "set it to 1"),
    ("expert_parallel", _is_on, "gives each process other experts", "leave it out"),
    ("compression_training", bool, "changes weights in the engine", "leave it out"),
    ("progressive_layer_drop", _is_on, "drops layers in the engine", "leave it out"),
    ("data_efficiency", _is_on, "makes a data order of its own", "leave it out"),
    ("curriculum_learning", _is_on, "shortens rows in the engine", "leave it out"),
)  # fmt: skip


def deepspeed_refusals(args: Any, state: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Reasons why a probe could not look into a run of DeepSpeed, each with the way out.

    Args:
        args: the run's `TrainingArguments`; None in a loop without a Trainer.
        state: accelerate's shared state.
        model: the model that trains, unwrapped.

    Returns:
        One text a reason, none where it is supported.
    """
    configs = _configs(args, state)
    found = []
    for path, is_refused, why, way in _REFUSED:
        if any(is_refused(value) for value in (_look_up(config, path) for config in configs) if value is not None):
            found.append(f"DeepSpeed's `{path}` {why}: {way}")
    if any(_stage(config) == 0 and _in_16_bits(config) for config in configs):
        found.append(
            "DeepSpeed in 16 bits without ZeRO (`zero_optimization.stage` 0) keeps float32 copies in a way that "
            "is not known: set the stage to 1"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("deepspeed.moe", "deepspeed.module_inject", "deepspeed.pipe")):
            found.append(
                f"`{name}` is a {type(module).__name__} of DeepSpeed, whose experts or layers are spread over "
                "processes: use the model's own layers"
            )
            break
    if any(_is_reentrant(module) for module in model.modules()):
        found.append(
            "reentrant gradient checkpointing hides gradients from a probe under DeepSpeed: set "
            "`gradient_checkpointing_kwargs={'use_reentrant': False}`"
        )
    return found


def _configs(args: Any, state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config of the run, as written and as completed, as far as they are found."""
    plugins = state.get("deepspeed_plugins") or {}
    plugins = list(plugins.values()) if isinstance(plugins, Mapping) else [plugins]
    found = [getattr(plugin, "deepspeed_config", None) for plugin in plugins]
    found.append(getattr(getattr(args, "hf_deepspeed_config", None), "config", None))
    given = getattr(args, "deepspeed", None)
    if isinstance(given, str) and Path(given).is_file():
        given = json.loads(Path(given).read_text(encoding="utf-8"))
    return [config for config in (*found, given) if isinstance(config, Mapping)]


def _look_up(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _stage(config: Mapping[str, Any]) -> Any:
    stage = _look_up(config, "zero_optimization.stage")
    return 0 if stage is None else stage


def _in_16_bits(config: Mapping[str, Any]) -> bool:
    return any(_look_up(config, f"{kind}.enabled") is True for kind in ("bf16", "bfloat16", "fp16"))


def _is_reentrant(module: nn.Module) -> bool:
    """True of a layer that was told to recompute, in the way that torch's `checkpoint` does with `use_reentrant`."""
    function = vars(module).get("_gradient_checkpointing_func")
    told = getattr(function, "keywords", None) or {}
    return bool(getattr(module, "gradient_checkpointing", False)) and told.get("use_reentrant") is True
