"""Context parallelism on a CPU, where torch's ring attention has no kernel: rows are split as accelerate splits them.

Everything but the kernel is accelerate's and transformers' own. The stand-in for torch's `context_parallel` gathers
keys and values of a row from its processes, where a ring would pass them on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.tensor import experimental
from torch.nn import functional
from transformers import Trainer

from benchmarks.lab.small_run import shard_with_fsdp2


class Whole(torch.autograd.Function):
    """All of a tensor whose third dimension is split over a group; each process gets the gradient of its part."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, mesh: Any) -> torch.Tensor:
        ctx.mesh = mesh
        parts = [torch.empty_like(part) for _ in range(mesh.size())]
        dist.all_gather(parts, part, group=mesh.get_group())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = gradients[0].contiguous()
        dist.all_reduce(summed, group=ctx.mesh.get_group())
        return summed.chunk(ctx.mesh.size(), 2)[ctx.mesh.get_local_rank()], None


def share_rows(trainer: Trainer, cp_size: int, see: Callable[[torch.Tensor], None]) -> None:
    """FSDP2 with context parallelism, as `TrainingArguments(parallelism_config=...)` sets it up on GPUs.

    Args:
        trainer: has not trained yet.
        cp_size: processes that train on a row together.
        see: given the ids of each batch that this process trains on, whole.
    """
    shard_with_fsdp2(trainer)
    parallelism = ParallelismConfig(cp_size=cp_size, dp_shard_size=dist.get_world_size() // cp_size)
    state = trainer.accelerator.state
    state.parallelism_config, state.device_mesh = parallelism, parallelism.build_device_mesh("cpu")

    @contextlib.contextmanager
    def split(mesh: Any, *, buffers: list[torch.Tensor], buffer_seq_dims: list[int], **_: Any) -> Iterator[None]:
        see(buffers[0])
        for buffer, dim in zip(buffers, buffer_seq_dims, strict=True):
            part = buffer.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
            buffer.resize_(part.shape).copy_(part)
        plain = functional.scaled_dot_product_attention

        def attention(query: Any, key: Any, value: Any, is_causal: bool = False, **options: Any) -> torch.Tensor:
            assert is_causal  # what accelerate's hooks say in place of a mask
            assert options.pop("attn_mask", None) is None
            key, value = Whole.apply(key.contiguous(), mesh), Whole.apply(value.contiguous(), mesh)
            sees = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
            return plain(query, key, value, attn_mask=sees.tril(mesh.get_local_rank() * len(sees)), **options)

        functional.scaled_dot_product_attention = attention
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = plain

    experimental.context_parallel = split
