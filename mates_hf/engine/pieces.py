"""Where the running mean of the weights lies: pieces of the parameters, who averages each, and memory of the host.

Where it is used: `averaging` keeps one tensor for each piece that is this process's to average. Pieces are small
enough that what is worked on at a time does not show beside the mean.

Trade-off: where processes hold whole copies of the weights (DDP), a parameter may be cut between two processes. Cuts
are at multiples of 1,024 entries, so that vector units treat every entry as they would in one process.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

MAX_PIECE = 2**26  # bytes of the mean
_PARTS = 64  # of what a process averages; a small model is cut finer, so that a part of it stays small as well
_ALIGNED = 1_024  # entries
_BLOCK = 2**26  # bytes of pinned memory at once: torch rounds each request up to a power of two
_LINE = 64  # bytes; each tensor in a block begins at a multiple


class Piece(NamedTuple):
    """Part of the entries of a parameter, or of this process's shard of it.

    Attributes:
        number: Number of the parameter.
        start: first entry of the flattened tensor; None where the piece is all of a tensor that cannot be flattened.
        stop: behind the last entry.
        owner: the process that averages it for all; None where each process has entries of its own.
    """

    number: int
    start: int | None
    stop: int
    owner: int | None

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor that is laid out as the parameter's shard is, sharing its storage."""
        return tensor if self.start is None else tensor.view(-1)[self.start : self.stop]


def mean_dtype(tensor: Tensor) -> torch.dtype:
    """In what a tensor is averaged: in float32 where it has half of it."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def cut(shards: Sequence[Tensor], shared: Sequence[bool], size: int) -> list[Piece]:
    """All pieces, in the order of the parameters; the same in each process, but for those of sharded parameters.

    Args:
        shards: what this process holds of each parameter.
        shared: For each, whether all processes hold the whole of it.
        size: how many processes there are.

    Returns:
        Pieces of at most `MAX_PIECE` bytes of the mean and a 64th of this process's, or of one tensor that cannot be
        flattened. Each process owns an equal share of the entries of shared parameters.
    """
    total = sum(shard.numel() for shard, is_shared in zip(shards, shared, strict=True) if is_shared)
    most = sum(shard.numel() for shard in shards) // (_PARTS * size) // _ALIGNED * _ALIGNED
    pieces, passed = [], 0
    for number, (shard, is_shared) in enumerate(zip(shards, shared, strict=True)):
        num = shard.numel()
        flat = shard.is_contiguous()
        cuts = {0, num}
        if flat:
            cuts |= set(range(0, num, max(_ALIGNED, min(most, MAX_PIECE // mean_dtype(shard).itemsize))))
        if flat and is_shared:
            ends = (total * rank // size - passed for rank in range(1, size))
            cuts |= {min(max(0, (end + _ALIGNED // 2) // _ALIGNED * _ALIGNED), num) for end in ends}
        ordered = sorted(cuts)
        for start, stop in zip(ordered, ordered[1:], strict=False):
            middle = passed + (start + stop) // 2
            pieces.append(Piece(number, start if flat else None, stop, middle * size // total if is_shared else None))
        passed += num if is_shared else 0
    return pieces


def groups(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of pieces of at most `MAX_PIECE` bytes together and a 64th of all, or of one larger one.

    Args:
        sizes: bytes of each piece.

    Yields:
        One slice a run.
    """
    limit = most_at_once(sizes)
    start, size = 0, 0
    for number, here in enumerate(sizes):
        if number > start and size + here > limit:
            yield slice(start, number)
            start, size = number, 0
        size += here
    if sizes:
        yield slice(start, len(sizes))


def most_at_once(sizes: Sequence[int]) -> int:
    """Bytes of the pieces that are worked on at a time."""
    return min(MAX_PIECE, sum(sizes) // _PARTS)


class HostMemory:
    """Tensors in the host's memory that a device copies to and from without waiting, in few blocks.

    Args:
        pinned: false for the tests of a machine without a device.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A new tensor of the shape and layout of another one."""
        num = tensor.numel() * dtype.itemsize
        if not tensor.is_contiguous() or num > _BLOCK:
            strides = torch.empty_like(tensor, dtype=dtype, device="meta").stride()
            return self._allocate(num).view(dtype).as_strided(tensor.shape, strides)
        if self._used + num > len(self._block):
            self._block, self._used = self._allocate(_BLOCK), 0
        part = self._block[self._used : self._used + num]
        self._used += -(-num // _LINE) * _LINE
        return part.view(dtype).view(tensor.shape)

    def _allocate(self, num_bytes: int) -> Tensor:
        if self._pinned:
            # What a system lets be pinned may end before its memory does; copies to other memory are only slower.
            with contextlib.suppress(RuntimeError):
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.empty(num_bytes, dtype=torch.uint8)


class SideStream:
    """A stream of a CUDA device on which weights are averaged while the run goes on, until the optimizer's next step.

    Forward and backward passes only read the weights. Before any optimizer steps, its stream waits for this one.

    Args:
        device: the device; on any other kind everything runs in place, as in the tests.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._done: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            waiting = weakref.WeakMethod(self.join)  # the hook must not keep what it waits for

            def wait(*_: Any) -> None:
                join = waiting()
                if join is not None:
                    join()

            weakref.finalize(self, register_optimizer_step_pre_hook(wait).remove)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What is called inside runs behind what was called so far, and beside what is called afterwards."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._done = self._stream.record_event()

    def join(self) -> None:
        """What is called from here on runs behind what ran beside it."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def finish(self) -> None:
        """Wait in the host as well, which may then read what was copied to it."""
        self.join()
        if self._done is not None:
            self._done.synchronize()
            self._done = None
