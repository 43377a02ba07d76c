"""Where the weights that train are, in a common form: in the model's parameters, or in the buffers of an engine.

Where it is used: whoever moves, averages or hashes the live weights, or wants their gradient, asks the model's store.
In place (one process, DDP, FSDP2) these are the model's own parameters. DeepSpeed updates float32 copies in flat
buffers; there the store gives one `Fragment` a parameter, and what is written to it reaches the model by `written`.

Trade-off: an engine is found by the model that it trains, which `adopt_engine` must have been told once.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mates_hf.engine.fragments import Exact
from mates_hf.engine.model_traits import unwrap


class WeightStore(Protocol):
    """The weights that train, as a probe reads and moves them."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """By the names of the model's parameters, tied ones once; sharded ones hold this process's part."""
        ...

    def forget_derived(self) -> None:
        """Drop what was derived from the weights' values, so that the next forward pass derives it anew."""
        ...

    def remember(self) -> Exact:
        """What `written` cannot make of the weights alone, to be given to it once they are put back."""
        ...

    def written(self, exact: Exact | None = None, *, failing: bool = False) -> None:
        """Must follow every write to the parameters: the next forward pass is at what was written.

        Args:
            exact: what `remember` gave, where its weights were put back.
            failing: an error is on its way, of which other processes may not know.
        """
        ...

    def backward(self, values: Tensor, weights: Tensor) -> None:
        """Add the gradient of the weighted sum of `values` to the parameters' `.grad`.

        Of sharded weights all processes call it, and get their part of the mean over processes.

        Args:
            values: losses, with a graph.
            weights: What each loss is multiplied with, of the same shape.
        """
        ...


class ModelWeights:
    """Weights in the model's own parameters.

    Args:
        model: the live model, unwrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's; of one sharded by FSDP2 the sharded ones."""
        self.forget_derived()
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def forget_derived(self) -> None:
        """An enclosing autocast caches low-precision copies of parameters, FSDP2 gathered ones."""
        torch.clear_autocast_cache()
        for module in self._model.modules():
            reshard: Any = getattr(module, "reshard", None)
            if hasattr(module, "unshard") and callable(reshard):
                reshard()

    def remember(self) -> Exact:
        """Nothing: forward passes read what is written."""
        return []

    def written(self, exact: Exact | None = None, *, failing: bool = False) -> None:
        """Drop what was derived.

        Args:
            exact: not used.
            failing: not used.
        """
        self.forget_derived()

    def backward(self, values: Tensor, weights: Tensor) -> None:
        """A plain backward pass."""
        values.backward(weights)


# The store itself lies at the engine's optimizer: here it would keep the model alive that it is found by.
_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def weight_store(model: nn.Module) -> WeightStore:
    """Where the weights of a live model are; `model` is unwrapped."""
    found = _engines.get(model)
    engine = None if found is None else found()
    if engine is None:
        return ModelWeights(model)
    from mates_hf.engine.deepspeed_shards import weights_of

    return weights_of(engine, model)


def adopt_engine(model: nn.Module, optimizer: Any) -> None:
    """Find the engine's weights from here on, where an optimizer is DeepSpeed's.

    Args:
        model: the live model.
        optimizer: its optimizer, wrapped by accelerate or not, or as `unwrap_optimizer` gives it.
    """
    module, engine = unwrap(model), engine_optimizer(optimizer)
    if engine is not None:
        _engines[module] = weakref.ref(engine)
    else:
        _engines.pop(module, None)


def engine_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's optimizer inside what accelerate, or this package, wraps around it; None where there is none."""
    for each in (optimizer, getattr(optimizer, "engine", None), getattr(optimizer, "optimizer", None)):
        if type(each).__module__.startswith("deepspeed.runtime."):
            return each
    return None


def ids_in_store(model: nn.Module, ids: Collection[int]) -> set[int]:
    """Ids of the store's parameters that stand for parameters of the model with these ids."""
    stored = weight_store(model).parameters().values()
    return {id(parameter) for parameter in stored if id(getattr(parameter, "source", parameter)) in ids}
