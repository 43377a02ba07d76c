"""What a round takes beside the run: counted at the boundary of a real Trainer run, by the benchmark's own code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from boundary_memory import measure  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_boundary_takes_three_times_the_trainable_bytes(dtype: torch.dtype) -> None:
    """The mean of the weights, the copy that a probe goes back to, and one gradient; and a micro-batch."""
    found = measure(192, dtype, layers=2)
    assert found["micro_batch"] < 1  # else it would hide what is counted
    assert 2.9 < found["boundary"] <= found["limit"] == 3.2 + found["micro_batch"]
    assert found["audit"] <= found["boundary"]
    assert found["average"] < (1.3 if dtype == torch.float32 else 2.5)
