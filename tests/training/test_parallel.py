"""What is refused among ways of training on several devices, and by what name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from mates_hf.training.parallel import parallel_refusals
from tests.training.kit import make_model

ONE = SimpleNamespace(n_gpu=1, deepspeed=None)


class ShardedParameter(nn.Parameter):
    def to_local(self) -> torch.Tensor:
        return self.data


class FullyShardedDataParallel(nn.Module):
    """Named as FSDP1's wrapper is."""


def with_state(monkeypatch: pytest.MonkeyPatch, **state: object) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", state)


def test_one_process_and_replicas_are_supported(monkeypatch):
    for kind in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP):
        with_state(monkeypatch, distributed_type=kind)
        assert parallel_refusals(ONE, make_model()) == []


def test_each_other_arrangement_is_refused_by_name(monkeypatch):
    with_state(monkeypatch)
    assert "`n_gpu` is 4" in parallel_refusals(SimpleNamespace(n_gpu=4, deepspeed=None), make_model())[0]
    assert "DeepSpeed" in parallel_refusals(SimpleNamespace(n_gpu=1, deepspeed="zero.json"), make_model())[0]
    assert "FSDP1" in parallel_refusals(ONE, nn.Sequential(FullyShardedDataParallel()))[0]
    split = nn.Module()
    split.weight = ShardedParameter(torch.zeros(2, 2))
    assert "tensor parallelism (`weight`" in parallel_refusals(ONE, split)[0]
    with_state(monkeypatch, distributed_type=DistributedType.DEEPSPEED)
    assert "DeepSpeed" in parallel_refusals(ONE, make_model())[0]
    with_state(monkeypatch, distributed_type=DistributedType.MEGATRON_LM)
    assert "MEGATRON_LM" in parallel_refusals(ONE, make_model())[0]
    with_state(monkeypatch, parallelism_config=SimpleNamespace(non_data_parallel_size=2))
    assert "parallelism_config" in parallel_refusals(ONE, make_model())[0]


def test_weights_that_fsdp2_sharded_are_supported(monkeypatch):
    with_state(monkeypatch, distributed_type=DistributedType.FSDP)
    sharded = nn.Module()
    sharded.weight = ShardedParameter(torch.zeros(2, 2))
    sharded.unshard = sharded.reshard = lambda: None
    assert parallel_refusals(ONE, sharded) == []
