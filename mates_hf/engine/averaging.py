"""A running mean of the weights over the last steps before a round, and the swap that lets a probe look at it.

Where it is used: labels at the live weights carry the noise of the last few steps; at averaged weights they agree
better from boundary to boundary while the order is random. Once rounds select, a round of one kind of text overshoots
and the next labels undo it, at either weights: against that, earlier rounds' labels are pooled
(benchmark `fidelity`). The mean exists only inside its window.

Trade-off: one more copy of the trainable parameters inside the window (in float32 for half-precision weights), against
keeping it all the time. What it takes on top is a group of pieces at a time, 64 MiB. Of N processes each has an Nth of
that copy: of sharded parameters (FSDP2) the entries it holds, of whole ones (DDP) an equal share, which are put
together at the boundary. On a GPU without room for it (`memory`) the copy is in the host's memory.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mates_hf.disk import written_whole_by_name
from mates_hf.engine.fragments import Exact, own_part, whole_tensor
from mates_hf.engine.pieces import HostMemory, Piece, SideStream, cut, groups, mean_dtype, most_at_once
from mates_hf.engine.preserve import copy_all, local_shard
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.engine.weight_store import weight_store
from mates_hf.errors import MatesError

logger = logging.getLogger(__name__)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once; of a model that is sharded this process's parts."""
    return weight_store(model).parameters()


class WeightAverage:
    """Mean of the trainable weights over the steps it was updated at.

    Args:
        model: the model that trains.
        processes: those that train it together; where they hold whole copies, each averages its share of the entries.
        on_host: keep the mean in the host's memory, from the first update on.
    """

    def __init__(self, model: nn.Module, processes: Processes = ALONE, *, on_host: bool = False) -> None:
        self.num_steps = 0
        self._store = weight_store(model)
        self._parameters = self._store.parameters()
        self._processes = processes
        shards = self._shards()
        shared = [processes.size > 1 and not hasattr(p, "to_local") for p in self._parameters.values()]
        self._pieces = cut(shards, shared, processes.size)
        self._mine = [piece for piece in self._pieces if piece.owner in (None, processes.rank)]
        self._mean: list[Tensor] = []  # of each piece of mine, which may be none
        self._has_mean = False
        self._on_host, self._side = on_host, SideStream(torch.device("cpu"))

    @torch.no_grad()
    def place(self, *, on_host: bool) -> None:
        """Keep the mean in the host's memory from here on, or where the parameters are; its values stay."""
        if on_host == self._on_host:
            return
        self._side.finish()
        self._on_host, before = on_host, self._mean
        if self._has_mean:
            self._mean = self._allocate()
            for mean, old in zip(self._mean, before, strict=True):
                mean.copy_(old)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now: one fused pass over the parameters, no device synchronisation.

        Weights in another type than the mean are converted and taken in a group at a time, so that the converted ones
        take little memory. Of a mean in the host's memory a group of pieces at a time is copied to the device, is
        averaged there by the same kernel, and is copied back, while the next training step runs.
        """
        shards = self._shards()
        live = [piece.of(shards[piece.number]) for piece in self._mine]
        is_first = not self._has_mean
        if is_first:
            self._mean = self._allocate()
        with self._side.running():
            alike = all(mean.dtype == tensor.dtype for mean, tensor in zip(self._mean, live, strict=True))
            whole = bool(live) and alike and not self._on_host
            for group in [slice(None)] if whole else groups([mean.nbytes for mean in self._mean]):
                self._update_group(self._mean[group], live[group], is_first)
        self.num_steps += 1

    def _update_group(self, means: list[Tensor], live: list[Tensor], is_first: bool) -> None:
        if is_first:
            for mean, tensor in zip(means, live, strict=True):
                mean.copy_(tensor, non_blocking=self._on_host)
            return
        here = means
        if self._on_host:
            here = [torch.empty_like(tensor, dtype=mean.dtype) for mean, tensor in zip(means, live, strict=True)]
            for staged, mean in zip(here, means, strict=True):
                staged.copy_(mean, non_blocking=True)
        same = [tensor.to(mean.dtype) for tensor, mean in zip(live, here, strict=True)]
        torch._foreach_lerp_(here, same, 1.0 / (self.num_steps + 1))
        if self._on_host:
            for staged, mean in zip(here, means, strict=True):
                mean.copy_(staged, non_blocking=True)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside, and exactly its own again afterwards, also on an error.

        The two trade places piece by piece, so no third copy exists; the mean is used up by it. Each process keeps the
        weights that it had itself. Where the exchange itself fails in the middle, what was exchanged until then is put
        back. All processes must call it.
        """
        own: list[Tensor] = []  # the model's weights, as far as they were exchanged
        exact = self._store.remember()
        try:
            self._put_in(own)
            yield
        except BaseException:
            self._put_back(own, exact, failing=True)
            raise
        self._put_back(own, exact)

    @torch.no_grad()
    def _put_in(self, own: list[Tensor]) -> None:
        """Write the mean into the model, some pieces after the others, each only when its own weights are kept."""
        shards = self._shards()
        marks = []
        limit = most_at_once([shard.nbytes for shard in shards])
        trading: list[tuple[Tensor, Tensor]] = []  # pieces of the model and their means
        for piece, mean in self._whole(release=True):
            live = piece.of(shards[piece.number])
            if piece.owner is not None:
                marks.append(_mark(live))
            trades = piece.owner is None and mean.dtype == live.dtype
            if not trades or sum(part.nbytes for part, _ in trading) + live.nbytes > limit:
                _trade(own, trading)
            if trades:
                trading.append((live, mean))
            else:  # a mean in float32 is twice as large as the weights it makes room for
                own.append(live.to("cpu", copy=True) if self._on_host else live.clone())
                live.copy_(mean)
            del mean
        _trade(own, trading)
        self._store.written()
        self._warn_of_different(marks)

    @torch.no_grad()
    def _put_back(self, own: list[Tensor], exact: Exact, *, failing: bool = False) -> None:
        """Write back the weights that were exchanged, which are the first of all."""
        shards = self._shards()
        copy_all([piece.of(shards[piece.number]) for piece, _ in zip(self._pieces, own, strict=False)], own)
        own.clear()
        self._store.written(exact, failing=failing)

    def _warn_of_different(self, marks: list[Tensor]) -> None:
        """Copies that are no longer one model would not show any more: what was put in is the same in all."""
        if not marks:
            return
        different = self._processes.differing(torch.stack([mark.cpu() for mark in marks]).numpy())
        if different:
            logger.warning(
                "The weights of processes %s differ from the main one's: the mean of the weights is put together from "
                "different models. Something updates them outside of the optimizer.", different,
            )  # fmt: skip

    def _shards(self) -> list[Tensor]:
        """What this process holds of each parameter, sharing its storage."""
        return [local_shard(parameter) for parameter in self._parameters.values()]

    def _allocate(self) -> list[Tensor]:
        """Memory for the pieces of the mean that are this process's."""
        self._has_mean = True
        shards = self._shards()
        pieces = [piece.of(shards[piece.number]) for piece in self._mine]
        devices = {piece.device for piece in pieces}
        if not self._on_host or len(devices) != 1:
            self._side = SideStream(torch.device("cpu"))
            return [torch.empty_like(piece, dtype=mean_dtype(piece)) for piece in pieces]
        device = devices.pop()
        self._side = SideStream(device)
        host = HostMemory(pinned=device.type == "cuda")
        return [host.empty_like(piece, mean_dtype(piece)) for piece in pieces]

    def _whole(self, *, release: bool = False) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece and its mean, in their order, those of other processes as well; all processes must call it.

        Args:
            release: let go of each as it is given.

        Yields:
            The piece, and a tensor that is where the mean or the parameter is.
        """
        self._side.finish()
        if not self._has_mean:
            return
        means = dict(zip(self._mine, self._mean, strict=True))
        if release:
            self._mean, self._has_mean = [], False
        shards = self._shards()
        for group in groups([piece.of(shards[piece.number]).nbytes for piece in self._pieces]):
            pieces = self._pieces[group]
            shared = self._put_together([piece for piece in pieces if piece.owner is not None], means, shards)
            for piece in pieces:
                part = shared.pop() if piece.owner is not None else means[piece]
                if release:
                    means.pop(piece, None)
                yield piece, part
                del part

    def _put_together(self, pieces: list[Piece], means: dict[Piece, Tensor], shards: list[Tensor]) -> list[Tensor]:
        """The means of pieces that one process has each, in every process and where the parameters are; last first."""
        holders = []
        for piece in pieces:
            like = piece.of(shards[piece.number])
            mine = piece.owner == self._processes.rank
            # Adding -0 changes nothing, not even the sign of a zero.
            part = means[piece].to(like.device) if mine else torch.full_like(like, -0.0, dtype=mean_dtype(like))
            holders.append(nn.Parameter(part))
            holders[-1].grad = part
        if holders:
            self._processes.sum_gradients(holders)
        parts = [holder.grad for holder in reversed(holders)]
        return [part for part in parts if part is not None]

    @torch.no_grad()
    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """The mean of each whole parameter by its name, one at a time; all processes must call it."""
        parts = self._whole()
        part = next(parts, None)
        for number, ((name, parameter), shard) in enumerate(
            zip(self._parameters.items(), self._shards(), strict=True)
        ):
            is_sharded = hasattr(parameter, "to_local")
            mean = torch.empty_like(shard, dtype=mean_dtype(shard), device=None if is_sharded else "cpu")
            while part is not None and part[0].number == number:
                part[0].of(mean).copy_(part[1])
                part = next(parts, None)
            yield name, whole_tensor(mean, parameter)

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
        for name, whole in self._gathered():
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
        self._mean = self._allocate()
        means = self._means_by_number()
        for number, (name, parameter) in enumerate(self._parameters.items()):
            processes.publish({}, mean=wholes[name].numpy())
            _take_part(wholes.pop(name), parameter, means[number])
        return True

    def _receive(self, processes: Processes) -> bool:
        message, _ = processes.receive()
        self.num_steps = message["num_steps"]
        if not self.num_steps:
            return False
        self._mean = self._allocate()
        means = self._means_by_number()
        for number, parameter in enumerate(self._parameters.values()):
            _take_part(torch.from_numpy(processes.receive()[1]["mean"]), parameter, means[number])
        return True

    def _means_by_number(self) -> list[list[tuple[Piece, Tensor]]]:
        """The pieces of each parameter that are averaged here, and their means."""
        found: list[list[tuple[Piece, Tensor]]] = [[] for _ in self._parameters]
        for piece, mean in zip(self._mine, self._mean, strict=True):
            found[piece.number].append((piece, mean))
        return found


@torch.no_grad()
def _take_part(whole: Tensor, parameter: nn.Parameter, means: list[tuple[Piece, Tensor]]) -> None:
    """Fill the means of pieces from that of the whole parameter."""
    part, shard = own_part(whole, parameter), local_shard(parameter)
    if not shard.is_contiguous():  # then no piece of it is flattened
        part = torch.empty_like(shard, dtype=part.dtype, device=part.device).copy_(part)
    for piece, mean in means:
        mean.copy_(piece.of(part))


def _trade(own: list[Tensor], trading: list[tuple[Tensor, Tensor]]) -> None:
    """Put means into the model, and keep its own weights in their memory, so that memory is not cut up."""
    live, means = [part for part, _ in trading], [mean for _, mean in trading]
    kept = [torch.empty_like(part) for part in live]
    copy_all(kept, live)
    own += kept
    copy_all(live, means)
    copy_all(means, kept)
    own[len(own) - len(means) :] = means
    trading.clear()


def _mark(tensor: Tensor) -> Tensor:
    """() int64 by which two copies of a tensor are told apart, unless someone means them not to be."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    return tensor.detach().contiguous().view(-1).view(integers).sum(dtype=torch.int64)
