"""Layers of the model compiled for the forward passes of candidates, where rows have one shape. Optional, and off.

Where it is used: `passes.token_losses` runs its micro-batches through `CompiledLayers` where the probe asks for it
(`DirectionalProbe(compile_layers=True)`). The repeated layers are compiled and not the whole model: they share one
graph, and an output head that makes its losses in chunks stays as it is.

Trade-off: the first micro-batch waits for the compiler, a minute or more, and compiled sums have another order. So it
pays where a round has many candidates. Micro-batches of another shape run eagerly, and so does everything where
rows have several lengths, where weights are sharded, where the run has compiled its model, or where compiling failed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.data.batches import Candidates
from mates_hf.engine.model_traits import is_sharded

logger = logging.getLogger(__name__)

LEAST_BATCHES = 4  # of one shape: fewer are done before the compiler is
BACKEND = "inductor"

_prepared: weakref.WeakKeyDictionary[nn.Module, list[tuple[nn.Module, Any]]] = weakref.WeakKeyDictionary()


class CompiledLayers:
    """Runs micro-batches of rows of one length with compiled layers, and others as they are.

    Args:
        model: The live model, unwrapped.
        rows: Candidates that are run in micro-batches, the largest first.
    """

    def __init__(self, model: nn.Module, rows: Candidates) -> None:
        self._model, self._num_rows, self._size = model, len(rows), 0
        has_one_length = len(rows) > 0 and int(rows.lengths.min()) == int(rows.lengths.max())
        self._layers = _layers_of(model) if has_one_length else []

    def run(self, num_rows: int, work: Callable[[], Tensor]) -> Tensor:
        """What `work` returns of a micro-batch.

        Args:
            num_rows: Number of its rows.
            work: Runs the model, without a gradient.

        Returns:
            Losses of the micro-batch.
        """
        self._size = self._size or num_rows
        if not self._layers or num_rows != self._size or self._num_rows < LEAST_BATCHES * num_rows:
            return work()
        from torch._dynamo.exc import TorchDynamoException

        for layer, compiled in self._layers:
            layer._compiled_call_impl = compiled
        try:
            with torch.compiler.set_stance("default"):  # around it everything is run eagerly
                return work()
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            logger.warning("Layers could not be compiled (%s). Probes run them as they are.", reason)
        finally:
            for layer, _ in self._layers:
                layer._compiled_call_impl = None
        self._layers = _prepared[self._model] = []
        return work()


def _layers_of(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The repeated layers of a model, each with what runs it compiled; none where they are not to be compiled."""
    known = _prepared.get(model)
    if known is not None:
        return known
    found: list[tuple[nn.Module, Any]] = []
    if hasattr(torch.compiler, "set_stance") and not is_sharded(model) and not _is_compiled(model):
        found = [
            (layer, torch.compile(layer._call_impl, dynamic=False, backend=BACKEND)) for layer in _repeated(model)
        ]
    _prepared[model] = found
    return found


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """Modules of the outermost lists whose modules are of one class, of two or more."""
    if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(layer) for layer in module}) == 1:
        yield from module
        return
    for child in module.children():
        yield from _repeated(child)


def _is_compiled(model: nn.Module) -> bool:
    """Whether the run has compiled the model, or a part of it."""
    parts: Iterator[Any] = model.modules()
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)
