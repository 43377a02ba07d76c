"""Loss of every trained token, and the gradient of a mean loss, by plain batched passes of the live model.

Where it is used: both probes and nothing else run the model, and they run it through here. A candidate needs forward
passes only; the reference task needs one backward pass a round.

Trade-off: the logits of a micro-batch exist in full, in the dtype the model gave them, where they are small or where
the output head is not a plain linear layer. Else `output_head` makes the losses inside of the head, some tokens at a
time.

Several processes share the rows of each micro-batch (`micro_batches`) and end up with the same losses and gradients.

Shapes: N rows, T trained tokens over all rows, B rows of a micro-batch padded to L tokens, V logits a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mates_hf.data.batches import Candidates, ModelBatch, moved_to
from mates_hf.data.batches import LossFunction as LossFunction
from mates_hf.data.feeds import CollatedRows
from mates_hf.data.rows import TokenRows, flat_index
from mates_hf.data.weighted import WeightedRows, plain
from mates_hf.engine.model_traits import (
    accepts,
    input_device,
    require_known_tokens,
    run_inputs,
    without_needless_mask,
)
from mates_hf.engine.preserve import local_shard
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.engine.weight_store import weight_store
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.compiled import CompiledLayers
from mates_hf.influence.cross_entropy import cross_entropy_at
from mates_hf.influence.micro_batches import max_tokens, run_batches
from mates_hf.influence.output_head import has_plain_head, losses_in_head

DEFAULT_TOKENS_PER_BATCH = 8_192
_TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}  # beside pixels ids mean other things


def token_losses(
    model: nn.Module,
    rows: Candidates,
    *,
    tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH,
    loss: LossFunction | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
    compile_layers: bool = False,
) -> npt.NDArray[np.floating[Any]]:
    """Negative log-likelihood of every trained token, without gradient and in the mode the model is in.

    Args:
        model: a language model: a batch in, logits (B, L, V) out.
        rows: what it is fed: N rows with T trained tokens, the same in every process.
        tokens_per_batch: padded tokens in one forward pass of a process at most; halved when memory runs out.
        loss: the run's own loss in place of the likelihood; each trained token then gets the mean of its row.
        progress: show a progress bar.
        processes: those that share the rows and call this together.
        compile_layers: Whether full micro-batches of rows of one length run compiled.

    Returns:
        (T,) float32 (float64 for a float64 model), nats, rows in their order, tokens in text order; the same in every
        process.

    Raises:
        ProbeMemoryError: one row alone does not fit into memory, or memory ran out where weights are sharded.
        ProcessError: another process failed.
    """
    rows = measured_apart(rows)
    num_targets = np.asarray(rows.num_targets, np.int64)
    dtype = np.float64 if _dtype(model) == torch.float64 else np.float32
    losses: npt.NDArray[np.floating[Any]] = np.zeros(int(num_targets.sum()), dtype)
    kept = LossesOnDevice()

    layers = CompiledLayers(model, rows) if compile_layers else None

    def measure(batch: npt.NDArray[np.int64], counts: bool) -> None:
        if layers is None:
            values = batch_losses(model, rows, batch, loss).detach()
        else:
            values = layers.run(len(batch), lambda: batch_losses(model, rows, batch, loss).detach())
        if counts:
            kept.add(batch, values)

    with torch.no_grad(), tqdm(total=len(rows), desc="probe", unit="row", disable=not progress) as bar:
        run_batches(
            model,
            rows,
            measure,
            tokens_per_batch=tokens_per_batch,
            one_row=loss is not None or rows.one_by_one,
            bar=bar,
            processes=processes,
        )
    starts = np.cumsum(num_targets) - num_targets
    for batch, values in kept.on_host():
        losses[flat_index(starts[batch], num_targets[batch])] = values.numpy()
    return processes.sum(losses)


def mean_loss(
    model: nn.Module,
    rows: Candidates,
    *,
    tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH,
    loss: LossFunction | None = None,
    processes: Processes = ALONE,
) -> float:
    """Mean over all trained tokens of `rows` (never a mean of batch means), nats/token, without gradient."""
    _require_targets(rows)
    losses = token_losses(model, rows, tokens_per_batch=tokens_per_batch, loss=loss, processes=processes)
    return float(losses.mean(dtype=np.float64))


def mean_loss_gradient(
    model: nn.Module,
    rows: Candidates,
    *,
    tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH,
    loss: LossFunction | None = None,
    processes: Processes = ALONE,
    row_sums: npt.NDArray[np.floating[Any]] | None = None,
) -> float:
    """Leave the gradient of the mean loss over all trained tokens in `.grad`, and return that loss.

    Whatever was in `.grad` is dropped first; keep it with `preserved`. Micro-batches run backward one after the other,
    so the cost in memory is one gradient and one micro-batch. What runs backward is the *sum* of the losses, but for a
    factor of 1 to 2, and the gradient is divided afterwards: logits' gradients of a mean over many targets underflow
    in float16. If memory runs out, all of it starts again with smaller
    micro-batches, since a backward pass that broke off has already written a part of its gradient.

    Args:
        model: a causal language model with trainable parameters.
        rows: N rows with T > 0 trained tokens, the same in every process.
        tokens_per_batch: padded tokens in one micro-batch of a process at most.
        loss: the run's own loss in place of the likelihood, a mean over the trained tokens of one row.
        processes: those that share the rows and call this together.
        row_sums: (N,) zeros, which get the sum of each row's losses, in every process; None: they are not kept.

    Returns:
        Mean loss, nats/token; like the gradient, that of all rows in every process.

    Raises:
        ValueError: no row has a trained token.
        ProbeMemoryError: one row alone does not fit into memory, or memory ran out where weights are sharded.
        ProcessError: another process failed.
    """
    packed, rows = rows, measured_apart(rows)
    num_targets = _require_targets(rows)
    sums = None if row_sums is None else np.zeros(len(rows))
    power = 2.0 ** (num_targets - 1).bit_length()  # dividing by it is exact, so float32 gradients are the mean's
    kept = LossesOnDevice()
    store = weight_store(model)

    def forget() -> None:
        kept.clear()
        for parameter in store.parameters().values():
            parameter.grad = None

    def accumulate(batch: npt.NDArray[np.int64], counts: bool) -> None:
        values = batch_losses(model, rows, batch, loss)
        store.backward(values, torch.full_like(values, power / num_targets if counts else 0.0))
        if counts:
            kept.add(batch, values.detach())

    forget()
    with torch.enable_grad():
        run_batches(
            model,
            rows,
            accumulate,
            tokens_per_batch=tokens_per_batch,
            one_row=loss is not None or rows.one_by_one,
            restart=forget,
            processes=processes,
        )
    gradients = [parameter.grad for parameter in store.parameters().values() if parameter.grad is not None]
    if gradients:
        torch._foreach_div_([local_shard(gradient) for gradient in gradients], power)
    processes.sum_gradients(store.parameters().values())
    total = 0.0
    for batch, values in kept.on_host():
        total += float(values.sum(dtype=torch.float64).numpy())
        if sums is not None:
            starts = np.cumsum(rows.num_targets[batch], dtype=np.int64) - rows.num_targets[batch]
            sums[batch] = np.add.reduceat(values.numpy().astype(np.float64), starts)
    if row_sums is not None and sums is not None:
        sums, whole = processes.sum(sums), plain(packed)
        row_sums[:] = whole.by_row(sums) if isinstance(whole, TokenRows) else sums
    return float(processes.sum(np.array([total]))[0]) / num_targets


class LossesOnDevice:
    """Losses of micro-batches where the model left them, so that the host goes on to the next one; 4 bytes a token."""

    def __init__(self) -> None:
        self._kept: list[tuple[npt.NDArray[np.int64], Tensor]] = []

    def add(self, batch: npt.NDArray[np.int64], values: Tensor) -> None:
        """Keep the losses of a micro-batch.

        Args:
            batch: its row numbers.
            values: (T,) of its trained tokens, without a graph.
        """
        self._kept.append((batch, values))

    def clear(self) -> None:
        """Forget them all."""
        self._kept.clear()

    def on_host(self) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
        """Each micro-batch and its losses in the host's memory, after one wait for the device."""
        if self._kept:
            sizes = [len(values) for _, values in self._kept]
            together = torch.cat([values for _, values in self._kept]).cpu()
            yield from zip((batch for batch, _ in self._kept), together.split(sizes), strict=True)


def measured_apart(rows: Candidates) -> Candidates:
    """Documents of packed rows as rows of their own, with the same trained tokens in the same order."""
    if isinstance(rows, WeightedRows):
        return dataclasses.replace(rows, rows=measured_apart(rows.rows))
    return rows.unpacked() if isinstance(rows, TokenRows) else rows


def _require_targets(rows: Candidates) -> int:
    num_targets = int(rows.num_targets.sum())
    if num_targets == 0:
        raise ValueError(
            f"`rows` must have at least one trained token, got {len(rows)} rows with none. A row needs two tokens, "
            "and a label other than -100 after its first."
        )
    return num_targets


def batch_losses(
    model: nn.Module, rows: Candidates, index: npt.NDArray[np.int64], loss: LossFunction | None
) -> Tensor:
    """Losses of the trained tokens of a micro-batch, row after row; float32, or float64 for float64 logits.

    Args:
        model: The live model.
        rows: What the row numbers point into.
        index: Row numbers of the micro-batch.
        loss: The run's own loss of one row, or None for the likelihood.

    Returns:
        (T,) nats, times their weights where tokens have some; with a graph where gradients are on.

    Raises:
        TypeError: `loss` returned no scalar.
    """
    if isinstance(rows, WeightedRows):
        losses = batch_losses(model, rows.rows, index, loss)
        weights: Tensor = moved_to(torch.from_numpy(rows.weights_of(index)), losses.device)
        return losses * weights.to(losses.dtype)
    loss = loss or (rows.loss if isinstance(rows, CollatedRows) else None)
    batch = rows.batch(index, "cpu")
    ids = batch.inputs.get("input_ids")
    if not isinstance(rows, TokenRows) and ids is not None and not batch.inputs.keys() - _TEXT_INPUTS:
        require_known_tokens(model, ids.numpy().reshape(-1))
    batch = batch.to(input_device(model))
    if loss is not None:
        value = loss(model, batch.with_labels())
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"`loss` must return a scalar tensor, got {value!r}.")
        value = value.to(torch.promote_types(value.dtype, torch.float32)).reshape(1)
        return value.expand(int(rows.num_targets[index[0]]))
    if isinstance(rows, TokenRows):  # padded by us, on the right
        batch = batch._replace(inputs=without_needless_mask(model, batch.inputs))
    return likelihood(model, batch)


def likelihood(model: nn.Module, batch: ModelBatch) -> Tensor:
    """Negative log-likelihood of a batch's trained labels, (T,) nats, by a plain forward pass.

    Args:
        model: in any mode.
        batch: on the model's device.

    Returns:
        Row after row; float32, or float64 for float64 logits; differentiable.

    Raises:
        UnsupportedSettingError: the logits do not have the shape that the labels call for.
    """
    num_logits = batch.labels.numel() if batch.labels.dim() > 1 and not needs_labels(model) else 0
    if num_logits > max_tokens(model) and not batch.num_virtual and has_plain_head(model):
        _require_known_labels(batch, model.get_output_embeddings().out_features)  # type: ignore[operator]
        return losses_in_head(model, batch)
    return likelihood_of(logits_of_batch(model, batch), batch)


def logits_of_batch(model: nn.Module, batch: ModelBatch) -> Tensor:
    """Whatever the model says of a batch, by a plain forward pass."""
    return run_inputs(model, batch.inputs if not needs_labels(model) else batch.with_labels())


def likelihood_of(logits: Tensor, batch: ModelBatch) -> Tensor:
    """`likelihood` by logits that are there already, which must have the shape that the labels call for."""
    shape = batch.labels.shape
    if len(shape) > 1:
        shape = torch.Size((shape[0], shape[1] + batch.num_virtual))
    if not isinstance(logits, Tensor) or logits.shape[:-1] != shape:
        found = None if logits is None else tuple(logits.shape)
        raise UnsupportedSettingError(
            f"The model must give logits of the shape of its labels {tuple(shape)} and one more dimension, got "
            f"{found}. Pass the run's own loss as `DirectionalProbe(loss=...)` and what "
            "the reference task is measured by as `reference_loss=`."
        )
    _require_known_labels(batch, logits.shape[-1])
    index, wanted = (part.to(logits.device) for part in batch.targets()[:2])
    return cross_entropy_at(logits.reshape(-1, logits.shape[-1]), index, wanted)


def _require_known_labels(batch: ModelBatch, num_logits: int) -> None:
    _, _, lowest, highest = batch.targets()
    if not 0 <= lowest <= highest < num_logits:
        raise ValueError(
            f"Labels must be -100 or 0 to {num_logits - 1}, as the model's logits, got {lowest} to {highest}. Use the "
            "tokenizer the model is trained with, or resize its embeddings."
        )


def needs_labels(model: nn.Module) -> bool:
    """True for an encoder-decoder, which makes its decoder's inputs of the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and accepts(model, "labels")


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
