"""A run of a compiled model selects, and its probes measure what those of the plain model do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, default_data_collator

from mates_hf import MatesCallback, load_round
from tests.training.kit import make_arguments, make_model, make_pool, make_reference, small_config


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 cannot")
def test_a_compiled_run_measures_what_a_plain_one_does(device: torch.device, tmp_path: Path) -> None:
    on_card = device.type == "cuda"
    compiled = {"torch_compile": True, "torch_compile_backend": "inductor" if on_card else "eager"}
    found = []
    for name, settings in (("plain", {}), ("compiled", compiled)):
        arguments = make_arguments(tmp_path / name, use_cpu=not on_card, max_steps=12, **settings)
        trainer = Trainer(
            model=make_model(), args=arguments, train_dataset=make_pool(), data_collator=default_data_collator
        )
        MatesCallback(make_reference(), small_config(update_steps=4, switch_lead_steps=2)).attach(trainer)
        trainer.train()
        found.append(load_round(tmp_path / name / "_mates" / "round-0001").labels.influence_per_token)
    assert np.corrcoef(*found)[0, 1] > (0.98 if on_card else 0.9999)
