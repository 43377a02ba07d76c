"""The `evaluate` modules: loadable offline, right by brute force, and errors by name instead of NaN."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mates_hf.evaluation.agreement import calibration_bins, num_best, rank_correlation, top_precision
from mates_hf.evaluation.metrics import metrics_dir
from mates_hf.prediction.judge import fit_report

ROUNDING = 1e-9
MODULES = ("influence_calibration", "influence_spearman", "influence_top_precision")
VALUES = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=2, max_size=6)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Load a module of ours with its caches in a folder of the test; each call is a fresh one."""

    def build(name: str) -> Any:
        return evaluate.load(str(metrics_dir() / name), cache_dir=str(tmp_path), keep_in_memory=True)

    return build


def correlated(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    predictions = rng.normal(size=num)
    return predictions, 2 * predictions + 3 * rng.normal(size=num) + 1


@pytest.mark.slow
def test_loads_by_path_offline_with_an_empty_home(tmp_path: Path) -> None:
    code = """
import json, pathlib, subprocess, sys
import evaluate
folder = subprocess.run(
    [sys.executable, "-m", "mates_hf.evaluation.metrics"], capture_output=True, text=True, check=True
).stdout.strip()
names = sorted(path.name for path in pathlib.Path(folder).iterdir() if (path / f"{path.name}.py").exists())
result = {}
for name in names:
    module = evaluate.load(f"{folder}/{name}")
    result[name] = module.compute(predictions=[0.1, 0.4, 0.2, 0.3, 0.5], references=[1.0, 4.0, 2.0, 3.0, 5.0])
print(json.dumps(result))
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and key not in ("XDG_CACHE_HOME", "PYTHONPATH")
    }
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HOME": str(home)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert tuple(result) == MODULES
    assert result["influence_spearman"]["spearman"] == pytest.approx(1)
    assert result["influence_top_precision"] == {"top_precision": 1, "base_rate": 0.2}
    assert result["influence_calibration"]["slope"] == pytest.approx(10)
    assert result["influence_calibration"]["intercept"] == pytest.approx(0)


def test_figures_are_those_of_a_fit_report(load: Any) -> None:
    predictions, references = correlated(97)
    groups = np.random.default_rng(1).integers(4, size=97)
    report = fit_report(predictions, references, groups=groups, num_labels=1, seed=5)
    pair = {"predictions": predictions, "references": references}
    assert load("influence_spearman").compute(**pair, groups=groups, seed=5) == {
        "spearman": report.spearman,
        "interval_low": report.interval[0],
        "interval_high": report.interval[1],
        "spearman_within_group": report.spearman_within_group,
    }
    assert load("influence_top_precision").compute(**pair)["top_precision"] == report.top_fifth_overlap
    calibration = load("influence_calibration").compute(**pair)
    assert calibration["slope"] == report.slope
    assert tuple(zip(calibration["mean_predicted"], calibration["mean_label"], strict=True)) == report.calibration


def test_sign(load: Any) -> None:
    predictions, references = correlated(200)
    for sign in (1, -1):
        pair = {"predictions": sign * predictions, "references": references}
        spearman = load("influence_spearman").compute(**pair)
        assert sign * spearman["spearman"] > 0.3
        assert spearman["interval_low"] < spearman["spearman"] < spearman["interval_high"]
        assert spearman["interval_low"] * spearman["interval_high"] > 0
        top = load("influence_top_precision").compute(**pair)
        assert sign * (top["top_precision"] - top["base_rate"]) > 0.1
        calibration = load("influence_calibration").compute(**pair)
        assert sign * calibration["slope"] > 1
        assert np.all(np.diff(calibration["mean_predicted"]) > 0)
        assert sign * (calibration["mean_label"][-1] - calibration["mean_label"][0]) > 0


def test_spearman_interval_is_a_seeded_bootstrap_of_candidates(load: Any) -> None:
    predictions, references = correlated(40)
    pair = {"predictions": predictions, "references": references}
    found = load("influence_spearman").compute(**pair, seed=3)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predictions, references).statistic, abs=ROUNDING)
    rng = np.random.default_rng(11)
    resampled = [
        stats.spearmanr(predictions[drawn], references[drawn]).statistic
        for drawn in (rng.integers(40, size=40) for _ in range(2_000))
    ]
    # Two independent bootstraps of 2,000 resamples differ by the Monte Carlo error of a percentile.
    interval = [found["interval_low"], found["interval_high"]]
    np.testing.assert_allclose(interval, np.percentile(resampled, [2.5, 97.5]), atol=0.04)
    assert load("influence_spearman").compute(**pair, seed=3) == found
    assert load("influence_spearman").compute(**pair, seed=4) != found
    few = load("influence_spearman").compute(**pair, seed=3, num_resamples=20)
    assert few["spearman"] == found["spearman"]
    assert few["interval_low"] != found["interval_low"]


def test_within_group_takes_the_groups_level_away(load: Any) -> None:
    rng = np.random.default_rng(0)
    groups = ["a"] * 20 + ["b"] * 10 + ["c"] * 5
    level = 100.0 * (np.array(groups) == "b")
    inside = rng.normal(size=35)
    references = np.concatenate([inside[:20], -inside[20:30], rng.normal(size=5)])
    pair = {"predictions": inside + level, "references": references + level}
    found = load("influence_spearman").compute(**pair, groups=groups)
    assert found["spearman_within_group"] == pytest.approx((20 * 1 + 10 * -1) / 30)
    assert "spearman_within_group" not in load("influence_spearman").compute(**pair)
    with pytest.raises(ValueError, match=r"`groups` must have a group of at least 8 candidates, got groups of \[5, 5"):
        load("influence_spearman").compute(**pair, groups=[i // 5 for i in range(35)])
    with pytest.raises(ValueError, match=r"`groups` must have one entry a candidate \(35\)"):
        load("influence_spearman").compute(**pair, groups=groups[:-1])


@given(VALUES, st.sampled_from([0.1, 0.2, 0.5, 0.7, 1.0]))
@settings(max_examples=60, deadline=None)
def test_top_precision_is_the_mean_over_all_ways_to_break_ties(pairs: list[tuple[int, int]], fraction: float) -> None:
    predicted, actual = np.array(pairs, float).T
    num = num_best(len(pairs), fraction)
    # Every order that sorts a side is as likely as another, and the sides' ties are broken apart: so the chance that
    # a candidate is in both best parts is the product of the shares of orders that put it there.
    shares = []
    for values in (predicted, actual):
        orders = [
            order for order in itertools.permutations(range(len(pairs))) if np.all(np.diff(values[[*order]]) <= 0)
        ]
        shares.append(np.mean([[i in order[:num] for i in range(len(pairs))] for order in orders], axis=0))
    assert top_precision(predicted, actual, fraction) == pytest.approx(shares[0] @ shares[1] / num, abs=ROUNDING)


def test_constant_predictions_get_the_base_rate_whatever_the_order(load: Any) -> None:
    for references in (np.arange(50.0), -np.arange(50.0)):
        found = load("influence_top_precision").compute(predictions=np.ones(50), references=references, fraction=0.3)
        assert found["top_precision"] == pytest.approx(0.3)
        assert found["base_rate"] == pytest.approx(0.3)
    assert num_best(100, 0.29) == 29  # 28.999999999999996 in floating point
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\], got 0"):
        load("influence_top_precision").compute(predictions=[1.0, 2.0], references=[1.0, 2.0], fraction=0)


def test_calibration_is_in_the_labels_unit(load: Any) -> None:
    predictions = np.random.default_rng(0).permutation(100) / 1e4
    found = load("influence_calibration").compute(predictions=predictions, references=3 * predictions - 7e-3)
    assert found["slope"] == pytest.approx(3)
    assert found["intercept"] == pytest.approx(-7e-3)
    assert found["mean_predicted"] == pytest.approx([(10 * i + 4.5) / 1e4 for i in range(10)])
    assert found["mean_label"] == pytest.approx([3 * (10 * i + 4.5) / 1e4 - 7e-3 for i in range(10)])
    fifths = load("influence_calibration").compute(predictions=predictions, references=predictions, num_bins=5)
    assert fifths["mean_label"] == pytest.approx([(20 * i + 9.5) / 1e4 for i in range(5)])
    assert calibration_bins(predictions[:3], predictions[:3]) == tuple((v, v) for v in np.sort(predictions[:3]))
    with pytest.raises(ValueError, match="`num_bins` must be at least 1, got 0"):
        calibration_bins(predictions, predictions, 0)


@pytest.mark.parametrize("name", MODULES)
def test_what_has_no_value_is_an_error_by_name(load: Any, name: str) -> None:
    fine = [1.0, 2.0, 4.0, 3.0]
    for value in (np.nan, np.inf, -np.inf, None):
        broken = [1.0, value, 2.0, 3.0]
        with pytest.raises(ValueError, match="`predictions` must be finite, got 1 non-finite values of 4"):
            load(name).compute(predictions=broken, references=fine)
        with pytest.raises(ValueError, match="`references` must be finite, got 1 non-finite values of 4"):
            load(name).compute(predictions=fine, references=broken)
    with pytest.raises(ValueError, match=r"predictions.*3.*references.*4|references.*4.*predictions.*3"):
        load(name).compute(predictions=fine[:3], references=fine)
    with pytest.raises(ValueError, match="`predictions` and `references` must both be .* at least 2"):
        load(name).compute(predictions=[1.0], references=[1.0])


def test_all_equal_values_are_refused_where_they_leave_no_value(load: Any) -> None:
    fine, equal = [1.0, 2.0, 3.0], [0.1, 0.1, 0.1]
    for predictions, references, name in ((equal, fine, "predictions"), (fine, equal, "references")):
        with pytest.raises(ValueError, match=f"`{name}` must not be all equal, got 3 times 0.1"):
            load("influence_spearman").compute(predictions=predictions, references=references)
    with pytest.raises(ValueError, match="`predictions` must not be all equal"):
        load("influence_calibration").compute(predictions=equal, references=fine)
    flat = load("influence_calibration").compute(predictions=fine, references=equal)
    assert flat["slope"] == pytest.approx(0, abs=ROUNDING)
    assert flat["intercept"] == pytest.approx(0.1)
    assert rank_correlation(np.array(equal), np.array(fine)) == 0  # a fit report's: it orders nothing
    with pytest.raises(ValueError, match="`num_resamples` must be at least 1, got 0"):
        load("influence_spearman").compute(predictions=fine, references=fine, num_resamples=0)


def test_batches_add_up(load: Any) -> None:
    predictions, references = correlated(30)
    whole = load("influence_spearman").compute(predictions=predictions, references=references)
    module = load("influence_spearman")
    for start in (0, 10, 20):
        part = slice(start, start + 10)
        module.add_batch(predictions=predictions[part], references=references[part])
    assert module.compute() == whole


def test_the_callers_random_stream_is_left_alone(load: Any) -> None:
    predictions, references = correlated(30)
    module = load("influence_spearman")
    before = np.random.get_state()  # noqa: NPY002
    module.compute(predictions=predictions, references=references)
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
