"""A running mean of the weights over the last steps before a round, and the swap that lets a probe look at it.

Place in the flow: labels at the live weights carry the noise of the last few steps; at averaged weights they agree
better from boundary to boundary while the order is random. Once rounds select, a round of one kind of text overshoots
and the next labels undo it, at either weights: against that, earlier rounds' labels are pooled
(`benchmarks/results/fidelity.md`). The mean exists only inside its window.

Trade-off: one more copy of the trainable parameters inside the window (in float32 for half-precision weights), against
keeping it all the time. What it takes on top is a piece at a time: 64 MiB at most, or the largest tensor. Of sharded
parameters (FSDP2) each process averages its own part.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.disk import written_whole_by_name
from mates_hf.preserve import forget_derived, local_shard
from mates_hf.processes import ALONE, Processes
from mates_hf.records import MatesError


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once; of a model sharded by FSDP2 the sharded ones."""
    forget_derived(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_tensor(shard: Tensor, parameter: nn.Parameter) -> Tensor:
    """All of a tensor of which `shard` is this process's part, sharded as `parameter` is; all processes must call."""
    if not hasattr(parameter, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    of: Any = parameter
    return DTensor.from_local(
        shard, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
    ).full_tensor()


_MAX_GROUP = 2**26  # bytes of the mean that are worked on at once


class WeightAverage:
    """Mean of the trainable weights over the steps it was updated at.

    Args:
        model: the model that trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_steps = 0
        self._parameters = trainable_parameters(model)
        self._forget_derived = functools.partial(forget_derived, model)
        self._mean: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now: a few fused passes over the parameters, no device synchronisation."""
        live = [local_shard(parameter) for parameter in self._parameters.values()]
        if not self._mean:
            self._mean = [tensor.to(_mean_dtype(tensor), copy=True) for tensor in live]
        else:
            for group in _groups(self._mean):
                same = [tensor.to(mean.dtype) for tensor, mean in zip(live[group], self._mean[group], strict=True)]
                torch._foreach_lerp_(self._mean[group], same, 1.0 / (self.num_steps + 1))
                del same  # before the next group's
        self.num_steps += 1

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside, and exactly its own again afterwards, also on an error.

        The two trade places tensor by tensor, so no third copy exists; the mean is used up by it. Where the exchange
        itself fails in the middle, what was exchanged until then is put back.
        """
        own: list[Tensor] = []  # the model's weights, as far as they were exchanged
        try:
            self._put_in(own)
            yield
        finally:
            self._put_back(own)

    @torch.no_grad()
    def _put_in(self, own: list[Tensor]) -> None:
        """Write the mean into the model, one tensor after the other, each only when its own weights are kept."""
        means, self._mean = self._mean, []
        means.reverse()
        for parameter in self._parameters.values():
            if not means:
                break
            shard, mean = local_shard(parameter), means.pop()
            if mean.dtype == shard.dtype:
                live = shard.clone()
                own.append(live)
                shard.copy_(mean)
                # The mean's own memory keeps the weights, so that the clone goes at once and memory is not cut up.
                mean.copy_(live)
                own[-1] = mean
            else:  # a mean in float32 is twice as large as the weights it makes room for
                own.append(shard.clone())
                shard.copy_(mean)
            del mean
        self._forget_derived()

    @torch.no_grad()
    def _put_back(self, own: list[Tensor]) -> None:
        """Write back the weights that were exchanged, which are the first of all."""
        for parameter, live in zip(self._parameters.values(), own, strict=False):
            local_shard(parameter).copy_(live)
        own.clear()
        self._forget_derived()

    def save(self, path: Path, processes: Processes = ALONE, *, output_dir: Path | None = None) -> None:
        """Write the mean beside the rounds, whole or not at all, for a checkpoint that falls inside the window.

        All processes must call it; the main one writes.

        Args:
            path: the file.
            processes: those of the run.
            output_dir: where the checkpoint goes, which the file says; None says nothing.

        Raises:
            OSError: the disk did not take it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {}
        for (name, parameter), mean in zip(self._parameters.items(), self._mean, strict=True):
            whole = whole_tensor(mean, parameter)
            if processes.is_main:
                tensors[name] = whole.cpu().contiguous()
        if not processes.is_main:
            return
        metadata = {"num_steps": str(self.num_steps)}
        if output_dir is not None:
            metadata["output_dir"] = str(output_dir.resolve())
        with written_whole_by_name(path) as temporary:
            try:
                save_file(tensors, temporary, metadata=metadata)
            except SafetensorError as error:
                raise OSError(errno.EIO, str(error), str(path)) from error

    def load(self, path: Path, processes: Processes = ALONE) -> bool:
        """Continue from a mean that the main process finds on its disk; False where there is none."""
        return self._load(path, processes) if processes.is_main else self._receive(processes)

    def _load(self, path: Path, processes: Processes) -> bool:
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            processes.publish({"num_steps": 0})
            return False
        try:
            with safe_open(path, framework="pt") as file:
                self.num_steps = int(file.metadata()["num_steps"])
                wholes = {name: file.get_tensor(name) for name in self._parameters}
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise MatesError(
                f"`{path}` must hold the running mean of the weights, but cannot be read ({error}). Delete it: "
                "the next round then averages from here on."
            ) from error
        processes.publish({"num_steps": self.num_steps})
        self._mean = []
        for name, parameter in self._parameters.items():
            processes.publish({}, mean=wholes[name].numpy())
            self._mean.append(_own_part(wholes.pop(name), parameter))
        return True

    def _receive(self, processes: Processes) -> bool:
        message, _ = processes.receive()
        self.num_steps = message["num_steps"]
        if not self.num_steps:
            return False
        self._mean = [
            _own_part(torch.from_numpy(processes.receive()[1]["mean"]), parameter)
            for parameter in self._parameters.values()
        ]
        return True


def _groups(tensors: list[Tensor]) -> Iterator[slice]:
    """Runs of tensors of at most 64 MiB together and a 16th of all, or of one larger one."""
    limit = min(_MAX_GROUP, sum(tensor.numel() * tensor.element_size() for tensor in tensors) // 16)
    start, size = 0, 0
    for number, tensor in enumerate(tensors):
        here = tensor.numel() * tensor.element_size()
        if number > start and size + here > limit:
            yield slice(start, number)
            start, size = number, 0
        size += here
    if tensors:
        yield slice(start, len(tensors))


def _mean_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _own_part(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """A new tensor with this process's part of `whole`, where `parameter` lives."""
    on_device = whole.to(parameter.device, copy=True)
    if not hasattr(parameter, "to_local"):
        return on_device
    from torch.distributed.tensor import distribute_tensor

    of: Any = parameter
    return distribute_tensor(on_device, of.device_mesh, of.placements).to_local().clone()
