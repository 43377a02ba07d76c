"""Where DeepSpeed keeps the weights of one parameter, and the optimizer's state of them, in this process.

Where it is used: `deepspeed_shards` makes one a parameter. Three layouts are known: those of `DeepSpeedZeroOptimizer`
and `BF16_Optimizer` (ZeRO 1 and 2) are alike, ZeRO 3 has its own.

Trade-off: these are attributes of DeepSpeed's that it does not document. Its documented functions read a parameter at
a time over all processes, or write only one of its two copies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mates_hf.engine.fragments import whole_shape


class Place:
    """Where the engine keeps what belongs to a parameter.

    Attributes:
        source: the parameter.
        whole: its shape.
        start: place of this process's first entry in the flattened parameter.
        num: how many entries it has.
        group: number of its group in the optimizer.

    Args:
        source: the parameter.
        engine: DeepSpeed's optimizer.
    """

    source: nn.Parameter
    whole: torch.Size
    start: int
    num: int
    group: int

    def __init__(self, source: nn.Parameter, engine: Any) -> None:
        self.source, self._engine, self.whole = source, engine, whole_shape(source)

    def master(self) -> Tensor:
        """The entries that the optimizer updates."""
        flat, offset = self._flat()
        return flat.detach().narrow(0, offset, self.num)

    def low(self) -> Tensor:
        """The entries that forward passes are gathered from."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What the optimizer keeps of these entries, sharing its storage; nothing before the first step."""
        flat, offset = self._flat()
        held = self._engine.optimizer.state.get(flat, {})
        return {
            key: value.narrow(0, offset, self.num)
            if isinstance(value, Tensor) and value.shape == flat.shape
            else value
            for key, value in held.items()
        }

    def _flat(self) -> tuple[Tensor, int]:
        """The flat buffer that the optimizer steps with, and where this parameter's entries begin in it."""
        raise NotImplementedError


class Stage12Place(Place):
    """ZeRO 1 and 2: the model's parameters are views of a flat buffer, of which each process updates a part."""

    def __init__(self, source: nn.Parameter, engine: Any) -> None:
        super().__init__(source, engine)
        mapping: Any = source._hp_mapping  # type: ignore[attr-defined]
        self.start = self.num = self._offset = 0
        if mapping is not None:
            self.start, self.num = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            self._offset = mapping.hp_fragment_address.start
        self.group = _group_of(source, getattr(engine, "bit16_groups", None) or engine.bf16_groups)

    def low(self) -> Tensor:
        """A part of the parameter."""
        return self.source.data.view(-1).narrow(0, self.start, self.num)

    def _flat(self) -> tuple[Tensor, int]:
        flats = getattr(self._engine, "single_partition_of_fp32_groups", None)
        return (flats or self._engine.fp32_groups_flat_partition)[self.group], self._offset


class Stage3Place(Place):
    """ZeRO 3: each process has an equal part of every parameter, the last of them padded."""

    def __init__(self, source: nn.Parameter, engine: Any) -> None:
        super().__init__(source, engine)
        of: Any = source
        size = of.ds_tensor.ds_numel
        rank = dist.get_rank(engine.dp_process_group) if dist.is_initialized() else 0
        self.start = min(size * rank, of.ds_numel)
        self.num = max(0, min(size, of.ds_numel - self.start))
        self._sub, self._offset, _ = engine.grad_position[engine.get_param_id(source)]
        self.group = engine.sub_group_to_group_id[self._sub]

    def low(self) -> Tensor:
        """What of the parameter is in this process."""
        of: Any = self.source
        part: Tensor = of.ds_tensor.data.view(-1).narrow(0, 0, self.num)
        return part

    def _flat(self) -> tuple[Tensor, int]:
        return self._engine.fp32_partitioned_groups_flat[self._sub], self._offset


def _group_of(parameter: nn.Parameter, groups: list[list[nn.Parameter]]) -> int:
    """Number of the group that a parameter is in."""
    for number, group in enumerate(groups):
        if any(each is parameter for each in group):
            return number
    raise KeyError("it is in none of its groups")
