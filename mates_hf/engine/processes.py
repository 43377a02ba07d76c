"""The processes of one run: who measures what, how results come together, and how the main one tells the others.

Where it is used: probes share their rows through it, and `training/` has the main process run a round while the
others assist. `ALONE` is a run of one process; nothing is sent there.

No collective of ours waits without looking: it is started, and asked whether it is done, with a look at what `watch`
knows in between. What fails in any process is said in the store of torch.distributed, never by a collective, which
those that sit in another one would not hear.

Trade-off: everything but gradients goes through a gloo group of our own, host memory and a copy of device tensors
included. In exchange no collective of ours is subject to `ddp_timeout`, so one process may fit an influence model for
an hour while the others wait.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from mates_hf.engine.watch import ProcessError as ProcessError
from mates_hf.engine.watch import Watch, close_all
from mates_hf.errors import MatesError

_PATIENCE = datetime.timedelta(days=30)  # a process may work alone this long; one that dies or freezes is noticed
_OPENING = datetime.timedelta(minutes=5)  # connections between all of them take seconds
_CAN_WAIT_LONGER = hasattr(getattr(dist, "ProcessGroupGloo", None), "_set_default_timeout")
_CHUNK_BYTES = 2**28
_BUCKET_BYTES = 2**26  # of gradients that are added up together
_BUCKETS = 64  # at least, so that those of a small model take little memory
_SPIN_SECONDS = 1e-3  # small collectives are done by then; a sleep would take longer than they do
_LONGEST_PAUSE = 0.05


class Processes:
    """The processes that train one model together; process 0 is the main one and alone touches files.

    Copies are the same object, and a pickle is `ALONE`: whoever reads it does not belong to the run.

    Args:
        rank: number of this process.
        size: how many there are.
        group: their gloo process group; None where there is one.
        watch: who failed and who answers; None where there is one.
    """

    # By the default group, which is kept alive with them: those that speak while training waits, and those that speak
    # meanwhile.
    _opened: dict[int, tuple[Any, tuple[Processes, Processes]]] = {}
    _num_opened = 0

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, watch: Watch | None = None) -> None:
        self.rank, self.size, self._group, self._watch = rank, size, group, watch

    def __copy__(self) -> Processes:
        return self

    def __deepcopy__(self, memo: Any) -> Processes:
        return self

    def __reduce__(self) -> Any:
        return _alone, ()

    @classmethod
    def of_run(cls, *, beside_training: bool = False) -> Processes:
        """The processes that torch.distributed was initialised with; `ALONE` where it was not.

        All processes must call it at the same point: the first call opens connections between them, and so does the
        first one after they have failed.

        Args:
            beside_training: give those that a thread beside training talks by; two threads must not share any.

        Returns:
            The same object until then.

        Raises:
            ProcessError: they do not all come, or do not reach one another.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return ALONE
        world: Any = dist.group.WORLD
        opened = cls._opened.get(id(world))
        if opened is None or opened[1][0].have_failed:
            opened = cls._opened[id(world)] = (world, cls._open(world))
        return opened[1][beside_training]

    @classmethod
    def _open(cls, world: Any) -> tuple[Processes, Processes]:
        close_all()  # of groups that have been taken down, or whose collectives no longer match
        cls._num_opened += 1
        watch = Watch.open(dist.get_rank(), dist.get_world_size(), str(cls._num_opened))
        watch.keep(world)
        with watch.inside():
            try:
                # Also where another one has failed already: torch counts the groups that each process asked for.
                groups = _new_group(watch), _new_group(watch)
            except BaseException as error:
                watch.fail(f"{type(error).__name__}: {error}")
                raise
        watch.keep(*groups)
        waiting, beside = (cls(watch.rank, watch.size, group, watch) for group in groups)
        return waiting, beside

    @property
    def have_failed(self) -> bool:
        """True where a failure has ended what these processes did together; `of_run` then opens new connections."""
        return self._watch is not None and self._watch.raised

    @property
    def is_main(self) -> bool:
        """True in the process that decides and writes."""
        return self.rank == 0

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Add up an array of all processes, in place; where one process has the value and the others 0, exact.

        Args:
            values: Values of the same shape and dtype in every process.

        Returns:
            `values`.

        Raises:
            ProcessError: a process failed, is gone or is frozen.
        """
        if self.size > 1:
            flat = torch.from_numpy(values.reshape(-1))
            for part in flat.split(max(1, _CHUNK_BYTES // values.itemsize)):
                self._finish(dist.all_reduce, part, group=self._group)
        return values

    def agree(self, value: float) -> float:
        """The main process's value, in every process."""
        return float(self.sum(np.array([value if self.is_main else 0.0]))[0])

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up `.grad` over processes; those that have none where others do count as 0.

        A sharded parameter (FSDP2) has had its gradients averaged in the backward pass already.

        Args:
            parameters: trainable ones, in the same order in every process.

        Raises:
            ProcessError: a process is gone.
        """
        if self.size == 1:
            return
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        present = self.sum(np.array([parameter.grad is not None for parameter in trainable], np.int64))
        summed = []
        for parameter, count in zip(trainable, present.tolist(), strict=True):
            if not count:
                continue
            if hasattr(parameter, "to_local"):
                assert parameter.grad is not None  # every process runs every micro-batch of a sharded model
                parameter.grad.mul_(self.size)
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            summed.append(parameter.grad)
        if ((present > 0) & (present < self.size)).any():
            self.meet()  # where one of them had no memory for zeros, the others must not wait below
        self._finish(_all_reduce_in_buckets, summed)

    def meet(self) -> None:
        """Wait until all processes are here, so that none leaves while another one is still failing.

        Raises:
            ProcessError: a process failed, is gone or is frozen.
        """
        self.sum(np.zeros(1))

    def publish(self, message: Mapping[str, Any], **arrays: npt.NDArray[Any]) -> None:
        """Send JSON and arrays from the main process to those that `receive`.

        Args:
            message: JSON values.
            **arrays: by name.

        Raises:
            ProcessError: a process is gone.
        """
        if self.size == 1:
            return
        described = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
        header = json.dumps({"message": dict(message), "arrays": described}).encode()
        self._broadcast(np.array([len(header)], np.int64))
        self._broadcast(np.frombuffer(header, np.uint8).copy())
        for array in arrays.values():
            self._broadcast(np.require(array, requirements=["C", "W"]))

    def receive(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Wait for what the main process publishes next, however long that takes.

        Returns:
            The message and the arrays.

        Raises:
            ProcessError: a process failed, is gone or is frozen.
        """
        length = self._broadcast(np.zeros(1, np.int64))
        header = json.loads(self._broadcast(np.zeros(int(length[0]), np.uint8)).tobytes())
        arrays = {
            name: self._broadcast(np.zeros(shape, np.dtype(kind))) for name, (kind, shape) in header["arrays"].items()
        }
        message: dict[str, Any] = header["message"]
        return message, arrays

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong inside, in any process, ends all of them: that one with its error, the others by its name.

        All processes must enter it at the same point.

        Raises:
            ProcessError: another process failed, is gone or is frozen.
        """
        watch = self._watch
        if watch is None:
            yield
            return
        watch.look()
        with watch.inside():
            try:
                yield
            except BaseException as error:
                if _is_of_a_connection(error):
                    try:
                        watch.find_lost()
                    except ProcessError as cause:
                        watch.fail(str(cause))
                        raise cause from error
                watch.fail(f"{type(error).__name__}: {error}")
                raise

    def differing(self, value: Any) -> list[int]:
        """The processes that hold another value (JSON or an array) than the main one, by its SHA-256."""
        if self.size == 1:
            return []
        data = (
            np.ascontiguousarray(value).tobytes()
            if isinstance(value, np.ndarray)
            else json.dumps(value, sort_keys=True).encode()
        )
        digests = np.zeros((self.size, 4), np.int64)
        digests[self.rank] = np.frombuffer(hashlib.sha256(data).digest(), "<i8")
        self.sum(digests)
        return [int(rank) for rank in np.flatnonzero((digests != digests[0]).any(axis=1))]

    def require_same(self, what: str, value: Any) -> None:
        """Prove that all processes hold the same value.

        Args:
            what: its name, for the error.
            value: JSON or an array; its SHA-256 is compared.

        Raises:
            ProcessError: they differ; names the processes that differ from the main one.
        """
        different = self.differing(value)
        if different:
            raise ProcessError(
                f"All processes must have the same {what}; processes {different} differ from the main one. Give "
                "every process the same data, arguments and checkpoint."
            )

    def _broadcast(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if values.size:
            for part in torch.from_numpy(values.reshape(-1).view(np.uint8)).split(_CHUNK_BYTES):
                self._finish(dist.broadcast, part, src=0, group=self._group)
        return values

    def _finish(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Start a collective, or several, and wait for its end with an eye on the others."""
        with self._watch.inside() if self._watch is not None else contextlib.nullcontext():
            try:
                found = collective(*args, async_op=True, **kwargs)
                for work in found if isinstance(found, Iterator) else [found]:
                    self._wait_for(work)
            except ProcessError:
                raise
            except (RuntimeError, ValueError) as error:
                if self._watch is not None:
                    self._watch.find_lost()
                raise ProcessError(
                    f"Process {self.rank} of {self.size} lost the others: one of them died or stopped ({error}). Look "
                    "at the first error that a process printed; the run can be resumed from its last checkpoint."
                ) from error

    def _wait_for(self, work: Any) -> None:
        began, pause = time.perf_counter(), 1e-4
        while not work.is_completed():
            if self._watch is not None:
                self._watch.look()
            spins = time.perf_counter() - began < _SPIN_SECONDS
            time.sleep(0 if spins else pause)
            pause = pause if spins else min(1.5 * pause, _LONGEST_PAUSE)
        work.wait()


class _Bucket:
    """Small tensors that are added up over processes in one piece of memory, through the group that trains.

    Args:
        tensors: Tensors of one dtype and device.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) if len(tensors) > 1 else tensors[0]
        self._work: Any = dist.all_reduce(self._flat, async_op=True)

    def is_completed(self) -> bool:
        """Whether the collective is done."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """Put the sums where the tensors are."""
        self._work.wait()
        if len(self._tensors) > 1:
            parts = self._flat.split([tensor.numel() for tensor in self._tensors])
            sums = [part.view(tensor.shape) for part, tensor in zip(parts, self._tensors, strict=True)]
            torch._foreach_copy_(self._tensors, sums)


def _all_reduce_in_buckets(tensors: list[torch.Tensor], async_op: bool) -> Iterator[_Bucket]:
    """Tensors in buckets, one after the other, so that no more than two of them take memory; large ones alone."""
    limit = min(_BUCKET_BYTES, sum(tensor.nbytes for tensor in tensors) // _BUCKETS)
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for tensor in tensors:
        alike = buckets and (buckets[-1][0].dtype, buckets[-1][0].device) == (tensor.dtype, tensor.device)
        if not alike or size + tensor.nbytes > limit:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.nbytes
    started = _Bucket(buckets[0]) if buckets else None
    for bucket in buckets[1:]:
        following = _Bucket(bucket)
        if started is not None:
            yield started
        started = following
    if started is not None:
        yield started


def _new_group(watch: Watch) -> Any:
    """A gloo group of all processes, whose collectives may take as long as one process may work alone."""
    try:
        group: Any = dist.new_group(backend="gloo", timeout=_OPENING if _CAN_WAIT_LONGER else _PATIENCE)
        if _CAN_WAIT_LONGER:
            group._get_backend(torch.device("cpu"))._set_default_timeout(_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"All {watch.size} processes of the run must reach one another through gloo, but process {watch.rank} "
            f"does not ({error}). Where they are on several machines, set GLOO_SOCKET_IFNAME on each of them to the "
            "network interface that leads to the others (`ip addr` lists them), and see that the machine's name does "
            "not resolve to 127.0.0.1."
        ) from error
    return group


def _is_of_a_connection(error: BaseException) -> bool:
    """Whether an error of torch's looks like the death of another process."""
    told = str(error)
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, MatesError)
        and any(sign in told for sign in ("onnection", "gloo", "NCCL", "Broken pipe"))
    )


def _alone() -> Processes:
    return ALONE


ALONE = Processes()
