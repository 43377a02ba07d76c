"""Passages of a reference task cut to a length, and what is left of them.

Where it is used: `reference`, whenever a task is made, and when it is fitted to a model's context. Trade-off: what is
asked for stands at a passage's end, so passages are cut from the left and lose their first tokens.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from mates_hf.data.examples import ExampleRows
from mates_hf.data.passages import LossOn, both_weights
from mates_hf.data.rows import TokenRows
from mates_hf.data.weighted import Weights

logger = logging.getLogger("mates_hf.data.reference")  # where people look for warnings of a task


def cut_passages(
    name: str,
    rows: TokenRows,
    loss_on: LossOn,
    description: Mapping[str, Any],
    max_length: int,
    what: str,
    weights: Weights | None = None,
) -> dict[str, Any]:
    """The arguments of a task of passages that are cut, without those that have no target; warns once of both.

    Args:
        name: Name of the task.
        rows: The passages; of a task on `"both"` with labels on the completions, or with weights made of these.
        loss_on: Which tokens are targets.
        description: What is recorded of the task so far.
        max_length: Most tokens of a passage, the last ones.
        what: What sets that limit, for the warning.
        weights: Weights of the tokens, or None.

    Returns:
        Arguments of `ReferenceTask`.

    Raises:
        ValueError: the limit is below 2 tokens.
    """
    if max_length < 2:
        raise ValueError(f"{what} must be at least 2 tokens, got {max_length}: a passage's first token is no target.")
    lengths = rows.lengths
    num_cut = int((lengths > max_length).sum())
    if num_cut:
        # Position of each token counted from its passage's end, so that the last `max_length` stay.
        kept = np.repeat(rows.offsets[1:], lengths) - np.arange(len(rows.values)) <= max_length
        weights = None if weights is None else weights[kept]
        rows = TokenRows(
            values=rows.values[kept],
            offsets=np.concatenate([[0], np.cumsum(np.minimum(lengths, max_length))]).astype(np.int64),
            labels=None if rows.labels is None else rows.labels[kept],
        )
    with_target = rows.num_targets > 0
    num_dropped = int((~with_target).sum())
    if num_cut or num_dropped:
        logger.warning(
            "Reference task `%s`, %d passages: %d were longer than %s (%d tokens) and cut from the left; %d have no "
            "target token and were left out.",
            name,
            len(rows),
            num_cut,
            what,
            max_length,
            num_dropped,
        )
    counts = {
        "num_cut": description.get("num_cut", 0) + num_cut,
        "num_dropped": description.get("num_dropped", 0) + num_dropped,
    }
    if num_dropped:
        weights = None if weights is None else weights[np.repeat(with_target, rows.lengths)]
        rows = rows.take(with_target)
    if loss_on == "both" and weights is None:
        weights, rows = both_weights(rows), dataclasses.replace(rows, labels=None)
    return {
        "name": name,
        "rows": rows,
        "loss_on": loss_on,
        "description": {**description, **counts},
        "weights": weights,
    }


def check_parts(name: Any, rows: Any, description: Any) -> None:
    """Raise where an argument of the class itself, rather than of `from_dataset`, is of another type."""
    if not isinstance(rows, (TokenRows, ExampleRows)):
        raise TypeError(
            f"`rows` must be TokenRows, got {type(rows).__name__}. `ReferenceTask.from_dataset(dataset, tokenizer, "
            'text_column="text")` makes a task of texts, `from_dataset(dataset, input_ids_column="input_ids")` of '
            "token ids."
        )
    if not isinstance(name, str) or not isinstance(description, Mapping):
        raise TypeError(
            "`name` must be a str and `description` a mapping, got "
            f"{type(name).__name__} and {type(description).__name__}."
        )


def check_loss_on(loss_on: str) -> None:
    """Raise a `ValueError` where this is no way to count targets."""
    if loss_on not in ("all", "completion", "both"):
        raise ValueError(f"`loss_on` must be 'all', 'completion' or 'both', got {loss_on!r}.")
