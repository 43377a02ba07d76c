"""Many rounds: what the process holds and what lies on disk do not grow with their number."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from mates_hf import MatesCallback, NgramInfluenceModel
from tests.training.kit import make_arguments, make_pool, make_reference, run, small_config

NUM_ROUNDS, KEEP = 20, 3
SETTLED = 4  # rounds after which every library has opened what it keeps open


class Look(TrainerCallback):
    """Counts after each round of two steps."""

    def __init__(self, rounds_dir: Path) -> None:
        self.rounds_dir = rounds_dir
        self.handles: list[int] = []
        self.maps: list[int] = []
        self.entries: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 2 == 0 and state.global_step < state.max_steps:
            self.handles.append(len(os.listdir("/proc/self/fd")))
            lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
            self.maps.append(sum(str(self.rounds_dir) in line for line in lines))
            self.entries.append(len(list(self.rounds_dir.glob("round-*"))))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux shows in /proc")
def test_many_rounds_hold_no_more_than_a_few(tmp_path: Path) -> None:
    look = Look(tmp_path / "_mates")
    config = small_config(update_steps=2, num_probes=10, keep_rounds=KEEP)
    args = make_arguments(tmp_path, max_steps=2 * NUM_ROUNDS + 2, logging_strategy="no")
    callback = MatesCallback(make_reference(6), config, influence_model=NgramInfluenceModel(num_buckets=256))
    result = run(args, [callback, look], make_pool(240))
    assert len(look.handles) == NUM_ROUNDS
    assert max(look.handles[SETTLED:]) <= look.handles[SETTLED]
    assert max(look.maps) <= 2  # the order in training and the next one
    assert max(look.entries[SETTLED:]) == KEEP
    assert sum("mates/round" in entry for entry in result.trainer.state.log_history) == NUM_ROUNDS
