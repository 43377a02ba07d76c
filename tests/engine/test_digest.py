"""The digest of the weights: what it sees, and that it is the same however they are sharded."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.lab.operations import counted
from mates_hf.engine import digest
from mates_hf.engine.digest import weight_marks, weights_digest
from tests.launch import run_script

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def model_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(7, 5), "b": nn.Linear(7, 5), "c": nn.Linear(3, 30)}).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("chunk", [4, 4_096], ids=["chunks", "one-chunk"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_single_bit_and_every_swap_shows_and_coming_back_does_not(dtype, chunk, monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", chunk)
    model = model_of(dtype)
    before = weights_digest(model)
    assert before.startswith("sum128-")
    assert weights_digest(model_of(dtype)) == before
    flat = bits(model["a"].weight).reshape(-1)
    seen = {before}
    for entry in (0, 3, 4, 34):
        for bit in range(8 * flat.element_size()):
            flip = torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(flat.dtype)
            flat[entry] ^= flip
            seen.add(weights_digest(model))
            flat[entry] ^= flip
    assert len(seen) == 1 + 4 * 8 * flat.element_size()
    assert weights_digest(model) == before
    num = len(seen)
    for one, other in [(0, 1), (0, 4), (3, 4), (1, 33)]:
        assert flat[one] != flat[other]
        flat[[one, other]] = flat[[other, one]]
        seen.add(weights_digest(model))
        flat[[one, other]] = flat[[other, one]]
    assert len(seen) == num + 4


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_small_parameters_of_one_size_have_the_lanes_that_they_have_alone(dtype, monkeypatch):
    models = [nn.ModuleDict({str(i): nn.Linear(7, 5) for i in range(num)}).to(dtype) for num in (2, 9)]
    found = [(weights_digest(model), weight_marks(model)) for model in models]
    operations = []
    for model in models:
        with counted() as mode:
            weights_digest(model)
            weight_marks(model)
        operations.append(mode.calls)
        assert mode.syncs.total() == 2
    assert operations[0] == operations[1]
    for most in (0, 5):  # never; biases alone
        monkeypatch.setattr(digest, "_SMALL", most)
        assert [(weights_digest(model), weight_marks(model)) for model in models] == found
    monkeypatch.undo()
    monkeypatch.setattr(digest, "CHUNK", 70)  # two matrices at a time
    in_chunks = weights_digest(models[1])
    monkeypatch.setattr(digest, "_SMALL", 0)
    assert weights_digest(models[1]) == in_chunks


def test_parameters_that_trade_places_or_change_shape_or_type_show():
    model = model_of()
    seen = {weights_digest(model)}
    with torch.no_grad():
        for name in ("weight", "bias"):
            a, b = getattr(model["a"], name), getattr(model["b"], name)
            a.data, b.data = b.data, a.data
            seen.add(weights_digest(model))
    zeros = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in [((2, 3), torch.float32),
             ((3, 2), torch.float32), ((2, 3), torch.float64)]]  # fmt: skip
    seen.update(weights_digest(nn.ParameterDict({"w": parameter})) for parameter in zeros)
    assert len(seen) == 1 + 2 + 3


def test_any_cut_into_shards_adds_up_to_the_whole(monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 64)
    monkeypatch.setattr(digest, "NUM_MARKED", 10)
    values = torch.from_numpy(np.random.default_rng(0).integers(-(2**31), 2**31, 700).astype(np.int32))
    factors = digest._Factors(1_000)
    for lanes in (digest._lanes, digest._marked_lanes):
        whole = lanes(values, 0, 700, factors)
        for cuts in ([0, 700], [0, 1, 1, 63, 64, 65, 700], [0, 350, 700], [0, 699, 700]):
            parts = [lanes(values[a:b], a, 700, factors) for a, b in zip(cuts, cuts[1:], strict=False)]
            assert torch.equal(torch.stack(parts).sum(0), whole), cuts


def test_frozen_and_tied_parameters_count_as_training_has_them():
    model = model_of()
    before = weights_digest(model)
    model["tied"] = model["a"]
    assert weights_digest(model) == before
    model["b"].requires_grad_(False)
    assert weights_digest(model) != before


def test_blocks_of_a_cpu_and_chunks_of_a_device_give_the_same(monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 256)
    values = torch.from_numpy(np.random.default_rng(0).integers(-(2**15), 2**15, 1_000).astype(np.int16))
    found = set()
    for block in (16, 64, 256, 1 << 16):
        monkeypatch.setattr(digest, "CPU_BLOCK", block)
        factors = digest._Factors(1_000)
        found.add(tuple(digest._lanes(values, 0, 1_000, factors).tolist()))
        parts = [digest._lanes(values[:77], 0, 1_000, factors), digest._lanes(values[77:], 77, 1_000, factors)]
        found.add(tuple(torch.stack(parts).sum(0).tolist()))
    assert len(found) == 1


def test_marks_tell_a_parameter_that_was_not_restored():
    model, other = model_of(), model_of(seed=1)
    marks = weight_marks(model)
    assert set(marks) == {f"{part}.{name}" for part in "abc" for name in ("weight", "bias")}
    assert marks == weight_marks(model_of())
    assert all(marks[name] != found for name, found in weight_marks(other).items())


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shards_of_any_dimension_add_up_to_the_whole(bits, monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 16)
    monkeypatch.setattr(digest, "NUM_MARKED", 12)
    shape, each = (5, 4, 6), max(1, bits // 32)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
        {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}[bits]
    )
    values, num = digest._as_integers(whole), whole.numel() * each
    for one, several in ((digest._lanes, digest._lanes_at), (digest._marked_lanes, digest._marked_lanes_at)):
        factors = digest._Factors(1_000)
        expected = one(values, 0, num, factors)
        for cuts in (((0, 2, 5), (0, 4), (0, 1, 3, 6)), ((0, 5), (0, 1, 2, 4), (0, 6)), ((0, 0, 5), (0, 4), (0, 6))):
            found = torch.zeros(2, dtype=torch.int64)
            spans = [list(zip(cut, cut[1:], strict=False)) for cut in cuts]
            for box in itertools.product(*spans):
                part = whole[tuple(slice(a, b) for a, b in box)].contiguous()
                place = digest._Place(tuple(a for a, _ in box), tuple(part.shape), shape, True)
                found += several(digest._as_integers(part), place, num, factors)
            assert torch.equal(found, expected), (one, cuts)


SCRIPT = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

try:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
except ImportError:
    from torch.distributed._tensor import DTensor, Replicate, Shard, distribute_tensor

from mates_hf.engine.processes import Processes
from mates_hf.engine import digest
from mates_hf.engine.digest import weight_marks, weights_digest

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
together = Processes.of_run()
SHAPES = {"even": (6, 5), "uneven": (5, 3), "one_row": (1, 4), "vector": (7,), "scalar": ()}


def build(dtype, placements=None, mesh=None):
    torch.manual_seed(0)
    model = nn.ParameterDict()
    for name, shape in SHAPES.items():
        value = torch.randn(shape).to(dtype)
        if placements is not None and value.ndim >= len(shape) > 0:
            dims = [p if not (p.is_shard() and p.dim >= value.ndim) else Replicate() for p in placements]
            value = distribute_tensor(value, mesh, dims)
        model[name] = nn.Parameter(value)
    return model


def gathers(self, *args, **kwargs):
    raise AssertionError("gathered")


DTensor.full_tensor = gathers
digest.CHUNK, digest.NUM_MARKED = 8, 5
flat, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
line = init_device_mesh("cpu", (1, 2))
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    expected = weights_digest(build(dtype)), weight_marks(build(dtype))
    for mesh, placements in [
        (flat, [Shard(0)]), (flat, [Shard(1)]), (flat, [Replicate()]),
        (square, [Replicate(), Shard(0)]), (square, [Shard(0), Replicate()]), (square, [Shard(0), Shard(1)]),
        (line, [Shard(0), Shard(1)]), (line, [Shard(1), Shard(0)]), (line, [Shard(0), Shard(0)]),
    ]:
        model = build(dtype, placements, mesh)
        assert weights_digest(model, together) == expected[0], (dtype, placements)
        assert weight_marks(model) == expected[1], (dtype, placements)
    # A change in one process's shard alone shows everywhere.
    model = build(dtype, [Shard(0)], flat)
    if rank == 1:
        with torch.no_grad():
            model["uneven"].to_local()[0, 0] += 1
    assert weights_digest(model, together) != expected[0]
dist.barrier()
os._exit(0)  # gloo's threads now and then end a process that is done
"""


@pytest.mark.slow
def test_the_digest_is_the_same_for_any_sharding_of_two_processes(tmp_path: Path) -> None:
    run_script(tmp_path, SCRIPT)
