"""Every optimizer people train with: probed by a derivative, by real steps only, or refused by name; no fourth kind.

`CLASSES` and `OPTIM_VALUES` are the table of docs/optimizers.md; a class is in it as often as it has variants here.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.lab.memory import peak_bytes
from benchmarks.quality.muon_response import frozen_change
from mates_hf.data.rows import TokenRows
from mates_hf.engine.combined_optimizer import CombinedOptimizer
from mates_hf.engine.preserve import preserved
from mates_hf.influence.optimizer.muon_step import orthogonalise, orthogonalise_change
from mates_hf.influence.preconditioner import (
    FreshOptimizerError,
    UnsupportedOptimizerError,
    parameter_steps,
    require_known,
    require_steps,
)
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.influence.real_step import RealStep
from tests.engine.test_preserve import assert_same, everything
from tests.influence.test_probes import chain_rows, join, random_rows, task, train_on_four_kinds

DIRECTIONAL, ONE_STEP, REFUSED = "directional", "one step", "refused"
CURVATURE = 1e-5  # of central differences of real steps, relative; the perturbation is 1e-5 of a usual gradient
ROOT = Path(__file__).resolve().parents[2]

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Known(NamedTuple):
    """An optimizer class: how it is probed, why, and the variants that the tests make."""

    outcome: str
    note: str
    variants: dict[str, Make]


def of(name: str, **settings: Any) -> Make:
    return lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 1e-2, **settings})


def hf_adafactor(**settings: Any) -> Make:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        from transformers import Adafactor

        return Adafactor(parameters, **{"lr": 1e-2, "scale_parameter": False, "relative_step": False, **settings})

    return make


CLASSES: dict[str, Known] = {
    "torch.optim.AdamW": Known(
        DIRECTIONAL,
        "foreach, fused, capturable, amsgrad and maximize too",
        {
            "plain": of("AdamW"),
            "foreach": of("AdamW", foreach=True),
            "fused": of("AdamW", fused=True),
            "amsgrad": of("AdamW", amsgrad=True),
            "maximize": of("AdamW", maximize=True),
            "decay": of("AdamW", weight_decay=0.3),
            "tensor_lr": of("AdamW", lr=torch.tensor(1e-2, dtype=torch.float64)),
        },
    ),
    "torch.optim.Adam": Known(
        DIRECTIONAL,
        "with L2 weight decay, its cross term with the candidate's gradient in the second moment is left out",
        {
            "plain": of("Adam", betas=(0.8, 0.9)),
            "decoupled": of("Adam", weight_decay=0.3, decoupled_weight_decay=True),
        },
    ),
    "torch.optim.NAdam": Known(
        DIRECTIONAL,
        "as Adam",
        {"plain": of("NAdam"), "decoupled": of("NAdam", weight_decay=0.3, decoupled_weight_decay=True)},
    ),
    "torch.optim.RAdam": Known(
        DIRECTIONAL,
        "as Adam; plain momentum in the first steps",
        {
            "early": of("RAdam"),
            "rectified": of("RAdam", betas=(0.9, 0.8)),
            "maximize": of("RAdam", betas=(0.9, 0.8), maximize=True, weight_decay=0.3, decoupled_weight_decay=True),
        },
    ),
    "torch.optim.Adamax": Known(
        DIRECTIONAL, "as if a usual batch does not raise the running maximum", {"plain": of("Adamax")}
    ),
    "torch.optim.RMSprop": Known(
        DIRECTIONAL,
        "plain, centred, with momentum",
        {
            "plain": of("RMSprop"),
            "momentum": of("RMSprop", momentum=0.5, maximize=True),
            "centred": of("RMSprop", centered=True, momentum=0.9),
        },
    ),
    "torch.optim.Adagrad": Known(
        DIRECTIONAL,
        "",
        {"plain": of("Adagrad"), "decayed": of("Adagrad", lr_decay=0.1, initial_accumulator_value=0.5)},
    ),
    "torch.optim.Adadelta": Known(DIRECTIONAL, "", {"plain": of("Adadelta", lr=1.0)}),
    "torch.optim.SGD": Known(
        DIRECTIONAL,
        "exact: momentum, dampening, Nesterov, weight decay",
        {
            "plain": of("SGD", weight_decay=0.1),
            "momentum": of("SGD", momentum=0.9, dampening=0.1, weight_decay=0.1),
            "nesterov": of("SGD", momentum=0.9, nesterov=True, weight_decay=0.1),
            "maximize": of("SGD", momentum=0.9, weight_decay=0.1, maximize=True),
        },
    ),
    "torch.optim.Muon": Known(
        DIRECTIONAL,
        "derivative of the Newton-Schulz iteration at the momentum; whole matrices only, refused where sharded",
        {
            "plain": of("Muon"),
            "no_nesterov": of("Muon", nesterov=False, weight_decay=0.0),
            "rms_of_adamw": of("Muon", adjust_lr_fn="match_rms_adamw", momentum=0.8),
            "three_steps": of("Muon", ns_steps=3, ns_coefficients=(3.0, -3.2, 1.2)),
        },
    ),
    "torch.optim.Adafactor": Known(
        DIRECTIONAL,
        "clipping of the update left out; whole matrices only, refused where sharded",
        {"plain": of("Adafactor"), "decay": of("Adafactor", weight_decay=0.3, maximize=True)},
    ),
    "transformers.Adafactor": Known(
        DIRECTIONAL,
        "as torch's; with `relative_step=True` it makes up its own learning rate and is refused",
        {
            "plain": hf_adafactor(),
            "momentum": hf_adafactor(beta1=0.8, weight_decay=0.3),
            "scaled": hf_adafactor(scale_parameter=True, clip_threshold=2.0),
        },
    ),
    "torch.optim.ASGD": Known(ONE_STEP, "its step size is kept in its state", {"plain": of("ASGD")}),
    "torch.optim.Rprop": Known(ONE_STEP, "steps by signs: no derivative", {"plain": of("Rprop")}),
    "torch.optim.LBFGS": Known(REFUSED, "evaluates the loss several times a step", {"plain": of("LBFGS")}),
    "torch.optim.SparseAdam": Known(REFUSED, "takes sparse gradients only", {"plain": of("SparseAdam")}),
    "mates_hf.CombinedOptimizer": Known(DIRECTIONAL, "each part as it is alone", {}),
    "any other subclass of torch.optim.Optimizer": Known(
        ONE_STEP, "by exact class: a subclass may step otherwise", {}
    ),
    "DeepSpeed's ZeRO": Known(
        DIRECTIONAL,
        "around AdamW or another elementwise optimizer of torch, `DeepSpeedCPUAdam` or `FusedAdam`; others, 1-bit "
        "ones too, are refused",
        {},
    ),
}


class Value(NamedTuple):
    """A value of `TrainingArguments.optim`: how the run's optimizer is probed, and the package it comes from."""

    outcome: str
    package: str = ""
    note: str = ""


_BNB, _AO, _GALORE, _FREE, _APOLLO = "bitsandbytes", "torchao", "galore_torch", "schedulefree", "apollo_torch"
_LAYERWISE = "steps during the backward pass"
OPTIM_VALUES: dict[str, Value] = {
    "adamw_torch": Value(DIRECTIONAL),
    "adamw_torch_fused": Value(DIRECTIONAL),
    "adafactor": Value(DIRECTIONAL),
    "sgd": Value(DIRECTIONAL, note="`optim_args` such as `momentum=0.9` count"),
    "adagrad": Value(DIRECTIONAL),
    "rmsprop": Value(DIRECTIONAL),
    "adamw_torch_xla": Value(ONE_STEP, "torch_xla"),
    "adamw_torch_npu_fused": Value(ONE_STEP, "torch_npu"),
    "adamw_apex_fused": Value(ONE_STEP, "apex", "transformers 4 only"),
    "adamw_anyprecision": Value(ONE_STEP, "torchdistx"),
    **{name: Value(ONE_STEP, _AO) for name in ("adamw_torch_4bit", "adamw_torch_8bit")},
    **{
        name: Value(ONE_STEP, _BNB)
        for name in (
            "adamw_bnb_8bit",
            "adamw_8bit",
            "paged_adamw_32bit",
            "paged_adamw_8bit",
            "lion_8bit",
            "lion_32bit",
            "paged_lion_32bit",
            "paged_lion_8bit",
            "rmsprop_bnb",
            "rmsprop_bnb_8bit",
            "rmsprop_bnb_32bit",
            "ademamix",
            "ademamix_8bit",
            "paged_ademamix_32bit",
            "paged_ademamix_8bit",
        )
    },  # fmt: skip
    "galore_adamw": Value(ONE_STEP, _GALORE),
    "galore_adamw_8bit": Value(ONE_STEP, _GALORE, "needs a GPU"),
    "galore_adafactor": Value(ONE_STEP, _GALORE),
    "galore_adamw_layerwise": Value(REFUSED, _GALORE, _LAYERWISE),
    "galore_adamw_8bit_layerwise": Value(REFUSED, _GALORE, _LAYERWISE),
    "galore_adafactor_layerwise": Value(REFUSED, _GALORE, _LAYERWISE),
    "lomo": Value(REFUSED, "lomo_optim", _LAYERWISE),
    "adalomo": Value(REFUSED, "lomo_optim", _LAYERWISE),
    "grokadamw": Value(ONE_STEP, "grokadamw"),
    **{name: Value(ONE_STEP, _FREE) for name in ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")},
    "apollo_adamw": Value(ONE_STEP, _APOLLO),
    "apollo_adamw_layerwise": Value(REFUSED, _APOLLO, _LAYERWISE),
    "stable_adamw": Value(ONE_STEP, "optimi"),
}
VARIANTS = [(name, variant) for name, known in CLASSES.items() for variant in known.variants]
DIRECTIONAL_VARIANTS = [(name, variant) for name, variant in VARIANTS if CLASSES[name].outcome == DIRECTIONAL]


def table() -> str:
    """The two tables of docs/optimizers.md."""
    lines = ["| `optim` | probe | package | |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{name}` | {v.outcome} | {v.package or 'torch, transformers'} | {v.note} |"
        for name, v in OPTIM_VALUES.items()
    ]
    lines += ["", "| optimizer | probe | |", "| --- | --- | --- |"]
    lines += [f"| {name} | {known.outcome} | {known.note} |" for name, known in CLASSES.items()]
    return "\n".join(lines) + "\n"


def test_the_documentation_is_this_table() -> None:
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert table() in text, f"docs/optimizers.md must hold these lines:\n\n{table()}"


def test_every_optimizer_is_in_the_table() -> None:
    from transformers.training_args import OptimizerNames

    assert {value.value for value in OptimizerNames} <= set(OPTIM_VALUES)
    of_torch = {
        f"torch.optim.{name}"
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert of_torch <= set(CLASSES)


SHAPES = {"whole": [(5, 3), (3, 5), (4,), (2, 3, 4), ()], "matrices": [(5, 3), (3, 5), (4, 4)]}


def make_parameters(name: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES["matrices" if name == "torch.optim.Muon" else "whole"]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def train(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            # With a mean, so that momentum points somewhere and a centred second moment is not all there is.
            parameter.grad = 0.3 + torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def after_a_step(
    parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor]
) -> list[Tensor]:
    copies, stepper = copy.deepcopy((parameters, optimizer))
    for parameter, gradient in zip(copies, gradients, strict=True):
        parameter.grad = gradient.clone()
    stepper.step()
    return [parameter.detach() for parameter in copies]


@pytest.fixture
def muon_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon rounds to 16 bits inside its step, which would drown any difference quotient."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())


@pytest.mark.parametrize("steps", [1, 3, 30])
@pytest.mark.parametrize(("name", "variant"), DIRECTIONAL_VARIANTS)
def test_derivative_of_a_real_step(name: str, variant: str, steps: int, muon_in_double: None) -> None:
    """θ(g) is null − c P g for a small g, with P at what the second moment is then (that of no usual batch)."""
    parameters = make_parameters(name)
    optimizer = CLASSES[name].variants[variant](parameters)
    train(parameters, optimizer, steps)
    generator = torch.Generator().manual_seed(2)
    gradients = [1e-5 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    plus, null, minus = (
        after_a_step(parameters, optimizer, [sign * g for g in gradients]) for sign in (1.0, 0.0, -1.0)
    )
    found = parameter_steps(optimizer, parameters)
    assert [step.parameter for step in found] == parameters
    with torch.no_grad():
        for step, gradient, above, below, expected in zip(found, gradients, plus, minus, null, strict=True):
            if name == "torch.optim.Muon":  # P couples elements, and its transpose is what preconditions
                predicted = torch.zeros_like(gradient)
                for i in range(gradient.numel()):
                    column = torch.zeros_like(gradient)
                    column.view(-1)[i] = 1
                    step.precondition(column, step.coefficient, None)
                    predicted.view(-1)[i] = (column * gradient).sum()
            else:
                predicted = gradient.clone()
                step.precondition(predicted, step.coefficient, torch.zeros_like(gradient))
            moved = (below - above) / 2
            torch.testing.assert_close(predicted, moved, rtol=CURVATURE, atol=CURVATURE * float(moved.abs().max()))
            step.write_null()
            torch.testing.assert_close(step.parameter.detach(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "variant"), DIRECTIONAL_VARIANTS)
def test_null_step_with_l2_weight_decay(name: str, variant: str, muon_in_double: None) -> None:
    parameters = make_parameters(name)
    optimizer = CLASSES[name].variants[variant](parameters)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    train(parameters, optimizer, 7)
    before = [parameter.detach().clone() for parameter in parameters]
    expected = after_a_step(parameters, optimizer, [torch.zeros_like(p) for p in parameters])
    with torch.no_grad():
        for step in parameter_steps(optimizer, parameters):
            step.write_null()
    for old, parameter, new in zip(before, parameters, expected, strict=True):
        assert not torch.equal(old, new)
        torch.testing.assert_close(parameter.detach(), new, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "variant"), DIRECTIONAL_VARIANTS)
def test_given_learning_rates_count_and_state_is_only_read(name: str, variant: str) -> None:
    """The step of twice the learning rate, from an optimizer whose own is 0, as at the end of a schedule."""
    parameters = make_parameters(name)
    optimizer = CLASSES[name].variants[variant](parameters)
    train(parameters, optimizer, 3)
    rate = float(optimizer.param_groups[0]["lr"])
    (plain, *_), (doubled, *_) = (parameter_steps(optimizer, parameters, [f * rate]) for f in (1.0, 2.0))
    if name != "torch.optim.Adafactor":  # takes the smaller of lr and 1/sqrt(t); both are above it here
        assert doubled.coefficient == pytest.approx(2 * plain.coefficient)
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(optimizer.state_dict())
    for step in parameter_steps(optimizer, parameters, [rate]):
        step.precondition(torch.ones_like(step.parameter), 1.0, None)
        with torch.no_grad():
            step.write_null()
    assert_same(before, optimizer.state_dict())


@pytest.mark.parametrize(("name", "variant"), DIRECTIONAL_VARIANTS)
def test_a_step_in_pieces_is_the_real_one_bit_for_bit(
    name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows at a time, without a trace in the state; a parameter never reached before takes its first step."""
    monkeypatch.setattr("mates_hf.influence.real_step._MIN_PIECE", 4)
    parameters = make_parameters(name)
    optimizer = CLASSES[name].variants[variant](parameters)
    train(parameters, optimizer, 3)
    late = nn.Parameter(torch.ones(6, 3, dtype=torch.float64))
    if name == "torch.optim.Adagrad":  # makes its state at once, of all that it was given
        late.requires_grad_(False)
    else:
        optimizer.param_groups[0]["params"].append(late)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps `step`
    everyone = [*parameters, late]
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in everyone]
    rate = float(optimizer.param_groups[0]["lr"]) / 2
    steps: list[list[Tensor]] = []
    # The null step, a step on all of them, one that a parameter has no part in.
    for present in ([], everyone, everyone[1:]):
        copied, stepper = copy.deepcopy((everyone, optimizer))
        for parameter, own, gradient in zip(everyone, copied, gradients, strict=True):
            given = any(parameter is p for p in present)
            parameter.grad = gradient.clone() if given else None
            by_momentum = stepper.state.get(own) or not stepper.state
            own.grad = gradient.clone() if given else torch.zeros_like(own) if by_momentum else None
        for group in stepper.param_groups:
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
        type(stepper).step(stepper)
        before = copy.deepcopy((optimizer.state_dict(), vars(optimizer).get("_step_count")))
        with preserved(nn.ParameterList(everyone), optimizer, copy_state=False) as snapshot:
            step = RealStep(optimizer, [rate])
            assert not step.needs_copy
            for parameter, gradient in zip(everyone, gradients, strict=True):
                parameter.grad = gradient.clone() if any(parameter is p for p in present) else None
            step.take()
            steps.append([p.detach().clone() for p in everyone])
            snapshot.restore()
        assert_same(before, (optimizer.state_dict(), vars(optimizer).get("_step_count")))
        for found, expected in zip(steps[-1], copied, strict=True):
            assert torch.equal(found, expected.detach())
    assert not torch.equal(steps[0][0], steps[1][0])


def test_real_steps_copy_no_state_of_a_known_optimizer() -> None:
    """What is held at once besides the parameters' copy and the gradient: a piece, a 64th of a model like this."""
    model = nn.ParameterList([nn.Parameter(torch.randn(256, 1024)) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    size = sum(p.numel() * p.element_size() for p in model)
    step = RealStep(optimizer, [1e-3])
    held = peak_bytes(step.take)
    assert held < size / 8
    assert peak_bytes(lambda: copy.deepcopy(optimizer.state_dict())) > 1.9 * size


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, variant in DIRECTIONAL_VARIANTS if name != "torch.optim.SGD"]
)
def test_an_optimizer_without_a_step_is_fresh(name: str, variant: str) -> None:
    """Also Adagrad, which has state before its first step."""
    parameters = make_parameters(name)
    with pytest.raises(FreshOptimizerError, match="train a step first"):
        parameter_steps(CLASSES[name].variants[variant](parameters), parameters)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_derivative_is_that_of_autograd(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, change = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    settings = ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    matrix.requires_grad_()
    (expected,) = torch.autograd.grad(orthogonalise(matrix, *settings), matrix, change)
    found = orthogonalise_change(matrix.detach(), change, *settings)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_muon_null_step_is_its_real_one_in_16_bits() -> None:
    parameters = [nn.Parameter(p.detach().float()) for p in make_parameters("torch.optim.Muon")]
    optimizer = torch.optim.Muon(parameters, lr=1e-2)
    train(parameters, optimizer, 3)
    expected = after_a_step(parameters, optimizer, [torch.zeros_like(p) for p in parameters])
    with torch.no_grad():
        for step, new in zip(parameter_steps(optimizer, parameters), expected, strict=True):
            step.write_null()
            torch.testing.assert_close(step.parameter.detach(), new, rtol=0, atol=1e-2 * 2**-7)


@pytest.mark.parametrize("name", ["torch.optim.AdamW", "torch.optim.Adagrad", "transformers.Adafactor"])
@pytest.mark.parametrize("given", [False, True])
def test_rows_that_hardly_any_batch_reaches_count_as_usual_ones(name: str, given: bool) -> None:
    """P of an embedding's row that was never reached, or once long ago, is of the size of the others' P."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 4, generator=generator))
    optimizer = next(iter(CLASSES[name].variants.values()))([parameter])
    for i in range(200):
        parameter.grad = torch.randn(6, 4, generator=generator)
        parameter.grad[4] = 0
        if i:
            parameter.grad[5] = 0
        optimizer.step()
    if name == "torch.optim.AdamW":
        optimizer.state[parameter]["exp_avg_sq"][5] *= 0.99**1000  # what is left of it after many more steps
    (step,) = parameter_steps(optimizer, [parameter])
    squares = torch.ones(6, 4) * torch.tensor([1.0, 1, 1, 1, 0, 0])[:, None] if given else None
    preconditioner = torch.ones(6, 4)
    step.precondition(preconditioner, 1.0, squares)
    usual = preconditioner[:4].mean()
    assert (preconditioner[:4] / usual - 1).abs().max() < 0.4
    # One gradient is all there is in its second moment, where the others have as many as that remembers.
    assert (preconditioner[4:] > 2 * usual).all()
    assert (preconditioner[4:] < 40 * usual).all()


@pytest.fixture(scope="module")
def live(make_tiny_model: Callable[..., Any]) -> tuple[Any, torch.optim.Optimizer]:
    """A small model trained by Muon (matrices of its blocks) and AdamW (the rest) on texts of three kinds."""
    model = make_tiny_model()
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    optimizer = CombinedOptimizer(
        torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95))
    )
    for seed in range(150):
        rows = [chain_rows(1, seed + 1000 * stride, stride).values for stride in (1, 7, 3)]
        ids = torch.from_numpy(np.stack([*rows, random_rows(1, seed, 12, 13).values]))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    return model, optimizer


def candidates_of_all_kinds() -> TokenRows:
    return join(*(chain_rows(8, 11 + stride, stride) for stride in (1, 7, 3, 5)), random_rows(8, 13, 12, 13))


@pytest.mark.slow
def test_a_container_of_muon_and_adamw_ranks_like_real_steps(live: tuple[Any, torch.optim.Optimizer]) -> None:
    model, optimizer = live
    reference, candidates = task(chain_rows(24, 9, 1)), candidates_of_all_kinds()
    before = everything(model, optimizer), [copy.deepcopy(part.state_dict()) for part in optimizer.optimizers]
    fast = DirectionalProbe().measure(model, optimizer, reference, candidates)
    oracle = OneStepProbe().measure(model, optimizer, reference, candidates)
    after = everything(model, optimizer), [part.state_dict() for part in optimizer.optimizers]
    assert_same(before, after)
    assert spearmanr(fast.influence, oracle.influence).statistic > 0.85
    assert fast.info["reference_loss"] == pytest.approx(oracle.info["reference_loss"], abs=1e-3)
    rates = [0.0, 1e-4]
    only_adamw = DirectionalProbe(learning_rates=tuple(rates)).compute_direction(model, optimizer, reference)
    muon_part = optimizer.optimizers[0].param_groups[0]["params"]
    assert all(not only_adamw.by_parameter[p].any() for p in muon_part)
    assert only_adamw.by_parameter[model.lm_head.weight].any()


def test_the_whole_derivative_of_muon_ranks_better_than_the_frozen_one(
    live: tuple[Any, torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against real steps; `python -m benchmarks muon_response` has the figures against a swap in a batch."""
    model, optimizer = live
    reference, candidates = task(chain_rows(24, 9, 1)), candidates_of_all_kinds()
    oracle = OneStepProbe(learning_rates=(2e-3, 0.0)).measure(model, optimizer, reference, candidates).influence
    probe = DirectionalProbe(learning_rates=(2e-3, 0.0))
    whole = probe.measure(model, optimizer, reference, candidates).influence
    monkeypatch.setattr("mates_hf.influence.optimizer.muon_step.orthogonalise_change", frozen_change)
    frozen = probe.measure(model, optimizer, reference, candidates).influence
    assert spearmanr(whole, oracle).statistic > spearmanr(frozen, oracle).statistic + 0.02


def test_tokens_never_trained_on_do_not_fill_the_direction(live: tuple[Any, torch.optim.Optimizer]) -> None:
    """Ids 0 to 2 are in no training row. In the reference and in some candidates they must not outweigh all else."""
    model = copy.deepcopy(live[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_on_four_kinds(model, optimizer)
    optimizer.param_groups[0]["lr"] = 3e-4
    assert not optimizer.state[model.model.embed_tokens.weight]["exp_avg_sq"][:3].any()
    with_new = [chain_rows(24, 9, 1), candidates_of_all_kinds()]
    rows = [[part.row(i)[0].copy() for i in range(len(part))] for part in with_new]
    for i in range(3):
        rows[0][i][5] = i
        rows[1][5 * i][3] = i
    reference, candidates = (TokenRows.from_lists(part) for part in rows)
    fast = DirectionalProbe().measure(model, optimizer, task(reference), candidates)
    oracle = OneStepProbe().measure(model, optimizer, task(reference), candidates)
    assert spearmanr(fast.influence, oracle.influence).statistic > 0.85
    assert 0.3 < np.polyfit(fast.influence, oracle.influence, 1)[0] < 3


def trained_by(make: Make, steps: int = 4) -> tuple[Any, torch.optim.Optimizer]:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    optimizer = make(list(model.parameters()))
    for seed in range(steps):
        ids = torch.from_numpy(random_rows(4, seed, 8, 9).values.reshape(4, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, variant in VARIANTS if CLASSES[name].outcome == ONE_STEP]
)
def test_one_step_only(name: str, variant: str) -> None:
    model, optimizer = trained_by(CLASSES[name].variants[variant])
    reference, candidates = task(random_rows(4, 100)), random_rows(5, 200)
    kind = type(optimizer)
    with pytest.raises(
        UnsupportedOptimizerError, match=rf"{kind.__module__}\.{kind.__name__}.*probe=OneStepProbe\(\)"
    ):
        DirectionalProbe().measure(model, optimizer, reference, candidates)
    before = everything(model, optimizer)
    labels = OneStepProbe().measure(model, optimizer, reference, candidates)
    assert labels.influence.std() > 0
    assert_same(before, everything(model, optimizer))


class MovingProjection(torch.optim.SGD):
    """Keeps what its steps depend on in an object inside its state, like GaLore."""

    class Projection:
        def __init__(self) -> None:
            self.matrix: Any = None

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("projection", self.Projection()).matrix = parameter.grad.clone()
        super().step()


def test_objects_in_the_state_are_put_back() -> None:
    model, optimizer = trained_by(lambda parameters: MovingProjection(parameters, lr=0.1))
    before = {p: optimizer.state[p]["projection"].matrix.clone() for p in model.parameters()}
    OneStepProbe().measure(model, optimizer, task(random_rows(4, 100)), random_rows(5, 200))
    for parameter, matrix in before.items():
        assert torch.equal(optimizer.state[parameter]["projection"].matrix, matrix)


def layerwise(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    return LayerWiseDummyOptimizer(optimizer_dict={p: torch.optim.SGD([p], lr=0.1) for p in parameters})


class Mixed(torch.optim.Optimizer):
    """A container of somebody else's, whose groups are not in the order of its parts."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([group for optimizer in reversed(optimizers) for group in optimizer.param_groups], {})
        self.optimizers = optimizers


def wrong_container(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Mixed(torch.optim.SGD(parameters[:1], lr=0.1), torch.optim.AdamW(parameters[1:]))


REFUSED_MAKERS: dict[str, tuple[Make, str]] = {
    "LBFGS": (of("LBFGS"), "LBFGS.*several times"),
    "SparseAdam": (of("SparseAdam"), "SparseAdam.*sparse"),
    "relative_step": (hf_adafactor(lr=None, relative_step=True), "Adafactor.*relative_step=False"),
    "layerwise": (layerwise, "LayerWiseDummyOptimizer.*backward"),
    "groups of another": (wrong_container, "Mixed.*CombinedOptimizer"),
}


@pytest.mark.parametrize("name", REFUSED_MAKERS)
@pytest.mark.parametrize(
    "probe", [DirectionalProbe(), OneStepProbe(), LossReductionProbe()], ids=lambda probe: type(probe).__name__
)
def test_refused_by_name(name: str, probe: Any) -> None:
    make, message = REFUSED_MAKERS[name]
    model, _ = trained_by(of("SGD"), steps=0)
    optimizer = make(list(model.parameters()))
    for refuse in (require_known, require_steps):
        with pytest.raises(UnsupportedOptimizerError, match=message):
            refuse(optimizer)
    with pytest.raises(UnsupportedOptimizerError, match=message):
        probe.measure(model, optimizer, task(random_rows(4, 100)), random_rows(5, 200))


class LooksSharded(nn.Parameter):
    """What tells a DTensor from a tensor, for the check."""

    def to_local(self) -> Tensor:
        return self.data


def test_whole_matrices_are_asked_for_by_name() -> None:
    sharded = LooksSharded(torch.ones(4, 4))
    for make in (of("Muon"), of("Adafactor"), hf_adafactor()):
        with pytest.raises(UnsupportedOptimizerError, match=r"(Muon|Adafactor), whose step needs whole matrices"):
            require_known(make([sharded]))
    require_known(of("AdamW")([sharded]))


def test_the_message_names_what_is_known() -> None:
    with pytest.raises(UnsupportedOptimizerError) as caught:
        require_known(torch.optim.Rprop([nn.Parameter(torch.ones(2))]))
    known = {name.rpartition(".")[2] for name, row in CLASSES.items() if row.outcome == DIRECTIONAL and row.variants}
    assert all(re.search(rf"\b{name}\b", str(caught.value)) for name in known)


def test_state_that_has_seen_no_step_is_no_state() -> None:
    """What a gradient scaler leaves behind that skipped every step so far."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[parameter]["step"].zero_()
    with pytest.raises(FreshOptimizerError, match="train a step first"):
        parameter_steps(optimizer, [parameter])
