"""A running mean of the weights over the last steps before a round, and the swap that lets a probe look at it.

Place in the flow: labels at the live weights carry the noise of the last few steps; at averaged weights they agree
better from boundary to boundary while the order is random. Once rounds select, a round of one kind of text overshoots
and the next labels undo it, at either weights: against that, earlier rounds' labels are pooled
(`benchmarks/results/fidelity.md`). The mean exists only inside its window.

Trade-off: one more copy of the trainable parameters inside the window (in float32 for half-precision weights), against
keeping it all the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class WeightAverage:
    """Mean of the trainable weights over the steps it was updated at.

    Args:
        model: the model that trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_steps = 0
        self._parameters = trainable_parameters(model)
        self._mean: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now: one fused pass over the parameters, no device synchronisation."""
        live = [parameter.detach() for parameter in self._parameters.values()]
        if not self._mean:
            half = (torch.float16, torch.bfloat16)
            dtypes = [torch.float32 if tensor.dtype in half else tensor.dtype for tensor in live]
            self._mean = [tensor.to(dtype, copy=True) for tensor, dtype in zip(live, dtypes, strict=True)]
        else:
            same = [tensor.to(mean.dtype) for tensor, mean in zip(live, self._mean, strict=True)]
            torch._foreach_lerp_(self._mean, same, 1.0 / (self.num_steps + 1))
        self.num_steps += 1

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside, and exactly its own again afterwards, also on an error.

        The two trade places tensor by tensor, so no third copy exists; the mean is used up by it.
        """
        try:
            self._exchange()
            yield
        finally:
            self._exchange()
            self._mean = []

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, mean in zip(self._parameters.values(), self._mean, strict=False):
            live = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(live)

    def save(self, path: Path) -> None:
        """Write the mean beside the rounds, whole or not at all, for a checkpoint that falls inside the window."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        tensors = {name: mean.contiguous() for name, mean in zip(self._parameters, self._mean, strict=True)}
        save_file(tensors, temporary, metadata={"num_steps": str(self.num_steps)})
        temporary.replace(path)

    def load(self, path: Path) -> bool:
        """Continue from a saved mean; False where there is none."""
        if not path.exists():
            return False
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            self.num_steps = int(file.metadata()["num_steps"])
            self._mean = [
                file.get_tensor(name).to(parameter.device, copy=True) for name, parameter in self._parameters.items()
            ]
        return True
