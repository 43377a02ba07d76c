"""Looking inside a round that grew: when, at which rows, what follows, records, resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mates_hf import MatesConfig, load_round
from mates_hf.disk import read_json, write_json
from mates_hf.errors import InfluenceError
from mates_hf.prediction.worth import row_worth
from mates_hf.reporting.cost import run_cost
from mates_hf.reporting.lines import round_line
from mates_hf.selection.plan import EvenSteps, RunPlan
from mates_hf.training import drift, session
from mates_hf.training.trust import gap_between, next_check, rows_to_check
from mates_hf.training.verify import verify_run
from tests.training import test_trust
from tests.training.kit import Result, small_config
from tests.training.test_trust import as_killed, infos
from tests.training.test_verify import forge

# --- when, and which rows ---


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (16, None, []),  # too short to be looked at
        (20, None, [10]),
        (23, None, [12]),
        (100, None, [50]),
        (5, 3, []),  # as long as the first round
        (6, 3, [3]),
        (20, 3, [3, 6, 9, 12, 15, 18]),
        (20, 2, [4, 6, 8, 10, 12, 14, 16, 18]),  # the first behind the lead
        (20, 20, []),
    ],
)
def test_long_rounds_are_looked_at_in_their_middle_or_every_so_many_steps(steps, every, expected):
    config = MatesConfig(
        update_steps=100, first_round_steps=5, switch_lead_steps=3, average_steps=1, drift_check_steps=every
    )
    assert list(config.checks_inside(steps)) == expected
    info = {"step": 200, "round_steps": steps, "guard": {"decision": "select"}}
    found, step = [], 200
    while (step := next_check(config, info, step)) is not None:
        found.append(step - 200)
    assert found == expected
    assert next_check(config, {**info, "guard": {"decision": "own_order"}}, 200) is None
    assert list(MatesConfig(update_steps=100).checks_inside(100)) == []


def test_rows_that_are_checked_are_ahead_or_passed_over_and_none_is_there_at_random():
    config = MatesConfig(first_round_steps=5)
    candidates = np.random.default_rng(0).permutation(5_000)[:1_000]
    scores = np.random.default_rng(1).normal(size=1_000).astype(np.float32)
    tokens = np.where(np.arange(1_000) % 10 == 0, 0, 7).astype(np.int32)
    best = candidates[np.argsort(-row_worth(scores, tokens))]
    rows = np.random.default_rng(2).permutation(np.concatenate([best[:150], best[500:550]]))  # 50 of them at random
    draw = (config, 3, 40, candidates, scores, tokens, rows)
    ids, is_bought = rows_to_check(*draw, 100)
    assert (len(ids), int(is_bought.sum())) == (128, 64)
    assert np.all(np.diff(ids) > 0)
    assert np.isin(ids[is_bought], rows[100:]).all()
    assert np.isin(ids[is_bought], best[:200]).all()
    assert not np.isin(ids[~is_bought], rows).any()
    assert (tokens[np.isin(candidates, ids)] > 0).all()
    again = rows_to_check(*draw, 100)
    assert np.array_equal(again[0], ids)
    assert not np.array_equal(rows_to_check(config, 3, 41, *draw[3:], 100)[0], ids)
    assert [len(part) for part in rows_to_check(*draw, 195)] == [0, 0]  # fewer than eight ahead


def test_the_gap_of_two_groups_is_above_zero_where_the_first_is_worth_more():
    values, is_bought = np.arange(20.0), np.arange(20) >= 10
    found = gap_between(values, np.full(20, 5), is_bought)
    assert found is not None
    assert found.gap == pytest.approx(10 / values.std())
    turned = gap_between(values, np.full(20, 5), ~is_bought)
    assert turned is not None
    assert turned.gap == pytest.approx(-found.gap)
    assert gap_between(np.ones(20), np.full(20, 5), is_bought) is None


# --- a run whose labels turn inside a long round ---

SAVED = (26, 27, 28, 29, 31)  # before the check, at it, in the lead behind it, where its round is in training, later


def train(path: Path, turn: int = 25, resume: int | None = None, save: Any = SAVED, **config: Any) -> Result:
    """Rounds of 3, 6 and 12 steps at steps 12, 15 and 21; the third is looked at at step 27."""
    return test_trust.train(path, resume, 36, turn=turn, save=save, **config)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("ended")
    return path, train(path)


def test_a_round_whose_choice_is_used_up_ends_at_the_check_and_the_next_finds_its_length(ended):
    path, result = ended
    found = infos(path)
    assert [(info["step"], info["round_steps"]) for info in found[:5]] == [
        (12, 3),
        (15, 6),
        (21, 12),
        (27, 3),
        (30, 3),
    ]
    check = read_json(path / "_mates/round-0003/check-000027.json")
    assert check["gap"]["gap"] < check["gap"]["interval"][1] < 0
    assert (len(check["candidate_id"]), check["num_done"]) == (64, 16)  # the 32 rows ahead, and as many passed over
    assert [info.get("early") for info in found] == [
        None, None, None, {"round": 3, "step": 27, **check["gap"]}, *[None] * (len(found) - 4)
    ]  # fmt: skip
    fourth = found[3]
    assert (fourth["last_round_steps"], fourth["guard"]["failed"]) == (6, "used_up")  # half of what the third lasted
    rows: list[int] = []
    for info, after in zip(found, [*found[1:], None], strict=True):
        folder = path / f"_mates/round-{info['number']:04d}"
        name = "own_order.npy" if info["guard"]["decision"] == "own_order" else "selection.npy"
        end = after["from_position"] if after else 36 * 4
        rows += np.load(folder / name)[: end - info["from_position"]].tolist()
    assert result.rows[14 * 4 :] == rows
    assert len(set(result.rows)) == len(result.rows)
    history = result.trainer.state.log_history
    assert [(e["step"], e["mates/check_gap"]) for e in history if "mates/check_gap" in e] == [
        (27, check["gap"]["gap"])
    ]
    assert [e["step"] for e in history if "mates/early" in e] == [
        next(e["step"] for e in history if e.get("mates/round") == 4)
    ]
    assert "round 4 at step 27, early: what round 3 chose was used up (gap -" in round_line(fourth)
    cost = run_cost(path).stages["gap checks"]
    assert (cost.seconds, cost.flops) == (check["seconds"], check["flops"])
    assert 0 < check["flops"] < found[2]["stages"]["probe"]["flops"]
    assert verify_run(path).problem is None


def test_a_round_whose_choice_holds_is_left_as_it_is(tmp_path, monkeypatch):
    looked = train(tmp_path / "looked", turn=99, save=())
    assert read_json(tmp_path / "looked/_mates/round-0003/check-000027.json")["gap"]["gap"] > 0
    monkeypatch.setattr(session, "next_check", lambda *args: None)
    plain = train(tmp_path / "plain", turn=99, save=())
    assert looked.rows == plain.rows
    assert looked.losses == plain.losses
    assert all(torch.equal(value, plain.weights[name]) for name, value in looked.weights.items())
    assert verify_run(tmp_path / "looked").problem is None


@pytest.mark.quick("27")
@pytest.mark.parametrize("step", SAVED)
def test_a_run_killed_around_a_check_goes_on_exactly(ended, tmp_path, step):
    path, whole = ended
    copied = as_killed(path, tmp_path / "run", step)
    if step == 26:  # killed right at the check: it is written down, and the round that it starts is not there
        assert (copied / "_mates/round-0003/check-000027.json").exists()
    else:
        assert (copied / "_mates/round-0004").exists()
    rest = train(copied, resume=step)
    assert rest.rows == whole.rows[step * 4 :]
    assert all(torch.equal(value, rest.weights[name]) for name, value in whole.weights.items())
    for name in ("round_steps", "gap", "guard", "order_sha256", "step", "to_step", "cursor", "last_round_steps"):
        assert [info.get(name) for info in infos(copied)] == [info.get(name) for info in infos(path)], name
    assert [info.get("early") for info in infos(copied)] == [info.get("early") for info in infos(path)]
    assert verify_run(copied).problem is None


@pytest.mark.slow
def test_checks_every_so_many_steps_and_labels_that_tell_nothing(tmp_path, monkeypatch, caplog):
    train(tmp_path / "each", save=(), drift_check_steps=2)
    assert [(info["step"], "early" in info) for info in infos(tmp_path / "each")][:4] == [
        (12, False), (15, False), (21, False), (25, True)
    ]  # fmt: skip
    names = [path.name for path in sorted((tmp_path / "each/_mates").glob("round-000[23]/check-*"))]
    assert names == ["check-000017.json", "check-000019.json", "check-000023.json", "check-000025.json"]
    assert verify_run(tmp_path / "each").problem is None

    def broken(*args: object, **kwargs: object) -> None:
        raise InfluenceError("all alike")

    monkeypatch.setattr(drift, "measure_sentinel", broken)
    train(tmp_path / "none", save=())
    assert [info["step"] for info in infos(tmp_path / "none")] == [12, 15, 21, 33]
    assert "tells nothing: all alike" in caplog.text
    assert verify_run(tmp_path / "none").problem is None


def test_no_round_starts_early_that_finds_too_few_rows(monkeypatch):
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is measured where nothing could follow")

    monkeypatch.setattr(drift, "check_gap", never)
    config = small_config(update_steps=12, first_round_steps=3, switch_lead_steps=1)
    order = SimpleNamespace(
        number=3, from_position=88, info={"step": 21, "guard": {"decision": "select"}},
        rows_from=lambda position: np.arange(16),
    )  # fmt: skip
    clock = EvenSteps(4, 10_000)
    plan = RunPlan(num_rows=10_000, batch_rows=4, max_steps=60, config=config)
    # 12 steps choose 48 rows from 96, beside 40 probes: 136 rows, of which the cut-off gives 16.
    for unused, passes in ((119, 1), (119, 2), (120, 1)):
        ledger = SimpleNamespace(num_unused=unused, pass_number=1)
        state = SimpleNamespace(
            config=small_config(update_steps=12, first_round_steps=3, switch_lead_steps=1, max_passes=passes),
            ledger=ledger, rounds_dir=Path(),
        )  # fmt: skip
        if (unused, passes) == (119, 1):
            assert drift.look_inside(state, order, plan, clock.pool_position, 27) == (None, {})
        else:
            with pytest.raises(AssertionError, match="nothing is measured"):
                drift.look_inside(state, order, plan, clock.pool_position, 27)


# --- verify ---


def tamper(path: Path, case: str) -> None:
    third, fourth = path / "round-0003", path / "round-0004"
    file = third / "check-000027.json"
    check, info = read_json(file), read_json(fourth / "round.json")
    if case == "gap":
        write_json(file, {**check, "gap": {**check["gap"], "gap": 0.5}})
    elif case == "labels":
        write_json(file, {**check, "influence_per_token": [-each for each in check["influence_per_token"]]})
    elif case == "rows":
        write_json(file, {**check, "candidate_id": [check["candidate_id"][0] + 1, *check["candidate_id"][1:]]})
    elif case == "trained":  # as if other rows were ahead
        write_json(file, {**check, "num_done": 20})
    elif case == "step":
        write_json(third / "check-000026.json", {**check, "step": 26})
    elif case == "words":
        write_json(file, {**check, "num_tokens": ["a"] * len(check["num_tokens"])})
    elif case == "not early":
        info.pop("early")
        write_json(fourth / "round.json", info)
        forge(fourth)
    elif case == "early":
        forge(fourth, early={**info["early"], "gap": -9.0})
    elif case == "gone":
        file.unlink()
    else:  # the round was started by a check that says that its choice holds
        flipped = [-each for each in check["influence_per_token"]]
        ids, is_bought = np.asarray(check["candidate_id"]), None
        rows = load_round(third).selection
        assert rows is not None
        is_bought = np.isin(ids, rows)
        gap = gap_between(np.asarray(flipped, np.float32), np.asarray(check["num_tokens"]), is_bought)
        assert gap is not None
        assert gap.gap > 0
        write_json(file, {**check, "influence_per_token": flipped, "gap": gap.to_dict()})


@pytest.mark.parametrize(
    ("case", "where", "expected"),
    [
        ("gap", "round-0003/check-000027.json", "`gap` {'gap': -"),
        ("labels", "round-0003/check-000027.json", "`gap` {'gap': "),
        ("rows", "round-0003/check-000027.json", "`candidate_id` as seed and order draw"),
        ("trained", "round-0003/check-000027.json", "`candidate_id` as seed and order draw"),
        ("step", "round-0003/check-000026.json", "a check at a step where one is due (27)"),
        ("words", "round-0003/check-000027.json", "`num_tokens` as a list of numbers"),
        ("not early", "round-0004/round.json", "`early` {'round': 3, 'step': 27"),
        ("early", "round-0004/round.json", "`early` {'round': 3, 'step': 27"),
        ("gone", "round-0004/round.json", "`early` None, as the checks inside round 3 say"),
        ("holds", "round-0004/round.json", "`early` None, as the checks inside round 3 say"),
    ],
)
def test_what_was_changed_of_a_check_is_found_and_named(ended, tmp_path, case, where, expected):
    shutil.copytree(ended[0] / "_mates", tmp_path / "_mates")
    tamper(tmp_path / "_mates", case)
    problem = verify_run(tmp_path).problem
    assert problem is not None
    assert f"{problem.round}/{problem.file}" == where, problem
    assert expected in problem.expected
