"""Small models of images, speech, and images with text, the rows they train on, and an influence model of examples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    default_data_collator,
)

from mates_hf.data.documents import document_codes
from mates_hf.data.reference import ReferenceTask
from mates_hf.prediction.judge import fit_report, fresh_report, split_held_out
from mates_hf.records import FitReport, InfluenceLabels

NUM_CLASSES = 4
IMAGE = 39


def images(num: int, seed: int = 0, *, classes: int = NUM_CLASSES, wrong: float = 0.0) -> list[dict[str, Any]]:
    """Pictures of 8 x 8 whose lit quadrant is the class; a share of the labels is wrong."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        kind = int(rng.integers(0, classes))
        pixels = rng.normal(0, 0.3, (3, 8, 8)).astype(np.float32)
        row, column = divmod(kind, 2)
        pixels[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        label = int(rng.integers(0, classes)) if rng.random() < wrong else kind
        rows.append({"pixel_values": torch.from_numpy(pixels), "labels": label})
    return rows


def speech(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sounds whose loud bands are the tokens of the text; texts of some rows are shorter and padded with -100."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        tokens = rng.integers(0, 8, 8)
        sound = rng.normal(0, 0.3, (8, 32)).astype(np.float32)
        for place, token in enumerate(tokens):
            sound[token, 4 * place : 4 * place + 4] += 2
        said = tokens if i % 3 else rng.integers(0, 8, 8)
        labels = (said + 3).tolist()
        rows.append({"input_features": sound, "labels": labels[:6] + [-100] * 2 if i % 4 == 0 else labels})
    return rows


def captions(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """A picture, its four picture tokens, and a word for the lit quadrant; the word of every third row is another."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, row in enumerate(images(num, seed)):
        word = row["labels"] if i % 3 else int(rng.integers(0, 4))
        ids = [IMAGE] * 4 + [3, word + 5, word + 15]
        rows.append(
            {
                "input_ids": ids,
                "pixel_values": row["pixel_values"],
                "labels": [-100] * 5 + ids[5:],
                "attention_mask": [1] * len(ids),
            }
        )
    return rows


def pairs(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """A picture and a text of three tokens that says which quadrant is lit."""
    return [{"input_ids": [1, row["labels"] + 5, 2], "pixel_values": row["pixel_values"]} for row in images(num, seed)]


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def vit(num_labels: int = NUM_CLASSES) -> Any:
    return seeded(
        lambda: ViTForImageClassification(
            ViTConfig(
                image_size=8, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=48, num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )
    )  # fmt: skip


def resnet() -> Any:
    """With batch norm in every block."""
    return seeded(
        lambda: ResNetForImageClassification(
            ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=NUM_CLASSES
            )
        )
    )


def whisper() -> Any:
    return seeded(
        lambda: WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=40, num_mel_bins=8, d_model=24, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                max_source_positions=16, max_target_positions=16, dropout=0.0, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
            )
        )
    )  # fmt: skip


def llava() -> Any:
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=8, patch_size=4)  # fmt: skip
    text = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                       max_position_embeddings=32)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4)
    return seeded(lambda: LlavaForConditionalGeneration(config))


def clip() -> Any:
    config = CLIPConfig(
        text_config={"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1,
                     "pad_token_id": 0},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )  # fmt: skip
    return seeded(lambda: CLIPModel(config))


def pair_collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What CLIP is trained with."""
    return {**default_data_collator(rows), "return_loss": True}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model with its rows, and the collator that makes batches of them."""

    model: Callable[[], Any]
    rows: Callable[..., list[dict[str, Any]]]
    reading: str
    collator: Any = default_data_collator

    def reference(self, num: int = 16) -> ReferenceTask:
        return ReferenceTask.from_examples(self.rows(num, seed=99))


KINDS = {
    "ViT": Kind(vit, images, "classes"),
    "ResNet": Kind(resnet, images, "classes"),
    "Whisper": Kind(whisper, speech, "unshifted"),
    "Llava": Kind(llava, captions, "shifted"),
}


class PixelRidge:
    """An influence model of examples: a ridge on the first float input and on the last label of each row."""

    reads_examples = True

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty
        self.model: Any = None
        self._weights: np.ndarray | None = None
        self._report: FitReport | None = None

    def for_run(self, *, model: Any, tokenizer: Any = None) -> PixelRidge:
        twin = type(self)(self.penalty)
        twin._weights, twin._report, twin.model = self._weights, self._report, model
        return twin

    def __deepcopy__(self, memo: Any) -> PixelRidge:
        return self.for_run(model=self.model)

    @property
    def report(self) -> FitReport:
        assert self._report is not None
        return self._report

    def _features(self, candidates: Any) -> np.ndarray:
        assert self.model is not None  # bound to the run
        found = []
        for place in range(len(candidates)):
            batch = candidates.batch(np.array([place]), "cpu")
            values = next(value for value in batch.inputs.values() if torch.is_floating_point(value))
            label = int(batch.labels.reshape(-1)[-1])
            hot = np.eye(64)[label % 64]
            found.append(np.concatenate([values.numpy().reshape(-1), hot, [1.0]]))
        return np.array(found)

    def fit(self, candidates: Any, labels: InfluenceLabels, *, held_out_fraction: float = 0.2,
            documents: Any = None, previous: Any = None, seed: int = 0) -> PixelRidge:  # fmt: skip
        assert len(candidates) == len(labels)  # one row a label, in their order
        x, y = self._features(candidates), labels.influence.astype(np.float64)
        held_out = split_held_out(len(y), held_out_fraction, seed, documents)
        self._weights = self._solve(x[~held_out], y[~held_out])
        self._report = fit_report(x[held_out] @ self._weights, y[held_out], num_labels=int((~held_out).sum()))
        self._weights = self._solve(x, y)
        return self

    def _solve(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.linalg.solve(x.T @ x + self.penalty * np.eye(x.shape[1]), x.T @ y)

    def predict(self, candidates: Any) -> np.ndarray:
        assert self._weights is not None
        return (self._features(candidates) @ self._weights).astype(np.float32)

    def evaluate(self, candidates: Any, labels: InfluenceLabels, *, documents: Any = None) -> FitReport:
        return fresh_report(
            lambda: self.predict(candidates).astype(np.float64) / labels.step_size, labels, self.report, groups=None,
            documents=document_codes(candidates) if documents is None else documents, seed=0,
        )  # fmt: skip

    def save_pretrained(self, path: Any) -> None:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        assert self._weights is not None
        np.save(folder / "weights.npy", self._weights)
        content = {"kind": "PixelRidge", "penalty": self.penalty, "report": self.report.to_dict()}
        (folder / "config.json").write_text(json.dumps(content))

    @classmethod
    def from_pretrained(cls, path: Any) -> PixelRidge:
        config = json.loads((Path(path) / "config.json").read_text())
        found = cls(config["penalty"])
        found._weights = np.load(Path(path) / "weights.npy")
        found._report = FitReport.from_dict(config["report"])
        return found


def trainer(model: nn.Module, rows: Any, output_dir: Path, callbacks: list[Any], *, collator: Any = None,
            **changes: Any) -> Trainer:  # fmt: skip
    """A Trainer of a few steps on the CPU."""
    from tests.training.kit import make_arguments

    return transformers.Trainer(
        model=model, args=make_arguments(output_dir, **{"max_steps": 14, "learning_rate": 1e-3, **changes}),
        train_dataset=rows, data_collator=collator or default_data_collator, callbacks=callbacks,
    )  # fmt: skip
