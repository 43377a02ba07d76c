"""The running mean of the weights: exact wherever it lies; its swap leaves no trace, also where it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lab.memory import peak_bytes
from mates_hf.engine import pieces
from mates_hf.engine.averaging import WeightAverage
from tests.launch import run_script

DTYPES = [torch.float32, torch.bfloat16]


def make(dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(300, 40, generator=generator).to(dtype)) for _ in range(12))


def averaged(model: nn.ParameterList, **place: bool) -> WeightAverage:
    average = WeightAverage(model, **place)
    average.update()
    with torch.no_grad():
        for parameter in model:
            parameter.mul_(2)
    average.update()
    return average


class SmallMemory(TorchDispatchMode):
    """Counts operations, and fails at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.calls, self.fails_at = 0, fails_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls - 1 == self.fails_at:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.quick("device-*32", "host-*bfloat16")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
def test_the_weights_are_put_back_wherever_the_swap_itself_fails(dtype: torch.dtype, on_host: bool) -> None:
    """At each single operation of it: where weights are kept, where the mean is written, and in between."""
    model = make(dtype)
    average = averaged(model, on_host=on_host)
    before = [parameter.detach().clone() for parameter in model]
    counted = SmallMemory()
    with counted, average.swapped_in():
        num_calls = counted.calls
        for parameter, old in zip(model, before, strict=True):
            torch.testing.assert_close(parameter.detach(), (0.75 * old.float()).to(dtype))
    assert num_calls > 2 * len(model)
    for fails_at in range(num_calls):
        average = WeightAverage(model, on_host=on_host)
        average.update()
        average._mean[0].add_(1)
        average._mean[-1].add_(1)
        with pytest.raises(torch.OutOfMemoryError), SmallMemory(fails_at), average.swapped_in():
            raise AssertionError("it did not fail")
        for parameter, old in zip(model, before, strict=True):
            assert torch.equal(parameter.detach(), old), fails_at


class Odd(nn.Module):
    """Parameters that are scalars, empty, not contiguous, or a part of something larger."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"large": (50, 77), "vector": (1_025,), "scalar": (), "empty": (0, 3)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        self.turned = nn.Parameter(torch.randn(30, 50, generator=generator).to(dtype).t())
        self.part = nn.Parameter(torch.randn(40, 60, generator=generator).to(dtype)[:, 3:20])
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def move(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("place", ["device", "host", "moved", "loaded"])
def test_the_mean_is_bit_for_bit_that_of_whole_tensors_wherever_it_lies(
    dtype: torch.dtype, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "MAX_PIECE", 4_096)
    model = Odd(dtype)
    average = WeightAverage(model, on_host=place == "host")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected: list[torch.Tensor] = []
    for step in range(7):
        move(model, step)
        average.update()
        wide = [parameter.detach().to(pieces.mean_dtype(parameter), copy=True) for parameter in parameters]
        if expected:
            torch._foreach_lerp_(expected, wide, 1.0 / (step + 1))
        else:
            expected = wide
        if place == "moved" and step in (2, 4):
            average.place(on_host=step == 2)
        if place == "loaded" and step == 3:
            average.save(tmp_path / "average.safetensors")
            average = WeightAverage(model, on_host=True)
            assert average.load(tmp_path / "average.safetensors")
    own = [parameter.detach().clone() for parameter in parameters]
    with average.swapped_in():
        for parameter, mean in zip(parameters, expected, strict=True):
            assert torch.equal(parameter.detach(), mean.to(dtype))
    for parameter, before in zip(parameters, own, strict=True):
        assert torch.equal(parameter.detach(), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_an_update_nor_the_swap_holds_another_copy(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the mean, which is in float32: a piece at a time, of twelve tensors."""
    monkeypatch.setattr(pieces, "MAX_PIECE", 4_096)
    model = make(dtype)
    mean = sum(p.numel() * 4 for p in model)

    def work() -> None:
        average = averaged(model)
        for _ in range(2):
            average.update()
        with average.swapped_in():
            pass

    assert mean < peak_bytes(work) <= mean * (1 + 0.5 / 12)


def test_weights_in_the_mean_s_own_type_are_taken_in_by_one_operation() -> None:
    average = averaged(make())
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Names():
        average.update()
    assert seen.count("_foreach_lerp_") == 1
    assert set(seen) <= {"_foreach_lerp_", "detach", "view", "slice"}
    seen.clear()
    empty = WeightAverage(nn.ParameterList())
    empty.update()
    assert (empty.num_steps, seen) == (1, [])


@pytest.mark.parametrize("size", [2, 3, 64])
def test_shares_of_processes_are_equal_and_cover_each_entry_once(size: int) -> None:
    shards = [torch.empty(shape) for shape in [(50_000,), (7,), (300, 400), (0, 2), (2_000, 30)]]
    found = pieces.cut(shards, [True] * len(shards), size)
    counts = [0] * size
    for number, shard in enumerate(shards):
        ends = [(piece.start, piece.stop) for piece in found if piece.number == number]
        assert [start for start, _ in ends] == [0, *(stop for _, stop in ends)][: len(ends)]
        assert sum(stop - (start or 0) for start, stop in ends) == shard.numel()
    for piece in found:
        counts[piece.owner or 0] += piece.stop - (piece.start or 0)
    assert max(counts) <= sum(counts) / size + 2 * 1_024
    owners = [piece.owner for piece in found]
    assert owners == sorted(owners)  # so that pieces of one process lie together
    # A shard of FSDP2 is this process's alone.
    assert {piece.owner for piece in pieces.cut(shards, [False] * len(shards), size)} == {None}


SHARED = """
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mates_hf.engine.processes import Processes
from mates_hf.engine import averaging
from benchmarks.lab.memory import peak_bytes
from mates_hf.engine import pieces
from mates_hf.engine.averaging import WeightAverage
from tests.engine.test_averaging import Odd, move

torch.set_num_threads(1)
folder = Path(sys.argv[1])
dist.init_process_group("gloo")
together = Processes.of_run()
pieces.MAX_PIECE = 4_096
records = []
logging.getLogger("mates_hf").addFilter(lambda record: records.append(record.getMessage()) or True)
averaging.logger.addFilter(lambda record: records.append(record.getMessage()) or True)


def mean_of(model, average):
    with average.swapped_in():
        return [parameter.detach().clone() for parameter in model.parameters()]


for dtype in (torch.float32, torch.bfloat16):
    for on_host in (False, True):
        model = Odd(dtype)
        shared, alone = WeightAverage(model, together, on_host=on_host), WeightAverage(model)
        for step in range(5):
            move(model, step)
            shared.update()
            alone.update()
            if step == 2:  # a checkpoint of the old kind, whole in one process, goes on shared out, and the other way
                if together.is_main:
                    alone.save(folder / "alone.safetensors")
                shared.save(folder / "shared.safetensors", together)
                shared = WeightAverage(model, together, on_host=on_host)
                assert shared.load(folder / "alone.safetensors", together)
                if together.is_main:
                    alone = WeightAverage(model)
                    assert alone.load(folder / "shared.safetensors")
                    files = [(folder / f"{name}.safetensors").read_bytes() for name in ("alone", "shared")]
                    assert files[0] == files[1]
        held = sum(mean.nbytes for mean in shared._mean)
        assert held <= sum(mean.nbytes for mean in alone._mean) / 2 + 2 * 4 * 2_000, held
        before = [parameter.detach().clone() for parameter in model.parameters()]
        # All processes fail at the same tensor, then each alone keeps what is its own.
        real, calls = torch.Tensor.copy_, []

        def small_memory(tensor, *args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("full")
            return real(tensor, *args, **kwargs)

        failing = WeightAverage(model, together)
        failing.update()
        torch.Tensor.copy_ = small_memory
        try:
            mean_of(model, failing)
        except torch.OutOfMemoryError:
            torch.Tensor.copy_ = real
        else:
            raise AssertionError
        for parameter, own in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter.detach(), own)
        for mine, other in zip(mean_of(model, shared), mean_of(model, alone), strict=True):
            assert torch.equal(mine.view(torch.int16 if dtype == torch.bfloat16 else torch.int32),
                               other.view(torch.int16 if dtype == torch.bfloat16 else torch.int32))
        for parameter, own in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter.detach(), own)
        assert not records, records

# So small that one process averages nothing.
tiny = nn.ParameterList([nn.Parameter(torch.ones(10))])
shared = WeightAverage(tiny, together)
shared.update()
assert sum(mean.numel() for mean in shared._mean) == (0 if together.is_main else 10)
shared.save(folder / "tiny.safetensors", together)
shared.place(on_host=True)
shared.update()
assert torch.equal(mean_of(tiny, shared)[0], torch.ones(10))
assert mean_of(tiny, shared)  # used up: the model's own

# Copies that drifted apart: each keeps its own, and it is told.
shared = WeightAverage(model, together)
shared.update()
with torch.no_grad():
    model.large[3, 4] += together.rank
before = [parameter.detach().clone() for parameter in model.parameters()]
mean_of(model, shared)
assert all(torch.equal(p.detach(), own) for p, own in zip(model.parameters(), before, strict=True))
assert ["processes [1] differ" in record for record in records] == [True], records
dist.barrier()
os._exit(0)  # gloo's threads now and then end a process that is done
"""


@pytest.mark.slow
def test_two_processes_average_half_each_and_have_the_mean_of_one(tmp_path: Path) -> None:
    run_script(tmp_path, SHARED, str(tmp_path))
