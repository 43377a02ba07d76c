"""Labels do not depend on the attention kernel, and rows padded on the right take the flash path."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.attention import SDPBackend, sdpa_kernel

from mates_hf.influence.passes import mean_loss_gradient, token_losses
from mates_hf.influence.probe_directional import DirectionalProbe
from tests.influence.test_probes import chain_rows, join, task


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_labels_of_a_kernel_are_those_of_eager_attention(
    make_tiny_model: Callable[..., Any], device: torch.device, attention: str, request: pytest.FixtureRequest
) -> None:
    is_flash = attention == "flash_attention_2"
    if is_flash:
        request.getfixturevalue("cuda")
        if importlib.util.find_spec("flash_attn") is None:
            pytest.skip("needs flash-attn")
    # Flash attention has no head below eight.
    model = make_tiny_model(hidden_size=64, num_attention_heads=4).to(device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for seed in range(12):
        mean_loss_gradient(model, join(chain_rows(8, seed, 1), chain_rows(8, seed + 100, 5)))
        optimizer.step()
    optimizer.zero_grad()
    rows = join(*(chain_rows(10, 50 + stride, stride, length=6 + 2 * stride) for stride in (1, 3, 5, 7)))
    found = []
    for kind in ("eager", attention):
        model.set_attn_implementation(kind)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_flash):
            labels = DirectionalProbe(path_steps=2).measure(model, optimizer, task(chain_rows(16, 9, 1)), rows)
        found.append(labels.influence_per_token)
    assert spearmanr(*found).statistic > (0.97 if is_flash else 0.9999)


def test_padded_rows_take_the_flash_path(make_tiny_model: Callable[..., Any], cuda: torch.device) -> None:
    model = make_tiny_model(hidden_size=64, num_attention_heads=4).to(cuda, torch.bfloat16).eval()
    model.set_attn_implementation("sdpa")
    rows = join(chain_rows(4, 0, 1, length=16), chain_rows(4, 1, 1, length=9))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it cannot be taken, as with a mask
        found = token_losses(model, rows)
    with sdpa_kernel(SDPBackend.MATH):
        np.testing.assert_allclose(found, token_losses(model, rows), atol=0.1)
