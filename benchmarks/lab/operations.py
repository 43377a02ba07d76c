"""What runs on a device and what waits for it, counted on the CPU: launches of kernels, and stops of the host.

An operation that is no view and allocates nothing alone is one launch. A `_foreach` or fused one is one for so many
tensors and blocks as torch's multi-tensor kernels take at once. The host stops where it reads a value (`.item()`,
`float(tensor)`, `bool(tensor)`, `torch.equal`), where a size depends on values (`nonzero`, a mask as an index), and
where this library copies a tensor to the host.

Trade-off: a count says nothing of seconds. Kernels that an operation launches in addition (a sort, a product of
matrices in several parts) are not seen, and neither is what fuses several operations into one kernel.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# No memory is read or written by these; `is_view` does not say it of all of them.
_VIEWS = ("aten.detach", "aten.alias", "aten.view", "aten._unsafe_view", "aten.slice", "aten.lift_fresh")
_ALLOCATIONS = ("aten.empty", "aten.new_empty")
_WAITING = (
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.nonzero",
    "aten.unique",
    "aten._unique",
    "aten.masked_select",
)
_MASKED = ("aten.index.", "aten.index_put", "aten._index_put")
_PER_LAUNCH = (110, 64, 48, 36, 30)  # tensors, by the number of lists: torch's `depth_to_max_tensors`
_BLOCK, _BLOCKS_PER_LAUNCH = 65_536, 320


class CountOperations(TorchDispatchMode):
    """Counts what is run inside it: tensor operations but views by name, launches, and stops of the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.launches = 0
        self.calls = 0  # as launches, but a list of tensors is one however long it is
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run."""
        name = str(func)
        if not (func.is_view or name.startswith(_VIEWS)):
            self.counts[name] += 1
            if name.startswith(_WAITING) or (name.startswith(_MASKED) and _has_mask(args)):
                self.syncs[name] += 1
            if not name.startswith((*_ALLOCATIONS, "aten._local_scalar_dense")):
                self.launches += _launches(name, args)
                self.calls += 1
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    index = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in index)


def _launches(name: str, args: Any) -> int:
    if "_foreach_" not in name and "._fused_" not in name:
        return 1
    lists = [part for part in args if isinstance(part, (list, tuple)) and part and isinstance(part[0], Tensor)]
    blocks = sum(math.ceil(tensor.numel() / _BLOCK) for tensor in lists[0])
    per_launch = _PER_LAUNCH[min(len(lists), len(_PER_LAUNCH)) - 1]
    return max(math.ceil(len(lists[0]) / per_launch), math.ceil(blocks / _BLOCKS_PER_LAUNCH))


@contextlib.contextmanager
def counted() -> Iterator[CountOperations]:
    """Count what is run inside, copies to the host by this library among the stops."""
    mode = CountOperations()

    def stop(name: str) -> Any:
        original = getattr(Tensor, name)

        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            while caller.f_back is not None and caller.f_globals.get("__name__") == __name__:
                caller = caller.f_back  # one count inside another
            if str(caller.f_globals.get("__name__", "")).startswith("mates_hf"):
                mode.syncs[name] += 1
            return original(tensor, *args, **kwargs)

        return method

    with contextlib.ExitStack() as stack:
        for name in ("cpu", "tolist"):
            stack.enter_context(patch.object(Tensor, name, stop(name)))
        stack.enter_context(mode)
        yield mode
