"""`mates-hf`: what a person asks from a shell.

`mates-hf env` prints what a bug report needs, `mates-hf round RUN` what a finished round did, `mates-hf verify RUN`
whether a run's rounds are what they must be, `mates-hf cost RUN` what they took. Where it is used: right of
everything, and the only module that prints. Trade-off: rounds are read from their directories alone, so it works on a
machine without torch and shows nothing that a round did not record. What a command needs is imported when it runs, so
that `mates-hf env` works in an installation that is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mates_hf.errors import MatesError

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None reads `sys.argv`.

    Returns:
        Exit status: 0; 1 with one line on stderr where the command cannot be done or a run is not as it must be; 2
        with the help where no command was given (and, as `SystemExit`, where arguments are wrong).
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status = int(arguments.run(arguments))
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else None
        what = f"`{missing}` must be installed and is not: `pip install {missing}`" if missing else str(error)
        print(f"mates-hf: {what}", file=sys.stderr)
        return 1
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        print(f"mates-hf: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    """All commands; each sets `run`, a function of the arguments that returns the exit status."""
    parser = argparse.ArgumentParser(prog="mates-hf", description="Model-aware pretraining data selection.")
    parser.add_argument("--version", action="version", version=f"mates-hf {_own_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    command = commands.add_parser("env", help="print versions and devices, to paste into a bug report")
    command.set_defaults(run=_env)

    command = commands.add_parser("round", help="print what a finished round did")
    command.add_argument("path", metavar="PATH", help="a run's output_dir, its _mates, or a round directory in it")
    command.add_argument("number", metavar="NUMBER", nargs="?", type=int, help="which round; the newest by default")
    command.add_argument("--json", action="store_true", help="print all that it recorded as one JSON object")
    command.set_defaults(run=_round)

    command = commands.add_parser("verify", help="recompute a run's selections and check everything its rounds left")
    command.add_argument("path", metavar="RUN", help="a run's output_dir, or its _mates")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    command.set_defaults(run=_verify)

    command = commands.add_parser("cost", help="print seconds and FLOPs of a run's training, rounds and evaluations")
    command.add_argument("path", metavar="RUN", help="a run's output_dir, or its _mates")
    command.add_argument("--rounds-dir", help="where its rounds are, if not in RUN/_mates")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=_cost)
    return parser


def _own_version() -> str:
    """The version of the package that runs, which need not be the one that is installed."""
    return str(getattr(sys.modules.get("mates_hf"), "__version__", None) or _version("mates-hf") or "unknown")


def _expected_errors() -> tuple[type[Exception], ...]:
    """What is said in one line; anything else is a fault of this program and keeps its traceback."""
    return (OSError, ValueError, MatesError)


def _print(lines: Iterable[str]) -> None:
    """Print lines; a reader that has seen enough (`mates-hf round RUN | head`) is no error."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit, so what is left over needs somewhere to go.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_json(value: Any) -> None:
    """Print a JSON object that strict readers take."""
    from mates_hf.reporting.lines import finite

    _print([json.dumps(finite(value), indent=2, allow_nan=False)])


def _env(arguments: argparse.Namespace) -> int:
    """Print the environment."""
    del arguments
    _print(describe_environment())
    return 0


def _round(arguments: argparse.Namespace) -> int:
    """Print a round, the newest one of a run by default."""
    from mates_hf.reporting.lines import round_json, round_lines
    from mates_hf.round_files import load_round, newest_round

    record = load_round(newest_round(arguments.path, arguments.number))
    if arguments.json:
        _print_json(round_json(record))
    else:
        _print(round_lines(record))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    """Print what `verify_run` found; 1 where something is wrong."""
    from mates_hf.training.verify import report_lines, verify_run

    result = verify_run(arguments.path)
    if arguments.json:
        _print_json(result.to_dict())
    else:
        _print(report_lines(result))
        if result.problem is not None:
            print(f"mates-hf: {result.problem}", file=sys.stderr)
    return int(result.problem is not None)


def _cost(arguments: argparse.Namespace) -> int:
    """Print a run's ledger."""
    from mates_hf.reporting.cost import run_cost

    cost = run_cost(arguments.path, rounds_dir=arguments.rounds_dir)
    if arguments.json:
        _print_json(cost.to_dict())
    else:
        _print(cost.lines())
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
