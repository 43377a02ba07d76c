"""A filter by words from files: where no model is named, pool and passages are counted, and nothing is trained.

Where it is used: by `fit_selector` without a model. It reads what a fit reads, and refuses what a fit refuses.

Trade-off: settings of the warm-up and the probe mean nothing here, so one that was changed raises an error.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from mates_hf.data.column_types import TOKENS
from mates_hf.prediction.moore_lewis import MooreLewisModel
from mates_hf.reporting.lines import finite
from mates_hf.selection.selector import MatesSelector
from mates_hf.training.fit.inputs import (
    load_tokenizer,
    read_pool,
    read_reference,
    refuse_without_tokenizer,
    require_texts,
)
from mates_hf.training.fit.rows import tokens_of, trainable
from mates_hf.training.fit.settings import FitSettings

_COUNT = ("max_length", "pool_rows", "reference_limit", "loss_on", "seed")  # settings that change what is counted
_MAY_STAY = ("device", "dtype")  # what a script may name for every fit


def require_counted(settings: FitSettings) -> dict[str, Any]:
    """The settings that count where no model is named.

    Args:
        settings: How the selector is fitted.

    Returns:
        Those that change what is counted, by name.

    Raises:
        ValueError: one that means nothing without a model was changed.
    """
    changed = [
        one.name
        for one in dataclasses.fields(settings)
        if one.name not in (*_COUNT, *_MAY_STAY) and getattr(settings, one.name) != one.default
    ]
    if changed:
        raise ValueError(
            f"`{'`, `'.join(changed)}` mean nothing where no model is asked. Leave them out, or name a `model`."
        )
    return {name: getattr(settings, name) for name in _COUNT}


def count_filter(
    names: Mapping[str, Any], pool: Any, reference: Any, settings: FitSettings, *, distil: bool, progress: bool
) -> tuple[MatesSelector, dict[str, Any]]:
    """Read pool and reference, and count them.

    Args:
        names: What `fit_selector` was given, by name.
        pool: The pool in any form that `load_rows` takes.
        reference: Passages in any form that `load_rows` takes, `"lm-eval:TASK"`, or a `ReferenceTask`.
        settings: How the selector is fitted.
        distil: Whether a selector of texts is wanted as well.
        progress: Whether to show progress bars.

    Returns:
        The selector, and what is known of it as JSON values.

    Raises:
        OSError: something is not there.
        ValueError: something cannot be counted.
    """
    started = time.perf_counter()
    loaded, column = read_pool(pool, names["column"], names["pool_split"], settings, names.get("allow"))
    require_texts(loaded, column, distil)
    tokenizer = None if names["tokenizer"] is None else load_tokenizer("", names["tokenizer"])
    if tokenizer is None and column != TOKENS:
        refuse_without_tokenizer(None, f"the pool's column `{column}` becomes tokens")
    task = read_reference(reference, tokenizer, settings, names["reference_column"], None)
    rows = tokens_of(loaded, column, tokenizer, settings.max_length, progress)
    kept, facts = trainable(rows, task)
    model = MooreLewisModel(seed=settings.seed).fit(task, kept)
    about = {
        "step": 0,
        "num_usable": len(kept),
        "separation": finite(model.separation),
        "read": {**facts, "pool": loaded.told, "column": column, "mean_tokens": float(kept.lengths.mean())},
        "reference": {"name": task.name},
        "num_passages": len(task),
        "max_length": settings.max_length,
        "seconds": {"count": time.perf_counter() - started},
        "flops": {},
    }
    return MatesSelector(model, tokenizer, max_length=settings.max_length), about
