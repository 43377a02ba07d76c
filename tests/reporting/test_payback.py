"""`mates-hf plan`: shares, hours and money of rounds, and the gain from which on selecting pays."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mates_hf.cli import main
from mates_hf.config import MatesConfig
from mates_hf.reporting.forecast import RunSize, predict_cost
from mates_hf.reporting.payback import GAINS, Machine, plan_selection

SIZE = RunSize(
    num_parameters=405_334_016, num_looked_up=51_511_296, tokens_per_row=1_024, batch_rows=512, max_steps=50_000,
    num_passages=1_024, tokens_per_passage=90,
)  # fmt: skip
MACHINE = Machine(num_devices=8, flops_per_second=4e14, price=2.5)
CONFIG = MatesConfig(update_steps=1_000)
ARGUMENTS = ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524,288"]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*ARGUMENTS, *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_hours_and_money_follow_from_flops() -> None:
    plan = plan_selection(SIZE, MACHINE, CONFIG)
    assert plan.cost == predict_cost(SIZE, CONFIG)
    hours = plan.cost.training_flops / (8 * 4e14) / 3600
    assert plan.training_hours == pytest.approx(hours)
    assert plan.price_of_training == pytest.approx(hours * 8 * 2.5)
    assert plan.price_of_rounds == pytest.approx(plan.overhead * hours * 8 * 2.5)
    assert plan.device_hours / hours == pytest.approx(plan.cost.share_of_training / 0.8, rel=1e-3)
    assert plan.overhead == pytest.approx((plan.device_hours + plan.idle_hours) / hours)
    # Each token that is scored is scored once, at the speed of two cores.
    scoring = plan.cost.scored_tokens / MACHINE.score_tokens_per_second / 3600
    fitting = plan.cost.labelled_tokens / MACHINE.fit_tokens_per_second / 3600
    assert plan.idle_hours == pytest.approx(scoring + fitting)


def test_money_scales_with_the_price_and_nothing_else_does() -> None:
    cheap, dear = (plan_selection(SIZE, dataclasses.replace(MACHINE, price=price), CONFIG) for price in (1.0, 7.0))
    assert dear.price_of_rounds == pytest.approx(7 * cheap.price_of_rounds)
    for one, other in zip(cheap.paybacks, dear.paybacks, strict=True):
        assert other.saved_money == pytest.approx(7 * one.saved_money)
        assert (other.saved_share, other.saved_hours) == (one.saved_share, one.saved_hours)
    free = plan_selection(SIZE, dataclasses.replace(MACHINE, price=None), CONFIG)
    assert free.price_of_training is free.price_of_rounds is free.paybacks[0].saved_money is None


def test_it_pays_from_the_gain_on_that_rounds_cost() -> None:
    plan = plan_selection(SIZE, MACHINE, CONFIG)
    assert [one.gain for one in plan.paybacks] == list(GAINS)
    assert plan.break_even == 1 + plan.overhead
    for one in plan.paybacks:
        assert (one.saved_share > 0) == (one.gain > plan.break_even)
    assert plan.paybacks[0].saved_share == pytest.approx(-plan.overhead)  # no gain: rounds are lost
    assert plan.paybacks[-1].saved_share == pytest.approx(1 - (1 + plan.overhead) / 2)


@pytest.mark.parametrize(("steps", "num_rounds"), [(500_000, 50), (50_000, 20), (2_000, 3)])
def test_the_proposed_rounds_are_as_short_as_they_may_be(steps: int, num_rounds: int) -> None:
    size = dataclasses.replace(SIZE, max_steps=steps)
    plan = plan_selection(size, MACHINE)
    assert plan.is_proposed
    assert plan.cost.num_rounds >= num_rounds
    waits_for_fit = plan.cost.labelled_tokens / MACHINE.fit_tokens_per_second / 3600
    assert (plan.device_hours + waits_for_fit) / plan.training_hours <= 0.01
    shorter = MatesConfig(update_steps=plan.config.update_steps // 5, num_probes=plan.config.num_probes)
    dearer = plan_selection(size, MACHINE, shorter)
    assert dearer.device_hours > plan.device_hours
    # A slower machine hides more of what runs on a CPU, so rounds may be shorter.
    slow = plan_selection(size, dataclasses.replace(MACHINE, flops_per_second=4e13))
    assert slow.config.update_steps <= plan.config.update_steps


def test_the_pool_that_rounds_want_is_what_they_draw() -> None:
    plan = plan_selection(SIZE, MACHINE, CONFIG)
    rows = plan.cost.scored_tokens * CONFIG.selection_ratio
    own = SIZE.trained_tokens - rows
    assert plan.pool_tokens == pytest.approx(own + plan.cost.scored_tokens + plan.cost.labelled_tokens)
    assert not [text for text in plan.warnings if "the pool has" in text]
    short = plan_selection(SIZE, MACHINE, CONFIG, pool_tokens=30e9)
    assert "the pool has 30B tokens and rounds want" in short.warnings[-1]


def test_it_warns_where_it_hardly_pays() -> None:
    # 125 million parameters on eight fast devices: the CPU cannot keep up.
    small = dataclasses.replace(SIZE, num_parameters=125_000_000, num_looked_up=38_000_000, max_steps=5_000)
    warnings = plan_selection(small, MACHINE, MatesConfig(update_steps=200)).warnings
    assert any("rounds may take" in text for text in warnings)
    assert any("devices may wait" in text for text in warnings)
    two = plan_selection(dataclasses.replace(SIZE, max_steps=200), MACHINE, MatesConfig(update_steps=100)).warnings
    assert any("too few to follow the model" in text for text in two)
    none = plan_selection(dataclasses.replace(SIZE, max_steps=90), MACHINE, MatesConfig(update_steps=100))
    assert none.cost.num_rounds == 0
    assert none.paybacks == ()
    (text,) = none.warnings
    assert "no round takes effect" in text
    assert "of 90." in text
    assert not any("pays" in line.split()[0] for line in none.lines())


@pytest.mark.parametrize("name", ["num_devices", "flops_per_second", "price", "score_tokens_per_second"])
def test_impossible_machines_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be above 0, got 0"):
        Machine(**{name: 0})


# --- the command ---


def test_lines_say_price_and_break_even(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--price", "2.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run       410M parameters, 26B tokens in 49,591 steps")
    assert lines[1].startswith("proposed  MatesConfig(update_steps=")
    assert "price" in lines[0]
    assert sum(line.startswith("            at ") for line in lines) == len(GAINS)
    assert max(map(len, lines)) < 200


def test_json_has_all_of_it_and_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--update-steps", "500", "--num-probes", "1000", "--devices", "16", "--price", "3")
    assert found["config"] == {"update_steps": 500, "num_probes": 1000}
    assert not found["is_proposed"]
    assert found["machine"]["num_devices"] == 16
    assert found["break_even"] == pytest.approx(1 + found["overhead"])
    assert found["price_of_training"] == pytest.approx(3 * 16 * found["training_hours"])
    assert set(found["cost"]) >= {"num_rounds", "stages", "share_of_training"}
    assert found["size"]["batch_rows"] == 512


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--num-probes", "500"], "`--update-steps` must be given with `--num-probes`"),
        (["--row-tokens", "1M"], "`--batch-tokens` must be at least a row's"),
        (["--looked-up", "500M"], "`num_looked_up` must be at least 0 and below `num_parameters`"),
        (["--price", "0"], "`price` must be above 0"),
        (["--update-steps", "0"], "`update_steps` must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, *arguments]) == 1
    said = capsys.readouterr().err
    assert match in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("number", ["many", "4x", "-3", ""])
def test_no_number_is_a_wrong_use(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        main(["plan", "--params", number, "--tokens", "1B", "--batch-tokens", "1k"])
    assert found.value.code == 2
    assert "must be a number such as 410M" in capsys.readouterr().err or number == "-3"
