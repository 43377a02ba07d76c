"""One process of a loop of one's own with `MatesRounds`: settings in as JSON, the rows of all processes out as JSON.

RANK=0 WORLD_SIZE=2 ... python tests/training/loop_worker.py '{"output_dir": ..., "result": ...}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import default_data_collator

from mates_hf import MatesRounds
from tests.training.kit import make_model, make_pool, make_reference, small_config

torch.set_num_threads(1)


def named_weights(model: Any) -> Any:
    """Names and parameters, without what wraps the model."""
    return getattr(model, "module", model).named_parameters()


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train until `kill_at`, with a checkpoint each two steps, or to the end."""
    accelerator = Accelerator(cpu=True)
    folder, pool = Path(settings["output_dir"]), make_pool()
    model = make_model()
    if settings.get("fsdp2"):
        from torch.distributed.fsdp import fully_shard

        for part in (*model.model.layers, model):
            fully_shard(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if not settings.get("fsdp2"):
        model, optimizer = accelerator.prepare(model, optimizer)
    config = small_config(switch_lead_steps=3, **settings.get("config", {}))
    rounds = MatesRounds(make_reference(), pool, config, output_dir=folder, progress=False)
    accelerator.register_for_checkpointing(rounds)
    if "resume" in settings:
        accelerator.load_state(str(folder / f"state-{settings['resume']}"))
    seen: list[list[int]] = []
    refused = ""
    if accelerator.num_processes > 1:
        try:
            rounds.order(model, optimizer, batch_size=7, max_steps=20)
        except ValueError as error:
            refused = str(error)
    for step, rows in rounds.order(model, optimizer, batch_size=8, max_steps=20):
        batch = default_data_collator([pool[int(i)] for i in rows])
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(accelerator.gather(torch.tensor(rows)).tolist())
        if step % 2 == 1 and not settings.get("fsdp2"):
            accelerator.save_state(str(folder / f"state-{step}"))
        if step == settings.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
    whole = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in named_weights(model)}
    weights = {name: value.double().sum().item() for name, value in whole.items()}
    return {"rows": seen, "weights": weights, "refused": refused}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    found = main(given)
    Path(f"{given['result']}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
