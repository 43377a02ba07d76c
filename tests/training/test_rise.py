"""A reference loss that rose while a selection was trained on: when it says so, what follows, records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mates_hf import DirectionalProbe, MatesCallback, NgramInfluenceModel, OneStepProbe, load_round
from mates_hf.disk import write_array, write_json
from mates_hf.errors import WeakSignalError
from mates_hf.influence.passes import token_losses
from mates_hf.reporting.lines import round_line
from mates_hf.round_record import round_facts
from mates_hf.training.rise import MIN_RISE, Boundary, Rise, course_after, find_rise, noise_of, rises_after
from mates_hf.training.verify import verify_run
from tests.training.kit import Result, make_arguments, make_pool, make_reference, run, small_config
from tests.training.test_guard import Changed
from tests.training.test_trust import SaveAt, as_killed, infos
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
    return find_rise(Boundary({**INFO, **(after or {})}, now), Boundary({**INFO, **(info or {})}, before))


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
    own = Boundary({**INFO, "guard": {"decision": "own_order"}, "step": 10}, losses(start))
    last = Boundary({**INFO, "step": 20}, losses(start - 0.2 - 0.1 * rng.random(64)))
    now = Boundary({**INFO, "step": 25}, losses(last.losses[:, 0] - 0.02))  # half as long, a tenth as far
    alone, compared = find_rise(now, last), find_rise(now, last, own)
    assert alone is not None
    assert compared is not None
    assert (alone.is_harm, alone.beyond_own_order) == (False, False)
    assert (compared.is_harm, compared.beyond_own_order) == (True, True)
    fell = np.mean(last.losses[:, 0] - own.losses[:, 0])
    assert compared.rise == pytest.approx(-0.02 - 0.5 * fell, rel=1e-4)
    selected = Boundary({**own.info, "guard": {"decision": "select"}}, own.losses)
    assert find_rise(now, last, selected) == alone
    assert find_rise(now, last, Boundary({**own.info, "averaged_steps": 9}, own.losses)) == alone


def test_a_rise_is_told_from_the_noise_of_boundaries_before_it():
    rng = np.random.default_rng(3)
    steps = np.cumsum(rng.integers(3, 30, 400))
    noisy = [
        [float(step), 3 - 1e-4 * step + 0.1 * value] for step, value in zip(steps, rng.normal(size=400), strict=True)
    ]
    assert noise_of(noisy) == pytest.approx(0.1, rel=0.1)
    assert noise_of([[step, 3 - 1e-4 * step] for step, _ in noisy]) == pytest.approx(0, abs=1e-9)
    assert noise_of(noisy[:3]) == 0
    before = losses(rng.normal(3, 1, 64))
    known = {"reference_course": noisy[-10:]}
    for size in (1.3, 4.0):  # of the noise's standard deviation; a rise is of two boundaries, so 2.3 are 5 %
        found = risen(before, losses(before[:, 0] + 0.1 * size), info=known)
        assert found is not None
        assert found.interval[0] > 0
        assert found.is_harm == (size > 2.3), found
    # Alarms of a loss that is noise alone, told of it by the nine boundaries before.
    alarms = 0
    for at in range(10, 400):
        pair = [
            Boundary({**INFO, "reference_course": noisy[at - 10 : at]}, losses(np.full(64, noisy[i][1])))
            for i in (at - 1, at)
        ]
        found = find_rise(pair[1], pair[0])
        assert found is not None
        alarms += found.is_harm
    assert 0.02 < alarms / 390 < 0.12


def test_a_course_holds_the_last_boundaries_and_none_of_a_mistrusted_selection():
    before = Boundary(
        {**INFO, "step": 10, "reference_course": [[float(i), 1.0] for i in range(10)]}, losses(np.ones(20))
    )
    now = Boundary({**INFO, "step": 20}, losses(np.full(20, 2.0)))
    found = course_after(before, now)
    assert len(found) == 10
    assert found[-2:] == [[9.0, 1.0], [20.0, 2.0]]
    mistrusted = {**INFO, "step": 20, "guard": {"decision": "own_order", "rises": {"mistrust": 2}}}
    assert course_after(before, now._replace(info=mistrusted)) == before.info["reference_course"]
    assert course_after(None, now) == [[20.0, 2.0]]
    assert course_after(before, Boundary({**now.info, "averaged_steps": 1}, now.losses)) == [[20.0, 2.0]]


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
    trained = run(make_arguments(tmp_path, max_steps=3, lr_scheduler_type="constant"), [])
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

STEPS = 120


def train(path: Path, max_steps: int = STEPS, resume: int | None = None, **config: Any) -> Result:
    sizes = {"update_steps": 12, "first_round_steps": 3, "switch_lead_steps": 1, "average_steps": 1}
    more = {"selection_ratio": 0.5, "num_probes": 160, "held_out_fraction": 0.4, "on_weak_signal": "own_order"}
    callback = MatesCallback(
        make_reference(48),
        small_config(**{**sizes, **more, **config}),
        probe=Changed(DirectionalProbe(), 0, "negative"),
        influence_model=NgramInfluenceModel(num_buckets=256),
    )
    args = make_arguments(path, max_steps=max_steps, lr_scheduler_type="constant", logging_steps=max_steps)
    checkpoint = None if resume is None else str(path / f"checkpoint-{resume}")
    return run(args, [SaveAt(SAVED), callback], make_pool(1_900), resume=checkpoint)


SAVED = (20, 31)  # before the first rise, which is found at step 21, and behind it


def loss_of(result: Result) -> float:
    return float(token_losses(result.trainer.model.eval(), make_reference(48).measured).mean())


@pytest.mark.slow
def test_a_selection_that_does_harm_is_left_and_the_run_ends_where_its_own_order_does(tmp_path):
    own = loss_of(train(tmp_path / "own", min_spearman=1.0, first_round_steps=None))
    ignored = loss_of(train(tmp_path / "ignored", on_weak_signal="select"))
    assert ignored > own + 2
    assert {info["guard"]["decision"] for info in infos(tmp_path / "ignored")} == {"select"}
    for name, first in (("grows", 3), ("fixed", None)):
        path = tmp_path / name
        found = loss_of(train(path, first_round_steps=first))
        assert found < own + 0.4, (name, found, own)  # of 3.5 nats that the run takes off
        failed = [info["guard"]["failed"] for info in infos(path)]
        assert failed.count("loss_rose") > len(failed) / 3
        assert any(info["rise"] and info["rise"]["beyond_own_order"] for info in infos(path))
        assert verify_run(path).problem is None
    assert verify_run(tmp_path / "ignored").problem is None


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("harmed")
    return path, train(path, max_steps=42)


def test_a_rise_is_recorded_told_and_answered_by_a_short_round_in_the_own_order(harmed, caplog):
    path, result = harmed
    found = infos(path)
    at = next(i for i, info in enumerate(found) if info["guard"]["failed"] == "loss_rose")
    rose, before = found[at], found[at - 1]
    assert rose["guard"]["decision"] == "own_order"
    assert rose["rise"]["rise"] > max(MIN_RISE, rose["rise"]["noise"])
    assert rose["rise"]["interval"][0] > 0
    assert rose["guard"]["rises"] == {"mistrust": 2, "own_order_left": 0}
    assert (before["round_steps"], rose["round_steps"]) == (6, 3)
    means = [np.load(path / f"_mates/round-{info['number']:04d}/reference_losses.npy")[:, 0].mean() for info in found]
    assert rose["rise"]["rise"] == pytest.approx(means[at] - means[at - 1], rel=1e-3)
    assert before["reference_course"] == rose["reference_course"]
    assert before["reference_course"][-1] == pytest.approx([before["step"], means[at - 1]], rel=1e-5)
    history = [entry for entry in result.trainer.state.log_history if entry.get("mates/round") == rose["number"]]
    assert history[0]["mates/reference_rise"] == rose["rise"]["rise"]
    assert "the reference loss rose by 0." in round_line(rose)
    assert "the Trainer's own order until the next round" in round_line(rose)
    record = load_round(path / f"_mates/round-{rose['number']:04d}")
    assert "the reference loss rose by 0." in round_facts(record)["signal"]
    assert verify_run(path).problem is None


def test_a_run_that_must_not_go_on_after_harm_ends(tmp_path):
    with pytest.raises(WeakSignalError, match=r"the reference loss rose by 0\.\d+ nats/token .* did harm"):
        train(tmp_path, max_steps=30, on_weak_signal="error")


@pytest.mark.quick("31")
@pytest.mark.parametrize("step", SAVED)
def test_a_run_killed_after_a_rise_goes_on_exactly(harmed, tmp_path, step):
    path, whole = harmed
    copied = as_killed(path, tmp_path / "run", step)
    rest = train(copied, max_steps=42, resume=step)
    assert rest.rows == whole.rows[step * 4 :]
    assert all(torch.equal(value, rest.weights[name]) for name, value in whole.weights.items())
    for name in ("guard", "rise", "reference_course", "round_steps", "order_sha256"):
        assert [info[name] for info in infos(copied)] == [info[name] for info in infos(path)], name


@pytest.mark.slow
def test_a_run_that_began_without_losses_of_passages_goes_on(harmed, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(harmed[0], copied)
    for info in infos(harmed[0]):
        folder = copied / f"_mates/round-{info['number']:04d}"
        if info["step"] > 20:
            shutil.rmtree(folder)
            continue
        (folder / "reference_losses.npy").unlink()
        old = {
            name: value for name, value in info.items() if name not in ("rise", "reference_course", "averaged_steps")
        }
        (folder / "round.json").unlink()
        write_json(folder / "round.json", old)
        forge(folder)
    rest = train(copied, max_steps=42, resume=20)
    assert rest.trainer.state.global_step == 42
    first = next(info for info in infos(copied) if info["step"] > 20)
    assert first["rise"] is None
    assert len(first["reference_course"]) == 1
    assert verify_run(copied).problem is None


@pytest.mark.parametrize("case", ["rise", "losses", "rises", "failed", "course"])
def test_what_was_changed_of_a_rise_is_found_and_named(harmed, tmp_path, case):
    shutil.copytree(harmed[0] / "_mates", tmp_path / "_mates")
    rose = next(info for info in infos(harmed[0]) if info["guard"]["failed"] == "loss_rose")
    path = tmp_path / f"_mates/round-{rose['number']:04d}"
    guard, rise = rose["guard"], rose["rise"]
    changes: dict[str, Any] = {}
    if case == "rise":
        changes["rise"] = {**rise, "rise": -rise["rise"]}
    elif case == "losses":
        losses_ = np.load(path / "reference_losses.npy")
        write_array(path / "reference_losses.npy", losses_ - np.float32([1, 0]))
    elif case == "rises":
        changes["guard"] = {**guard, "rises": {"mistrust": 4, "own_order_left": 3}}
    elif case == "failed":
        changes["guard"] = {**guard, "failed": "interval"}
    else:
        changes["reference_course"] = [*rose["reference_course"], [99.0, 1.0]]
    forge(path, **changes)
    problem = verify_run(tmp_path).problem
    assert problem is not None
    assert (problem.round, problem.file) == (path.name, "round.json")
    what = {"rise": "`rise` {'rise': ", "losses": "`rise` {'rise': -", "rises": "`rises` of `guard` {'mistrust': 2"}
    what |= {"failed": "`round_steps` 6", "course": "`reference_course` [["}
    assert what[case] in problem.expected
