"""A digest of the live weights that gathers and hashes none of them, and copies small ones alone.

Where it is used: a round's stages are keyed by it (`rounds.run_round`), and a checkpoint carries marks of it, by
which a resumed run proves that every parameter came back (`resume`).

Every entry's bits, read as an integer, are multiplied by an odd number that depends on the entry's place in the whole
parameter, and added up with wrap-around, in two lanes of 64 bits. Sums do not care who adds what: each process adds
its own shard where that lies, and one all-reduce of sixteen bytes a parameter gives the same digest for any number of
processes. An odd factor loses no bit, so a change of one entry always shows; so do two that trade places, unless their
factors agree in the bits that count, in both lanes.

Trade-off: it tells accidents, not forgeries. Whoever wants a collision can make one.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mates_hf.engine.averaging import trainable_parameters
from mates_hf.engine.fragments import Fragment, whole_shape, whole_size, whole_tensor
from mates_hf.engine.preserve import local_shard
from mates_hf.engine.processes import ALONE, Processes

logger = logging.getLogger(__name__)

MARK = "sum:"  # begins marks of this kind; those of earlier versions were SHA-256
CHUNK = 1 << 20  # entries that share a second factor, and are added up at a time: 24 MB of temporaries
CPU_BLOCK = 1 << 16  # entries added up at a time on a CPU, whose cache holds no more; divides a chunk
_SMALL = 1 << 16  # entries of a parameter that is added up together with others of its size
NUM_MARKED = 1_024  # entries of a parameter that its mark looks at, up to twice as many
# By bytes of an entry. Eight are two integers: the highest bit of 64 would leave nothing of its factor in the sum.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_INSIDE, _OUTSIDE = 0x6469, 0x6467  # seeds of the factors inside a chunk, and of the chunks


def weights_digest(model: nn.Module, processes: Processes = ALONE) -> str:
    """Digest of names, types, shapes and bits of the trainable parameters, the same for any number of processes.

    All processes must call it. Cost: one reading of the parameters where they are, and a small all-reduce.

    Args:
        model: the live model, unwrapped.
        processes: those that train it together.

    Returns:
        `sum128-` and 64 hexadecimal digits.
    """
    parameters = trainable_parameters(model)
    sums = _sums(parameters, processes, (_lanes, _lanes_at), CHUNK)
    digest = hashlib.sha256()
    for (name, parameter), lanes in zip(parameters.items(), sums, strict=True):
        digest.update(f"{name}\0{parameter.dtype}\0{tuple(whole_shape(parameter))}\0".encode())
        digest.update(lanes.astype("<i8").tobytes())
    different = processes.differing(digest.hexdigest())
    if different:
        logger.warning(
            "The weights of processes %s differ from the main one's: influence is a mean over different models. "
            "Something updates them outside of the optimizer.", different,
        )  # fmt: skip
    return f"sum128-{digest.hexdigest()}"


def live_digest(model: nn.Module) -> str:
    """Digest of all that a forward pass of a model depends on: parameters, trained or not, and buffers.

    Args:
        model: The live model, unwrapped, whole in this process.

    Returns:
        `sum128-` and 64 hexadecimal digits.
    """
    found: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    digest = hashlib.sha256()
    for (name, tensor), lanes in zip(found.items(), _sums(found, ALONE, (_lanes, _lanes_at), CHUNK), strict=True):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(lanes.astype("<i8").tobytes())
    return f"sum128-{digest.hexdigest()}"


def weight_marks(model: nn.Module, processes: Processes | None = None) -> dict[str, str]:
    """A short digest of some 1,024 entries of each trainable parameter: unequal where one was not restored.

    All processes must call it. Each looks at the entries that it holds, and none is gathered.

    Args:
        model: the live model, unwrapped.
        processes: those that train it together; None asks torch.distributed.

    Returns:
        The mark of each parameter, by name.
    """
    parameters = trainable_parameters(model)
    processes = Processes.of_run() if processes is None else processes
    sums = _sums(parameters, processes, (_marked_lanes, _marked_lanes_at), 2 * NUM_MARKED)
    return {
        name: MARK + "".join(f"{int(lane) & (2**64 - 1):016x}" for lane in lanes)
        for name, lanes in zip(parameters, sums, strict=True)
    }


class _Factors:
    """Odd numbers by which entries are multiplied, kept for one digest on each device it needs.

    Args:
        num: how many.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._kept: dict[torch.device, Tensor] = {}

    def inside(self, device: torch.device) -> Tensor:
        """(2, num) int64 those of the entries of a chunk, or of those that a mark looks at."""
        if device not in self._kept:
            self._kept[device] = torch.from_numpy(_odd(_INSIDE, self._num)).to(device)
        return self._kept[device]


def _odd(seed: int, num: int) -> npt.NDArray[np.int64]:
    """(2, num) int64 odd numbers; the first of them are the same for any `num`, and on every machine."""
    raw = np.random.PCG64(seed).random_raw(2 * num) | np.uint64(1)
    return np.ascontiguousarray(raw.view(np.int64).reshape(num, 2).T)


def _sums(
    parameters: dict[str, nn.Parameter], processes: Processes, lanes_of: tuple[Any, Any], num_factors: int
) -> npt.NDArray[np.int64]:
    """(P, 2) int64 lanes of each parameter, over all of its shards; of a shard in one piece, and of any other."""
    factors, found, shared = _Factors(num_factors), _Lanes(len(parameters)), np.zeros(len(parameters), bool)
    in_one_piece, in_several = lanes_of
    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            shard, place = local_shard(parameter), None
            if isinstance(parameter, Fragment):
                place, shared[number] = _Place((parameter.start,), tuple(shard.shape), tuple(shard.shape), True), True
            elif hasattr(parameter, "to_local"):
                place = _find_place(parameter, shard)
                shared[number] = place is not None
                if place is None:  # of a kind that no supported run has: gathered
                    shard = whole_tensor(shard, parameter)
                elif not place.counted:
                    shard, place = shard[:0] if shard.ndim else shard.reshape(1)[:0], None
            each = max(1, parameter.element_size() // 4)  # integers an entry
            values, num = _as_integers(shard), whole_size(parameter) * each
            start = 0 if place is None else place.start
            if start == 0 and len(values) == num <= min(_SMALL, CHUNK):
                found.put_off(number, values)
            elif start is not None:
                found.add(number, in_one_piece(values, start * each, num, factors))
            else:
                assert place is not None
                found.add(number, in_several(values, place, num, factors))
        for numbers, several in found.put_together():
            found.add_all(numbers, in_one_piece(several, 0, several.shape[-1], factors))
        sums = found.read()
    if shared.any():
        everyone = processes.sum(np.where(shared[:, None], sums, 0))
        sums = np.where(shared[:, None], everyone, sums)
    return sums


class _Lanes:
    """What is found of each parameter, and small ones of one size that are added up at once.

    Args:
        num: Number of parameters.
    """

    def __init__(self, num: int) -> None:
        self._found: list[Tensor] = []
        self._order: list[int] = []
        self._small: dict[Any, list[tuple[int, Tensor]]] = {}
        self._num = num

    def add(self, number: int, lanes: Tensor) -> None:
        """(2,) lanes of a parameter."""
        self.add_all([number], lanes.unsqueeze(0))

    def add_all(self, numbers: list[int], lanes: Tensor) -> None:
        """(n, 2) lanes of parameters."""
        self._order += numbers
        self._found.append(lanes)

    def put_off(self, number: int, values: Tensor) -> None:
        """Have a whole parameter wait for others of its size."""
        self._small.setdefault((len(values), values.dtype, values.device), []).append((number, values))

    def put_together(self) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of parameters that waited, and (n, m) their values; copies, of a chunk at most."""
        for (size, *_), waiting in self._small.items():
            most = max(1, CHUNK // max(1, size))
            for start in range(0, len(waiting), most):
                some = waiting[start : start + most]
                yield [number for number, _ in some], torch.stack([values for _, values in some])

    def read(self) -> npt.NDArray[np.int64]:
        """(P, 2) int64 lanes of all parameters, after one wait for a device."""
        sums = np.zeros((self._num, 2), np.int64)
        if self._found:
            sums[self._order] = torch.cat([lanes.to(self._found[0].device) for lanes in self._found]).cpu().numpy()
        return sums


def _as_integers(shard: Tensor) -> Tensor:
    """(n,) the bits of a tensor's entries as integers of at most 32, without a copy where it is contiguous."""
    if shard.is_complex():
        shard = torch.view_as_real(shard)
    return shard.reshape(-1).view(_INTEGERS[shard.element_size()])


def _lanes(values: Tensor, start: int, num: int, factors: _Factors) -> Tensor:
    """(2,) int64 sums over the entries of a shard that begins at `start` of the `num` of the whole parameter.

    Of several whole parameters of one size (n, m) they are (n, 2).
    """
    inside = factors.inside(values.device)
    if values.dim() > 1:
        first_factors = torch.from_numpy(_odd(_OUTSIDE, 1).T.copy()).to(values.device)
        return torch.cat([(values * lane[:num]).sum(1, keepdim=True) for lane in inside], 1) * first_factors
    stop = start + len(values)
    first, last = start // CHUNK, max(stop - 1, start) // CHUNK
    block = min(CHUNK, CPU_BLOCK) if values.device.type == "cpu" else CHUNK
    sums = torch.zeros((last - first + 1, 2), dtype=torch.int64, device=values.device)
    for at in range(start - start % block, stop, block):
        chunk = at // CHUNK
        low, high = max(at, start), min(at + block, stop)
        part = inside[:, low - chunk * CHUNK : high - chunk * CHUNK] * values[low - start : high - start]
        sums[chunk - first] += part.sum(1)
    outside = torch.from_numpy(_odd(_OUTSIDE, last + 1)[:, first:].T.copy()).to(values.device)
    return (sums * outside).sum(0)


def _marked_lanes(values: Tensor, start: int, num: int, factors: _Factors) -> Tensor:
    """(2,) int64 sums over every so manieth entry of the whole parameter, as far as it is in the shard.

    Of several whole parameters of one size (n, m) they are (n, 2).
    """
    stride = max(1, num // NUM_MARKED)
    if values.dim() > 1:
        part, inside = values[:, ::stride], factors.inside(values.device)
        return torch.cat([(part * lane[: part.shape[1]]).sum(1, keepdim=True) for lane in inside], 1)
    first = -(-start // stride)
    part = values[first * stride - start :: stride]
    return (factors.inside(values.device)[:, first : first + len(part)] * part).sum(1)


class _Place(NamedTuple):
    """Where a shard is in its parameter.

    Attributes:
        first: the shard's first index in each dimension.
        local: its shape.
        whole: the parameter's shape.
        counted: whether it is this process that counts it; others have a copy.
    """

    first: tuple[int, ...]
    local: tuple[int, ...]
    whole: tuple[int, ...]
    counted: bool

    @property
    def start(self) -> int | None:
        """Its first entry in the flattened parameter, or None where it is not one piece of that."""
        if self.local[1:] != self.whole[1:]:
            return None
        return self.first[0] * math.prod(self.whole[1:]) if self.whole else 0

    def in_whole(self, entries: Tensor) -> Tensor:
        """Where entries of the flattened shard are in the flattened parameter, int64."""
        found, passed = torch.zeros_like(entries), 1
        for first, local, whole in zip(self.first[::-1], self.local[::-1], self.whole[::-1], strict=True):
            found += (entries % local + first) * passed
            entries, passed = entries // local, passed * whole
        return found

    def in_shard(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Where entries of the flattened parameter are in the flattened shard, and which of them are there at all."""
        found, passed, here = torch.zeros_like(entries), 1, torch.ones_like(entries, dtype=torch.bool)
        for first, local, whole in zip(self.first[::-1], self.local[::-1], self.whole[::-1], strict=True):
            index = entries % whole - first
            here &= (index >= 0) & (index < local)
            found += index * passed
            entries, passed = entries // whole, passed * local
        return found, here


def _lanes_at(values: Tensor, place: _Place, num: int, factors: _Factors) -> Tensor:
    """`_lanes` of a shard whose entries lie in several pieces of the whole parameter."""
    inside, each = factors.inside(values.device), num // max(1, math.prod(place.whole))
    outside = torch.from_numpy(_odd(_OUTSIDE, num // CHUNK + 1)).to(values.device)
    sums = torch.zeros(2, dtype=torch.int64, device=values.device)
    for at in range(0, len(values), CHUNK):
        part = torch.arange(at, min(at + CHUNK, len(values)), device=values.device)
        index = place.in_whole(part // each) * each + part % each
        sums += (inside[:, index % CHUNK] * outside[:, index // CHUNK] * values[part]).sum(1)
    return sums


def _marked_lanes_at(values: Tensor, place: _Place, num: int, factors: _Factors) -> Tensor:
    """`_marked_lanes` of such a shard."""
    each, stride = num // max(1, math.prod(place.whole)), max(1, num // NUM_MARKED)
    marked = torch.arange(0, num, stride, device=values.device)
    index, here = place.in_shard(marked // each)
    part = values[(index * each + marked % each)[here]]
    return (factors.inside(values.device)[:, : len(marked)][:, here] * part).sum(1)


def _find_place(parameter: Any, shard: Tensor) -> _Place | None:
    """Where this process's shard is; None where it is not found by cutting dimensions as torch does (`Shard`)."""
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    first, local, counted = [0] * parameter.ndim, list(parameter.shape), True
    for i, placement in enumerate(parameter.placements):
        kind = type(placement).__name__
        if kind == "Replicate":
            counted = counted and coordinate[i] == 0
        elif kind == "Shard":
            each = -(-local[placement.dim] // mesh.size(i))
            begin = min(coordinate[i] * each, local[placement.dim])
            first[placement.dim] += begin
            local[placement.dim] = min(each, local[placement.dim] - begin)
        else:
            return None
    if tuple(local) != tuple(shard.shape):
        return None
    return _Place(tuple(first), tuple(local), tuple(parameter.shape), counted)
