"""A run whose labels are loss reductions: its records, going on from a checkpoint, and two processes of one order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mates_hf import LossReductionProbe, MatesCallback, MatesSelector, load_round
from mates_hf.flops import MANY_PASSAGES, sentinel_passages
from mates_hf.influence.preconditioner import UnsupportedOptimizerError
from mates_hf.reporting.cost import run_cost
from mates_hf.training.verify import verify_run
from tests.training.kit import Result, make_arguments, make_reference, run, small_config

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


def mates(**config: Any) -> MatesCallback:
    return MatesCallback(
        make_reference(), small_config(switch_lead_steps=3, **config), probe=LossReductionProbe(passes=2)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """20 steps with dropout; rounds at steps 6 and 12."""
    where = tmp_path_factory.mktemp("run")
    return where, run(make_arguments(where, **EVERY_STEP), [mates()], dropout=0.1)


def test_rounds_say_what_their_labels_are_and_a_run_is_verified(finished: tuple[Path, Result]) -> None:
    where, _ = finished
    rounds = [load_round(path) for path in sorted((where / "_mates").glob("round-????"))]
    assert len(rounds) == 2
    for found in rounds:
        assert found.info["measured_with"]["probe"]["class"].endswith(".LossReductionProbe")
        assert found.info["probe"]["num_steps"] >= 1
        assert found.info["fit"]["probe"] == "loss_reduction"
        assert not found.info["fidelity"]  # a label of many steps has no single step to be held against
    selector = MatesSelector.from_pretrained(where / "_mates" / "round-0001")
    assert selector.origin["label_unit"] == "order"
    assert verify_run(where).problem is None


@pytest.mark.parametrize("step", [5, 8, 13])  # before the first round, in its lead, behind the second
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, finished: tuple[Path, Result], step: int) -> None:
    from tests.training.test_resume import as_of, assert_goes_on

    where, whole = finished
    checkpoint = as_of(where, tmp_path, step)
    rest = run(make_arguments(tmp_path, **EVERY_STEP), [mates()], dropout=0.1, resume=str(checkpoint))
    assert_goes_on(rest, whole, step)


def test_growing_rounds_measure_their_gap_with_it(tmp_path: Path) -> None:
    config = small_config(first_round_steps=2, update_steps=6, num_probes=24)
    run(make_arguments(tmp_path), [MatesCallback(make_reference(), config, probe=LossReductionProbe())])
    rounds = [load_round(path).info for path in sorted((tmp_path / "_mates").glob("round-????"))]
    assert len(rounds) > 1
    assert all(found["gap"] is not None for found in rounds[1:])


def test_images_and_flattened_rows_select(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import DataCollatorWithFlattening

    from tests.training import test_modalities, test_packing

    test_modalities.train(tmp_path / "images", probe=LossReductionProbe())
    config = small_config(switch_lead_steps=2)
    callback = MatesCallback(test_packing.make_reference(), config, probe=LossReductionProbe())
    texts = Dataset.from_dict({"input_ids": test_packing.texts()})
    test_packing.train(tmp_path / "flattened", texts, DataCollatorWithFlattening(), callback)
    for name in ("images", "flattened"):
        found = load_round(tmp_path / name / "_mates" / "round-0001")
        assert (found.info["guard"]["decision"], found.labels.kind) == ("select", "loss_reduction")
        assert verify_run(tmp_path / name).problem is None


def with_lbfgs(trainer: Any) -> None:
    trainer.optimizer = torch.optim.LBFGS(trainer.model.parameters())


def test_an_optimizer_that_takes_no_step_from_gradients_alone_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptimizerError, match="several times"):
        run(make_arguments(tmp_path), [mates()], prepare=with_lbfgs)


@pytest.mark.parametrize(
    ("num", "trains", "read"), [(1_600, True, 200), (4_000, True, 500), (120, True, 120), (1_601, False, 201)]
)
def test_a_look_into_a_round_reads_passages_enough_for_what_its_labels_are(num: int, trains: bool, read: int) -> None:
    assert sentinel_passages(num, trains=trains) == read


def test_a_look_into_a_round_is_made_with_loss_reductions(tmp_path: Path) -> None:
    config = small_config(first_round_steps=4, update_steps=8, num_probes=24, drift_check_steps=2)
    run(
        make_arguments(tmp_path, max_steps=30),
        [MatesCallback(make_reference(MANY_PASSAGES + 24), config, probe=LossReductionProbe())],
    )
    looks = [json.loads(path.read_text()) for path in sorted((tmp_path / "_mates").glob("round-*/check-*.json"))]
    assert looks
    assert all(found["gap"] is not None for found in looks)
    cost = run_cost(tmp_path)
    read = [found["flops"] for found in looks if found["flops"]]
    assert cost.stages["gap checks"].flops == pytest.approx(sum(read))
    assert verify_run(tmp_path).problem is None
