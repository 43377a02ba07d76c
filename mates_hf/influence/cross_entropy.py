"""Cross-entropy at chosen positions, in chunks of the logits.

Where it is used: the last operation of every forward pass of a probe. Trade-off: chunks are worked off one after the
other, which costs some launches, so that no float32 copy of all logits is ever made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS_CPU = 2**18  # stays in the cache
_CHUNK_LOGITS = 2**25


def cross_entropy_at(logits: Tensor, index: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of `labels` at the positions `index`, differentiable in the logits.

    Args:
        logits: (R, V), any floating dtype.
        index: (T,) int64 positions in R, each at most once.
        labels: (T,) int64 ids in V.

    Returns:
        (T,) nats, float32, or float64 for float64 logits. The gradient comes in the dtype of the logits.
    """
    values: Tensor = _CrossEntropyAt.apply(logits, index, labels)  # type: ignore[no-untyped-call]
    return values


class _CrossEntropyAt(torch.autograd.Function):
    """Cross-entropy of some positions, in chunks: neither pass holds a float32 copy of all logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, labels: Tensor) -> Tensor:
        """`logits` (B·L, V), `index` (T,) positions, `labels` (T,) ids -> (T,) negative log-likelihoods."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normalizers = torch.empty(len(index), dtype=dtype, device=logits.device)
        picked = torch.empty_like(normalizers)
        for span in _spans(logits, len(index)):
            chunk = logits[index[span]].to(dtype)
            normalizers[span] = torch.logsumexp(chunk, dim=-1)
            picked[span] = chunk.gather(-1, labels[span, None])[:, 0]
        ctx.save_for_backward(logits, index, labels, normalizers)
        return normalizers - picked

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """(softmax − one-hot) × incoming gradient, written in the dtype of the logits."""
        logits, index, labels, normalizers = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for span in _spans(logits, len(index)):
            chunk = logits[index[span]].to(normalizers.dtype).sub_(normalizers[span, None]).exp_()
            chunk[torch.arange(len(chunk), device=chunk.device), labels[span]] -= 1
            chunk *= gradients[0][span, None]
            result[index[span]] = chunk.to(logits.dtype)
        return result, None, None


def _spans(logits: Tensor, count: int) -> list[slice]:
    budget = _CHUNK_LOGITS_CPU if logits.device.type == "cpu" else _CHUNK_LOGITS
    size = max(1, budget // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, count, size)]
