"""Labels in bf16, and in fp16 with a gradient scaler, rank candidates as float32 labels do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import Trainer, TrainerCallback, default_data_collator

from mates_hf import MatesCallback
from mates_hf.influence.passes import mean_loss_gradient
from mates_hf.influence.probe_directional import DirectionalProbe
from tests.influence.test_probes import chain_rows, join, task
from tests.training.kit import make_arguments, make_model, make_pool, make_reference, small_config

SAME_ORDER = 0.97  # Spearman; 16 bits leave two to three digits of a loss


def live(make_tiny_model: Callable[..., Any], device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    model = make_tiny_model().to(device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=device.type == "cuda")
    for seed in range(20):
        mean_loss_gradient(model, join(chain_rows(8, seed, 1), chain_rows(8, seed + 100, 5)))
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def candidates() -> Any:
    return join(*(chain_rows(12, 50 + stride, stride) for stride in (1, 3, 5, 7)))


@pytest.mark.parametrize("path_steps", [1, 4])
@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_bf16_labels_rank_as_float32_labels(
    make_tiny_model: Callable[..., Any], device: torch.device, kind: str, path_steps: int
) -> None:
    model, optimizer = live(make_tiny_model, device)
    probe = DirectionalProbe(path_steps=path_steps, path_rate=0.5)
    exact = probe.measure(model, optimizer, task(chain_rows(32, 9, 1)), candidates()).influence_per_token
    if kind == "weights":
        model, optimizer = copy.deepcopy((model, optimizer))
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"):
        found = probe.measure(model, optimizer, task(chain_rows(32, 9, 1)), candidates()).influence_per_token
    assert spearmanr(found, exact).statistic > SAME_ORDER
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Scale(TrainerCallback):
    """The gradient scaler's factor after each step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.found = trainer, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scaler = self.trainer.accelerator.scaler
        self.found.append(0.0 if scaler is None else scaler.get_scale())


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_trainer_in_16_bits_selects_and_its_scaler_is_left_alone(
    device: torch.device, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "fp16":
        request.getfixturevalue("cuda")  # a processor has no gradient scaler for it
    found = {}
    for name in ("plain", "probed"):
        settings = {kind: True, "use_cpu": device.type == "cpu", "max_steps": 12}
        trainer = Trainer(
            model=make_model(), args=make_arguments(tmp_path / name, **settings), train_dataset=make_pool(),
            data_collator=default_data_collator,
        )  # fmt: skip
        scale = Scale(trainer)
        trainer.add_callback(scale)
        if name == "probed":
            MatesCallback(make_reference(), small_config(update_steps=4, switch_lead_steps=2)).attach(trainer)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[name] = (losses, scale.found)
    assert list((tmp_path / "probed").glob("_mates/round-*/round.json"))
    # Up to the switch both train on the same rows, and nothing that a probe does shows.
    # A card adds up gradients in any order.
    tolerance = 0 if device.type == "cpu" else 1e-3
    np.testing.assert_allclose(found["plain"][0][:6], found["probed"][0][:6], rtol=tolerance)
    assert found["plain"][1][:6] == found["probed"][1][:6]
