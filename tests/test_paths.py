"""Paths that begin with `~` lie in the home folder, wherever a user may give one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mates_hf.cli import main
from mates_hf.paths import expand_path
from mates_hf.records import InfluenceLabels
from mates_hf.round_files import load_round, read_labels, write_labels
from mates_hf.round_writer import RoundWriter
from mates_hf.selection.inputs import is_stream


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, and another current one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_only_a_leading_tilde_is_the_home_folder(home) -> None:
    assert expand_path("~") == home
    assert expand_path("~/runs/a~b/~") == expand_path(Path("~/runs/a~b/~")) == home / "runs" / "a~b" / "~"
    for path in ("runs/~", "/absolute", "", "$HOME/x"):
        assert expand_path(path) == Path(path)
    named = expand_path("./~/runs")  # what the error below advises
    assert named == expand_path(named) == Path.cwd() / "~" / "runs"
    with pytest.raises(ValueError, match="must name a home folder that there is, got '~nobody-of-that-name/x'"):
        expand_path("~nobody-of-that-name/x")


def test_a_round_in_the_home_folder_is_read(home) -> None:
    writer = RoundWriter(home / "run" / "_mates", 0, {"config": 1, "pool": 2, "reference": 3, "step": 4, "weights": 5})
    labels = InfluenceLabels(
        candidate_id=np.arange(3),
        influence=np.ones(3, np.float32),
        influence_per_token=np.ones(3, np.float32),
        loss=np.ones(3, np.float32),
        num_tokens=np.ones(3, np.int32),
        probe=np.array(["gradient"] * 3),
        step_size=1.0,
    )
    write_labels(writer.path / "probes.parquet", labels)
    writer.finish({"number": 0})
    for path in ("~/run/_mates/round-0000", Path("~/run/_mates/round-0000")):
        assert load_round(path).path == home / "run" / "_mates" / "round-0000"
    assert len(read_labels("~/run/_mates/round-0000/probes.parquet").candidate_id) == 3
    (home / "data").mkdir()
    (home / "data" / "state.json").write_text("{}")
    with pytest.raises(TypeError, match=r'Pass `datasets\.load_from_disk\("~/data"\)`'):
        is_stream("~/data")
    assert os.listdir(".") == []


@pytest.mark.parametrize("command", ["round", "verify", "cost"])
def test_a_home_folder_that_is_not_there_is_one_line(command, capsys) -> None:
    assert main([command, "~nobody-of-that-name/run"]) == 1
    assert "must name a home folder that there is" in capsys.readouterr().err
    with pytest.raises(TypeError, match=r'Pass `load_dataset\("~nobody-of-that-name/run", split="train"\)`'):
        is_stream("~nobody-of-that-name/run")
