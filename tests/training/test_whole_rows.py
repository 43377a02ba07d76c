"""Rows that training splits between processes, and a probe runs whole: refused at the start where one does not fit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from mates_hf import MatesCallback
from mates_hf.influence.micro_batches import ProbeMemoryError
from mates_hf.training import memory
from mates_hf.training.checks import whole_rows
from mates_hf.training.memory import DeviceMemory, RoundMemory
from tests.training.kit import make_arguments, make_model, make_pool, make_reference, run, small_config
from tests.training.settings import NO_FILE, Setup, assert_refused, pad, proves, ragged_pool

NOT_WHOLE = "context parallelism with rows that do not fit into a device whole"


@pytest.fixture(autouse=True)
def _shared_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_rows, "context_parallel_size", lambda: 2)


def with_memory_for(monkeypatch: pytest.MonkeyPatch, length: int, *, backward_only: bool) -> None:
    """A model for which memory ends behind rows of so many tokens."""
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def limited(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if input_ids.shape[1] > length and (torch.is_grad_enabled() or not backward_only) and not self.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)


@proves(NOT_WHOLE, NO_FILE, outcome="refused", note="the message names the row and its length")
@pytest.mark.parametrize(("length", "backward_only"), [(11, True), (8, False)], ids=["backward", "forward"])
def test_a_row_that_does_not_fit_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, backward_only: bool
) -> None:
    with_memory_for(monkeypatch, length, backward_only=backward_only)
    setup = Setup(pool=lambda: ragged_pool(200), collator=pad)
    match = "`cp_size=2` training splits rows, .* pool row 14 of 12 tokens must fit"
    assert_refused(tmp_path, setup, match, error=ProbeMemoryError)


def test_a_passage_that_does_not_fit_is_named_and_shorter_rows_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory_for(monkeypatch, 12, backward_only=True)
    Setup(pool=lambda: ragged_pool(200), collator=pad).run(tmp_path / "fits", [MatesCallback(make_reference())])
    with_memory_for(monkeypatch, 11, backward_only=True)
    setup = Setup(pool=lambda: make_pool(200).map(lambda row: {key: row[key][:10] for key in row}))
    assert_refused(tmp_path, setup, "passage 0 of the reference task of 12 tokens", error=ProbeMemoryError)


def test_what_a_whole_row_took_is_counted_at_the_end_of_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(parameter.nbytes for parameter in make_model().parameters())
    peaks = iter([5, 14, 5, 12, 5])  # before and after the pool's row and the passage, and of training
    asked: list[RoundMemory] = []
    forgotten: list[torch.device] = []
    monkeypatch.setattr(memory, "only_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(memory, "device_memory", lambda device: DeviceMemory(99 * size, 3 * size, next(peaks) * size))
    monkeypatch.setattr(memory, "forget_peak", forgotten.append)
    monkeypatch.setattr(memory, "place_on_host", lambda device, needed, **options: bool(asked.append(needed)))
    run(make_arguments(tmp_path, max_steps=10), [MatesCallback(make_reference(), small_config())], make_pool())
    assert [needed.logits for needed in asked] == [(14 - 3 - 2) * size]
    assert len(forgotten) == 2
