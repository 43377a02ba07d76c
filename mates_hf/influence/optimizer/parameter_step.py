"""What the optimizer's next step does to one parameter: the interface, and what several optimizers share.

Where it is used: the `*_step` modules fill it in for one optimizer each, `preconditioner` picks the right one, and
`DirectionalProbe` uses nothing else. The next step with gradient g moves a parameter to `null − coefficient · P g` to
first order in g. P is that of the state, which no probe changes: the same at every point of a path.

Trade-off: steps are one a parameter, and whoever works on many of them asks the first of those that are alike
(`grouped`) to work on all of them at once. Pieces are bounded, so that temporaries stay small beside any parameter
worth training.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.engine.fragments import Fragment, sum_over_shards
from mates_hf.engine.preserve import local_shard
from mates_hf.influence.optimizer.together import chunks, squares_of, wide_dtype


class ParameterStep(abc.ABC):
    """What the optimizer's next step does to one parameter.

    Args:
        parameter: the parameter.
        coefficient: scale of the linear term, in the learning rate's unit; the attribute is negative where the
            optimizer maximises.
        l2: weight decay that the optimizer adds to the gradient (0 where it is decoupled).
        group: the optimizer's parameter group.

    Attributes:
        momentum: whether earlier gradients move the parameter on.
        moves: false where the optimizer has not taken a step with this parameter yet.
        rows_may_be_rare: whether a batch may leave rows of the parameter out: those of a table that ids are looked
            up in, of an output head, of experts.
    """

    moves = True
    rows_may_be_rare = True  # false where every batch reaches all of the parameter

    def __init__(self, parameter: nn.Parameter, coefficient: float, l2: float, group: Mapping[str, Any]) -> None:
        self.parameter = parameter
        self.coefficient = -coefficient if group.get("maximize", False) else coefficient
        self.l2 = l2
        betas = group.get("betas") or (group.get("beta1"),)
        self.momentum = bool(betas[0] or group.get("momentum"))

    def likeness(self) -> tuple[Any, ...]:
        """What steps have in common that can be worked on at once: their numbers, and the kinds of their tensors."""
        local = local_shard(self.parameter)
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, (bool, int, float))}
        return type(self), local.dtype, local.device, *sorted(numbers.items())

    @abc.abstractmethod
    def write_null(self) -> None:
        """Move the parameter, in place, to where a step with zero gradient takes it; optimizer state is only read."""

    def write_null_of(self, steps: Sequence[ParameterStep]) -> None:
        """`write_null` of several steps like this one, at once where that is known."""
        for step in steps:
            step.write_null()

    @abc.abstractmethod
    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale` and the transpose of P (P itself, where it is elementwise), in place.

        Args:
            gradient: local shard of a gradient of the parameter's shape.
            scale: any factor.
            squares: E[g_B²] of the same shape, or None to take the average that the optimizer's state holds.
        """

    def precondition_of(
        self,
        steps: Sequence[ParameterStep],
        gradients: Sequence[Tensor],
        scales: Sequence[float],
        squares: Sequence[Tensor | None],
    ) -> None:
        """`precondition` of several steps like this one, at once where that is known.

        Args:
            steps: the steps.
            gradients: The gradient of each.
            scales: A factor of each; the same for steps whose coefficient is the same.
            squares: E[g_B²] of each, or None for all.
        """
        for step, gradient, scale, square in zip(steps, gradients, scales, squares, strict=True):
            step.precondition(gradient, scale, square)

    @abc.abstractmethod
    def null_square(self) -> Tensor:
        """() squared length of the null step of the local shard, before it is rounded to the parameter's precision."""

    def null_squares_of(self, steps: Sequence[ParameterStep]) -> list[Tensor]:
        """`null_square` of several steps like this one, at once where that is known."""
        return [step.null_square() for step in steps]

    def usual_squares_of(self, steps: Sequence[ParameterStep]) -> list[Tensor] | None:
        """() squared lengths, in the local shards, of the steps like this one that a usual batch makes.

        Asked where there is no momentum. None where the state does not tell how large a usual gradient is.
        """
        return None

    def preconditioned_of(
        self,
        steps: Sequence[ParameterStep],
        gradients: Sequence[Tensor],
        scales: Sequence[float],
        squares: Sequence[Tensor | None],
    ) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """What `precondition_of` makes of gradients that are left as they are, piece by piece.

        Args:
            steps: steps like this one.
            gradients: The gradient of each, local shards of the parameters' shapes.
            scales: A factor of each; the same for steps whose coefficient is the same.
            squares: E[g_B²] of each, or None for all.

        Yields:
            Which step each piece is of, and matching lists of pieces: of the parameters' local shards, and of the
            result, the latter to be used at once.
        """
        for number, (step, gradient, square) in enumerate(zip(steps, gradients, squares, strict=True)):
            result = gradient.clone()
            step.precondition(result, scales[number], square)
            yield [number], [local_shard(step.parameter)], [result]


def grouped(steps: Sequence[ParameterStep]) -> list[list[int]]:
    """Numbers of the steps that are alike, group by group."""
    found: dict[Any, list[int]] = {}
    for number, step in enumerate(steps):
        found.setdefault(step.likeness(), []).append(number)
    return list(found.values())


def sum_of_squares(tensor: Tensor) -> Tensor:
    """() sum of squares, float64 where the device has it, without a copy of the tensor."""
    return squares_of([tensor])[0]


def add_up(squares: Iterable[Tensor]) -> Tensor:
    """() sum of scalars, in float64 where the device has it, without waiting for it."""
    parts = list(squares)
    if not parts:  # a shard without a row
        return torch.zeros((), dtype=torch.float64)
    device = parts[0].device
    return torch.stack([part.reshape(()).to(device, wide_dtype(device)) for part in parts]).sum()


def scaled_sums(squares: Sequence[Sequence[Tensor]], factor: float) -> list[Tensor]:
    """() sum of the scalars of each, times a factor."""
    sums = [parts[0] if len(parts) == 1 else add_up(parts) for parts in squares]
    return list(torch._foreach_mul(sums, factor)) if sums and factor != 1 else sums


def row_means(tensor: Tensor, parameter: nn.Parameter | None = None) -> Tensor:
    """(R,) mean of each slice along dimension 0 of the local shard, float32 or wider.

    Where an engine flattened the parameter, of each of its rows: all processes must call it.
    """
    if isinstance(parameter, Fragment):
        return parameter.row_means(tensor)
    local = local_shard(tensor)
    dtype = torch.promote_types(local.dtype, torch.float32)
    parts = [part.reshape(len(part), -1).mean(1, dtype=dtype) for (part,) in chunks(local)]
    return torch.cat(parts) if parts else local.new_zeros(0, dtype=dtype)


def rarely_reached(memory: Tensor, average: Tensor, *, keep: float, add: float, like: Any) -> tuple[Tensor, Tensor]:
    """Rows whose running second moment does not tell what a batch that reaches them would bring, and what it would.

    The gradient of an embedding's row is zero in each batch without that token, so its average of squares says how
    rare the token is, not how large its gradients are; that of a token never met is 0, and P would be 1 / eps. One
    such row would fill the whole direction. A row is rarely reached where a usual gradient of this parameter would
    outweigh all that is remembered of it; that usual one is then what P assumes of the batch.

    Args:
        memory: (R,) mean of the running second moment of each row.
        average: (R,) mean of E[g_B²] of each row.
        keep: factor of the second moment in the next one.
        add: factor of a new square in the next one.
        like: the state tensor they come from; where it is sharded, all processes must call this.

    Returns:
        (R,) bool rows, and the mean square of a usual row (a scalar tensor).
    """
    reached = average > 0
    total = torch.stack([average.sum(), reached.sum().to(average.dtype)])
    total = sum_over_shards(total, like)
    usual = total[0] / total[1].clamp(min=1)
    return memory * keep < usual * add, usual
