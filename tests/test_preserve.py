"""`preserved`: not one bit differs afterwards, whatever the body did and however it ended."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mates_hf.preserve import preserved


def train_a_step(model: Any, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def everything(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A deep copy of all that must not change, and the identity of the objects that must stay."""
    return copy.deepcopy(
        {
            "parameters": [p.detach() for p in model.parameters()],
            "gradients": [p.grad for p in model.parameters()],
            "buffers": list(model.buffers()),
            "state": [dict(optimizer.state[p]) for p in model.parameters() if p in optimizer.state],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "modes": [module.training for module in model.modules()],
            "counters": {k: v for k, v in vars(optimizer).items() if isinstance(v, (int, float, bool, str))},
            "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()],  # noqa: NPY002
        }
    ) | {
        "objects": [id(p.grad) for p in model.parameters()]
        + [id(b) for b in model.buffers()]
        + [id(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()
        ]
        + [list(optimizer._optimizer_step_pre_hooks), list(optimizer._optimizer_step_post_hooks)],
    }


def assert_same(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, np.ndarray):
        np.testing.assert_array_equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


@pytest.fixture
def make_live(make_tiny_model: Callable[..., Any]) -> Callable[..., tuple[Any, torch.optim.Optimizer]]:
    """A model in mixed modes, with gradients, hooks and a scheduler, in the middle of a run."""

    def build(**overrides: Any) -> tuple[Any, torch.optim.Optimizer]:
        model = make_tiny_model(attention_dropout=0.1, **overrides)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        for seed in range(3):
            optimizer.zero_grad()
            train_a_step(model, optimizer, seed)
            scheduler.step()
        model.train()
        model.model.layers[0].eval()
        model.model.layers[1].register_forward_hook(lambda *args: None)
        next(iter(model.parameters())).grad = None
        optimizer.register_step_pre_hook(lambda *args: pytest.fail("a hook of the run was called"))
        return model, optimizer

    return build


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back(make_live: Callable[..., Any], raises: bool) -> None:
    model, optimizer = make_live()
    before = everything(model, optimizer)
    step = vars(optimizer)["step"]  # the scheduler's wrapper
    rotary = model.model.rotary_emb

    def body() -> None:
        with preserved(model, optimizer) as snapshot:
            assert all(p.grad is None for p in model.parameters())
            model.eval()
            for seed in (7, 8):
                train_a_step(model, optimizer, seed)
                optimizer.param_groups[0]["lr"] = 5.0
                optimizer.param_groups[0]["extra"] = 1
                optimizer.state[torch.nn.Parameter(torch.zeros(1))] = {"step": torch.ones(1)}
                snapshot.restore()
            train_a_step(model, optimizer, 9)
            rotary.register_buffer("inv_freq", rotary.inv_freq * 2, persistent=False)
            rotary.original_inv_freq.mul_(3)
            torch.rand(3), random.random(), np.random.rand(3)  # noqa: NPY002
            if raises:
                raise KeyboardInterrupt

    if raises:
        with pytest.raises(KeyboardInterrupt):
            body()
    else:
        body()
    assert_same(before, everything(model, optimizer))
    assert vars(optimizer)["step"] is step


def test_restore_rewinds_exactly_in_the_middle(make_live: Callable[..., Any]) -> None:
    model, optimizer = make_live()
    results = []
    with preserved(model, optimizer) as snapshot:
        for _ in range(3):
            snapshot.restore()
            model.eval()
            train_a_step(model, optimizer, 5)
            results.append([p.detach().clone() for p in model.parameters()])
    for later in results[1:]:
        assert_same(results[0], later)


def test_shift_sets_saved_plus_scaled_direction(make_live: Callable[..., Any]) -> None:
    model, _ = make_live()
    first, second, *_ = model.parameters()
    theta, other = first.detach().clone(), second.detach().clone()
    with preserved(model) as snapshot:
        snapshot.shift({first: torch.ones_like(first)}, 0.5)
        snapshot.shift({first: torch.ones_like(first)}, -0.25)
        assert torch.equal(first.detach(), theta - 0.25)
        assert torch.equal(second.detach(), other)
    assert torch.equal(first.detach(), theta)


def test_optimizer_that_steps_in_backward_does_not_step_inside(make_live: Callable[..., Any]) -> None:
    model, _ = make_live()
    calls: list[int] = []
    parameter = next(iter(model.parameters()))
    parameter.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    ids = torch.ones(1, 4, dtype=torch.long)
    with preserved(model):
        model(input_ids=ids, labels=ids).loss.backward()
    assert not calls
    model(input_ids=ids, labels=ids).loss.backward()
    assert calls


def test_stale_autocast_copies_are_dropped(make_live: Callable[..., Any]) -> None:
    """An autocast around the probe must not go on with bf16 copies of the old weights."""
    model, _ = make_live()
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16), preserved(model) as snapshot:
        model.eval()
        first = model(input_ids=ids).logits
        snapshot.shift({p: torch.ones_like(p) for p in model.parameters()}, 0.1)
        assert not torch.equal(first, model(input_ids=ids).logits)
