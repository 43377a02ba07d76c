"""Losses made inside of the output head, some tokens at a time: all logits of a micro-batch never exist at once.

Where it is used: `passes` runs a batch this way where its logits would be larger than the device's limit, and
`micro_batches` then leaves the vocabulary out of the size of a micro-batch.

For one forward pass the head is given another `forward`, which returns for each position its loss, and a mark. What a
model does to its logits afterwards (a cap, a scale, virtual tokens) would show in the mark: that is looked at once for
each model, on two tokens. Such a model, and one whose head is not a plain linear layer, is run as before. FSDP2 and
DeepSpeed gather a sharded head around its forward pass, and again before its backward pass, by hooks that stay.

Trade-off: the backward pass computes the logits of its chunk once more, a third more work in the head, in exchange for
memory that does not grow with the vocabulary times the tokens.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mates_hf.data.batches import ModelBatch, Targets
from mates_hf.engine.model_traits import input_device, run_inputs
from mates_hf.engine.preserve import undisturbed

CHUNK_BYTES_CPU = 2**22  # of float32 logits at a time
CHUNK_BYTES = 2**28
_ENGINES = ("deepspeed.", "torch.distributed.")  # whose hooks gather a sharded head, and change nothing
_MARK = 0.7310585975646973  # a float32; a cap, a scale or a shift changes it

_plain: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def has_plain_head(model: nn.Module) -> bool:
    """True where a model's logits are what a plain linear head makes, so that its losses can be made inside of it.

    Args:
        model: the live model, unwrapped; it stays as it is. Where weights are sharded, all processes call it.

    Returns:
        The same in every process.
    """
    if model not in _plain:
        _plain[model] = _is_plain(model)
    return _plain[model]


def losses_in_head(model: nn.Module, batch: ModelBatch) -> Tensor:
    """Negative log-likelihood of a batch's trained labels, made inside of the head.

    Args:
        model: one that `has_plain_head`.
        batch: on the model's device, without virtual tokens.

    Returns:
        (T,) nats, float32, or float64 for float64 logits; differentiable.
    """
    found = _run(model, batch.inputs, batch.targets())
    losses: Tensor = found[..., 0].reshape(-1)[batch.targets().positions.to(found.device)]
    return losses


def _is_plain(model: nn.Module) -> bool:
    head = _head_of(model)
    if head is None:
        return False
    device = input_device(model)
    two = torch.zeros((1, 2), dtype=torch.int64, device=device)
    targets = Targets(two[0, :1], two[0, :1], 0, 0)
    with undisturbed(model), torch.no_grad():
        try:
            found = _run(model, {"input_ids": two, "attention_mask": torch.ones_like(two)}, targets)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            return False  # a model of another kind; what is wrong with it shows where it is run as before
    if found.shape != (1, 2, 2):
        return False
    return bool((found[..., 1].float() == torch.tensor(_MARK).to(found.dtype).float()).all())


def _head_of(model: nn.Module) -> nn.Linear | None:
    """The output head where it is a linear layer and nothing else."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Linear) or not _is_plain_class(type(head)) or "forward" in vars(head):
        return None
    kinds = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    hooks = [hook for hooks in kinds for hook in hooks.values()]
    return head if all(_module_of(hook).startswith(_ENGINES) for hook in hooks) else None


def _is_plain_class(kind: type) -> bool:
    """Whether it is `nn.Linear`, or what FSDP2's `fully_shard` makes of it."""
    return kind is nn.Linear or (nn.Linear in kind.__bases__ and hasattr(kind, "unshard"))


def _module_of(hook: Any) -> str:
    """Where a hook, or the function that a partial one calls, was written."""
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))


def _run(model: nn.Module, inputs: dict[str, Any], targets: Targets) -> Tensor:
    """(B, L, 2) loss of each position that is a target and 0 of the others, and the mark."""
    head = _head_of(model)
    assert head is not None
    with _forward_replaced(head, targets):
        return run_inputs(model, inputs)


@contextlib.contextmanager
def _forward_replaced(head: nn.Linear, targets: Targets) -> Iterator[None]:
    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        index = targets.positions.to(flat.device)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        losses: Tensor = _LossesOfHead.apply(  # type: ignore[no-untyped-call]
            flat[index], head.weight, head.bias, targets.labels.to(flat.device), dtype
        )
        placed = losses.new_zeros(len(flat)).index_copy(0, index, losses).view(hidden.shape[:-1])
        return torch.stack([placed, torch.full_like(placed, _MARK)], -1)  # no view, on which FSDP2 would warn

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]


class _LossesOfHead(torch.autograd.Function):
    """Cross-entropy of a linear layer's outputs, of which a chunk exists at a time, in either pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: Any) -> Tensor:
        """`hidden` (T, D), `weight` (V, D), `bias` (V,) or None, `labels` (T,) ids, `dtype` of logits -> (T,) nats."""
        ctx.dtype = dtype
        wide = torch.promote_types(dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            low = weight.to(dtype)
            for span in _spans(hidden, weight):
                logits = _logits(hidden[span], low, bias, dtype).to(wide)
                picked = logits.gather(-1, labels[span, None])[:, 0]
                losses[span] = torch.logsumexp(logits, dim=-1) - picked
        ctx.save_for_backward(hidden, weight, bias, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        """The gradients of hidden states, weight and bias, logits computed once more."""
        hidden, weight, bias, labels = ctx.saved_tensors
        dtype, wants = ctx.dtype, ctx.needs_input_grad
        wide = torch.promote_types(dtype, torch.float32)
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight) if wants[1] else None
        by_bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            low = weight.to(dtype)
            for span in _spans(hidden, weight):
                part = hidden[span].to(dtype)
                logits = _logits(part, low, bias, dtype).to(wide)
                change = torch.softmax(logits, dim=-1)
                change[torch.arange(len(change), device=change.device), labels[span]] -= 1
                change *= gradients[0][span, None]
                back = change.to(dtype)
                by_hidden[span] = (back @ low).to(hidden.dtype)
                if by_weight is not None and by_weight.dtype == dtype:
                    by_weight.addmm_(back.T, part)
                elif by_weight is not None:
                    by_weight += (back.T @ part).to(by_weight.dtype)
                if by_bias is not None:
                    by_bias += back.sum(0).to(by_bias.dtype)
        return by_hidden, by_weight, by_bias, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return functional.linear(hidden.to(dtype), weight, None if bias is None else bias.to(dtype))


def _spans(hidden: Tensor, weight: Tensor) -> list[slice]:
    budget = CHUNK_BYTES_CPU if hidden.device.type == "cpu" else CHUNK_BYTES
    size = max(1, budget // (4 * weight.shape[0]))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
