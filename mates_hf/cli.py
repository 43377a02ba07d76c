"""`mates-hf`: what a person asks from a shell.

`mates-hf env` prints what a bug report needs, `mates-hf round PATH` what a finished round did. Place in the flow:
right of everything, and the only module that prints. Trade-off: the summary of a round is read from its directory
alone, so it works on a machine without torch and shows nothing the round did not record.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mates_hf.records import FloatArray, MatesError, RoundRecord, load_round

_PACKAGES = (
    "mates-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "huggingface_hub",
    "numpy", "scipy", "scikit-learn", "numba", "pyarrow", "tqdm", "lm-eval", "evaluate", "matplotlib", "jinja2",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None reads `sys.argv`.

    Returns:
        Exit status: 0, or 1 with one line on stderr where the command cannot be done.
    """
    parser = argparse.ArgumentParser(prog="mates-hf", description="Model-aware pretraining data selection.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print versions and devices, to paste into a bug report")
    of_round = commands.add_parser("round", help="print a summary of a finished round")
    of_round.add_argument("path", metavar="PATH", help="a round directory, <output_dir>/_mates/round-0003")
    arguments = parser.parse_args(argv)
    try:
        lines = describe_environment() if arguments.command == "env" else describe_round(load_round(arguments.path))
        for line in lines:
            print(line)
    except (OSError, ValueError, MatesError) as error:
        print(f"mates-hf: {error}", file=sys.stderr)
        return 1
    return 0


def describe_environment() -> Iterator[str]:
    """Lines with the versions of Python and the packages, and the accelerators torch sees."""
    yield f"python: {platform.python_version()} ({platform.python_implementation()})"
    yield f"platform: {platform.platform()}"
    for name in _PACKAGES:
        try:
            yield f"{name}: {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: not installed"
    yield f"accelerators: {_accelerators()}"


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


def _accelerators() -> str:
    """Names of the devices torch can use besides the CPU."""
    try:
        import torch
    except ImportError as error:
        return f"unknown, torch cannot be imported ({error})"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA or ROCm {torch.version.cuda or torch.version.hip})"
    return "mps" if torch.backends.mps.is_available() else "none"


if __name__ == "__main__":
    sys.exit(main())
