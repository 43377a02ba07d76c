"""The reference task as the run's model is fed it, proven by the model's own loss of a few passages.

Where it is used: behind `reading`, which says how the run's loss follows from a batch; before the probes, which read
`ReferenceTask.measured`. Trade-off: a passage is text, and what a model wants may be more. A causal model gets its
tokens in the layout it wants, a masked language model what the run's collator hides of them, an encoder-decoder its
prompt and its completion; what cannot be made of a passage is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mates_hf.data.batches import IGNORED, Candidates, ModelBatch, Reading
from mates_hf.data.collated import TOKEN_KEYS
from mates_hf.data.feeds import CollatedRows, StackedColumns, TextRows
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.data.weighted import plain
from mates_hf.engine.model_traits import input_device, is_low_precision
from mates_hf.engine.preserve import undisturbed
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.passes import likelihood
from mates_hf.influence.reading import CANNOT_RUN, WAY_OUT
from mates_hf.influence.run_loss import model_loss


def fed_reference(
    model: nn.Module, reference: ReferenceTask, reading: Reading, pool: CandidatePool | None
) -> ReferenceTask:
    """The task with its passages in the layout that the model wants, compared with the model's own loss of them.

    Args:
        model: the live model, unwrapped; it stays as it is.
        reference: passages as text.
        reading: how the run's loss follows from a batch.
        pool: whose collator masks passages, or joins prompt and completion; None where there is none.

    Returns:
        The same task; `measured` is what a probe reads.

    Raises:
        UnsupportedSettingError: the model cannot be fed a passage, or its own loss of one is not what would be read;
            names both numbers.
    """
    if reading.has_shift_labels:  # which passages have not
        reading = dataclasses.replace(reading, likelihood="shifted")
    rows = _rows(reference, reading, None if pool is None else pool.collate_fn)
    if rows is not None and reference.weights is not None:
        _require_same_targets(reference, rows)
    fed = dataclasses.replace(reference, fed=rows)
    with undisturbed(model), torch.no_grad():
        model.eval()
        _compare(model, fed, reading)
    return fed


def _rows(reference: ReferenceTask, reading: Reading, collate_fn: Any) -> Candidates | None:
    """What the model is fed instead of the plain rows; None where those are right."""
    if reading.likelihood == "shifted":
        return TextRows(reference.rows, reading) if reading.constants or reading.num_virtual else None
    if reading.likelihood == "classes":
        raise UnsupportedSettingError(
            f"The reference task `{reference.name}` must have what the model is trained to say, got passages of text "
            "for a model that gives one label a row. Pass what the reference task is measured by as "
            "`DirectionalProbe(reference_loss=...)`."
        )
    if reading.encoder_decoder:
        return _collated(reference, _pairs(reference), reading, collate_fn)
    if not reading.looks_ahead or reference.rows.labels is not None:
        return TextRows(reference.rows, reading)
    if collate_fn is None:
        raise UnsupportedSettingError(
            f"The reference task `{reference.name}` must say which tokens are hidden from a model that looks ahead, "
            "got texts and no collator that hides some. Give masked `input_ids_column` with `labels_column`."
        )
    texts = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in _each(reference.rows)]
    return _collated(reference, texts, reading, collate_fn)


def _require_same_targets(reference: ReferenceTask, rows: Candidates) -> None:
    if not np.array_equal(rows.num_targets, reference.rows.num_targets):
        raise UnsupportedSettingError(
            f"The weights of the reference task `{reference.name}` must be of the tokens that the run's collator "
            f"trains of its passages, got {reference.num_targets} weighted tokens for {int(rows.num_targets.sum())} "
            'trained ones. Give a task without weights: `loss_on="completion"`, and no `ReferenceTask.mixture`.'
        )


def _pairs(reference: ReferenceTask) -> list[dict[str, list[int]]]:
    """Prompt and completion of each passage, for a model of two sequences."""
    pairs = []
    for i in range(len(reference)):
        ids, labels = reference.rows.row(i)
        trained = np.flatnonzero(labels != IGNORED)
        begin = int(trained[0]) if len(trained) else len(ids)
        if begin == 1 and reference.rows.labels is None:
            raise UnsupportedSettingError(
                f"The reference task `{reference.name}` must have prompts and completions for an encoder-decoder, got "
                'whole texts. Give `prompt_column` and `completion_column` with `loss_on="completion"`, or '
                "`input_ids_column` with a `labels_column` that is -100 on the prompt."
            )
        pairs.append(
            {
                "input_ids": ids[:begin].tolist(),
                "attention_mask": [1] * begin,
                "labels": labels[begin:].astype(np.int64).tolist(),
            }
        )
    return pairs


def _collated(
    reference: ReferenceTask, rows: list[dict[str, list[int]]], reading: Reading, collate_fn: Any
) -> CollatedRows:
    """Passages put through the run's collator."""
    try:
        fed = CollatedRows.of(
            rows, collate_fn or StackedColumns(TOKEN_KEYS), reading, np.arange(len(rows), dtype=np.int64)
        )
    except CANNOT_RUN as error:
        raise UnsupportedSettingError(
            f"The run's collator must make a batch of a passage of the reference task `{reference.name}`, a dict of "
            f"{sorted(rows[0])}, got {type(error).__name__}: {error}. Pass what the reference task is measured by as "
            "`DirectionalProbe(reference_loss=...)`."
        ) from error
    if not fed.num_targets.sum():
        raise UnsupportedSettingError(
            f"The run's collator must train tokens of the reference task `{reference.name}`, got none of {len(rows)} "
            "passages."
        )
    return fed


def _each(rows: TokenRows) -> list[npt.NDArray[Any]]:
    return [rows.row(i)[0] for i in range(len(rows))]


def _compare(model: nn.Module, reference: ReferenceTask, reading: Reading) -> None:
    """Run a passage alone and a few together, and hold what is read against the model's own loss of them."""
    rows, device = plain(reference.measured), input_device(model)
    trained = np.flatnonzero(rows.num_targets)
    few = trained[np.argsort(rows.lengths[trained], kind="stable")][[0, len(trained) // 4, len(trained) // 2]]
    few = np.unique(few)
    together = [few] if reading.feed != "row" and len(few) > 1 else []
    for index in (few[-1:], *together):
        batch = rows.batch(index, device)
        try:
            read = float(likelihood(model, batch).double().mean())
            own = None if reading.loss is not None else _own_loss(model, batch)
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as error:
            raise UnsupportedSettingError(
                "The model must give logits for a passage of the reference task in eval mode, because the loss of the "
                f"reference task is a likelihood; {type(model).__name__} did not ({type(error).__name__}: {error}). "
                "Turn off what leaves the logits out (`use_liger_kernel`, a fused loss), or pass what the reference "
                "task is measured by as `DirectionalProbe(reference_loss=...)`."
            ) from error
        if own is None:
            continue
        tolerance = (1e-2 if is_low_precision(model) else 2e-5) * max(1.0, abs(read))
        if not abs(float(own) - read) <= tolerance:
            raise UnsupportedSettingError(
                f"The loss of the reference task must be the model's own: of passages {index.tolist()} the model's is "
                f"{float(own):.6f}, and the {reading.likelihood} likelihood of their tokens is {read:.6f}. {WAY_OUT} "
                "The reference task has `reference_loss=`."
            )


def _own_loss(model: nn.Module, batch: ModelBatch) -> Tensor | None:
    """The model's own loss of a passage; None where it has none, or needs inputs that a passage does not have."""
    try:
        return model_loss(model, batch.with_labels())
    except (AttributeError, KeyError, TypeError):
        return None
