"""What the optimizer's next step does to one parameter: the interface, and what several optimizers share.

Where it is used: the `*_step` modules fill it in for one optimizer each, `preconditioner` picks the right one, and
`DirectionalProbe` uses nothing else. The next step with gradient g moves a parameter to `null − coefficient · P g` to
first order in g. P is that of the state, which no probe changes: the same at every point of a path.

Trade-off: tensors are worked on a few rows at a time, so that temporaries stay small beside any parameter worth
training; it costs a Python loop over pieces.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.engine.fragments import Fragment, sum_over_shards
from mates_hf.engine.preserve import local_shard

_CHUNK = 2**20  # elements worked on at once


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

    @abc.abstractmethod
    def write_null(self) -> None:
        """Move the parameter, in place, to where a step with zero gradient takes it; optimizer state is only read."""

    @abc.abstractmethod
    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale` and the transpose of P (P itself, where it is elementwise), in place.

        Args:
            gradient: local shard of a gradient of the parameter's shape.
            scale: any factor.
            squares: E[g_B²] of the same shape, or None to take the average that the optimizer's state holds.
        """

    @abc.abstractmethod
    def null_square(self) -> Tensor:
        """() squared length of the null step of the local shard, before it is rounded to the parameter's precision."""

    def usual_square(self) -> Tensor | None:
        """() squared length, in the local shard, of the step that a usual batch makes where there is no momentum.

        None where the state does not tell how large a usual gradient is.
        """
        return None

    def preconditioned(
        self, gradient: Tensor, scale: float, squares: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What `precondition` makes of a gradient that is left as it is, piece by piece.

        Args:
            gradient: local shard of a gradient of the parameter's shape.
            scale: any factor.
            squares: Squares of a usual gradient, as `precondition` takes them.

        Yields:
            Matching pieces of the parameter's local shard and of the result, the latter to be used at once.
        """
        result = gradient.clone()
        self.precondition(result, scale, squares)
        yield local_shard(self.parameter), result


def chunks(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Matching slices along dimension 0, of about 2^20 elements; None stays None.

    Slices and not a flat view, so that writing reaches the tensor whatever its strides.
    """
    tensors = [t if t is None or t.dim() else t.unsqueeze(0) for t in (first, *others)]
    rows = first.shape[0] if first.dim() else 1
    size = max(1, _CHUNK * rows // max(1, first.numel()))
    for start in range(0, rows, size):
        yield tuple(t if t is None else t[start : start + size] for t in tensors)


def sum_of_squares(tensor: Tensor) -> Tensor:
    """() sum of squares, float64 where the device has it, without a copy of the tensor."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm.to(_wide(norm.device)).square()


def add_up(squares: Iterable[Tensor]) -> Tensor:
    """() sum of scalars, in float64 where the device has it, without waiting for it."""
    parts = list(squares)
    if not parts:  # a shard without a row
        return torch.zeros((), dtype=torch.float64)
    device = parts[0].device
    return torch.stack([part.reshape(()).to(device, _wide(device)) for part in parts]).sum()


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


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


def rarely_reached(
    memory: Tensor, average: Tensor, *, keep: float, add: float, like: Any
) -> tuple[Tensor, Tensor] | None:
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
        (R,) bool rows, and the mean square of a usual row (a scalar tensor); None where there are no such rows here.
    """
    reached = average > 0
    total = torch.stack([average.sum(), reached.sum().to(average.dtype)])
    total = sum_over_shards(total, like)
    usual = total[0] / total[1].clamp(min=1)
    rarely = memory * keep < usual * add
    return (rarely, usual) if bool(rarely.any()) else None
