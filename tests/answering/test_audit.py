"""`mates-hf audit`: its counts are those of what the model was given, counted here by other means."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from mates_hf import MatesCallback, NgramInfluenceModel
from mates_hf.answering.audit import audit_run
from mates_hf.cli import main
from tests.training.kit import Stop, make_arguments, make_reference, run, small_config
from tests.training.test_allow import ENTRIES, ROWS, collate, licensed


def train(path, *callbacks, **config):
    callback = MatesCallback(
        make_reference(), small_config(num_probes=20, **config), influence_model=NgramInfluenceModel(num_buckets=64)
    )
    args = make_arguments(path, remove_unused_columns=False)
    return run(args, [callback, *callbacks], licensed(), collator=collate)


def test_counts_are_those_of_the_rows_that_the_model_was_given(tmp_path, capsys):
    result = train(tmp_path, allow="licence=cc-by,cc0")
    licensed().save_to_disk(tmp_path / "pool")
    capsys.readouterr()
    words = ["audit", str(tmp_path), "--column", "licence", "--dataset", str(tmp_path / "pool"), "--json"]
    assert main([*words, "--rows-out", str(tmp_path / "used.npy")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trained_on"]["rows"] == len(set(result.rows))
    assert found["trained_on"]["times"] == len(result.rows)
    assert np.load(tmp_path / "used.npy").tolist() == sorted(set(result.rows))
    licence = licensed()["licence"]
    every, used = collections.Counter(licence), collections.Counter(licence[row] for row in set(result.rows))
    names = {entry: entry or "(none)" for entry in ENTRIES}
    assert found["columns"]["licence"]["entries"] == {
        names[entry]: {"rows": every[entry], "used": used[entry]} for entry in ENTRIES
    }
    assert found["columns"]["licence"]["entries"]["(none)"]["used"] == 0
    assert found["columns"]["licence"]["proven"]
    assert found["verify"]["ok"]
    assert found["verify"]["rounds"] == 3
    assert found["allowed"]["num_rows"] == ROWS // 2
    assert found["forgotten"] == {"rows": 0, "trained_on_before": 0, "events": []}
    assert all(found["left_the_machine"]["checked"].values())
    assert "torch" in found["versions"]


def test_only_steps_that_are_done_count(tmp_path):
    result = train(tmp_path, Stop(15))
    assert audit_run(tmp_path).used.tolist() == sorted(set(result.rows))


def test_groups_that_rounds_recorded_do_for_their_column(tmp_path):
    train(tmp_path, group_column="licence")
    counts = audit_run(tmp_path, column="licence").facts["columns"]["licence"]
    assert sum(each["used"] for each in counts["entries"].values()) == 24 + 24 + 4  # rows of three rounds
    assert "own order are not in it" in counts["source"]
    with pytest.raises(ValueError, match="or be the `group_column` of the run, got 'source' alone"):
        audit_run(tmp_path, column="source")


def test_a_changed_file_is_exit_1_and_named(tmp_path, capsys):
    train(tmp_path)
    capsys.readouterr()
    assert main(["audit", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("Signed off by: ")
    assert any("nothing by mates_hf" in line for line in lines)
    path = tmp_path / "_mates" / "round-0002" / "scores.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert main(["audit", str(tmp_path)]) == 1
    assert "WRONG: round-0002/scores.npy" in capsys.readouterr().out


def test_rounds_elsewhere_and_another_dataset_are_said(tmp_path, capsys):
    train(tmp_path / "run", rounds_dir=str(tmp_path / "rounds"))
    found = audit_run(tmp_path / "rounds").facts
    assert not all(found["left_the_machine"]["checked"].values())
    licensed(100).save_to_disk(tmp_path / "pool")
    with pytest.raises(ValueError, match="of 400 rows, got one of 100"):
        audit_run(tmp_path / "rounds", column="licence", dataset=str(tmp_path / "pool"))
