"""Optimizers that divide each element's gradient by its own running size: Adam and its kin.

Where it is used: `adaptive_state` makes one of these for each parameter, of what its optimizer's state says.

`v_eff = β2 v + (1−β2) E[g_B²]` is the second moment after a step on a usual batch B (the larger of it and the running
maximum under amsgrad). The square of a *batch* gradient matters: that of a single candidate's gradient over-damps at
large batch. Rows that hardly any batch reaches are taken for usual ones once one does (`rarely_reached`).

All arithmetic is on lists of tensors, matching pieces of parameters whose steps have the same numbers (`together`).

Trade-off: what a candidate itself adds to the second moment, and through L2 weight decay to its first order, is left
out; it is of the order of one row in a batch.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mates_hf.engine.fragments import Fragment, whole_shape
from mates_hf.engine.preserve import local_shard
from mates_hf.influence.optimizer.parameter_step import ParameterStep, rarely_reached, row_means, scaled_sums
from mates_hf.influence.optimizer.together import multiply, pieces, squares_of, zeros_like

Tensors = list[Tensor]


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
    def _divisor(self, second: Tensors, *beside: Tensors) -> Tensors:
        """D(v'), in place or new."""

    def _next_second(self, second: Tensors, square: Tensors | None) -> Tensors:
        """The second moment after a gradient with these squares, None where it is zero; new tensors."""
        found: Tensors = list(torch._foreach_mul(second, self._keep))
        if square is not None:
            torch._foreach_add_(found, square, alpha=self._add)
        return found

    def _next_beside(self, beside: list[Tensors], gradient: Tensors | None) -> list[Tensors]:
        return beside

    def _size(self, second: Tensor) -> Tensor:
        """Mean squares of rows of v."""
        return row_means(second, self.parameter)

    def likeness(self) -> Any:
        """The numbers of the step, and whether rows of the parameter may be rare."""
        return (*super().likeness(), self._first is None, len(self._beside), self._has_rare_rows)

    def write_null(self) -> None:
        """Move the parameter to where a step with zero gradient takes it."""
        self.write_null_of([self])

    def write_null_of(self, steps: Sequence[ParameterStep]) -> None:
        """Move the parameters of steps like this one to where a step with zero gradient takes them."""
        for _, theta, update, divisor in self._null_updates(steps):
            if self._shrink != 1:
                multiply(theta, self._shrink)
            torch._foreach_addcdiv_(theta, update, divisor, value=-1)

    def null_square(self) -> Tensor:
        """() squared length of the null step of the local shard."""
        return self.null_squares_of([self])[0]

    def null_squares_of(self, steps: Sequence[ParameterStep]) -> list[Tensor]:
        """() squared lengths of the null steps of the local shards of steps like this one."""
        squares: list[Tensors] = [[] for _ in steps]
        for owners, theta, update, divisor in self._null_updates(steps):
            moved = list(torch._foreach_mul(theta, 1 - self._shrink))
            torch._foreach_addcdiv_(moved, update, divisor)
            for owner, square in zip(owners, squares_of(moved), strict=True):
                squares[owner].append(square)
        return scaled_sums(squares, 1.0)

    def _null_updates(self, steps: Sequence[ParameterStep]) -> Iterator[tuple[list[int], Tensors, Tensors, Tensors]]:
        """Whose pieces they are, and pieces of the parameters, of what a null step takes off, and of its divisor."""
        alike = cast("Sequence[AdaptiveStep]", steps)
        columns = [(local_shard(s.parameter), s._second, s._first, *s._beside) for s in alike]
        for owners, (theta, second, first, *beside) in pieces(columns):
            decay = list(torch._foreach_mul(theta, self.l2)) if self.l2 else None
            square = None if decay is None else list(torch._foreach_mul(decay, decay))
            divisor = self._divisor(self._next_second(second, square), *self._next_beside(beside, decay))
            yield owners, theta, self._null_update(theta, first, decay), divisor

    def _null_update(self, theta: Tensors, first: Tensors | None, decay: Tensors | None) -> Tensors:
        """first_rate m' + gradient_rate g, for the gradient that weight decay makes; new tensors."""
        of, rate = (theta, 0.0) if decay is None else (decay, self._gradient_rate)
        update: Tensors = list(torch._foreach_mul(of, rate))
        if first is not None:
            moved = list(torch._foreach_mul(first, self._beta))
            if decay is not None:
                torch._foreach_add_(moved, decay, alpha=1 - self._beta)
            torch._foreach_add_(update, moved, alpha=self._first_rate)
        return update

    def usual_squares_of(self, steps: Sequence[ParameterStep]) -> list[Tensor] | None:
        """() squared lengths of c P sqrt(E[g_B²]): about lr² for each element that batches reach."""
        squares: list[Tensors] = [[] for _ in steps]
        columns = [(step._second, *step._beside) for step in cast("Sequence[AdaptiveStep]", steps)]
        for owners, (second, *beside) in pieces(columns):
            usual = self._usual(second)
            torch._foreach_sqrt_(usual)
            torch._foreach_div_(usual, self._next_divisor(second, self._average(second), beside))
            for owner, square in zip(owners, squares_of(usual), strict=True):
                squares[owner].append(square)
        return scaled_sums(squares, self.coefficient**2)

    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale` and P, in place."""
        self.precondition_of([self], [gradient], [scale], [squares])

    def precondition_of(
        self,
        steps: Sequence[ParameterStep],
        gradients: Sequence[Tensor],
        scales: Sequence[float],
        squares: Sequence[Tensor | None],
    ) -> None:
        """Multiply the gradients of steps like this one by `scales`, all the same, and P, in place."""
        for _, _, g, divisor in self._divisors(steps, gradients, squares):
            multiply(g, scales[0])
            torch._foreach_div_(g, divisor)

    def preconditioned_of(
        self,
        steps: Sequence[ParameterStep],
        gradients: Sequence[Tensor],
        scales: Sequence[float],
        squares: Sequence[Tensor | None],
    ) -> Iterator[tuple[list[int], Tensors, Tensors]]:
        """Pieces of the parameters of steps like this one, and of the gradients multiplied by `scales` and P."""
        for owners, theta, g, divisor in self._divisors(steps, gradients, squares):
            result = list(torch._foreach_mul(g, scales[0]))
            torch._foreach_div_(result, divisor)
            yield owners, theta, result

    def _divisors(
        self, steps: Sequence[ParameterStep], gradients: Sequence[Tensor], squares: Sequence[Tensor | None]
    ) -> Iterator[tuple[list[int], Tensors, Tensors, Tensors]]:
        """Whose they are, and pieces of the parameters, of the gradients, and of what P divides those by."""
        columns = [
            (g, local_shard(s.parameter), s._second, square, s._at_least(square), *s._beside)
            for s, g, square in zip(cast("Sequence[AdaptiveStep]", steps), gradients, squares, strict=True)
        ]
        for owners, (g, theta, second, square, floor, *beside) in pieces(columns):
            expected = self._average(second) if square is None else square
            if floor is not None:
                by_row = [low.reshape(-1, *(1,) * (part.dim() - 1)) for low, part in zip(floor, g, strict=True)]
                expected = [torch.maximum(each, low) for each, low in zip(expected, by_row, strict=True)]
            yield owners, theta, g, self._next_divisor(second, expected, beside)

    def _next_divisor(self, second: Tensors, expected: Tensors, beside: list[Tensors]) -> Tensors:
        """D after a step on a batch whose squares are as expected."""
        return self._divisor(self._next_second(second, expected), *self._next_beside(beside, None))

    def _usual(self, second: Tensors) -> Tensors:
        """E[g_B²], to tell the length of a usual step; new tensors."""
        return list(torch._foreach_mul(second, self._to_average))

    def _average(self, second: Tensors) -> Tensors:
        return list(torch._foreach_mul(second, self._to_average))

    @property
    def _has_rare_rows(self) -> bool:
        return len(whole_shape(self.parameter)) > 1 and self.rows_may_be_rare  # every batch reaches a vector

    def _at_least(self, squares: Tensor | None) -> Tensor | None:
        """(R,) what E[g_B²] is raised to in rows that hardly any batch reaches, 0 in the others."""
        if not self._has_rare_rows:
            return None
        given = squares is not None
        if given not in self._floors:
            memory = self._size(self._state_second)
            average = memory * self._to_average if squares is None else row_means(squares, self.parameter)
            rarely, usual = rarely_reached(memory, average, keep=self._keep, add=self._add, like=self._state_second)
            floor = torch.where(rarely, usual, torch.zeros_like(usual)).to(self._second.dtype)
            if isinstance(self.parameter, Fragment):
                some = bool(rarely.any())  # by entry they take memory, zeros that are spread do not
                floor = self.parameter.by_entry(floor) if some else floor.new_zeros(()).expand(self._second.shape)
            self._floors[given] = floor
        return self._floors[given]


class RootStep(AdaptiveStep):
    """D = sqrt(max(v', running maximum) / correction) + eps."""

    def __init__(self, *args: Any, correction: float = 1.0, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._correction, self._eps = correction, eps

    def _divisor(self, second: Tensors, *beside: Tensors) -> Tensors:
        for peak in beside:
            second = list(torch._foreach_maximum(second, peak))
        torch._foreach_div_(second, self._correction)
        torch._foreach_sqrt_(second)
        torch._foreach_add_(second, self._eps)
        return second


class UndividedStep(AdaptiveStep):
    """RAdam before its variance is tractable: D = 1."""

    def _divisor(self, second: Tensors, *beside: Tensors) -> Tensors:
        ones = zeros_like(second)
        torch._foreach_add_(ones, 1.0)
        return ones


class CentredStep(RootStep):
    """RMSprop: D = sqrt(v' − (α ḡ)²) + eps, and what momentum carries on, which was divided in its own time."""

    def __init__(self, *args: Any, carried: Tensor | None, carried_rate: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._carried, self._carried_rate = None if carried is None else local_shard(carried), carried_rate

    def likeness(self) -> Any:
        """As of its kind, and whether momentum carries something on."""
        return (*super().likeness(), self._carried is None)

    def _divisor(self, second: Tensors, *beside: Tensors) -> Tensors:
        for mean in beside:
            torch._foreach_addcmul_(second, mean, mean, value=-1)
            torch._foreach_clamp_min_(second, 0)
        torch._foreach_sqrt_(second)
        torch._foreach_add_(second, self._eps)
        return second

    def _next_beside(self, beside: list[Tensors], gradient: Tensors | None) -> list[Tensors]:
        means = [list(torch._foreach_mul(mean, self._keep)) for mean in beside]
        if gradient is not None:
            for mean in means:
                torch._foreach_add_(mean, gradient, alpha=self._add)
        return means

    def _null_updates(self, steps: Sequence[ParameterStep]) -> Iterator[tuple[list[int], Tensors, Tensors, Tensors]]:
        columns = [(s._second, s._carried) for s in cast("Sequence[CentredStep]", steps)]
        for (_, (_, carried)), (owners, theta, update, divisor) in zip(
            pieces(columns), super()._null_updates(steps), strict=True
        ):
            if carried is not None:
                torch._foreach_addcmul_(update, carried, divisor, value=self._carried_rate)
            yield owners, theta, update, divisor


class PeakStep(AdaptiveStep):
    """Adamax: D = max(β2 u, |g| + eps); u takes the place of v, and a usual |g_B| that of g_B²."""

    def __init__(self, *args: Any, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eps = eps

    def _next_second(self, second: Tensors, square: Tensors | None) -> Tensors:
        kept: Tensors = list(torch._foreach_mul(second, self._keep))
        if square is None:
            torch._foreach_clamp_min_(kept, self._eps)
            return kept
        size: Tensors = list(torch._foreach_sqrt(square))
        torch._foreach_add_(size, self._eps)
        return list(torch._foreach_maximum(kept, size))

    def _divisor(self, second: Tensors, *beside: Tensors) -> Tensors:
        return second

    def _size(self, second: Tensor) -> Tensor:
        return row_means(second, self.parameter) ** 2

    def _usual(self, second: Tensors) -> Tensors:
        return list(torch._foreach_mul(second, second))  # at most

    def _average(self, second: Tensors) -> Tensors:
        return zeros_like(second)  # how far below its peak a gradient is, u does not tell


class RatioStep(AdaptiveStep):
    """Adadelta: D = sqrt(v' + eps) / sqrt(Δ + eps), with Δ the running mean of squared updates."""

    def __init__(self, *args: Any, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eps = eps

    def _divisor(self, second: Tensors, *beside: Tensors) -> Tensors:
        updates = torch._foreach_add(beside[0], self._eps)
        torch._foreach_add_(second, self._eps)
        torch._foreach_sqrt_(second)
        torch._foreach_sqrt_(updates)
        torch._foreach_div_(second, updates)
        return second
