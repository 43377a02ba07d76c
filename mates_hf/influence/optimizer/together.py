"""Pieces of many parameters that are worked on at once: one kernel for a list of tensors instead of one a tensor.

Where it is used: the `*_step` modules whose arithmetic is element by element. Parameters whose next step has the same
numbers (`ParameterStep.likeness`) share a list; large ones are cut along dimension 0.

Trade-off: temporaries are as large as what is worked on, some five of them at a time. On a device that is a 64th of
the entries at hand, 2^22 at least and 2^24 at most; there a launch takes longer than the arithmetic on a small tensor.
On a processor it is what a cache holds, and no more than a 64th either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_ENTRIES_CPU = 2**20
MOST_ENTRIES = 2**24
_LEAST_ENTRIES_CPU = 2**14
_LEAST_ENTRIES = 2**22
_PARTS = 64

Lists = tuple[Any, ...]  # a list of tensors for each column, or None for a column of None


def most_entries(device: torch.device, total: int) -> int:
    """Entries that are worked on at once.

    Args:
        device: where they are.
        total: how many there are.

    Returns:
        The number: between 2^22 and 2^24 on a device, between 2^14 and 2^20 on a processor.
    """
    if device.type == "cpu":
        return min(MOST_ENTRIES_CPU, max(_LEAST_ENTRIES_CPU, total // _PARTS))
    return max(_LEAST_ENTRIES, min(MOST_ENTRIES, total // _PARTS))


def chunks(first: Tensor, *others: Tensor | None, most: int | None = None) -> Iterator[tuple[Any, ...]]:
    """Matching slices along dimension 0; None stays None.

    Slices and not a flat view, so that writing reaches the tensor whatever its strides.

    Args:
        first: any tensor.
        *others: as long as it along dimension 0.
        most: entries of a slice of `first`, about; None is `most_entries`.

    Yields:
        A slice of each.
    """
    tensors = [t if t is None or t.dim() else t.unsqueeze(0) for t in (first, *others)]
    rows = first.shape[0] if first.dim() else 1
    most = most_entries(first.device, first.numel()) if most is None else most
    size = max(1, most * rows // max(1, first.numel()))
    for start in range(0, rows, size):
        yield tuple(t if t is None else t[start : start + size] for t in tensors)


def pieces(columns: Sequence[Sequence[Tensor | None]]) -> Iterator[tuple[list[int], Lists]]:
    """Lists of matching pieces of the tensors of several parameters.

    Args:
        columns: for each parameter its tensors, of one shape, or None where it has none; None in all or in no
            parameter.

    Yields:
        Which parameter each piece is of, and for each column the list of pieces, None where the column is None.
    """
    firsts = [row[0] for row in columns if row[0] is not None]
    if not firsts:
        return
    most = most_entries(firsts[0].device, sum(tensor.numel() for tensor in firsts))
    owners: list[int] = []
    gathered: list[tuple[Any, ...]] = []
    size = 0
    for number, (first, *others) in enumerate(columns):
        assert first is not None
        for found in chunks(first, *others, most=most):
            if gathered and size + found[0].numel() > most:
                yield owners, _as_lists(gathered)
                owners, gathered, size = [], [], 0
            owners.append(number)
            gathered.append(found)
            size += found[0].numel()
    if gathered:
        yield owners, _as_lists(gathered)


def _as_lists(rows: list[tuple[Any, ...]]) -> Lists:
    return tuple(None if column[0] is None else list(column) for column in zip(*rows, strict=True))


def multiply(tensors: Sequence[Tensor], factors: float | Sequence[float]) -> None:
    """Multiply tensors by a number, or each by its own, in place, as `Tensor.mul_` does.

    On a processor torch rounds the number to the tensors' dtype first where it is given a list.
    """
    if _one_by_one(tensors):
        for number, tensor in enumerate(tensors):
            tensor.mul_(factors[number] if isinstance(factors, Sequence) else factors)
    elif tensors:
        torch._foreach_mul_(list(tensors), list(factors) if isinstance(factors, Sequence) else factors)


def multiplied(tensors: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    """Each tensor times its number, as `Tensor.mul` has it; new tensors."""
    if _one_by_one(tensors):
        return [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    return list(torch._foreach_mul(list(tensors), list(factors)))


def zeros_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in the shapes of tensors."""
    zeros = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_zero_(zeros)
    return zeros


def _one_by_one(tensors: Sequence[Tensor]) -> bool:
    """Whether torch would round a number first where it is given these tensors as a list."""
    return bool(tensors) and tensors[0].device.type == "cpu" and tensors[0].dtype in (torch.bfloat16, torch.float16)


def squares_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """() sum of squares of each, float64 where the device has it, without a copy of the tensors."""
    if not tensors:
        return []
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) > 1 or tensors[0].dtype not in (torch.float32, torch.float64):
        dtypes = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
        norms = [torch.linalg.vector_norm(t, dtype=d) for t, d in zip(tensors, dtypes, strict=True)]
        return [norm.to(wide_dtype(norm.device)).square() for norm in norms]
    together = torch.stack(list(torch._foreach_norm(list(tensors)))).to(wide_dtype(tensors[0].device))
    return list(together.square_().unbind())


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64
