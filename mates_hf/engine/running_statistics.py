"""The running statistics of batch norm, which each process keeps for itself while it trains, and the main one's count.

Where it is used: `training/measure` and `training/scoring`, wherever several processes run the model in eval mode.
There it normalises by these statistics, so without them processes would measure different models. Trade-off: a few
kilobytes are sent each time. What a run saves, and is evaluated by, are the main process's, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

_PREFIX = "statistics:"


def running_statistics(model: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Running means and variances of all layers that have some, as float64 arrays by a name that begins alike.

    Args:
        model: The live model, unwrapped.

    Returns:
        Copies; nothing of a model without such layers.
    """
    return {name: tensor.detach().cpu().double().numpy().copy() for name, tensor in _tensors(model).items()}


@contextlib.contextmanager
def with_statistics(model: nn.Module, given: Mapping[str, npt.NDArray[Any]]) -> Iterator[None]:
    """The model with another process's statistics inside, and its own again afterwards.

    Args:
        model: The live model, unwrapped.
        given: What `running_statistics` returned there, among other arrays.

    Yields:
        Nothing.
    """
    mine = {name: tensor for name, tensor in _tensors(model).items() if name in given}
    before = {name: tensor.detach().clone() for name, tensor in mine.items()}
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(torch.from_numpy(np.array(given[name])).reshape(tensor.shape))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(before[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Buffers with a mean and a variance that layers keep while they train."""
    return {
        f"{_PREFIX}{name}": buffer
        for name, buffer in model.named_buffers()
        if name.rsplit(".", 1)[-1] in ("running_mean", "running_var") and buffer.is_floating_point()
    }
