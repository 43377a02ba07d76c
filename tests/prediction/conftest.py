"""What tests of influence models share."""

from __future__ import annotations

import pytest

from mates_hf.prediction import pooling


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """States in float32 on every machine, for what must agree to the last bits."""
    monkeypatch.setattr(pooling, "multiplies_bf16", lambda device: False)
