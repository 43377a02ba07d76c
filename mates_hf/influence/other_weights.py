"""A model at other weights than its own for a while: what a model that has learnt little does not show, shows there.

Where it is used: `reading` and `packed_rows`, where two readings agree at the present weights or other tokens seem to
make no difference.
Trade-off: noise of one size for every parameter, which says nothing of a trained model but what can reach what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from mates_hf.engine.fragments import whole_shape
from mates_hf.engine.preserve import local_shard, preserved


@contextlib.contextmanager
def at_other_weights(model: nn.Module, *, until_it_passes_on: bool = False) -> Iterator[None]:
    """The model in eval mode with a little noise on its parameters, which are put back.

    Args:
        model: The live model.
        until_it_passes_on: Whether narrow parameters get enough noise to pass on what comes in.
    """
    with preserved(model) as snapshot:
        model.eval()
        _disturb(snapshot.parameters, until_it_passes_on=until_it_passes_on)
        snapshot.written()
        yield


def _disturb(parameters: list[nn.Parameter], *, until_it_passes_on: bool) -> None:
    """Add a little noise to parameters, the same in every process; to narrow ones enough to pass on what comes in."""
    for number, parameter in enumerate(parameters):
        local, shape = local_shard(parameter), whole_shape(parameter)
        if local.dtype.is_floating_point:
            generator = torch.Generator(device="cpu").manual_seed(number)
            noise = torch.randn(local.shape, generator=generator, dtype=torch.float32)
            passes_on = shape[-1] ** -0.5 if until_it_passes_on and len(shape) > 1 else 0.0
            local.add_(noise.to(local.device, local.dtype), alpha=max(0.05, passes_on))
