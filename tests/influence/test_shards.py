"""What a killed probe has measured is read back where it is of the same direction, and deleted where it is not."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import numpy as np
import pytest

from mates_hf.engine.processes import ALONE
from mates_hf.influence import shards as module
from mates_hf.influence.difference import Direction, EpsilonChoice
from mates_hf.influence.shards import SHARDS_FILE, Shards

U = Direction(by_parameter={}, step_size=1.0, norm=3.0, parameter_norm=1.0, reference_loss=2.0, flops=0.0)
CHOICE = EpsilonChoice(epsilon=1e-3, agreement=0.999, num_rows=4, num_tokens=44)
SETTINGS = {"path_steps": 1, "loss": None}
IDS = np.arange(25)


class Rows:
    """Candidates of two trained tokens each, whose losses are their numbers."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids
        self.num_targets = np.full(len(ids), 2)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray) -> Rows:
        return Rows(self.ids[index])


def measure(folder: Path, direction=U, settings=SETTINGS, ids=IDS, choice=CHOICE, dies_at: int = 9):
    """Plus and minus, and which shards were measured."""
    measured: list[int] = []

    def losses(rows: Rows):
        if len(measured) == dies_at:
            raise InterruptedError
        measured.append(int(rows.ids[0]))
        return np.repeat(rows.ids, 2).astype(np.float32), -np.repeat(rows.ids, 2).astype(np.float32)

    shards = Shards(folder, direction, settings, ids, ALONE)
    found = shards.choice(lambda: choice)
    try:
        plus, minus = shards.measured(Rows(ids), losses)
    except InterruptedError:
        return None, measured, found
    assert np.array_equal(plus, np.repeat(ids, 2))
    assert np.array_equal(minus, -np.repeat(ids, 2))
    return plus, measured, found


@pytest.fixture
def killed(tmp_path, monkeypatch) -> Path:
    """Two of three shards were measured."""
    monkeypatch.setattr(module, "SHARD_ROWS", 10)
    folder = tmp_path / "shards"
    assert measure(folder, dies_at=2)[1] == [0, 10]
    assert sorted(path.name for path in folder.iterdir()) == ["0.npy", "10.npy", SHARDS_FILE]
    return folder


def test_the_same_direction_with_other_last_digits_continues_with_the_same_epsilon(killed):
    again = dataclasses.replace(U, norm=U.norm * (1 + 3e-6), reference_loss=U.reference_loss * (1 - 3e-6))
    _, measured, choice = measure(killed, again, choice=EpsilonChoice(epsilon=3e-3))
    assert measured == [20]
    assert choice == CHOICE


@pytest.mark.parametrize(
    "other",
    [
        {"direction": dataclasses.replace(U, norm=U.norm * 1.001)},
        {"direction": dataclasses.replace(U, reference_loss=U.reference_loss * 1.001)},
        {"settings": {**SETTINGS, "path_steps": 2}},
        {"settings": {**SETTINGS, "loss": len}},
        {"ids": IDS + 1},
        {"ids": IDS[::-1].copy()},
    ],
    ids=["norm", "reference-loss", "setting", "loss", "candidates", "their-order"],
)
def test_shards_of_anything_else_are_deleted_and_never_mixed_in(killed, other):
    (killed / "20-1.000000e-03-3.000000000e+00.npy").touch()  # as an earlier version named them
    (killed / "mine.npy").touch()
    _, measured, _ = measure(killed, **other)
    assert len(measured) == 3
    assert not list(killed.glob("20-*"))
    assert (killed / "mine.npy").exists()


@pytest.mark.parametrize("damage", ["shard", "about"])
def test_what_is_damaged_is_measured_once_more(killed, damage):
    path = killed / ("10.npy" if damage == "shard" else SHARDS_FILE)
    path.write_bytes(path.read_bytes()[:-9])
    assert measure(killed)[1] == ([10, 20] if damage == "shard" else [0, 10, 20])


def test_a_full_disk_costs_the_shards_and_not_the_probe(killed, monkeypatch, caplog):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_array", full)
    monkeypatch.setattr(module, "write_json", full)
    assert measure(killed, ids=np.arange(30))[1] == [0, 10, 20]
    assert caplog.text.count("No space left on device") == 1
