"""Optimizers that divide each element's gradient by its own running size: Adam and its kin.

Where it is used: `adaptive_state` makes one of these for each parameter, of what its optimizer's state says.

`v_eff = β2 v + (1−β2) E[g_B²]` is the second moment after a step on a usual batch B (the larger of it and the running
maximum under amsgrad). The square of a *batch* gradient matters: that of a single candidate's gradient over-damps at
large batch. Rows that hardly any batch reaches are taken for usual ones once one does (`rarely_reached`).

Trade-off: what a candidate itself adds to the second moment, and through L2 weight decay to its first order, is left
out; it is of the order of one row in a batch.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.engine.fragments import Fragment, whole_shape
from mates_hf.engine.preserve import local_shard
from mates_hf.influence.optimizer.parameter_step import (
    ParameterStep,
    add_up,
    chunks,
    rarely_reached,
    row_means,
    sum_of_squares,
)


class AdaptiveStep(ParameterStep):
    """θ' = shrink θ − (first_rate m' + gradient_rate g) / D(v'), m' = β m + (1−β) g, v' = keep v + add g².

    What rows that hardly any batch reaches are taken for is found once: neither the state nor E[g_B²] changes while a
    probe runs.

    Args:
        parameter: the parameter.
        group: its parameter group.
        second: v, the running second moment.
        keep: factor of v in v'.
        add: factor of g² in v'.
        to_average: v times this is the average of g_B² so far.
        first: m, or None.
        beta: its decay.
        first_rate: Learning rate of the first moment m'.
        gradient_rate: Learning rate of the gradient g itself.
        shrink: decoupled weight decay.
        l2: weight decay added to the gradient.
        beside: other state of the same shape that D reads.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        group: Mapping[str, Any],
        second: Tensor,
        *,
        keep: float,
        add: float,
        to_average: float,
        first: Tensor | None = None,
        beta: float = 0.0,
        first_rate: float = 0.0,
        gradient_rate: float = 0.0,
        shrink: float = 1.0,
        l2: float = 0.0,
        beside: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(parameter, first_rate * (1 - beta) + gradient_rate, l2, group)
        self._state_second, self._second = second, local_shard(second)
        self._first = None if first is None else local_shard(first)
        self._beside = [local_shard(tensor) for tensor in beside]
        self._keep, self._add, self._to_average = keep, add, to_average
        self._beta, self._first_rate, self._gradient_rate, self._shrink = beta, first_rate, gradient_rate, shrink
        self._floors: dict[bool, Tensor | None] = {}  # by whether E[g_B²] was given

    @abc.abstractmethod
    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        """D(v'), in place or new."""

    def _next_second(self, second: Tensor, square: Tensor) -> Tensor:
        return (second * self._keep).add_(square, alpha=self._add)

    def _next_beside(self, beside: list[Tensor], gradient: Tensor | None) -> list[Tensor]:
        return beside

    def _size(self, second: Tensor) -> Tensor:
        """Mean squares of rows of v."""
        return row_means(second, self.parameter)

    def write_null(self) -> None:
        """Move the parameter to where a step with zero gradient takes it."""
        for theta, update, divisor in self._null_updates():
            theta.mul_(self._shrink)
            theta.addcdiv_(update, divisor, value=-1)

    def null_square(self) -> Tensor:
        """() squared length of the null step of the local shard."""
        return add_up(
            sum_of_squares((theta * (1 - self._shrink)).addcdiv_(update, divisor))
            for theta, update, divisor in self._null_updates()
        )

    def _null_updates(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of the parameter, of what a step with zero gradient takes off it, and of what that is divided by."""
        for theta, second, first, *beside in chunks(
            local_shard(self.parameter), self._second, self._first, *self._beside
        ):
            decay = theta * self.l2
            divisor = self._divisor(self._next_second(second, decay * decay), *self._next_beside(beside, decay))
            update = decay * self._gradient_rate
            if first is not None:
                update.add_((first * self._beta).add_(decay, alpha=1 - self._beta), alpha=self._first_rate)
            yield theta, update, divisor

    def usual_square(self) -> Tensor | None:
        """() squared length of c P sqrt(E[g_B²]): about lr² for each element that batches reach."""
        return self.coefficient**2 * add_up(
            sum_of_squares(self._usual(second).sqrt_().div_(self._next_divisor(second, self._average(second), beside)))
            for second, *beside in chunks(self._second, *self._beside)
        )

    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale` and P, in place."""
        for g, divisor in self._divisors(gradient, squares):
            g.mul_(scale).div_(divisor)

    def preconditioned(
        self, gradient: Tensor, scale: float, squares: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the parameter, and of the gradient multiplied by `scale` and P."""
        pieces = chunks(local_shard(self.parameter))
        for (theta,), (g, divisor) in zip(pieces, self._divisors(gradient, squares), strict=True):
            yield theta, (g * scale).div_(divisor)

    def _divisors(self, gradient: Tensor, squares: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the gradient, and of what P divides them by."""
        at_least = self._at_least(squares)
        for g, second, square, floor, *beside in chunks(gradient, self._second, squares, at_least, *self._beside):
            expected = self._average(second) if square is None else square
            if floor is not None:
                expected = torch.maximum(expected, floor.reshape(-1, *(1,) * (g.dim() - 1)))
            yield g, self._next_divisor(second, expected, beside)

    def _next_divisor(self, second: Tensor, expected: Tensor, beside: list[Tensor]) -> Tensor:
        """D after a step on a batch whose squares are as expected."""
        return self._divisor(self._next_second(second, expected), *self._next_beside(beside, None))

    def _usual(self, second: Tensor) -> Tensor:
        """E[g_B²], to tell the length of a usual step; a new tensor."""
        return second * self._to_average

    def _average(self, second: Tensor) -> Tensor:
        return second * self._to_average

    def _at_least(self, squares: Tensor | None) -> Tensor | None:
        """(R,) what E[g_B²] is raised to in rows that hardly any batch reaches; every batch reaches a vector."""
        if len(whole_shape(self.parameter)) < 2 or not self.rows_may_be_rare:
            return None
        given = squares is not None
        if given not in self._floors:
            memory = self._size(self._state_second)
            average = memory * self._to_average if squares is None else row_means(squares, self.parameter)
            found = rarely_reached(memory, average, keep=self._keep, add=self._add, like=self._state_second)
            floor = None
            if found is not None:
                floor = torch.where(found[0], found[1], torch.zeros_like(found[1])).to(self._second.dtype)
                if isinstance(self.parameter, Fragment):
                    floor = self.parameter.by_entry(floor)
            self._floors[given] = floor
        return self._floors[given]


class RootStep(AdaptiveStep):
    """D = sqrt(max(v', running maximum) / correction) + eps."""

    def __init__(self, *args: Any, correction: float = 1.0, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._correction, self._eps = correction, eps

    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        for peak in beside:
            second = torch.maximum(second, peak)
        return second.div(self._correction).sqrt_().add_(self._eps)


class UndividedStep(AdaptiveStep):
    """RAdam before its variance is tractable: D = 1."""

    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        return torch.ones_like(second)


class CentredStep(RootStep):
    """RMSprop: D = sqrt(v' − (α ḡ)²) + eps, and what momentum carries on, which was divided in its own time."""

    def __init__(self, *args: Any, carried: Tensor | None, carried_rate: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._carried, self._carried_rate = None if carried is None else local_shard(carried), carried_rate

    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        for mean in beside:
            second = second.addcmul(mean, mean, value=-1).clamp_(min=0)
        return second.sqrt().add_(self._eps)

    def _next_beside(self, beside: list[Tensor], gradient: Tensor | None) -> list[Tensor]:
        means = [mean * self._keep for mean in beside]
        return means if gradient is None else [mean.add_(gradient, alpha=self._add) for mean in means]

    def _null_updates(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for (carried,), (theta, update, divisor) in zip(
            chunks(self._second if self._carried is None else self._carried), super()._null_updates(), strict=True
        ):
            if self._carried is not None:
                update.addcmul_(carried, divisor, value=self._carried_rate)
            yield theta, update, divisor


class PeakStep(AdaptiveStep):
    """Adamax: D = max(β2 u, |g| + eps); u takes the place of v, and a usual |g_B| that of g_B²."""

    def __init__(self, *args: Any, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eps = eps

    def _next_second(self, second: Tensor, square: Tensor) -> Tensor:
        return torch.maximum(second * self._keep, square.sqrt().add_(self._eps))

    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        return second

    def _size(self, second: Tensor) -> Tensor:
        return row_means(second, self.parameter) ** 2

    def _usual(self, second: Tensor) -> Tensor:
        return second * second  # at most

    def _average(self, second: Tensor) -> Tensor:
        return torch.zeros_like(second)  # how far below its peak a usual gradient is, u does not tell


class RatioStep(AdaptiveStep):
    """Adadelta: D = sqrt(v' + eps) / sqrt(Δ + eps), with Δ the running mean of squared updates."""

    def __init__(self, *args: Any, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eps = eps

    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        (updates,) = beside
        return second.add(self._eps).sqrt_().div_(updates.add(self._eps).sqrt_())
