"""An encoder of images or sounds as `features`: fitted on a pool's column, saved, and scored by a selector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mates_hf.data.media_column import MediaRows, media_bytes
from mates_hf.errors import MatesError
from mates_hf.prediction.feature_model import FeatureInfluenceModel
from mates_hf.selection.selector import MatesSelector
from tests.prediction.test_features import labels_of

NUM = 120


class Pictures(NamedTuple):
    """Pictures that help by how bright their upper half is, and an encoder that has never seen any."""

    dataset: datasets.Dataset
    bright: Any
    encoder: Any
    processor: Any


def make_encoder(seed: int = 0) -> tuple[Any, Any]:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))
    return encoder, ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    rng = np.random.default_rng(0)
    bright = rng.uniform(0, 200, NUM)
    pixels = rng.uniform(0, 50, (NUM, 8, 8))
    pixels[:, :4] += bright[:, None, None]
    images = [Image.fromarray(one.astype(np.uint8)) for one in pixels]
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    return Pictures(rows, bright - bright.mean(), *make_encoder())


@pytest.fixture(scope="module")
def fitted(pictures: Pictures) -> FeatureInfluenceModel:
    model = FeatureInfluenceModel(pictures.encoder, processor=pictures.processor)
    return model.fit(pictures.dataset, labels_of(pictures.bright / 100))


def test_an_encoder_reads_images_and_not_the_model_that_trains(pictures: Pictures, fitted: Any) -> None:
    assert fitted.report.spearman > 0.7
    assert fitted.column == "image"
    assert fitted.reads_media
    predicted = fitted.predict(pictures.dataset)
    assert np.corrcoef(predicted, pictures.bright)[0, 1] > 0.9
    order = np.random.default_rng(0).permutation(NUM)
    np.testing.assert_allclose(fitted.predict(pictures.dataset.select(order)), predicted[order], atol=1e-6)
    flipped = FeatureInfluenceModel(pictures.encoder, processor=pictures.processor)
    flipped.fit(pictures.dataset, labels_of(-pictures.bright / 100))
    np.testing.assert_allclose(flipped.predict(pictures.dataset), -predicted, atol=1e-6)
    assert fitted.for_run(model=torch.nn.Linear(2, 2)).model is None
    part = labels_of(pictures.bright[order[:60]] / 100, ids=order[:60])
    few = FeatureInfluenceModel(pictures.encoder, processor=pictures.processor).fit(pictures.dataset, part)
    assert np.corrcoef(few.predict(pictures.dataset), pictures.bright)[0, 1] > 0.8


def test_a_selector_maps_and_filters_images(pictures: Pictures, fitted: Any, tmp_path: Path) -> None:
    selector = MatesSelector(fitted)
    mapped = selector.map(pictures.dataset)
    np.testing.assert_allclose(mapped["influence"], fitted.predict(pictures.dataset), rtol=1e-5)
    kept = selector.filter(pictures.dataset, ratio=0.25)
    best = np.sort(np.argsort(-np.array(mapped["influence"]), kind="stable")[:30])
    assert [one.tobytes() for one in kept["image"]] == [pictures.dataset[int(i)]["image"].tobytes() for i in best]
    other = pictures.dataset.rename_column("image", "picture")
    with pytest.raises(ValueError, match=r"must have a column `image` to score, got the columns \['picture'\]"):
        selector.filter(other, ratio=0.25)
    assert len(selector.filter(other, ratio=0.25, column="picture")) == 30
    stream = selector.map(pictures.dataset.to_iterable_dataset())
    np.testing.assert_allclose([row["influence"] for row in stream], mapped["influence"], rtol=1e-5)


def test_it_is_saved_with_its_encoders_name_and_digest(pictures: Pictures, fitted: Any, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "given")
    size = sum(path.stat().st_size for path in (tmp_path / "given").iterdir())
    assert size < 10_000  # no weights
    with pytest.raises(ValueError, match="must be the encoder that it was fitted with, and `processor`"):
        FeatureInfluenceModel.from_pretrained(tmp_path / "given")
    again = FeatureInfluenceModel.from_pretrained(
        tmp_path / "given", features=pictures.encoder, processor=pictures.processor
    )
    assert np.array_equal(again.predict(pictures.dataset), fitted.predict(pictures.dataset))
    with pytest.raises(MatesError, match="its weights are others"):
        FeatureInfluenceModel.from_pretrained(
            tmp_path / "given", features=make_encoder(1)[0], processor=pictures.processor
        )
    pictures.encoder.save_pretrained(tmp_path / "encoder")
    pictures.processor.save_pretrained(tmp_path / "encoder")
    named = FeatureInfluenceModel(tmp_path / "encoder").fit(pictures.dataset, labels_of(pictures.bright / 100))
    MatesSelector(named).save_pretrained(tmp_path / "selector")
    assert "model.safetensors" in {path.name for path in (tmp_path / "selector").rglob("*")}
    selector = MatesSelector.from_pretrained(tmp_path / "selector")
    assert np.array_equal(selector.score(pictures.dataset).influence, named.predict(pictures.dataset))


def test_sounds_are_read_one_at_a_time() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
    )  # fmt: skip
    processor = Wav2Vec2FeatureExtractor(sampling_rate=1_000, do_normalize=False)
    rng = np.random.default_rng(0)
    pitch = rng.uniform(0.1, 1.5, 80)
    sounds = [np.sin(one * np.arange(rng.integers(200, 400))).astype(np.float32).tolist() for one in pitch]
    rows = datasets.Dataset.from_dict({"audio": sounds})
    found = FeatureInfluenceModel(Wav2Vec2Model(config), processor=processor)
    found.fit(rows, labels_of(pitch - pitch.mean()))
    assert found.column == "audio"
    assert found.report.spearman > 0.5
    assert np.array_equal(found.predict(rows)[:5], found.predict(rows.select(range(5))))
    assert len(MatesSelector(found).filter(rows, k=8)) == 8
    wrong = [{"audio": {"array": np.zeros(300), "sampling_rate": 8_000}}]
    with pytest.raises(ValueError, match=r"sampling rate of the encoder, 1000 Hz, got 8000.*cast_column"):
        found.predict(wrong)
    with pytest.raises(TypeError, match="must hold sounds of one channel"):
        found.predict([{"audio": np.zeros((2, 300))}])


def test_wrong_input_is_refused_by_name(pictures: Pictures, fitted: Any) -> None:
    with pytest.raises(ValueError, match="`processor` must be given with an encoder, got None"):
        FeatureInfluenceModel(pictures.encoder)
    with pytest.raises(ValueError, match="`processor` and `column` are for an encoder"):
        FeatureInfluenceModel("hidden", column="image")
    with pytest.raises(ValueError, match="must be the encoder's image processor or feature extractor, got int"):
        FeatureInfluenceModel(pictures.encoder, processor=3)
    with pytest.raises(ValueError, match=r"`column` must be a column of the pool, got 'image'"):
        fitted.predict([{"picture": 3}])
    with pytest.raises(TypeError, match="must hold images"):
        fitted.predict([{"image": np.zeros(3)}])
    with pytest.raises(ValueError, match="got 5 rows for labels of rows up to 119"):
        fitted.evaluate(pictures.dataset.select(range(5)), labels_of(pictures.bright))


def test_equal_values_are_known_as_equal() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    rows = MediaRows.of(
        [{"bytes": b"ab", "path": None}, b"ab", image, image.copy(), image.T, None, {"path": "x"}, "x"]
    )
    hashes = rows.hashes()
    assert hashes[0] == hashes[1]
    assert hashes[2] == hashes[3] != hashes[4]
    assert hashes[6] == hashes[7]
    assert rows.num_targets.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert media_bytes({"array": image}) == media_bytes(image)
    assert json.dumps(rows.take(np.array([True] + [False] * 7)).num_targets.tolist()) == "[1]"
