"""One process of an evaluated training run, for the tests that start several: settings in and results out as JSON.

RANK=0 WORLD_SIZE=2 ... python tests/evaluation/worker.py '{"output_dir": ...}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from mates_hf.evaluation import Evaluator, LmEvalCallback
from tests.evaluation.kit import make_model, make_pool, make_tokenizer
from tests.training.kit import make_arguments
from tests.training.worker import shard_with_fsdp2

torch.set_num_threads(1)


class SlowEvaluator(Evaluator):
    """Takes longer to read its tasks than the other processes would wait for a collective of theirs."""

    seconds = 0.0

    @property
    def loaded(self) -> dict[str, Any]:
        if self._loaded is None:
            time.sleep(SlowEvaluator.seconds)
        return super().loaded


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as told and return what this process saw."""
    rank = os.environ.get("RANK", "0")
    # Only the main process has the data: no file system need be shared.
    data_dir = settings["data_dir"] if rank == "0" else "/nowhere"
    callbacks = []
    if settings["evaluates"]:
        callback = LmEvalCallback(
            settings["tasks"], make_tokenizer(), every_steps=2, limit=5, batch_size=3, metadata={"data_dir": data_dir}
        )
        SlowEvaluator.seconds = settings.get("seconds", 0.0)
        callback.evaluator.__class__ = SlowEvaluator
        callbacks.append(callback)
    model = make_model(double=False, attention_dropout=0.1)
    if settings.get("breaks"):
        with torch.no_grad():
            model.lm_head.weight[5] = float("nan")
    trainer = Trainer(
        model=model,
        args=make_arguments(Path(f"{settings['output_dir']}-{rank}"), **{"max_steps": 4, **settings.get("args", {})}),
        train_dataset=make_pool(),
        callbacks=callbacks,
    )
    if settings.get("fsdp2"):
        shard_with_fsdp2(trainer)
    trainer.train()
    sharded = any(hasattr(parameter, "to_local") for parameter in trainer.model.parameters())
    return {"log": trainer.state.log_history, "sharded": sharded}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Path(f"{given['result']}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(main(given)), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
