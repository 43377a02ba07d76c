"""Micro-batches of rows, sized by memory, shared by the processes, and halved where memory runs out.

Where it is used: everything that `passes` runs goes through `run_batches`.

Trade-off: which process runs which row follows from the lengths of the rows alone, so labels are the same whatever
memory there is; a process may then wait for one that has the longer rows. Where weights are sharded they must run
forward together, so none may try again alone when its memory runs out.

Shapes: N rows, B rows of a micro-batch padded to L tokens, V logits a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mates_hf.data.batches import Candidates
from mates_hf.data.rows import TokenRows
from mates_hf.data.weighted import plain
from mates_hf.engine.model_traits import is_out_of_memory, is_sharded, require_known_tokens, vocabulary_size
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.errors import MatesError
from mates_hf.influence.output_head import has_plain_head

# glibc hands every block above 32 MiB back to the kernel when it is freed, so each larger logits tensor would be
# page-faulted in anew; on an accelerator the limit only keeps a large vocabulary from filling the card.
_MAX_LOGITS_BYTES_CPU = 32 * 2**20
_MAX_LOGITS_BYTES = 2**30


class ProbeMemoryError(MatesError):
    """One row alone does not fit into memory."""


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
    if isinstance(tokens := plain(rows), TokenRows):  # all at once; other rows as they are collated
        require_known_tokens(model, tokens.values)
    limit = 0 if one_row else most_tokens(model, tokens_per_batch)
    # A run's own loss may wait for the other processes as well (to add up its metrics, say).
    together = processes.size > 1 and (one_row or is_sharded(model))
    _ask_of_head(model, rows, needed=together and not one_row)
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


def _ask_of_head(model: nn.Module, rows: Candidates, *, needed: bool) -> None:
    """Have all processes find out together what the head is, which runs the model: some may have no row that asks."""
    if needed and rows.lengths.max(initial=0) > max_tokens(model):
        has_plain_head(model)


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


def most_tokens(model: nn.Module, tokens_per_batch: int) -> int:
    """Padded tokens of a micro-batch: fewer than asked for where all of their logits would exist at once."""
    limit = max_tokens(model)
    return tokens_per_batch if tokens_per_batch <= limit or has_plain_head(model) else limit


def max_tokens(model: nn.Module) -> int:
    """Padded tokens whose logits, as float32, stay below the limit of the device; a processor's is that of a cache."""
    width = vocabulary_size(model) or 1
    on_cpu = next(model.parameters()).device.type == "cpu"
    return max(1, (_MAX_LOGITS_BYTES_CPU if on_cpu else _MAX_LOGITS_BYTES) // (4 * width))
