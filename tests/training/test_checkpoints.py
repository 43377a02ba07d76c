"""The last complete checkpoint: whatever a kill can leave half-written is skipped, whatever is whole is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mates_hf.training.checkpoints import last_complete_checkpoint, num_random_states
from tests.training.kit import make_arguments, run


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Complete checkpoints at steps 2 and 10 of a run."""
    output_dir = tmp_path_factory.mktemp("saved")
    run(make_arguments(output_dir, max_steps=10, save_strategy="steps", save_steps=2), [])
    for step in (4, 6, 8):
        shutil.rmtree(output_dir / f"checkpoint-{step}")
    return output_dir


@pytest.fixture
def output_dir(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_highest_step_and_not_the_last_name(output_dir):
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-10")


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"]
)
def test_a_file_that_was_cut_short(output_dir, name, caplog):
    cut(output_dir / "checkpoint-10" / name)
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
    assert f"{name} " in caplog.text
    assert "checkpoint-10" in caplog.text


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors"])
def test_a_file_that_is_not_there(output_dir, name):
    (output_dir / "checkpoint-10" / name).unlink()
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-2")


@pytest.mark.parametrize("text", ["", "[]", '{"global_step": 8}'])
def test_a_state_that_is_not_of_this_checkpoint(output_dir, text):
    (output_dir / "checkpoint-10" / "trainer_state.json").write_text(text)
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-2")


def test_a_shard_that_is_missing(output_dir):
    folder = output_dir / "checkpoint-10"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    assert last_complete_checkpoint(output_dir) == str(folder)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": null}'])
def test_an_index_that_names_no_files(output_dir, text, caplog):
    (output_dir / "checkpoint-10" / "model.safetensors.index.json").write_text(text)
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
    assert "model.safetensors.index.json names no files" in caplog.text


def test_a_folder_just_made_and_other_names(output_dir):
    (output_dir / "checkpoint-12").mkdir()
    (output_dir / "checkpoint-best").mkdir()
    (output_dir / "checkpoint-99").write_text("no folder")
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-10")


def test_a_checkpoint_of_the_model_alone_and_files_of_others_are_whole(output_dir):
    folder = output_dir / "checkpoint-10"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    (folder / "notes.pt").write_text("of another callback")
    assert last_complete_checkpoint(output_dir) == str(folder)


def test_no_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "not made yet") is None


def test_the_trainer_alone_stops_at_a_half_written_one(output_dir):
    # What the helper is for; when this fails, a newer Trainer may have made it unnecessary.
    (output_dir / "checkpoint-10" / "trainer_state.json").unlink()
    args = make_arguments(output_dir, max_steps=12)
    with pytest.raises(FileNotFoundError, match="trainer_state"):
        run(args, [], resume=True)
    assert run(args, [], resume=last_complete_checkpoint(output_dir)).trainer.state.global_step == 12


def in_two_processes(checkpoint: Path, num: int) -> None:
    """Make a checkpoint of one process into what as many write; it says so in this library's state."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["mates_hf"] = {"num_random_states": num}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    for rank in range(1, num):
        shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / f"rng_state_{rank}.pth")


def test_a_random_state_that_another_process_did_not_write(output_dir, caplog):
    checkpoint = output_dir / "checkpoint-10"
    in_two_processes(checkpoint, 3)
    assert last_complete_checkpoint(output_dir) == str(checkpoint)
    (checkpoint / "rng_state_2.pth").unlink()
    assert last_complete_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
    assert "rng_state_2.pth missing" in caplog.text


def test_a_model_saved_alone_and_a_node_of_its_own_miss_no_random_state(output_dir, monkeypatch):
    checkpoint = output_dir / "checkpoint-10"
    in_two_processes(checkpoint, 2)
    for rank in (0, 1):  # the second node of two
        (checkpoint / f"rng_state_{rank}.pth").rename(checkpoint / f"rng_state_{rank + 2}.pth")
    assert last_complete_checkpoint(output_dir) == str(checkpoint)
    for name in ("rng_state_2.pth", "rng_state_3.pth", "optimizer.pt", "scheduler.pt"):  # `save_only_model`
        (checkpoint / name).unlink()
    assert last_complete_checkpoint(output_dir) == str(checkpoint)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert num_random_states(4, save_on_each_node=True) == 2
    assert num_random_states(4, save_on_each_node=False) == 4
