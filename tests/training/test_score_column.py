"""Runs whose pool brings scores along: they are added to predicted influence, recorded, verified and resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mates_hf import MatesCallback, MatesConfig, NgramInfluenceModel, load_round
from mates_hf.training.score_column import added, agreement, column_scores, require_scores
from mates_hf.training.verify import verify_run
from tests.training.kit import Stop, make_arguments, make_pool, make_reference, run, small_config
from tests.training.settings import proves
from tests.training.test_groups import collate

NUM = 400


def scored(values: Any) -> Dataset:
    return make_pool(NUM).add_column("score", list(values))


def train(
    folder: Path,
    pool: Dataset,
    *,
    stop: int | None = None,
    resume: str | None = None,
    influence_model: Any = None,
    **changes: Any,
) -> Any:
    config = small_config(**{"score_column": "score", **changes})
    callback = MatesCallback(make_reference(), config, influence_model=influence_model)
    return run(
        make_arguments(folder, remove_unused_columns=False, save_strategy="steps", save_steps=8),
        [callback] if stop is None else [callback, Stop(stop)], pool, collator=collate, resume=resume,
    )  # fmt: skip


def rounds(folder: Path) -> list[Any]:
    return [load_round(path) for path in sorted((folder / "_mates").glob("round-????"))]


def random_scores(seed: int = 3) -> Any:
    return np.random.default_rng(seed).normal(size=NUM).tolist()


# --- a run ---


@proves(
    "`score_column`",
    "a score of each row counts as much as its predicted influence; verifies; resumes exactly",
    note="docs/train.md",
)
def test_scores_are_added_to_what_is_predicted(tmp_path: Path) -> None:
    scores = random_scores()
    # The column stands in the place of what the influence model counts itself.
    without = NgramInfluenceModel(evidence_weight=0)
    plain = train(tmp_path / "plain", scored(scores), score_column=None, influence_model=without)
    both = train(tmp_path / "both", scored(scores))
    assert plain.rows != both.rows
    alone, added_up = rounds(tmp_path / "plain")[0], rounds(tmp_path / "both")[0]
    assert np.array_equal(alone.candidates, added_up.candidates)  # the first round measures the same model
    influence = np.load(tmp_path / "plain" / "_mates" / "round-0001" / "scores.npy")
    of_rows = np.array(scores)[alone.candidates]
    expected = influence / influence.std() + of_rows / of_rows.std()
    found = np.load(tmp_path / "both" / "_mates" / "round-0001" / "scores.npy")
    assert np.corrcoef(expected, found)[0, 1] == pytest.approx(1, abs=1e-6)
    assert of_rows[np.isin(alone.candidates, added_up.selection)].mean() > of_rows.mean() + 0.5
    facts = added_up.info["score_column"]
    assert facts["column"] == "score"
    assert abs(facts["spearman"]) < 0.3
    assert "score_column" not in alone.info
    assert verify_run(tmp_path / "both").problem is None
    assert verify_run(tmp_path / "plain").problem is None


@pytest.mark.slow
def test_a_run_with_scores_is_resumed_exactly(tmp_path: Path) -> None:
    scores = random_scores()
    whole = train(tmp_path / "whole", scored(scores))
    train(tmp_path / "cut", scored(scores), stop=13)
    resumed = train(tmp_path / "cut", scored(scores), resume=str(tmp_path / "cut" / "checkpoint-8"))
    assert resumed.rows
    assert resumed.rows == whole.rows[-len(resumed.rows) :]
    assert verify_run(tmp_path / "cut").problem is None


def test_without_a_column_a_config_is_what_it_was() -> None:
    from mates_hf.training.run import order_config

    assert "score_column" not in order_config(MatesConfig())
    assert order_config(MatesConfig(score_column="score"))["score_column"] == "score"


@pytest.mark.parametrize(
    ("values", "column", "match"),
    [
        (["a"] * NUM, "score", r"`score_column` must hold one number a row.*got str in `score`, pool row 0"),
        ([[1.0]] * NUM, "score", "must hold one number a row.*got list"),
        ([1.5] * NUM, "score", "must hold numbers that differ, got 244 rows of `score`"),
        ([None] * NUM, "score", "must hold numbers that differ"),
        ([1.0] * NUM, "quality", "`score_column` must be a column of the pool, got 'quality'"),
    ],
)
def test_a_column_of_no_scores_is_refused_before_the_first_step(
    values: list[Any], column: str, match: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        train(tmp_path, scored(values), score_column=column)
    assert not list(tmp_path.rglob("round-*"))


# --- the sum ---


def test_entries_are_read_from_datasets_and_from_lists() -> None:
    values = [3, None, -1, 7]
    for dataset in (Dataset.from_dict({"score": values}), [{"score": value} for value in values]):
        found = column_scores(dataset, "score", np.array([3, 1, 0]))
        np.testing.assert_array_equal(found, [7, np.nan, 3])
    floats = Dataset.from_dict({"score": [0.5, math.inf, math.nan]}).with_format("numpy")
    np.testing.assert_array_equal(column_scores(floats, "score", np.arange(3)), [0.5, np.nan, np.nan])
    flags = [{"score": True}, {"score": False}, {"score": np.float32(0.25)}]
    assert column_scores(flags, "score", np.arange(3)).tolist() == [1, 0, 0.25]
    require_scores(flags, "score")
    require_scores([{"score": 1.0}], "score")  # one row has no other to differ from


def test_a_score_that_is_missing_counts_as_the_mean_of_the_others() -> None:
    influence = np.array([0.0, 2.0, 4.0, 6.0], np.float32)
    found = added(influence, np.array([10.0, 30.0, np.nan, 20.0]))
    assert found.dtype == np.float32
    assert found[2] == influence[2]
    assert found[0] - influence[0] == pytest.approx(influence[1] - found[1])
    for scores in (np.full(4, np.nan), np.full(4, 5.0)):
        assert np.array_equal(added(influence, scores), influence)
    assert added(influence[:0], np.zeros(0)).shape == (0,)


@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=40), st.floats(0.01, 100), st.floats(-1e3, 1e3))
def test_neither_has_a_unit(values: list[int], unit: float, shift: float) -> None:
    influence = np.random.default_rng(len(values)).normal(size=len(values)).astype(np.float32)
    scores = np.array(values, np.float64)
    one, other = added(influence, scores), added(influence, unit * scores + shift)
    np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(added(1000 * influence, scores), 1000 * one, rtol=1e-4, atol=1e-2)


def test_agreement_is_of_rows_that_have_both() -> None:
    influence = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    assert agreement(influence, np.array([1.0, 5.0, np.nan, 9.0])) == pytest.approx(1)
    assert agreement(influence, -influence.astype(np.float64)) == pytest.approx(-1)
    assert agreement(influence, np.full(4, np.nan)) is None
    assert agreement(influence, np.ones(4)) is None
