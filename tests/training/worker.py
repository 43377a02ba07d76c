"""One process of a training run, for the tests that start several: settings in as JSON, what it saw out as JSON.

RANK=0 WORLD_SIZE=2 ... python tests/training/worker.py '{"output_dir": ..., "result": ...}'

With `"runs": {name: settings}` it does several runs, one after the other, because a start takes longer than a run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import default_data_collator

from benchmarks.lab.small_run import shard_with_fsdp2
from mates_hf import MatesCallback
from mates_hf.engine.processes import Processes
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from tests.training.context_parallel import share_rows
from tests.training.kit import (
    DIGITS,
    Stop,
    labels_in_chunks,
    make_arguments,
    make_pool,
    make_reference,
    run,
    small_config,
)
from tests.training.test_groups import collate
from tests.training.test_guard import Changed
from tests.training.test_score_column import random_scores, scored

torch.set_num_threads(1)


class SlowModel(NgramInfluenceModel):
    """Fits longer than the other processes would wait for a collective of theirs."""

    seconds = 0.0

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(SlowModel.seconds)
        return super().fit(*args, **kwargs)


class DyingProbe(DirectionalProbe):
    """One process dies outright while all of them measure."""

    def measure(self, *args: Any, **kwargs: Any) -> Any:
        if os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().measure(*args, **kwargs)


def _probe(settings: dict[str, Any]) -> Any:
    if "turns_at" in settings:  # labels are the reverse of what they were from that step on
        return Changed(DirectionalProbe(), settings["turns_at"], "negative")
    return DyingProbe() if settings.get("dies") else None


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as told and return what this process saw."""
    rank = os.environ.get("RANK", "0")
    own_dir = f"-of-{rank}" if settings.get("own_dirs") and rank != "0" else ""
    args = make_arguments(Path(settings["output_dir"] + own_dir), **settings.get("args", {}))
    SlowModel.seconds = settings.get("fit_seconds", 0.0)
    callback = MatesCallback(
        make_reference(),
        small_config(**settings.get("config", {})),
        probe=_probe(settings),
        influence_model=SlowModel() if settings.get("fit_seconds") else None,
    )
    stop = Stop(settings.get("stop_at", args.max_steps))
    seen: list[int] = []  # whole rows, where the forward pass sees parts of them

    def prepare(trainer: Any) -> None:
        if "cp_size" in settings:
            share_rows(
                trainer, settings["cp_size"], lambda ids: seen.extend((ids[:, 0] * DIGITS + ids[:, 1]).tolist())
            )
        elif settings.get("fsdp2"):
            shard_with_fsdp2(trainer)

    with_scores = settings.get("scored", False)
    pool = scored(random_scores()) if with_scores else make_pool(settings.get("num_rows", 400))
    collator = collate if with_scores else default_data_collator
    finished = run(args, [stop, callback], pool, resume=settings.get("resume"), collator=collator, prepare=prepare)
    trainer = finished.trainer
    sharded = any(hasattr(parameter, "to_local") for parameter in trainer.model.parameters())
    return {
        "chunked": labels_in_chunks(trainer.model, trainer.optimizer, Processes.of_run()) if sharded else None,
        "rows": seen or finished.rows,
        "sharded": sharded,
        "losses": finished.losses,
        "rounds": [entry for entry in finished.trainer.state.log_history if "mates/round" in entry],
    }


def one_of_several(settings: dict[str, Any]) -> dict[str, Any]:
    """A run after which the next one may be sharded in another way; the process group stays."""
    try:
        return main(settings)
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    result = {name: one_of_several(run) for name, run in given["runs"].items()} if "runs" in given else main(given)
    Path(f"{given['result']}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
