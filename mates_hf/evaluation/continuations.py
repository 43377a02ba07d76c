"""Log-likelihood of continuations after contexts, by batched forward passes of the live model.

Where it is used: under `live`, which brings what lm-eval asks for; knows tokens only. Requests that differ in their
last token alone (the choices "yes" and "no", say) share one row, and logits are asked for only where a continuation
can lie, so that the vocabulary is multiplied out for a few positions instead of all.

Several processes share the micro-batches. The main one, which alone knows the requests, calls `answer` while the
others `assist`: they wait for what is asked, however long that takes, and answer their share. Each ends up with all
results, because those of others are 0 in its own sum.

Shapes: N requests, R distinct rows of input, B rows of a micro-batch padded to L tokens, K last positions of it that
have logits, V logits a token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mates_hf.data.batches import moved_to
from mates_hf.engine.model_traits import is_out_of_memory, logits_of, require_known_tokens, unwrap, vocabulary_size
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.errors import EvaluationError
from mates_hf.records import IntArray

_MAX_LOGITS_BYTES_CPU = 32 * 2**20  # of float32 logits of a micro-batch, unless few rows have more
_MAX_LOGITS_BYTES = 2**30
_CHUNK = 512  # tokens whose logits are read in float32 at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuations:
    """N requests: tokens whose log-likelihood is wanted, after tokens that are given.

    Attributes:
        values: (T,) int64 token ids, context then continuation, request after request.
        offsets: (N + 1,) int64; request i is `values[offsets[i]:offsets[i + 1]]`.
        num_targets: (N,) int64, at least 1: tokens at a request's end that are its continuation; one token at least
            comes before them.
    """

    values: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    num_targets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.num_targets)

    @functools.cached_property
    def distinct_inputs(self) -> tuple[list[npt.NDArray[np.int64]], list[int]]:
        """Inputs (all tokens but the last) that differ, and the position of each request's among them."""
        known: dict[bytes, int] = {}
        rows: list[npt.NDArray[np.int64]] = []
        row_of_N = []
        for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            row = self.values[start : end - 1]
            position = known.setdefault(row.tobytes(), len(rows))
            if position == len(rows):
                rows.append(row)
            row_of_N.append(position)
        return rows, row_of_N

    @property
    def num_input_tokens(self) -> int:
        """Tokens that the model reads to answer, those that requests share once; without padding."""
        return sum(map(len, self.distinct_inputs[0]))

    @classmethod
    def from_pairs(
        cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_tokens: int | None = None
    ) -> Continuations:
        """Requests of contexts and continuations.

        Args:
            pairs: token ids of both, none empty.
            max_tokens: Most input tokens; contexts are cut from the left to it, as lm-eval does (the last token of
                a continuation is no input).

        Returns:
            The requests, in their order.
        """
        whole = [[*context, *continuation] for context, continuation in pairs]
        if max_tokens is not None:
            whole = [tokens[-(max_tokens + 1) :] for tokens in whole]
        return cls(
            values=np.array([token for tokens in whole for token in tokens], np.int64),
            offsets=np.cumsum([0, *map(len, whole)], dtype=np.int64),
            num_targets=np.array([len(continuation) for _, continuation in pairs], np.int64),
        )


def log_likelihoods(
    model: nn.Module,
    requests: Continuations,
    *,
    batch_rows: int = 8,
    progress: bool = False,
    processes: Processes = ALONE,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Log-likelihood of every continuation, in the mode the model is in, without gradient.

    Args:
        model: a causal language model: ids (B, L) in, logits (B, L, V) out.
        requests: The requests, the same in every process.
        batch_rows: rows of a micro-batch of the longest rows; of shorter ones as many as have as many tokens.
        progress: show a progress bar.
        processes: those that share the micro-batches and call this together.

    Returns:
        (N,) float64 summed over tokens, nats; (N,) bool, whether the greedy choice at each position is its token. The
        same in every process. NaN where the model gives NaN.

    Raises:
        ValueError: a token id is not in the model's vocabulary.
        EvaluationError: memory ran out.
        ProcessError: another process failed.
    """
    module = unwrap(model)
    require_known_tokens(module, requests.values)
    rows, row_of_N = requests.distinct_inputs
    lengths = np.array([len(row) for row in rows], np.int64)
    order = np.lexsort((np.arange(len(rows)), -lengths))  # longest first: memory runs out early, or not
    members: list[list[int]] = [[] for _ in rows]
    for i, row in enumerate(row_of_N):
        members[row].append(i)
    num_logits = np.array(
        [
            len(row) - min(len(row) - int(requests.num_targets[i]) for i in group)
            for row, group in zip(rows, members, strict=True)
        ],
        np.int64,
    )
    batches = _batches(order, lengths, num_logits, batch_rows, _most_logits(module))

    found: list[tuple[list[int], Tensor]] = []
    steps = -(-len(batches) // processes.size)
    with torch.no_grad(), tqdm(total=steps, desc="evaluate", unit="batch", disable=not progress) as bar:
        for step in range(steps):
            mine = step * processes.size + processes.rank
            # Where weights are sharded, all must run forward together: one without a batch left repeats the first.
            batch = batches[mine] if mine < len(batches) else batches[0]
            answers = _run(module, requests, [rows[r] for r in batch], [members[r] for r in batch])
            if mine < len(batches):
                found.append(([i for r in batch for i in members[r]], answers))
            bar.update()
    sums, greedy = np.zeros(len(requests), np.float64), np.zeros(len(requests), np.int64)
    if found:  # one wait for the device for all of them
        answers = torch.cat([answers for _, answers in found], 1).cpu()
        at, num_targets = np.concatenate([i for i, _ in found]), requests.num_targets
        starts = np.cumsum(num_targets[at]) - num_targets[at]
        sums[at] = np.add.reduceat(answers[0].numpy().astype(np.float64), starts)
        greedy[at] = np.logical_and.reduceat(answers[1].numpy() != 0, starts)
    return processes.sum(sums), processes.sum(greedy).astype(bool)


def _batches(
    order: IntArray, lengths: IntArray, num_logits: IntArray, batch_rows: int, most_logits: int
) -> list[IntArray]:
    """Micro-batches of rows in this order, longest first, with as many padded tokens as so many longest rows have.

    Short rows are many in a micro-batch: a device takes about as long for eight of forty tokens as for two hundred.
    Their logits are bounded as well, but no micro-batch has fewer than `batch_rows` rows.
    """
    batches: list[IntArray] = []
    most_tokens = batch_rows * int(lengths.max(initial=0))
    start = 0
    while start < len(order):
        length = int(lengths[order[start]])
        stop = min(len(order), start + max(batch_rows, most_tokens // max(1, length)))
        # Positions from the first that any row has logits of; a shorter row's end lies before the longest one's.
        behind = length - lengths[order[start:stop]] + num_logits[order[start:stop]]
        kept = np.maximum.accumulate(behind) * np.arange(1, stop - start + 1)
        stop = start + max(min(batch_rows, stop - start), int(np.searchsorted(kept, most_logits, side="right")))
        batches.append(order[start:stop])
        start = stop
    return batches


def _most_logits(model: nn.Module) -> int:
    """Positions whose logits may exist at once."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return int((_MAX_LOGITS_BYTES_CPU if on_cpu else _MAX_LOGITS_BYTES) // (4 * (vocabulary_size(model) or 1)))


def answer(
    model: nn.Module, requests: Continuations, *, batch_rows: int, progress: bool, processes: Processes
) -> tuple[Any, Any]:
    """What `log_likelihoods` gives, of all processes together; called by the main one while the others `assist`.

    Args:
        model: the live model.
        requests: what is asked.
        batch_rows: rows of a micro-batch.
        progress: show a progress bar.
        processes: The processes of the run.

    Returns:
        (N,) log-likelihoods and (N,) flags.

    Raises:
        EvaluationError: a log-likelihood is not a number.
    """
    arrays = {"values": requests.values, "offsets": requests.offsets, "num_targets": requests.num_targets}
    processes.publish({"batch_rows": batch_rows}, **arrays)
    sums, greedy = log_likelihoods(model, requests, batch_rows=batch_rows, progress=progress, processes=processes)
    if np.isnan(sums).any():
        raise EvaluationError(
            f"A model that is evaluated must give finite logits, but {int(np.isnan(sums).sum())} of {len(sums)} "
            "log-likelihoods are NaN. Look for a diverged run (its loss), or for 16-bit overflow."
        )
    return sums, greedy


def assist(model: nn.Module, processes: Processes) -> dict[str, float]:
    """Every process but the main one: answer with it until it is done.

    Args:
        model: the live model.
        processes: The processes of the run.

    Returns:
        The metrics the main process made.

    Raises:
        ProcessError: the main process failed, with its error, or is gone.
    """
    while True:
        message, arrays = processes.receive()
        if "metrics" in message:
            metrics: dict[str, float] = message["metrics"]
            return metrics
        requests = Continuations(values=arrays["values"], offsets=arrays["offsets"], num_targets=arrays["num_targets"])
        log_likelihoods(model, requests, batch_rows=message["batch_rows"], processes=processes)


def longest(requests: Continuations, num: int) -> Continuations:
    """The `num` longest requests."""
    lengths = np.diff(requests.offsets)
    chosen = np.sort(np.lexsort((np.arange(len(lengths)), -lengths))[:num])
    parts = [requests.values[requests.offsets[i] : requests.offsets[i + 1]] for i in chosen]
    return Continuations(
        values=np.concatenate(parts) if parts else np.zeros(0, np.int64),
        offsets=np.cumsum([0, *map(len, parts)], dtype=np.int64),
        num_targets=requests.num_targets[chosen],
    )


def _run(
    model: nn.Module,
    requests: Continuations,
    rows: list[npt.NDArray[np.int64]],
    members: list[list[int]],
) -> Tensor:
    """(2, C) log-likelihood of each token of the requests' continuations, and 1 where it is the greedy choice, else 0.

    Requests come row after row, and what is returned stays on the device.
    """
    lengths = np.array([len(row) for row in rows])
    length = int(lengths.max())
    here_BL = np.arange(length) < lengths[:, None]
    ids_BL = np.zeros(here_BL.shape, np.int64)  # padding on the right is token 0: nothing that counts sees it
    ids_BL[here_BL] = np.concatenate(rows)
    first = min(
        len(row) - int(requests.num_targets[i]) for row, group in zip(rows, members, strict=True) for i in group
    )
    try:
        logits_BKV = logits_of(model, ids_BL, here_BL, last=length - first)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise EvaluationError(
            f"A batch of {len(rows)} rows of up to {length} tokens must fit into memory beside the run, but memory "
            "ran out. Lower `batch_size`, or leave out the tasks with long contexts."
        ) from error
    positions: list[IntArray] = []
    targets: list[IntArray] = []
    for b, (row, group) in enumerate(zip(rows, members, strict=True)):
        for i in group:
            count, end = int(requests.num_targets[i]), len(row) - first
            positions.append(b * logits_BKV.shape[1] + np.arange(end - count, end))
            targets.append(requests.values[requests.offsets[i + 1] - count : requests.offsets[i + 1]])
    device = logits_BKV.device
    index, wanted = (moved_to(torch.from_numpy(np.concatenate(part)), device) for part in (positions, targets))
    flat_NV = logits_BKV.reshape(-1, logits_BKV.shape[-1])
    dtype = torch.promote_types(flat_NV.dtype, torch.float32)
    answers = torch.empty((2, len(index)), dtype=dtype, device=flat_NV.device)
    for start in range(0, len(index), _CHUNK):
        span = slice(start, start + _CHUNK)
        part_CV = flat_NV[index[span]].to(dtype)
        picked = part_CV.gather(1, wanted[span, None])[:, 0]
        answers[0, span] = picked - part_CV.logsumexp(1)
        answers[1, span] = (part_CV.argmax(1) == wanted[span]).to(dtype)
    return answers
