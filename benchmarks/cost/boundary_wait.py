"""How long training waits at a boundary for what needs no device: fit, score and select, beside training and not.

Two runs of a real `Trainer` on the same pool, one with rounds beside training and one whose influence model says that
it must be waited for, as all were before. Both train on the same rows, which is checked. What the probe takes is in
neither figure. Training has one core, the round another.

Trade-off: steps of a tiny model on a CPU, slowed down to the length of a step that a device would take; the round is
the library's own at its full size.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.lab.corpus import as_column
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import temporary_folder
from benchmarks.lab.models import llama, trainer_of
from benchmarks.lab.tables import figure
from mates_hf import DirectionalProbe, MatesCallback, MatesConfig, NgramInfluenceModel, ReferenceTask, load_round

LENGTH, VOCAB, NUM_PROBES, UPDATE, LEAD, BATCH = 64, 512, 2_000, 128, 32, 2
MOST = 0.25


class Attended(NgramInfluenceModel):
    """Fitted and asked while training waits."""

    runs_beside_training = False


def make_pool(num_rows: int) -> Dataset:
    """Random rows of one length, as int32, in Arrow."""
    values = np.random.default_rng(0).integers(3, VOCAB, num_rows * LENGTH, dtype=np.int32)
    return as_column(values, LENGTH, ("input_ids", "labels"))


def train(pool: Dataset, influence_model: Any, step_seconds: float) -> dict[str, Any]:
    """One run of one round; seconds that its stages took and that training waited for them, and what it selected."""
    from transformers import TrainerCallback

    class Slower(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(step_seconds)

    model = llama(VOCAB, width=16, inner=32, layers=1, heads=2, length=LENGTH, tied=False)
    config = MatesConfig(
        update_steps=UPDATE, num_probes=NUM_PROBES, candidate_scope="pool", on_weak_signal="select", average_steps=0,
        switch_lead_steps=LEAD,
    )  # fmt: skip
    reference = ReferenceTask.from_dataset(make_pool(32).remove_columns("labels"), input_ids_column="input_ids")
    with temporary_folder(None) as folder:
        trainer = trainer_of(model, pool, folder, UPDATE + LEAD + UPDATE, BATCH, [Slower()])
        MatesCallback(reference, config, probe=DirectionalProbe(), influence_model=influence_model).attach(trainer)
        trainer.train()
        record = load_round(folder / "_mates" / "round-0001")
        stages = {name: stage["seconds"] for name, stage in record.info["stages"].items()}
        waited = "mates/waited_seconds"
        waits = [entry[waited] for entry in trainer.state.log_history if waited in entry]
        work = sum(stages[name] for name in ("fit", "score", "select"))
        return {
            "stages": stages,
            "work": work,
            "waited": waits[0] if waits else work,
            "candidates": record.info["num_candidates"],
            "order_sha256": record.info["order_sha256"],
        }


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    num_rows, step_seconds = (24_000, 0.02) if bench.quick else (1_003_000, 0.2)
    pool = make_pool(num_rows)
    train(make_pool(8_000), Attended(), 0.0)  # kernels are compiled, and kept
    raw = {
        "while training waits": train(pool, Attended(), step_seconds),
        "beside training": train(pool, NgramInfluenceModel(), step_seconds),
    }
    before, after = raw.values()
    if before["order_sha256"] != after["order_sha256"]:
        raise RuntimeError("Both runs must select the same rows, in the same order.")
    figures = [
        figure("candidates", before["candidates"], "rows"),
        figure("fit, score and select while training waits", before["waited"], "s"),
        figure("the same beside training, of which training waits", after["waited"], "s"),
        figure("the same beside training, its work", after["work"], "s"),
        figure("waits, beside against not", after["waited"] / before["waited"], "x", most=MOST),
    ]
    settings = {
        "tokens a row": LENGTH, "probes": NUM_PROBES, "switch_lead_steps": LEAD, "least seconds a step": step_seconds,
    }  # fmt: skip
    return bench.figures(settings, figures, raw)
