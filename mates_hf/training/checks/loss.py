"""The loss that a Trainer makes: what a run trains with, for `influence/reading` to compare.

Where it is used: `MatesCallback` asks for it when training begins. The Trainer is the attached one, or the one whose
loop calls the hook (`find_trainer`); without one, nobody could say what the run trains with, and it is refused.

Trade-off: influence is what training on a candidate does, so the *candidate's* loss is the run's own. What the run
should get better at stays the likelihood of the reference task, whatever it trains with; for that the model must give
logits. A loss that equals no likelihood is a number a row, not a token: candidates then run one by one, and the
influence model learns from rows alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mates_hf.engine.preserve import remember
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.run_loss import MODEL_LOSS, RunLoss


class OwnLoss:
    """A Trainer's own `compute_loss`, called on one row as the Trainer would.

    Args:
        trainer: the attached Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch, nats/token; what the Trainer keeps of its calls (sums for its log) stays as it was."""
        trainer = self.trainer
        with _kept_attributes(trainer), trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=self._num_items(batch))
        return loss

    def _num_items(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The token count a newer Trainer would pass if every process had this row; None where it passes none."""
        trainer = self.trainer
        if not (getattr(trainer, "model_accepts_loss_kwargs", False) or trainer.compute_loss_func is not None):
            return None
        labels = batch.get("shift_labels")
        if labels is None and "labels" not in batch:
            return None
        if labels is None:
            labels = batch["labels"][..., 1:] if _shifts_labels(trainer) else batch["labels"]
        count = (labels != -100).sum()
        # The Trainer counts over all processes, and scales the loss by as many.
        averaged = getattr(trainer.args, "average_tokens_across_devices", False)
        return count * trainer.args.world_size if averaged else count


def _shifts_labels(trainer: Any) -> bool:
    """Whether the model's loss skips the first label, as newer Trainers say of it.

    Older ones count that label too, or leave it out of an encoder-decoder's, and so scale the losses of all rows of a
    batch alike. The share of a row in that is no property of the row: here each is a mean over what its loss is over.
    """
    said: bool | None = getattr(trainer, "_loss_shifts_labels", None)
    if said is not None:
        return said
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    base = getattr(trainer.model, "get_base_model", None)
    model = base() if callable(base) else trainer.model
    causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def run_loss_of(trainer: Any) -> RunLoss:
    """What a run trains with: the loss that its model returns, or the one that its Trainer makes.

    Args:
        trainer: the Trainer that trains; None where a loss of its own does not matter.

    Returns:
        The loss and its name.
    """
    from transformers import Trainer

    own = trainer is not None and (
        type(trainer).compute_loss is not Trainer.compute_loss
        or trainer.compute_loss_func is not None
        or trainer.label_smoother is not None
    )
    if not own:
        return MODEL_LOSS
    kind = type(trainer).__name__
    name = f"`{kind}.compute_loss`" if type(trainer).compute_loss is not Trainer.compute_loss else "the Trainer's loss"
    return RunLoss(OwnLoss(trainer), name, reads_all=True)


def refuse_unknown_loss() -> None:
    """Refuse a run whose loss nobody knows.

    Raises:
        UnsupportedSettingError: names the way out.
    """
    raise UnsupportedSettingError(
        "The loss that the run trains with must be known to be measured, but no `transformers.Trainer` with this "
        "callback calls its hooks. Call `callback.attach(trainer)`, or pass the loss as "
        "`MatesCallback(..., probe=DirectionalProbe(loss=...))`."
    )


@contextlib.contextmanager
def _kept_attributes(trainer: Any) -> Iterator[None]:
    """Put numbers, lists and dicts among a Trainer's attributes back: subclasses sum up what they will log.

    What they make at their first call goes, so that the first of the run makes it anew.
    """
    given = _constructor_arguments()
    there = set(vars(trainer))
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
        for name in set(vars(trainer)) - there:
            delattr(trainer, name)


@functools.cache
def _constructor_arguments() -> frozenset[str]:
    """Attributes named as these are data sets and other large things, which no loss changes."""
    from transformers import Trainer

    return frozenset(inspect.signature(Trainer.__init__).parameters)
