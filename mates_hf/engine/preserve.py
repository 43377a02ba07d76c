"""Leave no trace: run the live model and optimizer through a probe or an evaluation and put every bit back.

Where it is used: around everything that runs the live model. Each probe does all of its work inside `preserved`, an
evaluation, which moves no parameter, inside `undisturbed`. Parameters are cloned, overwritten in place and copied
back, because nothing else is exact everywhere: `functional_call` is ignored by FSDP2 and recomputes at the wrong
weights under checkpointing, and adding then subtracting does not give the same float.

A backward pass of a probe is made `in_evaluation`: without dropout, and with the activations that the run saves.

Trade-off: one copy of the trainable parameters, and one of the optimizer's state only where real steps are taken. That
one can be in the host's memory: slower to put back, which does not matter once a round, and free for the device.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mates_hf.engine.weight_store import weight_store

_PLAIN = (bool, int, float, str, type(None))


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that lives in this process, sharing its storage: a DTensor's shard, else the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def copy_all(to: list[Tensor], of: list[Tensor]) -> None:
    """Copy tensors into as many others, in few launches on a device."""
    if to:
        torch._foreach_copy_(to, of)


def optimizer_parts(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that a container of several steps one after the other (`.optimizers`), else the one given."""
    parts = getattr(optimizer, "optimizers", None)
    if isinstance(parts, (list, tuple)) and parts and all(isinstance(part, torch.optim.Optimizer) for part in parts):
        return list(parts)
    return [optimizer]


class Snapshot:
    """Saved trainable parameters of a model, and the state of an optimizer where one was given.

    `parameters` are those of the model's weight store, then those that only the optimizer has.

    Args:
        model: the live model, unwrapped.
        optimizer: the live optimizer, unwrapped, to rewind as well.
        copy_state: false where the optimizer's state is only read: then it is not copied.
        on_host: whether that copy is kept in the host's memory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        copy_state: bool = True,
        on_host: bool = False,
    ) -> None:
        self._store = weight_store(model)
        found = {id(p): p for p in self._store.parameters().values()}
        for group in optimizer.param_groups if optimizer is not None else ():
            found.update((id(p), p) for p in group["params"] if p.requires_grad)
        self.parameters: list[nn.Parameter] = list(found.values())
        live = [local_shard(parameter) for parameter in self.parameters]
        self._saved = [torch.empty_like(tensor) for tensor in live]
        copy_all(self._saved, live)
        self._exact = self._store.remember()
        copied = optimizer if copy_state else None
        self._rewind_optimizer = _remember_optimizer(copied, on_host) if copied is not None else None

    def restore(self, *, failing: bool = False) -> None:
        """Copy parameters and optimizer state back and drop gradients; exact, any number of times.

        Args:
            failing: an error is on its way, of which other processes may not know.
        """
        self.rewind_parameters()
        for parameter in self.parameters:
            parameter.grad = None
        if self._rewind_optimizer is not None:
            self._rewind_optimizer()
        self._store.written(self._exact, failing=failing)

    @torch.no_grad()
    def rewind_parameters(self) -> None:
        """Copy parameters back and nothing else; whoever moves them on calls `written`."""
        copy_all([local_shard(parameter) for parameter in self.parameters], self._saved)

    @torch.no_grad()
    def shift(self, direction: Mapping[nn.Parameter, Tensor], scale: float) -> None:
        """Set every parameter to its saved value plus `scale` times its direction; those without one to the saved."""
        self.rewind_parameters()
        moved = [parameter for parameter in self.parameters if parameter in direction]
        if moved:
            changes = [local_shard(direction[parameter]) for parameter in moved]
            torch._foreach_add_([local_shard(parameter) for parameter in moved], changes, alpha=scale)
        self.written()

    def written(self) -> None:
        """Must follow every write to the parameters in place: what was derived from their old values is dropped."""
        self._store.written()


@contextmanager
def preserved(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    copy_state: bool = True,
    state_on_host: bool = False,
) -> Iterator[Snapshot]:
    """Put everything a probe may touch back to the bit, also when the body raises.

    That is: trainable parameters, `.grad` (the same tensor objects; None inside), buffers, train/eval mode and other
    plain attributes of every module, the random streams of Python, numpy, torch and the model's devices, and, where an
    `optimizer` is given, its state, parameter groups, hooks and step counters. Inside, no step hook of the optimizer
    and no hook that runs after a gradient is accumulated is called, so an optimizer that steps during backward
    does not. What was compiled runs eagerly: every new shape would be compiled again.

    Args:
        model: the live model, unwrapped.
        optimizer: the live optimizer, unwrapped, if the body takes real steps.
        copy_state: false where the body leaves the optimizer's state alone, which is then not copied.
        state_on_host: whether the copy of that state is kept in the host's memory, for a body that rewinds seldom.

    Yields:
        The snapshot, to rewind to in the middle.
    """
    snapshot = Snapshot(model, optimizer, copy_state=copy_state, on_host=state_on_host)
    gradients = [parameter.grad for parameter in snapshot.parameters]
    put_back = [_remember_modules(model), _remember_random_streams([*model.parameters(), *snapshot.parameters])]
    hooks = [getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in snapshot.parameters]
    if optimizer is not None:
        for stepper in {id(o): o for o in (optimizer, *optimizer_parts(optimizer))}.values():
            hooks += [getattr(stepper, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")]
        everyone = sys.modules[torch.optim.Optimizer.__module__]  # torch.optim deletes its attribute of that name
        hooks += [getattr(everyone, f"_global_optimizer_{when}_hooks", None) for when in ("pre", "post")]
    put_back += [_empty(registry) for registry in hooks if registry]
    try:
        for parameter in snapshot.parameters:
            parameter.grad = None
        with _eagerly():
            yield snapshot
    except BaseException:
        snapshot.restore(failing=True)
        raise
    else:
        snapshot.restore()
    finally:
        for parameter, gradient in zip(snapshot.parameters, gradients, strict=True):
            parameter.grad = gradient
        for action in reversed(put_back):
            action()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what forward passes may touch, also when the body raises; parameters and gradients are not copied.

    That is: buffers, train/eval mode and other plain attributes of every module, and the random streams of Python,
    numpy, torch and the model's devices. What was compiled runs eagerly.

    Args:
        model: the live model, unwrapped; the body must not write to its parameters.

    Yields:
        Nothing.
    """
    put_back = [_remember_modules(model), _remember_random_streams(list(model.parameters()))]
    store = weight_store(model)
    store.forget_derived()
    try:
        with _eagerly():
            yield
    finally:
        store.forget_derived()
        for action in reversed(put_back):
            action()


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode for a backward pass that keeps no more activations than the run's own: checkpointed layers stay so.

    Layers of transformers recompute in backward only where they are in training mode. Those are put into it, and out
    of it again while their own forward pass runs, so that dropout and layer drop stay off in all that is computed.
    A model that decides in its own forward pass, as models outside of transformers do, is in training mode throughout
    it, with its own probabilities of dropping at 0; what it contains is in eval mode. `preserved` puts all modes back.

    Args:
        model: the live model, unwrapped; inside `preserved`.

    Yields:
        Nothing.
    """
    model.eval()
    put_back: list[tuple[nn.Module, str, Any]] = []

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        put_back.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    try:
        for module in model.modules():
            if not _checkpoints(module):
                continue
            recompute = vars(module).get("_gradient_checkpointing_func")
            if _decides_in_call(module) and recompute is not None:
                set_attribute(module, "_gradient_checkpointing_func", _quiet(module, recompute))
            elif any(_checkpoints(inner) and _decides_in_call(inner) for inner in module.modules()):
                continue  # its layers do it, and it has the flag because every module that can have it does
            else:
                for name, value in list(vars(module).items()):
                    if "drop" in name and isinstance(value, float):
                        set_attribute(module, name, 0.0)
            set_attribute(module, "training", True)
        yield
    finally:
        for module, name, value in reversed(put_back):
            setattr(module, name, value)


def _checkpoints(module: nn.Module) -> bool:
    """True of a module that was told to recompute its activations, or those of its layers, in training mode."""
    return bool(getattr(module, "gradient_checkpointing", False))


def _decides_in_call(module: nn.Module) -> bool:
    """True of a layer that transformers checkpoints around its forward pass, not inside of it."""
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _quiet(module: nn.Module, recompute: Callable[..., Any]) -> Callable[..., Any]:
    """The checkpointing function, with the module in eval mode whenever its forward pass runs, again as well."""

    def checkpoint(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*inputs: Any, **options: Any) -> Any:
            before, module.training = module.training, False
            try:
                return forward(*inputs, **options)
            finally:
                module.training = before

        return recompute(run, *args, **kwargs)

    return checkpoint


def _eagerly() -> AbstractContextManager[Any]:
    """A context in which nothing is compiled; where nothing was compiled so far, the compiler is not even imported."""
    stance = getattr(torch.compiler, "set_stance", None)  # newer than the oldest torch supported
    if stance is None or "torch._dynamo" not in sys.modules:
        return nullcontext()
    context: AbstractContextManager[Any] = stance("force_eager")
    return context


def _empty(registry: dict[Any, Any]) -> Callable[[], None]:
    """Empty a registry of hooks in place; returns what fills it again."""
    saved = dict(registry)
    registry.clear()

    def fill() -> None:
        registry.clear()
        registry.update(saved)

    return fill


def remember(value: Any, *, look_inside: bool = True, on_host: bool = False) -> Callable[[], Any]:
    """Copy a value deeply; returns what puts the copy back into the same objects and gives the value.

    Of other objects the attributes are copied (GaLore keeps its projection in one), but not those of objects in them.
    Copies of tensors are on their device, or in the host's memory.
    """
    if isinstance(value, Tensor):
        saved = local_shard(value).to("cpu", copy=True) if on_host else local_shard(value).clone()

        def back() -> Any:
            local_shard(value).copy_(saved)
            return value

    elif isinstance(value, dict):
        entries = {key: remember(entry, look_inside=look_inside, on_host=on_host) for key, entry in value.items()}

        def back() -> Any:
            restored = {key: entry() for key, entry in entries.items()}
            value.clear()
            value.update(restored)
            return value

    elif isinstance(value, list):
        elements = [remember(element, look_inside=look_inside, on_host=on_host) for element in value]

        def back() -> Any:
            value[:] = [element() for element in elements]
            return value

    elif look_inside and hasattr(value, "__dict__") and not isinstance(value, type):
        contents = remember(vars(value), look_inside=False, on_host=on_host)

        def back() -> Any:
            contents()
            return value

    else:

        def back() -> Any:
            return value

    return back


def _remember_attributes(owner: Any) -> Callable[[], None]:
    """Numbers, texts and flags among an object's attributes (`training`, step counters, cached lengths)."""
    saved = {key: value for key, value in vars(owner).items() if isinstance(value, _PLAIN)}

    def back() -> None:
        vars(owner).update(saved)

    return back


def _remember_optimizer(optimizer: torch.optim.Optimizer, on_host: bool) -> Callable[[], None]:
    parts = [_remember_optimizer(part, on_host) for part in optimizer_parts(optimizer) if part is not optimizer]
    if parts:
        attributes = _remember_attributes(optimizer)

        def all_back() -> None:
            for undo in (*parts, attributes):
                undo()

        return all_back
    state = remember(optimizer.state, on_host=on_host)
    attributes = _remember_attributes(optimizer)
    groups = [
        (group, {key: remember(value) for key, value in group.items() if key != "params"})
        for group in optimizer.param_groups
    ]

    def back() -> None:
        state()
        attributes()
        for group, entries in groups:
            for key in [key for key in group if key != "params" and key not in entries]:
                del group[key]
            group.update({key: entry() for key, entry in entries.items()})

    return back


def _remember_modules(model: nn.Module) -> Callable[[], None]:
    """Buffers (objects and contents) and plain attributes of every module."""
    actions = [_remember_attributes(module) for module in model.modules()]
    buffers = [remember(module._buffers) for module in model.modules() if module._buffers]

    def back() -> None:
        for action in actions + buffers:
            action()

    return back


def _remember_random_streams(parameters: list[nn.Parameter]) -> Callable[[], None]:
    devices = {parameter.device for parameter in parameters if parameter.device.type not in ("cpu", "meta", "mps")}
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    on_device = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}

    def back() -> None:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for device, state in on_device.items():
            torch.get_device_module(device).set_rng_state(state, device)

    return back
