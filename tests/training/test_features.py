"""`FeatureInfluenceModel` inside a Trainer: images, speech and images with text; resumed, and too slow to be asked."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mates_hf.prediction.feature_model import FeatureInfluenceModel
from mates_hf.prediction.hidden_states import HiddenStateInfluenceModel
from mates_hf.round_files import load_round
from mates_hf.training.callback import MatesCallback
from tests.training.kit import make_arguments, make_model, make_pool, make_reference, small_config
from tests.training.modalities import KINDS, trainer


def mean_pixels(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Features of a user's own, which no file can hold."""
    return torch.cat([batch["pixel_values"].mean((2, 3)), batch["labels"][:, None].float()], 1)


@pytest.mark.quick("ViT")
@pytest.mark.parametrize("kind", ["ViT", "Whisper", "Llava"])
def test_selects_rows_of_any_modality(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind]
    rows = made.rows(260, seed=1)
    callback = MatesCallback(made.reference(), small_config(), influence_model=FeatureInfluenceModel())
    trainer(made.model(), rows, tmp_path, [callback]).train()
    rounds = sorted((tmp_path / "_mates").glob("round-????"))
    record = load_round(rounds[0])
    assert record.selection is not None
    config = json.loads((rounds[0] / "influence_model" / "config.json").read_text())
    assert config["kind"] == "FeatureInfluenceModel"
    assert config["weights"].startswith("sum128-")
    scores = np.load(rounds[0] / "scores.npy")
    assert scores.std() > 0


@pytest.mark.quick("ViT")
@pytest.mark.parametrize("kind", ["ViT", "Whisper", "Llava"])
def test_selects_rows_by_their_inputs_without_a_pass(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind]
    model = FeatureInfluenceModel("inputs")
    callback = MatesCallback(made.reference(), small_config(), influence_model=model)
    trainer(made.model(), made.rows(400, seed=1), tmp_path, [callback], max_steps=18).train()
    rounds = sorted((tmp_path / "_mates").glob("round-????"))
    assert len(rounds) > 1
    fits = []
    for folder in rounds:
        assert load_round(folder).selection is not None
        config = json.loads((folder / "influence_model" / "config.json").read_text())
        assert (config["features"], config["weights"]) == ("inputs", None)
        fits.append(load_file(folder / "influence_model" / "model.safetensors")["values"])
    assert len(fits[1]) > len(fits[0])  # labels of earlier rounds are fitted along
    assert np.array_equal(fits[1][: len(fits[0])], fits[0])


@pytest.mark.slow
@pytest.mark.parametrize("features", [mean_pixels, "inputs"])
def test_features_survive_a_resume(features: Any, tmp_path: Path) -> None:
    """A function, which a file cannot hold, is taken from the influence model of the run that resumes."""
    made, found = KINDS["ViT"], []
    for folder in ("whole", "stopped"):
        model = FeatureInfluenceModel(features)
        settings = {"save_strategy": "steps", "save_steps": 9, "max_steps": 18}
        callback = MatesCallback(made.reference(), small_config(), influence_model=copy.deepcopy(model))
        run = trainer(made.model(), made.rows(400, seed=1), tmp_path / folder, [callback], **settings)
        run.train()
        if folder == "stopped":
            callback = MatesCallback(made.reference(), small_config(), influence_model=model)
            run = trainer(made.model(), made.rows(400, seed=1), tmp_path / folder, [callback], **settings)
            run.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-9"))
        found.append([parameter.detach() for parameter in run.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [FeatureInfluenceModel, HiddenStateInfluenceModel])
def test_more_candidates_than_may_be_scored_are_named_before_the_first_step(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import Trainer

    def start(model: Any, **changes: Any) -> None:
        callback = MatesCallback(make_reference(), small_config(**changes), influence_model=model)
        Trainer(
            model=make_model(), args=make_arguments(tmp_path / str(len(caplog.records)), max_steps=14),
            train_dataset=make_pool(200), callbacks=[callback],
        ).train()  # fmt: skip

    with pytest.raises(ValueError, match=r"Scoring the \d+ candidates of one round.*`max_seconds=1e-06`.*about \d+ s"):
        start(kind(max_seconds=1e-6), candidate_scope="pool")
    assert not list(tmp_path.rglob("round-*"))
    with pytest.raises(ValueError, match="`max_seconds` must be a number above 0, or None, got 0"):
        kind(max_seconds=0)
    with caplog.at_level(logging.WARNING, "mates_hf.training.checks.scoring_time"):
        start(kind(), candidate_scope="pool")
    assert f"{kind.__name__} scores the 200 candidates of a round in about" in caplog.text
    start(kind(max_seconds=1e6), candidate_scope="pool")
