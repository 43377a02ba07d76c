"""Adafactor: Adam without momentum whose second moment is kept as the means of rows and columns.

Where it is used: `preconditioner` makes one for each parameter. The two that people train with, that of transformers
(`optim="adafactor"`) and `torch.optim.Adafactor`, differ in their state's layout, their floors and their rates.

| | `coefficient` (at step t+1) | P |
|---|---|---|
| transformers | lr, × max(eps₂, RMS(θ)) under `scale_parameter`; × (1−β1) with momentum | sqrt(mean r / (r cᵀ)) |
| torch | min(lr, 1/sqrt(t+1)) × max(eps₂, RMS(θ)) | the same |

Vectors have P = 1 / sqrt(v_eff). r, c and v are what they are after a step on a usual batch.

Trade-off: the clipping of an update whose RMS is above 1 is left out, for a null step is never clipped, and in a batch
it shortens all candidates alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mates_hf.influence.optimizer.parameter_step import ParameterStep, rarely_reached, scaled_sums
from mates_hf.influence.optimizer.together import multiplied, multiply, pieces, squares_of

NORM = "parameter_norm"  # ‖θ‖ of the parameter, which whoever makes a step puts into its state


class _Rule(NamedTuple):
    """What the two implementations do differently; the floors are of the second moment and of the mean of rows."""

    rate: float
    add: float
    floor: float
    mean_floor: float
    shrink: float
    row: Tensor | None = None  # (..., R)
    column: Tensor | None = None  # (..., C)
    whole: Tensor | None = None
    momentum: Tensor | None = None
    beta: float = 0.0


class FactoredStep(ParameterStep):
    """The next step of Adafactor on one parameter.

    Each has a rate of its own. Those of one shape are stacked, so that what P is made of takes one kernel for all.

    Args:
        parameter: the parameter, whole.
        group: its parameter group.
        rule: state and numbers of its implementation.
    """

    def __init__(self, parameter: nn.Parameter, group: Mapping[str, Any], rule: _Rule) -> None:
        super().__init__(parameter, rule.rate * (1 - rule.beta), 0.0, group)
        self._rule = rule
        self._next_factors: dict[bool, tuple[Tensor, Tensor]] = {}  # by whether E[g_B²] was given

    def likeness(self) -> Any:
        """The shape, and the numbers of the step but for its rates; a table whose rows may be rare is alone."""
        rule, shape = self._rule, tuple(self.parameter.shape)
        alone = id(self) if rule.whole is None and self.rows_may_be_rare else None
        states = (rule.row, rule.column, rule.whole, rule.momentum)
        kinds = [None if state is None else state.dtype for state in states]
        numbers = (rule.add, rule.floor, rule.mean_floor, rule.beta, self.momentum)
        return type(self), self.parameter.dtype, self.parameter.device, shape, *kinds, *numbers, alone

    def write_null(self) -> None:
        """Move the parameter to where a step with zero gradient takes it; the update's momentum holds its rate."""
        self.write_null_of([self])

    def write_null_of(self, steps: Sequence[ParameterStep]) -> None:
        """Move the parameters of steps like this one to where a step with zero gradient takes them."""
        for owners, theta, momentum in self._with_momentum(steps):
            multiply(theta, [_rule_of(steps[owner]).shrink for owner in owners])
            if momentum is not None:
                torch._foreach_sub_(theta, momentum, alpha=self._rule.beta)

    def null_square(self) -> Tensor:
        """() squared length of the null step."""
        return self.null_squares_of([self])[0]

    def null_squares_of(self, steps: Sequence[ParameterStep]) -> list[Tensor]:
        """() squared lengths of the null steps of steps like this one."""
        squares: list[list[Tensor]] = [[] for _ in steps]
        for owners, theta, momentum in self._with_momentum(steps):
            moved = multiplied(theta, [1 - _rule_of(steps[owner]).shrink for owner in owners])
            if momentum is not None:
                torch._foreach_add_(moved, momentum, alpha=self._rule.beta)
            for owner, square in zip(owners, squares_of(moved), strict=True):
                squares[owner].append(square)
        return scaled_sums(squares, 1.0)

    def _with_momentum(
        self, steps: Sequence[ParameterStep]
    ) -> Iterator[tuple[list[int], list[Tensor], list[Tensor] | None]]:
        """Whose they are, and pieces of the parameters and of the momentum, in the parameters' precision."""
        for owners, (theta, momentum) in pieces([(s.parameter.detach(), _rule_of(s).momentum) for s in steps]):
            if momentum is not None and momentum[0].dtype != theta[0].dtype:
                rounded = [torch.empty_like(part) for part in theta]
                torch._foreach_copy_(rounded, momentum)
                momentum = rounded
            yield owners, theta, momentum

    def usual_squares_of(self, steps: Sequence[ParameterStep]) -> list[Tensor] | None:
        """() squared lengths of updates whose root mean square is 1, which is what the clipping of updates allows."""
        lengths = [step.coefficient**2 * step.parameter.numel() for step in steps]
        # From the host without waiting for the device.
        return list(torch.tensor(lengths, dtype=torch.float32).to(self.parameter.device, non_blocking=True).unbind())

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
        """Multiply the gradients of steps like this one by `scales` and P, in place."""
        for owners, _, g, roots in self._roots(steps, gradients, squares):
            multiply(g, [scales[owner] for owner in owners])
            _multiply_each(g, roots)

    def preconditioned_of(
        self,
        steps: Sequence[ParameterStep],
        gradients: Sequence[Tensor],
        scales: Sequence[float],
        squares: Sequence[Tensor | None],
    ) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Pieces of the parameters of steps like this one, and of the gradients multiplied by `scales` and P."""
        for owners, theta, g, roots in self._roots(steps, gradients, squares):
            result = multiplied(g, [scales[owner] for owner in owners])
            _multiply_each(result, roots)
            yield owners, theta, result

    def _roots(
        self, steps: Sequence[ParameterStep], gradients: Sequence[Tensor], squares: Sequence[Tensor | None]
    ) -> Iterator[tuple[list[int], list[Tensor], list[Tensor], Tensor]]:
        """Whose they are, pieces of the parameters and of the gradients, and (n, ...) what P multiplies those with."""
        alike, rule = cast("Sequence[FactoredStep]", steps), self._rule
        thetas = [step.parameter.detach() for step in steps]
        if rule.whole is not None:
            state = [step._rule.whole for step in alike]
            for owners, (g, theta, whole, square) in pieces(list(zip(gradients, thetas, state, squares, strict=True))):
                second = self._next(_stacked(whole), _stacked(whole if square is None else square))
                yield owners, theta, g, second.clamp_(min=rule.floor).rsqrt_()
            return
        self._find_factors(alike, squares)
        rows, columns = zip(*(step._next_factors[squares[0] is not None] for step in alike), strict=True)
        cut = [column if column.dim() > 1 else None for column in columns]
        for owners, (g, theta, row, column) in pieces(list(zip(gradients, thetas, rows, cut, strict=True))):
            across = [columns[owner] for owner in owners] if column is None else column
            second = _stacked(row).unsqueeze(-1) * _stacked(across).unsqueeze(-2)
            yield owners, theta, g, second.clamp_(min=rule.floor).rsqrt_()

    def _find_factors(self, steps: Sequence[FactoredStep], squares: Sequence[Tensor | None]) -> None:
        """Factors of the next second moments, found once: neither the state nor E[g_B²] changes while a probe runs."""
        given, rule = squares[0] is not None, self._rule
        if all(given in step._next_factors for step in steps):
            return
        row, column = _stacked([step._rule.row for step in steps]), _stacked([step._rule.column for step in steps])
        averages, columns = row, column
        if given:
            averages = torch.stack([square.mean(-1, dtype=row.dtype) for square in squares if square is not None])
            columns = torch.stack([square.mean(-2, dtype=column.dtype) for square in squares if square is not None])
        if self.rows_may_be_rare:  # then it is alone
            averages = self._usual_rows(row[0], averages[0]).unsqueeze(0)
        row = self._next(row, averages)
        row = row / row.mean(-1, keepdim=True).clamp_(min=rule.mean_floor)
        for step, *found in zip(steps, row.unbind(), self._next(column, columns).unbind(), strict=True):
            step._next_factors[given] = (found[0], found[1])

    def _next(self, second: Tensor, expected: Tensor) -> Tensor:
        """The second moment after a step on a usual batch."""
        return (second * (1 - self._rule.add)).add_(expected.to(second.dtype), alpha=self._rule.add)

    def _usual_rows(self, row: Tensor, average: Tensor) -> Tensor:
        """Mean squares that a batch brings to each row; to those that hardly any batch reaches, the usual ones."""
        rarely, usual = rarely_reached(row, average, keep=1 - self._rule.add, add=self._rule.add, like=row)
        return torch.where(rarely, torch.maximum(average, usual), average)


def _rule_of(step: ParameterStep) -> _Rule:
    return cast("FactoredStep", step)._rule


def _stacked(tensors: Sequence[Any]) -> Tensor:
    """Tensors of one shape as one, a view where there is one; `pieces` puts no others together."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _multiply_each(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply tensors of one shape by (n, ...) factors of each entry, in place."""
    if tensors[0].dtype == factors.dtype:
        torch._foreach_mul_(tensors, list(factors.unbind()))
    else:  # lists of two types are taken one by one
        torch._foreach_copy_(tensors, list(torch.stack(tensors).mul_(factors).unbind()))


def transformers_adafactor_step(
    parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any], lr: float
) -> ParameterStep:
    """`transformers.Adafactor` with a learning rate of its own (`relative_step=False`)."""
    floor, smallest = (float(eps) for eps in group["eps"])
    rate = lr * max(smallest, _root_mean_square(parameter, state)) if group["scale_parameter"] else lr
    with_momentum = group["beta1"] is not None
    return FactoredStep(
        parameter,
        group,
        _Rule(
            rate=rate,
            add=(int(state["step"]) + 1) ** float(group["decay_rate"]),
            floor=floor,
            mean_floor=floor,
            shrink=1 - rate * float(group["weight_decay"]),
            row=state.get("exp_avg_sq_row"),
            column=state.get("exp_avg_sq_col"),
            whole=state.get("exp_avg_sq"),
            momentum=state["exp_avg"] if with_momentum else None,
            beta=float(group["beta1"]) if with_momentum else 0.0,
        ),
    )


def torch_adafactor_step(
    parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any], lr: float
) -> ParameterStep:
    """`torch.optim.Adafactor`."""
    floor, smallest = group["eps"]
    floor = torch.finfo(parameter.dtype).eps if floor is None else float(floor)
    step = int(state["step"]) + 1
    row, column = state.get("row_var"), state.get("col_var")
    return FactoredStep(
        parameter,
        group,
        _Rule(
            rate=min(lr, step**-0.5) * max(float(smallest), _root_mean_square(parameter, state)),
            add=step ** float(group["beta2_decay"]),
            floor=floor**2,
            mean_floor=floor,
            shrink=1 - lr * float(group["weight_decay"]),
            row=None if row is None else row.squeeze(-1),
            column=None if column is None else column.squeeze(-2),
            whole=state.get("variance"),
        ),
    )


def _root_mean_square(parameter: nn.Parameter, state: Mapping[str, Any]) -> float:
    return float(state[NORM]) / math.sqrt(parameter.numel())
