"""References whose tokens count unequally: mixtures of tasks, and completions that count as much as everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mates_hf import MatesCallback, load_round
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.data.weighted import WeightedRows
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.passes import mean_loss, mean_loss_gradient, token_losses
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.training.verify import verify_run
from tests.influence.test_probes import chain_rows, random_rows, task
from tests.training.kit import make_arguments, make_reference, run, small_config

CLOSE = 2e-5  # relative: float32 sums in another order
PAIRS = {
    "input_ids": [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]],
    "labels": [[-100, -100, -100, -100, 9, 10], [-100, -100, 13], [-100, 15, -100, 17]],
}


def pairs(loss_on: Any = "both", **settings: Any) -> ReferenceTask:
    rows = [dict(zip(PAIRS, values, strict=True)) for values in zip(*PAIRS.values(), strict=True)]
    columns = {"input_ids_column": "input_ids", "labels_column": "labels"}
    return ReferenceTask.from_dataset(rows, name="pairs", loss_on=loss_on, **columns, **settings)


def whole() -> ReferenceTask:
    return task(TokenRows.from_lists(PAIRS["input_ids"]))


@pytest.fixture
def live(make_tiny_model: Callable[..., Any]) -> tuple[Any, torch.optim.Optimizer]:
    model = make_tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(3):
        mean_loss_gradient(model, random_rows(8, seed))
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def losses_of(model: Any, *tasks: ReferenceTask) -> list[float]:
    return [mean_loss(model, one.measured) for one in tasks]


def test_both_is_the_mean_of_all_and_of_the_completion(live: Any) -> None:
    model, _ = live
    both, completion, everything = losses_of(model, pairs("both"), pairs("completion"), whole())
    assert both == pytest.approx((completion + everything) / 2, rel=CLOSE)
    assert pairs("both").num_targets == whole().num_targets == 10
    assert pairs("both").rows.labels is None  # trained on with `reference_passes`, it is a whole text
    assert pairs("both").weights is not None
    assert pairs("both").weights[pairs("both").rows.target_mask].mean() == pytest.approx(1)


@pytest.mark.parametrize("shares", [None, [1, 3], [0.5, 0]])
def test_a_mixtures_loss_is_the_weighted_mean(live: Any, shares: list[float] | None) -> None:
    model, _ = live
    long, short = task(chain_rows(3, 0, 1, length=40)), task(chain_rows(9, 1, 3, length=4))
    one, other, mixed = losses_of(model, long, short, ReferenceTask.mixture([long, short], shares))
    assert mixed == pytest.approx(np.average([one, other], weights=shares), rel=CLOSE)


def test_mixtures_of_mixtures_and_of_every_kind_of_task(live: Any) -> None:
    model, _ = live
    text, completion = task(chain_rows(4, 0, 1)), pairs("completion")
    inner = ReferenceTask.mixture([pairs("both"), completion], [2, 1])
    outer = ReferenceTask.mixture([text, inner], [1, 1], name="everything")
    a, b, c, d = losses_of(model, text, pairs("both"), completion, outer)
    assert d == pytest.approx(a / 2 + b / 3 + c / 6, rel=CLOSE)
    assert (outer.name, outer.loss_on, len(outer)) == ("everything", "all", 10)
    assert [part["weight"] for part in outer.description["parts"]] == [1.0, 1.0]
    assert outer.rows.row(4)[1].tolist() == [IGNORED, 6, 7, 8, 9, 10]  # of a whole text every token stays a target
    assert outer.rows.row(7)[1].tolist() == [IGNORED] * 4 + [9, 10]


@pytest.mark.parametrize("path_steps", [1, 4])
def test_the_direction_is_the_mean_of_the_parts(live: Any, path_steps: int) -> None:
    """At one point exactly; along a path labels of a mixture lean to what it weighs more."""
    model, optimizer = live
    parts = [task(chain_rows(16, 0, 1, length=24)), task(chain_rows(16, 1, 5, length=6))]
    probe = DirectionalProbe(path_steps=path_steps, path_rate=0.5)
    candidates = chain_rows(40, 7, 3)
    if path_steps == 1:
        found = [probe.compute_direction(model, optimizer, one).by_parameter for one in parts]
        mixed = probe.compute_direction(model, optimizer, ReferenceTask.mixture(parts, [3, 1])).by_parameter
        for parameter, value in mixed.items():
            wanted = 0.75 * found[0][parameter] + 0.25 * found[1][parameter]
            assert torch.allclose(value, wanted, rtol=1e-3, atol=1e-5), (value - wanted).abs().max()
        return
    only = [probe.measure(model, optimizer, one, candidates).influence_per_token for one in parts]
    mixes = [ReferenceTask.mixture(parts, shares) for shares in ([30, 1], [1, 30])]
    labels = [probe.measure(model, optimizer, one, candidates).influence_per_token for one in mixes]
    table = np.corrcoef([*only, *labels])
    assert table[0, 2] > table[0, 3]
    assert table[1, 3] > table[1, 2]


def test_the_one_step_probe_reads_weights_too(live: Any) -> None:
    model, optimizer = live
    parts, candidates = [task(chain_rows(4, 0, 1)), task(chain_rows(4, 1, 5))], chain_rows(5, 7, 3)
    probe = OneStepProbe()
    found = [probe.measure(model, optimizer, one, candidates).influence for one in parts]
    mixed = probe.measure(model, optimizer, ReferenceTask.mixture(parts, [3, 1]), candidates).influence
    assert mixed == pytest.approx(0.75 * found[0] + 0.25 * found[1], abs=3e-6)


def test_parts_of_a_weighted_task(live: Any) -> None:
    model, _ = live
    mixed = ReferenceTask.mixture([task(chain_rows(5, 0, 1)), pairs("both")], [1, 4])
    first, second = mixed.split(0.5, seed=3)
    assert len(first) + len(second) == len(mixed)
    for part in (first, second, mixed.subset(3, seed=1)):
        rows = part.measured
        assert isinstance(rows, WeightedRows)
        assert rows.weights.mean() == pytest.approx(1)
        values = token_losses(model, rows.rows)
        assert mean_loss(model, rows) == pytest.approx(np.average(values, weights=rows.weights), rel=CLOSE)
        again = rows.take(np.arange(len(part))[::-1]).take(np.arange(len(part)) < 2)
        assert len(again.weights) == again.num_targets.sum()
        assert again.weights.tolist() == rows.weights_of(np.array([len(part) - 1, len(part) - 2])).tolist()
    mask = np.arange(len(mixed)) % 2 == 0
    assert mixed.take(mask).digest() == mixed.take(np.flatnonzero(mask)).digest()
    assert mixed.digest() != dataclasses.replace(mixed, weights=None).digest()
    assert mixed.digest() != ReferenceTask.mixture([task(chain_rows(5, 0, 1)), pairs("both")], [1, 3]).digest()


def test_what_is_cut_keeps_its_weights(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    long = pairs("both")
    cut = long.fit_to_model(None, 3)
    again = pairs("both", max_length=3)
    assert cut.rows.values.tolist() == again.rows.values.tolist() == [8, 9, 10, 11, 12, 13, 15, 16, 17]
    assert cut.weights is not None
    assert again.weights is not None
    assert (cut.weights > 0).tolist() == (again.weights > 0).tolist() == [False, True, True] * 3
    assert cut.weights[1] == cut.weights[2] == pytest.approx(cut.weights[8])  # completions
    assert "3 tokens" in caplog.text


def test_weights_that_are_none() -> None:
    rows = chain_rows(2, 0, 1, length=4)
    for wrong, named in (
        (np.ones(7), r"shape \(8,\), got \(7,\)"),
        ([1, np.nan, 1, 1, 1, 1, 1, 1], "finite and at least 0"),
        ([1, -1, 1, 1, 1, 1, 1, 1], "finite and at least 0"),
        ([1, 0, 0, 0, 1, 0, 0, 0], "above 0 for a target token"),
    ):
        with pytest.raises(ValueError, match=named):
            ReferenceTask(name="x", rows=rows, weights=np.array(wrong))
    one = task(rows)
    for tasks, shares, named in (
        ([one], None, "two tasks or more"),
        ([one, one], [1], "one weight for each"),
        ([one, one], [1, -1], "at least 0"),
        ([one, one], [0, 0], "one of them above 0"),
        ([one, one], [1, float("inf")], "finite"),
    ):
        with pytest.raises(ValueError, match=named):
            ReferenceTask.mixture(tasks, shares)
    with pytest.raises(TypeError, match="got TokenRows"):
        ReferenceTask.mixture([one, rows])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="come with a completion"):
        ReferenceTask.from_dataset([{"ids": [1, 2]}], input_ids_column="ids", loss_on="both")
    with pytest.raises(ValueError, match="'all', 'completion' or 'both'"):
        ReferenceTask(name="x", rows=rows, loss_on="answers")  # type: ignore[arg-type]


def test_a_run_on_a_mixture_selects_is_recorded_and_verified(tmp_path: Path) -> None:
    parts = make_reference().split(0.5)
    mixed = ReferenceTask.mixture(parts, [5, 1], name="two halves")
    config = {"switch_lead_steps": 3, "reference_passes": 1}
    run(make_arguments(tmp_path / "mixed"), [MatesCallback(mixed, small_config(**config))])
    run(make_arguments(tmp_path / "plain"), [MatesCallback(make_reference(), small_config(**config))])
    mixed_round, plain_round = (load_round(tmp_path / name / "_mates" / "round-0001") for name in ("mixed", "plain"))
    assert mixed_round.selection is not None
    assert mixed_round.labels.influence.tolist() != plain_round.labels.influence.tolist()
    assert mixed_round.info["reference"]["name"] == "two halves"
    assert verify_run(tmp_path / "mixed").problem is None


def test_a_collator_that_trains_other_tokens_refuses_weights() -> None:
    from mates_hf.influence.reference_feed import _require_same_targets

    with pytest.raises(UnsupportedSettingError, match="must be of the tokens that the run's collator trains"):
        _require_same_targets(pairs("both"), random_rows(3, 0))
