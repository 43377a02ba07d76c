"""One process of a run on a stream: settings in as JSON, what it saw out as JSON.

RANK=0 WORLD_SIZE=2 ... python tests/training/stream_worker.py '{"output_dir": ...}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mates_hf import MatesCallback, MatesStream
from tests.training.kit import Stop, make_arguments, make_pool, make_reference, run, small_config

# Rounds at steps 6, 12, 18 and 24. Buffers begin at other rows than steps and rounds do.
CONFIG = {"update_steps": 6, "switch_lead_steps": 5, "num_probes": 20}
BUFFER_ROWS = 50
STEPS = 30


def source(num_rows: int = 1000) -> Any:
    """A stream of several shards, of rows that tell their number."""
    return make_pool(num_rows).to_iterable_dataset(num_shards=4)


class Killed(TrainerCallback):
    """The process dies outright after a step, which lies inside a buffer."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(settings: dict[str, Any], spool_dir: str | None = None) -> dict[str, Any]:
    """Train as told and return what this process saw."""
    args = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 7, **settings.get("args", {})}
    callback = MatesCallback(make_reference(8), small_config(**{**CONFIG, **settings.get("config", {})}))
    others = [Stop(settings["stop_at"])] if "stop_at" in settings else []
    others += [Killed(settings["killed_at"])] if "killed_at" in settings else []
    stream = MatesStream(source(), BUFFER_ROWS, spool_dir=spool_dir)
    arguments = make_arguments(Path(settings["output_dir"]), **args)
    finished = run(arguments, [callback, *others], stream, resume=settings.get("resume"))
    rounds = [entry for entry in finished.trainer.state.log_history if "mates/round" in entry]
    return {"rows": finished.rows, "losses": finished.losses, "rounds": rounds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    given, rank = json.loads(sys.argv[1]), os.environ.get("RANK", "0")
    if given.get("spawn"):
        torch.multiprocessing.set_start_method("spawn")
    folder = f"{given['spool_dir']}-{rank}" if "spool_dir" in given else None
    result = train(given, folder)
    Path(f"{given['result']}-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
