from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import mates_hf
from mates_hf.cli import main
from mates_hf.records import InfluenceLabels, write_array, write_json
from mates_hf.round_files import RoundWriter, write_labels

KEY = {"config": {}, "pool": {}, "step": 8, "weights": "w"}


def write_round(rounds_dir: Path, *, selects: bool) -> Path:
    influence = np.array([0.25, -0.5, 0.75], np.float32)
    labels = InfluenceLabels(
        candidate_id=np.array([4, 0, 9]),
        influence=influence,
        influence_per_token=influence,
        loss=np.ones(3, np.float32),
        num_tokens=np.array([2, 3, 4], np.int32),
        probe=np.array(["directional"] * 3),
    )
    writer = RoundWriter(rounds_dir, 3, KEY)
    write_labels(writer.path / "probes.parquet", labels)
    decision = "own_order"
    if selects:
        decision = "select"
        write_array(writer.path / "candidates.npy", np.array([1, 2, 3, 5]))
        write_array(writer.path / "scores.npy", np.array([-4.0, 1.0, -4.0, 3.0], np.float32))
        write_array(writer.path / "selection.npy", np.array([5, 2]))
    guard = {"decision": decision, "spearman": 0.5, "interval": [0.25, 0.75]}
    return writer.finish({"guard": guard, "seconds": {"probe": 1.5}, "seeds": [1, 2, 3, 4, 5]})


def test_round_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["round", str(write_round(tmp_path, selects=True))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "round: round-0003"
    assert "probed: 3 candidates (directional), 9 trained tokens" in lines
    assert "guard: decision select, spearman 0.5, interval [0.25, 0.75]" in lines
    assert "selected: 2 pool rows" in lines
    # The mean over rows 5 and 2, not over the highest of some other order.
    assert "predicted influence of the selected rows (nats/token): mean +2.000e+00" in lines
    assert any(line.startswith("influence (nats/token, > 0 helps): mean +1.667e-01") for line in lines)
    assert lines[-2:] == ["seconds: probe 1.5", "seeds: 5 values"]


def test_round_in_own_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["round", str(write_round(tmp_path, selects=False))]) == 0
    out = capsys.readouterr().out
    assert "selected: nothing; the run went on in the Trainer's own order" in out
    assert "predicted influence" not in out


def test_a_path_that_is_no_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["round", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("mates-hf: ")
    assert "is not a finished round" in output.err


def test_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("torch", "transformers", "accelerate", "datasets", "numpy", "numba", "pyarrow"):
        assert f"{name}: {importlib.metadata.version(name)}" in lines
    for start in ("python: ", "platform: ", "torch build: ", "accelerators: ", "torch threads: ", "threads: "):
        assert len([line for line in lines if line.startswith(start)]) == 1, start
    assert all(line.partition(": ")[2] for line in lines)


def test_environment_names_variables_and_tells_no_value_or_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"MASTER_ADDR": "secret-host", "WORLD_SIZE": "876543", "NCCL_SOCKET_IFNAME": "secret-card"}
    untold = {"HF_TOKEN": "secret-token", "WANDB_API_KEY": "secret-key"}
    for name, value in {**told, **untold}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("set in the environment: "))
    assert set(told) <= set(line.partition(": ")[2].split(", "))
    assert not any(name in out for name in untold)
    assert not any(value in out for value in {**told, **untold}.values())
    assert "OMP_NUM_THREADS=3" in out
    assert str(Path.home()) not in out
    assert str(Path(mates_hf.__file__).parents[1]) not in out


def test_environment_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["env"]) == 0
    assert "accelerators: unknown, torch cannot be imported (ModuleNotFoundError)" in capsys.readouterr().out


def test_a_damaged_round_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_round(tmp_path, selects=True)
    (path / "scores.npy").write_bytes(b"\x93NUMPY")
    assert main(["round", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"mates-hf: `{path / 'scores.npy'}` must be a whole .npy file")
    assert output.err.count("\n") == 1


def test_the_cost_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere" / "round-0001").mkdir(parents=True)
    stages = {"probe": {"seconds": 2.0, "flops": 5e9}, "fit": {"seconds": 1.0}}
    write_json(tmp_path / "elsewhere/round-0001/round.json", {"step": 8, "stages": stages})
    write_json(tmp_path / "trainer_state.json", {"global_step": 16, "total_flos": 2e11, "log_history": []})
    assert main(["cost", str(tmp_path)]) == 1
    assert "must hold a finished round" in capsys.readouterr().err
    assert main(["cost", str(tmp_path), "--rounds-dir", str(tmp_path / "elsewhere")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (probe,) = [line for line in lines if line.startswith("probe")]
    assert probe.split() == ["probe", "2.00", "not", "recorded", "5.000e+09", "2.50%"]
    assert main(["cost", str(tmp_path), "--json", "--rounds-dir", str(tmp_path / "elsewhere")]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["probe"]["share_of_training_flops"] == 0.025
