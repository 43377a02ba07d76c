"""The processes of one run: who measures what, how results come together, and how the main one tells the others.

Place in the flow: left of all folders, like `records`: probes share their rows through it, and `training/` has the
main process run a round while the others assist. `ALONE` is a run of one process; nothing is sent there.

Trade-off: everything but gradients goes through a gloo group of our own, host memory and a copy of device tensors
included. In exchange no collective of ours is subject to `ddp_timeout`, so one process may fit an influence model for
an hour while the others wait, and a process that dies is noticed at once because its connection closes.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from mates_hf.records import MatesError

_PATIENCE = datetime.timedelta(days=30)  # a process may work alone this long; one that dies is noticed at once
_CHUNK_BYTES = 2**28


class ProcessError(MatesError):
    """Another process of the run failed, or is not in the same state as this one."""


class Processes:
    """The processes that train one model together; process 0 is the main one and alone touches files.

    Args:
        rank: number of this process.
        size: how many there are.
        group: their gloo process group; None where there is one.
    """

    # By the default group they belong to, which is kept alive with them: one group for what is said while training
    # waits, and one for what is said meanwhile.
    _groups: dict[int, tuple[Any, list[Any]]] = {}

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @classmethod
    def of_run(cls, *, beside_training: bool = False) -> Processes:
        """The processes that torch.distributed was initialised with; `ALONE` where it was not.

        All processes must call it at the same point: the first call opens connections between them.

        Args:
            beside_training: give those that a thread beside training talks by; two threads must not share any.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return ALONE
        world = dist.group.WORLD
        if id(world) not in cls._groups:
            cls._groups[id(world)] = (world, [dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2)])
        return cls(dist.get_rank(), dist.get_world_size(), cls._groups[id(world)][1][beside_training])

    @property
    def is_main(self) -> bool:
        """True in the process that decides and writes."""
        return self.rank == 0

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Add up an array of all processes, in place; where one process has the value and the others 0, exact.

        Args:
            values: of the same shape and dtype in every process.

        Returns:
            `values`.

        Raises:
            ProcessError: a process is gone.
        """
        if self.size > 1:
            flat = torch.from_numpy(values.reshape(-1))
            for part in flat.split(max(1, _CHUNK_BYTES // values.itemsize)):
                with self._connected():
                    dist.all_reduce(part, group=self._group)
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
        for parameter, count in zip(trainable, present.tolist(), strict=True):
            if not count:
                continue
            if hasattr(parameter, "to_local"):
                assert parameter.grad is not None  # every process runs every micro-batch of a sharded model
                parameter.grad.mul_(self.size)
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            with self._connected():
                dist.all_reduce(parameter.grad)

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
            ProcessError: the main process failed, with its error, or is gone.
        """
        length = self._broadcast(np.zeros(1, np.int64))
        header = json.loads(self._broadcast(np.zeros(int(length[0]), np.uint8)).tobytes())
        arrays = {
            name: self._broadcast(np.zeros(shape, np.dtype(kind))) for name, (kind, shape) in header["arrays"].items()
        }
        message: dict[str, Any] = header["message"]
        if "failed" in message:
            raise ProcessError(f"The main process stopped this run: {message['failed']}")
        return message, arrays

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """What goes wrong inside, in the main process, is told to those that `receive`, so that they stop as well."""
        try:
            yield
        except ProcessError:
            raise  # a connection is gone: nobody could be told
        except BaseException as error:
            with contextlib.suppress(ProcessError):
                self.publish({"failed": f"{type(error).__name__}: {error}"})
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
                with self._connected():
                    dist.broadcast(part, src=0, group=self._group)
        return values

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"Process {self.rank} of {self.size} lost the others: one of them died or stopped ({error}). Look at "
                "the first error that a process printed; the run can be resumed from its last checkpoint."
            ) from error


ALONE = Processes()
