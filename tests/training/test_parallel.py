"""What is refused among ways of training on several devices, and by what name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback

from mates_hf.training.parallel import parallel_refusals
from tests.training.kit import make_model
from tests.training.settings import NO_FILE, Setup, assert_refused, case, mates

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


class Arranged(TrainerCallback):
    """Makes a run look as if it were started in another arrangement, when training begins."""

    def __init__(self, arrange: Callable[[Any, pytest.MonkeyPatch], None], patch: pytest.MonkeyPatch) -> None:
        self.arrange, self.patch = arrange, patch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.arrange(args, self.patch)


def of_kind(kind: DistributedType) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def arrange(args: Any, patch: pytest.MonkeyPatch) -> None:
        patch.setitem(AcceleratorState._shared_state, "distributed_type", kind)

    return arrange


def several_gpus(args: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(args, "_n_gpu", 4)


def context_parallel(args: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(AcceleratorState._shared_state, "parallelism_config", SimpleNamespace(non_data_parallel_size=2))


def nothing(args: Any, patch: pytest.MonkeyPatch) -> None:
    pass


def with_module(module: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = make_model()
        model.extra = module()
        return model

    return make


def split_module() -> nn.Module:
    module = nn.Module()
    module.weight = ShardedParameter(torch.zeros(2, 2))
    return module


def arranged(setting: str, match: str, arrange: Any = nothing, model: Any = make_model, note: str = "") -> Any:
    return case(setting, match, arrange, model, outcome="refused", what=NO_FILE, note=note)


REFUSED = [
    arranged("DeepSpeed", "DeepSpeed", of_kind(DistributedType.DEEPSPEED),
             note="flat buffers of weights and optimizer state; use FSDP2"),
    arranged("Megatron-LM, XLA and other engines of accelerate", "MEGATRON_LM", of_kind(DistributedType.MEGATRON_LM)),
    arranged("nn.DataParallel (several GPUs in one process)", "n_gpu", several_gpus, note="use DDP"),
    arranged("FSDP1", "FSDP1", model=with_module(FullyShardedDataParallel), note="use FSDP2"),
    arranged("tensor parallelism", "tensor parallelism", model=with_module(split_module)),
    arranged("context and sequence parallelism (`parallelism_config`)", "parallelism_config", context_parallel),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "match", "arrange", "model"), REFUSED)
def test_refused_before_the_first_step(tmp_path, monkeypatch, setting, match, arrange, model):
    setup = Setup(model=model)
    assert_refused(tmp_path, setup, match, callbacks=lambda: [Arranged(arrange, monkeypatch), mates()])
