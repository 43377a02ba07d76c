"""What a probe launches and waits for is bounded, and what keeps it low changes no label."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from benchmarks.lab.operations import CountOperations, counted
from mates_hf.data.rows import TokenRows
from mates_hf.data.weighted import WeightedRows
from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.preserve import preserved
from mates_hf.flops import num_path_points
from mates_hf.influence import micro_batches, output_head
from mates_hf.influence.optimizer import together
from mates_hf.influence.passes import likelihood, mean_loss_gradient, token_losses
from mates_hf.influence.preconditioner import grouped, parameter_steps, rarely_reached_parameters
from mates_hf.influence.probe_directional import DirectionalProbe
from tests.influence.test_optimizers import hf_adafactor
from tests.influence.test_probes import chain_rows, task

SAME_GRADIENT = 1e-5  # relative: float32 products of fewer rows at a time
TOKENS = 64  # of a micro-batch
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adam_l2_amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax_l2": lambda p: torch.optim.Adamax(p, lr=1e-2, weight_decay=0.1),
    "rmsprop_centred": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-1),
    "adafactor": hf_adafactor(lr=1e-2),
    "adafactor_scaled": hf_adafactor(lr=1e-2, scale_parameter=True, beta1=0.8, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}


if hasattr(torch.optim, "Adafactor"):  # newer than the oldest torch supported
    OPTIMIZERS["adafactor_of_torch"] = lambda p: torch.optim.Adafactor(p, lr=1e-2)


def after_steps(model: Any, optimizer: torch.optim.Optimizer, num: int = 3) -> torch.optim.Optimizer:
    for seed in range(num):
        mean_loss_gradient(model, chain_rows(8, seed, 1))
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.fixture
def live(make_tiny_model: Callable[..., Any]) -> tuple[Any, torch.optim.Optimizer]:
    model = make_tiny_model().eval()
    return model, after_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def count(work: Callable[[], Any]) -> CountOperations:
    with counted() as mode:
        work()
    return mode


def test_a_micro_batch_launches_a_dozen_kernels_of_ours_and_waits_for_none(live: Any) -> None:
    model, _ = live
    rows = chain_rows(32, 0, 1, length=16)
    ids = torch.from_numpy(rows.values.astype(np.int64)).view(-1, 16)[: TOKENS // 16]
    with torch.no_grad():
        plain = count(lambda: model(input_ids=ids, use_cache=False))
    found = count(lambda: token_losses(model, rows, tokens_per_batch=TOKENS))
    num = 32 * 16 // TOKENS
    assert found.launches <= num * (plain.launches + 12)
    assert found.syncs.total() <= num * plain.syncs.total() + 1  # all losses at once, at the end
    gradient = count(lambda: mean_loss_gradient(model, rows, tokens_per_batch=TOKENS))
    assert gradient.syncs.total() <= num * plain.syncs.total() + 1


def test_what_moves_weights_takes_launches_that_do_not_grow_with_their_number(
    make_tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "_LEAST_ENTRIES_CPU", together.MOST_ENTRIES_CPU)  # in lists as long as a device's
    found = []
    for layers in (2, 6):
        model = make_tiny_model(num_hidden_layers=layers).eval()
        optimizer = after_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        probe = DirectionalProbe(path_steps=4, path_rate=0.5, epsilon=1e-3, tokens_per_batch=8192)
        rows, passages = chain_rows(8, 1, 1), task(chain_rows(16, 2, 1))
        direction = probe.compute_direction(model, optimizer, passages, rows).by_parameter
        average = WeightAverage(model)
        average.update()

        def shift(model: Any = model, direction: Any = direction) -> None:
            with preserved(model) as snapshot:
                snapshot.shift(direction, 1e-3)
                snapshot.shift(direction, -1e-3)

        def read(model: Any = model, passages: Any = passages) -> None:
            for _ in range(4):  # as often as the path does
                mean_loss_gradient(model, passages.rows.take(np.arange(4)))
            token_losses(model, passages.rows)
            token_losses(model, passages.rows.take(np.arange(4)))

        passes, path = count(read), count(lambda: probe.compute_direction(model, optimizer, passages, rows))  # noqa: B023
        found.append([count(shift).launches, count(average.update).launches, path.launches - passes.launches])
        assert path.syncs.total() <= passes.syncs.total() + 12
    (shift_2, average_2, path_2), (shift_6, average_6, path_6) = found
    assert shift_2 <= 20
    assert average_2 == 1
    assert path_2 <= 500  # four points: a norm, a null step, a move, and 63 sums of gradients
    # Four more layers are 36 more tensors. A list takes 30 of them at least in a launch.
    assert shift_6 <= shift_2 + 20
    assert average_6 <= average_2 + 1
    assert path_6 <= path_2 + 250  # 108 of them sums of gradients


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_taken_together_are_those_taken_one_by_one(
    make_tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    model = make_tiny_model().to(dtype)
    optimizer = after_steps(model, OPTIMIZERS[name](list(model.parameters())))
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    steps = parameter_steps(optimizer, list(model.parameters()), rarely=())
    gradients = [torch.randn_like(step.parameter) for step in steps]
    nothing = [None] * len(steps)
    alone = []
    for step, gradient in zip(steps, gradients, strict=True):
        step.write_null()
        whole = gradient.clone()
        step.precondition(whole, 0.3, None)
        alone.append((step.parameter.detach().clone(), whole))
    for limit in (together.MOST_ENTRIES_CPU, 700):  # all at once; several tensors, and large ones in pieces
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), saved, strict=True):
                parameter.copy_(value)
        monkeypatch.setattr(together, "MOST_ENTRIES_CPU", limit)
        for numbers in grouped(steps):
            alike = [steps[number] for number in numbers]
            alike[0].write_null_of(alike)
            given = [gradients[number].clone() for number in numbers]
            changes = [torch.empty_like(gradient).reshape(-1) for gradient in given]
            scales = [0.3] * len(alike)
            ends = [0] * len(given)
            for owners, thetas, results in alike[0].preconditioned_of(alike, given, scales, nothing[: len(alike)]):
                for owner, theta, result in zip(owners, thetas, results, strict=True):
                    assert theta.shape == result.shape
                    changes[owner][ends[owner] : ends[owner] + result.numel()] = result.reshape(-1)
                    ends[owner] += result.numel()
            alike[0].precondition_of(alike, given, scales, nothing[: len(alike)])
            for place, number in enumerate(numbers):
                assert torch.equal(steps[number].parameter, alone[number][0]), number
                assert torch.equal(given[place], alone[number][1])
                assert torch.equal(changes[place], alone[number][1].reshape(-1))
    kinds = {step.parameter.shape for step in steps} if name.startswith("adafactor") else {None}
    assert len(grouped(steps)) == len(kinds)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_takes_as_many_operations_for_six_layers_as_for_two(
    make_tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(together, "_LEAST_ENTRIES_CPU", together.MOST_ENTRIES_CPU)  # in lists as long as a device's

    def found(layers: int) -> CountOperations:
        model = make_tiny_model(num_hidden_layers=layers)
        parameters = list(model.parameters())
        optimizer = after_steps(model, OPTIMIZERS[name](parameters))
        gradients = {id(parameter): torch.randn_like(parameter) for parameter in parameters}
        rarely = rarely_reached_parameters(model)

        def work() -> None:
            steps = parameter_steps(optimizer, parameters, rarely=rarely)
            for numbers in grouped(steps):
                alike = [steps[number] for number in numbers]
                given = [gradients[id(step.parameter)] for step in alike]
                alike[0].null_squares_of(alike)
                alike[0].usual_squares_of(alike)
                alike[0].write_null_of(alike)
                nothing, scales = [None] * len(alike), [0.3] * len(alike)
                for _ in alike[0].preconditioned_of(alike, given, scales, nothing):
                    pass
                alike[0].precondition_of(alike, given, scales, nothing)

        return count(work)

    two, six = found(2), found(6)
    assert two.calls == six.calls, six.counts - two.counts
    assert two.syncs.total() == six.syncs.total() <= 2


def test_counters_on_a_device_are_read_at_once(live: Any) -> None:
    model, optimizer = live
    found = count(lambda: parameter_steps(optimizer, list(model.parameters())))
    assert found.syncs.total() <= 1


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="a torch before Muon")
def test_muon_waits_for_no_matrix_and_leaves_one_without_momentum_alone() -> None:
    reached, never = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.Muon([reached, never], lr=1e-2)
    reached.grad, never.grad = torch.randn(6, 4), torch.zeros(6, 4)
    optimizer.step()
    steps, gradients = parameter_steps(optimizer, [reached, never]), [torch.ones(6, 4), torch.ones(6, 4)]
    assert count(lambda: steps[0].precondition_of(steps, gradients, [1.0, 1.0], [None, None])).syncs.total() == 0
    assert gradients[0].norm() > 0
    assert torch.equal(gradients[1], torch.zeros(6, 4))


def test_labels_are_the_same_whatever_is_worked_on_at_once(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = live
    probe = DirectionalProbe(path_steps=4, path_rate=0.5, epsilon=1e-3)
    given = model, optimizer, task(chain_rows(16, 2, 1)), chain_rows(12, 3, 5)
    found = probe.measure(*given)
    monkeypatch.setattr(together, "MOST_ENTRIES_CPU", 500)
    other = probe.measure(*given).token_derivatives
    # A norm is summed piece by piece, so a stride differs in its last digits.
    np.testing.assert_allclose(other, found.token_derivatives, atol=1e-3 * float(found.token_derivatives.std()))


def models_of_heads() -> dict[str, Any]:
    """By what becomes of the logits; the first two have a plain head."""
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPTJConfig,
        GPTJForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    gptj = GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64)
    return {
        "tied": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
        "bias": GPTJForCausalLM(gptj),
        "cap": Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=5.0)),
        "scale": CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25)),
        "division": GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)),
    }


def mixed_rows() -> TokenRows:
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 64, length) for length in (12, 5, 9, 12, 2, 7)]
    labels = [np.where(generator.random(len(row)) < 0.4, -100, row) for row in ids]
    return TokenRows.from_lists(ids, labels)


def test_losses_made_in_the_head_are_those_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = mixed_rows()
    close = 1e-12 if int(transformers.__version__.split(".")[0]) >= 5 else 1e-6  # older ones make logits float32
    for name, model in models_of_heads().items():
        model.double().eval()
        monkeypatch.undo()
        wanted = token_losses(model, rows)
        loss = mean_loss_gradient(model, rows)
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        monkeypatch.setattr(micro_batches, "_MAX_LOGITS_BYTES_CPU", 4 * 64 * 3)  # three tokens of 64 logits
        monkeypatch.setattr(output_head, "CHUNK_BYTES_CPU", 4 * 64 * 5)
        assert output_head.has_plain_head(model) == (name in ("tied", "bias")), name
        assert micro_batches.most_tokens(model, 1000) == (1000 if name in ("tied", "bias") else 3)
        np.testing.assert_allclose(token_losses(model, rows), wanted, rtol=close, err_msg=name)
        assert mean_loss_gradient(model, rows) == pytest.approx(loss, rel=close)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-8)  # rotary is float32
        assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("autocast", [False, True])
def test_losses_made_in_the_head_have_the_precision_of_the_run(
    make_tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    model = make_tiny_model(tie_word_embeddings=True).eval()
    model = model if autocast else model.to(torch.bfloat16)
    rows = WeightedRows(mixed_rows(), np.linspace(0.5, 1.5, int(mixed_rows().num_targets.sum()), dtype=np.float32))
    found = []
    for limit in (2**20, 4 * 64 * 3):
        monkeypatch.setattr(micro_batches, "_MAX_LOGITS_BYTES_CPU", limit)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = token_losses(model, rows)
            mean_loss_gradient(model, rows)
        found.append((losses, [parameter.grad.float() for parameter in model.parameters()]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert float((a - b).norm() / a.norm()) < 2e-2  # sums over the rows of a chunk are rounded to 16 bits


def test_a_head_that_others_look_at_is_left_alone(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model()
    model.lm_head.register_forward_hook(lambda *_: None)
    assert not output_head.has_plain_head(model)
    other = make_tiny_model()
    other.lm_head = nn.Sequential(other.lm_head)
    assert not output_head.has_plain_head(other)
    before = copy.deepcopy(other.state_dict())
    likelihood(other, chain_rows(2, 0, 1).batch(np.arange(2), "cpu"))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(("processes", "points"), [(1, 32), (4, 32), (8, 16), (64, 2), (256, 1)])
def test_a_point_of_sharded_weights_has_a_passage_for_each_process(processes: int, points: int) -> None:
    assert num_path_points(32, 128, processes) == points
