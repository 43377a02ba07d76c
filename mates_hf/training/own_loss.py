"""The loss a run trains with, where that is not the model's own: measured by the probes, or named in one warning.

Place in the flow: `MatesCallback` asks `with_own_loss` for its probe when training begins. An attached Trainer tells
its loss; without one, hooks see neither the Trainer nor its `compute_loss`, so a `LossWatch` looks at the first
training step: a loss made elsewhere sends no gradient through the one that the model returned.

Trade-off: influence is what training on a candidate does, so the *candidate's* loss is the run's own. What the run
should get better at stays the likelihood of the reference task, whatever it trains with; for that the model must give
logits. An own loss is a number a row, not a token: candidates then run one by one, and the influence model learns from
rows alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.influence.probe import Probe
from mates_hf.preserve import remember

logger = logging.getLogger(__name__)

_ATTACH = "`callback.attach(trainer)` has the Trainer's own loss probed"


class OwnLoss:
    """A Trainer's own `compute_loss`, called on one row as the Trainer would.

    Args:
        trainer: the attached Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @classmethod
    def of(cls, trainer: Any) -> OwnLoss | None:
        """The loss of a Trainer, or None where it trains with what the model returns."""
        from transformers import Trainer

        own = (
            type(trainer).compute_loss is not Trainer.compute_loss
            or trainer.compute_loss_func is not None
            or trainer.label_smoother is not None
        )
        return cls(trainer) if own else None

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of one row, nats/token; what the Trainer keeps of its calls (sums for its log) stays as it was."""
        trainer = self.trainer
        with _kept_attributes(trainer), trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=self._num_items(batch))
        return loss

    def _num_items(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The token count the Trainer would pass if every process had this row, or None where it passes none."""
        trainer = self.trainer
        if not (getattr(trainer, "model_accepts_loss_kwargs", False) or trainer.compute_loss_func is not None):
            return None
        count = (batch["labels"][..., 1:] != -100).sum()
        # The Trainer counts over all processes, and scales the loss by as many.
        averaged = getattr(trainer.args, "average_tokens_across_devices", False)
        return count * trainer.args.world_size if averaged else count


def with_own_loss(probe: Probe, trainer: Any, args: Any) -> Probe:
    """The probe, with the attached Trainer's own loss of a candidate where it has one.

    Args:
        probe: as the user gave it; a loss set there is kept.
        trainer: the attached Trainer, or None.
        args: the run's `TrainingArguments`.

    Returns:
        The same probe or a copy. Warns where `args` alone tell that the run's loss is another one.
    """
    if not takes_loss(probe):
        return probe
    if trainer is not None:
        loss = OwnLoss.of(trainer)
        return probe if loss is None else dataclasses.replace(probe, loss=loss)  # type: ignore[type-var]
    if args.label_smoothing_factor:
        _warn(f"the run trains with `label_smoothing_factor={args.label_smoothing_factor}`")
    return probe


def takes_loss(probe: Probe) -> bool:
    """True for a probe that measures the likelihood and could measure another loss."""
    return dataclasses.is_dataclass(probe) and getattr(probe, "loss", ...) is None


def _warn(reason: str) -> None:
    logger.warning("The probes measure the plain negative log-likelihood, but %s. %s.", reason, _ATTACH)


class LossWatch:
    """Looks at the first forward and backward pass of training: is the loss trained with the one the model returns?

    A hook on the model sees its output, a hook on the loss in it sees whether a gradient arrives; both change nothing
    and are gone after one step. Not used under `torch.compile`, where hooks would become a part of the graph.

    Args:
        model: the model that trains, as hooks are given it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._returned = self._reached = False
        self._handles: list[Any] = [model.register_forward_hook(self._see_output)]

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return  # an evaluation before the first step
        self._handles.pop(0).remove()
        loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            self._returned = True
            self._handles.append(loss.register_hook(self._see_gradient))

    def _see_gradient(self, gradient: Tensor) -> None:
        self._reached = True

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> None:
        """Take the hooks away, and warn if the run trains with another loss."""
        self.close()
        if not self._returned:
            _warn("the run computes its loss outside of the model, which is called without `labels`")
        elif not self._reached:
            _warn("the run computes its loss outside of the model, whose own loss takes no part in the first step")


@contextlib.contextmanager
def _kept_attributes(trainer: Any) -> Iterator[None]:
    """Numbers, lists and dicts among a Trainer's attributes are put back: subclasses sum up what they will log."""
    given = _constructor_arguments()
    put_back = [
        (name, remember(value, look_inside=False))
        for name, value in vars(trainer).items()
        if name not in given and isinstance(value, (bool, int, float, list, dict))
    ]
    try:
        yield
    finally:
        for name, back in put_back:
            setattr(trainer, name, back())


@functools.cache
def _constructor_arguments() -> frozenset[str]:
    """Attributes named as these are data sets and other large things, which no loss changes."""
    from transformers import Trainer

    return frozenset(inspect.signature(Trainer.__init__).parameters)
