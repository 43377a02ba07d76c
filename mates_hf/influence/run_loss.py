"""The loss a run trains with: the model's own, or one that a Trainer makes.

Where it is used: `reading` compares it with what a probe would measure; where no likelihood equals it, probes measure
it row by row. Trade-off: a router's balancing loss is turned off in the model's own loss. It is a property of a batch
and not of a row, so a row alone would be charged for what its neighbours balance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mates_hf.data.batches import LossFunction
from mates_hf.engine.model_traits import accepts, named_output, takes_labels


@dataclasses.dataclass(frozen=True)
class RunLoss:
    """The loss a run trains with.

    Attributes:
        compute: mean loss of a collated batch, or None where the model gives none.
        name: what to call it.
        reads_all: true where it may read inputs that the model does not take.
    """

    compute: Callable[[nn.Module, dict[str, Any]], Tensor | None]
    name: str = "the model's own loss"
    reads_all: bool = False

    def row_loss(self) -> LossFunction:
        """The loss as a probe measures it, row by row."""

        def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
            value = self.compute(model, batch)
            if value is None:
                raise TypeError(f"A row must have a loss, got none from {self.name} of {type(model).__name__}.")
            return value

        return loss


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """The loss that the model returns for a batch, router losses left out; None where it returns none.

    Args:
        model: in any mode.
        batch: inputs and labels, on its device.

    Returns:
        A scalar tensor.
    """
    # CLIP and its kind are asked for a loss by `return_loss`, and models of no text may need no labels for one.
    if not (takes_labels(model) or batch.get("return_loss") or "input_ids" not in batch):
        return None
    given = {name: value for name, value in batch.items() if accepts(model, name)}
    with without_router_loss(model):
        output = model(**given)
    loss = None if isinstance(output, Tensor) else named_output(output, "loss")
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


MODEL_LOSS = RunLoss(model_loss)


@contextlib.contextmanager
def without_router_loss(model: nn.Module) -> Iterator[bool]:
    """Turn the router losses of a mixture of experts off: they balance a batch and are no part of a row's loss.

    Args:
        model: its config is put back.

    Yields:
        True where there was one to turn off.
    """
    config = getattr(model, "config", None)
    parts = [part for part in (config, getattr(config, "text_config", None)) if part is not None]
    on = [part for part in parts if getattr(part, "output_router_logits", False)]
    by_default = _with_router_loss_by_default(model)
    for part in on:
        part.output_router_logits = False
    handle = by_default.register_forward_pre_hook(_turn_off, with_kwargs=True) if by_default is not None else None
    try:
        yield bool(on) or handle is not None
    finally:
        for part in on:
            part.output_router_logits = True
        if handle is not None:
            handle.remove()


def _with_router_loss_by_default(model: nn.Module) -> nn.Module | None:
    """The module, the model or what an adapter wraps, whose forward adds router losses whatever its config says.

    Switch Transformers are one in transformers 4.
    """
    base = getattr(model, "get_base_model", None)
    for module in (model, base() if callable(base) else model):
        kind: Any = type(module)
        given = inspect.signature(kind.forward).parameters.get("output_router_logits")
        if given is not None and given.default is True:
            return module
    return None


def _turn_off(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {"output_router_logits": False, **kwargs}


@contextlib.contextmanager
def counted_tokens(model: nn.Module) -> Iterator[list[int]]:
    """Count what a comparison runs forward.

    Args:
        model: gets a hook, and is without it afterwards.

    Yields:
        One number, padded tokens so far.
    """
    total = [0]

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        total[0] += ids.numel() if isinstance(ids, Tensor) else 0

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield total
    finally:
        handle.remove()
