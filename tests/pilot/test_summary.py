"""Figures of a pilot, from results that are made up: by hand, and with the signs turned round."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mates_hf.config import MatesConfig
from mates_hf.pilot.page import page_data, render_lines, render_page
from mates_hf.pilot.schedule import Schedule, make_schedule, require_rows, shape_for
from mates_hf.pilot.summary import Summary, summarise
from mates_hf.pilot.verdict import decide
from mates_hf.reporting.forecast import RunSize
from mates_hf.reporting.payback import Machine, SelectionPlan, plan_selection
from tests.pilot.kit import made_unit, settings

SCHEDULE = Schedule(
    start=10, steps=20, longest=40, marks=(10, 20, 30), batch_rows=4, config={"update_steps": 10, "num_probes": 24},
    num_candidates=400, rows_needed=500,
)  # fmt: skip
LATER = (10, 20, 30, 40, 50)
SHARES = {"a": 0.75, "b": 0.25}
SIZE = RunSize(
    num_parameters=405_334_016, num_looked_up=51_511_296, tokens_per_row=1_024, batch_rows=512, max_steps=50_000,
    num_passages=1_024, tokens_per_passage=90,
)  # fmt: skip
PLAN = plan_selection(SIZE, Machine(price=2.5), MatesConfig(update_steps=1_000))


def results(shift: float = 0.0, *, seeds: int = 3, **ours: Any) -> dict[str, list[dict[str, Any]]]:
    """The filter falls from 6 to 5 to 4.5; ours is at 4.5 after 20 steps, and at 4 at the end."""
    rounds = {"rounds": [(0.2, 0.6), (0.1, 0.5)], **ours}
    found: dict[str, list[dict[str, Any]]] = {"random": [], "filter": [], "ours": []}
    for seed in range(seeds):
        off = 0.01 * seed
        found["random"].append(made_unit("random", seed, [6, 5.5, 5.0 + off, 4.75, 4.5], steps=LATER))
        found["filter"].append(made_unit("filter", seed, [6, 5.0, 4.5 + off]))
        groups = {"a": 5.1, "b": 5.8}
        found["ours"].append(
            made_unit("ours", seed, [6, 4.5 + off + shift, 4.0 + off + shift], groups=groups, **rounds)
        )
    return found


def summary(found: dict[str, list[dict[str, Any]]], plan: SelectionPlan = PLAN) -> Summary:
    return summarise(found, SCHEDULE, plan, SHARES, tuning={"tuning": found["filter"][:1]}, step_tokens=64)


def test_gains_are_tokens_of_the_filter_over_ours() -> None:
    found = summary(results())
    assert math.exp(found.findings.log_gain.mean) == pytest.approx(30 / 20, rel=1e-6)
    tokens = found.tokens_to_filter
    assert tokens["ours"] is not None
    assert tokens["ours"].mean == pytest.approx(20 / 30, rel=1e-6)
    assert found.against_filter["ours"].mean == pytest.approx(-0.5)
    assert found.against_filter["random"].mean == pytest.approx(0.5)
    assert found.losses["ours"].mean == pytest.approx(4.01)
    # Passages differ by more than arms do, and all arms have the same ones.
    assert found.against_filter["ours"].passage_half < 1e-9
    # Random rows get to 4.5 at the end of the longer run; the seeds after the first ask for less, a bit earlier.
    assert tokens["random"] is not None
    assert tokens["random"].mean == pytest.approx((50 + 49.6 + 49.2) / 3 / 30, rel=1e-6)


def test_where_ours_is_worse_the_filter_needs_less() -> None:
    found = summary(results(0.9))
    # Ours ends at 4.9: the filter is there at 22 steps.
    gains = [22.0, 20 + 10 * 0.1 / 0.49 + 10 * -0.01 / 0.49, 0.0]
    assert math.exp(found.findings.log_gain.mean) < 1
    one = summary(results(0.9, seeds=1))
    assert math.exp(one.findings.log_gain.mean) == pytest.approx(gains[0] / 30)
    assert found.tokens_to_filter["ours"] is None
    assert found.findings.difference.mean == pytest.approx(0.4, abs=0.01)


def test_equal_flops_take_steps_from_ours() -> None:
    share = PLAN.cost.share_of_training
    found = summary(results())
    at = 30 / (1 + share)
    assert found.findings.difference.mean == pytest.approx(4.5 - 0.05 * (at - 20) - 4.5, rel=1e-6)
    assert found.findings.difference.mean > found.against_filter["ours"].mean
    # The pilot's own rounds: 50 FLOPs each where a step has 100, so ours has 29 steps.
    assert found.at_pilot_flops.mean == pytest.approx(4.5 - 0.05 * 9 - 4.5)
    assert found.pilot_share == pytest.approx(100 / 3_000)
    steps = 3 * (50 + 30 + 30) + 30
    assert found.flops == pytest.approx(100 * steps + 3 * 100)
    # Seven seconds a unit; a second for the filter before it, and of ours four in rounds.
    assert found.seconds == {"random": 3 * 8.0, "filter": 3 * 8.0, "ours": 3 * 8.0, "tuning": 8.0}
    assert found.choosing_seconds == {"filter": 3.0, "ours": 12.0}


def test_harm_is_against_random_rows_and_weighs_groups_by_the_pool() -> None:
    harm = summary(results()).harm["ours"]
    assert harm["a"].mean == pytest.approx(0.1)
    assert harm["b"].mean == pytest.approx(-0.2)
    assert harm["pool"].mean == pytest.approx(0.75 * 0.1 + 0.25 * -0.2)


def test_rounds_whose_interval_includes_zero_are_weak() -> None:
    rounds = [(0.2, 0.6), (-0.1, 0.5), (float("nan"), float("nan"))]
    assert summary(results(rounds=rounds)).findings.weak_rounds == [2, 2, 2]
    assert summary(results(rounds=rounds)).findings.num_rounds == [3, 3, 3]
    assert summary(results(rounds=[(-0.6, -0.2)])).findings.weak_rounds == [0, 0, 0]  # the guard's business


def data(found: dict[str, list[dict[str, Any]]], seeds_asked: list[int] | None = None, **asked: Any) -> dict[str, Any]:
    given, made = settings(price=2.5, **asked), summary(found)
    part = {"passages": 40, "left_out": 1}
    facts = {
        "reference": part, "tuning": part, "held_out": part, "groups": SHARES, "num_parameters": 1_000, "documents": 9,
        "copies": 1, "shared_with_passages": 2, "rows": 500, "sources": {"pool": "<script>alert(1)</script>"},
    }  # fmt: skip
    tuned = {"best": "words alone", "losses": {"words alone": 4.0}, "seed": 1_000}
    return page_data(
        given, SCHEDULE, PLAN, made, decide(made.findings, given), facts=facts, tuned=tuned,
        seeds_asked=seeds_asked or [3],
    )  # fmt: skip


def test_the_page_says_the_verdict_and_makes_no_request() -> None:
    found = data(results(), protected=["pool"], labour=1_000.0, max_smaller=1e6, max_shorter=1e9)
    page = render_page(found)
    assert '<div class="verdict go"><strong>Go</strong>' in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "src=" not in page
    assert "80 percent" in page
    lines = list(render_lines(found))
    assert lines[0].startswith("GO: No kill criterion is met")
    said = [line.partition("]")[0][1:] for line in lines if line.startswith("[")]
    assert said == [one["state"] for one in found["verdict"]["criteria"]] == ["not met"] * 5
    money = found["money"]
    plan = PLAN.at_gain(money["gain_low"])
    assert money["saved_money"] == plan.saved_money
    assert plan.saved_money is not None
    assert money["runs_until_paid"] == math.ceil((money["pilot_price"] + 1_000) / plan.saved_money)


def test_what_is_saved_is_of_the_lower_end_and_against_the_filter() -> None:
    found = data(results())
    gain = summary(results()).findings.log_gain
    assert gain.low is not None
    assert found["money"]["gain_low"] == pytest.approx(math.exp(gain.low))
    # Random rows do not enter: as bad as they may be, nothing of it changes.
    other = results()
    for one in other["random"]:
        one["sums"] = [[2 * value for value in sums] for sums in one["sums"]]
    assert data(other)["money"]["saved_share"] == found["money"]["saved_share"]
    lost = data(results(0.9))
    assert lost["verdict"]["decision"] == "no-go"
    assert lost["money"]["saved_share"] < 0
    assert "would lose" in "\n".join(render_lines(lost))
    assert "runs_until_paid" not in lost["money"]


def test_one_seed_has_a_page_too() -> None:
    found = data(results(seeds=1))
    assert found["verdict"]["decision"] == "measure more"
    assert "one seed: no interval" in render_page(found)
    assert "What it would save is not said" in "\n".join(render_lines(found))


def test_what_speaks_against_it_is_computed() -> None:
    said = " ".join(data(results(), seeds_asked=[3, 6])["worries"])
    for words in (
        "405,334 times smaller",
        "times shorter",
        "Seeds were added after a look",
        "The rival is logistic regression on hashed words and pairs",
        "No group is protected",
    ):
        assert words in said
    assert "Worse than with random rows, interval above 0" in said
    assert "Seeds were added" not in " ".join(data(results())["worries"])


# --- the schedule ---


def test_rows_that_no_arm_trains_on_twice() -> None:
    given = settings()
    schedule = make_schedule(given, multiplied=10_000, num_passages=24, passage_tokens=16)
    assert (schedule.start, schedule.steps, schedule.end) == (12, 48, 60)
    assert schedule.marks == (12, 24, 36, 48, 60)
    assert schedule.later_marks == (72, 84)
    assert schedule.start + schedule.longest == 84
    assert schedule.num_candidates == 48 * 4 * 5
    assert schedule.rows_needed > 12 * 4 + schedule.num_candidates
    require_rows(schedule, given, schedule.rows_needed)
    with pytest.raises(ValueError, match=rf"`pool` must have {schedule.rows_needed:,} rows of 16 tokens"):
        require_rows(schedule, given, schedule.rows_needed - 1)


def test_a_pilot_too_short_for_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="must have at least two rounds, and 48 steps have 1 of 48 steps"):
        make_schedule(settings(update_steps=48), multiplied=10_000, num_passages=24, passage_tokens=16)


def test_rounds_are_those_that_plan_proposes() -> None:
    given = settings(update_steps=None, num_probes=None, pilot_tokens=4 * 16 * 4_000)
    schedule = make_schedule(given, multiplied=50_000_000, num_passages=24, passage_tokens=16)
    assert schedule.config["update_steps"] in (50, 100, 200, 500, 1_000)
    assert schedule.config["num_probes"] in (500, 1_000, 2_000)


@pytest.mark.parametrize(("size", "vocab"), [(1e6, 2_048), (41e6, 8_192), (1e9, 32_000)])
def test_the_model_is_about_as_large_as_was_asked(size: float, vocab: int) -> None:
    width, layers, heads = shape_for(size, vocab)
    assert width % heads == 0
    assert 0.5 < (vocab * width + 12 * layers * width**2) / size < 2
