"""`CombinedOptimizer` is its parts: their steps, their groups and state, and checkpoints in torch's own layout."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from mates_hf import CombinedOptimizer
from mates_hf.engine.preserve import preserved
from tests.engine.test_preserve import assert_same


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    loss = model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, last: int = 4, rate: Any = None) -> None:
    for seed in range(first, last):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
        if rate is not None:
            rate.step()


def two_kinds(model: nn.Module) -> CombinedOptimizer:
    """Three groups and state of two kinds."""
    first = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[0].bias], "lr": 0.3}]
    return CombinedOptimizer(torch.optim.SGD(first, momentum=0.9), torch.optim.AdamW(model[1].parameters(), lr=0.01))


def two_adams(model: nn.Module) -> CombinedOptimizer:
    return CombinedOptimizer(*(torch.optim.AdamW(part.parameters(), lr=0.01) for part in model))


def one_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": list(part.parameters())} for part in model], lr=0.01)


def test_two_of_a_kind_are_one_of_it() -> None:
    """Weights, rates and the checkpoint are those of one optimizer with two groups, and either loads the other's."""
    trained = []
    for make in (two_adams, one_adam):
        model = network()
        optimizer = make(model)
        rate = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        with warnings.catch_warnings():  # a schedule that does not see the steps warns of their order
            warnings.simplefilter("error")
            train(model, optimizer, rate=rate)
        trained.append((model, optimizer))
    (model, both), (same, one) = trained
    assert [group["lr"] for group in both.param_groups] == [0.01 / 16] * 2
    assert_same(model.state_dict(), same.state_dict())
    assert_same(both.state_dict(), one.state_dict())
    ends = []
    for make, saved in ((one_adam, both), (two_adams, one)):
        resumed = copy.deepcopy(model)
        optimizer = make(resumed)
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))  # torch keeps the tensors it is given
        train(resumed, optimizer, 4, 6)
        ends.append(resumed.state_dict())
    train(same, one, 4, 6)
    assert_same(ends, [same.state_dict()] * 2)


def test_the_parts_step_as_they_do_alone_and_groups_and_state_are_theirs() -> None:
    model, other = network(), network()
    optimizer, alone = two_kinds(model), two_kinds(other).optimizers
    train(model, optimizer)
    for seed in range(4):
        other.zero_grad()
        backward(other, seed)
        for part in alone:
            part.step()
    assert_same(model.state_dict(), other.state_dict())
    groups = [group for part in optimizer.optimizers for group in part.param_groups]
    assert len(groups) == 3
    assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
    assert optimizer.state.keys() == set(model.parameters())
    assert all(optimizer.state[p] is part.state[p] for part in optimizer.optimizers for p in part.state)
    # What accelerate's wrapper may do: put other groups and other state in the place of those.
    optimizer.param_groups = [{**group, "lr": 0.0} for group in groups]
    optimizer.state = {}
    assert [group["lr"] for part in optimizer.optimizers for group in part.param_groups] == [0.0] * 3
    assert not any(part.state for part in optimizer.optimizers)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())


def through_a_file(model: nn.Module, optimizer: CombinedOptimizer) -> None:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = two_kinds(model)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(model, resumed, 4, 7)


def by_names(model: nn.Module, optimizer: CombinedOptimizer) -> None:
    """As accelerate keeps it under FSDP2: the state by the parameters' names."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    resumed = two_kinds(model)
    set_optimizer_state_dict(model, resumed, saved)
    train(model, resumed, 4, 7)


def as_it_was_pasted(model: nn.Module, optimizer: CombinedOptimizer) -> None:
    """A checkpoint of the class that the documentation once asked its readers to paste."""
    parts = [part.state_dict() for part in optimizer.optimizers]
    resumed = two_kinds(model)
    resumed.load_state_dict({"state": {i: part["state"] for i, part in enumerate(parts)}, "param_groups": parts})
    train(model, resumed, 4, 7)


def pickled(model: nn.Module, optimizer: CombinedOptimizer) -> None:
    other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    train(other, resumed, 4, 7)
    model.load_state_dict(other.state_dict())


def probed(model: nn.Module, optimizer: CombinedOptimizer) -> None:
    with preserved(model, optimizer):
        backward(model, 99)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 7.0
    train(model, optimizer, 4, 7)


@pytest.mark.parametrize("way", [through_a_file, by_names, as_it_was_pasted, pickled, copy.deepcopy, probed])
def test_a_run_goes_on_bit_for_bit(way: Any) -> None:
    """Saved and loaded, copied, or stepped for a probe and put back: three more steps end where they would have."""
    model, whole = network(), network()
    optimizer = two_kinds(model)
    train(whole, two_kinds(whole), 0, 7)
    train(model, optimizer)
    if way is copy.deepcopy:
        model, optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, 4, 7)
    else:
        way(model, optimizer)
    assert_same(model.state_dict(), whole.state_dict())


def test_a_closure_is_called_once_with_gradients_on() -> None:
    model, plain = network(), network()
    optimizer = two_kinds(model)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return backward(model, 0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    train(plain, two_kinds(plain), 0, 1)
    assert calls == [True]
    assert loss.requires_grad
    assert_same(model.state_dict(), plain.state_dict())
    assert optimizer.step() is None


class OfTwoModes(torch.optim.SGD):
    """With what some optimizers have besides: two modes, state of no parameter, an entry of its own when saved."""

    mode, counted = "train", 0

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def step(self, closure: Any = None) -> None:
        super().step()
        self.state["steps"] = {"taken": self.state.get("steps", {}).get("taken", 0) + 1}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "counted": self.counted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counted = state_dict["counted"]
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


def test_what_a_part_has_of_its_own_is_told_and_kept() -> None:
    def make(model: nn.Module) -> CombinedOptimizer:
        return CombinedOptimizer(*(OfTwoModes(part.parameters(), lr=0.1) for part in model))

    optimizer = make(model := network())
    train(model, optimizer, 0, 2)
    optimizer.optimizers[1].counted = 5
    optimizer.optimizers[0].step()
    resumed = make(model)
    resumed.load_state_dict(optimizer.state_dict())
    assert [(part.state["steps"], part.counted) for part in resumed.optimizers] == [
        ({"taken": 3}, 0),
        ({"taken": 2}, 5),
    ]
    resumed.eval()
    assert [part.mode for part in resumed.optimizers] == ["eval"] * 2
    two_kinds(model).eval()  # parts without modes are left alone
    nested = CombinedOptimizer(two_adams(network()), torch.optim.SGD(model.parameters()))
    assert [type(part).__name__ for part in nested.optimizers] == ["AdamW", "AdamW", "SGD"]


def shared(model: nn.Module) -> Any:
    return CombinedOptimizer(torch.optim.SGD(model.parameters()), torch.optim.AdamW(model[1].parameters()))


def wrapped(model: nn.Module) -> Any:
    from accelerate.optimizer import AcceleratedOptimizer

    part = torch.optim.SGD(model.parameters())
    accelerated = object.__new__(AcceleratedOptimizer)
    accelerated.__dict__.update(optimizer=part)
    return CombinedOptimizer(accelerated)


WRONG = {
    "none": (lambda model: CombinedOptimizer(), ValueError, "at least one optimizer"),
    "a list": (lambda model: CombinedOptimizer([torch.optim.SGD(model.parameters())]), TypeError, "one by one"),
    "shared": (shared, ValueError, "must not share a parameter, got 2 parameters"),
    "closure": (lambda model: CombinedOptimizer(torch.optim.LBFGS(model.parameters())), ValueError, "LBFGS"),
    "wrapped": (wrapped, ValueError, "Combine them first"),
    "a group": (lambda model: two_kinds(model).add_param_group({"params": []}), ValueError, "one of the parts"),
    "other groups": (
        lambda model: two_kinds(model).load_state_dict(two_adams(model).state_dict()), ValueError, "3 groups.*got 2"
    ),
    "other parts": (
        lambda model: two_kinds(model).load_state_dict({"param_groups": [two_adams(model).state_dict()]}),
        ValueError, "2 optimizers, got 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_with_the_way_out(name: str) -> None:
    make, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        make(network())
