"""The live model under a `FeatureInfluenceModel`: whether it can be read, and whether it is as the fit has seen it.

Where it is used: `feature_model` asks here before it runs the model. Trade-off: one reading of all weights tells
whether they are those of the fit, at every prediction; that is little next to a forward pass a candidate.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from mates_hf.engine.digest import live_digest
from mates_hf.engine.model_traits import is_sharded, unwrap
from mates_hf.errors import MatesError

logger = logging.getLogger(__name__)

_NAMED = ("head_gradient", "hidden", "inputs")


def check_arguments(
    features: Any,
    num_errors: Any,
    tokens_per_batch: Any,
    max_seconds: Any,
    seed: Any,
    processor: Any,
    column: Any,
) -> str:
    """Check the arguments of the influence model.

    Args:
        features: Its `features`.
        num_errors: Its `num_errors`.
        tokens_per_batch: Its `tokens_per_batch`.
        max_seconds: Its `max_seconds`.
        seed: Its `seed`.
        processor: Its `processor`.
        column: Its `column`.

    Returns:
        The kind of the features: `"head_gradient"`, `"hidden"`, `"inputs"`, `"encoder"` or `"function"`.

    Raises:
        ValueError: the first that is outside its range, by its name.
    """
    is_path = isinstance(features, os.PathLike) or (
        isinstance(features, str) and ("/" in features or Path(features).is_dir())
    )
    if isinstance(features, nn.Module) or is_path:
        kind = "encoder"
    elif callable(features) and not isinstance(features, type):
        kind = "function"
    elif isinstance(features, str) and features in _NAMED:
        kind = features
    else:
        raise ValueError(
            "`features` must be 'head_gradient', 'hidden', 'inputs', a function, or an encoder (a model of "
            f"transformers, its folder or repository), got {features!r}."
        )
    if isinstance(features, nn.Module) and processor is None:
        raise ValueError(
            "`processor` must be given with an encoder, got None. Pass `AutoImageProcessor.from_pretrained(name)`."
        )
    if kind != "encoder" and (processor is not None or column is not None):
        raise ValueError("`processor` and `column` are for an encoder as `features`. Leave them out.")
    for name, value, least in (("num_errors", num_errors, 1), ("tokens_per_batch", tokens_per_batch, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
    if max_seconds is not None and not (isinstance(max_seconds, (int, float)) and max_seconds > 0):
        raise ValueError(f"`max_seconds` must be a number above 0, or None, got {max_seconds!r}.")
    return kind


def readable(model: Any, *, runs: bool = True) -> nn.Module:
    """The module to run, or to ask how it reads its rows.

    Args:
        model: The live model, wrapped or not.
        runs: Whether each candidate is run through it.

    Returns:
        The module, unwrapped.

    Raises:
        TypeError: it is no module.
        MatesError: its weights are divided among processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be the live model (a torch.nn.Module), got {type(model).__name__}.")
    if runs and is_sharded(model):
        raise MatesError(
            "A FeatureInfluenceModel runs the model in one process, so its weights must be whole there, and are "
            "sharded. Use `NgramInfluenceModel` or `EncoderInfluenceModel`."
        )
    return unwrap(model)


def tell_other_weights(model: nn.Module, fitted_at: str | None, told: set[str]) -> None:
    """Warn once of weights that a fit has not seen.

    Args:
        model: The live model, unwrapped.
        fitted_at: Digest of the weights of the fit, or None.
        told: Digests that were warned of, which this adds to.
    """
    here = live_digest(model)
    if fitted_at is None or here == fitted_at or here in told:
        return
    told.add(here)
    logger.warning(
        "A FeatureInfluenceModel predicts by a model whose weights are others than those it was fitted at: influence "
        "changes as a model trains. Fit it again at these weights, or ask `evaluate` with fresh labels how well it "
        "still predicts."
    )
