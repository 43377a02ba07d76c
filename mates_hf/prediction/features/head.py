"""The output head of a model: the layer that makes logits, what it read, and what it got wrong.

Where it is used: `feature_model` runs candidates through it. The gradient of a candidate's loss by the head's weights
is the product of the two, so they say most of what training on it does.

Trade-off: one forward pass in which the logits of a micro-batch exist in full; no layer below the head is looked at.
The head is found by running one row. It is the model's own output embedding, else the last linear layer whose output
is the logits.

Shapes: T trained targets of a batch, D width of the hidden state, V classes (a vocabulary).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.data.batches import ModelBatch
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.passes import logits_of_batch

WAY_OUT = (
    'Name the layer (`head="classifier"`, as in `model.named_modules()`), or pass features of your own: '
    "`FeatureInfluenceModel(features=function)`, which takes the model and a batch and returns one row a candidate."
)


class OutputHead:
    """The output head of a live model.

    Args:
        model: The model, unwrapped.
        batch: One row on its device, which is run to find the head.
        given: The head, or its name in the model; None looks for it.

    Attributes:
        module: The layer.
        width: Width of what it reads.
        num_classes: Number of logits.

    Raises:
        UnsupportedSettingError: no layer makes the logits.
        ValueError: the model has no module of the name that was given, or it is not run.
    """

    def __init__(self, model: nn.Module, batch: ModelBatch, given: nn.Module | str | None = None) -> None:
        self._model = model
        self.module = find_head(model, batch, given)
        hidden, logits = self._run(batch)
        if hidden.dim() < 2 or hidden.shape[:-1] != logits.shape[:-1]:
            raise UnsupportedSettingError(
                f"The output head must read one hidden state for each of its logits, got {tuple(hidden.shape)} for "
                f"logits of {tuple(logits.shape)}. {WAY_OUT}"
            )
        self.width, self.num_classes = int(hidden.shape[-1]), int(logits.shape[-1])

    def read(self, batch: ModelBatch) -> tuple[Tensor, Tensor, Tensor]:
        """What the head read and said at each trained target of a batch, row after row.

        Args:
            batch: The batch, on the model's device.

        Returns:
            (T, D) float32 hidden states, (T, V) float32 probabilities, and (T,) int64 labels.

        Raises:
            UnsupportedSettingError: logits do not have the shape that the labels call for.
            ValueError: a label is none of the classes.
        """
        hidden, logits = self._run(batch)
        positions, labels, lowest, highest = batch.targets()
        shape = list(batch.labels.shape)
        if len(shape) > 1:
            shape[1] += batch.num_virtual
        if list(logits.shape[:-1]) != shape:
            raise UnsupportedSettingError(
                f"The model must give logits of the shape of its labels {tuple(shape)} and one more dimension, got "
                f"{tuple(logits.shape)}. {WAY_OUT}"
            )
        if not 0 <= lowest <= highest < self.num_classes:
            raise ValueError(
                f"Labels must be -100 or 0 to {self.num_classes - 1}, as the model's logits, got {lowest} to "
                f"{highest}. Check the labels of the dataset, or `num_labels` of the model."
            )
        where, wanted = positions.to(logits.device), labels.to(logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            states = hidden.reshape(-1, self.width)[where.to(hidden.device)].float()
            said = torch.softmax(logits.reshape(-1, self.num_classes)[where].float(), -1)
        return states.to(said.device), said, wanted

    def _run(self, batch: ModelBatch) -> tuple[Tensor, Tensor]:
        """The head's input and the model's logits."""
        with _inputs_of(self.module) as found:
            logits = logits_of_batch(self._model, batch)
        if not found:
            raise ValueError(
                f"`head` must be a layer that the model runs once on each batch, and {type(self.module).__name__} is "
                f"not run. {WAY_OUT}"
            )
        return found[-1], logits


@contextlib.contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is given, call by call."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None:
            found.append(given.detach())

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def find_head(model: nn.Module, batch: ModelBatch, given: nn.Module | str | None = None) -> nn.Module:
    """The layer that makes a model's logits.

    Args:
        model: The live model, unwrapped.
        batch: One row, on its device.
        given: The layer or its name; None looks for it.

    Returns:
        The model's output embedding where it has one that makes logits, else the last linear layer whose output they
        are.

    Raises:
        UnsupportedSettingError: there is none.
        ValueError: the model has no module of that name.
    """
    if given is not None:
        return _named(model, given)
    get = getattr(model, "get_output_embeddings", None)
    try:
        own = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        own = None
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append((module, output))

    layers = {id(module): module for module in model.modules() if isinstance(module, nn.Linear) or module is own}
    handles = [module.register_forward_hook(note) for module in layers.values()]
    try:
        with torch.no_grad():
            logits = logits_of_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for module, output in reversed(seen):
        # A model may cap or scale what its output embedding makes; any other layer must make the very logits.
        if output.shape == logits.shape and (module is own or torch.equal(output, logits)):
            return module
    raise UnsupportedSettingError(
        f"The features of a candidate are read where the logits are made, and no linear layer of "
        f"{type(model).__name__} makes its logits. {WAY_OUT}"
    )


def _named(model: nn.Module, given: nn.Module | str) -> nn.Module:
    """The module that was given, or that has the name."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(given, str):
        found = modules.get(given)
    else:
        found = given if any(given is module for module in modules.values()) else None
    if found is None or found is model:
        names = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"`head` must be a layer of the model, or its name, got {given if isinstance(given, str) else type(given)}"
            f". Its last linear layers are {names[-3:]}."
        )
    return found


def name_of_head(model: nn.Module, given: nn.Module | str | None) -> str | None:
    """The name of a head that was given, which a saved influence model keeps; None where it is looked for."""
    if given is None or isinstance(given, str):
        return given
    found = _named(model, given)
    names: list[str] = [name for name, module in model.named_modules() if module is found]
    return names[0]
