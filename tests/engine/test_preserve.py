"""`preserved`: not one bit differs afterwards, whatever the body did and however it ended."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mates_hf.engine.preserve import in_evaluation, preserved, undisturbed


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


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back(make_live: Callable[..., Any], raises: bool, on_host: bool) -> None:
    model, optimizer = make_live()
    before = everything(model, optimizer)
    step = vars(optimizer)["step"]  # the scheduler's wrapper
    rotary = model.model.rotary_emb

    def body() -> None:
        with preserved(model, optimizer, state_on_host=on_host) as snapshot:
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


# --- eval mode that keeps checkpointing ---


class OldStyle(torch.nn.Module):
    """A decoder as models outside of transformers write it: its own forward decides, drops layers and drops values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 32)
        layer = lambda: torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.Tanh(), torch.nn.Linear(128, 32))  # noqa: E731
        self.layers = torch.nn.ModuleList(torch.nn.ModuleList([layer(), torch.nn.Dropout(0.5)]) for _ in range(6))
        self.head = torch.nn.Linear(32, 64)
        self.gradient_checkpointing, self.layerdrop, self.dropout = True, 0.5, 0.5

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer, dropout in self.layers:
            if self.training and torch.rand(()) < self.layerdrop:
                continue
            run = lambda x, layer=layer, dropout=dropout: x + dropout(layer(x))  # noqa: E731
            again = self.gradient_checkpointing and self.training
            hidden = checkpoint(run, hidden, use_reentrant=False) if again else run(hidden)
            hidden = torch.nn.functional.dropout(hidden, self.dropout, training=self.training)
        return self.head(hidden)


def opt(**changes: Any) -> Any:
    """Its layers drop in their own forward pass, its decoder drops whole layers."""
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=128, num_hidden_layers=6, num_attention_heads=2, dropout=0.5,
            attention_dropout=0.5, max_position_embeddings=32, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=2,
            eos_token_id=2, **changes,
        )
    )  # fmt: skip


def make_checkpointed(kind: str, make_tiny_model: Callable[..., Any]) -> Any:
    """A model that checkpoints as it trains, with dropout of a half wherever it has any."""
    torch.manual_seed(0)
    if kind == "old style":
        return OldStyle()
    if kind.startswith("opt"):
        model = opt(layerdrop=0.5)
    else:
        model = make_tiny_model(attention_dropout=0.5, num_hidden_layers=6)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": "reentrant" in kind})
    return model


def gradient_and_saved(model: Any) -> tuple[list[Any], int]:
    """Gradients of a fixed batch, and bytes of the activations that were kept for them."""
    ids = torch.arange(2 * 24).reshape(2, 24) % 60 + 2
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        given = {} if isinstance(model, OldStyle) else {"use_cache": False}
        output = model(input_ids=ids, **given)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "llama reentrant", "opt", "opt reentrant", "old style"])
def test_evaluation_keeps_checkpointing_and_drops_nothing(make_tiny_model: Callable[..., Any], kind: str) -> None:
    model = make_checkpointed(kind, make_tiny_model)
    model.train()
    for module in model.modules():  # a step in which no layer happens to be dropped
        vars(module).update({"layerdrop": 0.0} if "layerdrop" in vars(module) else {})
    _, in_training = gradient_and_saved(model)
    for module in model.modules():
        vars(module).update({"layerdrop": 0.5} if "layerdrop" in vars(module) else {})
    modes = [module.training for module in model.modules()]
    model.eval()
    expected, in_eval = gradient_and_saved(model)
    model.zero_grad()
    model.train()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with preserved(model), in_evaluation(model):
        found, kept = gradient_and_saved(model)
    for gradient, other in zip(found, expected, strict=True):
        assert_same(gradient, other)
    assert [module.training for module in model.modules()] == modes
    for name, module in model.named_modules():
        saved = before[name]
        assert vars(module).keys() == saved.keys()
        assert all(vars(module)[key] is value for key, value in saved.items() if callable(value))
        assert vars(module).get("layerdrop") == saved.get("layerdrop")
    assert kept < 0.6 * in_eval
    # Less where training keeps masks of dropout outside of what it recomputes.
    assert (0.4 if kind == "old style" else 0.9) * in_training < kept < 1.1 * in_training


def test_what_was_compiled_in_place_runs_eagerly_inside(make_tiny_model: Callable[..., Any]) -> None:
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("torch before 2.6 cannot")
    model, ids = make_tiny_model(), torch.arange(8)[None]
    graphs: list[int] = []
    for layer in model.model.layers:
        layer.compile(backend=lambda graph, inputs: graphs.append(1) or graph.forward)
    for context in (preserved, undisturbed):
        with context(model):
            inside = model(input_ids=ids).logits
        assert not graphs
    torch.testing.assert_close(model(input_ids=ids).logits, inside)
    assert graphs
    torch.compiler.reset()
