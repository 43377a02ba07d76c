"""What the state of torch's adaptive optimizers says of the next step: their numbers, put into an `AdaptiveStep`.

Where it is used: `preconditioner` picks one of these functions by the optimizer's class.

| `torch.optim` | `coefficient` (t steps taken) | P |
|---|---|---|
| `Adam`, `AdamW` | lr (1−β1) / (1−β1^(t+1)) | 1 / (sqrt(v_eff / (1−β2^(t+1))) + eps) |
| `NAdam` | lr ((1−μ) / (1−Πμ) + (1−β1) μ' / (1−Πμ μ')) | as Adam |
| `RAdam` | as Adam, times the rectification r while there is one | sqrt(1−β2^(t+1)) / (sqrt(v_eff) + eps), else 1 |
| `Adamax` | as Adam | 1 / max(β2 u, sqrt(E[g_B²]) + eps) |
| `RMSprop` | lr | 1 / (sqrt(v_eff − (α ḡ)²) + eps), with ḡ = 0 unless centred |
| `Adagrad` | lr / (1 + t lr_decay) | 1 / (sqrt(S + E[g_B²]) + eps) |
| `Adadelta` | lr | sqrt(Δ + eps) / sqrt(v_eff + eps) |

`v_eff` and Δ are explained in `adaptive_step`. Trade-off: formulas written out once more, by torch's source, so that a
step can be told from without being taken; tests hold each against the real one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from mates_hf.influence.optimizer.adaptive_step import CentredStep, PeakStep, RatioStep, RootStep, UndividedStep
from mates_hf.influence.optimizer.parameter_step import ParameterStep

State = Mapping[str, Any]


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
    return RootStep(
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
    return RootStep(
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
        return UndividedStep(parameter, group, state["exp_avg_sq"], first_rate=rate, **shared)
    rate *= math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    return RootStep(
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
    return PeakStep(
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
    return CentredStep(
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
    return RootStep(
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
    return RatioStep(
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
