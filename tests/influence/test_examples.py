"""Labels of images, speech and images with text: against real steps, and against the model's own loss of each row."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, default_data_collator

from mates_hf import DirectionalProbe, ReferenceTask
from mates_hf.data.batches import Reading
from mates_hf.data.pool import CandidatePool
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.example_losses import contrastive_loss
from tests.training.modalities import KINDS, clip, images, pair_collator, pairs, seeded, vit

CLOSE = 2e-5  # nats: float32 losses, summed in another order
AGREES = 0.85  # Spearman with what real steps do; one real step on a candidate alone is below it


def warmed(kind: str, steps: int = 40, rows: Any = None) -> tuple[Any, torch.optim.Optimizer, list[dict[str, Any]]]:
    """A model after some steps, its optimizer, and its pool."""
    made = KINDS[kind]
    model, rows = made.model(), rows or made.rows(160)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    model.train()
    for _ in range(steps):
        batch = default_data_collator([rows[i] for i in rng.choice(len(rows), 16, replace=False)])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, rows


def in_real_batches(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rows: list[Any],
    ids: list[int],
    examples: list[Any],
    statistics: str = "of the batch",
) -> np.ndarray:
    """What the reference loss falls by where a candidate stands in for a member of a batch; a mean over batches.

    Batch norm normalises by `statistics`; what one batch does to the running ones is left out.
    """
    rng = np.random.default_rng(1)
    reference, found = default_data_collator(examples), np.zeros(len(ids))
    for _ in range(4):
        others = rng.choice(len(rows), 15, replace=False).tolist()
        for place, i in enumerate(ids):
            twin = copy.deepcopy(model).train(statistics == "of the batch")
            for norm in [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]:
                norm.momentum = 0.0
            steps = torch.optim.AdamW(twin.parameters(), lr=1e-3)
            steps.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            twin(**default_data_collator([rows[j] for j in [i, *others]])).loss.backward()
            steps.step()
            with torch.no_grad():
                found[place] -= float(twin.eval()(**reference).loss)
    return found


@pytest.mark.quick("ViT")
@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_labels_agree_with_real_steps(kind: str) -> None:
    """Batch norm trains by the statistics of its batch, and is measured by its running ones: that costs agreement."""
    rows = images(160, wrong=0.2)
    model, optimizer, rows = warmed(kind, rows=rows)
    examples = images(24, seed=7)
    pool = CandidatePool(rows, default_data_collator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = DirectionalProbe().measure(model, optimizer, ReferenceTask.from_examples(examples), pool)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ids = np.random.default_rng(2).choice(160, 30, replace=False).tolist()
    truth = in_real_batches(model, optimizer, rows, ids, examples)
    assert spearmanr(labels.influence[ids], truth)[0] > (AGREES if kind == "ViT" else 0.6)
    if kind == "ResNet":
        running = in_real_batches(model, optimizer, rows, ids, examples, "that run")
        assert spearmanr(labels.influence[ids], running)[0] > 0.95


@pytest.mark.quick("Whisper", "Llava")
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_row_has_the_loss_that_the_model_says(kind: str) -> None:
    model, optimizer, rows = warmed(kind, steps=3)
    pool = CandidatePool(rows, default_data_collator).select(np.arange(20))
    labels = DirectionalProbe(epsilon=1e-4).measure(model, optimizer, KINDS[kind].reference(8), pool)
    model.eval()
    with torch.no_grad():
        own = [float(model(**default_data_collator([rows[i]])).loss) for i in labels.candidate_id.tolist()]
    np.testing.assert_allclose(labels.loss, own, atol=10 * CLOSE)
    assert labels.info["reading"]["candidates"] == KINDS[kind].reading


def test_rows_are_batched_by_what_they_cost() -> None:
    """An image costs as much as its patches do, and not one position."""
    model, optimizer, rows = warmed("ViT", steps=1)
    pool = CandidatePool(rows, default_data_collator).select(np.arange(8))
    DirectionalProbe(epsilon=1e-3).measure(model, optimizer, KINDS["ViT"].reference(4), pool)
    assert pool.reading is not None
    assert pool.reading.values_per_position != Reading().values_per_position
    assert set(pool.candidates().lengths.tolist()) == {5}  # four patches and the token of the class


def test_the_model_s_own_loss_where_there_is_no_likelihood() -> None:
    """CTC gives logits for other positions than there are labels: its loss is taken row by row, of the task too."""
    config = Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), num_feat_extract_layers=2, mask_time_prob=0.0,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, ctc_loss_reduction="mean", pad_token_id=0,
        hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0, final_dropout=0.0,
    )  # fmt: skip
    for reduction, weighs in (("mean", "rows"), ("sum", "sums")):
        config.ctc_loss_reduction = reduction
        model = seeded(lambda: Wav2Vec2ForCTC(config))
        rng = np.random.default_rng(0)
        rows = [
            {
                "input_values": rng.normal(size=320).astype(np.float32),
                "labels": [*rng.integers(1, 12, 3 + i % 3).tolist(), -100, -100][:5],
            }
            for i in range(24)
        ]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(**default_data_collator(rows[:8])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task = ReferenceTask.from_examples(rows[16:])
        labels = DirectionalProbe().measure(model, optimizer, task, CandidatePool(rows[:16], default_data_collator))
        assert labels.info["reading"]["candidates"] == "row by row: the model's own loss"
        assert labels.info["reading"]["weighs"] == weighs
        model.eval()
        with torch.no_grad():
            own = [float(model(**default_data_collator([row])).loss) for row in rows[:16]]
            of_task = [float(model(**default_data_collator([row])).loss) for row in rows[16:]]
        counts = [sum(label != -100 for label in row["labels"]) for row in rows[16:]]
        np.testing.assert_allclose(labels.loss, own, rtol=1e-4)
        expected = np.average(of_task, weights=counts)
        np.testing.assert_allclose(labels.info["reference_loss"], expected, rtol=3e-2)  # after the null step


class Silent(nn.Module):
    """Says nothing of a row: no logits, no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 4)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"states": self.layer(pixel_values.flatten(1))}


def test_a_model_that_says_nothing_of_a_row_is_refused() -> None:
    model = Silent()
    optimizer = torch.optim.AdamW(model.parameters())
    model(**default_data_collator(images(4)))["states"].sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    pool = CandidatePool(images(24), default_data_collator)
    with pytest.raises(UnsupportedSettingError, match=r"Silent must give a loss or logits .*DirectionalProbe\(loss="):
        DirectionalProbe().measure(model, optimizer, KINDS["ViT"].reference(4), pool)

    def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(**batch)["states"], batch["labels"])

    labels = DirectionalProbe(loss=loss).measure(model, optimizer, KINDS["ViT"].reference(4), pool)
    assert np.std(labels.influence) > 0


def test_the_loss_of_a_pair_among_fixed_pairs() -> None:
    model = clip().eval()
    bank, rows = pair_collator(pairs(6, seed=3)), pairs(2)
    loss = contrastive_loss(bank)
    with torch.no_grad():
        for row in rows:
            together = model(**pair_collator([row, *pairs(6, seed=3)]))
            sides = [side[:1].log_softmax(-1)[0, 0] for side in (together.logits_per_text, together.logits_per_image)]
            assert float(loss(model, pair_collator([row]))) == pytest.approx(-float(sum(sides)) / 2, abs=CLOSE)
    with pytest.raises(ValueError, match="2 pairs or more"):
        contrastive_loss(pair_collator(rows[:1]))
    longer = pair_collator([{**row, "input_ids": [*row["input_ids"], 2]} for row in rows])
    with pytest.raises(ValueError, match="padding='max_length'"):
        contrastive_loss(longer)(model, pair_collator(rows[:1]))
    with pytest.raises(TypeError, match="logits_per_text"):
        contrastive_loss(default_data_collator(images(4)))(vit(), default_data_collator(images(1)))
