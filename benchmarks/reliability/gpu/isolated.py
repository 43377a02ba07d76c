"""A part in a process of its own: an error of the card, or too little memory, ends that part and no other one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.lab.machine import ROOT, temporary_folder
from benchmarks.reliability.gpu.device import Task

CHILD = "benchmarks.reliability.gpu.child"
GRACE_SECONDS = 30.0  # behind a part's own time, which it keeps by itself


def in_child(call: str, task: Task) -> dict[str, Any]:
    """What a function gives for a task; `error` where its process failed or did not end.

    `call` is `module:function`.
    """
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    limit = None if task.seconds == float("inf") else task.seconds + GRACE_SECONDS
    with temporary_folder(None) as folder:
        out = folder / "result.json"
        told = json.dumps({**dataclasses.asdict(task), "call": call, "out": str(out)})
        try:
            done = subprocess.run(
                [sys.executable, "-m", CHILD], input=told, text=True, env=environment, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return {"done": False, "error": f"did not end within {limit:.0f} s"}
        if not out.exists():
            return {"done": False, "error": f"its process ended with code {done.returncode}"}
        return dict(json.loads(out.read_text(encoding="utf-8")))
