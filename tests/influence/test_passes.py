"""Token losses and gradients of micro-batches against the model's own loss, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mates_hf.data.rows import TokenRows
from mates_hf.engine import model_traits
from mates_hf.influence import micro_batches as module
from mates_hf.influence.micro_batches import ProbeMemoryError
from mates_hf.influence.passes import mean_loss, mean_loss_gradient, token_losses

ROUNDING = 2e-5  # float32 sums in another order, of losses of about 4


def make_rows(lengths: list[int], seed: int = 0, vocab: int = 64, masked: bool = False) -> TokenRows:
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, vocab, length) for length in lengths]
    labels = [np.where(generator.random(len(row)) < 0.4, -100, row) for row in ids] if masked else None
    return TokenRows.from_lists(ids, labels)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def alone(model: Any, rows: TokenRows) -> np.ndarray:
    """Every token's loss, one row at a time, by torch's own cross-entropy."""
    parts = []
    for i in np.flatnonzero(rows.num_targets):
        ids, labels = (torch.from_numpy(part.astype(np.int64)) for part in rows.row(i))
        with torch.no_grad():
            nll = nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="none")
        parts.append(nll[labels[1:] != -100].numpy())
    return np.concatenate(parts)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens_per_batch", [1, 24, 8192])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mixed_lengths_equal_rows_alone(
    make_tiny_model: Callable[..., Any], kind: str, tokens_per_batch: int, masked: bool
) -> None:
    model = make_tiny_model().eval() if kind == "llama" else gpt2()
    rows = make_rows([5, 1, 12, 2, 7, 0, 12, 3], masked=masked)
    found = token_losses(model, rows, tokens_per_batch=tokens_per_batch)
    assert found.dtype == np.float32
    assert len(found) == rows.num_targets.sum()
    np.testing.assert_allclose(found, alone(model, rows), atol=ROUNDING)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropping_the_mask_changes_nothing(
    make_tiny_model: Callable[..., Any], kind: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model().eval() if kind == "llama" else gpt2()
    model.set_attn_implementation(attention)
    rows = make_rows([9, 4, 6, 2])
    without = token_losses(model, rows)
    monkeypatch.setattr(model_traits, "is_causal", lambda model: False)
    np.testing.assert_allclose(without, token_losses(model, rows), atol=ROUNDING)


def test_a_model_that_looks_ahead_gets_the_mask() -> None:
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertLMHeadModel(config).eval()
    rows = make_rows([9, 4])
    np.testing.assert_allclose(token_losses(model, rows), alone(model, rows), atol=ROUNDING)


@pytest.mark.parametrize("chunk", [64, 200, 2**18])
def test_gradient_is_that_of_the_token_weighted_mean(
    make_tiny_model: Callable[..., Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mates_hf.influence import cross_entropy

    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS_CPU", chunk)
    model = make_tiny_model().double().eval()
    rows = make_rows([10, 2, 3, 8], masked=True)
    loss = mean_loss_gradient(model, rows, tokens_per_batch=11)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0.0
    for i in range(len(rows)):
        ids, labels = (torch.from_numpy(part.astype(np.int64)) for part in rows.row(i))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
    expected = total / rows.num_targets.sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert mean_loss(model, rows) == pytest.approx(loss, rel=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_gradient_comes_in_the_dtype_of_the_logits() -> None:
    from mates_hf.influence.cross_entropy import cross_entropy_at

    logits = torch.randn(6, 10, dtype=torch.bfloat16, requires_grad=True)
    index, labels = torch.tensor([4, 0, 2]), torch.tensor([1, 9, 3])
    cross_entropy_at(logits, index, labels).sum().backward()
    exact = logits.detach().double().requires_grad_()
    nn.functional.cross_entropy(exact[index], labels, reduction="sum").backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)


def test_own_loss_gives_each_token_the_mean_of_its_row(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model().eval()
    rows = make_rows([5, 3, 8], masked=True)
    own = token_losses(model, rows, loss=lambda model, batch: model(**batch).loss)
    plain = token_losses(model, rows)
    ends = np.cumsum(rows.num_targets)
    for start, end in zip(ends - rows.num_targets, ends, strict=True):
        np.testing.assert_allclose(own[start:end], plain[start:end].mean(), atol=ROUNDING)
    expected = mean_loss_gradient(model, rows)
    gradients = [p.grad.clone() for p in model.parameters()]
    found = mean_loss_gradient(model, rows, loss=lambda model, batch: model(**batch).loss)
    assert found == pytest.approx(expected, abs=ROUNDING)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=ROUNDING)


class Crowded(nn.Module):
    """Runs out of memory above a number of tokens; in backward, as memory mostly does, where `late`."""

    def __init__(self, model: Any, most: int, late: bool) -> None:
        super().__init__()
        self.model, self.most, self.late = model, most, late
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(input_ids.shape))
        logits: torch.Tensor = self.model(input_ids=input_ids).logits
        if input_ids.numel() > self.most:
            if not (self.late and logits.requires_grad):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.model.model.embed_tokens.weight.register_hook(self.fail_once)
        return logits

    def fail_once(self, gradient: torch.Tensor) -> None:
        if self.late:
            self.late = False
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("late", [False, True])
def test_out_of_memory_halves_the_batch(make_tiny_model: Callable[..., Any], late: bool) -> None:
    model = make_tiny_model().double().eval()
    rows = make_rows([6, 6, 6, 6, 6, 4, 4, 2])
    expected = token_losses(model, rows)
    loss = mean_loss_gradient(model, rows)
    gradients = [p.grad.clone() for p in model.parameters()]
    crowded = Crowded(model, 13, late)
    np.testing.assert_allclose(token_losses(crowded, rows), expected, rtol=1e-10)
    # Batches that ran out before a half-written gradient must leave nothing of it.
    assert mean_loss_gradient(crowded, rows) == pytest.approx(loss, rel=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-12)
    assert math.prod(crowded.seen[0]) > 13


def test_one_row_that_does_not_fit_is_an_error_by_name(make_tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ProbeMemoryError, match="6 tokens"):
        token_losses(Crowded(make_tiny_model(), 5, False), make_rows([6, 2]))


@pytest.mark.parametrize("plain", [False, True])
def test_micro_batches_shrink_with_the_vocabulary_where_the_head_is_not_plain(
    make_tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.setattr(module, "_MAX_LOGITS_BYTES_CPU", 4 * 64 * 10)  # ten tokens of 64 float32 logits
    model = make_tiny_model().eval()
    if not plain:
        model.lm_head.register_forward_hook(lambda *_: None)
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    token_losses(model, make_rows([5, 5, 5, 5, 2]))
    assert max(shape.numel() for shape in shapes) == (25 if plain else 10)


def test_unknown_token_ids_are_refused(make_tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="below the model's 64"):
        token_losses(make_tiny_model(), TokenRows.from_lists([[3, 64]]))


def test_reference_without_targets_is_refused(make_tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="at least one trained token"):
        mean_loss_gradient(make_tiny_model(), TokenRows.from_lists([[3]]))
