"""One step of the run's own optimizer on the gradients at hand, by its own code, to be undone.

Where it is used: `OneStepProbe` takes one for each candidate, and puts the parameters back by its snapshot.

An optimizer that `preconditioner` knows moves each parameter by itself, most of them each element by itself. So it
steps on one piece after the other, each with a copy of that piece's state: bit for bit the same step, without a copy
of all of the state and without a trace in it. Any other optimizer steps once on everything, and whoever calls has
copied its state.

Trade-off: a Python loop over pieces and one call of `step` for each of them, against 2 copies of the parameters for
Adam's state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.engine.preserve import local_shard, optimizer_parts
from mates_hf.influence.preconditioner import stepped_alone

_MAX_PIECE = 2**22  # elements; of a small model a 64th, so that what a piece needs is small beside the model
_MIN_PIECE = 2**12


class RealStep:
    """The next step of an optimizer; parameters without a gradient that momentum moves get one of zero.

    Args:
        optimizer: the live optimizer, unwrapped; inside `preserved`, which empties its hooks.
        learning_rates: one a parameter group.

    Attributes:
        needs_copy: true where `take` changes the optimizer's state, so that it must be copied and put back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, learning_rates: Sequence[float]) -> None:
        self._optimizer, self._rates = optimizer, list(learning_rates)
        self._alone = [stepped_alone(part) for part in optimizer_parts(optimizer)]
        self.needs_copy = not all(self._alone)
        self._moved = {id(parameter): parameter for parameter in _parameters_of_null_step(optimizer)}
        groups = [group["params"] for group in optimizer.param_groups]
        total = sum(local_shard(parameter).numel() for group in groups for parameter in group)
        self._piece = max(_MIN_PIECE, min(_MAX_PIECE, total // 64))

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
                for parameter in group["params"]:
                    if parameter.grad is not None or id(parameter) in self._moved:
                        size = self._piece if how == "elements" else parameter.numel()
                        stepped |= _step_in_pieces(part, settings, parameter, max(1, size))
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


@torch.no_grad()
def _step_in_pieces(
    part: torch.optim.Optimizer, settings: Mapping[str, Any], parameter: nn.Parameter, size: int
) -> bool:
    """Step a parameter, some rows at a time; true where a piece has state afterwards."""
    # A shallow copy of the object by hand: torch's own would convert old state in place.
    stepper: Any = object.__new__(type(part))
    vars(stepper).update(vars(part))
    whole = local_shard(parameter)
    gradient = None if parameter.grad is None else local_shard(parameter.grad)
    state = part.state.get(parameter, {})
    stepped = False
    for rows in _slices(whole, size):
        piece = nn.Parameter(_part(whole, rows))
        piece.grad = torch.zeros_like(piece) if gradient is None else _part(gradient, rows)
        stepper.state = defaultdict(dict)
        if state:
            stepper.state[piece] = {key: _copy(value, whole, rows) for key, value in state.items()}
        stepper.param_groups = [{**settings, "params": [piece]}]
        type(part).step(stepper)
        stepped |= bool(stepper.state[piece])
    return stepped


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


def _copy(value: Any, whole: Tensor, rows: slice | None) -> Any:
    """A piece's own state: of tensors like the parameter the same rows, of all else a copy."""
    if not isinstance(value, Tensor):
        return value
    local = local_shard(value)
    return (local[rows] if rows is not None and local.shape == whole.shape else local).clone()


def _like(old: Any, rate: float) -> Any:
    return torch.full_like(old, rate) if isinstance(old, Tensor) else rate
