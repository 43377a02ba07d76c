"""The running mean of the weights: its swap leaves no trace, also where it fails, and holds no third copy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mates_hf.training import averaging
from mates_hf.training.averaging import WeightAverage

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from probe_speed import peak_bytes  # noqa: E402


def make(dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(300, 40, generator=generator).to(dtype)) for _ in range(12))


def averaged(model: nn.ParameterList) -> WeightAverage:
    average = WeightAverage(model)
    average.update()
    with torch.no_grad():
        for parameter in model:
            parameter.mul_(2)
    average.update()
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails_at", [None, 0, 5])
def test_the_weights_are_put_back_also_where_the_swap_itself_fails(
    dtype: torch.dtype, fails_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(dtype)
    average = averaged(model)
    before = [parameter.detach().clone() for parameter in model]
    calls: list[int] = []
    clone = torch.Tensor.clone

    def small_memory(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.shape == (300, 40):
            if len(calls) == fails_at:
                raise torch.OutOfMemoryError("out of memory")
            calls.append(1)
        return clone(tensor, *args, **kwargs)

    def look() -> None:
        with average.swapped_in():
            for parameter, old in zip(model, before, strict=True):
                torch.testing.assert_close(parameter.detach(), (0.75 * old.float()).to(dtype))

    monkeypatch.setattr(torch.Tensor, "clone", small_memory)
    if fails_at is None:
        look()
    else:
        with pytest.raises(torch.OutOfMemoryError):
            look()
    monkeypatch.undo()
    assert len(calls) == (12 if fails_at is None else fails_at)
    for parameter, old in zip(model, before, strict=True):
        assert torch.equal(parameter.detach(), old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_an_update_nor_the_swap_holds_another_copy(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the mean, which is in float32: a tensor at a time, of twelve."""
    monkeypatch.setattr(averaging, "_MAX_GROUP", 1)
    model = make(dtype)
    mean = sum(p.numel() * 4 for p in model)

    def work() -> None:
        average = averaged(model)
        for _ in range(2):
            average.update()
        with average.swapped_in():
            pass

    assert mean < peak_bytes(work) <= mean * (1 + 2.1 / 12)
