"""The reference task as the run's model is fed it, proven by the model's own loss of a few rows of it.

Where it is used: behind `reading`, which says how the run's loss follows from a batch; before the probes, which read
`ReferenceTask.measured`. Trade-off: a passage is text, and what a model wants may be more. A causal model gets its
tokens in the layout it wants, a masked language model what the run's collator hides of them, an encoder-decoder its
prompt and its completion; what cannot be made of a passage is refused. Examples go through the run's collator.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mates_hf.data.batches import IGNORED, Candidates, LossFunction, ModelBatch, Reading
from mates_hf.data.collated import TOKEN_KEYS, name_of
from mates_hf.data.examples import ExampleRows
from mates_hf.data.feeds import CollatedRows, StackedColumns, TextRows
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.data.weighted import plain
from mates_hf.engine.model_traits import input_device, is_low_precision
from mates_hf.engine.preserve import undisturbed
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.compared_rows import NO_LOGITS
from mates_hf.influence.comparison import CANNOT_RUN, WAY_OUT
from mates_hf.influence.passes import likelihood, likelihood_of, logits_of_batch
from mates_hf.influence.run_loss import model_loss


def fed_reference(
    model: nn.Module,
    reference: ReferenceTask,
    reading: Reading,
    pool: CandidatePool | None,
    reference_loss: LossFunction | None = None,
) -> ReferenceTask:
    """The task with its rows in the layout that the model wants, compared with the model's own loss of them.

    Args:
        model: the live model, unwrapped; it stays as it is.
        reference: passages as text.
        reading: how the run's loss follows from a batch.
        pool: whose collator masks passages, or makes a batch of examples; None where there is none.
        reference_loss: what the probe was given to measure the task by; examples are then compared with nothing.

    Returns:
        The same task; `measured` is what a probe reads.

    Raises:
        UnsupportedSettingError: the model cannot be fed a passage or an example, or its own loss of one is not what
            would be read; names both numbers.
        ValueError: an example has a label that the model has no logit for.
    """
    if isinstance(reference.rows, ExampleRows):
        collate_fn = reference.rows.collate_fn or (None if pool is None else pool.collate_fn)
        return _fed_examples(model, reference, reference.rows, reading, collate_fn, reference_loss)
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


def _fed_examples(
    model: nn.Module,
    reference: ReferenceTask,
    rows: ExampleRows,
    reading: Reading,
    collate_fn: Any,
    reference_loss: LossFunction | None,
) -> ReferenceTask:
    """Examples as the collator makes them; by the run's own loss where the model gives no likelihood of their labels.

    A step lowers the reference loss through the same forward pass as training does, so that is their loss, too.
    """
    if collate_fn is None:
        raise UnsupportedSettingError(
            f"The examples of the reference task `{reference.name}` must be collated, got no collator. Pass one, "
            "`ReferenceTask.from_examples(dataset, data_collator)`, or candidates that have one, "
            "`CandidatePool(dataset, collate_fn)`."
        )
    feed = dataclasses.replace(reading, feed="collated" if reading.feed == "plain" else reading.feed)
    try:
        found = CollatedRows.of(rows.dataset, collate_fn, feed, rows.ids)
    except CANNOT_RUN as error:
        raise UnsupportedSettingError(
            f"`{name_of(collate_fn)}` must make a batch of each example of the reference task `{reference.name}`, got "
            f"{type(error).__name__}: {error}. Give rows in the form of the pool's, or the `data_collator` that makes "
            "a batch of these."
        ) from error
    fed = dataclasses.replace(reference, fed=found)
    if reference_loss is not None:
        return fed
    with undisturbed(model), torch.no_grad():
        model.eval()
        first = found.batch(np.flatnonzero(found.num_targets)[:1], input_device(model))
        num_logits = _num_logits(model, first)
        if num_logits is None and reading.loss is not None:
            return dataclasses.replace(fed, fed=dataclasses.replace(found, loss=reading.loss))
        if num_logits is not None and found.highest.max() >= num_logits:
            example = int(found.highest.argmax())
            raise ValueError(
                f"Labels of the reference task `{reference.name}` must be 0 to {num_logits - 1}, the model's logits, "
                f"got {int(found.highest[example])} in example {int(found.ids[example])}. Give the model more outputs "
                "(`num_labels`), or leave such examples out."
            )
        _compare(model, fed, feed)
    return fed


def _num_logits(model: nn.Module, batch: ModelBatch) -> int | None:
    """How many labels the model tells apart; None where its logits are not of the shape of the labels."""
    try:
        logits = logits_of_batch(model, batch)
        likelihood_of(logits, batch._replace(labels=torch.full_like(batch.labels, IGNORED), known=None))
    except NO_LOGITS:
        return None
    return int(logits.shape[-1]) if batch.labels.numel() and not batch.labels.is_floating_point() else None


def _rows(reference: ReferenceTask, reading: Reading, collate_fn: Any) -> Candidates | None:
    """What the model is fed instead of the plain rows; None where those are right."""
    text = reference.text("a model that reads text")
    if reading.likelihood == "shifted":
        return TextRows(text, reading) if reading.constants or reading.num_virtual else None
    if reading.likelihood == "classes":
        raise UnsupportedSettingError(
            f"The reference task `{reference.name}` must have what the model is trained to say, got passages of text "
            "for a model that gives one label a row. Give examples in the form of the pool's rows "
            "(`ReferenceTask.from_examples(dataset)`), or pass what the reference task is measured by as "
            "`DirectionalProbe(reference_loss=...)`."
        )
    if reading.encoder_decoder:
        return _collated(reference, _pairs(reference.name, text), reading, collate_fn)
    if not reading.looks_ahead or text.labels is not None:
        return TextRows(text, reading)
    if collate_fn is None:
        raise UnsupportedSettingError(
            f"The reference task `{reference.name}` must say which tokens are hidden from a model that looks ahead, "
            "got texts and no collator that hides some. Give masked `input_ids_column` with `labels_column`."
        )
    texts = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in _each(text)]
    return _collated(reference, texts, reading, collate_fn)


def _require_same_targets(reference: ReferenceTask, rows: Candidates) -> None:
    if not np.array_equal(rows.num_targets, reference.rows.num_targets):
        raise UnsupportedSettingError(
            f"The weights of the reference task `{reference.name}` must be of the tokens that the run's collator "
            f"trains of its passages, got {reference.num_targets} weighted tokens for {int(rows.num_targets.sum())} "
            'trained ones. Give a task without weights: `loss_on="completion"`, and no `ReferenceTask.mixture`.'
        )


def _pairs(name: str, rows: TokenRows) -> list[dict[str, list[int]]]:
    """Prompt and completion of each passage, for a model of two sequences."""
    pairs = []
    for i in range(len(rows)):
        ids, labels = rows.row(i)
        trained = np.flatnonzero(labels != IGNORED)
        begin = int(trained[0]) if len(trained) else len(ids)
        if begin == 1 and rows.labels is None:
            raise UnsupportedSettingError(
                f"The reference task `{name}` must have prompts and completions for an encoder-decoder, got "
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
