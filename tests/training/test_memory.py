"""What a round takes beside the run: counted at a real boundary by the benchmark's code, and foreseen at step 1."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from benchmarks.lab.boundary import measure
from mates_hf import MatesCallback, load_round
from mates_hf.engine.averaging import WeightAverage
from mates_hf.influence.micro_batches import ProbeMemoryError
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.training import memory
from mates_hf.training.memory import DeviceMemory, RoundMemory, place_on_host
from tests.training.kit import Result, make_arguments, make_model, make_pool, make_reference, run, small_config


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_boundary_takes_three_times_the_trainable_bytes(dtype: torch.dtype) -> None:
    """The mean of the weights, the copy that a probe goes back to, and one gradient; and a micro-batch."""
    found = measure(192, dtype, layers=2)
    assert found["micro_batch"] < 1  # else it would hide what is counted
    assert 2.9 < found["boundary"] <= found["limit"] == 3.2 + found["micro_batch"]
    assert found["audit"] <= found["boundary"]
    assert found["average"] < (1.3 if dtype == torch.float32 else 2.5)


GIB = 2**30


def needed(**changes: int) -> RoundMemory:
    return dataclasses.replace(
        RoundMemory(mean=4 * GIB, live=4 * GIB, probe=8 * GIB, logits=GIB, num_tokens=9), **changes
    )


@pytest.mark.parametrize(
    ("total", "has_host", "place"),
    [
        (80, True, "device"),
        (80, False, "device"),
        (30, True, "device"),  # 24 + 4 + 1/8 in the window, 27 at a boundary
        (28, True, "host"),  # ... which is more than it has
        (28, False, "refused"),
        (29, False, "device"),
        (29, True, "host"),  # it would fit, but hardly
        (19, True, "host"),  # 10 + 8 + 1 at a boundary without the weights of the model, which are on the host as well
        (18, True, "refused"),
    ],
)
def test_where_the_mean_goes_and_when_a_round_is_refused(total: int, has_host: bool, place: str) -> None:
    device = DeviceMemory(total=total * GIB, allocated=10 * GIB, peak=(24 if total > 20 else 12) * GIB)
    if place != "refused":
        assert place_on_host(device, needed(), has_host=has_host) is (place == "host")
        return
    with pytest.raises(ProbeMemoryError) as caught:
        place_on_host(device, needed(), has_host=has_host)
    text = str(caught.value)
    assert f"{total}.00 GiB" in text
    assert ("8.00 GiB more" in text) is has_host
    assert ("28.12 GiB" in text and "`average_steps=0`, which saves 4.00 GiB" in text) is not has_host
    assert "probe_tokens_per_batch" in text or not has_host
    with pytest.raises(ProbeMemoryError) as caught:  # where a micro-batch is one row, a smaller one does not exist
        place_on_host(device, needed(longest_row=9), has_host=has_host)
    assert "probe_tokens_per_batch" not in str(caught.value)
    # `auto_find_batch_size` would take torch's own words for the batch's fault.
    assert not should_reduce_batch_size(caught.value)


def test_a_run_without_averaging_or_with_a_probe_of_its_own_needs_less() -> None:
    device = DeviceMemory(total=24 * GIB, allocated=10 * GIB, peak=23 * GIB)
    assert place_on_host(device, needed(mean=0, live=0), has_host=True) is False
    assert place_on_host(device, needed(mean=0, live=0), has_host=False) is False
    with pytest.raises(ProbeMemoryError, match="26.00 GiB") as caught:
        place_on_host(device, needed(mean=0, live=0, probe=15 * GIB), has_host=False)
    assert "average_steps" not in str(caught.value)


def on_made_up_device(
    tmp_path: Path, patch: pytest.MonkeyPatch, total: float, **args: Any
) -> tuple[Result, list[RoundMemory]]:
    """A run on the CPU that takes it for a CUDA device of a size, in copies of its parameters."""
    asked: list[RoundMemory] = []
    place = memory.place_on_host

    def note(device: DeviceMemory, needed: RoundMemory, **options: bool) -> bool:
        asked.append(needed)
        return place(device, needed, **options)

    size = sum(parameter.nbytes for parameter in make_model().parameters())
    given = DeviceMemory(total=int(total * size), allocated=3 * size, peak=5 * size)
    patch.setattr(memory, "only_device", lambda model: torch.device("cuda"))
    patch.setattr(memory, "device_memory", lambda device: given)
    patch.setattr(memory, "place_on_host", note)
    callback = MatesCallback(make_reference(), small_config())
    return run(make_arguments(tmp_path, **args), [callback], make_pool()), asked


def test_a_mean_on_the_host_selects_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy, asked = on_made_up_device(tmp_path / "device", monkeypatch, 20, max_steps=10)
    size = sum(parameter.nbytes for parameter in make_model().parameters())
    expected = RoundMemory(size, size, probe=2 * size, logits=2 * 12 * 64 * 4, num_tokens=12, longest_row=12)
    assert asked == [expected]
    places: list[bool] = []
    update = WeightAverage.update
    monkeypatch.setattr(WeightAverage, "update", lambda self: places.append(self._on_host) or update(self))
    tight, _ = on_made_up_device(tmp_path / "host", monkeypatch, 6, max_steps=10)
    assert places
    assert all(places)
    assert tight.rows == roomy.rows
    rounds = [load_round(tmp_path / place / "_mates/round-0001") for place in ("device", "host")]
    assert np.array_equal(rounds[0].labels.influence, rounds[1].labels.influence)


def test_a_round_that_does_not_fit_ends_the_run_at_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProbeMemoryError, match="The first step took .* GiB at its peak"):
        on_made_up_device(tmp_path, monkeypatch, 4.9, auto_find_batch_size=True)
    assert not list((tmp_path / "_mates").glob("round-*"))


def test_what_probes_hold_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(10, 10)
    known = torch.optim.AdamW(model.parameters())
    unknown = torch.optim.ASGD(model.parameters())
    model(torch.ones(1, 10)).sum().backward()
    monkeypatch.setattr(memory, "local_shard", lambda tensor: tensor.to("meta"))  # what is on a CPU does not count
    for optimizer in (known, unknown):
        optimizer.step()
    size = 4 * 110
    assert memory._probe_memory(DirectionalProbe(), known, size) == 2 * size
    assert memory._probe_memory(DirectionalProbe(second_moment="batches"), known, size) == 3 * size
    assert memory._probe_memory(OneStepProbe(), known, size) == 2 * size
    state = sum(value.nbytes for values in unknown.state.values() for value in values.values() if value is not None)
    assert state > size
    assert memory._probe_memory(OneStepProbe(), unknown, size) == 2 * size + state
    assert memory._probe_memory(LossReductionProbe(), known, size) == 2 * size  # its copy of the state is on the host
    container = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)  # somebody's own, with no state but its parts'
    container.optimizers = (unknown,)
    assert memory._probe_memory(OneStepProbe(), container, size) == 2 * size + state
    assert memory._probe_memory(object(), known, size) == 0


def test_a_device_that_does_not_tell_is_not_checked() -> None:
    assert memory.device_memory(torch.device("cpu")) is None
    assert memory.starts_on_host(nn.Linear(2, 2)) is False
    two = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    assert memory.only_device(two) is None
