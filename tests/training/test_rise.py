"""A reference loss that rose while a selection was trained on: when it says so, what follows, records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mates_hf import DirectionalProbe, MatesCallback, NgramInfluenceModel, OneStepProbe, load_round
from mates_hf.disk import read_json
from mates_hf.errors import WeakSignalError
from mates_hf.influence.passes import token_losses
from mates_hf.reporting.lines import round_line
from mates_hf.round_record import round_facts
from mates_hf.training.rise import MIN_RISE, Course, Rise, find_rise, rises_after
from mates_hf.training.verify import verify_run
from tests.training.kit import Result, Stop, make_arguments, make_pool, make_reference, run, small_config
from tests.training.test_guard import Changed
from tests.training.test_trust import infos
from tests.training.test_verify import forge

# --- the rule ---

INFO: dict[str, Any] = {
    "guard": {"decision": "select"},
    "reference": {"digest": "a"},
    "averaged_steps": 4,
    "probe": {"learning_rates": [1e-3, 2e-3]},
}


def losses(values: Any, tokens: Any = None) -> np.ndarray:
    return np.stack([values, np.full(len(values), 9) if tokens is None else tokens], 1).astype(np.float32)


def risen(before: np.ndarray, now: np.ndarray, info: Any = None, after: Any = None) -> Rise | None:
    return find_rise(Course({**INFO, **(after or {})}, now), Course({**INFO, **(info or {})}, before))


def test_a_rise_is_the_change_of_the_mean_over_tokens_with_an_interval_over_passages():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 40, 200)
    tokens[:5] = 0
    before = rng.normal(3, 1, 200)
    change = rng.normal(0.2, 0.4, 200)
    found = risen(losses(before, tokens), losses(before + change, tokens))
    assert found is not None
    assert found.rise == pytest.approx(np.average(change, weights=tokens), abs=1e-5)
    assert found.is_harm
    means = [np.average(change[i], weights=tokens[i]) for i in (rng.integers(5, 200, 195) for _ in range(2_000))]
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.96 * np.std(means), rel=0.1)
    same = risen(losses(before), losses(before + np.where(np.arange(200) % 2, 1.0, -0.9)))
    assert same is not None
    assert same.interval[0] < 0 < same.rise
    assert not same.is_harm
    small = risen(losses(before), losses(before + 0.5 * MIN_RISE))
    assert small is not None
    assert small.interval[0] > 0
    assert not small.is_harm  # of all passages alike, and less than a step's noise


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": {"digest": "b"}},
        {"averaged_steps": 1},
        {"averaged_steps": None},
        {"probe": {"learning_rates": [1e-3, 3e-3]}},
    ],
    ids=["passages", "live-weights", "earlier-version", "rate"],
)
def test_nothing_is_said_where_something_else_may_have_raised_the_loss(changes):
    before, now = losses(np.ones(20)), losses(np.full(20, 2.0))
    assert risen(before, now) is not None
    assert risen(before, now, after=changes) is None
    assert risen(before, now, info={"guard": {"decision": "own_order"}}) is None
    assert risen(before, now, info={"probe": {}}) is not None  # a probe that does not say its rates
    assert risen(before, now, after={"probe": {"learning_rates": [1e-3, 1e-3]}}) is not None
    assert risen(before[:12], now) is None
    assert risen(before, losses(np.full(20, 2.0), np.arange(20))) is None
    assert risen(before, losses(np.full(20, np.nan))) is None
    assert risen(before[:7], now[:7]) is None


def test_on_probation_a_loss_must_fall_as_fast_as_in_the_own_order_before():
    rng = np.random.default_rng(1)
    start = rng.normal(4, 1, 64)
    own = Course({**INFO, "guard": {"decision": "own_order"}, "step": 10}, losses(start))
    last = Course({**INFO, "step": 20}, losses(start - 0.2 - 0.1 * rng.random(64)))
    now = Course({**INFO, "step": 25}, losses(last.losses[:, 0] - 0.02))  # half as long, a tenth as far
    alone, compared = find_rise(now, last), find_rise(now, last, own)
    assert alone is not None
    assert compared is not None
    assert (alone.is_harm, alone.beyond_own_order) == (False, False)
    assert (compared.is_harm, compared.beyond_own_order) == (True, True)
    fell = np.mean(last.losses[:, 0] - own.losses[:, 0])
    assert compared.rise == pytest.approx(-0.02 - 0.5 * fell, rel=1e-4)
    selected = Course({**own.info, "guard": {"decision": "select"}}, own.losses)
    assert find_rise(now, last, selected) == alone
    assert find_rise(now, last, Course({**own.info, "averaged_steps": 9}, own.losses)) == alone


def test_rises_that_come_back_double_the_rounds_in_the_own_order():
    harm, fall = Rise(0.5, (0.4, 0.6)), Rise(-0.5, (-0.6, -0.4))

    def lengths(num_good: int) -> list[int]:
        """Rounds in the own order after each of four rises, with some good rounds in between."""
        known: dict[str, int] = {}
        found = []
        for _ in range(4):
            known, is_own = rises_after(known, "select", harm)
            found.append(int(is_own))
            while is_own:
                known, is_own = rises_after(known, "own_order", None)
                found[-1] += is_own
            for _ in range(num_good):
                known, is_own = rises_after(known, "select", fall)
                assert not is_own
        return found

    assert lengths(0) == [1, 4, 16, 64]
    assert lengths(1) == [1, 2, 4, 8]
    assert lengths(2) == [1, 1, 1, 1]
    assert rises_after({"mistrust": 1, "own_order_left": 0}, "select", fall) == ({}, False)
    assert rises_after({}, "own_order", None) == ({}, False)
    assert rises_after({}, None, None) == ({}, False)
    # Nothing to compare with changes nothing; a guard that is ignored leaves no round in the own order.
    known = {"mistrust": 2, "own_order_left": 1}
    assert rises_after(known, "select", None) == (known, False)


# --- what labels record ---


@pytest.mark.parametrize("probe", [DirectionalProbe(), DirectionalProbe(path_steps=4), OneStepProbe()], ids=str)
def test_labels_have_the_loss_of_each_passage_where_the_null_step_ends(probe, tmp_path):
    reference, pool = make_reference(24), make_pool(60)
    trained = run(make_arguments(tmp_path, max_steps=3), [])
    model, optimizer = trained.trainer.model, trained.trainer.optimizer
    found = probe.measure(model, optimizer, reference, pool.select(range(20))).reference_losses
    assert found is not None
    assert found.dtype == np.float32
    assert found[:, 1].tolist() == reference.measured.num_targets.tolist()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW.step(getattr(optimizer, "optimizer", optimizer))  # the null step
    means = token_losses(model.eval(), reference.measured).reshape(24, -1).mean(1)
    np.testing.assert_allclose(found[:, 0], means, rtol=2e-5)


# --- a probe whose sign is wrong: each selection buys harm ---


def train(
    path: Path, stop: int | None = None, resume: str | None = None, how: str = "negative", **config: Any
) -> Result:
    sizes = {"update_steps": 12, "first_round_steps": 3, "switch_lead_steps": 1, "average_steps": 1}
    more = {"selection_ratio": 0.5, "num_probes": 160, "held_out_fraction": 0.4, "on_weak_signal": "own_order"}
    callback = MatesCallback(
        make_reference(48),
        small_config(**{**sizes, **more, **config}),
        probe=Changed(DirectionalProbe(), 0, how),
        influence_model=NgramInfluenceModel(num_buckets=256),
    )
    args = make_arguments(path, max_steps=60, lr_scheduler_type="constant", save_strategy="steps", save_steps=4)
    args.logging_steps = 100
    return run(args, [callback, *([Stop(stop)] if stop else [])], make_pool(900), resume=resume)


def loss_of(result: Result) -> float:
    reference = make_reference(48)
    return float(token_losses(result.trainer.model.eval(), reference.measured).mean())


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("harmed")
    return path, train(path)
