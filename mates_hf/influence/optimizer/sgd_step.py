"""`torch.optim.SGD` with momentum, dampening, Nesterov's look ahead and weight decay: its step is linear, P is 1.

Where it is used: `preconditioner` makes one for each parameter. `coefficient` is lr, × (1−dampening) once there is
momentum; Nesterov: × (1 + momentum). Trade-off: none, the form is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mates_hf.engine.preserve import local_shard
from mates_hf.influence.optimizer.parameter_step import ParameterStep, scaled_sums
from mates_hf.influence.optimizer.together import multiply, pieces, squares_of


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

    def likeness(self) -> Any:
        """The numbers of the step, and whether there is momentum."""
        return (*super().likeness(), self._buffer is None)

    def write_null(self) -> None:
        """Move the parameter to where a step with zero gradient takes it."""
        self.write_null_of([self])

    def write_null_of(self, steps: Sequence[ParameterStep]) -> None:
        """Move the parameters of steps like this one to where a step with zero gradient takes them."""
        for _, theta, update in self._null_updates(steps):
            torch._foreach_add_(theta, update, alpha=-self._lr)

    def null_square(self) -> Tensor:
        """() squared length of the null step of the local shard."""
        return self.null_squares_of([self])[0]

    def null_squares_of(self, steps: Sequence[ParameterStep]) -> list[Tensor]:
        """() squared lengths of the null steps of the local shards of steps like this one."""
        squares: list[list[Tensor]] = [[] for _ in steps]
        for owners, _, update in self._null_updates(steps):
            for owner, square in zip(owners, squares_of(update), strict=True):
                squares[owner].append(square)
        return scaled_sums(squares, self._lr**2)

    def _null_updates(self, steps: Sequence[ParameterStep]) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Whose they are, pieces of the parameters, and of what a null step takes off them, per learning rate."""
        if not self.moves:  # has never had a gradient, and a null step brings none
            return
        columns = [(local_shard(s.parameter), s._buffer) for s in cast("Sequence[SgdStep]", steps)]
        for owners, (theta, buffer) in pieces(columns):
            decay = list(torch._foreach_mul(theta, self.l2))
            if buffer is None:
                yield owners, theta, decay
                continue
            moved = list(torch._foreach_mul(buffer, self._momentum))
            torch._foreach_add_(moved, decay, alpha=self._kept)
            if self._nesterov:
                torch._foreach_add_(decay, moved, alpha=self._momentum)
            yield owners, theta, decay if self._nesterov else moved

    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale`, in place."""
        gradient.mul_(scale)

    def precondition_of(
        self,
        steps: Sequence[ParameterStep],
        gradients: Sequence[Tensor],
        scales: Sequence[float],
        squares: Sequence[Tensor | None],
    ) -> None:
        """Multiply gradients by `scales`, all the same, in place."""
        multiply(gradients, scales[0])

    def preconditioned_of(
        self,
        steps: Sequence[ParameterStep],
        gradients: Sequence[Tensor],
        scales: Sequence[float],
        squares: Sequence[Tensor | None],
    ) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Pieces of the parameters, and of the gradients multiplied by `scales`, all the same."""
        columns = [(local_shard(s.parameter), g) for s, g in zip(steps, gradients, strict=True)]
        for owners, (theta, g) in pieces(columns):
            yield owners, theta, list(torch._foreach_mul(g, scales[0]))
