"""The path of the reference gradient: its length, its shares, and that it never climbs, whatever the optimizer."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from mates_hf.data.rows import TokenRows
from mates_hf.influence import gradient_sum, reference_path
from mates_hf.influence.optimizer import parameter_step
from mates_hf.influence.passes import mean_loss_gradient
from mates_hf.influence.path_length import MAX_STEPS, rate_steps, steps_per_stride
from mates_hf.influence.preconditioner import parameter_steps, rarely_reached_parameters
from mates_hf.influence.probe import RunSettings
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.reference_path import MAX_RISE, shares_of_path
from mates_hf.influence.usual_batches import UsualBatches
from tests.influence.test_optimizers import hf_adafactor
from tests.influence.test_probes import chain_rows, join, task

BATCH = 128
SMALL = 1e-5  # relative: float32 sums in another order
Live = tuple[Any, torch.optim.Optimizer]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

AT_LARGE_BATCH: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "adamw_beta1_0": lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.0, 0.999)),
    "adafactor": hf_adafactor(lr=3e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
}
NO_MOMENTUM = [name for name in AT_LARGE_BATCH if name != "adamw"]


def kinds(count: int, seed: int) -> TokenRows:
    return join(*(chain_rows(count // 4, seed + 1000 * stride, stride) for stride in (1, 7, 3, 5)))


@pytest.fixture(scope="module")
def at_large_batch(make_tiny_model: Callable[..., Any]) -> Callable[[str], Live]:
    """A small model after 25 steps on batches of 128 rows, by each of the optimizers; made once."""
    made: dict[str, Live] = {}

    def build(name: str) -> Live:
        if name not in made:
            model = make_tiny_model(hidden_size=16, intermediate_size=32)
            optimizer = AT_LARGE_BATCH[name](list(model.parameters()))
            for seed in range(25):
                mean_loss_gradient(model, kinds(BATCH, seed))
                optimizer.step()
            optimizer.zero_grad()
            made[name] = model, optimizer
        return made[name]

    return build


@pytest.mark.quick("adamw", "adafactor", "sgd")
@pytest.mark.parametrize("name", AT_LARGE_BATCH)
def test_a_path_never_climbs_at_a_large_batch(at_large_batch: Callable[[str], Live], name: str) -> None:
    model, optimizer = at_large_batch(name)
    probe = DirectionalProbe(path_steps=32, batch_rows=BATCH, path_rate=0.5)
    labels = probe.measure(model, optimizer, task(chain_rows(128, 9, 1)), kinds(64, 77))
    changes = np.array(labels.info["path_losses"]) - np.array(labels.info["path_start_losses"])
    assert labels.info["path_points"] == len(changes) == 32
    assert changes.max() <= MAX_RISE
    assert changes[-8:].mean() < -0.01
    assert labels.info["path_check"][1] < labels.info["path_check"][0]
    assert not labels.info["path_stopped"]


@pytest.mark.parametrize("name", NO_MOMENTUM)
def test_without_momentum_a_stride_is_as_long_as_a_step_on_a_batch(
    at_large_batch: Callable[[str], Live], name: str
) -> None:
    """That of the reference's shares of four passages would be several times as long."""
    model, optimizer = at_large_batch(name)
    copied, stepper = copy.deepcopy((model, optimizer))
    mean_loss_gradient(copied, kinds(BATCH, 500))
    stepper.step()
    real = math.sqrt(
        sum(float((p - q).square().sum()) for p, q in zip(model.parameters(), copied.parameters(), strict=True))
    )
    found: list[float] = []
    own_step = reference_path.ReferencePath._own_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reference_path.ReferencePath, "_own_step", lambda path: found.append(own_step(path)) or found[-1]
        )
        DirectionalProbe(path_steps=4, batch_rows=BATCH).compute_direction(
            model, optimizer, task(chain_rows(16, 9, 1)), kinds(BATCH, 600)
        )
    assert 0.5 < found[0] / real < 2


def test_a_path_that_rises_goes_as_far_as_it_fell(
    at_large_batch: Callable[[str], Live], caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = at_large_batch("adamw")
    reference, candidates = task(chain_rows(128, 9, 1)), kinds(64, 77)
    with caplog.at_level(logging.INFO):
        labels = DirectionalProbe(path_steps=16, path_rate=10.0).measure(model, optimizer, reference, candidates)
    changes = np.array(labels.info["path_losses"]) - np.array(labels.info["path_start_losses"])
    assert labels.info["path_stopped"]
    assert labels.info["path_points"] == 16
    assert labels.info["path_stride"] < 10
    assert changes.max() <= MAX_RISE
    assert changes[4:].mean() < 0
    assert "rose along the path" in caplog.text
    one = DirectionalProbe().measure(model, optimizer, reference, candidates)
    assert spearmanr(labels.influence, one.influence).statistic > 0.3
    # Where every path rises there is a single point, and the labels are those of one step.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_path, "MAX_RISE", -1e9)
        flat = DirectionalProbe(path_steps=16).measure(model, optimizer, reference, candidates)
    assert flat.info["path_points"] == 1
    np.testing.assert_allclose(flat.influence, one.influence, atol=1e-3 * np.abs(one.influence).max())


def test_a_direction_that_raises_the_loss_is_told(
    at_large_batch: Callable[[str], Live], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = at_large_batch("adamw")
    reference = task(chain_rows(32, 9, 1))
    add = gradient_sum.add_gradient_of_sum

    def reversed_gradient(model: nn.Module, *args: Any, **settings: Any) -> float | None:
        found = add(model, *args, **settings)
        for parameter in model.parameters():
            parameter.grad.neg_()
        return found

    DirectionalProbe(path_steps=2).compute_direction(model, optimizer, reference)
    assert "must fall along the direction" not in caplog.text
    monkeypatch.setattr("mates_hf.influence.probe_directional.add_gradient_of_sum", reversed_gradient)
    found = DirectionalProbe(path_steps=2, path_rate=0.01).compute_direction(model, optimizer, reference)
    assert found.path_check is not None
    assert found.path_check[1] > found.path_check[0]
    assert "must fall along the direction" in caplog.text


def test_shares_count_by_their_tokens(at_large_batch: Callable[[str], Live]) -> None:
    """A path that hardly moves is the gradient of the whole task, however uneven the lengths of its rows are."""
    model, optimizer = at_large_batch("adamw")
    rows = [chain_rows(1, seed, 1, length=40 if seed < 3 else 4).row(0)[0] for seed in range(24)]
    reference = task(TokenRows.from_lists(rows))
    whole = DirectionalProbe().compute_direction(model, optimizer, reference)
    path = DirectionalProbe(path_steps=6, path_rate=1e-9).compute_direction(model, optimizer, reference)
    assert path.reference_loss == pytest.approx(whole.reference_loss, rel=SMALL)
    for parameter, expected in whole.by_parameter.items():
        # Strides are rounded away in float32 but for a few elements.
        assert (path.by_parameter[parameter] - expected).abs().max() < 1e-3 * expected.abs().max()
    shares = [shares_of_path(reference.rows, 6, seed) for seed in (0, 0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(shares[0], shares[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(shares[0], shares[2], strict=True))


def test_memory_that_runs_out_along_a_path_changes_nothing(
    at_large_batch: Callable[[str], Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = at_large_batch("adamw")
    reference, probe = task(chain_rows(32, 9, 1)), DirectionalProbe(path_steps=4)
    expected = probe.compute_direction(model, optimizer, reference)
    losses = gradient_sum.passes.batch_losses
    sizes: list[int] = []

    def small_memory(model: Any, rows: Any, batch: Any, loss: Any) -> torch.Tensor:
        sizes.append(len(batch))
        if len(sizes) > 6 and len(batch) > 2 and torch.is_grad_enabled():  # in the middle of the second point
            raise torch.OutOfMemoryError("out of memory")
        return losses(model, rows, batch, loss)

    monkeypatch.setattr(gradient_sum.passes, "batch_losses", small_memory)
    found = dataclasses.replace(probe, tokens_per_batch=48).compute_direction(model, optimizer, reference)
    assert max(sizes) > 2
    assert sizes[-4:] != sizes[:4]
    for parameter, u in expected.by_parameter.items():
        assert (found.by_parameter[parameter] - u).abs().max() < 1e-4 * u.abs().max()


# --- how long it is ---


def scheduler_of(kind: str, optimizer: torch.optim.Optimizer) -> Any:
    schedulers = torch.optim.lr_scheduler
    if kind == "lambda":
        return schedulers.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 20))
    if kind == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, 30)
    first, second = schedulers.LinearLR(optimizer, 0.1, total_iters=5), schedulers.ExponentialLR(optimizer, 0.9)
    return schedulers.SequentialLR(optimizer, [first, second], milestones=[8])


@pytest.mark.parametrize("kind", ["lambda", "cosine", "sequential"])
def test_the_schedule_is_read_ahead_without_a_trace(kind: str) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    groups = [{"params": [parameter], "lr": 0.1}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups)
    scheduler = scheduler_of(kind, optimizer)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    before = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    rates = [group["lr"] for group in optimizer.param_groups]
    found = rate_steps(scheduler, 12, rates)
    assert str(before) == str((optimizer.state_dict(), scheduler.state_dict()))
    assert optimizer.param_groups[0]["params"] == [parameter]
    expected = 0.0
    for _ in range(12):
        expected += sum(group["lr"] for group in optimizer.param_groups)
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected / sum(rates))


def test_a_schedule_that_cannot_be_read_counts_as_constant() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert rate_steps(plateau, 7, [0.1]) == rate_steps(None, 7, [0.1]) == rate_steps(object(), 7, [0.1]) == 7


def test_accelerates_scheduler_steps_once_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    plain = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    wrapped = Accelerator(cpu=True).prepare(plain)
    assert rate_steps(wrapped, 3, [0.1]) == pytest.approx(1.75)
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: SimpleNamespace(num_processes=2))
    assert rate_steps(wrapped, 3, [0.1]) == pytest.approx(1 + 0.25 + 0.0625)


def test_a_path_is_as_long_as_the_round_and_bounded_by_the_peak_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert steps_per_stride(32, None, optimizer, [0.1]) == 0.5
    assert steps_per_stride(32, 16.0, optimizer, [0.1]) == 0.5
    assert steps_per_stride(32, 1e6, optimizer, [0.1]) == MAX_STEPS / 32
    optimizer.param_groups[0]["initial_lr"] = 1.0  # as a scheduler leaves it, now in its decay
    assert steps_per_stride(32, 1e6, optimizer, [0.1]) == 10 * MAX_STEPS / 32
    assert steps_per_stride(10, 80.0, optimizer, [0.1]) == 8.0
    probe = DirectionalProbe().for_run(RunSettings(rate_steps=80.0))
    assert probe.rate_steps == 80.0
    assert DirectionalProbe(rate_steps=3.0).for_run(RunSettings(rate_steps=80.0)).rate_steps == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_path_labels_differ_from_one_step_labels_at_a_low_rate(
    at_large_batch: Callable[[str], Live], dtype: torch.dtype
) -> None:
    """At 2e-5 sixteen steps move nothing; a round of 1,000 does, and the loss falls along the path."""
    model, optimizer = copy.deepcopy(at_large_batch("adamw"))
    if dtype != torch.float32:
        model.to(dtype)
        for state in optimizer.state.values():
            state.update({key: state[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")})
    optimizer.param_groups[0].update(lr=2e-5, initial_lr=3e-3)
    reference, candidates = task(chain_rows(128, 9, 1)), kinds(64, 77)
    paths = [
        DirectionalProbe(path_steps=16, rate_steps=steps).measure(model, optimizer, reference, candidates)
        for steps in (8.0, 1000.0)
    ]
    one = DirectionalProbe().measure(model, optimizer, reference, candidates)
    falls = [
        float(np.mean(np.array(p.info["path_losses"])[-4:] - np.array(p.info["path_start_losses"])[-4:]))
        for p in paths
    ]
    assert falls[1] < -0.02
    assert falls[1] < 4 * falls[0] if dtype == torch.float32 else True
    agreement = [spearmanr(p.influence, one.influence).statistic for p in paths]
    assert agreement[1] < agreement[0]
    assert agreement[1] < 0.995


def test_the_null_step_is_measured_before_it_is_rounded() -> None:
    """Read as a difference of bf16 weights it was 0.3 of the true one at a rate of 2e-5."""
    generator = torch.Generator().manual_seed(0)
    lengths = []
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.ones(64, 64).to(dtype))
        optimizer = torch.optim.AdamW([parameter], lr=2e-5, weight_decay=0.0)
        generator.manual_seed(0)
        for _ in range(3):
            parameter.grad = (0.3 + torch.randn(64, 64, generator=generator)).to(dtype)
            optimizer.step()
        (step,) = parameter_steps(optimizer, [parameter])
        lengths.append(float(step.null_square()) ** 0.5)
    assert lengths[1] == pytest.approx(lengths[0], rel=0.02)


def test_only_parameters_that_move_tell_the_stride(at_large_batch: Callable[[str], Live]) -> None:
    model, optimizer = at_large_batch("adamw")
    left_out = {id(p) for p in (model.model.embed_tokens.weight, model.lm_head.weight)}
    steps = parameter_steps(optimizer, list(model.parameters()))
    squares = {id(step.parameter): float(step.null_square()) for step in steps}
    found: list[float] = []
    own_step = reference_path.ReferencePath._own_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reference_path.ReferencePath, "_own_step", lambda path: found.append(own_step(path)) or found[-1]
        )
        for parameters in ("all", "blocks"):
            probe = DirectionalProbe(path_steps=2, parameters=parameters)
            probe.compute_direction(model, optimizer, task(chain_rows(16, 9, 1)))
    assert found[0] == pytest.approx(math.sqrt(sum(squares.values())))
    assert found[1] == pytest.approx(math.sqrt(sum(s for key, s in squares.items() if key not in left_out)))
    assert found[1] < 0.95 * found[0]


# --- what P assumes ---


def test_batches_are_clipped_as_the_run_clips(at_large_batch: Callable[[str], Live]) -> None:
    model, optimizer = at_large_batch("adamw")
    steps = parameter_steps(optimizer, list(model.parameters()))
    found = []
    for limit in (None, 1e-3, 1e9):
        batches = UsualBatches(
            model, kinds(8, 3), batch_rows=4, max_grad_norm=limit, seed=0,
            mean_gradient=lambda rows: mean_loss_gradient(model, rows),
        )  # fmt: skip
        squares = batches.mean_squares(steps)
        found.append(sum(float(square.sum()) for square in squares.values()))
        assert batches.num_tokens == 4 * 4 * 12
    model.zero_grad()
    assert found[0] == pytest.approx(found[2], rel=1e-6)
    assert found[1] == pytest.approx(1e-6, rel=1e-2)  # each batch's gradient has length 1e-3 then


def test_only_tables_heads_and_experts_have_rows_that_batches_leave_out(
    at_large_batch: Callable[[str], Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys have small rows, which every batch reaches; and it is asked once for a whole path."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model, optimizer = at_large_batch("adamw")
    assert rarely_reached_parameters(model) == {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=3,
        )
    )  # fmt: skip
    rare = rarely_reached_parameters(experts)
    by_kind = {name: id(p) in rare for name, p in experts.named_parameters()}
    assert any(found for name, found in by_kind.items() if "expert" in name)
    assert not any(found for name, found in by_kind.items() if "self_attn" in name or "norm" in name)
    calls: list[int] = []
    rarely = parameter_step.rarely_reached
    monkeypatch.setattr(
        "mates_hf.influence.optimizer.adaptive_step.rarely_reached", lambda *a, **k: calls.append(1) or rarely(*a, **k)
    )
    DirectionalProbe(path_steps=8).compute_direction(model, optimizer, task(chain_rows(64, 9, 1)))
    assert len(calls) == 2


def test_a_small_row_of_a_matrix_keeps_its_own_size() -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 1.0, 1.0, 0.05])[:, None]
    for _ in range(20):
        parameter.grad = torch.randn(4, 3, generator=generator) * sizes
        optimizer.step()
    results = []
    for rarely in (set(), {id(parameter)}):
        (step,) = parameter_steps(optimizer, [parameter], None, rarely)
        whole = torch.ones(4, 3)
        step.precondition(whole, 1.0, None)
        pieces = [
            part for _, _, parts in step.preconditioned_of([step], [torch.ones(4, 3)], [1.0], [None]) for part in parts
        ]
        assert torch.equal(whole, torch.cat(pieces))
        results.append(whole)
    assert torch.equal(results[0][:3], results[1][:3])
    assert (results[0][3] > 2 * results[1][3]).all()


def test_a_scheduler_of_accelerate_that_steps_by_itself_steps_once_a_step(monkeypatch):
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: SimpleNamespace(num_processes=2))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    halving = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for by_itself, expected in ((False, 1 + 0.5 + 0.25), (True, 1 + 0.25 + 0.0625)):
        wrapped = SimpleNamespace(split_batches=False, step_with_optimizer=by_itself, scheduler=halving)
        assert rate_steps(wrapped, 3, [1.0]) == pytest.approx(expected)
