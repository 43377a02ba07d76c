"""One step of the run's own optimizer on the gradients at hand, by its own code, to be undone.

Where it is used: `OneStepProbe` takes one for each candidate, and puts the parameters back by its snapshot;
`LossReductionProbe` takes one after the other.

An optimizer that `preconditioner` knows moves each parameter by itself, most of them each element by itself. So it
steps on one piece after the other, each with a copy of that piece's state: bit for bit the same step, without a copy
of all of the state and without a trace in it. Small parameters share a call, so that they share launches as well. Any
other optimizer steps once on everything, and whoever calls has copied its state.

Trade-off: a Python loop over pieces and one call of `step` for each of them, against 2 copies of the parameters for
Adam's state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.engine.preserve import copy_all, local_shard, optimizer_parts
from mates_hf.influence.preconditioner import stepped_alone

_MAX_PIECE = 2**22  # elements; on a processor a 64th of the model, so that what a piece needs is small beside it
_MIN_PIECE = 2**12

_Piece = tuple[nn.Parameter, slice | None]  # rows of a parameter; None is all of it


class RealStep:
    """The next step of an optimizer; parameters without a gradient that momentum moves get one of zero.

    Args:
        optimizer: the live optimizer, unwrapped; inside `preserved`, which empties its hooks.
        learning_rates: one a parameter group.
        stays: Whether steps follow each other and change the optimizer's state, as in training.

    Attributes:
        needs_copy: true where `take` changes the optimizer's state, so that it must be copied and put back.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, learning_rates: Sequence[float], *, stays: bool = False
    ) -> None:
        self._optimizer, self._rates = optimizer, list(learning_rates)
        self._alone = [stepped_alone(part) for part in optimizer_parts(optimizer)]
        self.needs_copy = stays or not all(self._alone)
        self._moved = {id(parameter): parameter for parameter in _parameters_of_null_step(optimizer)}
        groups = [group["params"] for group in optimizer.param_groups]
        shards = [local_shard(parameter) for group in groups for parameter in group]
        on_host = all(shard.device.type == "cpu" for shard in shards)
        total = sum(shard.numel() for shard in shards)
        self._piece = max(_MIN_PIECE, min(_MAX_PIECE, total // 64)) if on_host else _MAX_PIECE

    def take(self) -> bool:
        """Move the parameters.

        Returns:
            True where the optimizer has state of at least one step now, whether it had before or not.
        """
        if self.needs_copy:
            for parameter in self._moved.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = _like(group["lr"], rate)
            # The class's method: schedulers and gradient scalers replace the instance's, to count and to unscale.
            type(self._optimizer).step(self._optimizer)
            return has_stepped(self._optimizer)
        rates = iter(self._rates)
        stepped = False
        for part, how in zip(optimizer_parts(self._optimizer), self._alone, strict=True):
            for group in part.param_groups:
                settings = {**group, "lr": _like(group["lr"], next(rates))}
                moved = [p for p in group["params"] if p.grad is not None or id(p) in self._moved]
                for pieces in _pieces(moved, self._piece, whole=how == "tensors"):
                    stepped |= _step_on(part, settings, pieces)
        return stepped


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """True where there is state of at least one step (Adagrad has state before it)."""
    states = [state for part in optimizer_parts(optimizer) for state in part.state.values() if state]
    return any(float(state["step"]) > 0 for state in states if "step" in state) or any("step" not in s for s in states)


def _parameters_of_null_step(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters that a step with zero gradient moves: those with state, or all of a group that keeps none (SGD).

    In a batch another row reaches them; without a gradient of zero, what momentum does would be the candidate's doing.
    """
    moved: list[nn.Parameter] = []
    for part in optimizer_parts(optimizer):
        for group in part.param_groups:
            trainable = [parameter for parameter in group["params"] if parameter.requires_grad]
            moved += [parameter for parameter in trainable if part.state.get(parameter)] or trainable
    return moved


def _pieces(parameters: Sequence[nn.Parameter], size: int, *, whole: bool) -> Iterator[list[_Piece]]:
    """Some rows of a large parameter, or as many small ones as are about as large together."""
    gathered: list[_Piece] = []
    total = 0
    for parameter in parameters:
        shard = local_shard(parameter)
        for rows in [None] if whole else _slices(shard, max(1, size)):
            num = _part(shard, rows).numel()
            if gathered and total + num > size:
                yield gathered
                gathered, total = [], 0
            gathered.append((parameter, rows))
            total += num
    if gathered:
        yield gathered


@torch.no_grad()
def _step_on(part: torch.optim.Optimizer, settings: Mapping[str, Any], pieces: Sequence[_Piece]) -> bool:
    """Step on pieces of parameters; true where one of them has state afterwards."""
    # A shallow copy of the object by hand: torch's own would convert old state in place.
    stepper: Any = object.__new__(type(part))
    vars(stepper).update(vars(part))
    stepper.state = defaultdict(dict)
    stepped_on, to, of, unreached = [], [], [], []
    for parameter, rows in pieces:
        whole = local_shard(parameter)
        piece = nn.Parameter(_part(whole, rows))
        stepped_on.append(piece)
        if parameter.grad is None:
            piece.grad = torch.empty_like(piece)
            unreached.append(piece.grad)
        else:
            piece.grad = _part(local_shard(parameter.grad), rows)
        for key, value in part.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                of.append(_own(value, whole, rows))
                value = torch.empty_like(of[-1])
                to.append(value)
            stepper.state[piece][key] = value
    copy_all(to, of)
    if unreached:
        torch._foreach_zero_(unreached)
    stepper.param_groups = [{**settings, "params": stepped_on}]
    type(part).step(stepper)
    return any(bool(stepper.state[piece]) for piece in stepped_on)


def _slices(tensor: Tensor, size: int) -> Iterator[slice | None]:
    """Rows of a tensor, of about `size` elements together; None is all of it."""
    if tensor.numel() <= size or tensor.dim() == 0:
        yield None
        return
    rows = max(1, size * len(tensor) // tensor.numel())
    for start in range(0, len(tensor), rows):
        yield slice(start, start + rows)


def _part(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _own(value: Tensor, whole: Tensor, rows: slice | None) -> Tensor:
    """What of a parameter's state a piece has: of tensors like the parameter the same rows, of others all."""
    local = local_shard(value)
    return local[rows] if rows is not None and local.shape == whole.shape else local


def _like(old: Any, rate: float) -> Any:
    return torch.full_like(old, rate) if isinstance(old, Tensor) else rate
