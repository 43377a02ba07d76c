"""`mates-hf`: what a person asks from a shell.

`mates-hf env` prints what a bug report needs, `mates-hf round PATH` what a finished round did, `mates-hf verify RUN`
whether a run's rounds are what they must be, `mates-hf cost RUN_DIR` what they took. Place in the flow: right of
everything, and the only module that prints. Trade-off: rounds are read from their directories alone, so it works on a
machine without torch and shows nothing that a round did not record.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mates_hf.records import FloatArray, MatesError
from mates_hf.reporting.cost import run_cost
from mates_hf.round_files import RoundRecord, load_round
from mates_hf.training.verify import report_lines, verify_run

_PACKAGES = (
    "mates-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "huggingface_hub",
    "numpy", "scipy", "scikit-learn", "numba", "llvmlite", "pyarrow", "tqdm", "lm-eval", "evaluate", "matplotlib",
    "jinja2",
)  # fmt: skip
_IF_THERE = (
    "peft", "trl", "deepspeed", "bitsandbytes", "flash-attn", "kernels", "liger-kernel", "torchao", "triton",
    "xformers", "apex", "datatrove", "optuna", "wandb", "tensorboard", "trackio",
)  # fmt: skip
# Only whether they are set: values may name hosts, users and keys.
_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "SLURM_JOB_ID",
)  # fmt: skip
_PREFIXES = ("ACCELERATE_", "FSDP_", "NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "DEEPSPEED_", "NUMBA_")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None reads `sys.argv`.

    Returns:
        Exit status: 0, or 1 with one line on stderr where the command cannot be done or a run is not as it must be.
    """
    parser = argparse.ArgumentParser(prog="mates-hf", description="Model-aware pretraining data selection.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print versions and devices, to paste into a bug report")
    of_round = commands.add_parser("round", help="print a summary of a finished round")
    of_round.add_argument("path", metavar="PATH", help="a round directory, <output_dir>/_mates/round-0003")
    of_run = commands.add_parser("verify", help="recompute a run's selections and check everything its rounds left")
    of_run.add_argument("path", metavar="RUN", help="a run's output_dir, or its _mates")
    of_run.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    of_cost = commands.add_parser("cost", help="print seconds and FLOPs of a run's training, rounds and evaluations")
    of_cost.add_argument("path", metavar="RUN_DIR", help="a run's output_dir")
    of_cost.add_argument("--rounds-dir", help="where its rounds are, if not in RUN_DIR/_mates")
    of_cost.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "verify":
            return _verify(arguments.path, as_json=arguments.json)
        if arguments.command == "cost":
            return _cost(arguments.path, arguments.rounds_dir, as_json=arguments.json)
        lines = describe_environment() if arguments.command == "env" else describe_round(load_round(arguments.path))
        for line in lines:
            print(line)
    except (OSError, ValueError, MatesError) as error:
        print(f"mates-hf: {error}", file=sys.stderr)
        return 1
    return 0


def _verify(path: str, *, as_json: bool) -> int:
    """Print what `verify_run` found; 1 where something is wrong."""
    result = verify_run(path)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        for line in report_lines(result):
            print(line)
        if result.problem is not None:
            print(f"mates-hf: {result.problem}", file=sys.stderr)
    return int(result.problem is not None)


def _cost(path: str, rounds_dir: str | None, *, as_json: bool) -> int:
    """Print a run's ledger."""
    cost = run_cost(path, rounds_dir=rounds_dir)
    for line in [json.dumps(cost.to_dict(), indent=2)] if as_json else cost.lines():
        print(line)
    return 0


def describe_environment() -> Iterator[str]:
    """Lines with versions, torch's build and devices, threads, and the names of the variables that steer a launch."""
    yield f"python: {platform.python_version()} ({platform.python_implementation()})"
    yield f"platform: {platform.platform()}"
    for name in _PACKAGES:
        yield f"{name}: {_version(name) or 'not installed'}"
    yield from (f"{name}: {version}" for name in _IF_THERE if (version := _version(name)))
    yield from _torch_lines()
    threads = [f"{name}={os.environ[name]}" for name in _THREAD_VARIABLES if name in os.environ]
    yield f"threads: {os.cpu_count()} CPUs, {_usable_cpus()} usable{''.join(', ' + text for text in threads)}"
    found = sorted(name for name in os.environ if name in _VARIABLES or name.startswith(_PREFIXES))
    yield f"set in the environment: {', '.join(found) or 'none of those that steer a launch'}"


def _version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cpus() -> int:
    """CPUs this process may run on; containers and schedulers often allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def describe_round(record: RoundRecord) -> Iterator[str]:
    """Lines with a round's labels, guard decision and selection, then the other plain values of its `round.json`."""
    yield f"round: {record.path.name}"
    labels = record.labels
    probes = ", ".join(sorted({str(name) for name in labels.probe}))
    yield f"probed: {len(labels)} candidates ({probes or 'no probe'}), {int(labels.num_tokens.sum())} trained tokens"
    yield f"influence (nats/token, > 0 helps): {_spread(labels.influence)}"
    guard = record.info.get("guard")
    if isinstance(guard, Mapping):
        yield f"guard: {_plain(guard)}"
    if record.scores is not None:
        yield f"predicted influence of {len(record.scores)} candidates (nats/token): {_spread(record.scores)}"
    if record.selection is None:
        yield "selected: nothing; the run went on in the Trainer's own order"
    else:
        yield f"selected: {len(record.selection)} pool rows"
        mean = _mean_of_selected(record)
        if mean is not None:
            yield f"predicted influence of the selected rows (nats/token): mean {mean:+.3e}"
    for key, value in record.info.items():
        if key != "guard":
            yield f"{key}: {_plain(value)}"


def _mean_of_selected(record: RoundRecord) -> float | None:
    """Mean predicted influence of the selection, or None where its rows were not scored in this round."""
    if record.selection is None or record.candidates is None or record.scores is None or not len(record.selection):
        return None
    selected = np.isin(record.candidates, record.selection)
    return float(np.mean(record.scores[selected], dtype=np.float64)) if selected.any() else None


def _spread(values: FloatArray) -> str:
    """Mean, standard deviation and quantiles of (N,) values."""
    if not len(values):
        return "none"
    low, middle, high = np.quantile(np.asarray(values, np.float64), (0.1, 0.5, 0.9))
    return (
        f"mean {np.mean(values, dtype=np.float64):+.3e}, standard deviation {np.std(values, dtype=np.float64):.3e}, "
        f"10 % {low:+.3e}, median {middle:+.3e}, 90 % {high:+.3e}"
    )


def _plain(value: Any) -> str:
    """One line for a JSON value: numbers short, mappings as `key value`, long lists by their length."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        parts = (f"({_plain(part)})" if isinstance(part, Mapping) else _plain(part) for part in value.values())
        return ", ".join(f"{key} {part}" for key, part in zip(value, parts, strict=True))
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]" if len(value) <= 4 else f"{len(value)} values"
    return str(value)


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


if __name__ == "__main__":
    sys.exit(main())
