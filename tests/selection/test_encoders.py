"""A selector around influence models that run a transformer: saved, loaded, mapped in one process and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from mates_hf.prediction.encoder_model import EncoderInfluenceModel
from mates_hf.prediction.hidden_states import HiddenStateInfluenceModel
from mates_hf.selection.selector import MatesSelector
from tests.prediction.test_encoder import make_labels, make_rows
from tests.training.test_influence_models import make_encoder

CLOSE = 1e-2  # of the predictions' standard deviation: passes hold other rows, in bf16 where the processor has it


@pytest.fixture(scope="module")
def encoder_model(tiny_tokenizer: Any) -> EncoderInfluenceModel:
    settings = {"tokenizer": tiny_tokenizer, "head_only": True, "max_tokens": 64, "chunk_tokens": 32}
    rows = make_rows(120)
    return make_encoder(tiny_tokenizer, **settings).fit(rows, make_labels(rows))


@pytest.fixture(scope="module")
def lists() -> list[list[int]]:
    rows = make_rows(60, seed=3)
    return [rows.row(i)[0].tolist() for i in range(len(rows))]


def test_an_encoder_scores_as_its_selector_does_after_saving(
    encoder_model: EncoderInfluenceModel, tiny_tokenizer: Any, lists: list[list[int]], tmp_path: Path
) -> None:
    MatesSelector(encoder_model).save_pretrained(tmp_path / "selector")
    selector = MatesSelector.from_pretrained(tmp_path / "selector")
    tokens = Dataset.from_dict({"input_ids": lists})
    expected = encoder_model.predict(make_rows(60, seed=3))
    found = np.array(selector.map(tokens)["influence"])
    tolerance = CLOSE * expected.std()
    np.testing.assert_allclose(found, expected, atol=tolerance)
    texts = Dataset.from_dict({"text": [tiny_tokenizer.decode(ids) for ids in lists]})
    np.testing.assert_allclose(np.array(selector.map(texts)["influence"]), expected, atol=tolerance)
    kept = selector.filter(tokens, threshold=float(np.median(found)))
    assert kept["input_ids"][:] == [ids for ids, value in zip(lists, found, strict=True) if value >= np.median(found)]
    assert "EncoderInfluenceModel" in str(selector.generate_model_card())


def test_an_encoder_maps_in_two_processes_after_it_ran_in_this_one(
    encoder_model: EncoderInfluenceModel, lists: list[list[int]]
) -> None:
    selector, tokens = MatesSelector(encoder_model), Dataset.from_dict({"input_ids": lists})
    alone = np.array(selector.map(tokens)["influence"])
    shared = np.array(selector.map(tokens, num_proc=2)["influence"])
    np.testing.assert_allclose(shared, alone, atol=CLOSE * alone.std())


def test_hidden_states_need_the_model_and_say_so(make_tiny_model: Any, lists: list[list[int]], tmp_path: Path) -> None:
    live, rows = make_tiny_model(), make_rows(120)
    fitted = HiddenStateInfluenceModel(live).fit(rows, make_labels(rows))
    tokens = Dataset.from_dict({"input_ids": lists})
    expected = np.array(MatesSelector(fitted).map(tokens)["influence"])
    MatesSelector(fitted).save_pretrained(tmp_path / "selector")
    found = MatesSelector.from_pretrained(tmp_path / "selector")
    with pytest.raises(ValueError, match="needs the model that trains"):
        found.map(tokens)
    with_model = MatesSelector(found.influence_model.with_model(live))
    np.testing.assert_allclose(
        np.array(with_model.map(tokens)["influence"]), expected, atol=CLOSE * max(expected.std(), 1e-9)
    )
