"""Whether documents that share a batch row see each other as the run trains them: the run's own loss is asked.

Where it is used: `reading` asks it of pools whose rows, or whose collator, put several documents into one row of a
batch. Tokens of the documents in front are changed: where the loss of the last document stays, it is trained as if it
stood alone, and is measured alone. Positions and borders in a batch are a wish; whether a model, its attention kernel
and its settings follow them shows here.

Trade-off: a handful of forward passes of two batches, at the present weights and at disturbed ones, because a model
that has learnt little attends to everything a little.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from mates_hf.data.batches import IGNORED
from mates_hf.data.collated import name_of
from mates_hf.data.pool import CandidatePool
from mates_hf.data.segments import ONE_DOCUMENT_A_ROW, document_starts
from mates_hf.engine.model_traits import accepts
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.compared_rows import ComparedRows
from mates_hf.influence.other_weights import at_other_weights

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


def sees_other_documents(batch: Batch, loss: Callable[[Batch], float | None], tolerance: float) -> bool:
    """Whether the loss of a batch's last document depends on the tokens of those in front of it.

    Args:
        batch: One row of several documents.
        loss: The run's loss of a batch in eval mode, or None where it has none.
        tolerance: How much a loss may change by rounding.

    Returns:
        True where it does, also where nothing says where the documents begin; False where it does not, or where no
        document behind the first is trained.
    """
    starts = document_starts(batch, "the collator")
    if starts is None:
        return True
    shifted = batch.get("shift_labels") is not None
    key = "shift_labels" if shifted else "labels"
    ids = torch.as_tensor(batch["input_ids"])
    labels = torch.as_tensor(batch.get(key) if batch.get(key) is not None else ids)
    borders = [*np.flatnonzero(starts).tolist(), len(starts)]
    for start, stop in reversed(list(zip(borders[1:-1], borders[2:], strict=True))):
        own = torch.full_like(labels, IGNORED)
        inside = slice(start, stop - 1) if shifted else slice(start + 1, stop)
        own[:, inside] = labels[:, inside]
        if not bool((own != IGNORED).any()):
            continue
        values = []
        for token in (None, int(ids[0, start]), int(ids[0, stop - 1])):
            changed = ids.clone()
            if token is not None:
                changed[:, :start] = token
            values.append(loss({**batch, "input_ids": changed, key: own}))
        known = [value for value in values if value is not None]
        return bool(known) and not max(known) - min(known) <= tolerance
    return False


def _remedy(model: nn.Module, batches: list[Batch], sees: Callable[[Batch], bool]) -> str:
    """What would keep the documents of these batches apart, tried; empty where neither does."""
    ways: list[tuple[str, dict[str, Any], bool]] = [
        (
            "Set `model.config.use_cache = False`: with a cache transformers ignores where documents begin. ",
            {"use_cache": False},
            accepts(model, "use_cache"),
        ),
        (
            "Leave `attention_mask` out of the batch: with one transformers ignores where documents begin. ",
            {"attention_mask": None},
            all(batch.get("attention_mask") is not None for batch in batches),
        ),
    ]
    for way, change, is_possible in ways:
        if is_possible and not any(sees({**batch, **change}) for batch in batches):
            return way
    return ""


def _meeting(model: nn.Module) -> str:
    """The model and its attention, for messages."""
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return f"{type(model).__name__}{f' with attention `{kernel}`' if kernel else ''}"


def require_own_targets(pool: CandidatePool, rows: list[int], found: int, wanted: int) -> None:
    """Refuse a collator that trains other tokens of flattened rows than of the same rows alone.

    Args:
        pool: Rows and collator.
        rows: Pool rows that were put into one.
        found: Trained tokens together.
        wanted: Trained tokens of the rows alone.

    Raises:
        UnsupportedSettingError: The numbers differ.
    """
    if found != wanted:
        raise UnsupportedSettingError(
            f"A collator that puts rows into one must train the tokens that they train alone, got {found} trained "
            f"tokens from `{name_of(pool.collate_fn)}` for pool rows {rows}, which alone have {wanted}: the first "
            "token of a row is trained behind the row in front of it. Give it the label -100 (with "
            "`DataCollatorWithFlattening` leave `separator_id` at -100; TRL's own collator does so from 0.24 on)."
        )


def documents(
    model: nn.Module, pool: CandidatePool, rows: ComparedRows, loss: Callable[[Batch], float | None], tolerance: float
) -> Literal["apart", "together"] | None:
    """How documents that share a row are trained; `Reading.packed`.

    Args:
        model: The model that trains, in eval mode.
        pool: Rows and collator.
        rows: The rows that are compared, and their packed batches.
        loss: The run's loss of a batch, or None where it has none.
        tolerance: How much a loss may change by rounding.

    Returns:
        `"apart"`, `"together"`, or None where no row is packed.

    Raises:
        UnsupportedSettingError: Rows that are put into one see each other.
    """

    def sees(batch: Batch) -> bool:
        if sees_other_documents(batch, loss, tolerance):
            return True
        with at_other_weights(model, until_it_passes_on=True):
            return sees_other_documents(batch, loss, tolerance)

    if not rows.packed:
        return None
    if not any(sees(batch) for batch in rows.packed):
        return "apart"
    way = _remedy(model, rows.packed, sees)
    if rows.flattens:
        raise UnsupportedSettingError(
            "Rows that a collator puts into one must not see each other, so that a row has a loss of its own; "
            f"`{name_of(pool.collate_fn)}` makes one row of several, and {_meeting(model)} lets a row see the ones in "
            f"front of it. {way}{'Or use' if way else 'Use'} a collator that pads (transformers' "
            f"`DataCollatorForLanguageModeling` or `default_data_collator`). {ONE_DOCUMENT_A_ROW}"
        )
    logger.warning(
        "Rows hold several documents, and %s lets a document see the ones in front of it: a row is trained, and "
        "measured, as one text. %s",
        _meeting(model), way,
    )  # fmt: skip
    return "together"
