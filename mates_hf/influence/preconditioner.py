"""How the live optimizer would move each parameter, in closed form: the null step, and what one more gradient changes.

Place in the flow: `DirectionalProbe` needs the point after the null step and the preconditioner P there; both are read
from the optimizer's state without a step and without a copy of that state, a few rows of one tensor at a time.

The next step with gradient g moves a parameter to `null − coefficient · P ∘ g` to first order in g:

| optimizer | `coefficient` | P |
|---|---|---|
| `torch.optim.Adam`, `AdamW` (t steps taken) | lr (1−β1) / (1−β1^(t+1)) | 1 / (sqrt(v_eff / (1−β2^(t+1))) + eps) |
| `torch.optim.SGD` | lr, × (1−dampening) once there is momentum; Nesterov: × (1 + momentum) | 1 |

`v_eff = β2 v + (1−β2) E[g_B²]` is the second moment after a step on a usual batch B, and the larger of it and the
running maximum under amsgrad. Its square of a *batch* gradient matters: that of a single candidate's gradient
over-damps at large batch.

Trade-off: only optimizers whose source we have read are known. An unknown one is refused rather than taken for SGD,
because gradient products without the right P rank candidates differently.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.influence.preserve import local_shard
from mates_hf.records import MatesError

_CHUNK = 2**20  # elements worked on at once: temporaries stay small beside any parameter worth training


class UnsupportedOptimizerError(MatesError):
    """A probe does not know how this optimizer steps."""


class FreshOptimizerError(MatesError):
    """The optimizer has no state yet, so its next step is not like the ones that training takes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(
            f"`optimizer` must have state from at least one step, got a fresh {type(optimizer).__name__}: train a "
            "step first, or load its state."
        )


class ZeroLearningRateError(MatesError):
    """Every learning rate is 0, so no candidate has any influence."""


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's `AcceleratedOptimizer`, or the one given.

    Args:
        optimizer: wrapped by accelerate or not.

    Returns:
        The torch optimizer.

    Raises:
        UnsupportedOptimizerError: it is neither.
    """
    # By name, because other wrappers (Lookahead) change the step and must not be looked through.
    inner = optimizer.optimizer if type(optimizer).__module__.startswith("accelerate.") else optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise UnsupportedOptimizerError(
            f"`optimizer` must be a torch.optim.Optimizer, got {type(inner).__module__}.{type(inner).__qualname__}. "
            "Train with an optimizer of torch.optim; DeepSpeed's own cannot be probed."
        )
    return inner


def group_learning_rates(optimizer: torch.optim.Optimizer, learning_rates: Sequence[float] | None) -> list[float]:
    """The learning rate of each parameter group: those given, else the optimizer's own.

    Args:
        optimizer: the live optimizer, unwrapped.
        learning_rates: one a parameter group, or None.

    Returns:
        One a parameter group.

    Raises:
        ValueError: not one a group.
        ZeroLearningRateError: all are 0.
    """
    groups = optimizer.param_groups
    rates = [float(group["lr"]) for group in groups] if learning_rates is None else [float(r) for r in learning_rates]
    if len(rates) != len(groups):
        raise ValueError(f"`learning_rates` must have one entry a parameter group ({len(groups)}), got {len(rates)}.")
    if not any(rates):
        raise ZeroLearningRateError(
            f"`learning_rates` must not all be 0, got {rates}: with such a step no candidate changes the model. Pass "
            "the last ones that were not 0, as `learning_rates=`."
        )
    return rates


class ParameterStep(abc.ABC):
    """What the optimizer's next step does to one parameter.

    Args:
        parameter: the parameter.
        coefficient: scale of the linear term, in the learning rate's unit; the attribute is negative where the
            optimizer maximises.
        l2: weight decay that the optimizer adds to the gradient (0 where it is decoupled).
        group: the optimizer's parameter group.
    """

    def __init__(self, parameter: nn.Parameter, coefficient: float, l2: float, group: Mapping[str, Any]) -> None:
        self.parameter = parameter
        self.coefficient = -coefficient if group["maximize"] else coefficient
        self.l2 = l2

    @abc.abstractmethod
    def write_null(self) -> None:
        """Move the parameter, in place, to where a step with zero gradient takes it; optimizer state is only read."""

    @abc.abstractmethod
    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale` and P, in place.

        Args:
            gradient: local shard of a gradient of the parameter's shape.
            scale: any factor.
            squares: E[g_B²] of the same shape, or None to take the average that the optimizer's state holds.
        """


class _AdamStep(ParameterStep):
    def __init__(
        self, parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any], lr: float, decoupled: bool
    ) -> None:
        self._beta1, self._beta2 = (float(beta) for beta in group["betas"])
        self._steps = float(state["step"])
        self._correction1 = 1 - self._beta1 ** (self._steps + 1)
        self._correction2 = 1 - self._beta2 ** (self._steps + 1)
        self._lr, self._eps, decay = lr, float(group["eps"]), float(group["weight_decay"])
        self._shrink = 1 - lr * decay if decoupled else 1.0
        self._m, self._v = local_shard(state["exp_avg"]), local_shard(state["exp_avg_sq"])
        self._max = local_shard(state["max_exp_avg_sq"]) if group["amsgrad"] else None
        coefficient = lr * (1 - self._beta1) / self._correction1
        super().__init__(parameter, coefficient, 0.0 if decoupled else decay, group)

    def _denominator(self, v: Tensor, peak: Tensor | None) -> Tensor:
        if peak is not None:
            v = torch.maximum(v, peak)
        return v.div(self._correction2).sqrt_().add_(self._eps)

    def write_null(self) -> None:
        for theta, m, v, peak in _chunks(local_shard(self.parameter), self._m, self._v, self._max):
            m, v = m * self._beta1, v * self._beta2
            if self.l2:
                m.add_(theta, alpha=self.l2 * (1 - self._beta1))
                v.addcmul_(theta, theta, value=self.l2**2 * (1 - self._beta2))
            theta.mul_(self._shrink)
            theta.addcdiv_(m, self._denominator(v, peak), value=-self._lr / self._correction1)

    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        # v / (1 − β2^t) is the average of g_B² that the state already holds; with it v_eff is v, corrected anew.
        from_state = self._correction2 / (1 - self._beta2**self._steps)
        for g, v, peak, square in _chunks(gradient, self._v, self._max, squares):
            v_eff = v * from_state if square is None else (v * self._beta2).add_(square, alpha=1 - self._beta2)
            g.mul_(scale).div_(self._denominator(v_eff, peak))


class _SgdStep(ParameterStep):
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
        if not self.moves:  # has never had a gradient, and a null step brings none
            return
        for theta, buffer in _chunks(local_shard(self.parameter), self._buffer):
            decay = theta * self.l2
            if buffer is None:
                theta.sub_(decay, alpha=self._lr)
                continue
            moved = (buffer * self._momentum).add_(decay, alpha=self._kept)
            update = decay.add_(moved, alpha=self._momentum) if self._nesterov else moved
            theta.sub_(update, alpha=self._lr)

    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        gradient.mul_(scale)


def require_known(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that is not in this module's table, by exact class.

    Args:
        optimizer: the live optimizer, unwrapped.

    Raises:
        UnsupportedOptimizerError: names those that are.
    """
    kind = type(optimizer)
    if kind not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        raise UnsupportedOptimizerError(
            "`optimizer` must be torch.optim.AdamW, torch.optim.Adam or torch.optim.SGD, whose preconditioner "
            f"DirectionalProbe knows, got {kind.__module__}.{kind.__qualname__}. Use `OneStepProbe`, which takes real "
            "steps of any torch optimizer, or one of these three."
        )


def parameter_steps(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    learning_rates: Sequence[float] | None = None,
) -> list[ParameterStep]:
    """The next step of each of `parameters` that the optimizer moves.

    A parameter that Adam has no state for is left out: no batch has ever reached it.

    Args:
        optimizer: the live optimizer, unwrapped.
        parameters: trainable parameters of the model.
        learning_rates: one a parameter group, of the step to come; None reads the optimizer's own.

    Returns:
        In the order of the optimizer's groups.

    Raises:
        UnsupportedOptimizerError: the optimizer is not known, or moves none of the parameters.
        FreshOptimizerError: it has not taken a step yet.
        ZeroLearningRateError: all learning rates are 0.
    """
    require_known(optimizer)
    rates = group_learning_rates(optimizer, learning_rates)
    wanted = {id(parameter) for parameter in parameters}
    steps: list[ParameterStep] = []
    num_moved = 0
    fresh = True
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        # Groups of older AdamW have no such key.
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        for parameter in group["params"]:
            if id(parameter) not in wanted:
                continue
            num_moved += 1
            state = optimizer.state.get(parameter, {})
            if isinstance(optimizer, torch.optim.SGD):
                step = _SgdStep(parameter, state, group, lr)
                fresh = fresh and not step.moves
                steps.append(step)
            elif state:
                fresh = False
                steps.append(_AdamStep(parameter, state, group, lr, decoupled))
    if not num_moved:
        raise UnsupportedOptimizerError(
            f"`optimizer` must hold trainable parameters of `model`, got {type(optimizer).__name__} with none of its "
            f"{len(parameters)}. Build the optimizer from this model's parameters; copies in another precision cannot "
            "be probed."
        )
    if fresh:
        raise FreshOptimizerError(optimizer)
    return steps


def _chunks(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Matching slices along dimension 0, of about `_CHUNK` elements; None stays None.

    Slices and not a flat view, so that writing reaches the tensor whatever its strides.
    """
    tensors = [t if t is None or t.dim() else t.unsqueeze(0) for t in (first, *others)]
    rows = first.shape[0] if first.dim() else 1
    size = max(1, _CHUNK * rows // max(1, first.numel()))
    for start in range(0, rows, size):
        yield tuple(t if t is None else t[start : start + size] for t in tensors)
