"""A model compiled in any way: nothing that looks at it compiles a graph, nor has training compile one again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from mates_hf.data.pool import CandidatePool
from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.digest import weight_marks, weights_digest
from mates_hf.engine.model_traits import unwrap
from mates_hf.engine.preserve import undisturbed
from mates_hf.influence import compiled
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from tests.training.kit import make_model, make_pool, make_reference

pytestmark = pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 cannot")


class Graphs:
    """A backend that counts what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.num += 1
        return graph.forward


def in_place(model: nn.Module, graphs: Graphs) -> nn.Module:
    model.compile(backend=graphs)
    return model


def layers_in_place(model: Any, graphs: Graphs) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend=graphs)
    return model


def layers_replaced(model: Any, graphs: Graphs) -> nn.Module:
    """As accelerate's regional compilation does."""
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend=graphs)
    return model


def wrapped(model: nn.Module, graphs: Graphs) -> nn.Module:
    return torch.compile(model, backend=graphs)


WAYS = [in_place, layers_in_place, layers_replaced, wrapped]
SLOW = [pytest.param(way, True, marks=pytest.mark.slow) for way in WAYS if way is not layers_in_place]


@pytest.mark.parametrize(("compile_it", "before"), [(layers_in_place, True), *SLOW, *((way, False) for way in WAYS)])
def test_nothing_is_compiled_by_probe_audit_digest_or_evaluation(compile_it: Any, before: bool) -> None:
    torch.compiler.reset()
    graphs, inner = Graphs(), make_model()
    model = compile_it(inner, graphs)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)
    ids = torch.tensor(make_pool(8)["input_ids"])

    def train() -> None:
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if before:
        train()
        train()
        assert graphs.num
    else:  # a state, without a forward pass of the compiled model
        for parameter in inner.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    compiled = graphs.num
    average = WeightAverage(unwrap(model))
    average.update()
    with average.swapped_in():
        weights_digest(unwrap(model))
        weight_marks(unwrap(model))
        for probe in (DirectionalProbe(), DirectionalProbe(path_steps=4, second_moment="batches", batch_rows=2),
                      OneStepProbe()):  # fmt: skip
            labels = probe.measure(model, optimizer, make_reference(8), CandidatePool(make_pool(9), None))
            assert np.isfinite(labels.influence).all()
    with undisturbed(unwrap(model)), torch.no_grad():
        unwrap(model).eval()(input_ids=ids[:3, :5])
    assert graphs.num == compiled
    if before:
        train()
        assert graphs.num == compiled
    torch.compiler.reset()


def probed_with(
    backend: Any, monkeypatch: pytest.MonkeyPatch, *, lengths: int = 1, model: Any = None, **settings: Any
) -> tuple[Any, Any, nn.Module]:
    """Labels eagerly and with compiled layers, and the model."""
    monkeypatch.setattr(compiled, "BACKEND", backend)
    model = make_model() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor(make_pool(8)["input_ids"])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    rows = [row[: 12 - i % lengths] for i, row in enumerate(make_pool(43)["input_ids"])]
    pool = Dataset.from_dict({"input_ids": rows, "labels": rows})
    probe = DirectionalProbe(epsilon=3e-2, tokens_per_batch=12 * 4, **settings)
    found = [
        dataclasses.replace(probe, compile_layers=compiles).measure(model, optimizer, make_reference(), pool)
        for compiles in (False, True, True)
    ]
    assert np.array_equal(found[1].influence, found[2].influence)
    return found[0].influence, found[1].influence, model


def test_probes_run_compiled_layers_where_rows_have_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs()
    eager, found, model = probed_with(graphs, monkeypatch)
    assert np.array_equal(eager, found)
    assert graphs.num == 1  # for all layers, either side and both times
    assert not any(module._compiled_call_impl for module in model.modules())
    probed_with(graphs, monkeypatch, lengths=3)
    ours = make_model()
    probed_with(graphs, monkeypatch, model=layers_in_place(ours, Graphs()))
    assert graphs.num == 1


def test_a_compiler_that_fails_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no compiler here")

    eager, found, _ = probed_with(broken, monkeypatch)
    assert np.array_equal(eager, found)
    told = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert len(told) == 1
    assert "no compiler here" in told[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs one of C++")
def test_labels_of_layers_that_torch_compiled_are_those_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, found, _ = probed_with("inductor", monkeypatch)
    assert not np.array_equal(eager, found)  # its sums have another order
    np.testing.assert_allclose(found, eager, rtol=0, atol=1e-5 * np.abs(eager).max())
