"""Losses of single examples for models whose own loss has none: contrastive ones, and those that draw random numbers.

Where it is used: given to a probe, `DirectionalProbe(loss=contrastive_loss(bank))`. Trade-off: what is measured is no
longer exactly what is trained. A contrastive run compares each pair with the other pairs of its batch, which nobody
knows beforehand. A fixed bank of pairs stands for those, and a fixed draw of noise for all noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.data.batches import LossFunction
from mates_hf.data.collated import forked_rng
from mates_hf.data.examples import content_hash
from mates_hf.engine.model_traits import accepts, named_output
from mates_hf.influence.run_loss import model_loss


def contrastive_loss(bank: Mapping[str, Any]) -> LossFunction:
    """The loss of a pair among fixed other pairs, for models such as CLIP whose loss compares the rows of a batch.

    The pair must be found by either of its sides: the mean cross-entropy of its text among the texts of the bank, and
    of its image among the images.

    Args:
        bank: A batch of other pairs as the collator of the run makes it, 16 to 64 of them. Tokens are padded to the
            length that single rows have (`padding="max_length"`).

    Returns:
        A function of a model and a batch of one pair, for `DirectionalProbe(loss=...)`.

    Raises:
        ValueError: the bank is no batch of tensors with 2 pairs or more.
    """
    fixed = {name: value for name, value in bank.items() if isinstance(value, Tensor) and value.dim()}
    if not fixed or min(len(value) for value in fixed.values()) < 2:
        raise ValueError(
            "`bank` must be a collated batch of 2 pairs or more, got "
            f"{ {name: tuple(value.shape) for name, value in fixed.items()} or type(bank).__name__ }. Collate some "
            "rows: `collator([dataset[i] for i in range(32)])`."
        )

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        joined = {name: _with_bank(name, batch[name], value) for name, value in fixed.items() if name in batch}
        output = model(**{name: value for name, value in joined.items() if accepts(model, name)})
        by_text, by_image = (named_output(output, name) for name in ("logits_per_text", "logits_per_image"))
        if not isinstance(by_text, Tensor) or not isinstance(by_image, Tensor):
            raise TypeError(
                f"`contrastive_loss` needs a model with `logits_per_text` and `logits_per_image`, such as CLIP, got "
                f"{type(model).__name__}. Write the loss of a pair among others yourself: `loss(model, batch)`."
            )
        first = torch.zeros(1, dtype=torch.int64, device=by_text.device)
        sides = [nn.functional.cross_entropy(side[:1].float(), first) for side in (by_text, by_image)]
        return (sides[0] + sides[1]) / 2

    return loss


def _with_bank(name: str, one: Tensor, others: Tensor) -> Tensor:
    """A pair in front of the bank's."""
    if one.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"`{name}` of the bank must have the shape of a row's, {tuple(one.shape[1:])}, got "
            f"{tuple(others.shape[1:])}. Pad tokens to one length (`padding='max_length'`), and resize images to one "
            "size."
        )
    return torch.cat([one, others.to(one.device)])


def seeded_loss(loss: LossFunction | None = None) -> LossFunction:
    """A loss on random streams that follow from the row, for models that draw random numbers in their forward pass.

    Each time a row is computed the same numbers are drawn, so that its loss at two weights differs by the weights
    alone. The streams of python, numpy and torch, on the CPU and on the current GPU, are put back afterwards.

    Args:
        loss: The loss of a batch of one row. None takes the model's own.

    Returns:
        A function of a model and a batch of one row, for `DirectionalProbe(loss=...)`.
    """

    def seeded(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with forked_rng(int.from_bytes(content_hash(batch, with_labels=True)[:4], "little")):
            value = model_loss(model, batch) if loss is None else loss(model, batch)
        if value is None:
            raise TypeError(
                f"{type(model).__name__} must return a loss for a batch, got none. Give `seeded_loss` the loss that "
                "the run trains with, `loss(model, batch)`."
            )
        return value

    return seeded
