"""Several real processes of one run on this machine, as a launcher would start them; gloo, no accelerator."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests import forked
from tests.forked import ForkedProcess

ROOT = Path(__file__).resolve().parents[1]
FORKS = sys.platform == "linux"


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_processes(
    arguments: list[str], size: int, port: str, fresh: bool = False
) -> list[subprocess.Popen[str] | ForkedProcess]:
    """Python with these arguments, `size` times, each told its rank where there are several.

    They are forks of a process that has imported torch and transformers, or `fresh` interpreters.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if size > 1:
        environment |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "ACCELERATE_USE_CPU": "true"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {} for rank in range(size)]
    if FORKS and not fresh:
        return [forked.start(arguments, environment | own, rank) for rank, own in enumerate(ranks)]
    command = [sys.executable, *arguments]
    return [
        subprocess.Popen(command, cwd=ROOT, env=environment | own, stderr=subprocess.PIPE, text=True) for own in ranks
    ]


def run_script(folder: Path, source: str, *arguments: str, size: int = 2) -> None:
    """A script in several processes, all of which must end well; what they say on the way to an error is shown."""
    script = folder / "script.py"
    script.write_text(source, encoding="utf-8")
    processes = start_processes([str(script), *arguments], size, free_port())
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
