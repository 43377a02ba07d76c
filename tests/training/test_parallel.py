"""What is refused among ways of training on several devices, and by what name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import LlamaForCausalLM, TrainerCallback

from mates_hf.training.checks import parallel
from mates_hf.training.checks.parallel import parallel_refusals
from tests.launch import run_script
from tests.training.kit import make_model
from tests.training.settings import NO_FILE, FullyShardedDataParallel, Setup, assert_refused, case, mates, proves

ONE = SimpleNamespace(n_gpu=1, deepspeed=None)


class ShardedParameter(nn.Parameter):
    def to_local(self) -> torch.Tensor:
        return self.data


def with_state(monkeypatch: pytest.MonkeyPatch, **state: object) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", state)


def test_one_process_and_replicas_are_supported(monkeypatch):
    for kind in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP):
        with_state(monkeypatch, distributed_type=kind)
        assert parallel_refusals(ONE, make_model()) == []


def test_each_other_arrangement_is_refused_by_name(monkeypatch):
    with_state(monkeypatch)
    assert "`n_gpu` is 4" in parallel_refusals(SimpleNamespace(n_gpu=4, deepspeed=None), make_model())[0]
    assert "FSDP1" in parallel_refusals(ONE, nn.Sequential(FullyShardedDataParallel()))[0]
    split = nn.Module()
    split.weight = ShardedParameter(torch.zeros(2, 2))
    assert "tensor parallelism (`weight`" in parallel_refusals(ONE, split)[0]
    with_state(monkeypatch, distributed_type=DistributedType.MEGATRON_LM)
    assert "MEGATRON_LM" in parallel_refusals(ONE, make_model())[0]
    with_state(monkeypatch, parallelism_config=SimpleNamespace(non_data_parallel_size=2))
    assert "`non_data_parallel_size` of 2" in parallel_refusals(ONE, make_model())[0]


# What is refused of DeepSpeed, and what its message says to set instead; None leaves it out.
DEEPSPEED: dict[str, tuple[Any, Any]] = {
    "zero_optimization.zero_hpz_partition_size": (2, 1),
    "zero_optimization.zero_quantized_weights": (True, False),
    "zero_optimization.zero_quantized_nontrainable_weights": (True, False),
    "zero_optimization.zero_quantized_gradients": (True, False),
    "zero_optimization.offload_optimizer": ({"device": "nvme"}, {"device": "cpu"}),
    "zero_optimization.offload_param": ({"device": "nvme"}, {"device": "cpu"}),
    "zero_optimization.offload_optimizer.super_offload": (True, False),
    "zero_optimization.zenflow": ({"topk_ratio": 0.1}, None),
    "zero_optimization.mics_shard_size": (2, None),
    "zero_optimization.stage": (0, 1),
    "compile.deepcompile": (True, False),
    "torch_autocast": ({"enabled": True}, None),
    "tensor_parallel.autotp_size": (2, 1),
    "pipeline": ({"stages": 2}, None),
    "sequence_parallel_size": (2, 1),
    "expert_parallel": ({"enabled": True}, None),
    "compression_training": ({"weight_quantization": {}}, None),
    "progressive_layer_drop": ({"enabled": True}, None),
    "data_efficiency": ({"enabled": True}, None),
    "curriculum_learning": ({"enabled": True}, None),
}


def zero_config(path: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    *sections, name = path.split(".")
    section = config
    for each in sections:
        section = section.setdefault(each, {})
    section[name] = value
    return config


@pytest.mark.parametrize("path", DEEPSPEED)
def test_what_is_refused_of_deepspeed_is_named_and_its_advice_is_accepted(monkeypatch, tmp_path, path):
    refused, advised = (zero_config(path, value) for value in DEEPSPEED[path])
    model = make_model()
    with_state(monkeypatch, distributed_type=DistributedType.DEEPSPEED)
    (written := tmp_path / "zero.json").write_text(json.dumps(refused), encoding="utf-8")
    for given in (refused, str(written)):
        (found,) = parallel_refusals(SimpleNamespace(n_gpu=1, deepspeed=given), model)
        assert "DeepSpeed" in found
        assert f"`{path}`" in found
    assert parallel_refusals(SimpleNamespace(n_gpu=1, deepspeed=advised), model) == []
    plugin = SimpleNamespace(deepspeed_config=refused)  # as `accelerate launch` leaves it, with no Trainer's arguments
    with_state(monkeypatch, distributed_type=DistributedType.DEEPSPEED, deepspeed_plugins={"default": plugin})
    assert len(parallel_refusals(None, model)) == 1


def test_reentrant_checkpointing_and_layers_of_deepspeed_are_refused(monkeypatch):
    with_state(monkeypatch, distributed_type=DistributedType.DEEPSPEED)
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert "`gradient_checkpointing_kwargs={'use_reentrant': False}`" in parallel_refusals(ONE, model)[0]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert parallel_refusals(ONE, model) == []
    model = make_model()
    model.extra = type("MoE", (nn.Module,), {"__module__": "deepspeed.moe.layer"})()
    assert "`extra` is a MoE of DeepSpeed" in parallel_refusals(ONE, model)[0]


def test_weights_that_fsdp2_sharded_are_supported(monkeypatch):
    with_state(monkeypatch, distributed_type=DistributedType.FSDP)
    sharded = nn.Module()
    sharded.weight = ShardedParameter(torch.zeros(2, 2))
    sharded.unshard = sharded.reshard = lambda: None
    assert parallel_refusals(ONE, sharded) == []


def test_fp8_is_refused_wherever_it_shows(monkeypatch):
    with_state(monkeypatch, _mixed_precision="bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")  # which the run overrode
    assert parallel_refusals(ONE, make_model()) == []
    with_state(monkeypatch)
    assert "`mixed_precision='fp8'`" in parallel_refusals(ONE, make_model())[0]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert parallel_refusals(ONE, make_model()) == []
    with_state(monkeypatch, _mixed_precision="fp8")
    assert "`mixed_precision='fp8'`" in parallel_refusals(ONE, make_model())[0]
    with_state(monkeypatch)
    for package in ("transformer_engine.pytorch.module.linear", "torchao.float8.float8_linear", "msamp.nn.linear"):
        linear = type("TheirLinear", (nn.Linear,), {"__module__": package})
        found = parallel_refusals(ONE, nn.Sequential(linear(2, 2)))
        assert len(found) == 1
        assert "`0` is a TheirLinear" in found[0]
        assert "bf16" in found[0]


def test_offloaded_and_xla_parameters_are_refused(monkeypatch):
    with_state(monkeypatch)
    model = make_model()
    model.lm_head.to("meta")
    (found,) = parallel_refusals(ONE, model)
    assert "`lm_head.weight` is on the `meta` device" in found
    with_state(monkeypatch, distributed_type=DistributedType.XLA)
    assert "XLA" in parallel_refusals(ONE, make_model())[0]


def test_what_transformers_set_up_at_load_time_is_refused(monkeypatch):
    with_state(monkeypatch)
    model = make_model()
    model._tp_size = 1
    model.config.distributed_config = SimpleNamespace(tp_size=1, pp_size=1, ep_size=None, fsdp_size=8)
    assert parallel_refusals(ONE, model) == []
    for name in ("tp", "pp", "ep"):
        sizes = {"tp_size": 1, "pp_size": 1, "ep_size": 1, f"{name}_size": 2}
        for config in (sizes, SimpleNamespace(**sizes)):
            model.config.distributed_config = config
            assert f"({name} of 2)" in parallel_refusals(ONE, model)[0]
    del model.config.distributed_config
    model._tp_size = 4
    assert "tp of 4" in parallel_refusals(ONE, model)[0]


MESHES = """
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mates_hf.training.checks.parallel import parallel_refusals

torch.set_num_threads(1)
Accelerator(cpu=True)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))


def refused(model):
    return " ".join(parallel_refusals(SimpleNamespace(n_gpu=1, deepspeed=None), model))


def tensor_parallel(model, mesh):
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})


def mesh(*shape, names=None):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


assert refused(build()) == ""
assert refused(fully_shard(build(), mesh=mesh(2))) == ""
for names in (("dp_shard",), ("fsdp",)):
    assert refused(fully_shard(build(), mesh=mesh(2, names=names))) == ""
for shape in ((2, 1), (1, 2)):  # HSDP
    assert refused(fully_shard(build(), mesh=mesh(*shape, names=("dp_replicate", "dp_shard")))) == ""
partly = build()
fully_shard(partly[0], mesh=mesh(2))
assert refused(partly) == ""

assert "'stages'" in refused(fully_shard(build(), mesh=mesh(2, 1, names=("stages", "dp_shard"))))
assert "tensor parallelism (`0.weight`" in refused(tensor_parallel(build(), mesh(2, names=("tp",))))
both = mesh(1, 2, names=("dp_shard", "tp"))
assert "'tp'" in refused(fully_shard(tensor_parallel(build(), both["tp"]), mesh=both["dp_shard"]))
# No name tells, and the mesh is that of all processes: but FSDP2 leaves these parameters alone.
mixed = build()
parallelize_module(mixed, mesh(2), {"1": RowwiseParallel()})
fully_shard(mixed[0], mesh=mesh(2))
assert "`1.weight` is a DTensor that FSDP2 did not make" in refused(mixed)
alone = mesh(2, 1, names=("dp_replicate", "dp_shard"))["dp_shard"]
assert "1 of 2 processes" in refused(fully_shard(build(), mesh=alone))
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed, "fsdp") or not hasattr(torch.distributed.fsdp, "fully_shard"),
                    reason="a torch older than FSDP2's public name")  # fmt: skip
def test_real_meshes_of_two_processes(tmp_path):
    run_script(tmp_path, MESHES)


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


def in_zenflow(args: Any, patch: pytest.MonkeyPatch) -> None:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}})
    patch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    patch.setitem(AcceleratorState._shared_state, "deepspeed_plugins", {"default": plugin})


def several_gpus(args: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(args, "_n_gpu", 4)


def sharing_rows(**sizes: int) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def arrange(args: Any, patch: pytest.MonkeyPatch) -> None:
        patch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(**sizes))

    return arrange


def in_fp8(args: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp8")


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


def loaded_in_parallel(args: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LlamaForCausalLM, "_tp_size", 2, raising=False)


def arranged(setting: str, match: str, arrange: Any = nothing, model: Any = make_model, note: str = "") -> Any:
    return case(setting, match, arrange, model, outcome="refused", what=NO_FILE, note=note)


NO_CONTEXT = "context parallelism (`cp_size`) without FSDP2, without SDPA, or in a loop of one's own"

REFUSED = [
    arranged("DeepSpeed with hpZ, quantized ZeRO++, NVMe offload, MiCS, ZenFlow, SuperOffload, DeepCompile, its MoE, "
             "tensor, sequence or pipeline parallelism, `torch_autocast`, or 16 bits at stage 0",
             "zenflow", in_zenflow, note="by the name of the setting, each with the way out"),
    arranged("Megatron-LM, XLA and other engines of accelerate", "MEGATRON_LM", of_kind(DistributedType.MEGATRON_LM)),
    arranged("nn.DataParallel (several GPUs in one process)", "n_gpu", several_gpus, note="use DDP"),
    arranged("FSDP1", "FSDP1", model=with_module(FullyShardedDataParallel), note="use FSDP2"),
    arranged("tensor parallelism", "tensor parallelism", model=with_module(split_module)),
    arranged("tensor, expert and pipeline parallelism set up at load time (`tp_plan`, `distributed_config`)",
             "tp of 2", loaded_in_parallel),
    arranged("fp8 (`mixed_precision`, TransformerEngine, torchao, MS-AMP)", "fp8", in_fp8,
             note="its scales are no parameters and no buffers; use bf16"),
    arranged(NO_CONTEXT, "`cp_size=2` is supported with FSDP2 alone", sharing_rows(cp_size=2)),
    arranged("tensor parallelism", "with `tp_size=2` has.*`dp_shard_size`", sharing_rows(tp_size=2, cp_size=2)),
]  # fmt: skip


def test_what_is_advised_for_shared_rows_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {"tp_size": 2, "cp_size": 2}
    with_state(monkeypatch, distributed_type=DistributedType.FSDP, parallelism_config=ParallelismConfig(**sizes))
    (refusal,) = parallel_refusals(ONE, make_model())
    for name in re.findall(r"`(\w+)=\d+`", refusal):
        sizes[name] = 1
    assert sizes == {"tp_size": 1, "cp_size": 2}
    with_state(monkeypatch, parallelism_config=ParallelismConfig(**sizes, dp_shard_size=2))
    sharded = make_model()
    sharded.unshard = lambda: None
    assert parallel_refusals(ONE, sharded) == []


@proves("sequence parallelism (`sp_size`: Ulysses, ALST)", "refused by its name", outcome="refused")
def test_sequence_parallelism_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_state(monkeypatch, parallelism_config=SimpleNamespace(sp_size=4, cp_size=1))
    assert "with `sp_size=4` has" in parallel_refusals(ONE, make_model())[0]


@proves(NO_CONTEXT, "each by its name, with a way out that is accepted", outcome="refused")
def test_context_parallelism_is_supported_where_only_the_training_step_splits_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(args: Any = ONE, attention: str = "sdpa", backend: str = "torch", sharded: bool = True) -> list[str]:
        model = make_model()
        model.config._attn_implementation = attention
        if sharded:
            model.unshard = lambda: None
        sizes = SimpleNamespace(cp_size=2, tp_size=1, sp_size=1, non_data_parallel_size=2, cp_backend=backend)
        with_state(monkeypatch, distributed_type=DistributedType.FSDP, parallelism_config=sizes)
        return parallel_refusals(args, model)

    assert found() == []
    assert "`MatesCallback(...).attach(trainer)`" in found(args=None)[0]
    assert "the model's attention is `flex_attention`" in found(attention="flex_attention")[0]
    assert "got `cp_backend='ring'`" in found(backend="ring")[0]
    assert "`fsdp_config` with `version: 2`" in found(sharded=False)[0]


def test_processes_that_share_rows_must_be_given_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 4)

    def found(num_shares: int | None, **sizes: int) -> list[str]:
        with_state(monkeypatch, parallelism_config=SimpleNamespace(**sizes))
        shared = SimpleNamespace() if num_shares is None else SimpleNamespace(num_processes=num_shares)
        return parallel.loader_refusals(SimpleNamespace(batch_sampler=shared))

    assert found(2, cp_size=2) == found(None, cp_size=4) == found(4, dp_shard_size=4) == []
    assert (
        "4 processes must train on 2 shares of a batch, but the training dataloader makes 4" in found(4, cp_size=2)[0]
    )
    assert "makes 1" in found(None, cp_size=2)[0]


@pytest.mark.parametrize(("setting", "match", "arrange", "model"), REFUSED)
def test_refused_before_the_first_step(tmp_path, monkeypatch, setting, match, arrange, model):
    setup = Setup(model=model)
    assert_refused(tmp_path, setup, match, callbacks=lambda: [Arranged(arrange, monkeypatch), mates()])
