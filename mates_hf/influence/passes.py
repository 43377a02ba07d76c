"""Loss of every trained token, and the gradient of a mean loss, by plain batched passes of the live model.

Where it is used: both probes and nothing else run the model, and they run it through here. A candidate needs forward
passes only; the reference task needs one backward pass a round.

Trade-off: the logits of a micro-batch exist in full, in the dtype the model gave them, because reaching into the
output head differs from architecture to architecture. Micro-batches are therefore sized by the vocabulary as well as
by tokens.

Several processes share the rows of each micro-batch and end up with the same losses and gradients. Where weights are
sharded (FSDP2) they must run forward together, so none may try again alone when its memory runs out.

Shapes: N rows, T trained tokens over all rows, B rows of a micro-batch padded to L tokens, V logits a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mates_hf.data.batches import Candidates, ModelBatch
from mates_hf.data.batches import LossFunction as LossFunction
from mates_hf.data.rows import TokenRows
from mates_hf.engine.model_traits import (
    accepts,
    input_device,
    is_out_of_memory,
    is_sharded,
    require_known_tokens,
    run_inputs,
    vocabulary_size,
    without_needless_mask,
)
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.engine.weight_store import weight_store
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.influence.cross_entropy import cross_entropy_at

DEFAULT_TOKENS_PER_BATCH = 8_192
_TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}  # beside pixels ids mean other things
# glibc hands every block above 32 MiB back to the kernel when it is freed, so each larger logits tensor would be
# page-faulted in anew; on an accelerator the limit only keeps a large vocabulary from filling the card.
_MAX_LOGITS_BYTES_CPU = 32 * 2**20
_MAX_LOGITS_BYTES = 2**30


class ProbeMemoryError(MatesError):
    """One row alone does not fit into memory."""


def token_losses(
    model: nn.Module,
    rows: Candidates,
    *,
    tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH,
    loss: LossFunction | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> npt.NDArray[np.floating[Any]]:
    """Negative log-likelihood of every trained token, without gradient and in the mode the model is in.

    Args:
        model: a language model: a batch in, logits (B, L, V) out.
        rows: what it is fed: N rows with T trained tokens, the same in every process.
        tokens_per_batch: padded tokens in one forward pass of a process at most; halved when memory runs out.
        loss: the run's own loss in place of the likelihood; each trained token then gets the mean of its row.
        progress: show a progress bar.
        processes: those that share the rows and call this together.

    Returns:
        (T,) float32 (float64 for a float64 model), nats, rows in their order, tokens in text order; the same in every
        process.

    Raises:
        ProbeMemoryError: one row alone does not fit into memory, or memory ran out where weights are sharded.
        ProcessError: another process failed.
    """
    ends = np.cumsum(rows.num_targets, dtype=np.int64)
    starts = ends - rows.num_targets
    dtype = np.float64 if _dtype(model) == torch.float64 else np.float32
    losses: npt.NDArray[np.floating[Any]] = np.zeros(int(ends[-1]) if len(rows) else 0, dtype)

    def measure(batch: npt.NDArray[np.int64], counts: bool) -> None:
        values = batch_losses(model, rows, batch, loss).detach().cpu().numpy()
        if not counts:
            return
        position = 0
        for i in batch:
            count = int(ends[i] - starts[i])
            losses[starts[i] : ends[i]] = values[position : position + count]
            position += count

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
    num_targets = _require_targets(rows)
    power = 2.0 ** (num_targets - 1).bit_length()  # dividing by it is exact, so float32 gradients are the mean's
    parts: list[float] = []
    store = weight_store(model)

    def forget() -> None:
        parts.clear()
        if row_sums is not None:
            row_sums[:] = 0
        for parameter in store.parameters().values():
            parameter.grad = None

    def accumulate(batch: npt.NDArray[np.int64], counts: bool) -> None:
        values = batch_losses(model, rows, batch, loss)
        store.backward(values, torch.full_like(values, power / num_targets if counts else 0.0))
        if counts:
            parts.append(float(values.detach().sum(dtype=torch.float64)))
            if row_sums is not None:
                starts = np.cumsum(rows.num_targets[batch], dtype=np.int64) - rows.num_targets[batch]
                row_sums[batch] = np.add.reduceat(values.detach().cpu().numpy().astype(np.float64), starts)

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
    for parameter in store.parameters().values():
        if parameter.grad is not None:
            parameter.grad.div_(power)
    processes.sum_gradients(store.parameters().values())
    if row_sums is not None:
        row_sums[:] = processes.sum(row_sums)
    return float(processes.sum(np.array([sum(parts)]))[0]) / num_targets


def _require_targets(rows: Candidates) -> int:
    num_targets = int(rows.num_targets.sum())
    if num_targets == 0:
        raise ValueError(
            f"`rows` must have at least one trained token, got {len(rows)} rows with none. A row needs two tokens, "
            "and a label other than -100 after its first."
        )
    return num_targets


def run_batches(
    model: nn.Module,
    rows: Candidates,
    work: Callable[[npt.NDArray[np.int64], bool], None],
    *,
    tokens_per_batch: int,
    one_row: bool,
    restart: Callable[[], None] | None = None,
    bar: Any = None,
    processes: Processes = ALONE,
) -> None:
    """Call `work` with this process's row numbers, micro-batch by micro-batch; smaller ones after memory has run out.

    Which process runs which row depends on the rows alone. Where weights are sharded, or the loss is the run's own,
    every process runs every micro-batch: one without a row of its own runs the first row of all, and is told (False)
    that it does not count.

    Args:
        model: The live model.
        rows: N rows, the same in every process.
        work: Runs the micro-batch of these row numbers; its second argument is False where the batch does not count.
        tokens_per_batch: Padded tokens in one micro-batch of a process at most.
        one_row: Run one row at a time.
        restart: Called before everything starts again with smaller micro-batches; None tries the failed one alone.
        bar: Progress bar, updated by rows.
        processes: Those that share the rows and call this together.

    Raises:
        ProbeMemoryError: One row alone does not fit into memory, or memory ran out where weights are sharded.
        ProcessError: Another process failed.
    """
    if isinstance(rows, TokenRows):  # all at once; other rows as they are collated
        require_known_tokens(model, rows.values)
    limit = 0 if one_row else min(tokens_per_batch, _max_tokens(model))
    # A run's own loss may wait for the other processes as well (to add up its metrics, say).
    together = processes.size > 1 and (one_row or is_sharded(model))
    planned = _plan(rows.lengths, np.flatnonzero(rows.num_targets), limit, processes.size)
    shares = [(batch[processes.rank :: processes.size], batch) for batch in planned]
    pending = deque((share, True) if len(share) else (whole[:1], False) for share, whole in shares)
    while pending:
        batch, counts = pending.popleft()
        if not (counts or together):
            continue
        out_of_memory = False
        try:
            work(batch, counts)
        except RuntimeError as error:
            if isinstance(error, MatesError) or not is_out_of_memory(error):
                raise
            out_of_memory = True
        if not out_of_memory:
            if bar is not None:
                bar.update(len(batch) * processes.size)
            continue
        # Outside of the handler, so that the traceback no longer holds the tensors of the batch that failed.
        length = int(rows.lengths[batch].max())
        if together:
            raise ProbeMemoryError(
                f"A probe's micro-batch of {len(batch)} rows of up to {length} tokens must fit into memory beside the "
                "model, but memory ran out, and the processes can only go on together. Lower "
                f"`probe_tokens_per_batch` (micro-batches had up to {limit} tokens), or shorten the rows."
            )
        if len(batch) == 1:
            raise ProbeMemoryError(
                f"One row of {length} tokens must fit into memory beside the model, but memory ran out. Shorten the "
                "rows, or free memory: a probe needs 2 to 3 times the trainable parameters' bytes on top of it."
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        limit = len(batch) * length // 2
        todo = [batch, *(share for share, counts in pending if counts)]
        if restart is not None:
            restart()
            todo = [share for share, _ in shares]
        pending = deque((smaller, True) for smaller in _plan(rows.lengths, np.concatenate(todo), limit))


def _plan(
    lengths: npt.NDArray[np.int64], index: npt.NDArray[np.int64], limit: int, size: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Micro-batches of row numbers for `size` processes, with up to `limit` padded tokens in each.

    Longest rows come first (memory runs out early, or not), ties in row order.
    """
    order = index[np.lexsort((index, -lengths[index]))]
    batches = []
    start = 0
    while start < len(order):
        count = size * max(1, limit // int(lengths[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches


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
        (T,) nats, with a graph where gradients are on.

    Raises:
        TypeError: `loss` returned no scalar.
    """
    batch = rows.batch(index, input_device(model))
    ids = batch.inputs.get("input_ids")
    if not isinstance(rows, TokenRows) and ids is not None and not batch.inputs.keys() - _TEXT_INPUTS:
        require_known_tokens(model, ids.cpu().numpy().reshape(-1))
    if loss is not None:
        value = loss(model, batch.with_labels())
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"`loss` must return a scalar tensor, got {value!r}.")
        value = value.to(torch.promote_types(value.dtype, torch.float32)).reshape(1)
        return value.expand(int(rows.num_targets[index[0]]))
    plain = isinstance(rows, TokenRows)  # padded by us, on the right
    return likelihood(model, batch._replace(inputs=without_needless_mask(model, batch.inputs)) if plain else batch)


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
    index, wanted = batch.targets()
    if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < logits.shape[-1]:
        raise ValueError(
            f"Labels must be -100 or 0 to {logits.shape[-1] - 1}, as the model's logits, got {int(wanted.min())} to "
            f"{int(wanted.max())}. Use the tokenizer the model is trained with, or resize its embeddings."
        )
    return cross_entropy_at(logits.reshape(-1, logits.shape[-1]), index.to(logits.device), wanted.to(logits.device))


def needs_labels(model: nn.Module) -> bool:
    """True for an encoder-decoder, which makes its decoder's inputs of the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and accepts(model, "labels")


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _max_tokens(model: nn.Module) -> int:
    """Padded tokens whose logits, as float32, stay below the limit of the device."""
    width = vocabulary_size(model) or 1
    on_cpu = next(model.parameters()).device.type == "cpu"
    return max(1, (_MAX_LOGITS_BYTES_CPU if on_cpu else _MAX_LOGITS_BYTES) // (4 * width))
