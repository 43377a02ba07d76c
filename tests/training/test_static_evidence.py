"""Static evidence in a run: counted once, given by name, weighed by the labels, and drawn alike after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mates_hf import MatesCallback, NgramInfluenceModel
from mates_hf.training import static_evidence
from mates_hf.training.verify import verify_run
from tests.training.kit import Stop, make_arguments, make_pool, make_reference, run, small_config


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows of each count, reference and pool."""
    calls: list[tuple[int, int]] = []
    original = NgramInfluenceModel.count_evidence

    def count_evidence(self: NgramInfluenceModel, reference: Any, background: Any) -> Any:
        calls.append((len(reference), len(background)))
        return original(self, reference, background)

    monkeypatch.setattr(NgramInfluenceModel, "count_evidence", count_evidence)
    return calls


def fits(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "_mates").glob("round-*/round.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["fit"] for path in paths]


def test_a_run_counts_once_and_each_round_says_what_it_tells_of_the_labels(tmp_path: Path, counted) -> None:
    run(make_arguments(tmp_path), [MatesCallback(make_reference(), small_config())])
    assert counted == [(24, 400)]  # a small pool is read whole
    found = fits(tmp_path)
    assert len(found) == 3
    # A third of the pool counts up, as the reference does: words tell most of the labels' order.
    assert all(0.2 < fit["evidence"] < 1.1 for fit in found)
    assert all(0.3 < fit["evidence_weight"] <= 1 for fit in found)
    verify_run(tmp_path)


def test_a_column_of_scores_stands_in_its_place_beside_the_labels(tmp_path: Path, counted) -> None:
    pool = make_pool()
    pool = pool.add_column("score", np.random.default_rng(0).random(len(pool)))
    arguments = make_arguments(tmp_path, max_steps=8, remove_unused_columns=False)
    run(arguments, [MatesCallback(make_reference(), small_config(score_column="score"))], pool)
    assert fits(tmp_path)[0]["evidence"] > 0.2
    assert fits(tmp_path)[0]["evidence_weight"] is None


def test_a_large_pool_is_sampled_by_its_rows_length(tmp_path: Path, counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_evidence, "BACKGROUND_TOKENS", 1_100)  # rows of 11 trained tokens
    run(make_arguments(tmp_path / "a", max_steps=8), [MatesCallback(make_reference(), small_config())])
    monkeypatch.setattr(static_evidence, "MOST_ROWS", 30)
    run(make_arguments(tmp_path / "b", max_steps=8), [MatesCallback(make_reference(), small_config())])
    assert counted == [(24, 100), (24, 30)]


class NoEvidence(NgramInfluenceModel):
    """Takes what it is given and hands on what it knows, as a user's own model may."""

    def fit(self, candidates: Any, labels: Any, **more: Any) -> Any:
        assert "evidence" not in more
        return super().fit(candidates, labels, **more)


def test_a_model_that_does_not_name_it_gets_none(tmp_path: Path, counted) -> None:
    callback = MatesCallback(make_reference(), small_config(), influence_model=NoEvidence())
    run(make_arguments(tmp_path, max_steps=8), [callback])
    assert counted == []
    assert fits(tmp_path)[0]["evidence"] is None


def test_a_resumed_run_chooses_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole = run(make_arguments(tmp_path / "a"), [MatesCallback(make_reference(), small_config())])
    arguments = make_arguments(tmp_path / "b", save_strategy="steps", save_steps=4)
    run(arguments, [MatesCallback(make_reference(), small_config()), Stop(8)])
    resumed = run(arguments, [MatesCallback(make_reference(), small_config())], resume=True)
    assert np.array_equal(whole.rows[-len(resumed.rows) :], resumed.rows)
    assert fits(tmp_path / "a")[-1]["spearman"] == fits(tmp_path / "b")[-1]["spearman"]
