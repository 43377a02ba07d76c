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

from mates_hf.influence.optimizer.parameter_step import ParameterStep, rarely_reached, sum_of_squares
from mates_hf.influence.optimizer.together import chunks


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

    Args:
        parameter: the parameter, whole.
        group: its parameter group.
        rule: state and numbers of its implementation.
    """

    def __init__(self, parameter: nn.Parameter, group: Mapping[str, Any], rule: _Rule) -> None:
        super().__init__(parameter, rule.rate * (1 - rule.beta), 0.0, group)
        self._rule = rule
        self._next_factors: dict[bool, tuple[Tensor, Tensor]] = {}  # by whether E[g_B²] was given

    def write_null(self) -> None:
        """Move the parameter to where a step with zero gradient takes it; the update's momentum holds its rate."""
        theta = self.parameter.detach().mul_(self._rule.shrink)
        if self._rule.momentum is not None:
            theta.sub_(self._rule.momentum.to(theta.dtype), alpha=self._rule.beta)

    def null_square(self) -> Tensor:
        """() squared length of the null step."""
        moved = self.parameter.detach() * (1 - self._rule.shrink)
        if self._rule.momentum is not None:
            moved.add_(self._rule.momentum.to(moved.dtype), alpha=self._rule.beta)
        return sum_of_squares(moved)

    def usual_square(self) -> Tensor | None:
        """() squared length of an update whose root mean square is 1, which is what the clipping of updates allows."""
        length = self.coefficient**2 * self.parameter.numel()
        return torch.tensor(length, dtype=torch.float32, device=self.parameter.device)

    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale` and P, in place."""
        for g, root in self._factors(gradient, squares):
            g.mul_(scale).mul_(root)

    def preconditioned_of(
        self,
        steps: Sequence[ParameterStep],
        gradients: Sequence[Tensor],
        scale: float,
        squares: Sequence[Tensor | None],
    ) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Pieces of the parameters of steps like this one, and of the gradients multiplied by `scale` and P."""
        for number, step in enumerate(cast("Sequence[FactoredStep]", steps)):
            whole = step._rule.whole is not None
            pieces = iter([(step.parameter.detach(),)]) if whole else chunks(step.parameter.detach())
            found = step._factors(gradients[number], squares[number])
            for (theta,), (g, root) in zip(pieces, found, strict=True):
                yield [number], [theta], [(g * scale).mul_(root)]

    def _factors(self, gradient: Tensor, squares: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the gradient, and of what P multiplies them with."""
        rule = self._rule
        if rule.whole is not None:
            expected = rule.whole if squares is None else squares.to(rule.whole.dtype)
            yield gradient, self._next(rule.whole, expected).clamp_(min=rule.floor).rsqrt_()
            return
        row, column = self._rows_and_columns(squares)
        for g, r, c in chunks(gradient, row, column if gradient.dim() > 2 else None):
            second = r.unsqueeze(-1) * (column if c is None else c).unsqueeze(-2)
            yield g, second.clamp_(min=rule.floor).rsqrt_()

    def _rows_and_columns(self, squares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Factors of the next second moment, found once: neither the state nor E[g_B²] changes while a probe runs."""
        given, rule = squares is not None, self._rule
        if given not in self._next_factors:
            assert rule.row is not None
            assert rule.column is not None
            row = self._next(rule.row, self._usual_rows(rule.row, squares))
            row = row / row.mean(-1, keepdim=True).clamp_(min=rule.mean_floor)
            columns = rule.column if squares is None else squares.mean(-2, dtype=rule.column.dtype)
            self._next_factors[given] = (row, self._next(rule.column, columns))
        return self._next_factors[given]

    def _next(self, second: Tensor, expected: Tensor) -> Tensor:
        """The second moment after a step on a usual batch."""
        return (second * (1 - self._rule.add)).add_(expected, alpha=self._rule.add)

    def _usual_rows(self, row: Tensor, squares: Tensor | None) -> Tensor:
        """Mean squares that a batch brings to each row; to those that hardly any batch reaches, the usual ones."""
        average = row if squares is None else squares.mean(-1, dtype=row.dtype)
        if not self.rows_may_be_rare:
            return average
        rarely, usual = rarely_reached(row, average, keep=1 - self._rule.add, add=self._rule.add, like=row)
        return torch.where(rarely, torch.maximum(average, usual), average)


def transformers_adafactor_step(
    parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any], lr: float
) -> ParameterStep:
    """`transformers.Adafactor` with a learning rate of its own (`relative_step=False`)."""
    floor, smallest = (float(eps) for eps in group["eps"])
    rate = lr * max(smallest, _root_mean_square(parameter)) if group["scale_parameter"] else lr
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
            rate=min(lr, step**-0.5) * max(float(smallest), _root_mean_square(parameter)),
            add=step ** float(group["beta2_decay"]),
            floor=floor**2,
            mean_floor=floor,
            shrink=1 - lr * float(group["weight_decay"]),
            row=None if row is None else row.squeeze(-1),
            column=None if column is None else column.squeeze(-2),
            whole=state.get("variance"),
        ),
    )


def _root_mean_square(parameter: nn.Parameter) -> float:
    return float(parameter.detach().norm(2)) / math.sqrt(parameter.numel())
