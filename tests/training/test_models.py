"""Model families in a real run: a round selects, its rows are trained on in order, and a resumed run ends the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, default_data_collator

from mates_hf import MatesCallback, load_round
from tests.prediction.test_models import FAMILIES
from tests.training.kit import Result, Watch, assert_same, make_arguments, make_pool, make_reference, small_config
from tests.training.settings import ORDER, proves

STEPS, BATCH = 12, 4


def run_family(family: str, output_dir: Path, resume: str | None = None, **changes: Any) -> Result:
    watch = Watch()
    with torch.random.fork_rng():
        model = FAMILIES[family]()
    watch.watch(model)
    trainer = Trainer(
        model=model,
        args=make_arguments(output_dir, **{"max_steps": STEPS, "learning_rate": 1e-3, **changes}),
        train_dataset=make_pool(),
        data_collator=default_data_collator,
        callbacks=[MatesCallback(make_reference(6), small_config(update_steps=5, num_probes=16)), watch],
    )
    trainer.train(resume_from_checkpoint=resume)
    return Result(trainer, watch)


@pytest.mark.quick("gpt2", "mixtral", "mamba")
@proves(f"models: {', '.join(sorted(FAMILIES))}", ORDER, note="small ones of each architecture")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_selects_and_its_rows_are_trained_on(family: str, tmp_path: Path) -> None:
    result = run_family(family, tmp_path)
    record = load_round(tmp_path / "_mates" / "round-0001")
    assert record.info["guard"]["decision"] == "select"
    assert np.isfinite(record.labels.influence).all()
    assert record.labels.influence.std() > 0
    assert record.info["fidelity"]["spearman"] > 0.5
    start = record.info["from_step"] * BATCH
    end = record.info["to_step"] * BATCH
    np.testing.assert_array_equal(result.rows[start:end], record.selection)
    assert np.isfinite(result.losses).all()


@pytest.mark.parametrize(
    "family",
    ["gpt_neox", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "gemma", "gpt2", "mamba"))],
)
def test_a_resumed_run_ends_with_the_same_bits(family: str, tmp_path: Path) -> None:
    """Untied heads (which some versions of transformers leave unrestored), tied ones, experts; with dropout on."""
    changes = {"save_strategy": "steps", "save_steps": 8}
    whole = run_family(family, tmp_path, **changes)
    resumed = run_family(family, tmp_path, str(tmp_path / "checkpoint-8"), **changes)
    assert resumed.rows == whole.rows[8 * BATCH :]
    resumed.losses = whole.losses[:8] + resumed.losses[-(STEPS - 8) :]
    resumed.streams = whole.streams[:8] + resumed.streams
    assert_same(whole, resumed)
