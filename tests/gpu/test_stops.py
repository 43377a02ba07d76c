"""Micro-batches run without a wait for the card, as torch itself sees it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mates_hf.influence.passes import mean_loss_gradient, token_losses
from mates_hf.influence.probe_directional import DirectionalProbe
from tests.influence.test_probes import chain_rows, task


def waits(work: Callable[[], Any]) -> int:
    """Synchronising calls that torch warns of."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def test_micro_batches_wait_once_at_their_end(make_tiny_model: Callable[..., Any], cuda: torch.device) -> None:
    model = make_tiny_model().to(cuda).eval()
    rows = chain_rows(64, 0, 1, length=16)
    ids = torch.from_numpy(rows.values.astype(np.int64)).view(-1, 16)[:4].to(cuda)
    token_losses(model, rows)
    with torch.no_grad():
        own = waits(lambda: model(input_ids=ids, use_cache=False))
    assert waits(lambda: token_losses(model, rows, tokens_per_batch=64)) <= 16 * own + 2
    assert waits(lambda: mean_loss_gradient(model, rows, tokens_per_batch=64)) <= 16 * own + 2


def test_a_fused_optimizers_counters_are_read_at_once(make_tiny_model: Callable[..., Any], cuda: torch.device) -> None:
    model = make_tiny_model().to(cuda).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    mean_loss_gradient(model, chain_rows(8, 0, 1))
    optimizer.step()
    probe = DirectionalProbe(path_steps=4, path_rate=0.5, epsilon=1e-3)
    passages, num = task(chain_rows(16, 2, 1)), len(list(model.parameters()))
    assert waits(lambda: probe.compute_direction(model, optimizer, passages)) < num + 16
