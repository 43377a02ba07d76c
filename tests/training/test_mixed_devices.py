"""Parameters and logits on different devices: what is moved where, and the error where a model cannot be fed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mates_hf.data.batches import ModelBatch
from mates_hf.data.pool import CandidatePool
from mates_hf.engine.model_traits import input_device
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.passes import likelihood_of
from mates_hf.influence.probe import read_given
from tests.training.kit import VOCAB, make_pool


class Spread(nn.Module):
    """Its first parameter is on another device than its input embedding, as with `device_map`."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.zeros(4, VOCAB, device="meta"))
        self.embedding = nn.Embedding(VOCAB, 4)
        self.config = SimpleNamespace()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")


def test_inputs_go_to_the_embedding_and_labels_to_the_logits() -> None:
    assert input_device(Spread()).type == "cpu"
    labels = torch.tensor([[-100, 5, 6]])
    batch = ModelBatch(inputs={"input_ids": labels.clamp(min=0)}, labels=labels, shifted=True)
    losses = likelihood_of(torch.zeros(1, 3, VOCAB, device="meta"), batch)
    assert losses.device.type == "meta"
    assert losses.shape == (2,)


def test_a_model_that_cannot_be_fed_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedSettingError, match="at least two devices"):
        read_given(Spread(), CandidatePool(make_pool(8), None), None, None)
