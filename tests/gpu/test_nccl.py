"""One process of a launcher, through NCCL on a card and gloo on a processor: a round runs and leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launch import ROOT, free_port

SCRIPT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from transformers import Trainer, default_data_collator
from mates_hf import MatesCallback
from mates_hf.engine.processes import _all_reduce_in_buckets
from tests.training.kit import make_arguments, make_model, make_pool, make_reference, small_config

on_card = torch.cuda.is_available()
arguments = make_arguments(Path(sys.argv[1]), use_cpu=not on_card, max_steps=12)
trainer = Trainer(model=make_model(), args=arguments, train_dataset=make_pool(), data_collator=default_data_collator)
MatesCallback(make_reference(), small_config(update_steps=4, switch_lead_steps=2)).attach(trainer)
trainer.train()
assert dist.is_initialized(), "the launcher's process group"
assert dist.get_backend() == ("nccl" if on_card else "gloo"), dist.get_backend()
where = "cuda" if on_card else "cpu"
tensors = [torch.full((n,), float(n), device=where) for n in (3, 5, 70_000, 2)]
for bucket in _all_reduce_in_buckets(tensors, True):
    while not bucket.is_completed():
        pass
    bucket.wait()
assert all((tensor == len(tensor)).all() for tensor in tensors)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_one_process_of_a_launcher(device: torch.device, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        **({} if device.type == "cuda" else {"ACCELERATE_USE_CPU": "true"}),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
    assert list((tmp_path / "out").glob("_mates/round-*/round.json"))
