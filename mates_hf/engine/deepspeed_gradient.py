"""How a gradient is taken beside DeepSpeed, whose hooks must not see it.

Where it is used: `deepspeed_shards` hooks the parameters for one backward pass. Trade-off: gradients are added up over
processes in one order, so one that comes out of turn waits in memory; that is the order backward passes have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mates_hf.errors import UnsupportedSettingError


class Sums:
    """Adds up gradients over processes in one order, whichever the backward pass of a process finds them in.

    A gradient waits for those before it. Parameters that this process's rows do not reach (experts) count as zero.

    Args:
        order: keys of all parameters, in the order they are added up in.
        add: adds up the gradient of a key over processes; None where this process has none.

    Attributes:
        reached: keys that this process has a gradient of.
    """

    def __init__(self, order: list[int], add: Callable[[int, Tensor | None], None]) -> None:
        self._order, self._add, self._next = order, add, 0
        self._waiting: dict[int, Tensor] = {}
        self.reached: set[int] = set()

    def take(self, key: int, gradient: Tensor) -> Tensor:
        """Take a gradient from the backward pass, and give it zeros that take no memory."""
        self.reached.add(key)
        self._waiting[key] = gradient.detach()
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            first = self._order[self._next]
            self._next += 1
            self._add(first, self._waiting.pop(first))
        return gradient.new_zeros(()).expand_as(gradient)

    def finish(self) -> None:
        """Add up what is left, after the backward pass."""
        for key in self._order[self._next :]:
            self._add(key, self._waiting.pop(key, None))


def refuse_reentrant(values: Tensor) -> None:
    """Parameters inside of reentrant checkpointing get no gradient here, and torch does not say so."""
    pending, seen = [values.grad_fn], set()
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("CheckpointFunction"):
            raise UnsupportedSettingError(
                "Under DeepSpeed activations must be recomputed without reentrant checkpointing, whose gradients a "
                "probe cannot take. Set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        pending += [following for following, _ in node.next_functions]
