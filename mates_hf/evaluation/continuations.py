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
from torch import nn
from tqdm.auto import tqdm

from mates_hf.engine.model_traits import is_out_of_memory, logits_of, require_known_tokens, unwrap
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.errors import EvaluationError


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
        batch_rows: rows of a micro-batch.
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
    batches = [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    members: list[list[int]] = [[] for _ in rows]
    for i, row in enumerate(row_of_N):
        members[row].append(i)

    sums = np.zeros(len(requests), np.float64)
    greedy = np.zeros(len(requests), np.int64)
    steps = -(-len(batches) // processes.size)
    with torch.no_grad(), tqdm(total=steps, desc="evaluate", unit="batch", disable=not progress) as bar:
        for step in range(steps):
            mine = step * processes.size + processes.rank
            # Where weights are sharded, all must run forward together: one without a batch left repeats the first.
            batch = batches[mine] if mine < len(batches) else batches[0]
            found = _run(module, requests, [rows[r] for r in batch], [members[r] for r in batch])
            if mine < len(batches):
                for i, total, is_greedy in found:
                    sums[i], greedy[i] = total, is_greedy
            bar.update()
    return processes.sum(sums), processes.sum(greedy).astype(bool)


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
) -> list[tuple[int, float, bool]]:
    """Request, summed log-likelihood and whether greedy decoding agrees, for every request of a micro-batch."""
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
    found = []
    for b, (row, group) in enumerate(zip(rows, members, strict=True)):
        for i in group:
            count = int(requests.num_targets[i])
            end = len(row) - first
            targets = torch.from_numpy(requests.values[requests.offsets[i + 1] - count : requests.offsets[i + 1]])
            part_CV = logits_BKV[b, end - count : end]
            part_CV = part_CV.to(torch.promote_types(part_CV.dtype, torch.float32))
            targets = targets.to(part_CV.device)
            total = part_CV.gather(1, targets[:, None])[:, 0] - part_CV.logsumexp(1)
            found.append((i, total.sum(dtype=torch.float64), (part_CV.argmax(1) == targets).all()))
    # One transfer from the device for all of them.
    totals = torch.stack([total for _, total, _ in found]).tolist()
    flags = torch.stack([flag for _, _, flag in found]).tolist()
    return [(i, total, flag) for (i, _, _), total, flag in zip(found, totals, flags, strict=True)]
