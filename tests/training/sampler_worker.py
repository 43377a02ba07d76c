"""One of several processes that trains with each kind of sampler, with and without the callback, and notes its rows.

RANK=0 WORLD_SIZE=2 ... python tests/training/sampler_worker.py '{"output_dir": ..., "result": ..., "fsdp2": false}'
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler, SubsetRandomSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from mates_hf.errors import MatesError
from tests.training.kit import Stop
from tests.training.settings import Setup, mates, pad, ragged_pool
from tests.training.worker import shard_with_fsdp2

torch.set_num_threads(1)
RANK = int(os.environ["RANK"])


class Curriculum(Sampler):
    """A sampler of one's own: every second row first, then the others; nothing but its rows and a length."""

    def __len__(self) -> int:
        return 200

    def __iter__(self) -> Iterator[int]:
        yield from range(0, 200, 2)
        yield from range(1, 200, 2)


class OwnStream(Curriculum):
    """Another order in each process, as one has that draws from a stream of the process's own."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(200, generator=torch.Generator().manual_seed(RANK)).tolist()


def sampled_by(make: Any) -> type[Trainer]:
    """A Trainer with this sampler."""

    class Sampled(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return make(self.train_dataset)

    return Sampled


def lengths(dataset: Any) -> list[int]:
    return [len(row) for row in dataset["input_ids"]]


UNSEEDABLE = {"accelerator_config": {"use_seedable_sampler": False}}
KINDS: dict[str, dict[str, Any]] = {
    "sequential": {"trainer_class": sampled_by(SequentialSampler)},
    "grouped": {"trainer_class": sampled_by(lambda pool: LengthGroupedSampler(8, lengths=lengths(pool)))},
    "grouped, synchronised": {
        "trainer_class": sampled_by(lambda pool: LengthGroupedSampler(8, lengths=lengths(pool))),
        "args": UNSEEDABLE,
    },
    "subset": {"trainer_class": sampled_by(lambda pool: SubsetRandomSampler(range(0, 200, 2)))},
    "unseedable": {"args": UNSEEDABLE},
    "own": {"trainer_class": sampled_by(lambda pool: Curriculum())},
}
REFUSED: dict[str, dict[str, Any]] = {
    "own stream": {"trainer_class": sampled_by(lambda pool: OwnStream())},
    "uneven": {"args": {"accelerator_config": {"even_batches": False}}, "pool": lambda: ragged_pool(204)},
}


def setup_of(kind: dict[str, Any]) -> Setup:
    return Setup(**{"pool": ragged_pool, "collator": pad, **kind})


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of each kind without the callback, with it, and over a stop before the first selection."""
    found: dict[str, Any] = {}
    prepare = shard_with_fsdp2 if settings["fsdp2"] else lambda trainer: None
    root = Path(settings["output_dir"])

    def train(setup: Setup, name: str, callbacks: list[Any], resume: Any = None, **args: Any) -> list[int]:
        trainer = setup.build(root / name, callbacks, **args)
        prepare(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.seen_rows

    for number, (name, kind) in enumerate(KINDS.items()):
        if name not in settings["kinds"]:
            continue
        setup, saves = setup_of(kind), {"save_strategy": "steps", "save_steps": 3}
        plain = train(setup, f"plain-{number}", [])
        ours = train(setup, f"ours-{number}", [mates()], **saves)
        stopped = train(setup, f"stopped-{number}", [mates(), Stop(3)], **saves)
        resumed = train(setup, f"stopped-{number}", [mates()], resume=str(root / f"stopped-{number}/checkpoint-3"))
        found[name] = {"number": number, "plain": plain, "ours": ours, "stopped": [*stopped, *resumed]}
    for name, kind in REFUSED.items():
        if name in settings["kinds"]:
            try:
                train(setup_of(kind), f"refused-{RANK}-{name}", [mates()])
                found[name] = "not refused"
            except MatesError as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    result = main(given)
    Path(f"{given['result']}-{RANK}.json").write_text(json.dumps(result), encoding="utf-8")
    torch.distributed.destroy_process_group()
