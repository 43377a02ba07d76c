"""Two runs at equal tokens and at equal FLOPs, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mates_hf.reporting.comparison import compare_html, compare_lines, compare_runs
from tests.reporting.made_run import round_info, write_rounds, write_state


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A selects: 100 steps, and one round at step 40 that costs as much as 50 steps. B trains 300 steps."""
    a, b = tmp_path / "ours", tmp_path / "random"
    write_state(a, 100, {20: 8.0, 40: 7.0, 60: 6.0, 80: 5.0, 100: 4.0})
    write_state(b, 300, {20: 8.0, 40: 7.5, 60: 7.0, 80: 6.5, 100: 6.0, 200: 4.5, 300: 3.0})
    write_rounds(a, [round_info(1, step=40, stages={"probe": {"seconds": 1.0, "flops": 50e9}})])
    return a, b


def test_equal_tokens_and_equal_flops(runs: tuple[Path, Path]) -> None:
    data = compare_runs(*runs)
    assert data["unit"] == "steps"
    assert data["equal_tokens"] == pytest.approx({"at": 100, "a": 4.0, "b": 6.0, "difference": -2.0})
    # A spent 150e9 FLOPs, with which B is at step 150, half-way from 6.0 to 4.5.
    assert data["equal_flops"] == pytest.approx({"at": 150e9, "a": 4.0, "b": 5.25, "difference": -1.25})
    # B reaches 4.0 at step 233 and a third, with 233e9 FLOPs of 150e9.
    assert data["tokens_needed"]["times"] == pytest.approx(700 / 3 / 100)
    assert data["flops_needed"]["times"] == pytest.approx(700 / 3 / 150)
    assert data["verdict"].startswith("A has the lower loss at equal tokens, by 2.0000, and at equal FLOPs, by 1.2500")
    # Differences of the five shared evaluations: 0, -0.5, -1, -1.5, -2.
    half = 2.7764 * np.std([0, 0.5, 1, 1.5, 2], ddof=1) / 5**0.5
    assert data["evaluations"]["difference"] == pytest.approx(-1.0)
    assert data["evaluations"]["interval"] == pytest.approx([-1.0 - half, -1.0 + half], rel=1e-3)
    assert data["passages"] is None
    assert any("a run without rounds" in note for note in data["notes"])
    swapped = compare_runs(runs[1], runs[0])
    assert swapped["equal_tokens"]["difference"] == pytest.approx(2.0)
    assert swapped["tokens_needed"]["behind"] == "A"
    assert swapped["verdict"].startswith("B has the lower loss")


def test_selecting_may_cost_more_than_it_gains(runs: tuple[Path, Path], tmp_path: Path) -> None:
    costly = tmp_path / "costly"
    write_state(costly, 100, {20: 8.0, 100: 5.9})
    write_rounds(costly, [round_info(1, step=40, stages={"probe": {"seconds": 1.0, "flops": 150e9}})])
    data = compare_runs(costly, runs[1])
    assert data["equal_tokens"]["difference"] == pytest.approx(-0.1)
    assert data["equal_flops"]["difference"] == pytest.approx(5.9 - 3.75)
    assert "but B at equal FLOPs" in data["verdict"]
    assert data["evaluations"] is None
    assert any("fewer than three" in note for note in data["notes"])


def test_passages_give_an_interval_where_both_kept_them(runs: tuple[Path, Path]) -> None:
    a, b = runs
    write_rounds(b, [round_info(1, step=40)])
    rng = np.random.default_rng(0)
    losses = rng.normal(5, 1, 400)
    counts = rng.integers(5, 50, 400)
    for run, shift in ((a, -0.3), (b, 0.0)):
        own = losses + shift + rng.normal(0, 0.1, 400)
        np.save(run / "_mates/round-0001/reference_losses.npy", np.stack([own, counts], axis=1).astype(np.float32))
    found = compare_runs(a, b)["passages"]
    low, high = found["interval"]
    assert low < -0.3 < high
    assert found["difference"] == pytest.approx(-0.3, abs=0.02)
    # The weighted standard error of a difference whose deviation is 0.1 * sqrt(2).
    weights = counts / counts.sum()
    assert high - low == pytest.approx(2 * 1.96 * 0.1 * 2**0.5 * (weights**2).sum() ** 0.5, rel=0.1)
    assert found["step"] == 40
    assert "over 400 passages, not over seeds" in found["text"]


def test_runs_of_other_references_or_steps_have_no_interval_over_passages(runs: tuple[Path, Path]) -> None:
    a, b = runs
    (folder,) = write_rounds(b, [round_info(1, step=45)])
    assert any("no round at the same step" in note for note in compare_runs(a, b)["notes"])
    info = round_info(1, step=40, reference={"digest": "other"})
    (folder / "round.json").unlink()
    folder.rmdir()
    write_rounds(b, [info])
    assert any("different reference tasks" in note for note in compare_runs(a, b)["notes"])


def test_steps_of_other_sizes_are_compared_by_flops(runs: tuple[Path, Path], tmp_path: Path) -> None:
    half = tmp_path / "half"  # half as many tokens a step
    write_state(half, 200, {40: 8.0, 200: 4.0}, total_flos=100e9)
    data = compare_runs(half, runs[1])
    assert data["unit"] == "training FLOPs"
    assert data["equal_tokens"] == pytest.approx({"at": 100e9, "a": 4.0, "b": 6.0, "difference": -2.0})
    write_state(half, 200, {40: 8.0, 200: 4.0}, total_flos=0)
    found = compare_runs(half, runs[1])
    assert found["equal_flops"] is None
    assert any("neither tokens nor FLOPs" in note for note in found["notes"])


def test_wrong_uses_are_one_sentence(runs: tuple[Path, Path], tmp_path: Path) -> None:
    write_state(tmp_path / "other", 10, {})
    with pytest.raises(ValueError, match="share no metric"):
        compare_runs(runs[0], tmp_path / "other")
    with pytest.raises(ValueError, match=r"got 'accuracy'; they share eval_loss\."):
        compare_runs(*runs, metric="accuracy")
    with pytest.raises(FileNotFoundError, match=r"has none"):
        compare_runs(runs[0], tmp_path / "nowhere")


def test_text_and_page_say_the_same(runs: tuple[Path, Path]) -> None:
    data: dict[str, Any] = compare_runs(*runs)
    lines = "\n".join(compare_lines(data))
    page = compare_html(data, "1")
    for text in ("B needs 2.33 times as many tokens to reach the 4.0000 of A", "too narrow, and not over seeds"):
        assert text in lines
        assert text in page
    assert data["verdict"] in lines
    assert "No interval here is over seeds" in page
