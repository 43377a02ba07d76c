"""Drift checks: rounds that start early, or not; rows, resume and the pool's size with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mates_hf import MatesCallback, load_round
from mates_hf.errors import InfluenceError
from mates_hf.training import drift, measure
from tests.training.kit import Result, Stop, make_arguments, make_pool, make_reference, run, small_config

STEPS = {"update_steps": 12, "switch_lead_steps": 2, "average_steps": 2}
ALWAYS, NEVER = 1.0, -1.0  # levels of rank correlation below which a round starts early


def mates(level: float | None, **changes: object) -> MatesCallback:
    checks = {} if level is None else {"drift_check_steps": 4, "drift_spearman": level}
    return MatesCallback(make_reference(), small_config(**{**STEPS, **checks, **changes}))


def train(path: Path, level: float | None, **changes: object) -> Result:
    return run(make_arguments(path, max_steps=36), [mates(level, **changes)])


def rounds(path: Path) -> list[dict]:
    folders = sorted(folder for folder in (path / "_mates").glob("round-*") if folder.suffix == "")
    return [dict(load_round(folder).info) for folder in folders]


@pytest.mark.slow
def test_no_drift_leaves_the_run_as_it_is_without_checks(tmp_path, monkeypatch):
    hashed: list[int] = []
    count = measure.weights_digest
    monkeypatch.setattr(measure, "weights_digest", lambda *args: hashed.append(1) or count(*args))
    plain = train(tmp_path / "a", None)
    assert len(hashed) == 2
    checked = train(tmp_path / "b", NEVER)
    assert len(hashed) == 4  # once a round: checks that start none look at no weight
    assert plain.rows == checked.rows
    assert plain.losses == checked.losses
    assert all(torch.equal(value, checked.weights[name]) for name, value in plain.weights.items())
    logged = [entry for entry in checked.trainer.state.log_history if "mates/drift_spearman" in entry]
    assert [entry["step"] for entry in logged] == [16, 20, 28, 32]
    assert all(-1 <= entry["mates/drift_spearman"] < 1 for entry in logged)


def test_drift_starts_the_next_round_early_and_cuts_the_selection_before_it(tmp_path):
    result = train(tmp_path, ALWAYS)
    records = rounds(tmp_path)
    assert [info["step"] for info in records] == [12, 16, 20, 24, 28, 32]
    expected: list[int] = []
    for info, after in zip(records, [*records[1:], None], strict=True):
        rows = np.asarray(load_round(tmp_path / f"_mates/round-{info['number']:04d}").selection)
        end = after["from_position"] if after else 36 * 4
        expected += rows[: end - info["from_position"]].tolist()
    start = records[0]["from_position"]
    assert start == 14 * 4
    assert result.rows[start:] == expected
    assert len(set(result.rows)) == len(result.rows)  # what was cut off is unused, what was trained on is used
    assert [info["num_rows"] for info in records] == [48, 48, 48, 40, 24, 8]


def test_rows_that_an_early_start_cut_off_can_be_chosen_again(tmp_path):
    train(tmp_path, ALWAYS, candidate_scope="pool")
    first, second = (load_round(tmp_path / f"_mates/round-{number:04d}") for number in (1, 2))
    cut = np.asarray(first.selection)[second.info["from_position"] - first.info["from_position"] :]
    assert len(cut)
    offered = set(np.asarray(second.candidates).tolist()) | set(second.labels.candidate_id.tolist())
    assert offered.issuperset(cut.tolist())


@pytest.mark.quick("17")
@pytest.mark.parametrize("stop", [15, 16, 17, 21, 30])
def test_a_run_with_early_rounds_goes_on_exactly(tmp_path, stop):
    whole = train(tmp_path / "whole", ALWAYS)
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 36}
    first = run(make_arguments(tmp_path / "part", **settings), [mates(ALWAYS), Stop(stop)])
    checkpoint = str(tmp_path / "part" / f"checkpoint-{stop}")
    rest = run(make_arguments(tmp_path / "part", **settings), [mates(ALWAYS)], resume=checkpoint)
    assert first.rows + rest.rows == whole.rows
    assert all(torch.equal(value, rest.weights[name]) for name, value in whole.weights.items())
    assert [info["order_sha256"] for info in rounds(tmp_path / "part")] == [
        info["order_sha256"] for info in rounds(tmp_path / "whole")
    ]


def test_a_round_in_the_own_order_has_nothing_to_check(tmp_path):
    train(tmp_path, ALWAYS, on_weak_signal="own_order", min_spearman=1.0, held_out_fraction=0.5)
    assert [info["step"] for info in rounds(tmp_path)] == [12, 24]


def test_a_sentinel_that_cannot_be_ranked_means_no_checks_not_the_end_of_the_run(tmp_path, monkeypatch, caplog):
    def broken(*args: object, **kwargs: object) -> None:
        raise InfluenceError("all alike")

    monkeypatch.setattr(drift, "measure_sentinel", broken)
    train(tmp_path, ALWAYS)
    assert [info["step"] for info in rounds(tmp_path)] == [12, 24]
    assert "gets no drift checks" in caplog.text


def test_the_round_records_how_its_sentinel_agrees_with_its_labels(tmp_path):
    train(tmp_path, NEVER)
    sentinel = json.loads((tmp_path / "_mates/round-0001" / drift.SENTINEL_FILE).read_text())
    labels = load_round(tmp_path / "_mates/round-0001").labels
    assert set(sentinel["candidate_id"]) <= set(labels.candidate_id.tolist())
    assert sentinel["spearman_with_labels"] > 0.5  # fewer passages of the same reference
    assert rounds(tmp_path)[0]["stages"]["sentinel"]["flops"] > 0


def test_a_pool_too_small_for_an_early_round_is_refused_before_the_first_step(tmp_path):
    # 226 rows suffice for rounds at steps 12 and 24, of which the second only chooses 40 rows from 80. One that starts
    # at step 22 would choose 48 from 96 with 8 rows fewer used up.
    pool = make_pool(226)
    run(make_arguments(tmp_path / "a", max_steps=36), [mates(None)], pool)
    with pytest.raises(ValueError, match="largest `max_steps` that fits is 34 "):
        run(make_arguments(tmp_path / "b", max_steps=36), [mates(ALWAYS)], pool)
    assert not (tmp_path / "b" / "_mates").exists()


@pytest.mark.parametrize("steps", [0, 1, 12, 13])
def test_checks_are_at_least_a_window_and_less_than_a_round_apart(steps):
    with pytest.raises(ValueError, match="drift_check_steps"):
        small_config(**STEPS, drift_check_steps=steps)
