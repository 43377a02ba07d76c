"""Fragments of flattened parameters, and gradients taken beside an engine, by stand-ins of one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.deepspeed_gradient import Sums, refuse_reentrant
from mates_hf.engine.deepspeed_optimizer import ShardedOptimizer
from mates_hf.engine.deepspeed_shards import weights_of
from mates_hf.engine.digest import weights_digest
from mates_hf.engine.fragments import Fragment, own_part, whole_shape, whole_size, whole_tensor
from mates_hf.engine.preserve import local_shard, preserved
from mates_hf.engine.weight_store import adopt_engine, weight_store
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.preconditioner import (
    UnsupportedOptimizerError,
    parameter_steps,
    require_known,
    require_real_steps,
    unwrap_optimizer,
)


def fragment(values: torch.Tensor, start: int = 5, num: int = 9) -> Fragment:
    flat = values.reshape(-1)
    return Fragment.of(nn.Parameter(values), values.shape, start, flat[start : start + num])


def test_a_fragment_knows_its_rows_and_shares_its_storage():
    values = torch.arange(24.0).reshape(6, 4)
    part = fragment(values)
    assert torch.equal(local_shard(part), torch.arange(5.0, 14.0))
    local_shard(part).add_(100)
    assert values.reshape(-1)[5] == 105
    assert torch.equal(own_part(values, part), local_shard(part))
    whole = whole_tensor(torch.ones(9), part)
    assert whole.shape == (6, 4)
    assert torch.equal(whole.reshape(-1).nonzero().flatten(), torch.arange(5, 14))
    # Rows 1 to 3 are in it, of which the first and the last are cut: what is missing is in other processes.
    assert torch.equal(part.row_means(torch.ones(9)), torch.tensor([0, 0.75, 1, 0.5, 0, 0]))
    assert torch.equal(part.by_entry(torch.arange(6.0)), torch.tensor([1.0, 1, 1, 2, 2, 2, 2, 3, 3]))
    assert (whole_shape(part), whole_size(part)) == ((6, 4), 24)
    empty = fragment(values, 24, 0)
    assert empty.by_entry(torch.arange(6.0)).numel() == 0
    assert not empty.row_means(torch.ones(0)).any()


def test_gradients_are_added_up_in_one_order_whatever_the_backward_pass_does():
    for found in ([3, 1, 2], [1, 2, 3], [2]):
        added = []
        sums = Sums([1, 2, 3], lambda key, gradient, added=added: added.append((key, gradient is not None)))
        for key in found:
            passed_on = sums.take(key, torch.ones(4, 4))
            assert not passed_on.any()
            assert passed_on.untyped_storage().nbytes() == 4
        sums.finish()
        assert added == [(key, key in found) for key in (1, 2, 3)]


def test_reentrant_checkpointing_is_found_wherever_it_is():
    layer, inputs = nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    refuse_reentrant(checkpoint(layer, inputs, use_reentrant=False).sum(1))
    with pytest.raises(UnsupportedSettingError, match="'use_reentrant': False"):
        refuse_reentrant((layer(checkpoint(layer, inputs, use_reentrant=True)) * 2).sum(1))


# --- a stand-in with the buffers of ZeRO 1 and 2, of one process ---


def named(kind: str, module: str = "deepspeed.runtime.zero.stage_1_and_2") -> type:
    return type(kind, (SimpleNamespace,), {"__module__": module, "__hash__": object.__hash__})


def make_engine(optimizer: type = torch.optim.AdamW, kind: str = "DeepSpeedZeroOptimizer", **settings):
    """A model in bfloat16 whose float32 copy is one flat buffer, after two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)).to(torch.bfloat16)
    parameters = list(model.parameters())
    flat = nn.Parameter(torch.cat([p.detach().float().reshape(-1) for p in parameters]))
    inner = optimizer([flat], lr=0.1, **settings)
    for _ in range(2):
        flat.grad = torch.randn_like(flat)
        inner.step()
    offset = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter._hp_mapping = SimpleNamespace(
            lp_fragment_address=SimpleNamespace(start=0, numel=size),
            hp_fragment_address=SimpleNamespace(start=offset, numel=size),
        )
        parameter.data.copy_(flat.detach()[offset : offset + size].view_as(parameter))
        offset += size
    engine = named(kind)(
        optimizer=inner, bit16_groups=[parameters], single_partition_of_fp32_groups=[flat],
        parallel_partitioned_bit16_groups=[[torch.empty(0)]], real_dp_process_group=[None],
    )  # fmt: skip
    return model, engine, flat


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_probe_moves_both_copies_and_puts_both_back_also_after_an_error():
    model, engine, flat = make_engine()
    with torch.no_grad():
        model[1].bias[0] = 17.0  # which no float32 entry is rounded to
    adopt_engine(model, engine)
    before, master, digest = bits(model), flat.detach().clone(), weights_digest(model)

    def move() -> None:
        with preserved(model) as snapshot:
            snapshot.shift({p: torch.ones_like(local_shard(p)) for p in snapshot.parameters}, 0.5)
            assert torch.equal(flat, master + 0.5)
            assert torch.equal(model[0].weight, (master[:32] + 0.5).view(8, 4).to(torch.bfloat16))
            assert weights_digest(model) != digest
            raise KeyError("on the way")

    with pytest.raises(KeyError):
        move()
    assert torch.equal(flat, master)
    assert all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))
    average = WeightAverage(model)
    average.update()
    with torch.no_grad():
        flat += 1
    average.update()
    with average.swapped_in():
        assert torch.allclose(flat, master + 0.5)
    assert torch.equal(flat, master + 1)


def test_a_gradient_is_the_backward_pass_of_the_model_and_stays_out_of_its_parameters():
    model, engine, _ = make_engine()
    adopt_engine(model, engine)
    store, inputs = weight_store(model), torch.tensor([[0, 3, 3, 1]])
    values = model(inputs).float().logsumexp(-1).reshape(-1)
    store.backward(values, torch.full_like(values, 0.5))
    assert all(parameter.grad is None for parameter in model.parameters())
    (model(inputs).float().logsumexp(-1).sum() * 0.5).backward()
    first, *others = store.parameters().values()
    for found, parameter in zip((first, *others), model.parameters(), strict=True):
        assert torch.equal(found.grad, parameter.grad.float().reshape(-1))
    once = first.grad.clone()
    store.backward(model(inputs).float().logsumexp(-1).sum(), torch.tensor(0.5))
    assert torch.allclose(first.grad, 2 * once)
    for each in (first, *others):
        each.grad = None
    store.backward(model[1](torch.ones(1, 4, dtype=torch.bfloat16)).sum(), torch.tensor(1.0))
    assert first.grad is None  # it was not reached
    assert all(each.grad is not None for each in others)


def test_the_optimizer_is_read_as_one_that_holds_the_fragments():
    model, engine, flat = make_engine(weight_decay=0.1)
    wrapper = named("DeepSpeedOptimizerWrapper", "accelerate.utils.deepspeed")(optimizer=engine)
    adopt_engine(model, wrapper)
    optimizer = unwrap_optimizer(wrapper, model)
    steps = parameter_steps(optimizer, list(weight_store(model).parameters().values()))
    real = torch.optim.AdamW([copy := nn.Parameter(flat.detach().clone())], lr=0.1, weight_decay=0.1)
    real.load_state_dict(engine.optimizer.state_dict())
    for step in steps:
        step.write_null()
    copy.grad = torch.zeros_like(copy)
    real.step()
    assert torch.allclose(flat, copy, atol=1e-6)
    engine.optimizer.param_groups[0]["lr"] = 0.7
    assert [group["lr"] for group in optimizer.param_groups] == [0.7]
    with pytest.raises(UnsupportedSettingError, match="DirectionalProbe"):
        optimizer.step()
    with pytest.raises(UnsupportedOptimizerError, match="`OneStepProbe` takes real steps"):
        require_real_steps(optimizer)
    with pytest.raises(UnsupportedOptimizerError, match="`LossReductionProbe` takes real steps"):
        require_real_steps(optimizer, "LossReductionProbe")


@pytest.mark.parametrize(("kind", "decoupled"), [("DeepSpeedCPUAdam", True), ("FusedAdam", False)])
def test_deepspeeds_own_adam_has_torchs_closed_form(kind, decoupled):
    own = type(kind, (torch.optim.SGD,), {"__module__": "deepspeed.ops.adam.x", "adam_w_mode": decoupled})
    model, engine, flat = make_engine(own, momentum=0.9)
    group = engine.optimizer.param_groups[0]
    for key in list(group):
        if key not in ("params", "lr"):
            del group[key]
    group |= {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}
    engine.optimizer.state[flat] = {"step": 2, "exp_avg": torch.ones_like(flat), "exp_avg_sq": torch.ones_like(flat)}
    optimizer = ShardedOptimizer(weights_of(engine, model), engine)
    require_known(optimizer)
    assert type(optimizer.optimizers[0]) is (torch.optim.AdamW if decoupled else torch.optim.Adam)
    steps = parameter_steps(optimizer, list(weights_of(engine, model).parameters().values()))
    assert all(step.l2 == (0 if decoupled else 0.1) for step in steps)
    group["bias_correction"] = False
    with pytest.raises(UnsupportedSettingError, match="bias_correction"):
        ShardedOptimizer(weights_of(engine, model), engine)


def test_unknown_optimizers_of_deepspeed_are_refused_by_name():
    lamb = type("OnebitLamb", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.fp16.onebit.lamb"})
    model, engine, _ = make_engine(lamb)
    with pytest.raises(UnsupportedOptimizerError, match=r"OnebitLamb. Leave `optimizer` out of the DeepSpeed config"):
        require_known(unwrap_optimizer(engine, model))
    if hasattr(torch.optim, "Adafactor"):
        model, engine, _ = make_engine(torch.optim.Adafactor)
        with pytest.raises(UnsupportedOptimizerError, match="needs whole matrices"):
            require_known(unwrap_optimizer(engine, model))
    for kind, way in (("ZenFlowZeroOptimizerParallel", "without ZenFlow"), ("FP16_UnfusedOptimizer", "stage` to 1")):
        model, engine, _ = make_engine(kind=kind)
        with pytest.raises(UnsupportedSettingError, match=f"{kind}.*{way}"):
            unwrap_optimizer(engine, model)
    model, engine, _ = make_engine()
    model.append(nn.Linear(2, 2))
    with pytest.raises(UnsupportedSettingError, match=r"`2\.weight` is not"):
        unwrap_optimizer(engine, model)
