"""Parts of parameters that an engine flattened: one piece of consecutive entries in each process.

Where it is used: `deepspeed_shards` makes them, and whoever works on parameters treats them as shards (`to_local`).
What FSDP2's shards bring along in a DTensor (sums over shards, the whole tensor) is asked for here, for both kinds.

Trade-off: a fragment is one-dimensional and knows its parameter's shape, so a row of a matrix may be cut in two. What
is asked of rows is added up over all processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Entries of the model that are not those of its fragments rounded, and their bits.
Exact = list[tuple[Tensor, Tensor]]


class Fragment(nn.Parameter):
    """This process's entries of a parameter, in the precision that the optimizer updates; there may be none.

    Attributes:
        source: the parameter of the model.
        whole: the shape of all of it.
        start: place of the first entry in the flattened parameter.
    """

    source: nn.Parameter
    whole: torch.Size
    start: int

    @classmethod
    def of(cls, source: nn.Parameter, whole: torch.Size, start: int, values: Tensor) -> Fragment:
        """The fragment whose entries are `values`, sharing their storage."""
        made: Fragment = cls(values.detach(), requires_grad=True)
        made.source, made.whole, made.start = source, whole, start
        return made

    def to_local(self) -> Tensor:
        """The entries, as a DTensor calls them."""
        return self.detach()

    def part_of(self, whole: Tensor) -> Tensor:
        """This process's entries of a tensor of the parameter's shape."""
        return whole.reshape(-1).narrow(0, self.start, self.numel())

    def whole_of(self, values: Tensor) -> Tensor:
        """All of a tensor of which each process has the entries of its fragment; all processes must call."""
        whole = values.new_zeros(math.prod(self.whole))
        whole.narrow(0, self.start, self.numel()).copy_(values)
        _add_up(whole)
        return whole.view(self.whole)

    def row_means(self, values: Tensor) -> Tensor:
        """(R,) mean of each row of the parameter, over all processes, of values like the fragment's entries."""
        num_rows, width = self.whole[0], max(1, math.prod(self.whole[1:]))
        dtype = torch.promote_types(values.dtype, torch.float32)
        sums = values.new_zeros(num_rows, dtype=dtype)
        sums.index_add_(0, self._rows(), values.to(dtype))
        return _add_up(sums) / width

    def by_entry(self, row_values: Tensor) -> Tensor:
        """(n,) the value of the row that each entry of the fragment is in."""
        return row_values[self._rows()]

    def _rows(self) -> Tensor:
        width = max(1, math.prod(self.whole[1:]))
        entries = torch.arange(self.start, self.start + self.numel(), device=self.device)
        return entries.div_(width, rounding_mode="floor")


def _add_up(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Optimizer state that is offloaded to the host is added up where the process group can reach it.
        moves = tensor.device.type == "cpu" and dist.get_backend() == "nccl"
        there = tensor.cuda() if moves else tensor
        dist.all_reduce(there)
        if moves:
            tensor.copy_(there)
    return tensor


def sharding_of(tensor: Any) -> Any:
    """What tensors that are sharded in one way have in common; None of a whole one."""
    if isinstance(tensor, Fragment):
        return Fragment
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "to_local") else None


def sum_over_shards(local: Tensor, like: Any) -> Tensor:
    """Sum of what each process has of its shard, over all shards; all processes must call it where there are some.

    Args:
        local: what was added up in the local shard.
        like: A tensor that is sharded as that shard is, or what `sharding_of` says of it.

    Returns:
        A tensor of the same shape; `local` itself where `like` is whole.
    """
    sharding = sharding_of(like) if isinstance(like, Tensor) else like
    if sharding is None:
        return local
    if not isinstance(sharding, tuple):
        return _add_up(local.clone())
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements = sharding
    parts = [Partial() if isinstance(p, Shard) else Replicate() for p in placements]
    return DTensor.from_local(local, mesh, parts, run_check=False).full_tensor()


def whole_tensor(shard: Tensor, parameter: nn.Parameter) -> Tensor:
    """All of a tensor of which `shard` is this process's part, sharded as `parameter` is; all processes must call."""
    if isinstance(parameter, Fragment):
        return parameter.whole_of(shard)
    if not hasattr(parameter, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    of: Any = parameter
    return DTensor.from_local(
        shard, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
    ).full_tensor()


def own_part(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of `whole`: all of it, unless `parameter` is sharded."""
    if isinstance(parameter, Fragment):
        return parameter.part_of(whole)
    if not hasattr(parameter, "to_local"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    of: Any = parameter
    shard: Tensor = distribute_tensor(whole.to(of.device), of.device_mesh, of.placements).to_local()
    return shard.contiguous()


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of all of a parameter: of what an engine gathers, of a fragment, or its own."""
    found: torch.Size = getattr(parameter, "ds_shape", None) or getattr(parameter, "whole", None) or parameter.shape
    return found


def whole_size(parameter: Any) -> int:
    """How many entries all of a parameter has; where ZeRO-3 holds it in parts, the parameter itself looks empty."""
    return math.prod(whole_shape(parameter))
