"""Both probes against closed forms, real optimizer steps, and each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.errors import InfluenceError
from mates_hf.influence.preconditioner import (
    FreshOptimizerError,
    UnsupportedOptimizerError,
    ZeroLearningRateError,
    parameter_steps,
)
from mates_hf.influence.probe import RunSettings
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.influence.reference_path import shares_of_path
from mates_hf.records import InfluenceLabels
from tests.engine.test_preserve import assert_same, everything
from tests.influence.test_passes import gpt2

FLOAT32 = 3e-6  # labels are float32; relative to the largest
# Of the central difference, relative to the largest label: Llama's norm computes in float32 even in a float64 model.
EPSILON_AND_ERROR = {"gpt2": (1e-5, 3e-6), "llama": (3e-4, 1e-3)}
EACH_KIND = (DirectionalProbe(), OneStepProbe(), LossReductionProbe())
Live = tuple[Any, torch.optim.Optimizer]
Optimizers = Callable[[Any], torch.optim.Optimizer]


def random_rows(count: int, seed: int, low: int = 4, high: int = 12) -> TokenRows:
    generator = np.random.default_rng(seed)
    return TokenRows.from_lists([generator.integers(3, 64, generator.integers(low, high)) for _ in range(count)])


def chain_rows(count: int, seed: int, stride: int, length: int = 12) -> TokenRows:
    """Texts in which each token is the one before it plus `stride`, one time in five another."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = [int(generator.integers(3, 64))]
        while len(row) < length:
            next_one = 3 + (row[-1] - 3 + stride) % 61
            row.append(next_one if generator.random() < 0.8 else int(generator.integers(3, 64)))
        rows.append(row)
    return TokenRows.from_lists(rows)


def task(rows: TokenRows) -> ReferenceTask:
    return ReferenceTask(name="test", rows=rows)


def sum_of_losses(model: Any, rows: TokenRows, i: int) -> torch.Tensor:
    """Of row i, by torch's cross-entropy in the model's precision (the model's own loss rounds to float32)."""
    ids = torch.from_numpy(rows.row(i)[0].astype(np.int64))
    return nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")


def batch_gradient(model: Any, rows: TokenRows) -> list[torch.Tensor]:
    """Gradient of the token-weighted mean loss, row after row."""
    model.zero_grad()
    for i in range(len(rows)):
        (sum_of_losses(model, rows, i) / rows.num_targets.sum()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return gradients


def plain_loss(model: Any, rows: TokenRows) -> float:
    with torch.no_grad():
        return sum(sum_of_losses(model, rows, i).item() for i in range(len(rows))) / int(rows.num_targets.sum())


@pytest.fixture
def make_live(make_tiny_model: Callable[..., Any]) -> Callable[..., Live]:
    """A float64 model in eval mode after some steps, so that momentum points somewhere."""

    def build(make_optimizer: Optimizers, steps: int = 4, kind: str = "llama", **overrides: Any) -> Live:
        model = (make_tiny_model(**overrides) if kind == "llama" else gpt2()).double().eval()
        optimizer = make_optimizer(model)
        for seed in range(steps):
            for parameter, gradient in zip(
                model.parameters(), batch_gradient(model, random_rows(8, seed)), strict=True
            ):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    return build


def adamw(model: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, "weight_decay": 0.1, **settings})


def two_groups(model: Any) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3], "lr": 1e-3}, {"params": parameters[3:], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=4e-4, betas=(0.8, 0.95), weight_decay=0.1)


def sgd(model: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, **settings})


KNOWN: dict[str, Optimizers] = {
    "adamw": adamw,
    "adamw_foreach": lambda model: adamw(model, foreach=True),
    "adamw_fused": lambda model: adamw(model, fused=True),
    "adamw_amsgrad": lambda model: adamw(model, amsgrad=True),
    "adamw_maximize": lambda model: adamw(model, maximize=True),
    "adamw_groups": two_groups,
    "adam_l2": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1),
    "adam_amsgrad_l2": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1, amsgrad=True),
    "sgd": lambda model: sgd(model, weight_decay=0.1),
    "sgd_momentum": lambda model: sgd(model, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "sgd_nesterov": lambda model: sgd(model, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd_maximize": lambda model: sgd(model, momentum=0.9, weight_decay=0.1, maximize=True),
}
ANY: dict[str, Optimizers] = {
    **KNOWN,
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=1e-3),
}


def step_copy(model: Any, optimizer: Any, gradients: list[torch.Tensor], max_grad_norm: float = 0.0) -> Any:
    """A deep copy after one real step with these gradients."""
    copied, stepper = copy.deepcopy((model, optimizer))
    for parameter, gradient in zip(copied.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(copied.parameters(), max_grad_norm)
    stepper.step()
    return copied


def zeros(model: Any) -> list[torch.Tensor]:
    return [torch.zeros_like(p) for p in model.parameters()]


@pytest.mark.quick("*-0.5")
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("name", ANY)
def test_one_step_equals_a_deep_copy_and_a_real_step(
    make_live: Callable[..., Live], name: str, max_grad_norm: float
) -> None:
    model, optimizer = make_live(ANY[name])
    reference, candidates = random_rows(5, 100), random_rows(4, 200)
    null = plain_loss(step_copy(model, optimizer, zeros(model)), reference)
    expected = []
    for i in range(len(candidates)):
        gradients = batch_gradient(model, candidates.take(np.array([i])))
        expected.append(null - plain_loss(step_copy(model, optimizer, gradients, max_grad_norm), reference))
    labels = OneStepProbe(max_grad_norm=max_grad_norm).measure(model, optimizer, task(reference), candidates)
    np.testing.assert_allclose(labels.influence, expected, rtol=FLOAT32, atol=1e-9)
    assert labels.info["reference_loss"] == pytest.approx(null, rel=1e-12)
    assert labels.step_size == 1.0
    assert labels.token_derivatives is None
    np.testing.assert_array_equal(labels.influence, labels.influence_per_token)


@pytest.mark.parametrize("name", KNOWN)
def test_null_step_is_where_a_zero_gradient_takes_the_model(make_live: Callable[..., Live], name: str) -> None:
    model, optimizer = make_live(KNOWN[name])
    copied = step_copy(model, optimizer, zeros(model))
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for step in parameter_steps(optimizer, list(model.parameters())):
            step.write_null()
    for old, found, expected in zip(before, model.parameters(), copied.parameters(), strict=True):
        assert not torch.equal(old, expected)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", KNOWN)
def test_linear_coefficient_is_the_slope_of_a_real_step(make_live: Callable[..., Live], name: str) -> None:
    """A tiny gradient on top of zero moves a parameter by −c P g, with P at v_eff = β2 v: what that step sees."""
    model, optimizer = make_live(KNOWN[name])
    generator = torch.Generator().manual_seed(0)
    small = [1e-6 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    if "adam" in name:  # small beside v, which is 0 at tokens never seen
        for p, g in zip(model.parameters(), small, strict=True):
            g.mul_(optimizer.state[p]["exp_avg_sq"].sqrt())
    null, moved = (step_copy(model, optimizer, gradients) for gradients in (zeros(model), small))
    steps = {id(step.parameter): step for step in parameter_steps(optimizer, list(model.parameters()))}
    for p, a, b, g in zip(model.parameters(), null.parameters(), moved.parameters(), small, strict=True):
        step = steps[id(p)]
        assert abs(step.coefficient) > 0
        predicted = g.clone()
        step.precondition(predicted, step.coefficient, torch.zeros_like(g))
        if step.l2 and "adam" in name:
            # There the gradient's cross term with weight decay is in v too; P leaves it out (of order c·m, not of g²).
            assert torch.sign(predicted).eq(torch.sign(a - b)).float().mean() > 0.9
        else:
            torch.testing.assert_close(a - b, predicted, rtol=1e-3, atol=1e-13)


def brought_by_a_batch(average: torch.Tensor, v: torch.Tensor, beta2: float, rarely: bool) -> torch.Tensor:
    """E[g_B²] as P takes it: a row of a table that remembers less than a usual gradient adds gets the usual one."""
    if average.dim() < 2 or not rarely:
        return average
    of_rows = average.mean(1)
    usual = of_rows[of_rows > 0].mean()
    rarely = beta2 * v.mean(1) < (1 - beta2) * usual
    return torch.where(rarely[:, None], torch.maximum(average, usual), average)


def tables_of(model: Any) -> set[int]:
    """Ids of what a batch reaches some rows of: tables that ids are looked up in, and the output head."""
    named = dict(model.named_parameters())
    return {
        id(p) for name, p in named.items() if any(part in name for part in ("embed_tokens", "lm_head", "wte", "wpe"))
    }


@pytest.mark.parametrize("kind", EPSILON_AND_ERROR)
@pytest.mark.parametrize(
    "name",
    ["sgd", "sgd_momentum", "sgd_nesterov", "sgd_maximize", "adamw", "adamw_groups", "adamw_amsgrad", "adam_l2"],
)
def test_directional_equals_the_gradient_product(make_live: Callable[..., Live], name: str, kind: str) -> None:
    """influence(x) = Σ_p c_p ∇L_ref(θ_null)ᵀ P g_x, gradients by autograd, P written out here."""
    model, optimizer = make_live(KNOWN[name], kind=kind)
    epsilon, error = EPSILON_AND_ERROR[kind]
    reference, candidates = random_rows(6, 100), random_rows(7, 200)
    at_null = batch_gradient(step_copy(model, optimizer, zeros(model)), reference)
    weights: dict[nn.Parameter, Any] = {}
    tables = tables_of(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if "sgd" in name:
                momentum = group["momentum"]
                factor = (1 - group["dampening"]) * (1 + momentum * group["nesterov"]) * (-1) ** group["maximize"]
                weights[parameter] = group["lr"] * factor
                continue
            beta1, beta2 = group["betas"]
            state, t = optimizer.state[parameter], float(optimizer.state[parameter]["step"])
            v, rarely = state["exp_avg_sq"], id(parameter) in tables
            average = brought_by_a_batch(v / (1 - beta2**t), v, beta2, rarely)
            v_eff = beta2 * state["exp_avg_sq"] + (1 - beta2) * average
            if group["amsgrad"]:
                v_eff = torch.maximum(v_eff, state["max_exp_avg_sq"])
            preconditioner = 1 / ((v_eff / (1 - beta2 ** (t + 1))).sqrt() + group["eps"])
            weights[parameter] = group["lr"] * (1 - beta1) / (1 - beta1 ** (t + 1)) * preconditioner
    expected = []
    for i in range(len(candidates)):
        own = batch_gradient(model, candidates.take(np.array([i])))
        terms = zip(model.parameters(), at_null, own, strict=True)
        expected.append(sum(float((weights[p] * r * g).detach().sum()) for p, r, g in terms))
    labels = DirectionalProbe(epsilon=epsilon).measure(model, optimizer, task(reference), candidates)
    np.testing.assert_allclose(labels.influence, expected, atol=error * np.abs(expected).max())
    np.testing.assert_allclose(labels.influence, labels.influence_per_token * labels.step_size, rtol=FLOAT32)
    ends = labels.offsets
    means = [labels.token_derivatives[a:b].mean() for a, b in zip(ends[:-1], ends[1:], strict=True)]
    np.testing.assert_allclose(labels.influence_per_token, means, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        labels.loss, [plain_loss(model, candidates.take(np.array([i]))) for i in range(len(candidates))], rtol=1e-4
    )


def test_second_moment_of_batches_is_written_out(make_live: Callable[..., Live]) -> None:
    """u_state / u_batches is the ratio of the two denominators, with E[g_B²] of the same seeded batches."""
    model, optimizer = make_live(lambda model: adamw(model, betas=(0.9, 0.5)))
    reference, candidates = task(random_rows(6, 100)), random_rows(7, 200)
    probe = DirectionalProbe(second_moment="batches", batch_rows=3, seed=5)
    from_batches = probe.compute_direction(model, optimizer, reference, candidates)
    from_state = DirectionalProbe().compute_direction(model, optimizer, reference)
    generator = np.random.default_rng(5)
    draws = [candidates.take(generator.integers(7, size=3)) for _ in range(4)]
    gradients = [batch_gradient(model, draw) for draw in draws]
    for i, parameter in enumerate(model.parameters()):
        mean_square = sum(g[i] ** 2 for g in gradients) / 4
        v, t = optimizer.state[parameter]["exp_avg_sq"], 4
        batches, running = (
            (
                (0.5 * v + 0.5 * brought_by_a_batch(average, v, 0.5, id(parameter) in tables_of(model)))
                / (1 - 0.5 ** (t + 1))
            ).sqrt()
            + 1e-8
            for average in (mean_square, v / (1 - 0.5**t))
        )
        ratio = from_state.by_parameter[parameter] * running
        torch.testing.assert_close(from_batches.by_parameter[parameter] * batches, ratio, rtol=1e-9, atol=1e-13)
    with pytest.raises(ValueError, match="batch_rows"):
        DirectionalProbe(second_moment="batches").measure(model, optimizer, reference, candidates)


class Line(nn.Module):
    """Linear regression dressed as a language model: a row's tokens pick its features and its target."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
        self.register_buffer("features", torch.randn(64, 4, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.features[input_ids[:, 0]] @ self.weight - (input_ids[:, 1] - 32) / 16


def half_square(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return 0.5 * model(batch["input_ids"]).square().mean()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_linear_regression_influence_in_closed_form(momentum: float) -> None:
    """L_ref(null) − L_ref(null − lr g_x), all quadratic: the derivative is exact at any ε, the step adds lr²."""
    model = Line()
    lr = 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    generator = np.random.default_rng(0)
    reference, candidates = (TokenRows.from_lists(generator.integers(3, 64, (n, 2))) for n in (9, 12))
    half_square(model, {"input_ids": torch.tensor([[5, 60]])}).backward()
    optimizer.step()
    optimizer.zero_grad()

    def residuals(rows: TokenRows, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(rows.values.reshape(-1, 2))
        features = model.features[ids[:, 0]]
        return features, features @ weight - (ids[:, 1] - 32) / 16

    weight = model.weight.detach()
    null = weight - lr * momentum * optimizer.state[model.weight]["momentum_buffer"] if momentum else weight
    own_features, own = residuals(candidates, weight)
    reference_features, reference_residuals = residuals(reference, null)
    gradient = (reference_features * reference_residuals[:, None]).mean(0)
    own_gradients = own_features * own[:, None]
    expected = lr * own_gradients @ gradient
    exact = [
        0.5 * reference_residuals.square().mean() - 0.5 * residuals(reference, null - lr * g)[1].square().mean()
        for g in own_gradients
    ]
    labels = DirectionalProbe(loss=half_square, reference_loss=half_square).measure(
        model, optimizer, task(reference), candidates
    )
    np.testing.assert_allclose(labels.influence, expected, rtol=1e-5, atol=1e-9)
    assert labels.info["epsilon_agreement"] == pytest.approx(1.0)
    oracle = OneStepProbe(loss=half_square, reference_loss=half_square).measure(
        model, optimizer, task(reference), candidates
    )
    np.testing.assert_allclose(oracle.influence, exact, rtol=1e-5, atol=1e-9)

    # Of one step on all passages at once, a candidate loses what its own loss is lower by afterwards.
    features, residual = residuals(reference, weight)
    step = (features * residual[:, None]).mean(0)
    step = step + momentum * optimizer.state[model.weight]["momentum_buffer"] if momentum else step
    lost = 0.5 * own.square() - 0.5 * residuals(candidates, weight - lr * step)[1].square()
    reductions = LossReductionProbe(passes=1, loss=half_square, reference_loss=half_square).measure(
        model, optimizer, task(reference), candidates
    )
    np.testing.assert_allclose(reductions.influence, lost, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(reductions.token_derivatives, reductions.influence)  # a token has its row's


@pytest.fixture(scope="module")
def trained(make_tiny_model: Callable[..., Any]) -> Live:
    """A small float32 model after 400 steps of AdamW on texts of two kinds, unclipped, and its optimizer at 3e-4."""
    model = make_tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for seed in range(400):
        rows = [chain_rows(2, seed, 1), chain_rows(2, 1000 + seed, 7)]
        ids = torch.from_numpy(np.concatenate([part.values.reshape(2, -1) for part in rows]))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 3e-4
    return model, optimizer


def train_on_four_kinds(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Sixty steps on texts of four kinds, one row of each in a batch."""
    for seed in range(60):
        ids = torch.from_numpy(np.stack([chain_rows(1, seed + 1000 * s, s).values for s in (1, 7, 3, 5)]))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def join(*parts: TokenRows) -> TokenRows:
    return TokenRows.from_lists([part.row(i)[0] for part in parts for i in range(len(part))])


def test_probes_agree_on_a_trained_model(trained: Live) -> None:
    """Slope near 1 needs small batches and β2 = 0.999: Adam damps a lone step by the candidate's own square."""
    model, optimizer = trained
    reference = task(chain_rows(24, 9, 1))
    candidates = join(chain_rows(16, 11, 1), chain_rows(16, 12, 7), random_rows(16, 13), chain_rows(16, 14, 3))
    fast = DirectionalProbe().measure(model, optimizer, reference, candidates)
    oracle = OneStepProbe().measure(model, optimizer, reference, candidates)
    assert spearmanr(fast.influence, oracle.influence).statistic > 0.9
    assert 0.8 < np.polyfit(fast.influence, oracle.influence, 1)[0] < 1.25
    assert fast.info["reference_loss"] == pytest.approx(oracle.info["reference_loss"], abs=1e-4)
    assert fast.info["epsilon_agreement"] > 0.99


@pytest.mark.parametrize(
    "probe",
    [
        DirectionalProbe(),
        DirectionalProbe(path_steps=2),
        OneStepProbe(max_grad_norm=1.0),
        LossReductionProbe(passes=6),
    ],
    ids=["directional", "path", "one_step", "loss_reduction"],
)
def test_planted_candidates_rank_first(trained: Live, probe: Any) -> None:
    """Passages of the reference task itself help more than random tokens; a flipped sign would turn this round."""
    model, optimizer = trained
    planted = chain_rows(10, 9, 1)
    labels = probe.measure(model, optimizer, task(planted), join(planted, random_rows(10, 13, 12, 13)))
    assert labels.influence[:10].min() > 0
    assert labels.influence[:10].mean() > labels.influence[10:].mean() + 2 * labels.influence[10:].std()


@pytest.mark.parametrize(
    "probe",
    [
        DirectionalProbe(),
        DirectionalProbe(path_steps=2),
        OneStepProbe(max_grad_norm=1.0),
        LossReductionProbe(passes=6),
    ],
    ids=["directional", "path", "one_step", "loss_reduction"],
)
@pytest.mark.parametrize("fails_at", [None, 1, 2, 3, 6])
def test_probing_changes_no_bit(make_live: Callable[..., Live], probe: Any, fails_at: int | None) -> None:
    model, optimizer = make_live(adamw, attention_dropout=0.2)
    torch.optim.lr_scheduler.LinearLR(optimizer)
    model.train()
    model.model.layers[0].eval()
    for parameter in list(model.parameters())[1:]:
        parameter.grad = torch.randn_like(parameter)
    calls: list[int] = []

    def count(*args: Any) -> None:
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("in the middle")

    model.register_forward_pre_hook(count)
    before = everything(model, optimizer)
    reference, candidates = task(random_rows(8, 100)), random_rows(5, 200)
    if fails_at is None:
        probe.measure(model, optimizer, reference, candidates)
    else:
        with pytest.raises(RuntimeError, match="in the middle"):
            probe.measure(model, optimizer, reference, candidates)
        assert len(calls) == fails_at
    assert_same(before, everything(model, optimizer))


def columns(labels: InfluenceLabels) -> dict[str, Any]:
    names = ("candidate_id", "influence", "influence_per_token", "loss", "num_tokens", "probe", "step_size")
    info = {key: value for key, value in labels.info.items() if key != "seconds"}
    return {name: getattr(labels, name) for name in names} | {"tokens": labels.token_derivatives, "info": info}


@pytest.mark.parametrize(
    "probe",
    [
        DirectionalProbe(),
        DirectionalProbe(second_moment="batches", batch_rows=4),
        DirectionalProbe(path_steps=2),
        OneStepProbe(max_grad_norm=1.0),
        LossReductionProbe(passes=4, max_grad_norm=1.0, seed=3),
    ],
    ids=["directional", "batches", "path", "one_step", "loss_reduction"],
)
def test_probing_twice_gives_the_same_bits(trained: Live, probe: Any) -> None:
    model, optimizer = trained
    reference, candidates = task(random_rows(8, 100)), random_rows(9, 200)
    first = probe.measure(model, optimizer, reference, candidates)
    torch.manual_seed(123)
    assert_same(columns(first), columns(probe.measure(model, optimizer, reference, candidates)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "probe",
    [DirectionalProbe(), DirectionalProbe(path_steps=2), OneStepProbe(), LossReductionProbe(passes=8)],
    ids=["directional", "path", "one_step", "loss_reduction"],
)
def test_gradient_checkpointing_gives_the_same_bits(trained: Live, probe: Any, reentrant: bool) -> None:
    model, optimizer = copy.deepcopy(trained)
    reference, candidates = task(random_rows(4, 100)), random_rows(5, 200)
    plain = probe.measure(model, optimizer, reference, candidates)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_same(columns(plain), columns(probe.measure(model, optimizer, reference, candidates)))


def test_always_checkpointed_model_gives_the_same_gradient(make_live: Callable[..., Live]) -> None:
    """A model that recomputes in eval mode too must recompute at the weights it was run at."""
    model, optimizer = make_live(adamw)
    reference, candidates = task(random_rows(4, 100)), random_rows(5, 200)
    plain = DirectionalProbe().measure(model, optimizer, reference, candidates)
    for layer in model.model.layers:
        inner = layer.forward
        layer.forward = lambda x, inner=inner, **kw: torch.utils.checkpoint.checkpoint(
            inner, x, use_reentrant=False, **kw
        )
    checkpointed = DirectionalProbe().measure(model, optimizer, reference, candidates)
    np.testing.assert_allclose(plain.influence, checkpointed.influence, rtol=FLOAT32)


def test_accelerate_wrapped_model_and_optimizer(trained: Live) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer's, of a test before this one
    model, optimizer = copy.deepcopy(trained)
    reference = task(chain_rows(24, 9, 1))
    candidates = join(chain_rows(12, 11, 1), chain_rows(12, 12, 7), random_rows(12, 13))
    plain = DirectionalProbe().measure(model, optimizer, reference, candidates)
    wrapped, wrapped_optimizer = Accelerator(mixed_precision="bf16", cpu=True).prepare(model, optimizer)
    assert not isinstance(wrapped_optimizer, torch.optim.AdamW)
    low = DirectionalProbe().measure(wrapped, wrapped_optimizer, reference, candidates)
    assert low.info["epsilon"] >= 3e-3
    assert np.corrcoef(low.influence, plain.influence)[0, 1] > 0.98
    assert torch.equal(next(model.parameters()), next(trained[0].parameters()))


def test_tied_parameters_count_once(make_live: Callable[..., Live]) -> None:
    model, optimizer = make_live(sgd, kind="gpt2")
    epsilon, error = EPSILON_AND_ERROR["gpt2"]
    assert model.lm_head.weight is model.transformer.wte.weight
    reference, candidates = random_rows(6, 100), random_rows(5, 200)
    at_null = batch_gradient(model, reference)
    expected = []
    for i in range(len(candidates)):
        own = batch_gradient(model, candidates.take(np.array([i])))
        expected.append(0.05 * sum(float((r * g).sum()) for r, g in zip(at_null, own, strict=True)))
    labels = DirectionalProbe(epsilon=epsilon).measure(model, optimizer, task(reference), candidates)
    np.testing.assert_allclose(labels.influence, expected, atol=error * np.abs(expected).max())


def test_blocks_leave_embeddings_and_head_alone(make_live: Callable[..., Live]) -> None:
    model, optimizer = make_live(adamw)
    reference = task(random_rows(4, 100))
    some = DirectionalProbe(parameters="blocks").compute_direction(model, optimizer, reference)
    every = DirectionalProbe().compute_direction(model, optimizer, reference)
    left_out = {model.model.embed_tokens.weight, model.lm_head.weight}
    assert set(every.by_parameter) == set(model.parameters())
    assert set(some.by_parameter) == set(model.parameters()) - left_out
    for parameter, direction in some.by_parameter.items():
        assert torch.equal(direction, every.by_parameter[parameter])


def test_frozen_and_unreached_parameters_stay_out(make_live: Callable[..., Live]) -> None:
    model, optimizer = make_live(adamw)
    frozen = model.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.extra = extra
    optimizer.add_param_group({"params": [extra]})
    before = everything(model, optimizer)
    for probe in (DirectionalProbe(), OneStepProbe(max_grad_norm=1.0), LossReductionProbe(passes=8)):
        labels = probe.measure(model, optimizer, task(random_rows(4, 100)), random_rows(5, 200))
        assert np.isfinite(labels.influence).all()
    assert_same(before, everything(model, optimizer))
    direction = DirectionalProbe().compute_direction(model, optimizer, task(random_rows(4, 100)))
    assert frozen not in direction.by_parameter
    assert extra not in direction.by_parameter


@pytest.mark.parametrize("probe", EACH_KIND, ids=lambda probe: type(probe).__name__)
def test_given_learning_rates_replace_a_zero(make_live: Callable[..., Live], probe: Any) -> None:
    model, optimizer = make_live(adamw)
    reference, candidates = task(random_rows(4, 100)), random_rows(5, 200)
    expected = probe.measure(model, optimizer, reference, candidates)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ZeroLearningRateError, match="learning_rates"):
        probe.measure(model, optimizer, reference, candidates)
    settings = RunSettings(learning_rates=(1e-3,))
    found = probe.for_run(settings).measure(model, optimizer, reference, candidates)
    np.testing.assert_array_equal(found.influence, expected.influence)
    assert optimizer.param_groups[0]["lr"] == 0.0
    with pytest.raises(ValueError, match="parameter group"):
        probe.for_run(RunSettings(learning_rates=(1.0, 1.0))).measure(model, optimizer, reference, candidates)


def test_for_run_fills_only_what_is_open() -> None:
    settings = RunSettings(
        learning_rates=(1.0,), max_grad_norm=2.0, batch_rows=3, tokens_per_batch=4, seed=5, progress=True
    )
    assert DirectionalProbe(batch_rows=7).for_run(settings) == DirectionalProbe(
        batch_rows=7, learning_rates=(1.0,), max_grad_norm=2.0, tokens_per_batch=4, seed=5, progress=True
    )
    assert OneStepProbe(max_grad_norm=0.0).for_run(settings) == OneStepProbe(
        max_grad_norm=0.0, learning_rates=(1.0,), tokens_per_batch=4, progress=True
    )
    assert LossReductionProbe(seed=1).for_run(settings) == LossReductionProbe(
        max_grad_norm=2.0, learning_rates=(1.0,), tokens_per_batch=4, seed=1, progress=True
    )


@pytest.mark.parametrize("probe", EACH_KIND, ids=lambda probe: type(probe).__name__)
@pytest.mark.parametrize("make_optimizer", [adamw, lambda model: sgd(model, momentum=0.9)], ids=["adamw", "sgd"])
def test_fresh_optimizer_is_refused(make_live: Callable[..., Live], probe: Any, make_optimizer: Optimizers) -> None:
    model, optimizer = make_live(make_optimizer, steps=0)
    before = everything(model, optimizer)
    with pytest.raises(FreshOptimizerError, match="train a step first"):
        probe.measure(model, optimizer, task(random_rows(4, 100)), random_rows(5, 200))
    assert_same(before, everything(model, optimizer))
    assert not optimizer.state


class OwnAdamW(torch.optim.AdamW):
    """A subclass may step differently."""


def test_unknown_optimizers_are_refused(make_live: Callable[..., Live]) -> None:
    reference, candidates = task(random_rows(4, 100)), random_rows(5, 200)
    for kind in (torch.optim.Rprop, OwnAdamW):
        model, optimizer = make_live(lambda model, kind=kind: kind(model.parameters(), lr=1e-3))
        with pytest.raises(UnsupportedOptimizerError, match="OneStepProbe"):
            DirectionalProbe().measure(model, optimizer, reference, candidates)
    with pytest.raises(UnsupportedOptimizerError, match="several times"):
        OneStepProbe().measure(model, torch.optim.LBFGS(model.parameters()), reference, candidates)
    with pytest.raises(UnsupportedOptimizerError, match="several times"):
        LossReductionProbe().measure(model, torch.optim.LBFGS(model.parameters()), reference, candidates)
    other, _ = make_live(adamw)
    with pytest.raises(UnsupportedOptimizerError, match="parameters of `model`"):
        DirectionalProbe().measure(other, adamw(model), reference, candidates)


@pytest.mark.parametrize("probe", EACH_KIND, ids=lambda probe: type(probe).__name__)
def test_labels_that_cannot_rank_are_an_error_by_name(make_live: Callable[..., Live], probe: Any) -> None:
    model, optimizer = make_live(adamw)
    reference, one = task(random_rows(4, 100)), random_rows(1, 200)
    with pytest.raises(InfluenceError, match="equal"):
        probe.measure(model, optimizer, reference, one.take(np.zeros(4, int)))
    with pytest.raises(InfluenceError, match="trained tokens"):
        probe.measure(model, optimizer, reference, TokenRows.from_lists([[3], []]))
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    with pytest.raises(InfluenceError, match="finite"):
        probe.measure(model, optimizer, reference, random_rows(5, 200))


@pytest.mark.parametrize("probe", EACH_KIND, ids=lambda probe: type(probe).__name__)
def test_candidates_without_a_trained_token_are_skipped_and_named(make_live: Callable[..., Live], probe: Any) -> None:
    model, optimizer = make_live(adamw)
    full = [[5, 6, 7, 8], [9], [10, 11, 12], [13, 14], [20, 21, 22]]
    masked = [[5, 6, -100, 8], [9], [10, -100, -100], [13, 14], [20, 21, 22]]
    labels = probe.measure(model, optimizer, task(random_rows(4, 100)), TokenRows.from_lists(full, masked))
    np.testing.assert_array_equal(labels.candidate_id, [0, 3, 4])
    np.testing.assert_array_equal(labels.num_tokens, [2, 1, 2])
    assert labels.info["skipped"] == [1, 2]
    assert labels.info["num_skipped"] == 2


def test_dataset_candidates(make_live: Callable[..., Live]) -> None:
    import datasets

    model, optimizer = make_live(adamw)
    reference, rows = task(random_rows(4, 100)), random_rows(5, 200)
    dataset = datasets.Dataset.from_dict({"input_ids": [rows.row(i)[0].tolist() for i in range(5)]})
    expected = DirectionalProbe().measure(model, optimizer, reference, rows)
    found = DirectionalProbe().measure(model, optimizer, reference, dataset)
    np.testing.assert_array_equal(found.influence, expected.influence)


@pytest.mark.parametrize(
    "settings",
    [{"epsilon": 0.0}, {"second_moment": "none"}, {"parameters": "head"}, {"tokens_per_batch": 0}, {"batch_rows": 0}]
    + [{"path_steps": 0}, {"path_rate": 0.0}, {"path_rate": 11.0}],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DirectionalProbe(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("path_steps", [1, 4])
def test_memory_stays_within_its_bound(make_tiny_model: Callable[..., Any], path_steps: int) -> None:
    """Tensors alive beside model and optimizer while rows run: the copy of the parameters, and u.

    A path adds up its gradients in the one buffer that they come in.
    """
    import gc

    model = make_tiny_model(hidden_size=128, intermediate_size=256)
    optimizer = adamw(model)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def alive() -> int:
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]  # no fake ones
        tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    peaks: list[int] = []
    before = alive()
    model.register_forward_hook(lambda *args: peaks.append(alive() - before))
    probe = DirectionalProbe(epsilon=1e-3, path_steps=path_steps, tokens_per_batch=6)
    probe.measure(model, optimizer, task(random_rows(16, 1, 4, 7)), random_rows(4, 2))
    assert size < max(peaks) < 2.2 * size


# --- a path instead of a point ---


def test_a_path_reads_where_its_own_steps_lead(make_live: Callable[..., Live]) -> None:
    """Written out: the gradient of the second share is taken where the first one's step leads, and u is their mean."""
    for make_optimizer in (lambda model: adamw(model, weight_decay=0.0), lambda model: sgd(model, momentum=0.5), sgd):
        model, optimizer = make_live(make_optimizer)
        reference = task(random_rows(8, 7))
        parts = [reference.rows.take(share) for share in shares_of_path(reference.rows, 2, seed=3)]
        assert [len(part) for part in parts] == [4, 4]
        probe = DirectionalProbe(path_steps=2, path_rate=0.5, seed=3)
        found = probe.compute_direction(model, optimizer, reference)

        one = DirectionalProbe()
        first = one.compute_direction(model, optimizer, task(parts[0]))
        moved, stepper = copy.deepcopy((model, optimizer))
        names = dict(model.named_parameters())
        stride = first.step_size * first.norm  # SGD without momentum: a step on the share
        if make_optimizer is not sgd:
            null = step_copy(model, optimizer, zeros(model))
            differences = [p - q for p, q in zip(null.parameters(), model.parameters(), strict=True)]
            stride = math.sqrt(sum(float(d.detach().square().sum()) for d in differences))
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.sub_(first.by_parameter[names[name]], alpha=0.5 * stride / first.norm)
        second = one.compute_direction(moved, stepper, task(parts[1]))
        tokens = [int(part.num_targets.sum()) for part in parts]
        for name, parameter in moved.named_parameters():
            both = tokens[0] * first.by_parameter[names[name]] + tokens[1] * second.by_parameter[parameter]
            expected = both / sum(tokens)
            assert (found.by_parameter[names[name]] - expected).abs().max() < 1e-6 * expected.abs().max(), name
        assert found.path_losses == pytest.approx((first.reference_loss, second.reference_loss))
        assert found.step_size == first.step_size
        assert found.path_start_losses[0] == pytest.approx(first.reference_loss)
        # Besides: all passages at the start, and the last quarter of them behind one stride.
        compared = found.flops - first.flops - second.flops
        assert compared == pytest.approx((1 + 0.25) * (first.flops + second.flops) / 3, rel=0.1)
        assert found.path_check[1] < found.path_check[0]


def test_a_path_goes_down(trained: Live) -> None:
    model, optimizer = trained
    reference = task(chain_rows(64, 90, stride=1))
    found = DirectionalProbe(path_steps=16, path_rate=1.0).compute_direction(model, optimizer, reference)
    losses = np.array(found.path_losses)
    assert len(losses) == 16
    assert losses[-4:].mean() < losses[:4].mean()


def test_a_path_has_as_many_points_as_passages_allow(make_live: Callable[..., Live]) -> None:
    rows = random_rows(13, 5)
    assert len(shares_of_path(rows, 1, 0)) == 1
    assert len(shares_of_path(rows.take(np.arange(7)), 32, 0)) == 1
    parts = [rows.take(share) for share in shares_of_path(rows, 32, 0)]
    assert sorted(len(part) for part in parts) == [4, 4, 5]
    read = sorted(tuple(part.row(i)[0]) for part in parts for i in range(len(part)))
    assert read == sorted(tuple(rows.row(i)[0]) for i in range(len(rows)))
    model, optimizer = make_live(adamw)
    few = DirectionalProbe(path_steps=32).measure(model, optimizer, task(random_rows(5, 6)), random_rows(6, 8))
    plain = DirectionalProbe().measure(model, optimizer, task(random_rows(5, 6)), random_rows(6, 8))
    assert np.array_equal(few.influence, plain.influence)
