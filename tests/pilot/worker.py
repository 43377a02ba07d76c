"""Runs a pilot in a process of its own, which the test kills: `python worker.py '{"out": ..., ...}'`."""

from __future__ import annotations

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    from mates_hf.pilot.run import run_pilot

    given = json.loads(sys.argv[1])
    run_pilot(given.pop("out"), given.pop("pool"), given.pop("reference"), progress=False, **given)
