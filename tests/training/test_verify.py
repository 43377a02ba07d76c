"""`mates-hf verify`: what a run left is what it must be, and whatever is changed afterwards is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mates_hf
from mates_hf import MatesCallback, NgramInfluenceModel
from mates_hf.cli import main
from mates_hf.disk import read_json, write_array, write_json
from mates_hf.round_files import read_labels, write_checksums, write_labels
from mates_hf.training.verify import Problem, report_lines, verify_run
from tests.training.kit import Stop, make_arguments, make_pool, make_reference, run, small_config

EARLIER_KEEP = 2


def train(output_dir: Path, **config: Any) -> Path:
    args = make_arguments(output_dir)
    callback = MatesCallback(
        make_reference(), small_config(**config), influence_model=NgramInfluenceModel(num_buckets=256)
    )
    run(args, [callback])
    return output_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three selecting rounds at a temperature, so that scores, labels and seed all decide."""
    return train(tmp_path_factory.mktemp("verify") / "run", temperature=0.5)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def forge(path: Path, **changes: Any) -> None:
    """Make hashes and checksums agree with a tampered round, as a careful forger would."""
    info = {**read_json(path / "round.json"), **changes}
    for name in ("selection.npy", "own_order.npy"):
        if (path / name).exists():
            info["order_sha256"] = hashlib.sha256(np.load(path / name).tobytes()).hexdigest()
    write_json(path / "round.json", info)
    write_json(path / "selection.json", {name: info[name] for name in read_json(path / "selection.json")})
    write_checksums(path, info)


# --- runs as they are ---


@pytest.mark.quick("slice", "own-order", "pruned-pool", "drift")
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"candidate_scope": "pool", "temperature": 1.0},
        {"min_spearman": 1.0, "on_weak_signal": "own_order"},
        {"random_rounds": 2},
        {"keep_rounds": EARLIER_KEEP},
        {"keep_rounds": EARLIER_KEEP, "candidate_scope": "pool"},
        {"keep_rounds": EARLIER_KEEP, "min_spearman": 1.0, "on_weak_signal": "own_order"},
        {"drift_check_steps": 3, "drift_spearman": 1.0, "average_steps": 2, "switch_lead_steps": 1},
    ],
    ids=["slice", "pool", "own-order", "two-random", "pruned", "pruned-pool", "pruned-own-order", "drift"],
)
def test_a_run_is_what_it_must_be(tmp_path, config):
    result = verify_run(train(tmp_path, **config))
    assert result.problem is None
    numbers = [checked.number for checked in result.rounds]
    assert numbers == sorted(int(path.name[6:]) for path in (tmp_path / "_mates").glob("round-*"))
    assert len(numbers) >= 2
    assert [checked.decision for checked in result.rounds] == [
        "own_order" if "on_weak_signal" in config else "select" for _ in numbers
    ]
    assert ("keep_rounds" in config) is (numbers[0] > config.get("random_rounds", 1))


def test_a_row_without_a_target_among_probes_and_candidates(tmp_path):
    pool = make_pool()
    labels = [[-100] * len(row) if i % 3 == 1 else row for i, row in enumerate(pool["labels"])]
    pool = pool.remove_columns("labels").add_column("labels", labels)
    callback = MatesCallback(make_reference(), small_config(), influence_model=NgramInfluenceModel(num_buckets=256))
    run(make_arguments(tmp_path), [callback], pool)
    info = read_json(tmp_path / "_mates" / "round-0001" / "round.json")
    assert info["num_skipped"] > 0
    assert verify_run(tmp_path).problem is None


@pytest.mark.quick("larger*", "more*")
@pytest.mark.parametrize(
    ("stop", "first", "then", "gap"),
    [
        (9, {}, {"per_device_train_batch_size": 8}, 1),
        (9, {}, {"per_device_train_batch_size": 2}, -1),
        (10, {"max_steps": 10}, {"max_steps": 20}, 1),
        (9, {}, {}, 0),
    ],
    ids=["larger-batch", "smaller-batch", "more-steps", "as-it-was"],
)
def test_a_run_resumed_with_another_batch_or_end_is_what_it_must_be(tmp_path, stop, first, then, gap):
    """The next round begins later or earlier than the rows of the one before it last."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 20}

    def callback() -> MatesCallback:
        model = NgramInfluenceModel(num_buckets=64)
        return MatesCallback(make_reference(), small_config(switch_lead_steps=1), influence_model=model)

    run(make_arguments(tmp_path, **{**settings, **first}), [callback(), Stop(stop)])
    checkpoint = str(tmp_path / f"checkpoint-{stop}")
    run(make_arguments(tmp_path, **{**settings, **then}), [callback()], resume=checkpoint)
    result = verify_run(tmp_path)
    assert result.problem is None
    begin = [checked.from_position for checked in result.rounds]
    end = [checked.from_position + checked.num_rows for checked in result.rounds]
    assert len(begin) == 3
    infos = [read_json(tmp_path / "_mates" / f"round-{number:04d}" / "round.json") for number in (1, 2)]
    per_step = {info["num_rows"] // (info["to_step"] - info["from_step"]) for info in infos}
    if "per_device_train_batch_size" in then and len(per_step) == 1:
        gap = 0  # older transformers resume with the checkpoint's batch size, whatever the arguments say
    assert np.sign(begin[1] - end[0]) == gap
    path = tmp_path / "_mates" / "round-0002"
    forge(path, from_position=begin[1] + 1)
    problem = verify_run(tmp_path).problem
    assert problem is not None
    assert problem.file == ("round.json" if gap == 0 else "consumed.npy")


def test_lines_and_json_of_a_run(finished, capsys):
    for path in (finished, finished / "_mates"):
        assert main(["verify", str(path)]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        lines = output.out.splitlines()
        assert lines[0] == "round 1: ok, select, 24 rows of 48 candidates, positions 28 to 52, 40 probed"
        assert [line.split(":")[0] for line in lines] == ["round 1", "round 2", "round 3"]
    assert main(["verify", str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["problem"] is None
    assert [checked["from_position"] for checked in found["rounds"]] == [28, 52, 76]


def test_leftovers_are_told_and_no_error(copied):
    for name in ("round-0004.partial", "round-0002.stale", "round-one"):
        (copied / "_mates" / name).mkdir()
    (copied / "_mates" / "average-7.safetensors.tmp").touch()
    result = verify_run(copied)
    assert result.problem is None
    assert result.leftovers == ("average-7.safetensors.tmp", "round-0002.stale", "round-0004.partial", "round-one")
    assert [line for line in report_lines(result) if line.startswith("left over: round-0004.partial")]


def test_no_run_is_an_error_that_says_where_to_look(finished, tmp_path, capsys):
    (tmp_path / "_mates" / "round-0001.partial").mkdir(parents=True)
    for path, what in (
        (tmp_path / "nowhere", "holds no round"),
        (finished / "_mates" / "round-0001", "is a round: pass the directory it lies in"),
        (tmp_path, "must hold a finished round, got round-0001.partial"),
    ):
        assert main(["verify", str(path)]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert what in output.err


def test_a_run_is_verified_without_torch(finished):
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'datasets', 'accelerate', 'numba'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from mates_hf.cli import main\n"
        f"sys.exit(main(['verify', {str(finished)!r}]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mates_hf.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


# --- changed by accident: checksums tell ---


def test_a_changed_byte_in_any_file_is_found_and_the_file_named(copied, capsys):
    path = copied / "_mates" / "round-0002"
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert {"round.json", "SHA256SUMS", "scores.npy", "influence_model/model.safetensors"} < set(files)
    for name in files:
        before = (path / name).read_bytes()
        (path / name).write_bytes(before[:-2] + bytes([before[-2] ^ 4]) + before[-1:])
        problem = verify_run(copied).problem
        assert problem is not None, name
        # The last line of the checksums is round.json's: which of the two is wrong, nobody can tell.
        assert (problem.round, problem.file) in {("round-0002", name), ("round-0002", "round.json")}, name
        assert problem.file == name or name == "SHA256SUMS"
        (path / name).unlink()
        problem = verify_run(copied).problem
        assert problem is not None, name
        assert (problem.round, problem.file) == ("round-0002", name)
        (path / name).write_bytes(before)
    assert main(["verify", str(copied)]) == 0
    (path / "scores.npy").unlink()
    capsys.readouterr()
    assert main(["verify", str(copied)]) == 1
    output = capsys.readouterr()
    assert output.out.startswith("round 1: ok")
    assert "round 2" not in output.out
    assert output.err.startswith("mates-hf: round-0002/scores.npy: expected a file with SHA-256 ")
    assert output.err.endswith(", found no such file\n")
    assert main(["verify", str(copied), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problem"]["file"] == "scores.npy"


def test_a_missing_round_is_found(copied):
    shutil.rmtree(copied / "_mates" / "round-0002")
    result = verify_run(copied)
    assert [checked.number for checked in result.rounds] == [1]
    assert result.problem == Problem("round-0002", "round.json", "a finished round", "none, though round 3 is there")
    shutil.rmtree(copied / "_mates" / "round-0001")
    problem = verify_run(copied).problem
    assert problem is not None
    assert "the first round to be 1 (`random_rounds`)" in problem.expected


# --- changed on purpose, checksums and hashes redone: recomputing tells ---


def edit(name: str, change: Callable[[np.ndarray], Any], number: int = 2) -> Callable[[Path], None]:
    """Change an array of a round in a copy."""

    def apply(rounds_dir: Path) -> None:
        path = rounds_dir / f"round-{number:04d}"
        values = np.load(path / name)
        changed = change(values)
        write_array(path / name, values if changed is None else changed)
        forge(path)

    return apply


def swap(values: np.ndarray) -> None:
    values[[0, 5]] = values[[5, 0]]


def set_info(name: str, value: Any, part: str | None = None) -> Callable[[Path], None]:
    """Change an entry of `round.json`, in all its copies."""

    def apply(rounds_dir: Path) -> None:
        path = rounds_dir / "round-0002"
        info = read_json(path / "round.json")
        (info if part is None else info[part])[name] = value
        key = read_json(path / "key.json")
        if part in key:
            key[part][name] = value
        write_json(path / "key.json", key)
        forge(path, **info)

    return apply


def name_another_probe(rounds_dir: Path) -> None:
    path = rounds_dir / "round-0002"
    key = read_json(path / "key.json")
    key["measured_with"]["probe"] = {"class": "another"}
    write_json(path / "key.json", key)
    forge(path)


def take_a_passed_over_candidate(rounds_dir: Path) -> None:
    path = rounds_dir / "round-0002"
    selection = np.load(path / "selection.npy")
    selection[3] = np.setdiff1d(np.load(path / "candidates.npy"), selection)[0]
    write_array(path / "selection.npy", selection)
    forge(path)


def take_a_row_from_outside(rounds_dir: Path) -> None:
    path = rounds_dir / "round-0002"
    selection, probes = np.load(path / "selection.npy"), read_labels(path / "probes.parquet").candidate_id
    consumed = np.unpackbits(np.load(path / "consumed.npy"), count=400).astype(bool)
    others = np.setdiff1d(np.flatnonzero(~consumed), np.concatenate([np.load(path / "candidates.npy"), probes]))
    selection[3] = others[0]
    write_array(path / "selection.npy", selection)
    forge(path)


def train_on_a_probe(rounds_dir: Path) -> None:
    path = rounds_dir / "round-0002"
    selection = np.load(path / "selection.npy")
    selection[3] = read_labels(path / "probes.parquet").candidate_id[7]
    write_array(path / "selection.npy", selection)
    forge(path)


def probe_another_row(rounds_dir: Path) -> None:
    path = rounds_dir / "round-0002"
    labels = read_labels(path / "probes.parquet")
    consumed = np.unpackbits(np.load(path / "consumed.npy"), count=400).astype(bool)
    taken = np.concatenate([np.load(path / "candidates.npy"), labels.candidate_id])
    ids = labels.candidate_id.copy()
    ids[0] = np.setdiff1d(np.flatnonzero(~consumed), taken)[0]
    object.__setattr__(labels, "candidate_id", ids)
    derivatives = np.array(labels.token_derivatives)
    object.__setattr__(labels, "token_derivatives", derivatives)
    write_labels(path / "probes.parquet", labels)
    forge(path)


def scale_the_labels(rounds_dir: Path) -> None:
    """The temperature's unit: half the spread is twice the temperature."""
    path = rounds_dir / "round-0002"
    labels = read_labels(path / "probes.parquet")
    object.__setattr__(labels, "influence_per_token", labels.influence_per_token * np.float32(0.05))
    object.__setattr__(labels, "token_derivatives", np.array(labels.token_derivatives))
    write_labels(path / "probes.parquet", labels)
    forge(path)


def free_a_consumed_row(bits: np.ndarray) -> None:
    byte = int(np.flatnonzero(bits)[0])
    bits[byte] &= bits[byte] - 1


def repeat_a_row(values: np.ndarray) -> None:
    values[4] = values[9]


def raise_a_passed_over_score(rounds_dir: Path) -> None:
    path = rounds_dir / "round-0002"
    passed_over = ~np.isin(np.load(path / "candidates.npy"), np.load(path / "selection.npy"))
    edit("scores.npy", lambda scores: np.where(passed_over, scores.max() + 100, scores))(rounds_dir)


TAMPERED = {
    "training order": (edit("selection.npy", swap), "selection.npy", "what scores, labels and seed give"),
    "another candidate": (take_a_passed_over_candidate, "selection.npy", "what scores, labels and seed give"),
    "a row outside the slice": (take_a_row_from_outside, "selection.npy", "rows of candidates.npy only"),
    "a probe is trained on": (train_on_a_probe, "selection.npy", "no probed row"),
    "a row twice": (edit("selection.npy", repeat_a_row), "selection.npy", "each row once"),
    "a row too few": (edit("selection.npy", lambda rows: rows[:-1]), "selection.npy", "24 entries"),
    "scores": (raise_a_passed_over_score, "selection.npy", "what scores, labels and seed give"),
    "scores not finite": (edit("scores.npy", lambda x: x * np.float32(np.inf)), "scores.npy", "can be selected on"),
    "scores as float64": (edit("scores.npy", lambda x: x.astype(np.float64)), "scores.npy", "float32"),
    "targets": (
        edit("num_targets.npy", lambda x: x * (np.arange(len(x), dtype=np.int32) % 2)),
        "selection.npy",
        "what scores",
    ),
    "the labels' unit": (scale_the_labels, "selection.npy", "what scores, labels and seed give"),
    "candidates reordered": (edit("candidates.npy", swap), "candidates.npy", "what ledger and seed draw"),
    "a probe": (probe_another_row, "probes.parquet", "what ledger and seed draw"),
    "a consumed row freed": (edit("consumed.npy", free_a_consumed_row), "consumed.npy", "consumed in round 1 and its"),
    "consumed of another pool": (edit("consumed.npy", lambda x: x[:-1]), "consumed.npy", "50 entries"),
    "a probed row forgotten": (
        edit("probed.npy", free_a_consumed_row),
        "probed.npy",
        "the rows that earlier rounds probed",
    ),
    "probed of another pool": (edit("probed.npy", lambda x: x[:-1]), "probed.npy", "50 entries"),
    "the probe's seed": (set_info("probe_seed", 1), "round.json", "`probe_seed` "),
    "another probe": (name_another_probe, "key.json", "`probe` "),
    "position": (set_info("from_position", 53), "round.json", "`from_position` 52, where the rows of round 1 end"),
    "cursor": (set_info("cursor", 3), "round.json", "`cursor` "),
    "cursor beyond the pool": (set_info("cursor", 2**62), "round.json", "`cursor` in the pool"),
    "seed": (set_info("seed", 1), "round.json", "`seed` 0, as `selection_seed`"),
    "seed everywhere": (set_info("selection_seed", 1, "config"), "round.json", "`seed` 1, as `selection_seed`"),
    "temperature": (set_info("temperature", 0.1, "config"), "round.json", "`temperature` 0.5, as round 1"),
    "pool": (set_info("num_rows", 401, "pool"), "consumed.npy", "51 entries"),
    "reference": (set_info("digest", "other", "reference"), "round.json", "`digest` "),
    "weights": (set_info("weights", "other"), "key.json", "`weights` 'other', as round.json"),
    "decision": (set_info("decision", "own_order", "guard"), "SHA256SUMS", "a checksum of own_order.npy"),
    "number": (set_info("number", 3), "round.json", "`number` 2"),
    "a setting of a newer version": (set_info("later", 1, "config"), "round.json", "`config` of this version"),
    "steps": (set_info("to_step", 8), "round.json", "`to_step` after `from_step`"),
    "position as text": (set_info("from_position", "52"), "round.json", "`from_position` as a whole number"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_changed_on_purpose_is_found_and_named(copied, case):
    tamper, file, expected = TAMPERED[case]
    tamper(copied / "_mates")
    result = verify_run(copied)
    assert result.problem is not None
    assert (result.problem.round, result.problem.file) == ("round-0002", file), result.problem
    assert expected in result.problem.expected
    assert [checked.number for checked in result.rounds] == [1]


def test_the_hash_of_the_order_is_recomputed(copied):
    path = copied / "_mates" / "round-0001"
    info = {**read_json(path / "round.json"), "order_sha256": "0" * 64}
    write_json(path / "round.json", info)
    write_json(path / "selection.json", {name: info[name] for name in read_json(path / "selection.json")})
    write_checksums(path, info)
    problem = verify_run(copied).problem
    assert problem is not None
    assert (problem.round, problem.file) == ("round-0001", "selection.npy")
    assert problem.expected == f"rows whose SHA-256 is {'0' * 64}, as round.json"


def test_an_own_order_that_trains_on_a_probe_is_found(tmp_path):
    train(tmp_path, min_spearman=1.0, on_weak_signal="own_order")
    path = tmp_path / "_mates" / "round-0003"
    rows = np.load(path / "own_order.npy")
    rows[0] = read_labels(path / "probes.parquet").candidate_id[0]
    write_array(path / "own_order.npy", rows)
    forge(path)
    problem = verify_run(tmp_path).problem
    assert problem is not None
    assert (problem.round, problem.file, problem.expected) == ("round-0003", "own_order.npy", "no probed row")


def test_checksums_that_name_a_file_outside_are_refused(copied, tmp_path):
    (tmp_path / "secret").write_text("secret")
    sums = copied / "_mates" / "round-0001" / "SHA256SUMS"
    for name in ("../../../secret", str(tmp_path / "secret"), "influence_model/../../../../secret"):
        digest = hashlib.sha256(b"secret").hexdigest()
        sums.write_text(f"{digest}  {name}\n")
        problem = verify_run(copied).problem
        assert problem is not None
        assert problem.file == "SHA256SUMS"
        assert "a file of the round" in problem.found
