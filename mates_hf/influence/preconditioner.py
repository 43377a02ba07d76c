"""How the live optimizer would move each parameter, in closed form: the null step, and what one more gradient changes.

Where it is used: `DirectionalProbe` needs the point after the null step and the preconditioner P there; both are read
from the optimizer's state without a step and without a copy of that state. The forms are in the `*_step` modules; here
is which optimizer has one, and what can be asked of an optimizer at all. `docs/optimizers.md` is the table to read.

Trade-off: only optimizers whose source we have read are known, by exact class. An unknown one is refused rather than
taken for SGD, because gradient products without the right P rank candidates differently; `OneStepProbe` takes its real
steps instead.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mates_hf.engine.preserve import optimizer_parts
from mates_hf.engine.weight_store import engine_optimizer
from mates_hf.errors import MatesError
from mates_hf.influence.optimizer import adaptive_state, factored_step
from mates_hf.influence.optimizer.muon_step import MuonStep
from mates_hf.influence.optimizer.parameter_step import ParameterStep as ParameterStep
from mates_hf.influence.optimizer.parameter_step import add_up as add_up
from mates_hf.influence.optimizer.parameter_step import grouped as grouped
from mates_hf.influence.optimizer.parameter_step import scaled_sums as scaled_sums
from mates_hf.influence.optimizer.parameter_step import sum_of_squares as sum_of_squares
from mates_hf.influence.optimizer.sgd_step import SgdStep
from mates_hf.influence.optimizer.together import multiply as multiply
from mates_hf.influence.optimizer.together import squares_of as squares_of
from mates_hf.influence.optimizer.together import wide_dtype

# `make(parameter, state, group, lr)`: the parameter's next step; None where no step has been taken with it.
_MakeStep = Callable[[nn.Parameter, Mapping[str, Any], Mapping[str, Any], float], ParameterStep | None]

_KNOWN: dict[type, _MakeStep] = {
    torch.optim.AdamW: adaptive_state.adamw_step,
    torch.optim.Adam: adaptive_state.adam_step,
    torch.optim.NAdam: adaptive_state.nadam_step,
    torch.optim.RAdam: adaptive_state.radam_step,
    torch.optim.Adamax: adaptive_state.adamax_step,
    torch.optim.RMSprop: adaptive_state.rmsprop_step,
    torch.optim.Adagrad: adaptive_state.adagrad_step,
    torch.optim.Adadelta: adaptive_state.adadelta_step,
    torch.optim.SGD: SgdStep,
}
for _name, _make in (("Muon", MuonStep), ("Adafactor", factored_step.torch_adafactor_step)):
    if hasattr(torch.optim, _name):  # newer than the oldest torch supported
        _KNOWN[getattr(torch.optim, _name)] = _make
_NUMBERS = ("step", "mu_product")  # of a parameter's state
_SCALED_BY_NORM = (factored_step.torch_adafactor_step, factored_step.transformers_adafactor_step)
_NEED_WHOLE_TENSORS = (MuonStep, *_SCALED_BY_NORM)


class UnsupportedOptimizerError(MatesError):
    """A probe does not know how this optimizer steps."""


class FreshOptimizerError(MatesError):
    """The optimizer has no state yet, so its next step is not like the ones that training takes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(
            f"`optimizer` must have state from at least one step, got a fresh {type(optimizer).__name__}. It is "
            "supported: train a step first, or load its state."
        )


class ZeroLearningRateError(MatesError):
    """Every learning rate is 0, so no candidate has any influence."""


def unwrap_optimizer(optimizer: Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's `AcceleratedOptimizer`, or the one given.

    DeepSpeed's is given as one that holds the `Fragment`s of the model's weights.

    Args:
        optimizer: wrapped by accelerate or not.
        model: the live model, unwrapped; DeepSpeed's optimizer does not say which it trains.

    Returns:
        The torch optimizer.

    Raises:
        UnsupportedOptimizerError: it is neither.
    """
    # By name, because other wrappers (Lookahead) change the step and must not be looked through.
    inner = optimizer.optimizer if type(optimizer).__module__.startswith("accelerate.") else optimizer
    engine = engine_optimizer(inner)
    if engine is not None and model is not None:
        from mates_hf.engine.deepspeed_optimizer import ShardedOptimizer
        from mates_hf.engine.deepspeed_shards import weights_of

        return ShardedOptimizer(weights_of(engine, model), engine)
    if not isinstance(inner, torch.optim.Optimizer):
        raise UnsupportedOptimizerError(
            f"`optimizer` must be a torch.optim.Optimizer, got {type(inner).__module__}.{type(inner).__qualname__}. "
            "Train with an optimizer of torch.optim, by itself or under DeepSpeed's ZeRO."
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


def require_steps(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of which no probe can take a step: its `step()` needs more than gradients, or does nothing.

    Args:
        optimizer: the live optimizer, unwrapped.

    Raises:
        UnsupportedOptimizerError: says what stands in the way.
    """
    parts = optimizer_parts(optimizer)
    if [id(group) for part in parts for group in part.param_groups] != [id(g) for g in optimizer.param_groups]:
        raise UnsupportedOptimizerError(
            f"`optimizer.param_groups` of a container must be those of its `optimizers`, one after the other, got "
            f"{type(optimizer).__name__} with others. Use `mates_hf.CombinedOptimizer`, or build the container "
            "as it does."
        )
    for part in parts:
        kind, reason = type(part), None
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            reason = "whose step evaluates the loss several times"
        elif isinstance(part, torch.optim.SparseAdam):
            reason = "which takes sparse gradients only"
        elif any(group.get("relative_step") or group.get("lr") is None for group in part.param_groups):
            reason = "which makes up its own learning rate (pass `lr=` and `relative_step=False`)"
        elif hasattr(part, "optimizer_dict"):
            reason = "which steps during the backward pass (use the optimizer that is not layerwise)"
        elif hasattr(part, "fused_backward"):
            reason = "which steps during the backward pass"
        if reason is not None:
            raise UnsupportedOptimizerError(
                f"`optimizer` must move all parameters in one step() from gradients that are there, got "
                f"{kind.__module__}.{kind.__qualname__}, {reason}. Train with AdamW or another optimizer that does."
            )


def require_real_steps(optimizer: torch.optim.Optimizer, probe: str = "OneStepProbe") -> None:
    """Refuse an optimizer that a probe cannot take steps with and put back.

    Args:
        optimizer: the live optimizer, unwrapped.
        probe: what messages call the probe.

    Raises:
        UnsupportedOptimizerError: says what stands in the way.
    """
    if engine_optimizer(optimizer) is not None:
        raise UnsupportedOptimizerError(
            f"`{probe}` takes real steps, which DeepSpeed's engine takes alone. Use `DirectionalProbe`, or train "
            "with DDP or FSDP2."
        )
    require_steps(optimizer)


def require_known(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that has no closed form here, by exact class; a container is as good as its parts.

    Args:
        optimizer: the live optimizer, unwrapped.

    Raises:
        UnsupportedOptimizerError: names those that are known, or says why this one cannot be used.
    """
    require_steps(optimizer)
    for part in optimizer_parts(optimizer):
        kind, make = type(part), _make_step_of(part)
        if make is None:
            known = ", ".join(sorted(kind.__name__ for kind in _KNOWN))
            ways = "Use `OneStepProbe`, which takes real steps of any torch optimizer (`probe=OneStepProbe()`), or one"
            if engine_optimizer(optimizer) is not None:
                ways = "Leave `optimizer` out of the DeepSpeed config, so that it steps with the Trainer's, or use one"
            raise UnsupportedOptimizerError(
                f"`optimizer` must be one whose preconditioner DirectionalProbe knows (torch.optim's {known}, or "
                f"Adafactor of transformers), got {kind.__module__}.{kind.__qualname__}. {ways} of these."
            )
        sharded = any(hasattr(p, "to_local") for group in part.param_groups for p in group["params"])
        if sharded and make in _NEED_WHOLE_TENSORS:
            raise UnsupportedOptimizerError(
                f"`optimizer` must be elementwise (AdamW, SGD) where parameters are sharded, got {kind.__name__}, "
                "whose step needs whole matrices. Train it without sharding, or use another optimizer."
            )


def stepped_alone(optimizer: torch.optim.Optimizer) -> Literal["elements", "tensors"] | None:
    """What an optimizer's step moves each by itself, whatever the others are: see `real_step`.

    Args:
        optimizer: one, not a container of several.

    Returns:
        Elements of a parameter, or whole parameters; None where its step is not known.
    """
    make = _make_step_of(optimizer)
    if make is None:
        return None
    if make not in _NEED_WHOLE_TENSORS:
        return "elements"
    sharded = any(hasattr(p, "to_local") for group in optimizer.param_groups for p in group["params"])
    return None if sharded else "tensors"


def parameter_steps(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    learning_rates: Sequence[float] | None = None,
    rarely: Collection[int] | None = None,
) -> list[ParameterStep]:
    """The next step of each of `parameters` that the optimizer moves.

    A parameter that an adaptive optimizer has no state for is left out: no batch has ever reached it.

    Args:
        optimizer: the live optimizer, unwrapped; a container of several works like them.
        parameters: trainable parameters of the model.
        learning_rates: one a parameter group, of the step to come; None reads the optimizer's own.
        rarely: ids of the parameters that a batch may leave rows of out (`rarely_reached_parameters`); None is all
            matrices.

    Returns:
        In the order of the optimizer's groups.

    Raises:
        UnsupportedOptimizerError: the optimizer is not known, or moves none of the parameters.
        FreshOptimizerError: it has not taken a step yet.
        ZeroLearningRateError: all learning rates are 0.
    """
    require_known(optimizer)
    rates = iter(group_learning_rates(optimizer, learning_rates))
    wanted = {id(parameter) for parameter in parameters}
    states = _states_on_host(optimizer, wanted)
    steps: list[ParameterStep] = []
    num_moved = 0
    for part in optimizer_parts(optimizer):
        make = _make_step_of(part)
        assert make is not None
        for group, lr in zip(part.param_groups, rates):  # noqa: B905  (the rates of the parts that follow are left)
            for parameter in group["params"]:
                if id(parameter) not in wanted:
                    continue
                num_moved += 1
                state = states.get(id(parameter), {})
                # A gradient scaler that skipped every step so far leaves state behind that has seen none.
                stepped = bool(state) and float(state.get("step", 1)) > 0
                step = make(parameter, state, group, lr) if stepped or isinstance(part, torch.optim.SGD) else None
                if step is not None:
                    step.rows_may_be_rare = rarely is None or id(parameter) in rarely
                    steps.append(step)
    if not num_moved:
        raise UnsupportedOptimizerError(
            f"`optimizer` must hold trainable parameters of `model`, got {type(optimizer).__name__} with none of its "
            f"{len(parameters)}. Build the optimizer from this model's parameters; copies in another precision cannot "
            "be probed."
        )
    if not any(step.moves for step in steps):
        raise FreshOptimizerError(optimizer)
    return steps


def _states_on_host(optimizer: torch.optim.Optimizer, wanted: Collection[int]) -> dict[int, dict[str, Any]]:
    """The state of each parameter by its id, counters and other single numbers as such, after one wait for a device.

    Fused and capturable optimizers keep a counter on the device for each parameter.
    """
    states: dict[int, dict[str, Any]] = {}
    for part in optimizer_parts(optimizer):
        for parameter in (p for group in part.param_groups for p in group["params"] if id(p) in wanted):
            states[id(parameter)] = dict(part.state.get(parameter, {}))
    numbers = [
        (state, name, value)
        for state in states.values()
        for name, value in state.items()
        if name in _NUMBERS and isinstance(value, Tensor) and not hasattr(value, "to_local")
    ]
    if numbers:
        device = numbers[0][2].device
        numbers.sort(key=lambda number: (str(number[2].dtype), str(number[2].device)))  # alike ones in one kernel
        parts = [
            torch.stack([value.detach().reshape(()) for _, _, value in alike]).to(device, wide_dtype(device))
            for _, alike in itertools.groupby(numbers, key=lambda number: (number[2].dtype, number[2].device))
        ]
        for (state, name, _), value in zip(numbers, torch.cat(parts).tolist(), strict=True):
            state[name] = value
    _add_norms(optimizer, states)
    return states


def _add_norms(optimizer: torch.optim.Optimizer, states: Mapping[int, dict[str, Any]]) -> None:
    """Put the norms of parameters whose rates depend on them into their state, after one wait for a device."""
    parameters = [
        parameter
        for part in optimizer_parts(optimizer)
        if _make_step_of(part) in _SCALED_BY_NORM
        for group in part.param_groups
        for parameter in group["params"]
        if states.get(id(parameter))
    ]
    if parameters:
        norms = torch.stack(list(torch._foreach_norm([parameter.detach() for parameter in parameters])))
        for parameter, norm in zip(parameters, norms.tolist(), strict=True):
            states[id(parameter)][factored_step.NORM] = norm


def rarely_reached_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that a batch may leave rows of out, for a token or an expert that it does not have.

    Those are tables that ids are looked up in, the output head, and whatever is named after experts. In all other
    matrices a row that is small beside the others is small, not rare: queries and keys are.

    Args:
        model: the live model, unwrapped.

    Returns:
        Ids, to be used while the model lives.
    """
    found = {id(p) for name, p in model.named_parameters() if "expert" in name.lower()}
    get_head = getattr(model, "get_output_embeddings", None)
    modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = get_head() if callable(get_head) else None
    modules += [head] if isinstance(head, nn.Module) else []
    return found | {id(parameter) for module in modules for parameter in module.parameters()}


def _make_step_of(optimizer: torch.optim.Optimizer) -> _MakeStep | None:
    kind = type(optimizer)
    if kind.__module__ == "transformers.optimization" and kind.__name__ == "Adafactor":
        return factored_step.transformers_adafactor_step
    return _KNOWN.get(kind)
