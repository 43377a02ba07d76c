"""`mates-hf env`: versions, devices and threads, to paste into a bug report.

Where it is used: by whoever reports a fault. Trade-off: of the environment's variables only the names are printed,
never a value, because values name hosts, users and keys.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

from mates_hf.cli.printing import print_lines

_PACKAGES = (
    "mates-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "huggingface_hub",
    "numpy", "scipy", "numba", "llvmlite", "pyarrow", "tqdm", "lm-eval", "evaluate", "matplotlib",
)  # fmt: skip
_IF_THERE = (
    "peft", "trl", "deepspeed", "bitsandbytes", "flash-attn", "kernels", "liger-kernel", "torchao", "triton",
    "xformers", "apex", "datatrove", "optuna", "wandb", "tensorboard", "trackio", "scikit-learn", "jinja2",
)  # fmt: skip
# Only whether they are set: values may name hosts, users and keys.
_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "SLURM_JOB_ID",
)  # fmt: skip
_PREFIXES = ("ACCELERATE_", "FSDP_", "NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "DEEPSPEED_", "NUMBA_")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def add_command(commands: Any) -> None:
    """Add `env` to the subparsers."""
    command = commands.add_parser("env", help="print versions and devices, to paste into a bug report")
    command.set_defaults(run=_env)


def _env(arguments: argparse.Namespace) -> int:
    """Print the environment."""
    del arguments
    print_lines(describe_environment())
    return 0


def describe_environment() -> Iterator[str]:
    """Lines with versions, torch's build and devices, threads, and the names of the variables that steer a launch."""
    yield f"python: {platform.python_version()} ({platform.python_implementation()})"
    yield f"platform: {platform.platform()}"
    for name in _PACKAGES:
        yield f"{name}: {version_of(name) or 'not installed'}"
    yield from (f"{name}: {version}" for name in _IF_THERE if (version := version_of(name)))
    yield from _torch_lines()
    threads = [f"{name}={os.environ[name]}" for name in _THREAD_VARIABLES if name in os.environ]
    yield f"threads: {os.cpu_count()} CPUs, {_usable_cpus()} usable{''.join(', ' + text for text in threads)}"
    found = sorted(name for name in os.environ if name in _VARIABLES or name.startswith(_PREFIXES))
    yield f"set in the environment: {', '.join(found) or 'none of those that steer a launch'}"


def version_of(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cpus() -> int:
    """CPUs this process may run on; containers and schedulers often allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _torch_lines() -> Iterator[str]:
    """Torch's build, its devices besides the CPU, and its threads."""
    try:
        import torch
    except (ImportError, OSError) as error:
        # Only the kind: the message of a library that cannot be loaded names where it was looked for.
        yield f"accelerators: unknown, torch cannot be imported ({type(error).__name__})"
        return
    built = [f"{name} {value}" for name, value in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)) if value]
    if torch.backends.cudnn.is_available():
        built.append(f"cuDNN {torch.backends.cudnn.version()}")
    yield f"torch build: {', '.join(built) or 'CPU'}, commit {torch.version.git_version}"
    names = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    if not names and torch.backends.mps.is_available():
        names = ["mps"]
    yield f"accelerators: {', '.join(names) or 'none'}"
    backends = [name for name in ("nccl", "gloo", "mpi") if _has_backend(name)]
    yield f"torch threads: {torch.get_num_threads()}, process group backends: {', '.join(backends) or 'none'}"


def _has_backend(name: str) -> bool:
    """True where torch was built with this process group backend."""
    import torch.distributed as dist

    return dist.is_available() and bool(getattr(dist, f"is_{name}_available")())
