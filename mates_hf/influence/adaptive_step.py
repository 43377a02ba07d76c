"""Optimizers that divide each element's gradient by its own running size: Adam and its kin.

Place in the flow: `preconditioner` makes one of these for each parameter.

| `torch.optim` | `coefficient` (t steps taken) | P |
|---|---|---|
| `Adam`, `AdamW` | lr (1−β1) / (1−β1^(t+1)) | 1 / (sqrt(v_eff / (1−β2^(t+1))) + eps) |
| `NAdam` | lr ((1−μ) / (1−Πμ) + (1−β1) μ' / (1−Πμ μ')) | as Adam |
| `RAdam` | as Adam, times the rectification r while there is one | sqrt(1−β2^(t+1)) / (sqrt(v_eff) + eps), else 1 |
| `Adamax` | as Adam | 1 / max(β2 u, sqrt(E[g_B²]) + eps) |
| `RMSprop` | lr | 1 / (sqrt(v_eff − (α ḡ)²) + eps), with ḡ = 0 unless centred |
| `Adagrad` | lr / (1 + t lr_decay) | 1 / (sqrt(S + E[g_B²]) + eps) |
| `Adadelta` | lr | sqrt(Δ + eps) / sqrt(v_eff + eps) |

`v_eff = β2 v + (1−β2) E[g_B²]` is the second moment after a step on a usual batch B (the larger of it and the running
maximum under amsgrad). The square of a *batch* gradient matters: that of a single candidate's gradient over-damps at
large batch. Rows that hardly any batch reaches are taken for usual ones once one does (`rarely_reached`).

Trade-off: what a candidate itself adds to the second moment, and through L2 weight decay to its first order, is left
out; it is of the order of one row in a batch.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.influence.parameter_step import ParameterStep, chunks, rarely_reached, row_means
from mates_hf.preserve import local_shard

State = Mapping[str, Any]


class AdaptiveStep(ParameterStep):
    """θ' = shrink θ − (first_rate m' + gradient_rate g) / D(v'), m' = β m + (1−β) g, v' = keep v + add g².

    Args:
        parameter: the parameter.
        group: its parameter group.
        second: v, the running second moment.
        keep: factor of v in v'.
        add: factor of g² in v'.
        to_average: v times this is the average of g_B² so far.
        first: m, or None.
        beta: its decay.
        first_rate: of m'.
        gradient_rate: of g itself.
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

    @abc.abstractmethod
    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        """D(v'), in place or new."""

    def _next_second(self, second: Tensor, square: Tensor) -> Tensor:
        return (second * self._keep).add_(square, alpha=self._add)

    def _next_beside(self, beside: list[Tensor], gradient: Tensor | None) -> list[Tensor]:
        return beside

    def _size(self, second: Tensor) -> Tensor:
        """Mean squares of rows of v."""
        return row_means(second)

    def write_null(self) -> None:
        """Move the parameter to where a step with zero gradient takes it."""
        for theta, second, first, *beside in chunks(
            local_shard(self.parameter), self._second, self._first, *self._beside
        ):
            decay = theta * self.l2
            divisor = self._divisor(self._next_second(second, decay * decay), *self._next_beside(beside, decay))
            update = decay * self._gradient_rate
            if first is not None:
                update.add_((first * self._beta).add_(decay, alpha=1 - self._beta), alpha=self._first_rate)
            theta.mul_(self._shrink)
            theta.addcdiv_(update, divisor, value=-1)

    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale` and P, in place."""
        at_least = self._at_least(squares)
        for g, second, square, floor, *beside in chunks(gradient, self._second, squares, at_least, *self._beside):
            expected = self._average(second) if square is None else square
            if floor is not None:
                expected = torch.maximum(expected, floor.reshape(-1, *(1,) * (g.dim() - 1)))
            g.mul_(scale).div_(self._divisor(self._next_second(second, expected), *self._next_beside(beside, None)))

    def _average(self, second: Tensor) -> Tensor:
        return second * self._to_average

    def _at_least(self, squares: Tensor | None) -> Tensor | None:
        """(R,) what E[g_B²] is raised to in rows that hardly any batch reaches; every batch reaches a vector."""
        if self._second.dim() < 2:
            return None
        memory = self._size(self._state_second)
        average = memory * self._to_average if squares is None else row_means(squares)
        found = rarely_reached(memory, average, keep=self._keep, add=self._add, like=self._state_second)
        if found is None:
            return None
        return torch.where(found[0], found[1], torch.zeros_like(found[1])).to(self._second.dtype)


class _RootStep(AdaptiveStep):
    """D = sqrt(max(v', running maximum) / correction) + eps."""

    def __init__(self, *args: Any, correction: float = 1.0, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._correction, self._eps = correction, eps

    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        for peak in beside:
            second = torch.maximum(second, peak)
        return second.div(self._correction).sqrt_().add_(self._eps)


class _UndividedStep(AdaptiveStep):
    """RAdam before its variance is tractable: D = 1."""

    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        return torch.ones_like(second)


class _CentredStep(_RootStep):
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

    def write_null(self) -> None:
        super().write_null()
        if self._carried is not None:
            local_shard(self.parameter).add_(self._carried, alpha=-self._carried_rate)


class _PeakStep(AdaptiveStep):
    """Adamax: D = max(β2 u, |g| + eps); u takes the place of v, and a usual |g_B| that of g_B²."""

    def __init__(self, *args: Any, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eps = eps

    def _next_second(self, second: Tensor, square: Tensor) -> Tensor:
        return torch.maximum(second * self._keep, square.sqrt().add_(self._eps))

    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        return second

    def _size(self, second: Tensor) -> Tensor:
        return row_means(second) ** 2

    def _average(self, second: Tensor) -> Tensor:
        return torch.zeros_like(second)  # how far below its peak a usual gradient is, u does not tell


class _RatioStep(AdaptiveStep):
    """Adadelta: D = sqrt(v' + eps) / sqrt(Δ + eps), with Δ the running mean of squared updates."""

    def __init__(self, *args: Any, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eps = eps

    def _divisor(self, second: Tensor, *beside: Tensor) -> Tensor:
        (updates,) = beside
        return second.add(self._eps).sqrt_().div_(updates.add(self._eps).sqrt_())


def _decay(group: Mapping[str, Any], lr: float, decoupled: bool) -> dict[str, float]:
    decay = float(group["weight_decay"])
    return {"shrink": 1 - lr * decay, "l2": 0.0} if decoupled else {"shrink": 1.0, "l2": decay}


def _adam_settings(state: State, group: Mapping[str, Any]) -> tuple[int, float, float, dict[str, Any]]:
    """Steps taken, both corrections at the next one, and what Adam and its kin share."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    steps = int(state["step"])
    shared = {
        "keep": beta2,
        "add": 1 - beta2,
        "to_average": 1 / (1 - beta2**steps),
        "first": state["exp_avg"],
        "beta": beta1,
    }
    return steps, 1 - beta1 ** (steps + 1), 1 - beta2 ** (steps + 1), shared


def adam_step(parameter: nn.Parameter, state: State, group: Mapping[str, Any], lr: float) -> ParameterStep:
    """`torch.optim.Adam`, whose weight decay is added to the gradient unless the group says it is decoupled."""
    _, correction1, correction2, shared = _adam_settings(state, group)
    return _RootStep(
        parameter,
        group,
        state["exp_avg_sq"],
        first_rate=lr / correction1,
        correction=correction2,
        eps=float(group["eps"]),
        beside=[state["max_exp_avg_sq"]] if group["amsgrad"] else [],
        **shared,
        **_decay(group, lr, group.get("decoupled_weight_decay", False)),
    )


def adamw_step(parameter: nn.Parameter, state: State, group: Mapping[str, Any], lr: float) -> ParameterStep:
    """`torch.optim.AdamW`; groups of older versions do not say that weight decay is decoupled."""
    return adam_step(parameter, state, {"decoupled_weight_decay": True, **group}, lr)


def nadam_step(parameter: nn.Parameter, state: State, group: Mapping[str, Any], lr: float) -> ParameterStep:
    """`torch.optim.NAdam`: Nesterov's look ahead gives the gradient itself a part of the step."""
    steps, _, correction2, shared = _adam_settings(state, group)
    decay, beta1 = float(group["momentum_decay"]), shared["beta"]
    now, after = (beta1 * (1 - 0.5 * 0.96 ** (count * decay)) for count in (steps + 1, steps + 2))
    product = float(state["mu_product"]) * now
    return _RootStep(
        parameter,
        group,
        state["exp_avg_sq"],
        first_rate=lr * after / (1 - product * after),
        gradient_rate=lr * (1 - now) / (1 - product),
        correction=correction2,
        eps=float(group["eps"]),
        **shared,
        **_decay(group, lr, group["decoupled_weight_decay"]),
    )


def radam_step(parameter: nn.Parameter, state: State, group: Mapping[str, Any], lr: float) -> ParameterStep:
    """`torch.optim.RAdam`: plain momentum until the second moment's variance is tractable, then a rectified Adam."""
    steps, correction1, correction2, shared = _adam_settings(state, group)
    shared |= _decay(group, lr, group["decoupled_weight_decay"])
    longest = 2 / shared["add"] - 1
    length = longest - 2 * (steps + 1) * shared["keep"] ** (steps + 1) / correction2
    rate = lr / correction1
    if length <= 5:
        return _UndividedStep(parameter, group, state["exp_avg_sq"], first_rate=rate, **shared)
    rate *= math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    return _RootStep(
        parameter,
        group,
        state["exp_avg_sq"],
        first_rate=rate * math.sqrt(correction2),
        eps=float(group["eps"]),
        **shared,
    )


def adamax_step(parameter: nn.Parameter, state: State, group: Mapping[str, Any], lr: float) -> ParameterStep:
    """`torch.optim.Adamax`: Adam with a decaying maximum in place of the root of the second moment."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return _PeakStep(
        parameter,
        group,
        state["exp_inf"],
        keep=beta2,
        add=1 - beta2,
        to_average=1.0,
        first=state["exp_avg"],
        beta=beta1,
        first_rate=lr / (1 - beta1 ** (float(state["step"]) + 1)),
        eps=float(group["eps"]),
        l2=float(group["weight_decay"]),
    )


def rmsprop_step(parameter: nn.Parameter, state: State, group: Mapping[str, Any], lr: float) -> ParameterStep:
    """`torch.optim.RMSprop`, plain, centred, with momentum."""
    alpha, momentum = float(group["alpha"]), float(group["momentum"])
    return _CentredStep(
        parameter,
        group,
        state["square_avg"],
        keep=alpha,
        add=1 - alpha,
        to_average=1 / (1 - alpha ** float(state["step"])),
        gradient_rate=lr,
        eps=float(group["eps"]),
        l2=float(group["weight_decay"]),
        carried=state["momentum_buffer"] if momentum else None,
        carried_rate=lr * momentum,
        beside=[state["grad_avg"]] if group["centered"] else [],
    )


def adagrad_step(parameter: nn.Parameter, state: State, group: Mapping[str, Any], lr: float) -> ParameterStep | None:
    """`torch.optim.Adagrad`, whose second moment is a sum; it has state before its first step, hence the None."""
    steps = float(state["step"])
    if not steps:
        return None
    return _RootStep(
        parameter,
        group,
        state["sum"],
        keep=1.0,
        add=1.0,
        to_average=1 / steps,
        gradient_rate=lr / (1 + steps * float(group["lr_decay"])),
        eps=float(group["eps"]),
        l2=float(group["weight_decay"]),
    )


def adadelta_step(parameter: nn.Parameter, state: State, group: Mapping[str, Any], lr: float) -> ParameterStep:
    """`torch.optim.Adadelta`."""
    rho = float(group["rho"])
    return _RatioStep(
        parameter,
        group,
        state["square_avg"],
        keep=rho,
        add=1 - rho,
        to_average=1 / (1 - rho ** float(state["step"])),
        gradient_rate=lr,
        eps=float(group["eps"]),
        l2=float(group["weight_decay"]),
        beside=[state["acc_delta"]],
    )
