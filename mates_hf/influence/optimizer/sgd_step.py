"""`torch.optim.SGD` with momentum, dampening, Nesterov's look ahead and weight decay: its step is linear, P is 1.

Where it is used: `preconditioner` makes one for each parameter. `coefficient` is lr, × (1−dampening) once there is
momentum; Nesterov: × (1 + momentum). Trade-off: none, the form is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mates_hf.engine.preserve import local_shard
from mates_hf.influence.optimizer.parameter_step import ParameterStep, add_up, chunks, sum_of_squares


class SgdStep(ParameterStep):
    """The next step of SGD on one parameter.

    Args:
        parameter: the parameter.
        state: its state; empty without momentum.
        group: its parameter group.
        lr: learning rate of the step.
    """

    def __init__(self, parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any], lr: float) -> None:
        self._lr, self._momentum = lr, float(group["momentum"])
        self._nesterov = bool(group["nesterov"])
        buffer = state.get("momentum_buffer")
        self._buffer = None if buffer is None else local_shard(buffer)
        # The first step with momentum copies the gradient into the buffer undamped.
        self._kept = 1.0 if self._buffer is None else 1 - float(group["dampening"])
        self.moves = not self._momentum or self._buffer is not None
        factor = 1 + self._momentum * self._kept if self._nesterov else self._kept
        super().__init__(parameter, lr * factor, float(group["weight_decay"]), group)

    def write_null(self) -> None:
        """Move the parameter to where a step with zero gradient takes it."""
        for theta, update in self._null_updates():
            theta.sub_(update, alpha=self._lr)

    def null_square(self) -> Tensor:
        """() squared length of the null step of the local shard."""
        return self._lr**2 * add_up(sum_of_squares(update) for _, update in self._null_updates())

    def _null_updates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the parameter, and of what a step with zero gradient takes off them, per learning rate."""
        if not self.moves:  # has never had a gradient, and a null step brings none
            return
        for theta, buffer in chunks(local_shard(self.parameter), self._buffer):
            decay = theta * self.l2
            if buffer is None:
                yield theta, decay
                continue
            moved = (buffer * self._momentum).add_(decay, alpha=self._kept)
            yield theta, decay.add_(moved, alpha=self._momentum) if self._nesterov else moved

    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale`, in place."""
        gradient.mul_(scale)

    def preconditioned(
        self, gradient: Tensor, scale: float, squares: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the parameter, and of the gradient multiplied by `scale`."""
        for theta, g in chunks(local_shard(self.parameter), gradient):
            yield theta, g * scale
