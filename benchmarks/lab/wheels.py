"""Install what the benchmarks need from a folder of wheels, before anything but Python itself is imported.

Trade-off: it installs into the Python that runs it, so that a torch that is there, with the card's own CUDA, is used.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDED = ("mates-hf[report]", "pytest", "filelock")
IF_THERE = {"fasttext": "fasttext-wheel"}


def install_from(arguments: Sequence[str]) -> None:
    """Install from the folder that `--wheels` names among the arguments of a command line, if it is there."""
    folder = None
    for place, argument in enumerate(arguments):
        if argument == "--wheels" and place + 1 < len(arguments):
            folder = arguments[place + 1]
        elif argument.startswith("--wheels="):
            folder = argument.partition("=")[2]
    if folder is None:
        return
    wheels = Path(folder)
    if not list(wheels.glob("mates_hf-*.whl")):
        raise SystemExit(
            f"`--wheels` must name a folder with the wheels of mates-hf and what it needs, got {folder}. Make it on a "
            'machine with an index: `python -m pip wheel -w wheels ".[report]" pytest filelock fasttext-wheel`.'
        )
    found = [
        package for name, package in IF_THERE.items() if _has(wheels, package) and not importlib.util.find_spec(name)
    ]
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(wheels), *NEEDED, *found]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(
            f"`--wheels` must hold all that is missing, for this Python ({sys.version.split()[0]}) and this platform; "
            "pip says above what it does not find. Make the folder with the same Python on the same platform."
        )


def _has(wheels: Path, package: str) -> bool:
    return any(wheels.glob(f"{package.replace('-', '_')}-*.whl"))
