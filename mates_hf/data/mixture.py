"""One reference task of several, each with its share of the loss.

Where it is used: `ReferenceTask.mixture`. Trade-off: a share is of the loss and not of the passages, so a task of few
or short passages counts as it was asked to, and is the noisier for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mates_hf.data.arrow import joined_rows


def mixed(tasks: Sequence[Any], weights: Sequence[float] | None, name: str | None) -> dict[str, Any]:
    """The arguments of a task that is made of others.

    Args:
        tasks: two reference tasks or more, by the same tokenizer.
        weights: share of each task in the loss; None gives them all the same.
        name: what the mixture is called; None joins their names.

    Returns:
        Arguments of `ReferenceTask`, with passages of all tasks, one task after the other.

    Raises:
        ValueError: fewer than two tasks, not one weight for each, or a weight that is none.
        UnsupportedSettingError: a task is of examples.
    """
    shares = [1.0] * len(tasks) if weights is None else [float(weight) for weight in weights]
    if len(tasks) < 2 or len(shares) != len(tasks):
        raise ValueError(
            f"A mixture must have two tasks or more and one weight for each, got {len(tasks)} tasks and "
            f"{len(shares)} weights."
        )
    if not (np.isfinite(shares).all() and min(shares) >= 0 and max(shares) > 0):
        raise ValueError(f"`weights` must be finite and at least 0, and one of them above 0, got {shares}.")
    instead = "Put their examples into one dataset (`datasets.concatenate_datasets`), and make one task of it."
    texts = [task.text("a mixture", instead) for task in tasks]
    every = [np.ones(len(task.rows.values)) if task.weights is None else task.weights for task in tasks]
    kinds = {task.loss_on for task in tasks}
    parts = [{**task.description, "weight": share} for task, share in zip(tasks, shares, strict=True)]
    return {
        "name": name or "+".join(task.name for task in tasks),
        "rows": joined_rows(texts),
        "loss_on": kinds.pop() if len(kinds) == 1 else "all",
        "description": {"source": "mixture", "parts": parts},
        "weights": np.concatenate(
            [share * own / task.num_targets for share, own, task in zip(shares, every, tasks, strict=True)]
        ),
        "is_evaluated": any(task.is_evaluated for task in tasks),
    }
