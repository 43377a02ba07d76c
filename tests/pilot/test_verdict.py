"""Go, no-go and measure more, each from findings that are made up so that they must lead there."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from mates_hf.pilot.estimates import Estimate, estimate, first_reached, mean_loss
from mates_hf.pilot.verdict import Findings, Verdict, decide
from tests.pilot.kit import settings


def made(mean: float, deviation: float | None = 0.01, passages: float = 0.0, num: int = 3) -> Estimate:
    return Estimate(
        mean=mean, seed_deviation=None if num == 1 else deviation, passage_half=passages, num_seeds=num
    )  # fmt: skip


GOOD = Findings(
    weak_rounds=[0, 1, 0], num_rounds=[4, 4, 4], difference=made(-0.1), log_gain=made(math.log(1.3)),
    harm={"pool": made(0.05), "a": made(0.02)}, idle=0.01, break_even=1.02, smaller=10,
    shorter=100,
)  # fmt: skip


def verdict(changes: dict[str, object] | None = None, **asked: object) -> Verdict:
    return decide(dataclasses.replace(GOOD, **(changes or {})), settings(**asked))


def states(found: Verdict) -> dict[str, str]:
    return {one.name: one.state for one in found.criteria}


def test_a_clear_gain_is_a_go() -> None:
    found = verdict(protected=["pool", "a"])
    assert found.decision == "go"
    assert states(found) == {
        "signal": "not met",
        "filter": "not met",
        "harm": "not met",
        "idle": "not met",
        "scale": "not met",
    }
    assert len(found.criteria) == 6
    assert "1.2" in found.reason  # the lower end, not the mean of 1.3
    assert "1.020 times" in found.reason


@pytest.mark.parametrize(
    ("changes", "asked", "name", "words"),
    [
        ({"weak_rounds": [0, 2, 1]}, {}, "signal", "2 of 4 rounds"),
        ({"difference": made(0.02)}, {}, "filter", "as good at equal FLOPs"),
        ({"difference": made(-0.001, 0.05)}, {}, "filter", "as good at equal FLOPs"),
        ({"harm": {"pool": made(0.3)}}, {"protected": ["pool"]}, "harm", "allowed 0.1 nats/token"),
        ({"idle": 0.051}, {}, "idle", "at most 5.10%"),
    ],
)
def test_each_kill_criterion_is_a_no_go(
    changes: dict[str, object], asked: dict[str, object], name: str, words: str
) -> None:
    found = verdict(changes, **asked)
    assert found.decision == "no-go"
    assert words in found.reason
    assert states(found)[name] == "met"
    assert [other for other, state in states(found).items() if state == "met"] == [name]


def test_limits_are_those_that_were_asked_for() -> None:
    assert verdict({"weak_rounds": [0, 2, 1]}, weak_rounds=3).decision == "go"
    assert verdict({"idle": 0.051}, max_idle=0.06).decision == "go"
    harmed = {"harm": {"pool": made(0.3), "a": made(0.02)}}
    assert verdict(harmed, protected=["pool"], max_harm=0.5).decision == "go"
    assert verdict(harmed, protected=["a"]).decision == "go"  # who is not protected kills nothing
    assert states(verdict(harmed))["harm"] == "not asked"


def test_a_gain_below_the_cost_of_rounds_is_a_no_go() -> None:
    found = verdict({"log_gain": made(math.log(1.1)), "break_even": 1.4})
    assert found.decision == "no-go"
    assert "upper end" in found.reason


def test_an_interval_that_does_not_decide_asks_for_seeds() -> None:
    wide = made(-0.1, 0.07)  # three seeds: half an interval is 0.174
    found = verdict({"difference": wide})
    assert found.decision == "measure more"
    assert found.more_seeds == 2
    assert "2 more seeds would" in found.reason
    # What was said holds: with so many seeds of that spread the interval leaves zero out, with one less it does not.
    after = [dataclasses.replace(wide, num_seeds=wide.num_seeds + more) for more in (1, 2)]
    assert [one.high < 0 for one in after] == [False, True]
    # Who would run no further seeds runs the filter.
    assert verdict({"difference": wide}, more_seeds=1).decision == "no-go"


def test_a_gain_that_hardly_pays_asks_for_seeds() -> None:
    found = verdict({"log_gain": made(math.log(1.1), 0.05)})
    assert found.decision == "measure more"
    assert found.more_seeds is not None
    assert found.more_seeds > 0
    assert states(found)["filter"] == "not met"


def test_passages_may_be_what_is_missing() -> None:
    found = verdict({"log_gain": made(math.log(1.1), 0.01, passages=0.2)})
    assert found.decision == "measure more"
    assert found.more_seeds is None
    assert "more held-out passages" in found.reason


def test_a_protected_group_may_be_open() -> None:
    found = verdict({"harm": {"a": made(0.06, 0.02)}}, protected=["a"])
    assert (found.decision, states(found)["harm"]) == ("measure more", "open")


@pytest.mark.parametrize("gain", [1.0, 1.5, 100.0])
@pytest.mark.parametrize("difference", [-5.0, -0.1, 0.0, 0.1])
def test_one_seed_is_never_a_go(gain: float, difference: float) -> None:
    one = {"difference": made(difference, num=1), "log_gain": made(math.log(gain), num=1), "harm": {}}
    found = verdict({**one, "weak_rounds": [0], "num_rounds": [4]})
    assert found.decision == "measure more"
    assert found.more_seeds == 2
    assert verdict({**one, "weak_rounds": [2], "num_rounds": [4]}).decision == "no-go"  # needs no interval


@pytest.mark.parametrize("changes", [{"smaller": 775.0}, {"shorter": 84_000.0}])
def test_a_pilot_that_is_far_too_small_is_never_a_go(changes: dict[str, object]) -> None:
    found = verdict(changes)
    assert (found.decision, found.more_seeds) == ("measure more", 0)
    assert "run one of about 41 million parameters and 260 million tokens" in found.reason
    assert verdict({**changes, "weak_rounds": [2, 0, 0]}).decision == "no-go"
    assert verdict(changes, max_smaller=1_000, max_shorter=1e5).decision == "go"
    # Where seeds are missing as well, they come first.
    assert "more seeds would" in verdict({**changes, "difference": made(-0.1, 0.07)}).reason


# --- estimates ---


def test_an_interval_is_that_of_t_and_widened_by_passages() -> None:
    values = [1.0, 2.0, 4.0]
    found = estimate(lambda weights: values, 10)
    assert (found.mean, found.passage_half) == (pytest.approx(7 / 3), 0.0)
    # Student's t with two degrees of freedom, 4.303, by hand.
    assert found.half == pytest.approx(4.30265 * np.std(values, ddof=1) / 3**0.5, rel=1e-4)
    wider = dataclasses.replace(found, passage_half=3.0)
    assert wider.half == pytest.approx(math.hypot(found.half or 0.0, 3.0))
    assert estimate(lambda weights: [1.0], 10).half is None


def test_the_interval_over_passages_is_that_of_their_mean() -> None:
    rng = np.random.default_rng(0)
    sums, tokens = rng.standard_normal(400), np.ones(400)
    found = estimate(lambda weights: [float(mean_loss(sums, tokens, weights))] * 2, 400)
    assert found.seed_deviation == 0
    assert found.passage_half == pytest.approx(1.96 * sums.std() / 20, rel=0.15)  # of 400 resamples


def test_a_curve_reaches_a_loss_between_two_marks() -> None:
    steps, losses = np.array([10.0, 20.0, 30.0]), np.array([5.0, 4.0, 3.5])
    assert first_reached(steps, losses, 4.5) == 15
    assert first_reached(steps, losses, 5.0) == 10
    assert first_reached(steps, losses, 3.5) == 30
    assert first_reached(steps, losses, 3.4) is None
