"""How much of a model's work an input that is no text makes, in positions of a token: pixels, sound.

Where it is used: `reading` asks once. Micro-batches are sized and FLOPs are counted by positions, two multiplications
and additions a parameter, and an image has none that could be counted.

Trade-off: one forward pass of one row is counted, operation by operation. Rows of another size are taken to cost in
proportion to their values, which leaves out what attention adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mates_hf.data.batches import Reading
from mates_hf.data.feeds import model_batch
from mates_hf.engine.model_traits import accepts, is_sharded
from mates_hf.influence.compared_rows import num_values

USUAL_VALUES = Reading().values_per_position


def values_per_position(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> float:
    """Input values that are no text whose forward pass costs as much as that of one token position.

    Args:
        model: In eval mode, without gradients.
        batch: Collated, of one row.
        device: Where the model's inputs go.

    Returns:
        A number above 0; that of a usual model where the operations cannot be counted, or all inputs are text.
    """
    num = num_values(batch)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not num or not parameters or is_sharded(model):
        return USUAL_VALUES
    from torch.utils.flop_counter import FlopCounterMode

    given = model_batch(batch, Reading(), device).with_labels()
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            model(**{name: value for name, value in given.items() if accepts(model, name)})
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what is wrong with the model shows where its loss is asked for
        return USUAL_VALUES
    positions = counter.get_total_flops() / (2 * parameters)
    return num / positions if positions > 0 else USUAL_VALUES
