"""What a loop without the Trainer is refused for: numbers, ways of training, an optimizer of another model.

`loop.MatesRounds` asks before its first step, and for the parameters again at each boundary. Like `loop`, this module
knows no object of the Trainer. The trade-off: only what the model and the optimizer show can be checked; what the loop
does with them in between is its own business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from mates_hf.engine.model_traits import unwrap
from mates_hf.engine.preserve import optimizer_parts
from mates_hf.engine.processes import Processes
from mates_hf.engine.weight_store import adopt_engine, weight_store
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.influence.preconditioner import unwrap_optimizer
from mates_hf.training import resume
from mates_hf.training.checks.parallel import parallel_refusals
from mates_hf.training.clock import RowClock

_STATE_KEYS = {"version", "step", "position", "own_start", "own_epoch", "own_sha256", "origin_step", "last_round"}


def check_numbers(batch_size: Any, max_steps: Any, max_grad_norm: Any, seed: Any) -> None:
    """Refuse arguments of `order` that are no numbers of steps, rows or gradients.

    Args:
        batch_size: Rows of one optimizer step, over all processes.
        max_steps: Optimizer steps of the whole run.
        max_grad_norm: The threshold of the gradient's norm, or None.
        seed: Seed of the shuffle.

    Raises:
        TypeError: `max_steps` is missing.
        ValueError: Names the argument, its range and its value.
    """
    if max_steps is None:
        raise TypeError(
            "`order` must be given `max_steps`, the optimizer steps of the whole run, got None. An epoch has "
            "as many steps as the pool has batches: `math.ceil(len(pool) / batch_size)`."
        )
    for name, value, least in (("batch_size", batch_size, 1), ("max_steps", max_steps, 1), ("seed", seed, 0)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm >= 0):
        raise ValueError(f"`max_grad_norm` must be None or a number of at least 0, got {max_grad_norm!r}.")
    size = Processes.of_run().size
    if batch_size % size:
        raise ValueError(
            f"`batch_size` must be the rows of an optimizer step over all processes, so that each of the {size} "
            f"gets as many, got {batch_size}. Set it to a multiple of {size}."
        )


def check_state(state_dict: Any) -> None:
    """Refuse what is no state of a loop's rounds.

    Args:
        state_dict: What `MatesRounds.load_state_dict` was given.

    Raises:
        TypeError: It is no mapping.
        ValueError: It has not what `MatesRounds.state_dict` returns.
        MatesError: Another version of this library saved it.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"`state_dict` must be what `state_dict()` returned, got {type(state_dict).__name__}.")
    resume.require_version(state_dict)
    missing = sorted((_STATE_KEYS if state_dict.get("step") else {"step"}) - state_dict.keys())
    if missing:
        raise ValueError(
            f"`state_dict` must be what `state_dict()` returned, which has `{'`, `'.join(missing)}`, got the keys "
            f"{sorted(map(str, state_dict))}. Load the state that was saved of MatesRounds."
        )


def make_clock(num_rows: int, batch_size: int, step: int, saved: Mapping[str, Any] | None) -> RowClock:
    """Steps and positions of a loop whose passes are the pool, in whole batches.

    Args:
        num_rows: Rows of the pool.
        batch_size: Rows of one optimizer step, over all processes.
        step: Optimizer steps done.
        saved: The state that is resumed, or None.

    Returns:
        The clock.
    """
    clock = RowClock(batches_per_epoch=-(-num_rows // batch_size), accumulation=1, batch_rows=batch_size)
    first_epoch = step // clock.steps_per_epoch
    return dataclasses.replace(
        clock,
        first_epoch=first_epoch,
        start_step=step,
        first_epoch_step=first_epoch * clock.steps_per_epoch,
        start_position=int(saved["position"]) if saved else 0,
        own_start=int(saved["own_start"]) if saved else None,
    )


def refuse_unsupported(model: Any, optimizer: Any) -> None:
    """Refuse a way of training on several devices that a probe cannot look into.

    Args:
        model: The model as the loop calls it.
        optimizer: Its optimizer.

    Raises:
        TypeError: `model` is no module.
        MatesError: Names the way of training, or what `optimizer` is, and the way out.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got {type(model).__name__}.")
    found = parallel_refusals(None, unwrap(model))
    if not found:
        unwrap_optimizer(optimizer, unwrap(model))
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        found.append(
            "nn.DataParallel splits a batch behind the loop: start one process a GPU with `accelerate launch`"
        )
    if found:
        raise UnsupportedSettingError(f"MatesRounds cannot select data in this run: {'; '.join(found)}.")


def require_its_parameters(model: nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer of another model, or a model whose parameters were replaced.

    Args:
        model: The model that was given, unwrapped.
        optimizer: The optimizer that was given.

    Raises:
        MatesError: Says how many parameters are of another model.
    """
    adopt_engine(model, optimizer)
    known = {id(p) for p in (*model.parameters(), *weight_store(model).parameters().values())}
    parts = optimizer_parts(unwrap_optimizer(optimizer, model))
    given = [parameter for part in parts for group in part.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in known for parameter in given)
    if foreign:
        raise MatesError(
            f"`optimizer` must move the parameters of the `model` that was given to `order`, but {foreign} of its "
            f"{len(given)} are none of that model's. Give the model that trains, and both as `accelerator.prepare` "
            "returned them; call `order` after that."
        )


def has_state(optimizer: Any) -> bool:
    """Whether an optimizer keeps something of the steps it took."""
    return any(part.state for part in optimizer_parts(optimizer))


def round_in(state: Mapping[str, Any]) -> int:
    """The round that a state was trained on; -1 where it was saved before the first one."""
    last_round = state["last_round"]
    return -1 if last_round is None else int(last_round["number"])
